"""Flash attention with tangents: one program per block of queries of one head and group of one or two tangents.

P = softmax(c Q K^T + mask), tS = c (tQ K^T + Q tK^T), h = P tS, r = rowsum(h):  tO = P tV + h V - r O.

One pass over the keys keeps the running maximum m, the sums l and r and the accumulators P V and P tV + h V of
unnormalised P, which rescale together when m grows; the shift of the tangents' mean by m cancels. Scores are in units
of log 2. P and h are rounded to the dtype of the matrix products, and l and r sum the rounded ones: an offset common to
all values then moves O by just that much, and tO not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _block(
    pointer, first, limit, stride, VECTOR: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows `first` .. of a matrix of WIDTH columns as a tile (ROWS, COLUMNS), zero where there is nothing."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    address = pointer + tl.cast(first, tl.int64) * stride * VECTOR + (row * stride * VECTOR + column)
    if EVEN and WIDTH == COLUMNS:
        tile = tl.load(address)
    elif EVEN:
        tile = tl.load(address, mask=column < WIDTH, other=0.0)
    elif WIDTH == COLUMNS:
        tile = tl.load(address, mask=row < limit - first, other=0.0)
    else:
        tile = tl.load(address, mask=(row < limit - first) & (column < WIDTH), other=0.0)
    return tile.to(DTYPE)


@triton.jit
def _masked(
    scores, mask, mask_row, mask_column, first_query, first_key, length, keys,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores with the mask added, -inf where a query may not attend or there is no key."""
    row = tl.arange(0, QUERIES)[:, None]
    column = tl.arange(0, KEYS)[None, :]
    if MASK != "none":
        corner = mask + (tl.cast(first_query, tl.int64) * mask_row + tl.cast(first_key, tl.int64) * mask_column)
        address = corner + (row * mask_row + column * mask_column)
        inside = (row < length - first_query) & (column < keys - first_key)
        if MASK == "bool":
            scores = tl.where(tl.load(address, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            scores += tl.load(address, mask=inside, other=0.0).to(ACC) * tl.full([], LOG2_E, ACC)
    if not EVEN:
        scores = tl.where(column < keys - first_key, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(column - row <= first_query - first_key, scores, float("-inf"))
    return scores


@triton.jit
def _dot(a, b, acc, ACC: tl.constexpr):
    """acc + a b; in float32 every product is one, not one of TensorFloat-32."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _at_hand(
    pointer, first, limit, stride, VECTOR: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The tile of `_block` for `_products`, or nothing worth mentioning where that reads memory itself."""
    if SLICE == COLUMNS:
        return _block(pointer, first, limit, stride, VECTOR, DTYPE, WIDTH, COLUMNS, ROWS, EVEN)
    else:
        return tl.zeros([1, 1], DTYPE)


@triton.jit
def _products(
    a, b, a_pointer, b_pointer, a_first, b_first, a_limit, b_limit, a_row, b_row, acc, VECTOR: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
):  # fmt: skip
    """acc + A B^T, of tiles at hand or, where SLICE < COLUMNS, from memory SLICE columns at a time.

    Without tensor cores a thread holds whole rows of both operands; slices keep that within its registers.
    """
    if SLICE == COLUMNS:
        acc = _dot(a, tl.trans(b), acc, ACC)
    else:
        a_offset = (tl.cast(a_first, tl.int64) * a_row + tl.arange(0, A_ROWS)[:, None] * a_row) * VECTOR
        b_offset = (tl.cast(b_first, tl.int64) * b_row + tl.arange(0, B_ROWS)[:, None] * b_row) * VECTOR
        a_inside = tl.arange(0, A_ROWS)[:, None] < a_limit - a_first
        b_inside = tl.arange(0, B_ROWS)[:, None] < b_limit - b_first
        for first in range(0, WIDTH, SLICE):
            column = first + tl.arange(0, SLICE)[None, :]
            left = tl.load(a_pointer + (a_offset + column), mask=a_inside & (column < WIDTH), other=0.0)
            right = tl.load(b_pointer + (b_offset + column), mask=b_inside & (column < WIDTH), other=0.0)
            acc = _dot(left.to(OPERAND), tl.trans(right.to(OPERAND)), acc, ACC)
    return acc


@triton.jit
def _advance(
    acc, moment, p, p_narrow, rescale, score_scale, q, tq, k, v, query, tangent_query, key, tangent_key, tangent_value,
    first_query, first_key, length, keys, q_row, k_row, v_row,
    Q_DUAL: tl.constexpr, K_DUAL: tl.constexpr, V_DUAL: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr, V_WIDTH: tl.constexpr,
    V_COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tangent's accumulator P tV + h V and moment r, carried on over a block of keys."""
    acc = acc * rescale[:, None]
    if Q_DUAL or K_DUAL:
        ts = tl.zeros([QUERIES, KEYS], ACC)
        if Q_DUAL:
            ts = _products(
                tq, k, tangent_query, key, first_query, first_key, length, keys, q_row, k_row, ts, VECTOR, OPERAND,
                ACC, WIDTH, COLUMNS, SLICE, QUERIES, KEYS,
            )  # fmt: skip
        if K_DUAL:
            tk = _at_hand(tangent_key, first_key, keys, k_row, VECTOR, OPERAND, WIDTH, COLUMNS, SLICE, KEYS, EVEN)
            ts = _products(
                q, tk, query, tangent_key, first_query, first_key, length, keys, q_row, k_row, ts, VECTOR, OPERAND,
                ACC, WIDTH, COLUMNS, SLICE, QUERIES, KEYS,
            )  # fmt: skip
        h = (p * (ts * score_scale)).to(OPERAND)
        moment = moment * rescale + tl.sum(h.to(ACC), 1)
        acc = _dot(h, v, acc, ACC)
    if V_DUAL:
        tv = _block(tangent_value, first_key, keys, v_row, VECTOR, OPERAND, V_WIDTH, V_COLUMNS, KEYS, EVEN)
        acc = _dot(p_narrow, tv, acc, ACC)
    return acc, moment


@triton.jit
def _write(
    out, value, first, length, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    address = out + tl.cast(first, tl.int64) * WIDTH + (row * WIDTH + column)
    tl.store(address, value.to(out.dtype.element_ty), mask=(row < length - first) & (column < WIDTH))


@triton.jit
def attend(
    out, query, key, value, mask, scale: tl.float64, length, keys, heads, repeats, tangents, groups, out_plane,
    q_plane, q_batch, q_head, q_row, k_plane, k_batch, k_head, k_row, v_plane, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column,
    Q_DUAL: tl.constexpr, K_DUAL: tl.constexpr, V_DUAL: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, EVEN_KEYS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr, V_WIDTH: tl.constexpr, V_COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes out[0] (group 0 only) and the GROUP tangents of its group, for QUERIES queries of one head.

    `repeats` heads share a key head. Strides of query, key and value count groups of VECTOR elements, so that the
    compiler knows what they are divisible by and loads that many at once; those of the mask count elements. Where the
    number of tangents is odd, the last group of two computes the last one twice and writes the same twice.
    """
    blocks = tl.cdiv(length, QUERIES)
    first_query = (tl.program_id(0) % blocks) * QUERIES
    group = (tl.program_id(0) // blocks) % groups
    row_of_heads = (tl.program_id(0) // blocks // groups).to(tl.int64)
    batch, head = row_of_heads // heads, row_of_heads % heads
    key_head = head // repeats
    query += (batch * q_batch + head * q_head) * VECTOR
    key += (batch * k_batch + key_head * k_head) * VECTOR
    value += (batch * v_batch + key_head * v_head) * VECTOR
    if MASK != "none":
        mask += batch * mask_batch + head * mask_head
    out += row_of_heads * length * V_WIDTH
    plane_0 = (1 + group * GROUP).to(tl.int64)
    plane_1 = tl.minimum(plane_0 + 1, tangents).to(tl.int64)

    natural_scale = tl.full([], scale, ACC)
    base_2_scale = tl.full([], scale * LOG2_E, ACC)
    tangent_query_0 = query + plane_0 * q_plane * VECTOR
    tangent_query_1 = query + plane_1 * q_plane * VECTOR
    q = _at_hand(query, first_query, length, q_row, VECTOR, OPERAND, WIDTH, COLUMNS, SLICE, QUERIES, False)
    tq_0 = q
    tq_1 = q
    if Q_DUAL:
        tq_0 = _at_hand(
            tangent_query_0, first_query, length, q_row, VECTOR, OPERAND, WIDTH, COLUMNS, SLICE, QUERIES, False
        )
        if GROUP == 2:
            tq_1 = _at_hand(
                tangent_query_1, first_query, length, q_row, VECTOR, OPERAND, WIDTH, COLUMNS, SLICE, QUERIES, False
            )
    largest = tl.full([QUERIES], float("-inf"), ACC)
    total = tl.zeros([QUERIES], ACC)
    moment_0 = tl.zeros([QUERIES], ACC)
    moment_1 = tl.zeros([QUERIES], ACC)
    acc = tl.zeros([QUERIES, V_COLUMNS], ACC)
    acc_0 = tl.zeros([QUERIES, V_COLUMNS], ACC)
    acc_1 = tl.zeros([QUERIES, V_COLUMNS], ACC)

    reach = keys
    if CAUSAL:
        reach = tl.minimum(keys, first_query + QUERIES)
    for first_key in range(0, reach, KEYS):
        k = _at_hand(key, first_key, keys, k_row, VECTOR, OPERAND, WIDTH, COLUMNS, SLICE, KEYS, EVEN_KEYS)
        scores = _products(
            q, k, query, key, first_query, first_key, length, keys, q_row, k_row, tl.zeros([QUERIES, KEYS], ACC),
            VECTOR, OPERAND, ACC, WIDTH, COLUMNS, SLICE, QUERIES, KEYS,
        )  # fmt: skip
        scores = scores * base_2_scale
        scores = _masked(
            scores, mask, mask_row, mask_column, first_query, first_key, length, keys, MASK, CAUSAL, EVEN_KEYS, ACC,
            QUERIES, KEYS,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing attended to yet: no inf - inf
        rescale = tl.exp2(largest - shift)
        largest = new_largest
        p = tl.exp2(scores - shift[:, None])
        p_narrow = p.to(OPERAND)
        total = total * rescale + tl.sum(p_narrow.to(ACC), 1)
        v = _block(value, first_key, keys, v_row, VECTOR, OPERAND, V_WIDTH, V_COLUMNS, KEYS, EVEN_KEYS)
        acc = _dot(p_narrow, v, acc * rescale[:, None], ACC)
        acc_0, moment_0 = _advance(
            acc_0, moment_0, p, p_narrow, rescale, natural_scale, q, tq_0, k, v, query, tangent_query_0, key,
            key + plane_0 * k_plane * VECTOR, value + plane_0 * v_plane * VECTOR, first_query, first_key,
            length, keys, q_row, k_row, v_row, Q_DUAL, K_DUAL, V_DUAL, VECTOR, OPERAND, ACC, WIDTH, COLUMNS,
            SLICE, V_WIDTH, V_COLUMNS, QUERIES, KEYS, EVEN_KEYS,
        )  # fmt: skip
        if GROUP == 2:
            acc_1, moment_1 = _advance(
                acc_1, moment_1, p, p_narrow, rescale, natural_scale, q, tq_1, k, v, query, tangent_query_1, key,
                key + plane_1 * k_plane * VECTOR, value + plane_1 * v_plane * VECTOR, first_query, first_key,
                length, keys, q_row, k_row, v_row, Q_DUAL, K_DUAL, V_DUAL, VECTOR, OPERAND, ACC, WIDTH, COLUMNS,
                SLICE, V_WIDTH, V_COLUMNS, QUERIES, KEYS, EVEN_KEYS,
            )  # fmt: skip

    # a query that may attend to nothing has sums of zero, and zeros for a result
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    acc = acc * inverse[:, None]
    if group == 0:
        _write(out, acc, first_query, length, V_WIDTH, V_COLUMNS, QUERIES)
    acc_0 = acc_0 * inverse[:, None] - (moment_0 * inverse)[:, None] * acc
    _write(out + plane_0 * out_plane, acc_0, first_query, length, V_WIDTH, V_COLUMNS, QUERIES)
    if GROUP == 2:
        acc_1 = acc_1 * inverse[:, None] - (moment_1 * inverse)[:, None] * acc
        _write(out + plane_1 * out_plane, acc_1, first_query, length, V_WIDTH, V_COLUMNS, QUERIES)
