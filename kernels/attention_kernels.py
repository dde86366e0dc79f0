"""Attention over keys that come in tiles: forward with a running softmax, backward in two kernels.

A head of a sample is [rows, D] with adjacent columns and any distance between its rows, so that
queries, keys and values may lie in one packed tensor. A tile of it is held in parts whose widths
are powers of two, as Triton asks: 40 columns are 32 and 16, of which 8 are empty.

No sum crosses programs: queries' gradients go over all keys, those of keys and values over all
queries, and each makes the scores again. So the bits are the same on every run.
Scores are kept in base 2: `scale` is log2(e) times the softmax's.
Source: Dao 2023 (arXiv:2307.08691), algorithms 1 and 2.
"""

# Pyright knows neither Triton's tuples nor its ranges, ruff not that Triton has no starred ones.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

# Strides are numbers of 8 elements, as what follows is then known to lie at 16 bytes; so nothing
# needs to be compiled anew for other sizes.
NUMBERS = (
    "queries", "keys", "heads", "q_sample", "q_row", "k_sample", "k_row",
    "grad_q_sample", "grad_q_row", "grad_k_sample", "grad_k_row",
)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q, k, v, out, log_sum_exp,
    queries, keys, heads, q_sample, q_row, k_sample, k_row, scale,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tile, head, sample = place(queries, heads, QUERIES)
    q = of_head(q, sample, head, q_sample, D)
    k = of_head(k, sample, head, k_sample, D)
    v = of_head(v, sample, head, k_sample, D)
    first = tile * QUERIES
    q_tile = load_tile(q, first, q_row, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = zeros(QUERIES, WIDE, NARROW)
    for key in range(0, keys, KEYS):
        k_tile = load_tile(k, key, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
        scores = products(q_tile, k_tile)
        if not EVEN_K:
            scores = tl.where((key + tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1) * scale)
        shares = tl.exp2(scores * scale - above[:, None])
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(shares, 1)
        v_tile = load_tile(v, key, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
        sums = add_products(shares.to(v.dtype.element_ty), v_tile, times(sums, shrink[:, None]))
        largest = above
    row = (sample.to(tl.int64) * heads + head) * queries
    store_row(log_sum_exp + row, first, queries, largest + tl.log2(total), QUERIES, EVEN_Q)
    out = of_head(out, sample, head, queries * heads * D // 8, D)
    sums = times(sums, 1.0 / total[:, None])
    store_tile(out, first, heads * D // 8, queries, sums, D, WIDE, NARROW, QUERIES, EVEN_Q)


@triton.jit(do_not_specialize=NUMBERS)
def backward_queries_kernel(
    q, k, v, out, log_sum_exp, grad_out, delta, grad_q,
    queries, keys, heads, q_sample, q_row, k_sample, k_row, grad_q_sample, grad_q_row, scale, slope,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, and delta, the sum of out * grad_out over each row.

    slope is the scale of the softmax itself.
    """
    tile, head, sample = place(queries, heads, QUERIES)
    q = of_head(q, sample, head, q_sample, D)
    k = of_head(k, sample, head, k_sample, D)
    v = of_head(v, sample, head, k_sample, D)
    out = of_head(out, sample, head, queries * heads * D // 8, D)
    grad_out = of_head(grad_out, sample, head, queries * heads * D // 8, D)
    grad_q = of_head(grad_q, sample, head, grad_q_sample, D)
    row = (sample.to(tl.int64) * heads + head) * queries
    first = tile * QUERIES
    q_tile = load_tile(q, first, q_row, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
    out_tile = load_tile(out, first, heads * D // 8, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
    grad_tile = load_tile(
        grad_out, first, heads * D // 8, queries, D, WIDE, NARROW, QUERIES, EVEN_Q
    )
    along = row_products(out_tile, grad_tile)
    store_row(delta + row, first, queries, along, QUERIES, EVEN_Q)
    log_sum = load_row(log_sum_exp + row, first, queries, QUERIES, EVEN_Q)
    sums = zeros(QUERIES, WIDE, NARROW)
    for key in range(0, keys, KEYS):
        k_tile = load_tile(k, key, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
        v_tile = load_tile(v, key, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
        shares = tl.exp2(products(q_tile, k_tile) * scale - log_sum[:, None])
        if not EVEN_K:
            shares = tl.where((key + tl.arange(0, KEYS) < keys)[None, :], shares, 0.0)
        grads = shares * (products(grad_tile, v_tile) - along[:, None])
        sums = add_products(grads.to(k.dtype.element_ty), k_tile, sums)
    sums = times(sums, slope)
    store_tile(grad_q, first, grad_q_row, queries, sums, D, WIDE, NARROW, QUERIES, EVEN_Q)


@triton.jit(do_not_specialize=NUMBERS)
def backward_keys_kernel(
    q, k, v, log_sum_exp, grad_out, delta, grad_k, grad_v,
    queries, keys, heads, q_sample, q_row, k_sample, k_row, grad_k_sample, grad_k_row, scale, slope,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values; scores are made transposed, [KEYS, QUERIES].

    Rows beyond the last query are zeros in q and grad_out, and add nothing.
    """
    tile, head, sample = place(keys, heads, KEYS)
    q = of_head(q, sample, head, q_sample, D)
    k = of_head(k, sample, head, k_sample, D)
    v = of_head(v, sample, head, k_sample, D)
    grad_out = of_head(grad_out, sample, head, queries * heads * D // 8, D)
    row = (sample.to(tl.int64) * heads + head) * queries
    first = tile * KEYS
    k_tile = load_tile(k, first, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
    v_tile = load_tile(v, first, k_row, keys, D, WIDE, NARROW, KEYS, EVEN_K)
    k_sums = zeros(KEYS, WIDE, NARROW)
    v_sums = zeros(KEYS, WIDE, NARROW)
    for query in range(0, queries, QUERIES):
        q_tile = load_tile(q, query, q_row, queries, D, WIDE, NARROW, QUERIES, EVEN_Q)
        log_sum = load_row(log_sum_exp + row, query, queries, QUERIES, EVEN_Q)
        shares = tl.exp2(products(k_tile, q_tile) * scale - log_sum[None, :])
        grad_tile = load_tile(
            grad_out, query, heads * D // 8, queries, D, WIDE, NARROW, QUERIES, EVEN_Q
        )
        v_sums = add_products(shares.to(q.dtype.element_ty), grad_tile, v_sums)
        along = load_row(delta + row, query, queries, QUERIES, EVEN_Q)
        grads = shares * (products(v_tile, grad_tile) - along[None, :])
        k_sums = add_products(grads.to(q.dtype.element_ty), q_tile, k_sums)
    grad_k = of_head(grad_k, sample, head, grad_k_sample, D)
    grad_v = of_head(grad_v, sample, head, grad_k_sample, D)
    k_sums = times(k_sums, slope)
    store_tile(grad_k, first, grad_k_row, keys, k_sums, D, WIDE, NARROW, KEYS, EVEN_K)
    store_tile(grad_v, first, grad_k_row, keys, v_sums, D, WIDE, NARROW, KEYS, EVEN_K)


@triton.jit
def place(rows, heads, ROWS: tl.constexpr):
    """Which tile of rows, head and sample a program has; tiles of one head are neighbours."""
    tiles = (rows + ROWS - 1) // ROWS
    tile = tl.program_id(0) % tiles
    of_all = tl.program_id(0) // tiles
    return tile, of_all % heads, of_all // heads


@triton.jit
def of_head(base, sample, head, stride, D: tl.constexpr):
    """Where a sample's head starts."""
    return base + sample.to(tl.int64) * stride * 8 + head * D


@triton.jit
def load_tile(
    head, first, stride, rows,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first` on, in one or two parts; zero beyond `rows` and beyond D."""
    wide = _load(head, first, stride, rows, tl.arange(0, WIDE), D, ROWS, EVEN, WIDE <= D)
    if NARROW == 0:
        return (wide,)
    else:
        columns = WIDE + tl.arange(0, NARROW)
        whole: tl.constexpr = WIDE + NARROW <= D
        return (wide, _load(head, first, stride, rows, columns, D, ROWS, EVEN, whole))


@triton.jit
def _load(
    head, first, stride, rows, columns,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = first + tl.arange(0, ROWS)
    pointers = head + at[:, None] * (stride * 8) + columns[None, :]
    if EVEN and WHOLE:
        values = tl.load(pointers)
    elif EVEN:
        values = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        values = tl.load(pointers, mask=(at < rows)[:, None] & (columns < D)[None, :], other=0.0)
    return values


@triton.jit
def store_tile(
    head, first, stride, rows, parts,
    D: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    _store(head, first, stride, rows, tl.arange(0, WIDE), parts[0], D, ROWS, EVEN, WIDE <= D)
    if NARROW > 0:
        columns = WIDE + tl.arange(0, NARROW)
        whole: tl.constexpr = WIDE + NARROW <= D
        _store(head, first, stride, rows, columns, parts[1], D, ROWS, EVEN, whole)


@triton.jit
def _store(
    head, first, stride, rows, columns, values,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = first + tl.arange(0, ROWS)
    pointers = head + at[:, None] * (stride * 8) + columns[None, :]
    values = values.to(head.dtype.element_ty)
    if EVEN and WHOLE:
        tl.store(pointers, values)
    elif EVEN:
        tl.store(pointers, values, mask=(columns < D)[None, :])
    else:
        tl.store(pointers, values, mask=(at < rows)[:, None] & (columns < D)[None, :])


@triton.jit
def load_row(row, first, size, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    return tl.load(row + at) if EVEN else tl.load(row + at, mask=at < size, other=0.0)


@triton.jit
def store_row(row, first, size, values, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(row + at, values)
    else:
        tl.store(row + at, values, mask=at < size)


@triton.jit
def zeros(ROWS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr):
    if NARROW == 0:
        return (tl.zeros((ROWS, WIDE), tl.float32),)
    else:
        return (tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, NARROW), tl.float32))


@triton.jit
def products(a, b):
    """a times b transposed, over the columns of all parts: [rows of a, rows of b]."""
    sums = tl.dot(a[0], tl.trans(b[0]))
    for part in tl.static_range(1, len(a)):
        sums = tl.dot(a[part], tl.trans(b[part]), sums)
    return sums


@triton.jit
def add_products(weights, tile, sums):
    """sums + weights times tile, part by part."""
    added = ()
    for part in tl.static_range(len(tile)):
        added = added + (tl.dot(weights, tile[part], sums[part]),)
    return added


@triton.jit
def row_products(a, b):
    """The sum of a * b over each row, in fp32."""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for part in tl.static_range(1, len(a)):
        sums += tl.sum(a[part].to(tl.float32) * b[part].to(tl.float32), 1)
    return sums


@triton.jit
def times(parts, factors):
    """Each part times a number, or times [rows, 1]."""
    scaled = ()
    for part in tl.static_range(len(parts)):
        scaled = scaled + (parts[part] * factors,)
    return scaled
