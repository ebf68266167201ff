"""Row statistics and row gradient of logits z[V] at temperature τ, shared by every op on logits.

    c = log2(e)/τ      y = (z − m)·c      e = 2^y
    m = max z          s = Σ e            E = Σ e·y          z_a = z[token]
    log π(a) = (z_a − m)/τ − ln s         H = ln s − ln2·E/s
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ] = 2^y·(k1 + k2·y), and its own value at z_a

A row is read in groups of four tiles of 4096 columns. Each tile has its own (m, s, E); the tiles of
a group are combined in order, then the groups: the bits depend on the row alone, whoever shares the
work (policy_loss.py). Reductions follow the layout the compiler picks for a load, which depends on
dtype and alignment: kernels give equal bits where those are equal.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 4096
GROUP = tl.constexpr(4)  # tiles

# Fusion is off everywhere: a multiply-add that one kernel fuses and another does not would break
# the promise that scorer and sampler report the same bits. Eight warps fix the order of reductions
# for the same reason.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}


def registers(itemsize: int, capability: int) -> dict[str, int]:
    """Launch options of a kernel that holds more scalars than most: kept sets, an entropy bonus.

    ptxas likes to stop at 128 registers, with which two programs fit on a multiprocessor, and puts
    the rest into memory. Where the other kernels take more than that anyway, so may these.
    """
    return {"maxnreg": 192} if capability and (itemsize == 4 or capability >= 100) else {}


def wide_launch(logits: torch.Tensor) -> dict:
    """LAUNCH of such a kernel."""
    return LAUNCH | registers(logits.element_size(), capability(logits))


def capability(x: torch.Tensor) -> int:
    """10 · major + minor of an NVIDIA device, else 0."""
    if not x.is_cuda or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


class Rows(NamedTuple):
    """Row t of a tensor [..., V] begins at (t // inner)·stride_outer + (t % inner)·stride_inner."""

    count: int
    inner: int
    stride_outer: int
    stride_inner: int
    align: int  # elements; 16 bytes where base and strides allow, else 1
    tail: int  # elements; as many where the width is a multiple of 16 bytes, else 1


def rows(x: torch.Tensor) -> Rows:
    """The rows of `x`; its leading shape must collapse to two levels of strides."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == stride * size:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        raise ValueError(
            f"rows of shape {tuple(x.shape)} and strides {x.stride()} need three levels"
        )
    inner, stride_inner = levels[-1] if levels else (1, 0)
    stride_outer = levels[0][1] if len(levels) == 2 else 0
    bytes_ = x.element_size()
    aligned = all(b % 16 == 0 for b in (x.data_ptr(), stride_outer * bytes_, stride_inner * bytes_))
    return Rows(
        math.prod(x.shape[:-1]),
        max(inner, 1),
        stride_outer,
        stride_inner,
        16 // bytes_ if aligned else 1,
        16 // bytes_ if x.shape[-1] * bytes_ % 16 == 0 else 1,
    )


def parts(width: int) -> int:
    """How many groups a row of this width has."""
    return max(1, -(-width // (TILE * GROUP.value)))


def split_temperature(temperature) -> tuple[torch.Tensor | None, float]:
    """(tensor | None, number) of a temperature that is one or the other."""
    if isinstance(temperature, torch.Tensor):
        return temperature, 1.0
    return None, float(temperature)


@triton.jit
def load_temperature(temperature_ptr, temperature, row):
    """τ of a row, from a tensor or one number for all."""
    if temperature_ptr is not None:
        tau = tl.load(temperature_ptr + row)
    else:
        tau = tl.full([], 1.0, tl.float32) * temperature
    return tau


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    """First element of a row, in int64, with the alignment that the launcher has checked.

    There are fewer than 2^31 rows, and dividing in int64 would cost a hundred instructions.
    """
    row = row.to(tl.int32)
    inner = inner.to(tl.int32)
    outer_offset = (row // inner).to(tl.int64) * stride_outer
    return tl.multiple_of(outer_offset + (row % inner).to(tl.int64) * stride_inner, ALIGN)


@triton.jit
def scale_of(tau):
    """c = log2(e)/τ, finite for every τ > 0."""
    c = (1.4426950408889634 / tau.to(tl.float64)).to(tl.float32)
    return tl.minimum(c, 3.4028234663852886e38)


@triton.jit
def tile_statistics(z, c, ENTROPY: tl.constexpr = True, AXIS: tl.constexpr = 0):
    """(m, s, E) of one tile, or of each row of tiles; E is 0 without ENTROPY.

    −inf weighs 0; NaN, +inf make s NaN; all −inf gives (−inf, 0, 0).
    """
    top = tl.max(z, AXIS)
    reference = tl.where(top == float("-inf"), 0.0, top)
    y = (z - (reference if AXIS == 0 else reference[:, None])) * c
    if ENTROPY:
        # The floor turns −inf into a weight of exactly 0 whose product with y is 0. It keeps NaN.
        y = tl.maximum(y, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(y)
        energy = tl.sum(e * y, AXIS)
    else:
        e = tl.exp2(y)
        energy = tl.zeros_like(top)
    return top, tl.sum(e, AXIS), energy


@triton.jit
def combine(m, s, e, tile_m, tile_s, tile_e, c, ENTROPY: tl.constexpr = True):
    """(m, s, E) of two neighbouring pieces of a row."""
    top = tl.maximum(m, tile_m)
    reference = tl.where(top == float("-inf"), 0.0, top)
    y = tl.maximum((m - reference) * c, -200.0)
    tile_y = tl.maximum((tile_m - reference) * c, -200.0)
    a = tl.exp2(y)
    b = tl.exp2(tile_y)
    if ENTROPY:
        e = (e + s * y) * a + (tile_e + tile_s * tile_y) * b
    return top, s * a + tile_s * b, e


@triton.jit
def load_tile(z_ptr, start, length, BLOCK: tl.constexpr):
    """The tile at `start` in float32, −inf beyond the row.

    Whole tiles carry no mask: against a length of unknown divisibility it would narrow the loads.
    """
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= length:
        z = tl.load(z_ptr + at).to(tl.float32)
    else:
        z = tl.load(z_ptr + at, mask=at < length, other=float("-inf")).to(tl.float32)
    return z


@triton.jit
def columns(start, BLOCK: tl.constexpr):
    """Column numbers [GROUP, BLOCK] of the group at `start`."""
    return start + tl.arange(0, GROUP)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_group(
    z_ptr,
    start,
    vocab_size,
    width,
    TAIL: tl.constexpr,
    EVICT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The group at `start` as stored, [GROUP, BLOCK]; −inf from the vocabulary's end on.

    WHOLE: it ends within the vocabulary, no mask. Rounded to TAIL, which divides the width, a mask
    is the same for all elements of a wide load; one of unknown divisibility would narrow it.
    """
    at = columns(start, BLOCK)
    if WHOLE:
        z = tl.load(z_ptr + at, eviction_policy=EVICT)
    else:
        inside = at < width // TAIL * TAIL
        z = tl.load(z_ptr + at, mask=inside, other=float("-inf"), eviction_policy=EVICT)
        z = tl.where(at < vocab_size, z, float("-inf")).to(z.dtype)
    return z


@triton.jit
def store_group(
    grad_ptr,
    start,
    grad,
    width,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the group at `start` in the dtype of the row; nothing beyond its width unless WHOLE."""
    at = columns(start, BLOCK)
    grad = grad.to(grad_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(grad_ptr + at, grad, eviction_policy="evict_first")
    else:
        inside = at < width // TAIL * TAIL
        tl.store(grad_ptr + at, grad, mask=inside, eviction_policy="evict_first")


@triton.jit
def pick(x, k: tl.constexpr):
    """x[k] of a vector [GROUP], whose index every thread knows when it is compiled."""
    bits = tl.where(tl.arange(0, GROUP) == k, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def no_statistics():
    """(m, s, E) of no column at all; combining with it changes no bit."""
    m = tl.full([], float("-inf"), tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    return m, zero, zero


@triton.jit
def group_statistics(z, c, ENTROPY: tl.constexpr):
    """(m, s, E) of a group of tiles, combined in order."""
    tile_m, tile_s, tile_e = tile_statistics(z.to(tl.float32), c, ENTROPY, 1)
    m, s, e = no_statistics()
    for k in tl.static_range(GROUP):
        m, s, e = combine(m, s, e, pick(tile_m, k), pick(tile_s, k), pick(tile_e, k), c, ENTROPY)
    return m, s, e


@triton.jit
def load_group_statistics(
    z_ptr,
    start,
    vocab_size,
    width,
    c,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(m, s, E) of the group at `start`."""
    if start + GROUP * BLOCK <= vocab_size:
        z = load_group(z_ptr, start, vocab_size, width, TAIL, EVICT, True, BLOCK)
        m, s, e = group_statistics(z, c, ENTROPY)
    else:
        z = load_group(z_ptr, start, vocab_size, width, TAIL, EVICT, False, BLOCK)
        m, s, e = group_statistics(z, c, ENTROPY)
    return m, s, e


@triton.jit
def statistics(
    z_ptr,
    vocab_size,
    width,
    c,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(m, s, E) of the row at `z_ptr`; E is 0 without ENTROPY."""
    m, s, e = no_statistics()
    for start in range(0, vocab_size, GROUP * BLOCK):
        group_m, group_s, group_e = load_group_statistics(
            z_ptr, start, vocab_size, width, c, TAIL, ENTROPY, EVICT, BLOCK
        )
        m, s, e = combine(m, s, e, group_m, group_s, group_e, c, ENTROPY)
    return m, s, e


@triton.jit
def load_token_logit(z_ptr, token, vocab_size):
    """z_a, or NaN without a read where the token is no column."""
    inside = (token >= 0) & (token < vocab_size)
    return tl.load(z_ptr + token, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def logprob_of(m, s, z_token, tau):
    """log π(a) in float64: the difference of two numbers that may be large."""
    distance = z_token.to(tl.float64) - m.to(tl.float64)
    return distance / tau.to(tl.float64) - tl.log(s.to(tl.float64))


@triton.jit
def entropy_of(s, e):
    """H in float64."""
    s = s.to(tl.float64)
    return tl.log(s) - e.to(tl.float64) / s * 0.6931471805599453


@triton.jit
def slopes(m, s, e, z_token, c, tau, g, h, ENTROPY: tl.constexpr):
    """(k1, k2, ∂ℓ/∂z_a) of a row from g = ∂ℓ/∂log π(a) and, with ENTROPY, h = ∂ℓ/∂H.

    k1 is NaN where z_a is: a token that is no column has no gradient to be right about.
    """
    inverse_s = tl.div_rn(tl.full([], 1.0, tl.float32), s)
    g = tl.where(z_token == z_token, g / tau, z_token)
    k1 = -g * inverse_s
    k2 = tl.full([], 0.0, tl.float32)
    if ENTROPY:
        h = h / tau * 0.6931471805599453
        k1 = (h * (e * inverse_s) - g) * inverse_s
        k2 = -h * inverse_s
    return k1, k2, g + element_gradient(z_token, m, c, k1, k2, ENTROPY)


@triton.jit
def element_gradient(z, m, c, k1, k2, ENTROPY: tl.constexpr):
    """2^y·(k1 + k2·y) of elements of a row."""
    y = (z.to(tl.float32) - m) * c
    if ENTROPY:
        y = tl.maximum(y, -200.0, propagate_nan=tl.PropagateNan.ALL)
        grad = tl.exp2(y) * (k1 + k2 * y)
    else:
        grad = tl.exp2(y) * k1
    return grad


@triton.jit
def store_group_gradient(
    grad_ptr,
    z,
    start,
    vocab_size,
    width,
    m,
    c,
    k1,
    k2,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of the group at `start`, whose logits are z; 0 beyond the vocabulary."""
    grad = element_gradient(z, m, c, k1, k2, ENTROPY)
    if not WHOLE:
        # There π is 0 by value, but 0·k1 is not where k1 is NaN or infinite.
        grad = tl.where(columns(start, BLOCK) < vocab_size, grad, 0.0)
    store_group(grad_ptr, start, grad, width, TAIL, WHOLE, BLOCK)


@triton.jit
def write_group_gradient(
    z_ptr,
    grad_ptr,
    start,
    vocab_size,
    width,
    m,
    c,
    k1,
    k2,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂ℓ/∂z of the group at `start`, but for the token's column; `grad_ptr` may be `z_ptr`."""
    if start + GROUP * BLOCK <= vocab_size:
        z = load_group(z_ptr, start, vocab_size, width, TAIL, "evict_first", True, BLOCK)
        store_group_gradient(
            grad_ptr, z, start, vocab_size, width, m, c, k1, k2, TAIL, ENTROPY, True, BLOCK
        )
    else:
        z = load_group(z_ptr, start, vocab_size, width, TAIL, "evict_first", False, BLOCK)
        store_group_gradient(
            grad_ptr, z, start, vocab_size, width, m, c, k1, k2, TAIL, ENTROPY, False, BLOCK
        )


@triton.jit
def store_token_gradient(grad_ptr, token, vocab_size, begin, end, at_token):
    """Write ∂ℓ/∂z_a over what the columns [begin, end) of the row already hold."""
    # The threads that wrote this column are others.
    tl.debug_barrier()
    inside = (token >= begin) & (token < end) & (token < vocab_size)
    tl.store(grad_ptr + token, at_token.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_gradient(
    z_ptr,
    grad_ptr,
    vocab_size,
    width,
    token,
    m,
    c,
    k1,
    k2,
    at_token,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂ℓ/∂z of a row, 0 in the padding columns [vocab_size, width).

    Walks backwards: what the statistics read last is still in cache. What is stored at an element
    is computed from it, so `grad_ptr` may be `z_ptr`.
    """
    groups = (width + GROUP * BLOCK - 1) // (GROUP * BLOCK)
    for step in range(groups):
        start = (groups - 1 - step) * GROUP * BLOCK
        write_group_gradient(
            z_ptr, grad_ptr, start, vocab_size, width, m, c, k1, k2, TAIL, ENTROPY, BLOCK
        )
    store_token_gradient(grad_ptr, token, vocab_size, 0, vocab_size, at_token)


@triton.jit
def write_zeros(grad_ptr, begin, end, width, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the groups [begin, end) of a row, for rows that are masked or have no gradient."""
    zeros = tl.zeros([GROUP, BLOCK], dtype=tl.float32)
    for start in range(begin, end, GROUP * BLOCK):
        if start + GROUP * BLOCK <= width:
            store_group(grad_ptr, start, zeros, width, TAIL, True, BLOCK)
        else:
            store_group(grad_ptr, start, zeros, width, TAIL, False, BLOCK)
