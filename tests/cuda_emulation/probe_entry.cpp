// The probe launchers of csrc/ops.h as C functions for ctypes. The struct crosses as it is: its size is checked.
#include <cuda_runtime.h>

#include "ops.h"

extern "C" {

std::int64_t call_bytes() { return sizeof(fastdensity::ProbeCall); }
std::int64_t scratch_bytes(const fastdensity::ProbeCall* call) { return fastdensity::probe_cuda_scratch(*call); }

// Forms where there are products, else the probes; see entry.cpp for the rest.
const char* run(const fastdensity::ProbeCall* call, void* scratch, std::uint32_t seed, std::int64_t* launches) {
  emulation::order.seed(seed);
  emulation::launches = 0;
  const char* error = call->products ? fastdensity::probe_forms_cuda(*call, scratch, nullptr)
                                     : fastdensity::make_probes_cuda(*call, scratch, nullptr);
  *launches = emulation::launches;
  return error;
}
}
