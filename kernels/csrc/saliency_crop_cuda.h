// The CUDA side of the operator, apart from DALI: so nvcc never sees DALI's headers.
#pragma once

#include <cuda_runtime_api.h>

#include "saliency_crop.h"

namespace cast_fast {

// Chooses the windows of `count` samples, one block each. `samples` and everything it points at is device memory.
cudaError_t LaunchSaliencyCrop(const Sample *samples, int count, const Rule &rule, cudaStream_t stream);

}  // namespace cast_fast
