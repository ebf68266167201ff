"""Row statistics and row gradient of logits z[V] at temperature τ, shared by every op on logits.

    c = log2(e)/τ      y = (z − m)·c      e = 2^y
    m = max z          s = Σ e            E = Σ e·y          z_a = z[token]
    log π(a) = (z_a − m)/τ − ln s         H = ln s − ln2·E/s
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ] = 2^y·(k1 + k2·y), and its own value at z_a

A row is read in groups of four tiles of 4096 columns, two warps a tile: a thread has 64 columns of
one tile and adds those up first. Each tile has its own (m, s, E). Tiles 4 apart are combined in
order, and at the end of the row the four results: the bits depend on the row alone, whoever shares
the work (schedule.py). Reductions follow the layout the compiler picks for a load, which depends on
dtype and alignment: kernels give equal bits where those are equal.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 4096
GROUP = tl.constexpr(4)  # tiles


def options(capability: int, num_warps: int = 8, registers: int = 128) -> dict:
    """Launch options on a device of that capability.

    Fusion is off everywhere: a multiply-add that one kernel fuses and another does not would break
    the promise that scorer and sampler report the same bits. Eight warps, two of them a tile, fix
    the order of reductions for the same reason. With 128 registers a thread two programs of eight
    warps fit on a multiprocessor and hide each other's latency.
    """
    limit = {"maxnreg": registers} if capability else {}
    return {"num_warps": num_warps, "enable_fp_fusion": False} | limit


def launch(x: torch.Tensor, num_warps: int = 8, registers: int = 128) -> dict:
    """The same for the device of x."""
    return options(capability(x), num_warps, registers)


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
    # One row alone must be read as in a batch: the stride to a row that is not there counts too.
    strides = x.stride()[:-1] or x.shape
    aligned = all(b % 16 == 0 for b in (x.data_ptr(), *(stride * bytes_ for stride in strides)))
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
def tile_sums(z, m, c, ENTROPY: tl.constexpr, AXIS: tl.constexpr):
    """(s, E) of a tile [·, RUN] whose maximum is m, or along AXIS 1 of tiles [·, GROUP, RUN]."""
    reference = tl.where(m == float("-inf"), 0.0, m)
    y = (z - (reference if AXIS == 0 else reference[None, :, None])) * c
    if ENTROPY:
        # The floor turns −inf into a weight of exactly 0 whose product with y is 0. It keeps NaN.
        y = tl.maximum(y, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(y)
        # One exchange between warps for both.
        s, energy = tl.split(tl.sum(tl.join(tl.sum(e, 0), tl.sum(e * y, 0)), AXIS))
    else:
        s = tl.sum(tl.sum(tl.exp2(y), 0), AXIS)
        energy = tl.zeros_like(s)
    return s, energy


@triton.jit
def combine(m, s, e, tile_m, tile_s, tile_e, c, ENTROPY: tl.constexpr = True):
    """(m, s, E) of two pieces of a row."""
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
def columns(ptr, start, BLOCK: tl.constexpr, TILES: tl.constexpr = GROUP):
    """Columns [·, TILES · RUN] of so many tiles from `start` on: a run of each, the next of each, …

    Of 4096 columns a RUN is 1 KiB: 16 bytes for each thread of two warps, which so share a tile.
    """
    RUN: tl.constexpr = 2 * BLOCK // ptr.dtype.element_ty.primitive_bitwidth
    across = tl.arange(0, TILES * RUN)
    across = across // RUN * BLOCK + across % RUN
    return start + (tl.arange(0, BLOCK // RUN)[:, None] * RUN + across[None, :])


@triton.jit
def load_tile(z_ptr, start, length, BLOCK: tl.constexpr, SPREAD: tl.constexpr = False):
    """The BLOCK columns at `start` in float32, −inf beyond the row; SPREAD: like `columns`.

    Whole tiles carry no mask: against a length of unknown divisibility it would narrow the loads.
    """
    at = columns(z_ptr, start, BLOCK, 1) if SPREAD else start + tl.arange(0, BLOCK)
    if start + BLOCK <= length:
        z = tl.load(z_ptr + at).to(tl.float32)
    else:
        z = tl.load(z_ptr + at, mask=at < length, other=float("-inf")).to(tl.float32)
    return z


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
    """The group at `start` as stored, like `columns`; −inf from the vocabulary's end on.

    WHOLE: it ends within the vocabulary, no mask. Rounded to TAIL, which divides the width, a mask
    is the same for all elements of a wide load; one of unknown divisibility would narrow it.
    """
    at = columns(z_ptr, start, BLOCK)
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
    at = columns(grad_ptr, start, BLOCK)
    grad = grad.to(grad_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(grad_ptr + at, grad, eviction_policy="evict_first")
    else:
        inside = at < width // TAIL * TAIL
        tl.store(grad_ptr + at, grad, mask=inside, eviction_policy="evict_first")


@triton.jit
def no_statistics():
    """(m, s, E) of no column at all, for each of four tiles; combining with it changes no bit."""
    zeros = tl.zeros([GROUP], tl.float32)
    return zeros + float("-inf"), zeros, zeros


@triton.jit
def group_statistics(z, c, ENTROPY: tl.constexpr):
    """(m, s, E) [GROUP] of the tiles of a group."""
    z = tl.reshape(z.to(tl.float32), [z.shape[0], GROUP, z.shape[1] // GROUP])
    m = tl.max(tl.max(z, 0), 1)
    s, e = tile_sums(z, m, c, ENTROPY, 1)
    return m, s, e


@triton.jit
def combine_tiles(m, s, e, c, ENTROPY: tl.constexpr):
    """(m, s, E) of a row from those [GROUP] of its tiles 4k, 4k + 1, 4k + 2, 4k + 3."""
    m0, m1 = tl.split(tl.reshape(m, [2, 2]))
    s0, s1 = tl.split(tl.reshape(s, [2, 2]))
    e0, e1 = tl.split(tl.reshape(e, [2, 2]))
    m, s, e = combine(m0, s0, e0, m1, s1, e1, c, ENTROPY)
    m0, m1 = tl.split(m)
    s0, s1 = tl.split(s)
    e0, e1 = tl.split(e)
    return combine(m0, s0, e0, m1, s1, e1, c, ENTROPY)


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
    """(m, s, E) [GROUP] of the tiles of the group at `start`."""
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
    STAGES: tl.constexpr = 1,
):
    """(m, s, E) of the row at `z_ptr`; E is 0 without ENTROPY. STAGES: see schedule.py."""
    m, s, e = no_statistics()
    whole = vocab_size // (GROUP * BLOCK) * (GROUP * BLOCK)
    for start in tl.range(0, whole, GROUP * BLOCK, num_stages=STAGES):
        z = load_group(z_ptr, start, vocab_size, width, TAIL, EVICT, True, BLOCK)
        group_m, group_s, group_e = group_statistics(z, c, ENTROPY)
        m, s, e = combine(m, s, e, group_m, group_s, group_e, c, ENTROPY)
    # Once or never. As an `if` it costs the loop above some of its registers.
    for rest in range(whole, vocab_size, GROUP * BLOCK):
        z = load_group(z_ptr, rest, vocab_size, width, TAIL, EVICT, False, BLOCK)
        group_m, group_s, group_e = group_statistics(z, c, ENTROPY)
        m, s, e = combine(m, s, e, group_m, group_s, group_e, c, ENTROPY)
    return combine_tiles(m, s, e, c, ENTROPY)


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
        grad = tl.where(columns(grad_ptr, start, BLOCK) < vocab_size, grad, 0.0)
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
    zeros = tl.zeros_like(columns(grad_ptr, begin, BLOCK))
    for start in range(begin, end, GROUP * BLOCK):
        if start + GROUP * BLOCK <= width:
            store_group(grad_ptr, start, zeros, width, TAIL, True, BLOCK)
        else:
            store_group(grad_ptr, start, zeros, width, TAIL, False, BLOCK)
