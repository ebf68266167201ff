"""The names, shapes and dtypes that an engine expects, learnt before a byte is sent.

    expect=                           from the caller
    safetensors headers at model_path  what the engine itself was started from

SGLang skips a name that it does not know and says success, and a wrong shape ends its process: so
nothing is sent that is not in this table.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engine import check_names
from .errors import ManifestUnknown, UnknownName, Unsupported
from .layout import Layout

_MAX_HEADER = 100 << 20
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Manifest:
    """A table of names, or none; `source` is what a report says."""

    def __init__(self, source: str, table: dict[str, torch.Tensor] | None):
        self.source = source
        self._table = table

    def select(self, layout: Layout, partial: bool, dtype: torch.dtype | None) -> list[list[int]]:
        """Of each bucket, the entries to send; an unknown name of a known tensor is left out.

        `dtype` is the engine's own: floating tensors may come in it, or as the checkpoint has them.

        Raises
        ------
        UnknownName, MissingName, ShapeMismatch, DtypeMismatch
        """
        chosen: list[list[int]] = []
        for bucket in layout.members:
            chosen.append([])
            for sharing in bucket:
                known = [i for i in sharing if self._knows(layout.entries[i].name)]
                chosen[-1] += known or sharing
        if self._table is None:
            return chosen
        empty = [i for i, entry in enumerate(layout.entries) if not entry.nbytes]
        entries = tuple(layout.entries[i] for part in (*chosen, empty) for i in part)
        table = dict(self._table)
        for entry in entries:
            want = table.get(entry.name)
            if want is not None and entry.dtype == dtype and want.dtype.is_floating_point:
                table[entry.name] = torch.empty(want.shape, dtype=dtype, device="meta")
        reduced = Layout(entries, layout.buckets, layout.segments)
        check_names(reduced, table, partial, {name: (name,) for name in table})
        return chosen

    def _knows(self, name: str) -> bool:
        return self._table is None or name in self._table


def learn(
    expect: object, model_paths: Sequence[str], *, unchecked: bool, engine_checks: bool
) -> Manifest:
    """The manifest of an engine that was started from these checkpoints: a target's, a draft's.

    Raises
    ------
    ManifestUnknown
        Nothing says what the engine expects, and it will not say so itself.
    Unsupported
        A name has different shapes in the two checkpoints.
    """
    if expect is not None:
        return Manifest("expect", _given(expect))
    tables = [checkpoint(path) for path in dict.fromkeys(model_paths)]
    if tables and None not in tables:
        return Manifest("checkpoint", _together([t for t in tables if t is not None]))
    if engine_checks:
        return Manifest("engine", None)
    if unchecked:
        return Manifest("unchecked", None)
    raise ManifestUnknown(
        f"no safetensors file can be read at {' and '.join(map(repr, model_paths))}, the server's "
        "model_path: pass SGLang(url, expect={name: tensor or meta tensor}), or "
        "unchecked_names=True to send unchecked (a wrong shape then ends the server)"
    )


def _together(tables: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One update goes to the target and to the draft: a name means the same in both."""
    whole: dict[str, torch.Tensor] = {}
    for table in tables:
        for name, tensor in table.items():
            if whole.setdefault(name, tensor).shape != tensor.shape:
                raise Unsupported(
                    f"{name!r} has shape {tuple(whole[name].shape)} in the target's checkpoint and "
                    f"{tuple(tensor.shape)} in the draft's: update one after the other, with "
                    'selector="target" and selector="draft"'
                )
    return whole


def _given(expect: object) -> dict[str, torch.Tensor]:
    if isinstance(expect, nn.Module):
        expect = expect.state_dict()
    if not isinstance(expect, Mapping):
        raise TypeError(
            f"expect must map names to tensors (meta ones will do), got {type(expect).__name__}"
        )
    for name, tensor in expect.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expect: {name!r} is a {type(tensor).__name__}, wanted a Tensor")
    return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in expect.items()}


def checkpoint(model_path: str) -> dict[str, torch.Tensor] | None:
    """What the safetensors files of a folder hold; None where there are none to read."""
    if not model_path or not os.path.isdir(model_path):
        return None
    folder = Path(model_path)
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = {
                folder / Path(f).name for f in json.loads(index.read_text())["weight_map"].values()
            }
        else:
            files = set(folder.glob("*.safetensors"))
        table: dict[str, torch.Tensor] = {}
        for file in sorted(files):
            table.update(_header(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return table or None


def _header(file: Path) -> dict[str, torch.Tensor]:
    """u64 length, then JSON: name → {dtype, shape, data_offsets}."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER:
            raise ValueError("header too long")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: torch.empty(tuple(e["shape"]), dtype=_DTYPES[e["dtype"]], device="meta")
        for name, e in header.items()
    }


def engine_dtype(name: str) -> torch.dtype | None:
    """torch's dtype of --dtype; None for "auto" and what else SGLang may take."""
    found = {"half": torch.float16, "float": torch.float32}.get(name) or getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def unread(names: list[str]) -> UnknownName:
    some = ", ".join(repr(n) for n in names[:5]) + (", …" if len(names) > 5 else "")
    return UnknownName(
        f"load_weights of the engine reads nothing of {some} ({len(names)} tensors): send the "
        "names of its checkpoint"
    )
