// The C++ interface of fastdensity's kernels: plain structs of addresses, no Python, no torch.
//
// Every launcher takes a `RowsCall`, the contract that fastdensity/reference/rows.py states and tests. The
// caller has checked it: addresses are valid, rows are dense, `out` equals an operand or overlaps none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastdensity {

// Positions as in fastdensity/rules.py.
enum class Rule : int { drift = 0, prediction = 1, step = 2, radius = 3 };
enum class PredictionType : int { epsilon = 0, sample, v_prediction, velocity, velocity_to_data, score, edm };
enum class DataType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

enum Flag : int {
  non_finite = 1,
  zero_score = 2,
  endpoint = 4,
  bad_parameter = 8,
  limited_flag = 16,
  stale_state = 32
};

// A batch of row vectors: element j of row i lies at data + (i * row_stride + j) elements.
struct Rows {
  const void* data = nullptr;  // nullptr: this operand is absent
  DataType dtype = DataType::float32;
  std::int64_t row_stride = 0;
};

// One number per row, or the same number for all: `value` where `data` is null.
struct Parameter {
  const void* data = nullptr;
  DataType dtype = DataType::float64;  // float32 or float64
  std::int64_t stride = 0;             // 0: one number for all rows
  double value = 0.0;
};

constexpr int kParameters = 10;  // the longest list, that of a step

struct RowsCall {
  Rule rule = Rule::step;
  PredictionType type = PredictionType::epsilon;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  Rows v0, v1, uncond, v2;  // see fastdensity/reference/rows.py for what each rule reads
  void* out = nullptr;
  DataType out_dtype = DataType::float32;
  std::int64_t out_stride = 0;
  Parameter parameters[kParameters];
  void* report = nullptr;  // (rows, 4) in the accumulation type, or nullptr
  // Noise made in the kernel: null sample_ids means none.
  std::uint64_t seed = 0;
  const std::int64_t* sample_ids = nullptr;
  std::uint32_t step = 0;
};

// float64 if any operand is float64, else float32: the type of sums over a row, of `report`, of elementwise work.
inline bool accumulates_in_double(const RowsCall& call) {
  const Rows* operands[] = {&call.v0, &call.v1, &call.uncond, &call.v2};
  for (const Rows* operand : operands)
    if (operand->data && operand->dtype == DataType::float64) return true;
  return false;
}

void rows_cpu(const RowsCall& call, int threads);

// Launches on `stream` (a cudaStream_t) of the current device; `scratch` may be null where rows_cuda_scratch is 0.
// Returns nullptr, or the CUDA error as text.
std::int64_t rows_cuda_scratch(const RowsCall& call);  // bytes
const char* rows_cuda(const RowsCall& call, void* scratch, void* stream);

// The closed loop of guidance: fastdensity/reference/track.py has the contract, the parameters and the memory.
enum class TrackScheme : int { direct = 0, predictor, corrector };
constexpr int kTrackParameters = 12, kTrackMemory = 17;

struct TrackCall {
  TrackScheme scheme = TrackScheme::direct;
  // What is made of the rows with the eta decided on: rule `step` or `prediction`, q = 1/2, shift and gain 0; its
  // operands are the loop's, too. Without `out` and `report` the loop only decides.
  RowsCall step;
  Rows last_x, last_eps;   // may be absent
  bool in_double = false;  // the type of sums and of eps
  void* eps = nullptr;     // (rows, columns) dense
  Parameter parameters[kTrackParameters];
  const double* memory = nullptr;  // (rows, kTrackMemory)
  double* memory_out = nullptr;    // likewise, separate memory
  double* report = nullptr;        // (rows, 4)
};

void track_cpu(const TrackCall& call, int threads);

// Probes first .. first + probes - 1 of every row; the contract of fastdensity/reference/probe.py.
enum class Distribution : int { rademacher = 0, normal, sphere, hadamard };

struct ProbeCall {
  Distribution distribution = Distribution::rademacher;
  std::uint64_t seed = 0;
  std::uint32_t step = 0, stream = 0;
  std::int64_t first = 0, probes = 0, rows = 0, columns = 0;  // all but `first` positive
  const std::int64_t* sample_ids = nullptr;                   // (rows)
  DataType dtype = DataType::float32;                         // of the probes made, or of the products
  const void* products = nullptr;                             // (probes, rows, columns)
  void* out = nullptr;                                        // probes likewise; forms: double (probes, rows)
};

void make_probes_cpu(const ProbeCall& call, int threads);
void probe_forms_cpu(const ProbeCall& call, int threads);

// As rows_cuda. `scratch` holds probe_cuda_scratch bytes.
std::int64_t probe_cuda_scratch(const ProbeCall& call);
const char* make_probes_cuda(const ProbeCall& call, void* scratch, void* stream);
const char* probe_forms_cuda(const ProbeCall& call, void* scratch, void* stream);

// adaLN's rows of `size` numbers: row r of x uses the one at data + r / every * stride.
struct Modulation {
  const void* data = nullptr;  // nullptr: absent
  std::int64_t stride = 0;
  std::int64_t every = 1;
};

// fastdensity/reference/dual_norm.py on a dense dual (planes, rows, size), the value first. Plain numbers are float64
// where `dtype` is, else float32. groups == 0: weight and bias have `size` numbers. Else row r is group r % groups of
// a sample, its channels have `spatial` elements each, and weight and bias one number per channel.
struct DualNormCall {
  const void* x = nullptr;
  void* out = nullptr;
  DataType dtype = DataType::float32;
  std::int64_t planes = 0, rows = 0, size = 0;
  double eps = 0;
  bool centered = true;  // false: root-mean-square norm
  const void *weight = nullptr, *bias = nullptr;
  Modulation multiplier, addend;
  std::int64_t groups = 0, spatial = 1;
  bool silu = false;
};

void dual_norm_cpu(const DualNormCall& call, int threads);

// x (1 + tangents, rows, columns) dense -> out, alike: softmax over the columns and its tangents.
struct DualSoftmaxCall {
  const void* x = nullptr;
  void* out = nullptr;
  DataType dtype = DataType::float32;
  std::int64_t tangents = 0, rows = 0, columns = 0;
};
void dual_softmax_cpu(const DualSoftmaxCall& call, int threads);

// Scores of a dual attention, (1 + tangents, rows, columns) dense, to probabilities in place. Row i is row
// first_row + i of (batch, heads, length); element (b, h, l, s) of the mask lies at the sum of index times stride.
struct DualScoresCall {
  void* scores = nullptr;
  DataType dtype = DataType::float32;  // or float64
  std::int64_t tangents = 0, rows = 0, columns = 0;
  std::int64_t first_row = 0, heads = 1, length = 1;
  bool causal = false;
  const void* mask = nullptr;  // bytes (true: attend), or numbers to add, in the scores' type
  bool mask_is_bool = false;
  std::int64_t mask_strides[4] = {0, 0, 0, 0};
};
void dual_attention_cpu(const DualScoresCall& call, int threads);

// An operand of a dual attention in the arithmetic's type: strides of plane, sample, head and row, columns adjacent.
struct AttentionOperand {
  const void* data = nullptr;
  bool dual = false;
  std::int64_t strides[4] = {0, 0, 0, 0};
};

// A dual attention without mask from end to end, out (1 + tangents, batch, heads, length, value_width) dense. Of the
// sizes only `width` may be 0.
struct NarrowAttentionCall {
  AttentionOperand query, key, value;
  void* out = nullptr;
  DataType dtype = DataType::float32;  // or float64
  std::int64_t tangents = 0, batch = 0, heads = 0, key_heads = 0, length = 0, keys = 0, width = 0, value_width = 0;
  double scale = 1;
};
void dual_narrow_attention_cpu(const NarrowAttentionCall& call, int threads);

// Many small images, dense (images, channels, height, width), convolved with a dense weight (outputs, channels, window);
// the first `biased` results get the bias, where there is one. No size is 0.
struct DualConvCall {
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;
  void* out = nullptr;
  DataType dtype = DataType::float32;  // or float64
  std::int64_t images = 0, biased = 0, channels = 0, height = 0, width = 0, outputs = 0, out_height = 0, out_width = 0;
  std::int64_t window[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
};
void dual_conv_cpu(const DualConvCall& call, int threads);

// A chain of elementwise operations on duals: fastdensity/reference/dual_chain.py.
struct ChainStep {
  int operation = 0;                // chain::Operation
  std::size_t left = 0, right = 0;  // values: the inputs, then the results of the steps before
  double constant = 0;
};

// Strides in elements over the dimensions of the result, 0 where the input is broadcast.
struct ChainInput {
  const void* data = nullptr;
  bool dual = false;
  std::int64_t tangent_stride = 0;
  std::vector<std::int64_t> strides;
};

struct ChainCall {
  DataType dtype = DataType::float32;  // of every input and of the result
  std::vector<ChainInput> inputs;
  std::vector<ChainStep> steps;
  std::int64_t tangents = 0;
  std::vector<std::int64_t> sizes;  // of the result, without the tangents
  void* out = nullptr;              // dense; the very memory of inputs[0], or none of an input's
};

void dual_chain_cpu(ChainCall call, int threads);

}  // namespace fastdensity
