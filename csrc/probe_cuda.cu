// Probes on CUDA: fastdensity/reference/probe.py, launched on the caller's stream.
//
// Nothing here allocates or waits, so a call can be captured in a CUDA graph. How a row is cut is decided by its length
// and the element type alone.
#include <cuda_runtime.h>

#include <algorithm>

#include "ops.h"
#include "probe_cuda_kernels.cuh"

namespace fastdensity {
namespace {

using namespace cuda;
using Kernel = void (*)(ProbeWork);

std::int64_t divide_up(std::int64_t count, std::int64_t by) { return (count + by - 1) / by; }

bool is_double(const ProbeCall& call) { return call.dtype == DataType::float64; }

std::int64_t tile_elements(const ProbeCall& call) { return is_double(call) ? kTile<double> : kTile<float>; }

std::int64_t tiles_of_chunk(const ProbeCall& call) { return divide_up(call.columns, tile_elements(call) * kMaxChunks); }

std::int64_t chunks_of_row(const ProbeCall& call) {
  return divide_up(call.columns, tiles_of_chunk(call) * tile_elements(call));
}

std::int64_t pairs(const ProbeCall& call) { return call.probes * call.rows; }

bool is_wide(const ProbeCall& call, const void* data) {
  const std::uintptr_t alignment = call.dtype == DataType::bfloat16 || call.dtype == DataType::float16 ? 8 : 16;
  return call.columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(data) % alignment == 0;
}

ProbeWork make_work(const ProbeCall& call, void* scratch) {
  ProbeWork work;
  work.call = call;
  work.wide = is_wide(call, call.products ? call.products : call.out);
  work.chunks = chunks_of_row(call), work.tiles = static_cast<int>(tiles_of_chunk(call));
  if (call.distribution == Distribution::hadamard) work.rows = static_cast<std::int64_t*>(scratch);
  void* sums = call.distribution == Distribution::hadamard ? work.rows + pairs(call) : scratch;
  if (call.products || call.distribution == Distribution::sphere) work.partial = static_cast<ProbeSums*>(sums);
  return work;
}

// `count` blocks, in as many launches as the limit of a grid asks for.
cudaError_t launch(Kernel kernel, ProbeWork& work, std::int64_t count, std::int64_t threads, cudaStream_t stream) {
  for (work.first = 0; work.first < count; work.first += kMaxGrid) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::min(kMaxGrid, count - work.first)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, work);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// A block per chunk, no larger than a row of one chunk needs.
cudaError_t launch_chunks(Kernel kernel, ProbeWork& work, cudaStream_t stream) {
  const std::int64_t warp_elements = tile_elements(work.call) / (kChunkThreads / 32);
  const std::int64_t threads =
      std::min<std::int64_t>(kChunkThreads, 32 * divide_up(work.call.columns, warp_elements));
  return launch(kernel, work, pairs(work.call) * work.chunks, threads, stream);
}

Kernel sum_kernel(const ProbeCall& call) {
  if (is_normal(call)) return is_double(call) ? sum_probes<double, true> : sum_probes<float, true>;
  return is_double(call) ? sum_probes<double, false> : sum_probes<float, false>;
}

Kernel write_kernel(const ProbeCall& call) {
  if (is_normal(call)) return is_double(call) ? write_probes<double, true> : write_probes<float, true>;
  return is_double(call) ? write_probes<double, false> : write_probes<float, false>;
}

cudaError_t prepare(ProbeWork& work, cudaStream_t stream) {
  if (!work.rows) return cudaSuccess;
  return launch(choose_rows, work, divide_up(pairs(work.call), 128), 128, stream);
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

std::int64_t probe_cuda_scratch(const ProbeCall& call) {
  const std::int64_t sums = chunks_of_row(call) * static_cast<std::int64_t>(sizeof(ProbeSums));
  return pairs(call) * (sums + static_cast<std::int64_t>(sizeof(std::int64_t)));
}

const char* probe_forms_cuda(const ProbeCall& call, void* scratch, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  ProbeWork work = make_work(call, scratch);
  cudaError_t error = prepare(work, queue);
  if (error == cudaSuccess) error = launch_chunks(sum_kernel(call), work, queue);
  if (error == cudaSuccess && work.chunks > 1) error = launch(finish_forms, work, pairs(call), 32, queue);
  return text(error);
}

const char* make_probes_cuda(const ProbeCall& call, void* scratch, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  ProbeWork work = make_work(call, scratch);
  cudaError_t error = prepare(work, queue);
  if (error == cudaSuccess && work.partial) error = launch_chunks(sum_kernel(call), work, queue);
  if (error == cudaSuccess) error = launch_chunks(write_kernel(call), work, queue);
  return text(error);
}

}  // namespace fastdensity
