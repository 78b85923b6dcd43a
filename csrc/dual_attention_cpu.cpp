// Dual attention of narrow heads on CPU, without mask: fastdensity/reference/dual_attention.py.
//
// Rows of all heads are cut into blocks, each thread takes a run of blocks and packs the keys and values of a head when
// it comes to it. How rows are cut shows in no bit of the result.
#include <algorithm>
#include <memory>
#include <new>

#include "dual_attention_simd.h"
#include "ops.h"

namespace fastdensity {
namespace {

using simd::kAlignment;
using simd::kKeys;
using simd::kQueries;

constexpr std::int64_t kSerialScores = 4096;  // below this a parallel region costs more than it saves

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};

template <typename Real>
class NarrowAttention {
 public:
  explicit NarrowAttention(const NarrowAttentionCall& call)
      : call_(call),
        rows_(call.heads / call.key_heads * call.length),
        blocks_((rows_ + kQueries - 1) / kQueries),
        all_blocks_(call.batch * call.key_heads * blocks_) {}

  void run(int threads) const {
    const std::int64_t parts = std::min<std::int64_t>(threads, all_blocks_);
    if (parts <= 1 || all_blocks_ * kQueries * call_.keys < kSerialScores) return run_blocks(0, all_blocks_);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t part = 0; part < parts; ++part)
      run_blocks(part * all_blocks_ / parts, (part + 1) * all_blocks_ / parts);
  }

 private:
  void run_blocks(std::int64_t first, std::int64_t end) const {
    std::unique_ptr<void, Release> memory;
    simd::NarrowScratch<Real> scratch = reserve(memory);
    while (first < end) {
      const std::int64_t head = first / blocks_, stop = std::min(end, (head + 1) * blocks_);
      simd::pack_head(call_, head, scratch);
      const std::int64_t row = (first - head * blocks_) * kQueries;
      simd::attend(call_, head, row, std::min(rows_, (stop - head * blocks_) * kQueries), scratch);
      first = stop;
    }
  }

  simd::NarrowScratch<Real> reserve(std::unique_ptr<void, Release>& memory) const {
    const std::int64_t padded = (call_.keys + kKeys - 1) / kKeys * kKeys, planes = 1 + call_.tangents;
    const std::int64_t sizes[] = {call_.width * kQueries,
                                  call_.width * kQueries,
                                  padded * kQueries,
                                  padded * kQueries,
                                  call_.value_width * kQueries,
                                  padded * call_.width * (call_.key.dual ? planes : 1),
                                  call_.keys * call_.value_width * (call_.value.dual ? planes : 1)};
    simd::NarrowScratch<Real> scratch;
    Real** parts[] = {&scratch.query,  &scratch.tangent, &scratch.scores, &scratch.score_tangents,
                      &scratch.output, &scratch.keys,    &scratch.values};
    constexpr std::int64_t kUnit = kAlignment / sizeof(Real);
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += (size + kUnit - 1) / kUnit * kUnit;
    memory.reset(::operator new(total * sizeof(Real), std::align_val_t(kAlignment)));
    Real* next = static_cast<Real*>(memory.get());
    for (int part = 0; part < 7; ++part) *parts[part] = next, next += (sizes[part] + kUnit - 1) / kUnit * kUnit;
    return scratch;
  }

  const NarrowAttentionCall& call_;
  const std::int64_t rows_, blocks_, all_blocks_;  // rows and blocks of a key head, blocks of all
};

}  // namespace

void dual_narrow_attention_cpu(const NarrowAttentionCall& call, int threads) {
  if (call.dtype == DataType::float64)
    NarrowAttention<double>(call).run(threads);
  else
    NarrowAttention<float>(call).run(threads);
}

}  // namespace fastdensity
