// What the threads of a block share in rows_cuda_kernels.cuh: the work, the row's plan, the sums over the row.
//
// Numbers of a row are double and made by one thread of a block: the double unit is narrow on most cards.
#pragma once

#include "rows_cuda_tile.cuh"
#include "rules.h"

namespace fastdensity::cuda {

#ifdef FASTDENSITY_CUDA_EMULATION  // the tests run small blocks on the CPU
constexpr int kThreads = 128;
constexpr int kMaxChunks = 72;  // more than a block has threads
constexpr std::int64_t kMaxGrid = 50;
#else
constexpr int kThreads = 512;    // at most, of a block
constexpr int kMaxChunks = 512;  // of a row; longer rows have longer chunks
constexpr std::int64_t kMaxGrid = 0x7FFFFFFF;
#endif

// Quads of each operand that a thread holds: so many in blocks of up to kThreads / 2, twice as many in larger rows'.
template <typename Real>
constexpr int kTileQuads = sizeof(Real) == 4 ? 4 : 2;
template <typename Real, int kQuads>
constexpr int kBlockThreads = sizeof(Real) == 4 && kQuads > kTileQuads<Real> ? kThreads : kThreads / 2;

constexpr int kChunkThreads = kThreads / 2;
template <typename Real>
constexpr int kTile = 4 * kTileQuads<Real> * kChunkThreads;  // elements of a chunk that are in registers at a time

struct Sums {
  double norm, overlap;
};

// Positions of operands in masks.
enum Term : unsigned { kTermV0 = 1, kTermV1 = 2, kTermV2 = 4 };

// What every block is told, in constant memory.
struct Work {
  RowsCall call;
  RowPlan plan;  // of every row, where `planned`: no parameter differs between rows
  bool planned = false;
  bool has_noise = false;
  unsigned along = 0, out = 0;  // terms that the rule table lets into the direction, into the output
  bool wide_v0 = false, wide_v1 = false, wide_uncond = false, wide_v2 = false, wide_out = false;
  std::int64_t first = 0;     // of the rows or chunks of this launch
  std::int64_t chunks = 0;    // of a row
  int tiles = 0;              // of a chunk
  Sums* partial = nullptr;    // (rows, chunks)
  unsigned* state = nullptr;  // (rows, 2): any value written was not finite; chunks done
};

// A row's coefficients as elements meet them, rounded once.
template <typename Real>
struct Coefficients {
  Real along[3], out[3], direction, cfg;
};

template <typename Real>
struct Shared {
  Sums warps[32];
  Coefficients<Real> row;
  // bytes: shared variables have no constructor
  alignas(RowPlan) unsigned char plan_bytes[sizeof(RowPlan)];
  alignas(RowsCall) unsigned char call_bytes[sizeof(RowsCall)];

  __device__ __forceinline__ RowPlan& plan() { return *reinterpret_cast<RowPlan*>(plan_bytes); }
  __device__ __forceinline__ RowsCall& call() { return *reinterpret_cast<RowsCall*>(call_bytes); }
};

template <typename Real>
__device__ __forceinline__ void share_plan(const RowPlan& plan, Shared<Real>& shared) {
  for (int i = 0; i < 3; ++i) shared.row.along[i] = static_cast<Real>(plan.along[i]);
  for (int i = 0; i < 3; ++i) shared.row.out[i] = static_cast<Real>(plan.out[i]);
  shared.row.cfg = static_cast<Real>(plan.cfg);
  shared.plan() = plan;
}

// All lanes of a warp plan the row. They read its parameters at once, into a copy of the call that holds numbers:
// plan_row reads one after the other, and would wait for the memory ten times.
template <typename Real>
__device__ __forceinline__ void plan_warp(const Work& work, std::int64_t row, Shared<Real>& shared) {
  constexpr int kCallWords = sizeof(RowsCall) / 4;
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < kCallWords; i += 32)
    reinterpret_cast<std::uint32_t*>(shared.call_bytes)[i] = reinterpret_cast<const std::uint32_t*>(&work.call)[i];
  __syncwarp();
  if (lane < kParameters) {
    Parameter& parameter = shared.call().parameters[lane];
    parameter.value = row_parameter(work.call.parameters[lane], row);
    parameter.data = nullptr;
  }
  __syncwarp();
  if (lane == 0) share_plan(plan_row(shared.call(), row, work.has_noise), shared);
}

// Plans the row while the memory fetches the elements [begin, end); all see the plan after the next barrier. A plan
// that is not made on the host takes about as long as the memory: the last warp of the block makes it, which has no
// elements where the block is not full; no other warp waits for it or holds registers for it.
template <typename Real, typename Tile>
__device__ __forceinline__ void plan_and_load(const Work& work, std::int64_t row, std::int64_t begin, std::int64_t end,
                                              bool plans, Tile& tile, Shared<Real>& shared) {
  if (plans && !work.planned && threadIdx.x >= blockDim.x - 32) plan_warp(work, row, shared);
  tile.load(begin, end);
  if (plans && work.planned && threadIdx.x == 0) share_plan(work.plan, shared);
}

// Thread 0 turns the row's sums into its last coefficient, and reports where it `reports`; all see the coefficient
// after the next barrier. The sum is rounded to Real so that it overflows where the reference's does.
template <typename Real>
__device__ __forceinline__ void finish_block(const Work& work, std::int64_t row, const Sums& sums, bool reports,
                                             Shared<Real>& shared) {
  if (threadIdx.x != 0) return;
  const RowReport report =
      finish_row(work.call, shared.plan(), static_cast<double>(static_cast<Real>(sums.norm)), sums.overlap);
  shared.row.direction = static_cast<Real>(shared.plan().out_direction);
  if (!reports || !work.call.report) return;
  Real* target = static_cast<Real*>(work.call.report) + 4 * row;
  target[0] = static_cast<Real>(report.eta_minus_one);
  target[1] = static_cast<Real>(report.sq_norm);
  target[2] = static_cast<Real>(report.dlogp);
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

// The sum over the block, in an order that only blockDim.x decides; right in the first warp alone.
template <bool kThird, typename Real>
__device__ __forceinline__ Sums block_sum(Sums sums, Shared<Real>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  sums.norm = warp_sum(sums.norm);
  if constexpr (kThird) sums.overlap = warp_sum(sums.overlap);
  if (lane == 0) shared.warps[warp] = sums;
  __syncthreads();
  if (warp != 0) return sums;
  sums = lane < warps ? shared.warps[lane] : Sums{0.0, 0.0};
  sums.norm = warp_sum(sums.norm);
  if constexpr (kThird) sums.overlap = warp_sum(sums.overlap);
  return sums;
}

}  // namespace fastdensity::cuda
