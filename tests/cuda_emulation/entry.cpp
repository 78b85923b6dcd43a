// The launchers of csrc/ops.h as C functions for ctypes. The struct crosses as it is: its size is checked.
#include <cuda_runtime.h>

#include "ops.h"

extern "C" {

std::int64_t call_bytes() { return sizeof(fastdensity::RowsCall); }
std::int64_t scratch_bytes(const fastdensity::RowsCall* call) { return fastdensity::rows_cuda_scratch(*call); }

// Runs fibers and blocks in an order made from `seed`; `launches` receives how many kernels were started.
const char* run(const fastdensity::RowsCall* call, void* scratch, std::uint32_t seed, std::int64_t* launches) {
  emulation::order.seed(seed);
  emulation::launches = 0;
  const char* error = fastdensity::rows_cuda(*call, scratch, nullptr);
  *launches = emulation::launches;
  return error;
}
}
