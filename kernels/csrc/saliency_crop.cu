// CUDA backend: a block per sample. All its threads run the rule on the same values and meet only to count pixels.
//
// Counting is lazy, as on the CPU: most windows are accepted at the first attempt, so the map is read about four times,
// and after the first time from the cache. Counting all twenty candidates in one sweep needs a register for each.
#include "saliency_crop_cuda.h"

namespace cast_fast {
namespace {

constexpr int kThreads = 256;  // with 512, or with a bound of two blocks, ptxas spills registers
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return a < b ? a : b; }
};
struct Most {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return a > b ? a : b; }
};

// Combines a value of every thread; every thread gets the result. `scratch` has a slot per warp.
template <typename T, typename Combine>
__device__ T Reduce(T value, T *scratch, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; warp++) value = combine(value, scratch[warp]);
  __syncthreads();  // the scratch may be written again
  return value;
}

class BlockMap {
 public:
  __device__ BlockMap(const Sample &sample, long long *scratch) : sample_(sample), scratch_(scratch) {}

  __device__ int32_t height() const { return sample_.height; }
  __device__ int32_t width() const { return sample_.width; }

  __device__ int32_t Count(const Window &window) const {
    return Total(CountShare(sample_.values, sample_.width, window, threadIdx.x, kThreads), Add());
  }

  __device__ Survey Look(const Window &window) const {
    Survey seen = LookShare(sample_.values, sample_.width, window, threadIdx.x, kThreads);
    seen.count = Total(seen.count, Add());
    seen.sum_y = Reduce(static_cast<long long>(seen.sum_y), scratch_, Add());
    seen.sum_x = Reduce(static_cast<long long>(seen.sum_x), scratch_, Add());
    seen.y0 = Total(seen.y0, Least());
    seen.x0 = Total(seen.x0, Least());
    seen.y1 = Total(seen.y1, Most());
    seen.x1 = Total(seen.x1, Most());
    return seen;
  }

 private:
  template <typename Combine>
  __device__ int32_t Total(int32_t value, Combine combine) const {
    return Reduce(value, reinterpret_cast<int32_t *>(scratch_), combine);
  }

  const Sample &sample_;
  long long *scratch_;
};

__global__ void __launch_bounds__(kThreads, 1) SaliencyCropKernel(const Sample *samples, Rule rule) {
  __shared__ long long scratch[kWarps];
  const Sample sample = samples[blockIdx.x];
  const Chosen chosen = Choose(BlockMap(sample, scratch), sample.random, rule);
  if (threadIdx.x == 0) Store(chosen, sample);
}

}  // namespace

cudaError_t LaunchSaliencyCrop(const Sample *samples, int count, const Rule &rule, cudaStream_t stream) {
  SaliencyCropKernel<<<count, kThreads, 0, stream>>>(samples, rule);
  return cudaGetLastError();
}

}  // namespace cast_fast
