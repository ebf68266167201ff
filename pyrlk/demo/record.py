"""The files of a run.

metrics.jsonl            one line a step, no wall-clock: the same seed gives the same bytes
timing.jsonl             one line a step, seconds
checkpoint.safetensors   the last completed step that was saved; replaced atomically
curve.svg .png           the picture
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Record:
    """Writes a run's files; `step` counts completed optimizer batches."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics_path = folder / "metrics.jsonl"
        self.timing_path = folder / "timing.jsonl"
        self.checkpoint_path = folder / "checkpoint.safetensors"

    def begin(self) -> None:
        """An empty run, whatever the folder held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint_path.unlink(missing_ok=True)
        for path in (self.metrics_path, self.timing_path):
            path.write_text("")

    def rewind(self, step: int) -> None:
        """Drop what was written after the checkpoint of `step`."""
        for path in (self.metrics_path, self.timing_path):
            kept = [line for line in read(path) if line.get("step", step + 1) <= step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def unfinished(self) -> bool:
        """Whether a checkpoint is there that no finished run has superseded."""
        if not self.checkpoint_path.exists():
            return False
        lines = read(self.metrics_path)
        return not lines or "heldout_after" not in lines[-1]

    def metrics(self, line: dict[str, Any]) -> None:
        _append(self.metrics_path, line)

    def timing(self, line: dict[str, Any]) -> None:
        _append(self.timing_path, line)

    def save(self, state: dict[str, Any]) -> None:
        temporary = self.checkpoint_path.with_suffix(".tmp")
        tensors: dict[str, Tensor] = {}
        form = json.dumps(_split(state, tensors))
        save_file(tensors, temporary, metadata={"state": form})
        os.replace(temporary, self.checkpoint_path)

    def load(self) -> dict[str, Any]:
        with safe_open(self.checkpoint_path, framework="pt") as file:
            return _join(json.loads(file.metadata()["state"]), file)


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON, its tensors put aside under their numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # Each a copy: the file takes no two that share memory (tied weights).
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[_split(k, tensors), _split(v, tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_split(v, tensors) for v in value]}
    return value


def _join(form: Any, file: Any) -> Any:
    """The inverse of `_split`."""
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {_join(k, file): _join(v, file) for k, v in content}
    values = [_join(v, file) for v in content]
    return values if kind == "list" else tuple(values)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that a killed process left half written is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
