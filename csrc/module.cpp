// The only file that knows Python; it links no libtorch. `rows` asks a tensor for its address, element type and stride
// through the tensor's own methods, the dual kernels are handed these as integers. fastdensity/ops checked every
// argument; nothing here converts, copies or keeps one.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"
#include "philox.h"
#include "rows_simd.h"
#include "rules.h"

namespace nb = nanobind;
using namespace fastdensity;

namespace {

std::int64_t integer(nb::handle item) { return nb::cast<std::int64_t>(item); }

const void* address(std::int64_t value) { return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(value)); }

void* writable(std::int64_t value) { return const_cast<void*>(address(value)); }

// torch's dtypes in the order of DataType, and the names of the methods asked for, made once.
struct TorchNames {
  PyObject* dtypes[4] = {};
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* numel = PyUnicode_InternFromString("numel");
};

TorchNames& names() {
  static TorchNames instance;
  return instance;
}

void set_dtypes(nb::tuple dtypes) {
  if (dtypes.size() != 4) throw std::invalid_argument("expected four dtypes");
  for (int i = 0; i < 4; ++i) names().dtypes[i] = nb::borrow(dtypes[i]).release().ptr();
}

nb::object call_method(nb::handle object, PyObject* name) {
  PyObject* result = PyObject_CallMethodObjArgs(object.ptr(), name, nullptr);
  if (!result) nb::raise_python_error();
  return nb::steal(result);
}

DataType data_type(nb::handle tensor) {
  const nb::object dtype = nb::steal(PyObject_GetAttr(tensor.ptr(), names().dtype));
  for (int i = 0; i < 4; ++i)
    if (dtype.ptr() == names().dtypes[i]) return static_cast<DataType>(i);
  throw std::invalid_argument("unsupported element type");
}

DataType data_type(int number) {
  if (number < 0 || number > 3) throw std::invalid_argument("unknown element type");
  return static_cast<DataType>(number);
}

// None, or a tensor (B, *) with dense rows; `row_stride` 0 asks the tensor.
Rows rows_of(nb::handle tensor, std::int64_t row_stride) {
  Rows rows;
  if (tensor.is_none()) return rows;
  rows.data = address(integer(call_method(tensor, names().data_ptr)));
  rows.dtype = data_type(tensor);
  rows.row_stride = row_stride;
  if (!row_stride) {
    const nb::tuple strides = nb::borrow<nb::tuple>(call_method(tensor, names().stride));
    rows.row_stride = strides.size() ? integer(strides[0]) : 0;
  }
  return rows;
}

// A number, or a tensor with one number per row or one for all.
Parameter parameter_of(nb::handle item) {
  Parameter parameter;
  if (PyFloat_Check(item.ptr())) {
    parameter.value = PyFloat_AsDouble(item.ptr());
    return parameter;
  }
  const Rows rows = rows_of(item, 0);
  parameter.data = rows.data, parameter.dtype = rows.dtype, parameter.stride = rows.row_stride;
  if (integer(call_method(item, names().numel)) == 1) parameter.stride = 0;  // one number, whatever its shape
  if (parameter.dtype != DataType::float32 && parameter.dtype != DataType::float64)
    throw std::invalid_argument("numbers per row must be float32 or float64");
  return parameter;
}

RowsCall make_call(int rule, int type, std::int64_t rows, std::int64_t columns, bool contiguous, nb::handle v0,
                   nb::handle v1, nb::handle uncond, nb::handle v2, nb::handle out, nb::tuple parameters,
                   nb::handle report, std::uint64_t seed, nb::handle sample_ids, std::uint32_t step) {
  if (rule < 0 || rule > 3 || type < 0 || type > 6) throw std::invalid_argument("unknown rule or prediction type");
  if (parameters.size() > kParameters) throw std::invalid_argument("too many parameters");
  RowsCall call;
  call.rule = static_cast<Rule>(rule), call.type = static_cast<PredictionType>(type);
  call.rows = rows, call.columns = columns;
  const std::int64_t stride = contiguous ? columns : 0;
  call.v0 = rows_of(v0, stride), call.v1 = rows_of(v1, stride);
  call.uncond = rows_of(uncond, stride), call.v2 = rows_of(v2, stride);
  const Rows target = rows_of(out, columns);
  call.out = const_cast<void*>(target.data), call.out_dtype = target.dtype, call.out_stride = target.row_stride;
  for (std::size_t i = 0; i < parameters.size(); ++i) call.parameters[i] = parameter_of(parameters[i]);
  if (!report.is_none()) call.report = writable(integer(call_method(report, names().data_ptr)));
  call.seed = seed, call.step = step;
  if (!sample_ids.is_none())
    call.sample_ids = static_cast<const std::int64_t*>(address(integer(call_method(sample_ids, names().data_ptr))));
  return call;
}

void rows_cpu_entry(int rule, int type, std::int64_t rows, std::int64_t columns, bool contiguous, nb::handle v0,
                    nb::handle v1, nb::handle uncond, nb::handle v2, nb::handle out, nb::tuple parameters,
                    nb::handle report, std::uint64_t seed, nb::handle sample_ids, std::uint32_t step, int threads) {
  const RowsCall call = make_call(rule, type, rows, columns, contiguous, v0, v1, uncond, v2, out, parameters, report,
                                  seed, sample_ids, step);
  if (rows * columns < 4096) return rows_cpu(call, 1);  // shorter than handing the interpreter over and back
  nb::gil_scoped_release release;
  rows_cpu(call, threads);
}

#ifdef FASTDENSITY_WITH_CUDA
std::int64_t rows_cuda_scratch_entry(int rule, int type, std::int64_t rows, std::int64_t columns, bool contiguous,
                                     nb::handle v0, nb::handle v1, nb::handle uncond, nb::handle v2, nb::handle out,
                                     nb::tuple parameters, nb::handle report, std::uint64_t seed,
                                     nb::handle sample_ids, std::uint32_t step) {
  return rows_cuda_scratch(make_call(rule, type, rows, columns, contiguous, v0, v1, uncond, v2, out, parameters, report,
                                     seed, sample_ids, step));
}

void rows_cuda_entry(int rule, int type, std::int64_t rows, std::int64_t columns, bool contiguous, nb::handle v0,
                     nb::handle v1, nb::handle uncond, nb::handle v2, nb::handle out, nb::tuple parameters,
                     nb::handle report, std::uint64_t seed, nb::handle sample_ids, std::uint32_t step,
                     std::int64_t scratch, std::int64_t stream) {
  const RowsCall call = make_call(rule, type, rows, columns, contiguous, v0, v1, uncond, v2, out, parameters, report,
                                  seed, sample_ids, step);
  const char* error = rows_cuda(call, writable(scratch), writable(stream));
  if (error) throw std::runtime_error(std::string("CUDA kernel `rows` failed: ") + error);
}
#endif

// (scheme, rule of the step, prediction type, rows, columns, double arithmetic?)
using TrackArgument = std::tuple<int, int, int, std::int64_t, std::int64_t, bool>;

double* doubles(nb::handle tensor) {
  return static_cast<double*>(writable(integer(call_method(tensor, names().data_ptr))));
}

// `operands` are (x, prediction, uncond, last x, last eps, noise), `results` (eps, report, memory) of the loop, `out`
// and `step_report` those of the step, None if there is none.
void track_cpu_entry(TrackArgument argument, nb::tuple operands, nb::tuple parameters, nb::handle memory,
                     nb::tuple results, nb::handle out, nb::handle step_report, std::uint64_t seed,
                     nb::handle sample_ids, std::uint32_t step, int threads) {
  const auto [scheme, rule, type, rows, columns, in_double] = argument;
  if (scheme < 0 || scheme > 2) throw std::invalid_argument("unknown scheme");
  if (operands.size() != 6 || results.size() != 3 || parameters.size() != kTrackParameters)
    throw std::invalid_argument("wrong tuple");
  TrackCall call;
  call.step = make_call(rule, type, rows, columns, true, operands[0], operands[1], operands[2], operands[5], out,
                        nb::tuple(), step_report, seed, sample_ids, step);
  for (int i = 0; i < kTrackParameters; ++i) call.parameters[i] = parameter_of(parameters[i]);
  // the step's alpha, sigma, alpha_next and sigma_next; its q; cfg_scale, noise_scale and sigma_data
  std::copy_n(call.parameters, 4, call.step.parameters);
  call.step.parameters[4].value = 0.5;
  std::copy_n(call.parameters + 8, 3, call.step.parameters + 7);
  call.scheme = static_cast<TrackScheme>(scheme), call.in_double = in_double;
  call.last_x = rows_of(operands[3], columns), call.last_eps = rows_of(operands[4], columns);
  call.memory = doubles(memory), call.memory_out = doubles(results[2]);
  call.eps = writable(integer(call_method(results[0], names().data_ptr))), call.report = doubles(results[1]);
  nb::gil_scoped_release release;
  track_cpu(call, threads);
}

// -- Probes: as the duals below ---------------------------------------------------------------------------------------

// (distribution, seed, step, stream, first, probes, rows, columns, address of the sample ids)
using ProbeArgument = std::tuple<int, std::uint64_t, std::uint32_t, std::uint32_t, std::int64_t, std::int64_t,
                                 std::int64_t, std::int64_t, std::int64_t>;

ProbeCall probe_call(const ProbeArgument& argument, std::int64_t products, std::int64_t out, int dtype) {
  ProbeCall call;
  int distribution = 0;
  std::int64_t sample_ids = 0;
  std::tie(distribution, call.seed, call.step, call.stream, call.first, call.probes, call.rows, call.columns,
           sample_ids) = argument;
  if (distribution < 0 || distribution > 3) throw std::invalid_argument("unknown distribution");
  call.distribution = static_cast<Distribution>(distribution);
  call.sample_ids = static_cast<const std::int64_t*>(address(sample_ids));
  call.dtype = data_type(dtype), call.products = address(products), call.out = writable(out);
  return call;
}

void make_probes_entry(ProbeArgument argument, std::int64_t out, int dtype, int threads) {
  const ProbeCall call = probe_call(argument, 0, out, dtype);
  nb::gil_scoped_release release;
  make_probes_cpu(call, threads);
}

void probe_forms_entry(ProbeArgument argument, std::int64_t products, std::int64_t out, int dtype, int threads) {
  const ProbeCall call = probe_call(argument, products, out, dtype);
  nb::gil_scoped_release release;
  probe_forms_cpu(call, threads);
}

#ifdef FASTDENSITY_WITH_CUDA
std::int64_t probe_cuda_scratch_entry(ProbeArgument argument, int dtype) {
  return probe_cuda_scratch(probe_call(argument, 0, 0, dtype));
}

void make_probes_cuda_entry(ProbeArgument argument, std::int64_t out, int dtype, std::int64_t scratch,
                            std::int64_t stream) {
  const char* error = make_probes_cuda(probe_call(argument, 0, out, dtype), writable(scratch), writable(stream));
  if (error) throw std::runtime_error(std::string("CUDA kernel `make_probes` failed: ") + error);
}

void probe_forms_cuda_entry(ProbeArgument argument, std::int64_t products, std::int64_t out, int dtype,
                            std::int64_t scratch, std::int64_t stream) {
  const char* error = probe_forms_cuda(probe_call(argument, products, out, dtype), writable(scratch), writable(stream));
  if (error) throw std::runtime_error(std::string("CUDA kernel `probe_forms` failed: ") + error);
}
#endif

// -- Duals: addresses and sizes of dense tensors as integers, 0 for a tensor that is absent ---------------------------

void dual_softmax_entry(std::int64_t x, std::int64_t out, int dtype, std::int64_t tangents, std::int64_t rows,
                        std::int64_t columns, int threads) {
  DualSoftmaxCall call;
  call.x = address(x), call.out = writable(out), call.dtype = data_type(dtype);
  call.tangents = tangents, call.rows = rows, call.columns = columns;
  nb::gil_scoped_release release;
  dual_softmax_cpu(call, threads);
}

// (address, is it boolean, strides of batch, head, row and column)
using MaskArgument = std::tuple<std::int64_t, bool, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

void dual_attention_entry(std::int64_t scores, int dtype, std::int64_t tangents, std::int64_t rows,
                          std::int64_t columns, std::int64_t first_row, std::int64_t heads, std::int64_t length,
                          bool causal, MaskArgument mask, int threads) {
  DualScoresCall call;
  call.scores = writable(scores), call.dtype = data_type(dtype);
  call.tangents = tangents, call.rows = rows, call.columns = columns;
  call.first_row = first_row, call.heads = heads, call.length = length, call.causal = causal;
  std::int64_t data = 0;
  std::int64_t* strides = call.mask_strides;
  std::tie(data, call.mask_is_bool, strides[0], strides[1], strides[2], strides[3]) = mask;
  call.mask = address(data);
  nb::gil_scoped_release release;
  dual_attention_cpu(call, threads);
}

// (address, is it dual, strides of plane, sample, head and row)
using OperandArgument = std::tuple<std::int64_t, bool, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

AttentionOperand operand_of(const OperandArgument& argument) {
  const auto [data, dual, plane, sample, head, row] = argument;
  return {address(data), dual, {plane, sample, head, row}};
}

void dual_narrow_attention_entry(OperandArgument query, OperandArgument key, OperandArgument value, std::int64_t out,
                                 int dtype, std::int64_t tangents, std::int64_t batch, std::int64_t heads,
                                 std::int64_t key_heads, std::int64_t length, std::int64_t keys, std::int64_t width,
                                 std::int64_t value_width, double scale, int threads) {
  NarrowAttentionCall call;
  call.query = operand_of(query), call.key = operand_of(key), call.value = operand_of(value);
  call.out = writable(out), call.dtype = data_type(dtype), call.tangents = tangents, call.scale = scale;
  call.batch = batch, call.heads = heads, call.key_heads = key_heads;
  call.length = length, call.keys = keys, call.width = width, call.value_width = value_width;
  nb::gil_scoped_release release;
  dual_narrow_attention_cpu(call, threads);
}

using Pair = std::tuple<std::int64_t, std::int64_t>;  // height first

void dual_conv_entry(std::int64_t x, std::int64_t weight, std::int64_t bias, std::int64_t out, int dtype,
                     std::int64_t images, std::int64_t biased, std::int64_t channels, std::int64_t outputs, Pair size,
                     Pair out_size, Pair window, Pair stride, Pair padding, Pair dilation, int threads) {
  DualConvCall call;
  call.x = address(x), call.weight = address(weight), call.bias = address(bias), call.out = writable(out);
  call.dtype = data_type(dtype), call.images = images, call.biased = biased;
  call.channels = channels, call.outputs = outputs;
  std::tie(call.height, call.width) = size, std::tie(call.out_height, call.out_width) = out_size;
  std::tie(call.window[0], call.window[1]) = window, std::tie(call.stride[0], call.stride[1]) = stride;
  std::tie(call.padding[0], call.padding[1]) = padding, std::tie(call.dilation[0], call.dilation[1]) = dilation;
  nb::gil_scoped_release release;
  dual_conv_cpu(call, threads);
}

// (address, elements from one row to the next, rows of x that share one)
using ModulationArgument = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

Modulation modulation_of(const ModulationArgument& argument) {
  return {address(std::get<0>(argument)), std::get<1>(argument), std::max<std::int64_t>(std::get<2>(argument), 1)};
}

void dual_row_norm_entry(std::int64_t x, std::int64_t out, int dtype, std::int64_t planes, std::int64_t rows,
                         std::int64_t size, double eps, bool centered, std::int64_t weight, std::int64_t bias,
                         ModulationArgument multiplier, ModulationArgument addend, int threads) {
  DualNormCall call;
  call.x = address(x), call.out = writable(out), call.dtype = data_type(dtype);
  call.planes = planes, call.rows = rows, call.size = size;
  call.eps = eps, call.centered = centered, call.weight = address(weight), call.bias = address(bias);
  call.multiplier = modulation_of(multiplier), call.addend = modulation_of(addend);
  nb::gil_scoped_release release;
  dual_norm_cpu(call, threads);
}

void dual_group_norm_entry(std::int64_t x, std::int64_t out, int dtype, std::int64_t planes, std::int64_t samples,
                           std::int64_t channels, std::int64_t groups, std::int64_t spatial, double eps,
                           std::int64_t weight, std::int64_t bias, bool silu, int threads) {
  if (groups < 1 || channels % groups) throw std::invalid_argument("groups must divide channels");
  DualNormCall call;
  call.x = address(x), call.out = writable(out), call.dtype = data_type(dtype);
  call.planes = planes, call.rows = samples * groups, call.size = channels / groups * spatial;
  call.eps = eps, call.weight = address(weight), call.bias = address(bias);
  call.groups = groups, call.spatial = spatial, call.silu = silu;
  nb::gil_scoped_release release;
  dual_norm_cpu(call, threads);
}

std::vector<std::int64_t> integers(nb::handle tuple) {
  std::vector<std::int64_t> values;
  for (nb::handle item : nb::borrow<nb::tuple>(tuple)) values.push_back(integer(item));
  return values;
}

// (address, is it dual, shape, strides) -> an input whose strides are those of the result's dimensions.
ChainInput chain_input(nb::tuple item, std::size_t rank) {
  ChainInput input;
  input.data = address(integer(item[0]));
  input.dual = nb::cast<bool>(item[1]);
  const std::vector<std::int64_t> shape = integers(item[2]), strides = integers(item[3]);
  const std::size_t first = input.dual ? 1 : 0, own = shape.size() - first;
  if (shape.size() < first || own > rank) throw std::invalid_argument("an input has more dimensions than the result");
  if (input.dual) input.tangent_stride = strides[0];
  input.strides.assign(rank, 0);
  for (std::size_t i = 0; i < own; ++i) input.strides[rank - own + i] = shape[first + i] == 1 ? 0 : strides[first + i];
  return input;
}

// (operation, left, right, constant)
ChainStep chain_step(nb::tuple item) {
  return {nb::cast<int>(item[0]), nb::cast<std::size_t>(item[1]), nb::cast<std::size_t>(item[2]),
          nb::cast<double>(item[3])};
}

void dual_chain_entry(nb::tuple code, int dtype, nb::tuple inputs, std::int64_t out, nb::tuple shape, int threads) {
  ChainCall call;
  call.out = writable(out), call.dtype = data_type(dtype);
  call.sizes = integers(shape);
  call.tangents = call.sizes.at(0) - 1;
  call.sizes.erase(call.sizes.begin());
  for (nb::handle item : inputs) call.inputs.push_back(chain_input(nb::borrow<nb::tuple>(item), call.sizes.size()));
  for (nb::handle item : code) call.steps.push_back(chain_step(nb::borrow<nb::tuple>(item)));
  nb::gil_scoped_release release;
  dual_chain_cpu(std::move(call), threads);
}

// -- What tests, benchmarks and the cache of traces ask ---------------------------------------------------------------

// Do these dictionaries and lists hold the very objects that they held when the snapshots (tuples) were taken?
// A network of a thousand modules is asked at every call of fd.jvp; in Python that would cost as much as a layer.
bool holds(PyObject* container, PyObject* snapshot) {
  const Py_ssize_t size = PyTuple_Size(snapshot);
  if (PyDict_Check(container)) {
    if (PyDict_Size(container) != size) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = 0, number = 0;
    while (number < size && PyDict_Next(container, &position, &key, &value))
      if (PyTuple_GetItem(snapshot, number++) != value) return false;
    return true;
  }
  if (!PyList_Check(container) || PyList_Size(container) != size) return false;
  for (Py_ssize_t number = 0; number < size; ++number)
    if (PyTuple_GetItem(snapshot, number) != PyList_GetItem(container, number)) return false;
  return true;
}

bool unchanged(nb::list containers, nb::list snapshots) {
  const Py_ssize_t count = PyList_Size(containers.ptr());
  if (count != PyList_Size(snapshots.ptr())) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {  // borrowed references: nothing here runs Python code
    PyObject *container = PyList_GetItem(containers.ptr(), i), *snapshot = PyList_GetItem(snapshots.ptr(), i);
    if (!PyTuple_Check(snapshot) || !holds(container, snapshot)) return false;
  }
  return true;
}

// The rule table as this library has it, for the test that holds it against fastdensity/rules.py.
nb::tuple rule_coefficients(int type, double alpha, double sigma, double alpha_next, double sigma_next,
                            double sigma_data) {
  if (type < 0 || type > 6) throw std::invalid_argument("unknown prediction type");
  const PredictionType kind = static_cast<PredictionType>(type);
  const double norm = edm_norm(alpha, sigma, sigma_data);
  double along_x = 0, along_p = 0, scale = 0, out_x = 0, out_p = 0, out_direction = 0;
  direction(kind, alpha, sigma, sigma_data, norm, &along_x, &along_p, &scale);
  step_base(kind, alpha, sigma, alpha_next, sigma_next, sigma_data, norm, &out_x, &out_p, &out_direction);
  return nb::make_tuple(along_x, along_p, scale, out_x, out_p, out_direction);
}

nb::tuple philox_words(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t seed) {
  std::uint32_t word[4] = {c0, c1, c2, c3};
  philox(word, seed);
  return nb::make_tuple(word[0], word[1], word[2], word[3]);
}

// out = a + s b + t c over `count` floats on `threads` threads: the memory floor of a step with three operands.
void triad(std::int64_t a, std::int64_t b, std::int64_t c, double s, double t, std::int64_t count, std::int64_t out,
           bool streaming, int threads) {
  nb::gil_scoped_release release;
  const std::int64_t part = (count / threads + 15) / 16 * 16;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int i = 0; i < threads; ++i) {
    const std::int64_t begin = i * part, end = std::min(count, begin + part);
    if (begin < end)
      simd::triad(static_cast<const float*>(address(a)) + begin, static_cast<const float*>(address(b)) + begin,
                  static_cast<const float*>(address(c)) + begin, static_cast<float>(s), static_cast<float>(t),
                  end - begin, static_cast<float*>(writable(out)) + begin, streaming);
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Compiled kernels of fastdensity. Called through fastdensity.ops, which checks every argument first.";
#ifdef FASTDENSITY_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("rows_cuda_scratch", &rows_cuda_scratch_entry);
  m.def("rows_cuda", &rows_cuda_entry);
  m.def("probe_cuda_scratch", &probe_cuda_scratch_entry);
  m.def("make_probes_cuda", &make_probes_cuda_entry);
  m.def("probe_forms_cuda", &probe_forms_cuda_entry);
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("build") = FASTDENSITY_BUILD;
  m.def("rows_cpu", &rows_cpu_entry, nb::arg("rule"), nb::arg("type"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("contiguous"), nb::arg("v0").none(), nb::arg("v1").none(), nb::arg("uncond").none(),
        nb::arg("v2").none(), nb::arg("out"), nb::arg("parameters"), nb::arg("report").none(), nb::arg("seed"),
        nb::arg("sample_ids").none(), nb::arg("step"), nb::arg("threads"));
  m.def("track_cpu", &track_cpu_entry, nb::arg("call"), nb::arg("operands"), nb::arg("parameters"), nb::arg("memory"),
        nb::arg("results"), nb::arg("out").none(), nb::arg("step_report").none(), nb::arg("seed"),
        nb::arg("sample_ids").none(), nb::arg("step"), nb::arg("threads"));
  m.def("make_probes_cpu", &make_probes_entry);
  m.def("probe_forms_cpu", &probe_forms_entry);
  m.def("dual_softmax_cpu", &dual_softmax_entry);
  m.def("dual_attention_cpu", &dual_attention_entry);
  m.def("dual_narrow_attention_cpu", &dual_narrow_attention_entry);
  m.def("dual_conv_cpu", &dual_conv_entry);
  m.def("dual_row_norm_cpu", &dual_row_norm_entry);
  m.def("dual_group_norm_cpu", &dual_group_norm_entry);
  m.def("dual_chain_cpu", &dual_chain_entry);
  m.def("unchanged", &unchanged);
  m.def("set_dtypes", &set_dtypes);
  m.def("rule_coefficients", &rule_coefficients);
  m.def("philox_words", &philox_words);
  m.def("triad", &triad);
}
