// DALI operator SaliencyCrop: its schema, the CPU backend on DALI's thread pool and, with CAST_FAST_CUDA, the CUDA one.
#include "saliency_crop.h"

#include <charconv>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"

#ifdef CAST_FAST_CUDA
#include "dali/core/cuda_error.h"
#include "dali/kernels/dynamic_scratchpad.h"
#include "saliency_crop_cuda.h"
#endif

namespace cast_fast {
namespace {

// Counts on one CPU thread. A value is salient when its top bit is set, so eight of them are counted in a 64-bit word.
class HostMap {
 public:
  HostMap(const uint8_t *values, int32_t height, int32_t width) : values_(values), height_(height), width_(width) {}

  int32_t height() const { return height_; }
  int32_t width() const { return width_; }

  int32_t Count(const Window &window) const {
    int32_t count = 0;
    for (int32_t y = window.y; y < window.y + window.h; y++) count += CountRow(Row(y) + window.x, window.w);
    return count;
  }

  Survey Look(const Window &window) const {
    Survey seen;
    // columns are counted in bytes, which is what vectorises, and emptied into wider ones before they can overflow
    std::vector<uint8_t> narrow(window.w, 0);
    std::vector<int32_t> columns(window.w, 0);
    for (int32_t y = window.y; y < window.y + window.h; y++) {
      const uint8_t *row = Row(y) + window.x;
      for (int32_t x = 0; x < window.w; x++) narrow[x] = static_cast<uint8_t>(narrow[x] + (row[x] >> 7));
      if ((y - window.y) % 255 == 254 || y + 1 == window.y + window.h) {
        for (int32_t x = 0; x < window.w; x++) columns[x] += narrow[x];
        std::memset(narrow.data(), 0, narrow.size());
      }
      const int32_t in_row = CountRow(row, window.w);
      if (in_row == 0) continue;
      seen.count += in_row;
      seen.sum_y += static_cast<int64_t>(in_row) * y;
      if (seen.y0 > y) seen.y0 = y;
      seen.y1 = y + 1;
    }
    for (int32_t i = 0; i < window.w; i++) {
      if (columns[i] == 0) continue;
      const int32_t x = window.x + i;
      seen.sum_x += static_cast<int64_t>(columns[i]) * x;
      if (seen.x0 > x) seen.x0 = x;
      seen.x1 = x + 1;
    }
    return seen;
  }

 private:
  const uint8_t *Row(int32_t y) const { return values_ + static_cast<int64_t>(y) * width_; }

  static int32_t CountRow(const uint8_t *row, int32_t length) {
    constexpr uint64_t kOnes = 0x0101010101010101u, kEven = 0x00ff00ff00ff00ffu, kOnes16 = 0x0001000100010001u;
    int32_t count = 0;
    while (length >= 8) {
      // each byte of `sums` counts one value in eight; 255 words fit
      const int32_t words = length / 8 < 255 ? length / 8 : 255;
      uint64_t sums = 0;
      for (int32_t i = 0; i < words; i++) {
        uint64_t word;
        std::memcpy(&word, row + 8 * i, 8);
        sums += (word >> 7) & kOnes;
      }
      count += static_cast<int32_t>((((sums & kEven) + ((sums >> 8) & kEven)) * kOnes16) >> 48);
      row += 8 * words;
      length -= 8 * words;
    }
    for (int32_t i = 0; i < length; i++) count += row[i] >> 7;
    return count;
  }

  const uint8_t *values_;
  int32_t height_, width_;
};

template <typename Backend>
class SaliencyCrop : public ::dali::StatelessOperator<Backend> {
 public:
  explicit SaliencyCrop(const ::dali::OpSpec &spec) : ::dali::StatelessOperator<Backend>(spec) {
    // as text, because DALI keeps number arguments in single precision and the rule needs the caller's double
    const auto phi = spec.GetArgument<std::string>("phi");
    const auto parsed = std::from_chars(phi.data(), phi.data() + phi.size(), rule_.phi);
    DALI_ENFORCE(parsed.ec == std::errc() && parsed.ptr == phi.data() + phi.size() && rule_.phi >= 0 && rule_.phi <= 1,
                 "phi: got '" + phi + "', expected the text of a number in [0, 1]");
    const auto pair = spec.GetArgument<std::string>("pair_constraint");
    DALI_ENFORCE(pair == "overlap" || pair == "independent",
                 "pair_constraint: got '" + pair + "', expected 'overlap' or 'independent'");
    rule_.overlap = pair == "overlap";
    rule_.constrained = spec.GetArgument<bool>("constrained");
  }

 protected:
  bool SetupImpl(std::vector<::dali::OutputDesc> &outputs, const ::dali::Workspace &ws) override {
    const auto &maps = ws.Input<Backend>(0);
    const auto &random = ws.Input<Backend>(1);
    const int count = maps.num_samples();
    from_shape_ = maps.type() == ::DALI_INT64;
    if (from_shape_) {
      DALI_ENFORCE((std::is_same_v<Backend, ::dali::CPUBackend>) && !rule_.constrained,
                   "A shape (int64) in place of a map serves only constrained=False on the CPU.");
    } else {
      DALI_ENFORCE(maps.type() == ::DALI_UINT8, "saliency map: expected uint8");
    }
    DALI_ENFORCE(random.type() == ::DALI_FLOAT64, "random: expected float64");
    for (int i = 0; i < count; i++) {
      const auto shape = maps.shape()[i];
      if (from_shape_) {
        DALI_ENFORCE(shape.size() == 1 && shape[0] >= 2, "shape: expected int64 [H, W, ...]");
      } else {
        DALI_ENFORCE(shape.size() == 2 || (shape.size() == 3 && (shape[2] == 1 || !rule_.constrained)),
                     "saliency map: expected the shape (H, W) or (H, W, 1)");
        CheckSides(shape[0], shape[1]);
      }
      const auto numbers = random.shape()[i];
      DALI_ENFORCE(numbers.size() == 3 && numbers[0] == 2 && numbers[1] == kRows && numbers[2] == kColumns,
                   "random: expected the shape (2, 11, 26)");
    }
    outputs.resize(4);
    outputs[0] = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{2, 4}), ::DALI_INT32};
    outputs[1] = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{2, 4}), ::DALI_FLOAT};
    outputs[2] = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{2}), ::DALI_UINT8};
    outputs[3] = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{2}), ::DALI_FLOAT64};
    return true;
  }

  void RunImpl(::dali::Workspace &ws) override;

 private:
  static void CheckSides(int64_t height, int64_t width) {
    DALI_ENFORCE(height >= 1 && width >= 1 && height <= kMaxPixels / width,
                 "saliency map: expected sides of at least 1 and at most 2**30 pixels");
  }

  Sample MakeSample(::dali::Workspace &ws, int index) const {
    const auto &maps = ws.Input<Backend>(0);
    Sample sample;
    sample.random = ws.Input<Backend>(1).template tensor<double>(index);
    sample.windows = ws.Output<Backend>(0).template mutable_tensor<int32_t>(index);
    sample.relative = ws.Output<Backend>(1).template mutable_tensor<float>(index);
    sample.fallback = ws.Output<Backend>(2).template mutable_tensor<uint8_t>(index);
    sample.held = ws.Output<Backend>(3).template mutable_tensor<double>(index);
    int64_t height, width;
    if (from_shape_) {
      const int64_t *shape = maps.template tensor<int64_t>(index);
      height = shape[0];
      width = shape[1];
      CheckSides(height, width);
      sample.values = nullptr;
    } else {
      const auto shape = maps.shape()[index];
      height = shape[0];
      width = shape[1];
      sample.values = maps.template tensor<uint8_t>(index);
    }
    sample.height = static_cast<int32_t>(height);
    sample.width = static_cast<int32_t>(width);
    return sample;
  }

  Rule rule_;
  bool from_shape_ = false;
};

template <>
void SaliencyCrop<::dali::CPUBackend>::RunImpl(::dali::Workspace &ws) {
  auto &threads = ws.GetThreadPool();
  for (int i = 0; i < ws.Input<::dali::CPUBackend>(0).num_samples(); i++) {
    const Sample sample = MakeSample(ws, i);
    threads.AddWork(
        [this, sample](int) {
          Store(Choose(HostMap(sample.values, sample.height, sample.width), sample.random, rule_), sample);
        },
        static_cast<int64_t>(sample.height) * sample.width);
  }
  threads.RunAll();
}

#ifdef CAST_FAST_CUDA
template <>
void SaliencyCrop<::dali::GPUBackend>::RunImpl(::dali::Workspace &ws) {
  const int count = ws.Input<::dali::GPUBackend>(0).num_samples();
  if (count == 0) return;
  std::vector<Sample> samples;
  for (int i = 0; i < count; i++) samples.push_back(MakeSample(ws, i));
  ::dali::kernels::DynamicScratchpad scratch(ws.stream());
  const Sample *on_device = scratch.ToGPU(ws.stream(), samples);
  CUDA_CALL(LaunchSaliencyCrop(on_device, count, rule_, ws.stream()));
}
#endif

}  // namespace
}  // namespace cast_fast

DALI_SCHEMA(SaliencyCrop)
    .DocStr(R"(Two random crop windows (query, key) that hold a share of the salient pixels of a map.

Inputs: the saliency map, uint8 (H, W) or (H, W, 1), salient where > 127; and its random numbers, float64 (2, 11, 26), as
``cast_fast.data.saliency_crop.window_random`` makes them. With ``constrained=False`` the first input may be any uint8
image or, on the CPU, an int64 shape ``[H, W, ...]``, as only the sides are read.

Outputs: windows, int32 (2, 4), ``[y0, x0, h, w]``; the same as shares of the sides, float32 (2, 4),
``[y0/H, x0/W, y1/H, x1/W]``; whether each window is the fallback, uint8 (2,); the share of all salient pixels inside each,
float64 (2,), zero where unconstrained. A map without salient pixels gets unconstrained windows.)")
    .NumInput(2)
    .NumOutput(4)
    .AddOptionalArg("phi", "Least share of the salient pixels in a window, as the text of a number.", "0.2")
    .AddOptionalArg("pair_constraint", "'overlap' (the pair shares salient pixels) or 'independent'.", "overlap")
    .AddOptionalArg("constrained", "False gives plain random resized crops.", true);

using CpuSaliencyCrop = ::cast_fast::SaliencyCrop<::dali::CPUBackend>;
DALI_REGISTER_OPERATOR(SaliencyCrop, CpuSaliencyCrop, ::dali::CPU);
#ifdef CAST_FAST_CUDA
using GpuSaliencyCrop = ::cast_fast::SaliencyCrop<::dali::GPUBackend>;
DALI_REGISTER_OPERATOR(SaliencyCrop, GpuSaliencyCrop, ::dali::GPU);
#endif
