"""Attention over so few keys that a program holds them all: cross-attention, and small images.

Keys and values are loaded once and a program goes over tiles of queries: no running softmax, and in
the backward no scores made twice. In the forward keys, as a head's columns, come in one or two
parts: 77 are 64 and 16. What keys and values get from the queries of one program is a partial sum;
where there are several programs a head, `sum_kernel` adds those up in order, so that the bits are
the same on every run. Scores are kept in base 2, as in attention_kernels.py.
Source: Dao 2023 (arXiv:2307.08691), with one block of keys.
"""

# As in attention_kernels.py.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from .attention_kernels import (
    NUMBERS,
    add_products,
    load_row,
    load_tile,
    of_head,
    products,
    row_products,
    store_row,
    store_tile,
    times,
    zeros,
)

SHORT_NUMBERS = (*NUMBERS, "programs", "grad_k_program")


@triton.jit(do_not_specialize=SHORT_NUMBERS)
def forward_kernel(
    q, k, v, out, log_sum_exp,
    queries, keys, heads, programs, q_sample, q_row, k_sample, k_row, scale,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MORE_KEYS: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    program, head, sample = _place(programs, heads)
    q = of_head(q, sample, head, q_sample, D)
    k = of_head(k, sample, head, k_sample, D)
    v = of_head(v, sample, head, k_sample, D)
    out = of_head(out, sample, head, queries * heads * D // 8, D)
    log_sum_exp += (sample.to(tl.int64) * heads + head) * queries
    k_tiles = _load_all(k, k_row, keys, D, WIDE, NARROW, KEYS, MORE_KEYS, EVEN_K)
    v_tiles = _load_all(v, k_row, keys, D, WIDE, NARROW, KEYS, MORE_KEYS, EVEN_K)
    for first in range(program * QUERIES, queries, programs * QUERIES):
        q_tile = load_tile(q, first, q_row, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
        largest = tl.full((QUERIES,), float("-inf"), tl.float32)
        scores = ()
        for part in tl.static_range(len(k_tiles)):
            some = products(q_tile, k_tiles[part])
            if not EVEN_K:
                at = part * KEYS + tl.arange(0, some.shape[1])
                some = tl.where((at < keys)[None, :], some, float("-inf"))
            largest = tl.maximum(largest, tl.max(some, 1))
            scores = scores + (some,)
        largest *= scale
        total = tl.zeros((QUERIES,), tl.float32)
        sums = zeros(QUERIES, WIDE, NARROW)
        for part in tl.static_range(len(k_tiles)):
            shares = tl.exp2(scores[part] * scale - largest[:, None])
            total += tl.sum(shares, 1)
            sums = add_products(shares.to(v.dtype.element_ty), v_tiles[part], sums)
        store_row(log_sum_exp, first, queries, largest + tl.log2(total), QUERIES, EVEN_Q)
        sums = times(sums, 1.0 / total[:, None])
        store_tile(out, first, heads * D // 8, queries, sums, D, WIDE, NARROW, QUERIES, EVEN_Q)


@triton.jit(do_not_specialize=SHORT_NUMBERS)
def backward_kernel(
    q, k, v, out, log_sum_exp, grad_out, grad_q, grad_k, grad_v,
    queries, keys, heads, programs, q_sample, q_row, k_sample, k_row,
    grad_q_sample, grad_q_row, grad_k_program, grad_k_sample, grad_k_row, scale, slope,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """All gradients; those of keys and values are of this program's queries, for `sum_kernel`.

    Scores are transposed, [keys, queries]. slope is the scale of the softmax itself. Rows beyond
    the last query are zeros in q and grad_out, and add nothing.
    """
    program, head, sample = _place(programs, heads)
    q = of_head(q, sample, head, q_sample, D)
    k = of_head(k, sample, head, k_sample, D)
    v = of_head(v, sample, head, k_sample, D)
    out = of_head(out, sample, head, queries * heads * D // 8, D)
    grad_out = of_head(grad_out, sample, head, queries * heads * D // 8, D)
    grad_q = of_head(grad_q, sample, head, grad_q_sample, D)
    log_sum_exp += (sample.to(tl.int64) * heads + head) * queries
    k_tile = load_tile(k, 0, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
    v_tile = load_tile(v, 0, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
    k_sums = zeros(KEYS, WIDE, NARROW)
    v_sums = zeros(KEYS, WIDE, NARROW)
    for first in range(program * QUERIES, queries, programs * QUERIES):
        q_tile = load_tile(q, first, q_row, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
        grad_tile = load_tile(
            grad_out, first, heads * D // 8, queries, D, WIDE, NARROW, QUERIES, EVEN_Q
        )
        out_tile = load_tile(out, first, heads * D // 8, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
        along = row_products(out_tile, grad_tile)
        log_sum = load_row(log_sum_exp, first, queries, QUERIES, EVEN_Q)
        shares = tl.exp2(products(k_tile, q_tile) * scale - log_sum[None, :])
        if not EVEN_K:
            shares = tl.where((tl.arange(0, KEYS) < keys)[:, None], shares, 0.0)
        v_sums = add_products(shares.to(q.dtype.element_ty), grad_tile, v_sums)
        grads = shares * (products(v_tile, grad_tile) - along[None, :])
        grads = grads.to(q.dtype.element_ty)
        k_sums = add_products(grads, q_tile, k_sums)
        q_sums = add_products(tl.trans(grads), k_tile, zeros(QUERIES, WIDE, NARROW))
        q_sums = times(q_sums, slope)
        store_tile(grad_q, first, grad_q_row, queries, q_sums, D, WIDE, NARROW, QUERIES, EVEN_Q)
    apart = program.to(tl.int64) * grad_k_program * 8
    grad_k = of_head(grad_k + apart, sample, head, grad_k_sample, D)
    grad_v = of_head(grad_v + apart, sample, head, grad_k_sample, D)
    k_sums = times(k_sums, slope)
    store_tile(grad_k, 0, grad_k_row, keys, k_sums, D, WIDE, NARROW, KEYS, EVEN_K)
    store_tile(grad_v, 0, grad_k_row, keys, v_sums, D, WIDE, NARROW, KEYS, EVEN_K)


@triton.jit(
    do_not_specialize=("programs", "rows", "columns", "keys", "sample_stride", "row_stride")
)
def sum_kernel(
    partials, grad_k, grad_v,
    programs, rows, columns, keys, sample_stride, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up partials, [programs, 2, rows, columns x 8], into grad_k and grad_v.

    A row is a sample's key, keys are those of one sample.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns * 8)[None, :]
    at = partials + row.to(tl.int64)[:, None] * (columns * 8) + column[None, :]
    to_v = rows.to(tl.int64) * columns * 8
    k_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    v_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(programs):
        k_sum += tl.load(at, mask=mask, other=0.0)
        v_sum += tl.load(at + to_v, mask=mask, other=0.0)
        at += 2 * to_v
    sample = (row // keys).to(tl.int64) * sample_stride * 8
    to = sample + (row % keys) * (row_stride * 8)
    to = to[:, None] + column[None, :]
    tl.store(grad_k + to, k_sum.to(grad_k.dtype.element_ty), mask=mask)
    tl.store(grad_v + to, v_sum.to(grad_v.dtype.element_ty), mask=mask)


@triton.jit
def _place(programs, heads):
    """A program's number among those of its head, its head and its sample."""
    of_all = tl.program_id(0) // programs
    return tl.program_id(0) % programs, of_all % heads, of_all // heads


@triton.jit
def _load_all(
    head, stride, rows,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, MORE_ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All rows, in one or two tiles."""
    tile = load_tile(head, 0, stride, rows, D, WIDE, NARROW, ROWS, EVEN)
    if MORE_ROWS == 0:
        return (tile,)
    else:
        return (tile, load_tile(head, ROWS, stride, rows, D, WIDE, NARROW, MORE_ROWS, EVEN))
