// Chains of elementwise operations on duals: fastdensity/reference/dual_chain.py as a small vector machine.
//
// The result is cut into blocks. Of each block all values are computed first, and the derivative of every unary step
// with them; then each tangent runs through the same steps linearised. Intermediate values stay in the first-level
// cache, and operands that are float or double and dense are read where they are.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "dual_chain_simd.h"
#include "ops.h"
#include "rows_simd.h"

namespace fastdensity {
namespace {

constexpr std::int64_t kBlock = 1024;             // elements: buffers of a short chain fit the first-level cache
constexpr std::int64_t kAlignment = 16;           // elements: a cache line of floats
constexpr std::int64_t kSerialElements = 32768;   // below this a parallel region costs more than it saves

// Drops dimensions of one element, and merges neighbours that every input walks as one.
void collapse(ChainCall& call) {
  std::vector<std::int64_t> sizes;
  std::vector<std::vector<std::int64_t>> strides(call.inputs.size());
  for (std::size_t d = 0; d < call.sizes.size(); ++d) {
    if (call.sizes[d] == 1) continue;
    bool merges = !sizes.empty();
    for (std::size_t i = 0; merges && i < call.inputs.size(); ++i)
      merges = strides[i].back() == call.inputs[i].strides[d] * call.sizes[d];
    if (!merges) sizes.push_back(1);
    sizes.back() *= call.sizes[d];
    for (std::size_t i = 0; i < call.inputs.size(); ++i) {
      if (!merges) strides[i].push_back(0);
      strides[i].back() = call.inputs[i].strides[d];
    }
  }
  if (sizes.empty()) sizes.push_back(1);
  for (std::size_t i = 0; i < call.inputs.size(); ++i) {
    if (strides[i].empty()) strides[i].push_back(1);
    call.inputs[i].strides = strides[i];
  }
  call.sizes = sizes;
}

// The elements first .. first + count of the result, which are `rows` pieces of the innermost dimension.
struct Block {
  std::int64_t first, count, row, rows, column;
};

// How the collapsed result is cut: several whole rows at a time where they are short, else parts of one row.
struct Cut {
  std::int64_t columns, rows, rows_per_block, parts, blocks;

  explicit Cut(const std::vector<std::int64_t>& sizes) : columns(sizes.back()), rows(1) {
    for (std::size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
    rows_per_block = std::max<std::int64_t>(1, kBlock / columns);
    parts = (columns + kBlock - 1) / kBlock;
    blocks = (rows + rows_per_block - 1) / rows_per_block * parts;
  }

  Block at(std::int64_t index) const {
    Block block;
    block.row = index / parts * rows_per_block;
    block.column = index % parts * kBlock;
    block.rows = std::min(rows_per_block, rows - block.row);
    block.first = block.row * columns + block.column;
    block.count = parts > 1 ? std::min(kBlock, columns - block.column) : block.rows * columns;
    return block;
  }
};

// Where the tangent of a value comes from: the same for every block, known before the first.
enum class Flow { none, input, same_as_left, same_as_right, computed };

struct Plan {
  explicit Plan(const ChainCall& call);

  std::vector<Flow> flow;  // of each value
  std::vector<bool> dense;  // of each input: its elements lie in the order of the result's
  Cut cut;
  std::int64_t total;  // elements of the result, without the tangents
  bool in_place;
};

Flow flow_of(const ChainStep& step, bool left, bool right) {
  if (!left && !right) return Flow::none;
  if (step.operation == chain::shift) return Flow::same_as_left;
  if (step.operation == chain::add && !right) return Flow::same_as_left;
  if (step.operation == chain::add && !left) return Flow::same_as_right;
  if (step.operation == chain::subtract && !right) return Flow::same_as_left;
  return Flow::computed;
}

Plan::Plan(const ChainCall& call)
    : cut(call.sizes), total(cut.rows * cut.columns), in_place(call.inputs[0].data == call.out) {
  for (const ChainInput& input : call.inputs) {
    flow.push_back(input.dual ? Flow::input : Flow::none);
    std::int64_t expected = 1;
    bool is_dense = true;
    for (std::size_t d = call.sizes.size(); d-- > 0; expected *= call.sizes[d])
      is_dense = is_dense && input.strides[d] == expected;
    dense.push_back(is_dense);
  }
  for (const ChainStep& step : call.steps)
    flow.push_back(flow_of(step, flow[step.left] != Flow::none, flow[step.right] != Flow::none));
}

template <typename Real>
class Machine {
 public:
  Machine(const ChainCall& call, const Plan& plan)
      : call_(call),
        plan_(plan),
        size_(plan.flow.size()),
        memory_(new Real[3 * size_ * kBlock + kAlignment]),
        value_(size_),
        slope_(size_, nullptr),
        tangent_(size_, nullptr) {}

  void run(const Block& block) {
    values(block);
    // the values last where they replace an input that the tangents still read
    const bool late = plan_.in_place || !writes_directly();
    for (std::int64_t k = 0; k < call_.tangents; ++k) tangents(block, k);
    if (late) deliver(value_.back(), 0, block);
  }

 private:
  static constexpr DataType own_type() { return sizeof(Real) == 4 ? DataType::float32 : DataType::float64; }

  bool writes_directly() const { return call_.dtype == own_type(); }

  Real* buffer(int kind, std::size_t value) {
    const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(memory_.get()) / sizeof(Real) % kAlignment;
    return memory_.get() + (kAlignment - past) + (kind * size_ + value) * kBlock;
  }

  Real* target(std::int64_t plane, const Block& block) const {
    return static_cast<Real*>(call_.out) + plane * plan_.total + block.first;
  }

  void deliver(const Real* source, std::int64_t plane, const Block& block) const {
    if (writes_directly() && source == target(plane, block)) return;
    simd::store(source, call_.out, static_cast<int>(call_.dtype), plane * plan_.total + block.first, block.count);
  }

  // A block of an input, of its value (plane 0) or of a tangent: in place if possible, else in the buffer.
  const Real* fetch(std::size_t index, std::int64_t plane, const Block& block, Real* space) const {
    const ChainInput& input = call_.inputs[index];
    const std::int64_t stride = input.strides.back(), base = plane * input.tangent_stride;
    if (plan_.dense[index]) return read(input, base + block.first, block.count, space);
    const std::int64_t width = block.rows == 1 ? block.count : plan_.cut.columns;
    if (block.rows == 1 && stride == 1)
      return read(input, base + row_offset(input, block.row) + block.column, width, space);
    for (std::int64_t row = 0; row < block.rows; ++row)
      spread(input, base + row_offset(input, block.row + row) + block.column * stride, width, space + row * width);
    return space;
  }

  const Real* read(const ChainInput& input, std::int64_t offset, std::int64_t count, Real* space) const {
    if (call_.dtype == own_type()) return static_cast<const Real*>(input.data) + offset;
    simd::load(input.data, static_cast<int>(call_.dtype), offset, count, space);
    return space;
  }

  void spread(const ChainInput& input, std::int64_t offset, std::int64_t count, Real* space) const {
    const int dtype = static_cast<int>(call_.dtype);
    const std::int64_t stride = input.strides.back();
    if (stride == 1) return simd::load(input.data, dtype, offset, count, space);
    chain::gather(input.data, dtype, offset, stride, stride ? count : 1, space);
    if (!stride) std::fill(space + 1, space + count, space[0]);
  }

  std::int64_t row_offset(const ChainInput& input, std::int64_t row) const {
    std::int64_t offset = 0;
    for (std::size_t d = call_.sizes.size() - 1; d-- > 0; row /= call_.sizes[d])
      offset += row % call_.sizes[d] * input.strides[d];
    return offset;
  }

  void values(const Block& block) {
    const std::size_t inputs = call_.inputs.size();
    for (std::size_t i = 0; i < inputs; ++i) value_[i] = fetch(i, 0, block, buffer(0, i));
    for (std::size_t i = inputs; i < size_; ++i) {
      const ChainStep& step = call_.steps[i - inputs];
      const bool direct = i + 1 == size_ && writes_directly() && !plan_.in_place;
      Real* result = direct ? target(0, block) : buffer(0, i);
      // binary steps keep their operands instead, and exp is its own derivative
      const bool unary = step.operation >= chain::negate && step.operation != chain::exp;
      Real* slope = unary && plan_.flow[i] != Flow::none ? buffer(1, i) : nullptr;
      chain::run_step(step.operation, value_[step.left], value_[step.right], static_cast<Real>(step.constant), result,
                      slope, block.count);
      value_[i] = result;
      slope_[i] = step.operation == chain::exp ? result : slope;
    }
  }

  void tangents(const Block& block, std::int64_t k) {
    const std::size_t inputs = call_.inputs.size();
    for (std::size_t i = 0; i < inputs; ++i)
      if (plan_.flow[i] == Flow::input) tangent_[i] = fetch(i, 1 + k, block, buffer(2, i));
    for (std::size_t i = inputs; i < size_; ++i) {
      const ChainStep& step = call_.steps[i - inputs];
      if (plan_.flow[i] == Flow::same_as_left) tangent_[i] = tangent_[step.left];
      if (plan_.flow[i] == Flow::same_as_right) tangent_[i] = tangent_[step.right];
      if (plan_.flow[i] != Flow::computed) continue;
      const bool direct = i + 1 == size_ && writes_directly();
      Real* result = direct ? target(1 + k, block) : buffer(2, i);
      linearised(step, i, result, block.count);
      tangent_[i] = result;
    }
    deliver(tangent_.back(), 1 + k, block);
  }

  void linearised(const ChainStep& step, std::size_t index, Real* result, std::int64_t count) const {
    const Real *left = tangent_of(step.left), *right = tangent_of(step.right);
    const auto run = [&](int operation, const Real* a, const Real* b) {
      chain::run_step(operation, a, b, static_cast<Real>(step.constant), result, nullptr, count);
    };
    switch (step.operation) {
      case chain::add: return run(chain::add, left, right);
      case chain::subtract: return left ? run(chain::subtract, left, right) : run(chain::negate, right, right);
      case chain::scale:
      case chain::negate: return run(step.operation, left, left);
      case chain::relu: return chain::gated(slope_[index], left, result, count);
      case chain::multiply:
        if (!right) return run(chain::multiply, left, value_[step.right]);
        if (!left) return run(chain::multiply, right, value_[step.left]);
        return chain::combined(value_[step.right], left, value_[step.left], right, result, count);
      case chain::divide:
        if (!right) return run(chain::divide, left, value_[step.right]);
        return chain::quotient(left, value_[index], right, value_[step.right], result, count);
      default: return run(chain::multiply, left, slope_[index]);
    }
  }

  // tangent_ of an earlier value, or null where that is plain
  const Real* tangent_of(std::size_t value) const {
    return plan_.flow[value] == Flow::none ? nullptr : tangent_[value];
  }

  const ChainCall& call_;
  const Plan& plan_;
  const std::size_t size_;
  std::unique_ptr<Real[]> memory_;  // three buffers for each value: itself, its derivative, one tangent
  std::vector<const Real*> value_, slope_, tangent_;
};

template <typename Real>
void run(const ChainCall& call, const Plan& plan, int threads) {
  if (threads == 1) {  // entering a parallel region of one thread costs more than a small chain
    Machine<Real> machine(call, plan);
    for (std::int64_t block = 0; block < plan.cut.blocks; ++block) machine.run(plan.cut.at(block));
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Machine<Real> machine(call, plan);
#pragma omp for schedule(static)
    for (std::int64_t block = 0; block < plan.cut.blocks; ++block) machine.run(plan.cut.at(block));
  }
}

}  // namespace

void dual_chain_cpu(ChainCall call, int threads) {
  collapse(call);
  const Plan plan(call);
  if (plan.total <= 0) return;
  if (plan.total * (1 + call.tangents) <= kSerialElements) threads = 1;
  threads = std::max(threads, 1);
  call.dtype == DataType::float64 ? run<double>(call, plan, threads) : run<float>(call, plan, threads);
}

}  // namespace fastdensity
