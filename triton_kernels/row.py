"""Row statistics and row gradient of logits z[V] at temperature τ, shared by every op on logits.

    c = log2(e)/τ      y = (z − m)·c      e = 2^y
    m = max z          s = Σ e            E = Σ e·y          z_a = z[token]
    log π(a) = (z_a − m)/τ − ln s         H = ln s − ln2·E/s
    ∂ℓ/∂z = (1/τ)·[ g·(e_a − π) − h·π·(log π + H) ],   log π + H = ln2·(y − E/s)

A row is read in tiles of 4096 columns; each tile has its own (m, s, E), and tiles are combined in
index order, so the bits depend on the row alone. Reductions follow the layout the compiler picks
for a load, which depends on dtype and alignment: kernels give equal bits where those are equal.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 4096

# Fusion is off everywhere: a multiply-add that one kernel fuses and another does not would break
# the promise that scorer and sampler report the same bits. Eight warps fix the order of reductions
# for the same reason.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}


class Rows(NamedTuple):
    """Row t of a tensor [..., V] begins at (t // inner)·stride_outer + (t % inner)·stride_inner."""

    count: int
    inner: int
    stride_outer: int
    stride_inner: int
    align: int  # elements; 16 bytes where base and strides allow, else 1


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
    )


def split_temperature(temperature) -> tuple[torch.Tensor | None, float]:
    """(tensor | None, number) of a temperature that is one or the other."""
    if isinstance(temperature, torch.Tensor):
        return temperature, 1.0
    return None, float(temperature)


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    """First element of a row, in int64, with the alignment that the launcher has checked."""
    offset = (row // inner) * stride_outer + (row % inner) * stride_inner
    return tl.multiple_of(offset.to(tl.int64), ALIGN)


@triton.jit
def scale_of(tau):
    """c = log2(e)/τ, finite for every τ > 0."""
    c = (1.4426950408889634 / tau.to(tl.float64)).to(tl.float32)
    return tl.minimum(c, 3.4028234663852886e38)


@triton.jit
def tile_statistics(z, c):
    """(m, s, E) of one tile. −inf weighs 0; NaN, +inf make s NaN; all −inf gives (−inf, 0, 0)."""
    top = tl.max(z, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    # The floor turns −inf into a weight of exactly 0 whose product with y is 0 too. It keeps NaN.
    y = tl.maximum((z - reference) * c, -200.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(y)
    return top, tl.sum(e, 0), tl.sum(e * y, 0)


@triton.jit
def combine(m, s, e, tile_m, tile_s, tile_e, c):
    """(m, s, E) of two neighbouring pieces of a row."""
    top = tl.maximum(m, tile_m)
    reference = tl.where(top == float("-inf"), 0.0, top)
    y = tl.maximum((m - reference) * c, -200.0)
    tile_y = tl.maximum((tile_m - reference) * c, -200.0)
    a = tl.exp2(y)
    b = tl.exp2(tile_y)
    return top, s * a + tile_s * b, (e + s * y) * a + (tile_e + tile_s * tile_y) * b


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
def store_tile(z_ptr, start, z, length, BLOCK: tl.constexpr):
    """Write the tile at `start` in the dtype of the row, nothing beyond its length."""
    at = start + tl.arange(0, BLOCK)
    z = z.to(z_ptr.dtype.element_ty)
    if start + BLOCK <= length:
        tl.store(z_ptr + at, z)
    else:
        tl.store(z_ptr + at, z, mask=at < length)


@triton.jit
def statistics(z_ptr, vocab_size, c, BLOCK: tl.constexpr):
    """(m, s, E) of the row at `z_ptr`."""
    m = tl.full([], float("-inf"), tl.float32)
    s = tl.full([], 0.0, tl.float32)
    e = tl.full([], 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        z = load_tile(z_ptr, start, vocab_size, BLOCK)
        tile_m, tile_s, tile_e = tile_statistics(z, c)
        m, s, e = combine(m, s, e, tile_m, tile_s, tile_e, c)
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
def tile_gradient(z, hit, m, c, inverse_s, mean_y, g, h):
    """g·(e_a − π) − h·π·(y − E/s) of one tile; g carries 1/τ, h carries ln2/τ."""
    y = tl.maximum((z - m) * c, -200.0, propagate_nan=tl.PropagateNan.ALL)
    pi = tl.exp2(y) * inverse_s
    return g * (hit.to(tl.float32) - pi) - h * pi * (y - mean_y)


@triton.jit
def gradient_terms(s, e, tau, g, h):
    """(g/τ, h·ln2/τ, 1/s, E/s): what a row's gradient needs beside m and c."""
    inverse_s = tl.div_rn(tl.full([], 1.0, tl.float32), s)
    return g / tau, h / tau * 0.6931471805599453, inverse_s, e * inverse_s


@triton.jit
def write_gradient(
    z_ptr, grad_ptr, vocab_size, width, token, m, s, e, c, tau, g, h, BLOCK: tl.constexpr
):
    """∂ℓ/∂z of a row, 0 in the padding columns [vocab_size, width).

    Walks backwards: what the statistics read last is still in cache. What is stored at an element
    is computed from it, so `grad_ptr` may be `z_ptr`.
    """
    # A token that is no column has no gradient to be right about.
    inside = (token >= 0) & (token < vocab_size)
    g = tl.where(inside, g, float("nan"))
    g, h, inverse_s, mean_y = gradient_terms(s, e, tau, g, h)
    tiles = (width + BLOCK - 1) // BLOCK
    for step in range(tiles):
        start = (tiles - 1 - step) * BLOCK
        at = start + tl.arange(0, BLOCK)
        z = load_tile(z_ptr, start, vocab_size, BLOCK)
        grad = tile_gradient(z, at == token, m, c, inverse_s, mean_y, g, h)
        # Beyond the vocabulary π is 0 by value, but g·0 is not where g is NaN or infinite.
        grad = tl.where(at < vocab_size, grad, 0.0)
        store_tile(grad_ptr, start, grad, width, BLOCK)


@triton.jit
def write_zeros(grad_ptr, width, BLOCK: tl.constexpr):
    """A row of zeros, for rows that are masked or have no gradient."""
    zeros = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        store_tile(grad_ptr, start, zeros, width, BLOCK)
