"""The Triton kernels of `layer_norm.py`, which launches them and says what they compute.

A tile is ROWS rows of PIECES pieces of COLUMNS columns. Widths of the UNets are 5 times a power of
two, and Triton's blocks are powers of two: five narrow pieces waste no lane, where one wide block
would idle three of eight; and a row of few threads is summed inside a warp.

Backward, with xhat = (x - mean) * rstd, g = grad * weight and means over a row:
grad_x = (g - mean(g) - xhat * mean(g * xhat)) * rstd. Each program adds up grad * xhat and grad of
its rows, tile after tile, and `sum_kernel` adds up the programs: the same bits on every run.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]: whole tiles of weights too are loaded, so that all loads have one layout and
    nothing is exchanged between threads; neighbouring rows read them from L1.
    """
    return tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (ROWS, COLUMNS))


@triton.jit
def forward_kernel(
    x, residual, weight, bias, normalized, total, mean, rstd, rows, x_stride, residual_stride, eps,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = _columns(ROWS, COLUMNS)
    pieces = ()
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for piece in tl.static_range(PIECES):
        at = piece * COLUMNS + column
        inside = (row < rows) & (at < WIDTH)
        value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            added = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
            rounded = (value + added.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + row * WIDTH + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        summed += value
        pieces += (value,)
    center = tl.sum(summed, axis=1, keep_dims=True) / WIDTH
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for piece in tl.static_range(PIECES):
        distance = tl.where(piece * COLUMNS + column < WIDTH, pieces[piece] - center, 0.0)
        squares += distance * distance
    scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / WIDTH + eps)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)
    for piece in tl.static_range(PIECES):
        at = piece * COLUMNS + column
        value = (pieces[piece] - center) * scale
        if weight is not None:
            value *= tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        tl.store(normalized + row * WIDTH + at, value, mask=(row < rows) & (at < WIDTH))


@triton.jit
def backward_kernel(
    grad_normalized, grad_total, x, weight, mean, rstd, grad, partials,
    rows, grad_normalized_stride, grad_total_stride, x_stride,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = _columns(ROWS, COLUMNS)
    weights, weight_sums, bias_sums = (), (), ()
    for piece in tl.static_range(PIECES):
        at = piece * COLUMNS + column
        if weight is not None:
            weights += (tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32),)
        if partials is not None:
            weight_sums += (tl.zeros([ROWS, COLUMNS], tl.float32),)
            bias_sums += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for step in tl.range(STEPS, num_stages=STAGES):
        tile = step * tl.num_programs(0) + tl.program_id(0)  # neighbours in memory at one time
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        center = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        along = tl.zeros([ROWS, COLUMNS], tl.float32)
        shift = tl.zeros([ROWS, COLUMNS], tl.float32)
        values, wanted, next_weight_sums, next_bias_sums = (), (), (), ()
        for piece in tl.static_range(PIECES):
            at = piece * COLUMNS + column
            inside = (row < rows) & (at < WIDTH)
            value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
            value = (value - center) * scale
            source = grad_normalized + row * grad_normalized_stride + at
            incoming = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            if partials is not None:
                next_weight_sums += (weight_sums[piece] + incoming * value,)
                next_bias_sums += (bias_sums[piece] + incoming,)
            if weight is not None:
                incoming *= weights[piece]
            along += incoming * value
            shift += incoming
            values += (value,)
            wanted += (incoming,)
        weight_sums, bias_sums = next_weight_sums, next_bias_sums
        along = tl.sum(along, axis=1, keep_dims=True) / WIDTH
        shift = tl.sum(shift, axis=1, keep_dims=True) / WIDTH
        for piece in tl.static_range(PIECES):
            at = piece * COLUMNS + column
            inside = (row < rows) & (at < WIDTH)
            result = (wanted[piece] - shift - values[piece] * along) * scale
            if grad_total is not None:
                source = grad_total + row * grad_total_stride + at
                result += tl.load(source, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad + row * WIDTH + at, result, mask=inside)
    if partials is not None:
        target = partials + tl.program_id(0) * 2 * WIDTH
        for piece in tl.static_range(PIECES):
            at = piece * COLUMNS + tl.arange(0, COLUMNS)
            tl.store(target + at, tl.sum(weight_sums[piece], axis=0), mask=at < WIDTH)
            tl.store(target + WIDTH + at, tl.sum(bias_sums[piece], axis=0), mask=at < WIDTH)


@triton.jit
def sum_kernel(
    partials, grad_weight, grad_bias, programs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < programs) & (column[None, :] < WIDTH)
    source = partials + row * 2 * WIDTH + column[None, :]
    if grad_weight is not None:
        weight_sum = tl.sum(tl.load(source, mask=inside, other=0.0), axis=0)
        tl.store(grad_weight + column, weight_sum, mask=column < WIDTH)
    if grad_bias is not None:
        bias_sum = tl.sum(tl.load(source + WIDTH, mask=inside, other=0.0), axis=0)
        tl.store(grad_bias + column, bias_sum, mask=column < WIDTH)
