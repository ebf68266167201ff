"""Who works on a row: one program, or one for each of its groups of 16384 columns.

    rows         one program a row; it reads the row twice, the second time backwards
    split        two launches: every program takes the statistics of one group, then, knowing those
                 of its row, writes the gradient of one group: for few rows, which stay in cache
    cooperative  the same in one launch: a program keeps its group in registers and waits for its
                 neighbours, which run at the same time; memory is read once and written once

Programs meet in `exchange`, float32 [rows, parts, 4, 4] = (m, s, E, z_a) of every tile of a group.
Every reader combines them as `row.statistics` does: all three schedules give the same bits.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import row as _row
from .row import (
    GROUP,
    combine,
    combine_tiles,
    load_group_statistics,
    load_temperature,
    load_token_logit,
    no_statistics,
    row_offset,
    scale_of,
)

# Programs a multiprocessor: two hide each other's latency. Of those that wait for each other no
# more may be launched than run at once.
_PROGRAMS = {"rows": 2, "split": 0, "cooperative": 2}


class Schedule(NamedTuple):
    """A kind of the above, the programs a multiprocessor, and the stages of its first read.

    programs 0: one a row, None: the default. Of "rows" with two stages the next group is on its way
    to shared memory while one is computed, with three the one after it too.
    """

    kind: str
    programs: int | None = None
    stages: int = 1


def choose(rows: int, parts: int, processors: int) -> Schedule:
    """The schedule of so many rows of `parts` groups.

    Rows that fill at most half of the multiprocessors are split: the time of one row is then the
    time of all. Else a program takes rows as they come, two a multiprocessor: what those read
    backwards is mostly still in L2, and with one there is too little in flight to fill the memory.
    """
    if parts > 1 and 2 * rows <= processors:
        return Schedule("split")
    return Schedule("rows")


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the device of `x`; 1 under the interpreter."""
    if x.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _each(schedule: Schedule) -> int:
    """Programs a multiprocessor; 0: as many as there are."""
    return _PROGRAMS[schedule.kind] if schedule.programs is None else schedule.programs


def registers(schedule: Schedule) -> int:
    """The most a thread may have for that many programs to fit on a multiprocessor."""
    return min(255, 65536 // (256 * (_each(schedule) or 2)) // 8 * 8)


def programs(schedule: Schedule, rows: int, parts: int, x: torch.Tensor) -> int:
    """The number of programs of the launch that writes the gradient."""
    room = _each(schedule) * processors(x)
    if schedule.kind == "rows":
        return min(rows, room) if room else rows
    if schedule.kind == "split":
        return rows * parts
    if parts > room:
        raise ValueError(f"cooperative: a row has {parts} groups, {room} programs run at once")
    return min(rows, room // parts) * parts


@triton.jit
def publish(exchange_ptr, item, m, s, e, z_token):
    """Write what a program knows of the tiles of its group, past the L1 cache."""
    to_ptr = exchange_ptr + (item * GROUP + tl.arange(0, GROUP)) * 4
    tl.store(to_ptr, m, cache_modifier=".cg")
    tl.store(to_ptr + 1, s, cache_modifier=".cg")
    tl.store(to_ptr + 2, e, cache_modifier=".cg")
    tl.store(to_ptr + 3, z_token, cache_modifier=".cg")


@triton.jit
def meet(arrived_ptr, row, parts):
    """Wait until all programs of a row have published; they must be running at the same time.

    The barrier and the release order what any thread of this program wrote before the count; the
    acquire, and the barrier with which its result is handed round, order all reads after it.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr + row, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived_ptr + row, 0, sem="acquire", scope="gpu") < parts:
        pass


@triton.jit
def collect(exchange_ptr, row, parts, c, ENTROPY: tl.constexpr):
    """(m, s, E, z_a) of a row from the tiles of its groups."""
    m, s, e = no_statistics()
    row_ptr = exchange_ptr + row * parts * (GROUP * 4)
    from_ptr = row_ptr + tl.arange(0, GROUP) * 4
    for _part in range(parts):
        group_m = tl.load(from_ptr, cache_modifier=".cg")
        group_s = tl.load(from_ptr + 1, cache_modifier=".cg")
        group_e = tl.load(from_ptr + 2, cache_modifier=".cg")
        m, s, e = combine(m, s, e, group_m, group_s, group_e, c, ENTROPY)
        from_ptr += GROUP * 4
    m, s, e = combine_tiles(m, s, e, c, ENTROPY)
    return m, s, e, tl.load(row_ptr + 3, cache_modifier=".cg")


@triton.jit(
    do_not_specialize=["parts", "inner", "stride_outer", "stride_inner", "vocab_size", "width"],
    do_not_specialize_on_alignment=["tokens_ptr", "weight_ptr", "temperature_ptr"],
)
def group_statistics_fwd_kernel(
    logits_ptr,
    tokens_ptr,
    weight_ptr,
    temperature_ptr,
    exchange_ptr,
    parts: tl.int32,
    inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    vocab_size: tl.int32,
    width: tl.int32,
    temperature,
    ENTROPY: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    row = item // parts
    token = tl.load(tokens_ptr + row)
    counted = token != -100
    if weight_ptr is not None:
        counted = counted & (tl.load(weight_ptr + row) != 0.0)
    if counted:
        c = scale_of(load_temperature(temperature_ptr, temperature, row))
        z_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner, ALIGN)
        start = (item % parts).to(tl.int32) * GROUP * BLOCK
        m, s, e = load_group_statistics(
            z_ptr, start, vocab_size, width, c, TAIL, ENTROPY, "evict_last", BLOCK
        )
        publish(exchange_ptr, item, m, s, e, load_token_logit(z_ptr, token, vocab_size))


def empty_exchange(logits: torch.Tensor) -> torch.Tensor:
    """Room for (m, s, E, z_a) of every tile of every group."""
    rows, width = math.prod(logits.shape[:-1]), logits.shape[-1]
    return logits.new_empty((rows, _row.parts(width), GROUP.value, 4), dtype=torch.float32)


def group_statistics_fwd(logits, tokens, weight, temperature, vocab_size, entropy) -> torch.Tensor:
    """The exchange of a split schedule, of every counted row."""
    r, parts = _row.rows(logits), _row.parts(logits.shape[-1])
    temperature_ptr, number = _row.split_temperature(temperature)
    exchange = empty_exchange(logits)
    group_statistics_fwd_kernel[(r.count * parts,)](
        logits,
        tokens,
        weight,
        temperature_ptr,
        exchange,
        parts,
        r.inner,
        r.stride_outer,
        r.stride_inner,
        vocab_size,
        logits.shape[-1],
        number,
        ENTROPY=entropy,
        ALIGN=r.align,
        TAIL=r.tail,
        BLOCK=_row.TILE,
        **_row.launch(logits),
    )
    return exchange
