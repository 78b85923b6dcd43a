// The rows family on CUDA: fastdensity/reference/rows.py, launched on the caller's stream.
//
// Nothing here allocates or waits, so a call can be captured in a CUDA graph. Which kernels run is decided by the
// length of a row and the element types, never by the number of rows.
#include <cuda_runtime.h>

#include <algorithm>

#include "ops.h"
#include "rows_cuda_kernels.cuh"

namespace fastdensity {
namespace {

using namespace cuda;
using Kernel = void (*)(Work);

template <typename Real, int kQuads>
bool fits_block(const RowsCall& call) {
  return call.columns <= std::int64_t{4} * kQuads * kBlockThreads<Real, kQuads>;
}

template <typename Real>
bool fits_block(const RowsCall& call) {
  return fits_block<Real, 2 * kTileQuads<Real>>(call);
}

bool fits_block(const RowsCall& call) {
  return accumulates_in_double(call) ? fits_block<double>(call) : fits_block<float>(call);
}

std::int64_t divide_up(std::int64_t count, std::int64_t by) { return (count + by - 1) / by; }

std::int64_t tile_elements(const RowsCall& call) { return accumulates_in_double(call) ? kTile<double> : kTile<float>; }

std::int64_t tiles_of_chunk(const RowsCall& call) { return divide_up(call.columns, tile_elements(call) * kMaxChunks); }

std::int64_t chunks_of_row(const RowsCall& call) {
  return divide_up(call.columns, tiles_of_chunk(call) * tile_elements(call));
}

std::int64_t element_bytes(DataType dtype) {
  return dtype == DataType::float64 ? 8 : dtype == DataType::float32 ? 4 : 2;
}

// Can every quad of every row be moved in accesses of 16 bytes (8 for 16-bit types)?
bool is_wide(const RowsCall& call, const void* data, DataType dtype, std::int64_t row_stride) {
  const std::uintptr_t alignment = element_bytes(dtype) == 2 ? 8 : 16;
  return call.columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(data) % alignment == 0 &&
         (call.rows == 1 || row_stride * element_bytes(dtype) % static_cast<std::int64_t>(alignment) == 0);
}

bool is_wide(const RowsCall& call, const Rows& rows) { return is_wide(call, rows.data, rows.dtype, rows.row_stride); }

// The terms whose coefficients are not zero by the rule table. A coefficient that is 0 by value, say out_p at equal
// times, still multiplies: the reference passes a NaN of that operand on.
void choose_terms(Work& work) {
  const RowsCall& call = work.call;
  const bool has_state_direction = call.type != PredictionType::epsilon && call.type != PredictionType::score;
  if (call.rule == Rule::drift) {
    work.along = kTermV2;
    work.out = kTermV1 | (call.v0.data ? kTermV0 : 0u);
  } else if (call.rule == Rule::radius) {
    work.along = kTermV0;
  } else {
    work.along = kTermV1 | (has_state_direction ? kTermV0 : 0u);
    work.out = kTermV1;
    if (call.rule == Rule::step)
      work.out = (call.type != PredictionType::sample ? kTermV0 : 0u) | (has_state_direction ? kTermV1 : 0u) |
                 (work.has_noise ? kTermV2 : 0u);
  }
}

Work make_work(const RowsCall& call, void* scratch) {
  Work work;
  work.call = call;
  work.has_noise = call.rule == Rule::step && (call.v2.data || call.sample_ids);
  choose_terms(work);
  work.planned = std::none_of(call.parameters, call.parameters + kParameters,
                              [](const Parameter& parameter) { return parameter.data != nullptr; });
  if (work.planned) work.plan = plan_row(call, 0, work.has_noise);
  work.wide_v0 = is_wide(call, call.v0), work.wide_v1 = is_wide(call, call.v1);
  work.wide_uncond = is_wide(call, call.uncond), work.wide_v2 = is_wide(call, call.v2);
  work.wide_out = is_wide(call, call.out, call.out_dtype, call.out_stride);
  work.chunks = chunks_of_row(call), work.tiles = static_cast<int>(tiles_of_chunk(call));
  work.partial = static_cast<Sums*>(scratch);
  work.state = reinterpret_cast<unsigned*>(work.partial + call.rows * work.chunks);
  return work;
}

// `count` blocks, in as many launches as the limit of a grid asks for. Rows planned on the device get one warp more,
// up to `most` threads, which is what the kernel was compiled for.
cudaError_t launch(Kernel kernel, Work& work, std::int64_t count, std::int64_t threads, int most, cudaStream_t stream) {
  if (!work.planned) threads = std::min<std::int64_t>(threads + 32, most);
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

template <typename Real, int kQuads, bool kThird, bool kCfg>
cudaError_t launch_whole_rows(Work& work, cudaStream_t stream) {
  const std::int64_t threads = 32 * divide_up(work.call.columns, kStep * kQuads);
  return launch(whole_rows<Real, kQuads, kThird, kCfg>, work, work.call.rows, threads, kBlockThreads<Real, kQuads>,
                stream);
}

template <typename Real, bool kThird, bool kCfg>
cudaError_t launch_chunks(Work& work, cudaStream_t stream) {
  const std::int64_t count = work.call.rows * work.chunks;
  const cudaError_t error =
      launch(sum_chunks<Real, kThird, kCfg>, work, count, kChunkThreads, kChunkThreads + 32, stream);
  if (error != cudaSuccess) return error;
  return launch(combine_chunks<Real, kThird, kCfg>, work, count, kChunkThreads, kChunkThreads + 32, stream);
}

template <typename Real, bool kThird, bool kCfg>
cudaError_t launch_rows(Work& work, cudaStream_t stream) {
  constexpr int kQuads = kTileQuads<Real>;
  if (fits_block<Real, kQuads>(work.call)) return launch_whole_rows<Real, kQuads, kThird, kCfg>(work, stream);
  if (fits_block<Real>(work.call)) return launch_whole_rows<Real, 2 * kQuads, kThird, kCfg>(work, stream);
  return launch_chunks<Real, kThird, kCfg>(work, stream);
}

// Double is there for tests and small problems: one kernel for all numbers of operands.
cudaError_t launch_rows(Work& work, cudaStream_t stream) {
  if (accumulates_in_double(work.call)) return launch_rows<double, true, true>(work, stream);
  const bool third = work.call.rule == Rule::drift || work.has_noise;
  if (work.call.uncond.data)
    return third ? launch_rows<float, true, true>(work, stream) : launch_rows<float, false, true>(work, stream);
  return third ? launch_rows<float, true, false>(work, stream) : launch_rows<float, false, false>(work, stream);
}

}  // namespace

std::int64_t rows_cuda_scratch(const RowsCall& call) {
  if (call.rows <= 0 || call.columns <= 0 || fits_block(call)) return 0;
  const std::int64_t sums = chunks_of_row(call) * static_cast<std::int64_t>(sizeof(Sums));
  return call.rows * (sums + 2 * static_cast<std::int64_t>(sizeof(unsigned)));
}

const char* rows_cuda(const RowsCall& call, void* scratch, void* stream) {
  if (call.rows <= 0 || call.columns <= 0) return nullptr;
  Work work = make_work(call, scratch);
  const cudaError_t error = launch_rows(work, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdensity
