"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, access widths.

    python bench/static_report.py [--json PATH] [--target sm_90 …] [--dtype bf16 …]

Compiles ahead of time for each target and reads the result: cubins by cuobjdump (it ships in the
triton wheel), AMD code by its own metadata. Global loads and stores are counted by their bits.

A sweep is the straight code that takes one whole group of columns (row.py): its bytes and its
instructions are counted an element. What a later sweep reads again is meant to come from L2 (rows)
or lies there (split); a cooperative program keeps it in registers and has nothing to read again.

A trip is the shortest way round a loop that takes one tile, the sampler's: its instructions an
element.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyrlk.bench.sass import Sweep, find_sweeps, shortest_trip
from pyrlk.triton_kernels import (
    kept,
    logprob,
    pack,
    policy_loss,
    row,
    sample,
    schedule,
    speculative,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}

_INT64 = (
    "tokens_ptr",
    "token_ptr",
    "top_k_ptr",
    "seed_ptr",
    "position_ptr",
    "masses_ptr",
    "draft_masses_ptr",
    "draft_tokens_ptr",
    "residual_ptr",
    "table_ptr",
    "sums_ptr",
)
_INT32 = (
    "kept_ptr",
    "ids_ptr",
    "allowed_ptr",
    "hits_ptr",
    "found_ptr",
    "accepted_ptr",
    "refused_ptr",
    "support_ids_ptr",
    "arrived_ptr",
    "owner_ptr",
)
_POINTERS = (
    dict.fromkeys(_INT64, "*i64")
    | dict.fromkeys(_INT32, "*i32")
    | {"offsets_ptr": "*i64", "bits_ptr": "*i32", "status_ptr": "*u8"}
)
_LOGITS = ("logits_ptr", "draft_logits_ptr", "grad_ptr", "x_ptr")
_SCRATCH = ("spans_ptr", "list_ptr")  # some of a row's logits

_FREE = {"allowed_ptr": None}
_SEARCH = _FREE | {"BLOCK": sample.CHUNK}
_VERIFY = _SEARCH | {"EXACT": False}
_ONE_HOT = {"draft_logits_ptr": None, "draft_tiles_ptr": None, "draft_masses_ptr": None}
_DENSE = {"ids_ptr": None, "offsets_ptr": None}
_ROWS = {"SCHEDULE": "rows", "exchange_ptr": None, "arrived_ptr": None}
_SPLIT = {"SCHEDULE": "split", "arrived_ptr": None}
_COOPERATIVE = {"SCHEDULE": "cooperative"}
_NUMBER = {"temperature_ptr": None}
_DAPO = _NUMBER | {
    "ref_logprobs_ptr": None,
    "entropy_ptr": None,
    "CLIPPED": True,
    "KL": 0,
    "KL_IMPORTANCE": False,
    "ENTROPY": False,
    "ENTROPY_BONUS": False,
}
_ALL = {"CLIPPED": True, "KL": 3, "KL_IMPORTANCE": True, "ENTROPY": True, "ENTROPY_BONUS": True}
_REINFORCE = _DAPO | {"CLIPPED": False, "old_logprobs_ptr": None}

_PACK = {"CHUNK": pack.CHUNK, "BLOCK": pack.BLOCK, "WORDS": pack.WORDS}
_LOSS = policy_loss.policy_loss_fwd_kernel
_SCORE, _SCORE_BACK = logprob.token_logprobs_fwd_kernel, logprob.token_logprobs_bwd_kernel
_ALONE = _NUMBER | {"exchange_ptr": None}

# One entry a shape of code that users run: name, kernel, what is None or constant in it.
VARIANTS: list[tuple] = [
    ("token_logprobs_fwd", _SCORE, _DENSE | _ALONE | {"entropy_ptr": None}),
    ("token_logprobs_fwd entropy", _SCORE, _DENSE | _ALONE),
    ("token_logprobs_fwd entropy, 2 stages", _SCORE, _DENSE | _ALONE | {"STAGES": 2}),
    ("token_logprobs_fwd kept", _SCORE, _ALONE),
    ("token_logprobs_bwd", _SCORE_BACK, _DENSE | _NUMBER | {"grad_entropy_ptr": None}),
    ("token_logprobs_bwd entropy", _SCORE_BACK, _DENSE | _NUMBER),
    ("token_logprobs_bwd kept", _SCORE_BACK, _NUMBER),
    ("group_statistics_fwd", schedule.group_statistics_fwd_kernel, _NUMBER | {"ENTROPY": False}),
    ("policy_loss_fwd dapo rows", _LOSS, _DENSE | _DAPO | _ROWS),
    ("policy_loss_fwd dapo split", _LOSS, _DENSE | _DAPO | _SPLIT),
    ("policy_loss_fwd dapo cooperative", _LOSS, _DENSE | _DAPO | _COOPERATIVE),
    ("policy_loss_fwd all rows", _LOSS, _DENSE | _ALL | _ROWS),
    ("policy_loss_fwd all cooperative", _LOSS, _DENSE | _ALL | _COOPERATIVE),
    ("policy_loss_fwd all kept", _LOSS, _ALL | _ROWS),
    ("policy_loss_fwd dapo rows, 2 stages", _LOSS, _DENSE | _DAPO | _ROWS | {"STAGES": 2}),
    ("policy_loss_fwd reinforce rows", _LOSS, _DENSE | _REINFORCE | _ROWS),
    ("scale_fwd", policy_loss.scale_fwd_kernel, {}),
    ("sample_tiles_fwd", sample.sample_tiles_fwd_kernel, _FREE),
    ("sample_tiles_fwd allowed", sample.sample_tiles_fwd_kernel, {}),
    ("sample_masses_fwd", sample.sample_masses_fwd_kernel, _FREE),
    ("sample_fwd", sample.sample_fwd_kernel, _SEARCH | {"EXACT": False}),
    ("sample_fwd exact", sample.sample_fwd_kernel, _SEARCH | {"EXACT": True}),
    ("support_fwd", sample.support_fwd_kernel, _FREE | {"BLOCK": row.TILE // 2}),
    ("verify_accept_fwd", speculative.verify_accept_fwd_kernel, _VERIFY),
    ("verify_residual_fwd", speculative.verify_residual_fwd_kernel, _VERIFY),
    ("verify_residual_fwd one-hot", speculative.verify_residual_fwd_kernel, _VERIFY | _ONE_HOT),
    ("verify_draw_fwd", speculative.verify_draw_fwd_kernel, _VERIFY),
    ("pack_fwd", pack.pack_fwd_kernel, _PACK | {"COPY": True, "SUM": True}),
    ("pack_fwd sums", pack.pack_fwd_kernel, _PACK | {"COPY": False, "SUM": True}),
    ("pack_fwd copy", pack.pack_fwd_kernel, _PACK | {"COPY": True, "SUM": False}),
]


@dataclasses.dataclass
class Entry:
    """One kernel on one target. loads, stores: {bits: number of instructions} to global memory."""

    kernel: str
    target: str
    dtype: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    sweeps: list[Sweep]  # empty for AMD
    offset_bits: int  # of the narrowest product in the offset of a row
    trip: float  # of a sampler kernel; 0 on AMD


def compile_kernel(kernel, constants: dict, target: str, dtype: str, aligned: bool = True):
    """The kernel as its launcher would compile it for logits of a dtype, 16-byte aligned or not."""
    vector = 16 // ITEM[dtype] if aligned else 1
    constants = {
        "ALIGN": vector,
        "GRAD_ALIGN": vector,
        "DRAFT_ALIGN": vector,
        "TAIL": vector,
        "BLOCK": row.TILE,
        "KEPT": kept.TILE,
        "STAGES": 1,
        "SHIFT": {"fp32": 0, "fp16": 13, "bf16": 16}[dtype],
        "TILE": row.TILE,
        "SPAN": sample.SPAN,
        "CAPACITY": sample.CAPACITY,
        "MAX_TILES": sample.MAX_TILES,
        "JOINT": False,
        "KEEP_TIES": False,
    } | constants
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in _LOGITS + _SCRATCH:
            signature[name] = f"*{dtype}"
            if aligned:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, "*fp32")
        else:
            signature[name] = parameter.annotation_type or "fp32"
    capability = TARGETS[target].arch if target.startswith("sm_") else 0
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = launch_options(kernel, constants, capability)
    return triton.compile(source, target=TARGETS[target], options=options)


def launch_options(kernel, constants: dict, capability: int) -> dict:
    """What its launcher adds to the arguments."""
    if kernel is pack.pack_fwd_kernel:
        return pack.LAUNCH
    if kernel is sample.sample_tiles_fwd_kernel:
        return sample.tiles_options(capability)
    if kernel is speculative.verify_accept_fwd_kernel:
        return row.options(capability, speculative.ACCEPT_WARPS)
    if kernel is sample.sample_fwd_kernel or kernel.__module__ == speculative.__name__:
        return row.options(capability, **sample.SEARCH)
    if kernel in (_LOSS, _SCORE) and "ids_ptr" not in constants:
        return row.options(capability, registers=kept.REGISTERS)
    return row.options(capability)


def inspect_kernel(name, kernel, constants: dict, target: str, dtype: str, aligned=True) -> Entry:
    compiled = compile_kernel(kernel, constants, target, dtype, aligned)
    read = _read_amd if "amdgcn" in compiled.asm else _read_nvidia
    registers, spills, loads, stores, sweeps, trip = read(compiled)
    block = constants.get("BLOCK", row.TILE)
    trip *= compiled.metadata.num_warps * 32 / block * (kernel.__module__ == sample.__name__)
    shared = compiled.metadata.shared
    bits = row_offset_bits(compiled.asm["ttir"])
    return Entry(
        name, target, dtype, registers, spills, shared, loads, stores, sweeps, bits, round(trip, 1)
    )


def row_offset_bits(ttir: str) -> int:
    """Bits of the narrowest product on the way to an offset from a V-sized base pointer."""
    made = {}
    for name, code in re.findall(r"(%[\w$.-]+) = (.*)", ttir):
        operation, *_ = code.split()
        made[name] = operation, re.findall(r"%[\w$.-]+", code), re.search(r": i(\d+)", code)
    bases = "|".join(f"%{name}" for name in _LOGITS)
    todo = re.findall(rf"tt\.addptr (?:{bases}), (%[\w$.-]+) :", ttir)
    widths = [64] if todo else []
    while todo:
        operation, operands, bits = made.get(todo.pop(), ("", [], None))
        if operation == "arith.muli":
            assert bits is not None
            widths.append(int(bits[1]))
        # Quotients and remainders are row numbers: there a product is none of the offset.
        if operation in ("arith.muli", "arith.addi", "arith.extsi"):
            todo += operands
    return min(widths, default=64)


def _read_nvidia(compiled):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = _number(r"REG:(\d+)", usage)
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    sweeps = find_sweeps(sass, row.GROUP.value * row.TILE // (row.options(0)["num_warps"] * 32))
    widths = _widths(sass, "LDG(?:STS)?"), _widths(sass, "STG")
    return registers, spills, *widths, sweeps, shortest_trip(sass)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's listing has no {pattern}")
    return int(found[1])


def _widths(sass: str, opcode: str) -> dict[int, int]:
    found: collections.Counter[int] = collections.Counter()
    for suffixes in re.findall(rf"\b{opcode}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
        found[int(width[1]) if width else 32] += 1
    return dict(sorted(found.items(), reverse=True))


def _read_amd(compiled):
    text = compiled.asm["amdgcn"]

    def number(key):
        return _number(rf"\.{key}:\s+(\d+)", text)

    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}

    def widths(opcode):
        # A scalar access may come as a buffer_ instruction; both reach global memory.
        found = collections.Counter(
            bits.get(kind, 16 if "short" in kind else 8)
            for kind in re.findall(rf"\b(?:global|buffer)_{opcode}_(\w+)", text)
        )
        return dict(sorted(found.items(), reverse=True))

    # Scalar registers spill into lanes of a vector register, which costs no memory access.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spills, widths("load"), widths("store"), [], 0


def report(targets=tuple(TARGETS), dtypes=("fp32", "bf16"), only=None, aligned=True) -> list[Entry]:
    return [
        inspect_kernel(name, kernel, constants, target, dtype, aligned)
        for name, kernel, constants in VARIANTS
        if only in (None, name)
        for target in targets
        for dtype in dtypes
    ]


def _count(widths: dict[int, int]) -> str:
    return " ".join(f"{number}×{bits}" for bits, number in widths.items()) or "-"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(ITEM))
    parser.add_argument("--kernel", choices=[name for name, _, _ in VARIANTS])
    parser.add_argument("--unaligned", action="store_true", help="rows that start off 16 bytes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    entries = report(options.target, options.dtype, options.kernel, not options.unaligned)
    print(
        f"{'kernel':33} {'target':7} {'dtype':5} regs spills shared  "
        "sweeps: bytes read + written, instructions, an element"
    )
    for e in entries:
        sweeps = "; ".join(f"{s.read:g} + {s.written:g}, {s.instructions:.1f}" for s in e.sweeps)
        if e.trip:
            sweeps = f"trip of {e.trip}"
        print(
            f"{e.kernel:33} {e.target:7} {e.dtype:5} {e.registers:4} {e.spills:6} {e.shared:6}  "
            f"{sweeps or f'{_count(e.loads)} · {_count(e.stores)} (loads · stores, n×bits)'}"
        )
    if options.json:
        data = {
            "triton": triton.__version__,
            "options": row.options(90),
            "tile": row.TILE,
            "kernels": [
                dataclasses.asdict(e) | {"sweeps": [s._asdict() for s in e.sweeps]} for e in entries
            ],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
