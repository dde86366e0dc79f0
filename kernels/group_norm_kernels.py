"""The Triton kernels of `group_norm.py`, which launches them and says what they compute.

An image is a matrix of positions (rows) by channels, with any strides. Either a program keeps all
rows of a few groups (`whole`), or programs take tiles: `partial` reduces each tile over its rows,
`statistics` adds the tiles up for each group, `apply` writes. Sums have a fixed order: the same
bits on every run. Statistics are centred in two passes over registers, tiles are joined as in
Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

Backward, with z = xhat * weight + bias, g = grad_out * silu'(z) and sums over a group of m values:
grad_x = rstd * (weight * g - sum(weight * g) / m - xhat * sum(weight * g * xhat) / m).
"""

# pyright: reportGeneralTypeIssues=false
# It cannot tell what a jit function returns to another.

import triton
import triton.language as tl


@triton.jit
def _tile(splits, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, split, rows and channels of this program; tiles of the same rows are neighbours."""
    tiles = (channels + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    split = program // tiles % splits
    row = split * ROWS + tl.arange(0, ROWS)
    channel = program % tiles * CHANNELS + tl.arange(0, CHANNELS)
    return (program // tiles // splits).to(tl.int64), split, row, channel


@triton.jit
def _groups_of(group_count, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, channels, each one's group, and which channels are this program's, of whole groups."""
    lane = tl.arange(0, CHANNELS)
    group = tl.program_id(1) * TOGETHER + lane // WIDTH
    channel = tl.program_id(1) * (TOGETHER * WIDTH) + lane
    mine = (lane < TOGETHER * WIDTH) & (channel < group_count * WIDTH)
    return tl.program_id(0).to(tl.int64), channel, group, mine


@triton.jit
def _over_group(per_channel, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """For each channel the sum over the channels of its group, [CHANNELS]."""
    group = tl.arange(0, CHANNELS) // WIDTH
    return tl.sum(tl.where(group[:, None] == group[None, :], per_channel[None, :], 0.0), axis=1)


@triton.jit
def _at(tensor, image, row, channel, stride_image, stride_row, stride_channel):
    """Addresses of a tile; inside an image 32-bit offsets do, and take half the registers."""
    offset = row[:, None] * stride_row + channel[None, :] * stride_channel
    return tensor + image * stride_image + offset


@triton.jit
def _load(at, inside, embedding, image, channel, channels, EMBEDDING: tl.constexpr):
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if EMBEDDING:
        added = tl.load(embedding + image * channels + channel, mask=channel < channels, other=0.0)
        value += added.to(tl.float32)[None, :]
    return value


@triton.jit
def _normalized(value, mean, rstd, image, channel, channels, groups):
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=channel < channels, other=0.0)
    scale = tl.load(rstd + group, mask=channel < channels, other=0.0)
    return (value - centre[None, :]) * scale[None, :]


@triton.jit
def _affine(weight, bias, channel, channels):
    known = channel < channels
    w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    return w, tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _recomputed(
    x_at, out_at, inside, embedding, weight, bias, mean, rstd, image, channel, channels, groups,
    EMBEDDING: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """xhat, the weight, and the gradient of what the weight and bias give."""
    value = _load(x_at, inside, embedding, image, channel, channels, EMBEDDING)
    xhat = _normalized(value, mean, rstd, image, channel, channels, groups)
    w, b = _affine(weight, bias, channel, channels)
    g = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * w[None, :] + b[None, :]
        sigmoid = tl.sigmoid(z)
        g = g * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return xhat, w, g


@triton.jit
def whole_kernel(
    x, added, weight, bias, out, total, mean, rstd, eps,
    x_image, x_row, x_channel, added_image, added_row, added_channel,
    out_image, out_row, out_channel, size, channels, groups,
    EMBEDDING: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Forward of whole groups; `total` has the strides of `out`."""
    image, channel, group, mine = _groups_of(groups, WIDTH, TOGETHER, CHANNELS)
    row = tl.arange(0, ROWS)
    inside = (row < size)[:, None] & mine[None, :]
    at = _at(x, image, row, channel, x_image, x_row, x_channel)
    value = _load(at, inside, added, image, channel, channels, EMBEDDING)
    if RESIDUAL:
        beside = _at(added, image, row, channel, added_image, added_row, added_channel)
        value += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        at = _at(total, image, row, channel, out_image, out_row, out_channel)
        tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    values = size * WIDTH
    sums = tl.sum(tl.where(inside, value, 0.0), axis=0)
    centre = _over_group(sums, WIDTH, CHANNELS) / values
    centred = tl.where(inside, value - centre[None, :], 0.0)
    squares = _over_group(tl.sum(centred * centred, axis=0), WIDTH, CHANNELS)
    scale = 1.0 / tl.sqrt_rn(squares / values + eps)
    first = mine & (channel % WIDTH == 0)
    tl.store(mean + image * groups + group, centre, mask=first)
    tl.store(rstd + image * groups + group, scale, mask=first)
    w = tl.load(weight + channel, mask=mine, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=mine, other=0.0).to(tl.float32)
    z = centred * (scale * w)[None, :] + b[None, :]
    at = _at(out, image, row, channel, out_image, out_row, out_channel)
    tl.store(at, z * tl.sigmoid(z) if SILU else z, mask=inside)


@triton.jit
def partial_kernel(
    x, added, total, means, squares,
    x_image, x_row, x_channel, added_image, added_row, added_channel,
    out_image, out_row, out_channel, size, channels, groups, splits,
    EMBEDDING: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of each tile's channels, [n, splits, channels]."""
    image, split, row, channel = _tile(splits, channels, ROWS, CHANNELS)
    inside = (row < size)[:, None] & (channel < channels)[None, :]
    at = _at(x, image, row, channel, x_image, x_row, x_channel)
    value = _load(at, inside, added, image, channel, channels, EMBEDDING)
    if RESIDUAL:
        at = _at(added, image, row, channel, added_image, added_row, added_channel)
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        at = _at(total, image, row, channel, out_image, out_row, out_channel)
        tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    rows = tl.minimum(size - split * ROWS, ROWS)
    mean = tl.sum(tl.where(inside, value, 0.0), axis=0) / rows
    centred = tl.where(inside, value - mean[None, :], 0.0)
    at = (image * splits + split) * channels + channel
    tl.store(means + at, mean, mask=channel < channels)
    tl.store(squares + at, tl.sum(centred * centred, axis=0), mask=channel < channels)


@triton.jit
def statistics_kernel(
    means, squares, mean, rstd, eps, size, channels, groups, splits,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of one group of one image, from its tiles."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width = channels // groups
    lane = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((SPLITS, WIDTH), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        known = (split < splits) & (lane < width)
        at = (image * splits + split) * channels + group * width + lane
        rows = tl.minimum(size - split * ROWS, ROWS)
        total += rows * tl.load(means + at, mask=known, other=0.0)
    centre = tl.sum(total) / (size * width)
    total = tl.zeros((SPLITS, WIDTH), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        known = (split < splits) & (lane < width)
        at = (image * splits + split) * channels + group * width + lane
        rows = tl.minimum(size - split * ROWS, ROWS)
        offset = tl.load(means + at, mask=known, other=0.0) - centre
        spread = tl.load(squares + at, mask=known, other=0.0) + rows * offset * offset
        total += tl.where(known, spread, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(total) / (size * width) + eps)
    tl.store(mean + image * groups + group, centre)
    tl.store(rstd + image * groups + group, scale)


@triton.jit
def apply_kernel(
    x, embedding, weight, bias, mean, rstd, out,
    x_image, x_row, x_channel, out_image, out_row, out_channel, size, channels, groups, splits,
    EMBEDDING: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the normalized tile."""
    image, _, row, channel = _tile(splits, channels, ROWS, CHANNELS)
    inside = (row < size)[:, None] & (channel < channels)[None, :]
    at = _at(x, image, row, channel, x_image, x_row, x_channel)
    value = _load(at, inside, embedding, image, channel, channels, EMBEDDING)
    xhat = _normalized(value, mean, rstd, image, channel, channels, groups)
    w, b = _affine(weight, bias, channel, channels)
    z = xhat * w[None, :] + b[None, :]
    at = _at(out, image, row, channel, out_image, out_row, out_channel)
    tl.store(at, z * tl.sigmoid(z) if SILU else z, mask=inside)


@triton.jit
def backward_whole_kernel(
    grad_out, direct, x, embedding, weight, bias, mean, rstd,
    grad, grad_embedding, bias_sums, weight_sums,
    out_image, out_row, out_channel, direct_image, direct_row, direct_channel,
    x_image, x_row, x_channel, grad_image, grad_row, grad_channel, size, channels, groups,
    DIRECT: tl.constexpr, EMBEDDING: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Backward of whole groups; `direct` is the gradient that reaches the sum by another way."""
    image, channel, _, mine = _groups_of(groups, WIDTH, TOGETHER, CHANNELS)
    row = tl.arange(0, ROWS)
    inside = (row < size)[:, None] & mine[None, :]
    x_at = _at(x, image, row, channel, x_image, x_row, x_channel)
    out_at = _at(grad_out, image, row, channel, out_image, out_row, out_channel)
    xhat, w, g = _recomputed(
        x_at, out_at, inside, embedding, weight, bias, mean, rstd,
        image, channel, channels, groups, EMBEDDING, SILU,
    )  # fmt: skip
    bias_sum, weight_sum = tl.sum(g, axis=0), tl.sum(g * xhat, axis=0)
    tl.store(bias_sums + image * channels + channel, bias_sum, mask=mine)
    tl.store(weight_sums + image * channels + channel, weight_sum, mask=mine)
    values = size * WIDTH
    constant = _over_group(w * bias_sum, WIDTH, CHANNELS) / values
    slope = _over_group(w * weight_sum, WIDTH, CHANNELS) / values
    scale = tl.load(rstd + image * groups + channel // WIDTH, mask=mine, other=0.0)
    out = (w[None, :] * g - constant[None, :] - xhat * slope[None, :]) * scale[None, :]
    if EMBEDDING:
        tl.store(
            grad_embedding + image * channels + channel,
            tl.sum(tl.where(inside, out, 0.0), axis=0),
            mask=mine,
        )
    if DIRECT:
        at = _at(direct, image, row, channel, direct_image, direct_row, direct_channel)
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = _at(grad, image, row, channel, grad_image, grad_row, grad_channel)
    tl.store(at, out, mask=inside)


@triton.jit
def backward_partial_kernel(
    grad_out, x, embedding, weight, bias, mean, rstd, bias_sums, weight_sums, xhat_sums,
    out_image, out_row, out_channel, x_image, x_row, x_channel, size, channels, groups, splits,
    EMBEDDING: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each tile's sums of g, of g * xhat and of xhat, [n, splits, channels]."""
    image, split, row, channel = _tile(splits, channels, ROWS, CHANNELS)
    known = channel < channels
    inside = (row < size)[:, None] & known[None, :]
    x_at = _at(x, image, row, channel, x_image, x_row, x_channel)
    out_at = _at(grad_out, image, row, channel, out_image, out_row, out_channel)
    xhat, _, g = _recomputed(
        x_at, out_at, inside, embedding, weight, bias, mean, rstd,
        image, channel, channels, groups, EMBEDDING, SILU,
    )  # fmt: skip
    at = (image * splits + split) * channels + channel
    tl.store(bias_sums + at, tl.sum(g, axis=0), mask=known)
    tl.store(weight_sums + at, tl.sum(g * xhat, axis=0), mask=known)
    if EMBEDDING:
        tl.store(xhat_sums + at, tl.sum(tl.where(inside, xhat, 0.0), axis=0), mask=known)


@triton.jit
def backward_statistics_kernel(
    bias_partial, weight_partial, xhat_partial, weight, rstd,
    bias_sums, weight_sums, constants, slopes, grad_embedding,
    size, channels, groups, splits,
    EMBEDDING: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles for one group of one image, and the gradient of its embedding."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width = channels // groups
    lane = tl.arange(0, WIDTH)
    g = tl.zeros((SPLITS, WIDTH), tl.float32)
    g_xhat = tl.zeros((SPLITS, WIDTH), tl.float32)
    xhat = tl.zeros((SPLITS, WIDTH), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        known = (split < splits) & (lane < width)[None, :]
        at = (image * splits + split) * channels + group * width + lane[None, :]
        g += tl.load(bias_partial + at, mask=known, other=0.0)
        g_xhat += tl.load(weight_partial + at, mask=known, other=0.0)
        if EMBEDDING:
            xhat += tl.load(xhat_partial + at, mask=known, other=0.0)
    bias_sum, weight_sum = tl.sum(g, axis=0), tl.sum(g_xhat, axis=0)
    channel = group * width + lane
    known = lane < width
    w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    constant = tl.sum(w * bias_sum) / (size * width)
    slope = tl.sum(w * weight_sum) / (size * width)
    tl.store(bias_sums + image * channels + channel, bias_sum, mask=known)
    tl.store(weight_sums + image * channels + channel, weight_sum, mask=known)
    tl.store(constants + image * groups + group, constant)
    tl.store(slopes + image * groups + group, slope)
    if EMBEDDING:  # the sum over positions of grad_x, term by term
        scale = tl.load(rstd + image * groups + group)
        summed = (w * bias_sum - size * constant - tl.sum(xhat, axis=0) * slope) * scale
        tl.store(grad_embedding + image * channels + channel, summed, mask=known)


@triton.jit
def backward_apply_kernel(
    grad_out, direct, x, embedding, weight, bias, mean, rstd, constants, slopes, grad,
    out_image, out_row, out_channel, direct_image, direct_row, direct_channel,
    x_image, x_row, x_channel, grad_image, grad_row, grad_channel, size, channels, groups, splits,
    DIRECT: tl.constexpr, EMBEDDING: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the tile."""
    image, _, row, channel = _tile(splits, channels, ROWS, CHANNELS)
    known = channel < channels
    inside = (row < size)[:, None] & known[None, :]
    x_at = _at(x, image, row, channel, x_image, x_row, x_channel)
    out_at = _at(grad_out, image, row, channel, out_image, out_row, out_channel)
    xhat, w, g = _recomputed(
        x_at, out_at, inside, embedding, weight, bias, mean, rstd,
        image, channel, channels, groups, EMBEDDING, SILU,
    )  # fmt: skip
    group = image * groups + channel // (channels // groups)
    constant = tl.load(constants + group, mask=known, other=0.0)
    slope = tl.load(slopes + group, mask=known, other=0.0)
    scale = tl.load(rstd + group, mask=known, other=0.0)
    out = (w[None, :] * g - constant[None, :] - xhat * slope[None, :]) * scale[None, :]
    if DIRECT:
        at = _at(direct, image, row, channel, direct_image, direct_row, direct_channel)
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = _at(grad, image, row, channel, grad_image, grad_row, grad_channel)
    tl.store(at, out, mask=inside)
