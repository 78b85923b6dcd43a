"""The compiled extension. Called through `fastdensity.ops`, which checks every argument first."""

from typing import Any

from torch import Tensor, dtype

has_cuda: bool
build: str

def set_dtypes(dtypes: tuple[dtype, dtype, dtype, dtype], /) -> None: ...
def rows_cpu(
    rule: int,
    type: int,
    rows: int,
    columns: int,
    contiguous: bool,
    v0: Tensor | None,
    v1: Tensor | None,
    uncond: Tensor | None,
    v2: Tensor | None,
    out: Tensor,
    parameters: tuple[float | Tensor, ...],
    report: Tensor | None,
    seed: int,
    sample_ids: Tensor | None,
    step: int,
    threads: int,
) -> None: ...
def track_cpu(
    call: tuple[int, int, int, int, bool],
    operands: tuple[Tensor | None, ...],
    parameters: tuple[float | Tensor, ...],
    memory: Tensor,
    eps: Tensor,
    report: Tensor,
    memory_out: Tensor,
    threads: int,
    /,
) -> None: ...
def make_probes_cpu(call: tuple[int, ...], out: int, dtype: int, threads: int, /) -> None: ...
def probe_forms_cpu(call: tuple[int, ...], products: int, out: int, dtype: int, threads: int, /) -> None: ...
def dual_conv_cpu(
    x: int,
    weight: int,
    bias: int,
    out: int,
    dtype: int,
    images: int,
    biased: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    threads: int,
    /,
) -> None: ...
def dual_softmax_cpu(x: int, out: int, dtype: int, tangents: int, rows: int, columns: int, threads: int, /) -> None: ...
def dual_attention_cpu(
    scores: int,
    dtype: int,
    tangents: int,
    rows: int,
    columns: int,
    first_row: int,
    heads: int,
    length: int,
    causal: bool,
    mask: tuple[int, bool, int, int, int, int],
    threads: int,
    /,
) -> None: ...
def dual_narrow_attention_cpu(
    query: tuple[int, bool, int, int, int, int],
    key: tuple[int, bool, int, int, int, int],
    value: tuple[int, bool, int, int, int, int],
    out: int,
    dtype: int,
    tangents: int,
    batch: int,
    heads: int,
    key_heads: int,
    length: int,
    keys: int,
    width: int,
    value_width: int,
    scale: float,
    threads: int,
    /,
) -> None: ...
def dual_row_norm_cpu(
    x: int,
    out: int,
    dtype: int,
    planes: int,
    rows: int,
    size: int,
    eps: float,
    centered: bool,
    weight: int,
    bias: int,
    multiplier: tuple[int, int, int],
    addend: tuple[int, int, int],
    threads: int,
    /,
) -> None: ...
def dual_group_norm_cpu(
    x: int,
    out: int,
    dtype: int,
    planes: int,
    samples: int,
    channels: int,
    groups: int,
    spatial: int,
    eps: float,
    weight: int,
    bias: int,
    silu: bool,
    threads: int,
    /,
) -> None: ...
def dual_chain_cpu(
    code: tuple[tuple[int, int, int, float], ...],
    dtype: int,
    inputs: tuple[tuple[int, bool, tuple[int, ...], tuple[int, ...]], ...],
    out: int,
    shape: tuple[int, ...],
    threads: int,
    /,
) -> None: ...
def unchanged(containers: list[Any], snapshots: list[tuple[Any, ...]], /) -> bool: ...
def rule_coefficients(
    type: int, alpha: float, sigma: float, alpha_next: float, sigma_next: float, sigma_data: float, /
) -> tuple[float, float, float, float, float, float]: ...
def philox_words(c0: int, c1: int, c2: int, c3: int, seed: int, /) -> tuple[int, int, int, int]: ...
def triad(
    a: int, b: int, c: int, s: float, t: float, count: int, out: int, streaming: bool, threads: int, /
) -> None: ...

# Only where has_cuda.
def rows_cuda_scratch(
    rule: int,
    type: int,
    rows: int,
    columns: int,
    contiguous: bool,
    v0: Tensor | None,
    v1: Tensor | None,
    uncond: Tensor | None,
    v2: Tensor | None,
    out: Tensor,
    parameters: tuple[float | Tensor, ...],
    report: Tensor | None,
    seed: int,
    sample_ids: Tensor | None,
    step: int,
    /,
) -> int: ...
def rows_cuda(
    rule: int,
    type: int,
    rows: int,
    columns: int,
    contiguous: bool,
    v0: Tensor | None,
    v1: Tensor | None,
    uncond: Tensor | None,
    v2: Tensor | None,
    out: Tensor,
    parameters: tuple[float | Tensor, ...],
    report: Tensor | None,
    seed: int,
    sample_ids: Tensor | None,
    step: int,
    scratch: int,
    stream: int,
    /,
) -> None: ...
def probe_cuda_scratch(call: tuple[int, ...], dtype: int, /) -> int: ...
def make_probes_cuda(call: tuple[int, ...], out: int, dtype: int, scratch: int, stream: int, /) -> None: ...
def probe_forms_cuda(
    call: tuple[int, ...], products: int, out: int, dtype: int, scratch: int, stream: int, /
) -> None: ...
