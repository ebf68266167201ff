"""The file of one device: what separate calls measured alike stands together in it.

<device>.json = {"conditions": {...}, "rows": [...]}, written anew after every row, so that a call
that is cut off loses the row it was at. A row takes the place of the one with its op, shape and
dtype. Where device, versions or commit differ from the file's, the file begins anew.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

# What may differ between two calls that belong together.
PASSING = ("date", "free_gib")


def path(folder: Path, device: str, conditions: dict) -> Path:
    """cpu.json, or the GPU's name."""
    name = "cpu" if device == "cpu" else str(conditions["device"])
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def add(file: Path, conditions: dict, row: dict) -> None:
    """Put `row` into `file`."""
    rows = [old for old in _rows(file, conditions) if _name(old) != _name(row)]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps({"conditions": conditions, "rows": [*rows, row]}, indent=1) + "\n")
    os.replace(beside, file)


def _rows(file: Path, conditions: dict) -> list[dict]:
    """What the file holds, if it was measured under the same conditions."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    return found["rows"] if _lasting(found["conditions"]) == _lasting(conditions) else []


def _lasting(conditions: dict) -> dict:
    return {key: value for key, value in conditions.items() if key not in PASSING}


def _name(row: dict) -> tuple:
    return row["op"], tuple(row["shape"]), row["dtype"]
