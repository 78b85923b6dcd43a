"""What fd.jvp refuses, and that it says what came, what was wanted, and where."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import fastdensity as fd

HERE = r".*test_jvp_errors\.py:\d+"


@pytest.fixture
def x():
    return torch.randn(4, 6)


@pytest.fixture
def vectors():
    return torch.randn(2, 4, 6)


def identity(x):
    return x


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 5), (2, 4, 6, 1), (2, 1, 6)])
def test_vectors_of_another_shape(x, shape):
    with pytest.raises(ValueError, match=r"vectors must have shape \(K, 4, 6\).*got a float32 tensor of shape"):
        fd.jvp(identity, (x,), torch.randn(shape))


def test_no_vectors(x, vectors):
    with pytest.raises(ValueError, match="K must be at least 1, got 0"):
        fd.jvp(identity, (x,), vectors[:0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_vectors_of_another_dtype(x, vectors, dtype):
    with pytest.raises(TypeError, match=r"vectors must have the dtype of the first primal, torch.float32"):
        fd.jvp(identity, (x,), vectors.to(dtype))


def test_vectors_on_another_device(x, vectors):
    with pytest.raises(ValueError, match="vectors must be on cpu"):
        fd.jvp(identity, (x,), vectors.to("meta"))


@pytest.mark.parametrize("vectors", [None, [1.0], 3])
def test_vectors_that_are_no_tensor(x, vectors):
    with pytest.raises(TypeError, match="vectors must be a tensor"):
        fd.jvp(identity, (x,), vectors)


@pytest.mark.parametrize("primals", [(), (None,), (3.0, 4.0), "x", {}])
def test_primals_that_are_none(vectors, primals):
    with pytest.raises(TypeError, match="primals must be"):
        fd.jvp(identity, primals, vectors)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_primals_that_have_no_tangent(x, vectors, dtype):
    with pytest.raises(TypeError, match=r"the first of primals must be float32, float64, bfloat16 or float16, got a"):
        fd.jvp(identity, (x.to(dtype),), vectors)


def test_sparse_primals(x, vectors):
    with pytest.raises(TypeError, match="dense"):
        fd.jvp(identity, (x.to_sparse(),), vectors)


def test_primals_without_numbers(x, vectors):
    with pytest.raises(TypeError, match=r"dense \(strided\) tensor with numbers, got layout torch.strided on meta"):
        fd.jvp(identity, (x.to("meta"),), vectors.to("meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(x, vectors, layout):
    nested = torch.nested.nested_tensor([x, x[:2]], layout=layout)
    with pytest.raises(TypeError, match=r"the first of primals must be a dense.*got a nested tensor"):
        fd.jvp(identity, (nested,), vectors)
    with pytest.raises(TypeError, match=r"vectors must be a dense .*of shape \(K, 4, 6\), got a nested tensor"):
        fd.jvp(identity, (x,), nested)


def test_sparse_vectors(x, vectors):
    with pytest.raises(TypeError, match=r"vectors must be a dense .*of shape \(K, 4, 6\), got layout torch.sparse_coo"):
        fd.jvp(identity, (x,), vectors.to_sparse())


def test_fn_that_cannot_be_called(x, vectors):
    with pytest.raises(TypeError, match="fn must be a module or a function, got int 3"):
        fd.jvp(3, (x,), vectors)


@pytest.mark.parametrize(
    ("fn", "came"), [(lambda x: (x, x), "tuple"), (lambda x: {"sample": x}, "dict"), (lambda x: None, "NoneType")]
)
def test_outputs_that_are_no_tensor(x, vectors, fn, came):
    with pytest.raises(ValueError, match=f"fn must return one tensor, got {came}; wrap it"):
        fd.jvp(fn, (x,), vectors)


def _branches(x):
    if x.sum() > 0:
        return x * 2
    return x


def _loops(x):
    while x.norm() > 1:
        x = x / 2
    return x


def _reads(x):
    return x * x.max().item()


@pytest.mark.parametrize(("fn", "line"), [(_branches, "if x.sum"), (_loops, "while x.norm")])
def test_control_flow_on_values(x, vectors, fn, line):
    with pytest.raises(ValueError, match=rf"depends on the values of tensors.*{HERE}.*{line}"):
        fd.jvp(fn, (x,), vectors)


def test_control_flow_in_a_module(x, vectors):
    class Branching(nn.Module):
        def forward(self, x):
            return x if bool((x > 0).all()) else -x

    with pytest.raises(ValueError, match=rf"depends on the values of tensors.*{HERE}.*return x if bool"):
        fd.jvp(Branching(), (x,), vectors)


def test_reading_a_value_into_python(x, vectors):
    with pytest.raises(ValueError, match=rf"Python number, which has no tangent, at {HERE}.*item"):
        fd.jvp(_reads, (x,), vectors)


def test_shapes_that_depend_on_values_are_fine(x, vectors):
    for sign in (1, -1):
        out, tangents = fd.jvp(lambda x: x[x > 0] ** 2, (sign * x,), vectors)
        wanted = torch.func.jvp(lambda x: x[x > 0] ** 2, (sign * x,), (vectors[1],))
        torch.testing.assert_close((out, tangents[1]), wanted)


def test_control_flow_on_shapes_and_plain_values_is_fine(x, vectors):
    flag = True

    def fn(x):
        return x * 2 if x.shape[-1] == 6 and flag else x

    assert torch.equal(fd.jvp(fn, (x,), vectors)[1], vectors * 2)


def _adds(x):
    x += 1
    return x


def _writes_a_view(x):
    x[:, 0] = 0
    return x


def _writes_through_a_view(x):
    x.view(-1)[2:4].mul_(2)
    return x


def _writes_by_out(x):
    return torch.sin(x, out=x)


@pytest.mark.parametrize("fn", [_adds, _writes_a_view, _writes_through_a_view, _writes_by_out])
def test_overwriting_the_input(x, vectors, fn):
    before = x.clone()
    with pytest.raises(ValueError, match=rf"writes into its input in place at {HERE}"):
        fd.jvp(fn, (x,), vectors)
    assert torch.equal(x, before)


def test_overwriting_a_tensor_from_outside(x, vectors):
    outside = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=rf"writes into a tensor that it closes over in place at {HERE}"):
        fd.jvp(lambda x: torch.sin(x, out=outside), (x,), vectors)


def test_memory_that_would_be_resized(x, vectors):
    with pytest.raises(ValueError, match=rf"aten.sin.out writes into `out` at {HERE}.*use what it returns"):
        fd.jvp(lambda x: torch.sin(x, out=torch.empty(0)), (x,), vectors)


def test_overwriting_memory_that_is_read_through_another_view(x, vectors):
    def fn(x):
        y = x * 2
        z = y.t()
        y.mul_(3)
        return z

    with pytest.raises(ValueError, match="overwrites memory that is read later through another view"):
        fd.jvp(fn, (x,), vectors)


def test_batch_norm_in_training_mode(vectors, x):
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        fd.jvp(nn.BatchNorm1d(6).train(), (x,), vectors)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        fd.jvp(lambda x: F.batch_norm(x, None, None, training=True), (x,), vectors)


@torch.library.custom_op("fastdensity_tests::double", mutates_args=())
def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@_double.register_fake
def _(x):
    return torch.empty_like(x)


def test_operators_of_others_are_refused_not_zero(x, vectors):
    """torch.func.jvp returns a zero tangent for this operator without a word."""
    with pytest.raises(NotImplementedError, match=rf"fastdensity_tests.double.*no forward-mode rule.*{HERE}"):
        fd.jvp(lambda x: _double(x), (x,), vectors)


def test_operators_of_torch_without_forward_mode_are_named(x, vectors):
    with pytest.raises(NotImplementedError, match=rf"_cdist_forward.*{HERE}|cdist.*{HERE}|{HERE}.*cdist"):
        fd.jvp(lambda x: torch.cdist(x, x.sin(), p=3.0), (x,), vectors)


def test_blocks_without_forward_mode_are_named(vectors):
    x = torch.randn(1, 2, 16, 8)
    with pytest.raises(NotImplementedError, match=rf"flex_attention has no forward-mode rule.*{HERE}"):
        fd.jvp(lambda x: flex_attention(x, x, x), (x,), x[None])


def test_operators_that_cannot_be_traced_are_named(x, vectors):
    with pytest.raises(NotImplementedError, match=rf"aten.binomial.default cannot be traced, at {HERE}"):
        fd.jvp(lambda x: torch.binomial(torch.ones(4, 6), x.sigmoid()), (x,), vectors)


def test_errors_of_fn_itself_come_through(x, vectors):
    with pytest.raises(RuntimeError, match=r"same reduction dim|shapes cannot be multiplied"):
        fd.jvp(lambda x: x @ torch.ones(3, 3), (x,), vectors)


def test_trace_and_explain_check_as_jvp_does(x):
    for call in (fd.trace_jvp, fd.explain):
        with pytest.raises(TypeError, match="primals must be"):
            call(identity, (None,))
        with pytest.raises(ValueError, match="fn must return one tensor"):
            call(lambda x: (x,), (x,))
        with pytest.raises(NotImplementedError, match=r"fn calls fd.jvp itself, or a transform of torch\.func"):
            call(lambda x: fd.jvp(identity, (x,), x[None])[1], (x,))
