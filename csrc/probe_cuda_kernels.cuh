// The kernels of probe_cuda.cu: quads of elements as in rows_cuda_tile.cuh, the probe made where it is needed.
//
// A warp's part of a tile is a whole number of Philox counters of signs (128 elements each): a lane makes each, and
// the others find the words in shared memory. Normals come four to a counter, which is a thread's quad.
#pragma once

#include "probe.h"
#include "rows_cuda_block.cuh"
#include "rows_cuda_tile.cuh"

namespace fastdensity::cuda {

struct ProbeSums {
  double form, squares;
};

// What every block is told, in constant memory.
struct ProbeWork {
  ProbeCall call;
  bool wide = false;            // the products, or the result, are moved in accesses of 16 bytes (8 for 16-bit types)
  std::int64_t first = 0;       // of the chunks or pairs of this launch
  std::int64_t chunks = 0;      // of a row
  int tiles = 0;                // of a chunk
  ProbeSums* partial = nullptr;  // (pairs, chunks); a pair is a probe and a sample
  std::int64_t* rows = nullptr;  // (pairs) of Sylvester's matrix
};

struct ProbeShared {
  ProbeSums warps[32];
  double scale;
  std::uint32_t words[kChunkThreads / 32][4 * kTileQuads<float>];  // of each warp
};

// A thread's share of a tile of one probe.
template <typename Real, bool kNormal>
class ProbeTile {
 public:
  static constexpr int kQuads = kTileQuads<Real>;

  __device__ __forceinline__ ProbeTile(const ProbeWork& work, std::int64_t pair)
      : work_(work), pair_(pair), probe_(probe_of(work.call, pair / work.call.rows, pair % work.call.rows,
                                                  work.rows ? work.rows[pair] : 0)) {}

  __device__ __forceinline__ void place(std::int64_t begin) {
    span_ = Span::of_thread<kQuads>(begin, work_.call.columns);
  }

  // All lanes of a warp together.
  __device__ __forceinline__ void make(ProbeShared& shared) {
    if constexpr (kNormal) {
      const std::uint32_t block = static_cast<std::uint32_t>(span_.begin / 4);
#pragma unroll
      for (int k = 0; k < kQuads; ++k)
        normal_block(probe_.seed, probe_.sample_id, probe_.step, probe_.number, block + k * (kStep / 4), z_[k].at);
    } else {
      const int lane = threadIdx.x % 32;
      std::uint32_t* words = shared.words[threadIdx.x / 32];
      // lane * 4 < 128: every lane divides to the warp's first counter
      const std::uint32_t block = static_cast<std::uint32_t>(span_.begin / kSignsPerCounter);
      __syncwarp();  // all have read the words of the tile before
      if (lane < kQuads) sign_block(probe_, block + lane, words + 4 * lane);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        const std::uint32_t bits = words[4 * k + lane / 8] >> (lane % 8 * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) z_[k].at[j] = bits >> j & 1u ? Real(-1) : Real(1);
      }
    }
  }

  // This thread's part of z.products and of z.z; `raw` are the products of the tile.
  __device__ __forceinline__ ProbeSums sums(const RawQuad<Real> (&raw)[kQuads]) const {
    Quad<Real> values[kQuads];
    convert(work_.call.dtype, raw, values);
    Real form = 0;
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) form += z_[k].at[j] * values[k].at[j];
    return {static_cast<double>(form), kNormal ? squares() : 0.0};
  }

  __device__ __forceinline__ double squares() const {
    Real total = 0;
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) total += span_.has(k, j) ? z_[k].at[j] * z_[k].at[j] : Real(0);
    return static_cast<double>(total);
  }

  __device__ __forceinline__ void load(RawQuad<Real> (&raw)[kQuads]) const {
    const Rows products{work_.call.products, work_.call.dtype, work_.call.columns};
    read(products, work_.wide, pair_, span_, raw);
  }

  __device__ __forceinline__ void store(Real scale) {
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) z_[k].at[j] *= scale;
    write(work_.call.out, work_.call.dtype, work_.wide, pair_ * work_.call.columns, span_, z_);
  }

 private:
  const ProbeWork& work_;
  const std::int64_t pair_;
  const Probe probe_;
  Span span_;
  Quad<Real> z_[kQuads];
};

// The sum over the block, in an order that only blockDim.x decides; right in the first warp alone.
__device__ __forceinline__ ProbeSums probe_block_sum(ProbeSums sums, ProbeShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  sums = {warp_sum(sums.form), warp_sum(sums.squares)};
  if (lane == 0) shared.warps[warp] = sums;
  __syncthreads();
  if (warp != 0) return sums;
  sums = lane < warps ? shared.warps[lane] : ProbeSums{0.0, 0.0};
  return {warp_sum(sums.form), warp_sum(sums.squares)};
}

// The sum over a pair's chunks by one warp.
__device__ __forceinline__ ProbeSums pair_sums(const ProbeWork& work, std::int64_t pair) {
  ProbeSums sums{0.0, 0.0};
  for (std::int64_t chunk = threadIdx.x % 32; chunk < work.chunks; chunk += 32) {
    const ProbeSums part = work.partial[pair * work.chunks + chunk];
    sums.form += part.form, sums.squares += part.squares;
  }
  return {warp_sum(sums.form), warp_sum(sums.squares)};
}

__device__ __forceinline__ double form_of(const ProbeCall& call, const ProbeSums& sums) {
  return call.distribution == Distribution::sphere ? sums.form * sphere_scale(call.columns, sums.squares) : sums.form;
}

// One thread, one pair: its row of Sylvester's matrix.
static __global__ void __launch_bounds__(128) choose_rows(const __grid_constant__ ProbeWork work) {
  const std::int64_t pair = (work.first + blockIdx.x) * 128 + threadIdx.x;
  if (pair >= work.call.probes * work.call.rows) return;
  const std::uint32_t id = static_cast<std::uint32_t>(work.call.sample_ids[pair % work.call.rows]);
  work.rows[pair] =
      hadamard_row(work.call, work.call.first + pair / work.call.rows, id, hadamard_order(work.call.columns));
}

// One block, one chunk: its part of z.products (if there are any) and of z.z. A row of one chunk is finished here.
template <typename Real, bool kNormal>
__global__ void __launch_bounds__(kChunkThreads) sum_probes(const __grid_constant__ ProbeWork work) {
  __shared__ ProbeShared shared;
  constexpr int kQuads = kTileQuads<Real>;
  const std::int64_t task = work.first + blockIdx.x, pair = task / work.chunks;
  const std::int64_t begin = task % work.chunks * work.tiles * kTile<Real>;
  ProbeTile<Real, kNormal> tile(work, pair);
  ProbeSums total{0.0, 0.0};
  for (int i = 0; i < work.tiles; ++i) {
    if (begin + i * kTile<Real> >= work.call.columns) break;  // the same for all threads
    tile.place(begin + i * kTile<Real>);
    ProbeSums part{0.0, 0.0};
    if (work.call.products) {
      RawQuad<Real> raw[kQuads];
      tile.load(raw);
      tile.make(shared);
      part = tile.sums(raw);
    } else {
      tile.make(shared);
      part.squares = tile.squares();
    }
    total.form += part.form, total.squares += part.squares;
  }
  total = probe_block_sum(total, shared);
  if (threadIdx.x != 0) return;
  if (work.call.products && work.chunks == 1)
    static_cast<double*>(work.call.out)[pair] = form_of(work.call, total);
  else
    work.partial[task] = total;
}

// One warp, one pair: the sum of its chunks.
static __global__ void __launch_bounds__(32) finish_forms(const __grid_constant__ ProbeWork work) {
  const std::int64_t pair = work.first + blockIdx.x;
  const ProbeSums sums = pair_sums(work, pair);
  if (threadIdx.x == 0) static_cast<double*>(work.call.out)[pair] = form_of(work.call, sums);
}

// One block, one chunk of a probe, written.
template <typename Real, bool kNormal>
__global__ void __launch_bounds__(kChunkThreads) write_probes(const __grid_constant__ ProbeWork work) {
  __shared__ ProbeShared shared;
  const std::int64_t task = work.first + blockIdx.x, pair = task / work.chunks;
  const std::int64_t begin = task % work.chunks * work.tiles * kTile<Real>;
  Real scale = 1;
  if (kNormal && work.partial) {
    if (threadIdx.x < 32) {
      const double factor = sphere_scale(work.call.columns, pair_sums(work, pair).squares);
      if (threadIdx.x == 0) shared.scale = factor;
    }
    __syncthreads();
    scale = static_cast<Real>(shared.scale);
  }
  ProbeTile<Real, kNormal> tile(work, pair);
  for (int i = 0; i < work.tiles; ++i) {
    if (begin + i * kTile<Real> >= work.call.columns) break;
    tile.place(begin + i * kTile<Real>);
    tile.make(shared);
    tile.store(scale);
  }
}

}  // namespace fastdensity::cuda
