// The kernels of rows_cuda.cu: the three moves of csrc/rules.h on tiles of a row held in registers.
//
// Short rows: one block reads a row once, sums, and writes it from the registers. Long rows: `sum_chunks` leaves the
// sums of fixed chunks in scratch, `combine_chunks` adds them in a fixed order and writes. No order depends on the
// other rows.
#pragma once

#include "philox.h"
#include "rows_cuda_block.cuh"
#include "rows_cuda_tile.cuh"

namespace fastdensity::cuda {

// A thread's share of a tile: the operands' quads, in the accumulation type. kThird: there may be v2 or drawn noise;
// kCfg: there may be uncond. Without them the registers for them are free.
template <typename Real, int kQuads, bool kThird, bool kCfg>
class Tile {
 public:
  __device__ __forceinline__ Tile(const Work& work, std::int64_t row) : work_(work), row_(row) {}

  // For a tile that follows another: what is not read would otherwise be kept, in registers of its own.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      raw_state_[k] = raw_prediction_[k] = raw_uncond_[k] = raw_third_[k] = {};
      state_[k] = prediction_[k] = third_[k] = {};
    }
  }

  // Starts all loads of the elements [begin, end), and waits for none.
  __device__ __forceinline__ void load(std::int64_t begin, std::int64_t end) {
    span_ = Span::of_thread<kQuads>(begin, end);
    if ((work_.along | work_.out) & kTermV0) read(work_.call.v0, work_.wide_v0, row_, span_, raw_state_);
    if ((work_.along | work_.out) & kTermV1) read(work_.call.v1, work_.wide_v1, row_, span_, raw_prediction_);
    if (has_uncond()) read(work_.call.uncond, work_.wide_uncond, row_, span_, raw_uncond_);
    if (draws_noise())
      sample_id_ = static_cast<std::uint32_t>(work_.call.sample_ids[row_]);
    else if (has_v2() && !kCfg)
      read(work_.call.v2, work_.wide_v2, row_, span_, raw_third_);
  }

  // Waits, converts and forms the prediction; draws the noise, while the memory works if there are registers for it.
  __device__ __forceinline__ void settle(const Coefficients<Real>& row) {
    constexpr bool kDrawsEarly = kQuads == kTileQuads<Real>;
    if (kDrawsEarly && draws_noise()) draw_noise();
    if ((work_.along | work_.out) & kTermV0) convert(work_.call.v0.dtype, raw_state_, state_);
    if ((work_.along | work_.out) & kTermV1) convert(work_.call.v1.dtype, raw_prediction_, prediction_);
    if (has_uncond()) {
      Quad<Real> uncond[kQuads];
      convert(work_.call.uncond.dtype, raw_uncond_, uncond);
      each([&](int k, int j) {
        const Real base = uncond[k].at[j];
        prediction_[k].at[j] = base + row.cfg * (prediction_[k].at[j] - base);
      });
    }
    if (has_v2()) {
      if (kCfg) read(work_.call.v2, work_.wide_v2, row_, span_, raw_third_);  // into the registers of uncond
      convert(work_.call.v2.dtype, raw_third_, third_);
    } else if (!draws_noise()) {
      each([&](int k, int j) { third_[k].at[j] = 0; });
    }
    if (!kDrawsEarly && draws_noise()) draw_noise();
  }

  // This thread's part of direction.direction and direction.noise; elements beyond the row's end are 0.
  __device__ __forceinline__ Sums sums(const Coefficients<Real>& row) const {
    Real norm = 0, overlap = 0;
    each([&](int k, int j) {
      const Real d = direction(row, k, j);
      norm += d * d;
      if constexpr (kThird) overlap += d * third_[k].at[j];
    });
    return {static_cast<double>(norm), static_cast<double>(overlap)};
  }

  // Writes the output; true if any value is not finite (0, beyond the end, is so only where others are). The state is
  // added last: it is the largest term.
  __device__ __forceinline__ bool combine(const Coefficients<Real>& row) {
    bool broken = false;
    Quad<Real> out[kQuads];
    each([&](int k, int j) {
      Real total = row.direction * direction(row, k, j);
      if (work_.out & kTermV1) total += row.out[1] * prediction_[k].at[j];
      if constexpr (kThird)
        if (work_.out & kTermV2) total += row.out[2] * third_[k].at[j];
      if (work_.out & kTermV0) total += row.out[0] * state_[k].at[j];
      broken |= !std::isfinite(total);
      out[k].at[j] = total;
    });
    write(work_.call.out, work_.call.out_dtype, work_.wide_out, row_ * work_.call.out_stride, span_, out);
    return broken;
  }

 private:
  template <typename Body>
  static __device__ __forceinline__ void each(Body body) {
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) body(k, j);
  }

  __device__ __forceinline__ bool has_uncond() const { return kCfg && work_.call.uncond.data; }
  __device__ __forceinline__ bool draws_noise() const { return kThird && work_.call.sample_ids; }
  __device__ __forceinline__ bool has_v2() const { return kThird && work_.call.v2.data && !work_.call.sample_ids; }

  // Made twice of the same operands rather than kept: registers are dearer than a multiplication.
  __device__ __forceinline__ Real direction(const Coefficients<Real>& row, int k, int j) const {
    if constexpr (kThird)
      if (work_.along & kTermV2) return row.along[2] * third_[k].at[j];
    Real total = 0;
    if (work_.along & kTermV1) total = row.along[1] * prediction_[k].at[j];
    if (work_.along & kTermV0) total += row.along[0] * state_[k].at[j];
    return total;
  }

  __device__ __forceinline__ void draw_noise() {
    const std::uint32_t first = static_cast<std::uint32_t>(span_.begin / 4);
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
      noise_block(work_.call.seed, sample_id_, work_.call.step, first + k * (kStep / 4), third_[k].at);
  }

  const Work& work_;
  const std::int64_t row_;
  Span span_;
  std::uint32_t sample_id_ = 0;
  RawQuad<Real> raw_state_[kQuads], raw_prediction_[kQuads], raw_uncond_[kQuads], raw_third_[kQuads];
  Quad<Real> state_[kQuads], prediction_[kQuads], third_[kQuads];
};

// Blocks that a multiprocessor must be able to hold at once: as few registers as do not spill.
template <typename Real, int kQuads, bool kMoreOperands>
constexpr int kBlocks = kQuads > kTileQuads<Real> ? 1 : 3 - kMoreOperands;

// One block, one row, one read of each operand.
template <typename Real, int kQuads, bool kThird, bool kCfg>
__global__ void __launch_bounds__(kBlockThreads<Real, kQuads>, kBlocks<Real, kQuads, kThird || kCfg>)
    whole_rows(const __grid_constant__ Work work) {
  __shared__ Shared<Real> shared;
  const std::int64_t row = work.first + blockIdx.x;
  Tile<Real, kQuads, kThird, kCfg> tile(work, row);
  plan_and_load(work, row, 0, work.call.columns, true, tile, shared);
  __syncthreads();
  tile.settle(shared.row);
  finish_block(work, row, block_sum<kThird>(tile.sums(shared.row), shared), true, shared);
  __syncthreads();
  const int broken = __syncthreads_or(tile.combine(shared.row));
  if (threadIdx.x == 0 && work.call.report)
    static_cast<Real*>(work.call.report)[4 * row + 3] =
        static_cast<Real>(shared.plan().flags | (broken ? non_finite : 0));
}

// The chunk of a long row that a block works on, tile by tile.
template <typename Real>
struct Chunk {
  std::int64_t row, number, columns, first;

  __device__ __forceinline__ Chunk(const Work& work, std::int64_t index)
      : row(index / work.chunks),
        number(index % work.chunks),
        columns(work.call.columns),
        first(number * work.tiles * kTile<Real>) {}

  __device__ __forceinline__ std::int64_t begin(int tile) const {
    return first + static_cast<std::int64_t>(tile) * kTile<Real>;
  }
  __device__ __forceinline__ std::int64_t end(int tile) const {
    const std::int64_t end = begin(tile) + kTile<Real>;
    return end < columns ? end : columns;
  }
};

// First launch of long rows: the sums of one chunk, in Real inside a thread's tile, in double above.
template <typename Real, bool kThird, bool kCfg>
__global__ void __launch_bounds__(kChunkThreads + 32, 2) sum_chunks(const __grid_constant__ Work work) {
  __shared__ Shared<Real> shared;
  const std::int64_t index = work.first + blockIdx.x;
  const Chunk<Real> chunk(work, index);
  Sums sums = {0.0, 0.0};
#pragma unroll 1
  for (int i = 0; i < work.tiles; ++i) {
    Tile<Real, kTileQuads<Real>, kThird, kCfg> tile(work, chunk.row);
    tile.clear();
    plan_and_load(work, chunk.row, chunk.begin(i), chunk.end(i), i == 0, tile, shared);
    __syncthreads();
    tile.settle(shared.row);
    const Sums part = tile.sums(shared.row);
    sums.norm += part.norm, sums.overlap += part.overlap;
  }
  sums = block_sum<kThird>(sums, shared);
  if (threadIdx.x != 0) return;
  work.partial[index] = sums;
  if (chunk.number == 0) work.state[2 * chunk.row] = work.state[2 * chunk.row + 1] = 0;
}

// The sum of a row's chunks, in an order that only their number decides; right in the first warp alone.
template <bool kThird, typename Real>
__device__ __forceinline__ Sums row_sum(const Work& work, std::int64_t row, Shared<Real>& shared) {
  Sums sums = {0.0, 0.0};
  if (threadIdx.x < kChunkThreads)  // not the warp that plans: it is there or not
#pragma unroll 1
    for (int i = threadIdx.x; i < work.chunks; i += kChunkThreads) {
      const Sums part = work.partial[row * work.chunks + i];
      sums.norm += part.norm, sums.overlap += part.overlap;
    }
  return block_sum<kThird>(sums, shared);
}

// Second launch. Chunks go from the last to the first: the last ones read may still be in the L2 cache. Flags are
// joined by integer atomics, which no order changes, and the block that comes last writes them.
template <typename Real, bool kThird, bool kCfg>
__global__ void __launch_bounds__(kChunkThreads + 32, 2) combine_chunks(const __grid_constant__ Work work) {
  __shared__ Shared<Real> shared;
  const Chunk<Real> chunk(work, work.call.rows * work.chunks - 1 - (work.first + blockIdx.x));
  bool broken = false;
#pragma unroll 1
  for (int i = 0; i < work.tiles; ++i) {
    Tile<Real, kTileQuads<Real>, kThird, kCfg> tile(work, chunk.row);
    tile.clear();
    plan_and_load(work, chunk.row, chunk.begin(i), chunk.end(i), i == 0, tile, shared);
    if (i == 0) {
      finish_block(work, chunk.row, row_sum<kThird>(work, chunk.row, shared), chunk.number == 0, shared);
      __syncthreads();
    }
    tile.settle(shared.row);
    broken |= tile.combine(shared.row);
  }
  broken = __syncthreads_or(broken);
  if (threadIdx.x != 0 || !work.call.report) return;
  unsigned* state = work.state + 2 * chunk.row;
  if (broken) atomicOr(&state[0], static_cast<unsigned>(non_finite));
  __threadfence();
  if (atomicAdd(&state[1], 1u) + 1 == work.chunks)
    static_cast<Real*>(work.call.report)[4 * chunk.row + 3] =
        static_cast<Real>(shared.plan().flags | static_cast<int>(atomicOr(&state[0], 0u)));
}

}  // namespace fastdensity::cuda
