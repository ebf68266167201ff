"""`pyrlk weights plan MODEL`: the buckets and the memory of an update, before anything runs.

names, shapes, dtypes   safetensors headers, else config.json and transformers on meta tensors
staging                 buffers · largest bucket, on each side of the hand-over the same memory
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch

from . import gather, manifest
from . import layout as layouts


def plan_of(model: str | os.PathLike[str], bucket_bytes: int) -> tuple[layouts.Layout, str]:
    """The layout of a full update of a local checkpoint, and where its names were read.

    Raises
    ------
    ValueError
        The folder holds neither safetensors files nor a config.json that transformers knows.
    """
    folder = Path(model)
    table, source = manifest.checkpoint(str(folder)), "safetensors headers"
    if table is None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no safetensors files and no config.json")
        table, source = _from_config(folder), "config.json"
    specs = [layouts.Spec(name, tuple(t.shape), t.dtype) for name, t in table.items()]
    for spec in specs:
        if not layouts.supported(spec.dtype):
            raise ValueError(f"{spec.name!r} has dtype {spec.dtype}, which has no code on the wire")
    return layouts.plan(specs, bucket_bytes), source


def describe(layout: layouts.Layout, source: str, bucket_bytes: int, buffers: int) -> str:
    """The layout in words and a table."""
    count = len(layout.entries)
    slots = min(buffers, len(layout.buckets))
    lines = [
        f"{count:,} tensors, {layout.nbytes:,} bytes (from {source})",
        f"{len(layout.buckets)} buckets of at most {bucket_bytes:,} bytes",
        f"peak staging memory: {layout.peak_bytes(buffers):,} bytes ({slots} × "
        f"{layout.slot_bytes:,}), shared by both processes",
        "all or nothing: " + ("yes" if len(layout.buckets) <= buffers else _larger(layout)),
        "",
        f"{'bucket':>6}  {'tensors':>8}  {'bytes':>15}  first tensor",
    ]
    for number, (pieces, nbytes) in enumerate(zip(layout.pieces, layout.buckets, strict=True)):
        first = layout.entries[pieces[0]].name
        over = "  larger than bucket_bytes" if nbytes > bucket_bytes else ""
        lines.append(f"{number:>6}  {len(pieces):>8,}  {nbytes:>15,}  {first}{over}")
    return "\n".join(lines)


def _larger(layout: layouts.Layout) -> str:
    return f"no; it would take buffers={len(layout.buckets)}, or larger buckets"


def _from_config(folder: Path) -> dict[str, torch.Tensor]:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            f"{folder} holds no safetensors files; reading config.json needs transformers "
            '(pip install "pyrlk[demo]")'
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    return gather.saved_forms(model)
