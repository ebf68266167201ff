"""`pyrlk bench`: every op against its limit and its peers, in one run, interleaved and warm."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

OPS = ("policy_loss", "score", "scaling", "linear", "sample", "verify", "pack", "update", "gather")
TUNING = ("schedules",)  # by name alone: what a maintainer measures


def main(argv: list[str] | None = None) -> int:
    """Runs the benches named on the command line; prints a table and writes JSON on request."""
    import importlib

    import torch

    from . import measure, table

    parser = argparse.ArgumentParser(prog="pyrlk bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--op", choices=OPS + TUNING, action="append", help=f"repeatable; default: {', '.join(OPS)}"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: a check, not a figure")
    parser.add_argument("--write", metavar="FOLDER", help="also write <device>.json there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; `pyrlk doctor` says why")
    rows: list[dict] = []
    for op in args.op or OPS:
        print(f"{op} …", flush=True)
        rows += importlib.import_module(f".{op}", __name__).main(args.device, args.quick)
    facts = measure.conditions(args.device)
    result = {"conditions": facts, "rows": rows}
    print(table.markdown(result))
    if args.write:
        name = "cpu" if args.device == "cpu" else str(facts["device"])
        file = Path(args.write) / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {file}")
    return 1 if any("failed" in row for row in rows) else 0
