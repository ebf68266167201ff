"""`pyrlk bench`: every op against its limit and its peers, in one run, interleaved and warm."""

from __future__ import annotations

import argparse
import importlib
import traceback
from pathlib import Path

OPS = ("policy_loss", "score", "scaling", "linear", "sample", "verify", "pack", "update", "gather")
TUNING = ("schedules", "cooperative")  # by name alone: what a maintainer measures


def main(argv: list[str] | None = None) -> int:
    """Runs the benches named on the command line; prints a table and writes JSON on request."""
    import torch

    from . import measure, record, table

    parser = argparse.ArgumentParser(prog="pyrlk bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--op", choices=OPS + TUNING, action="append", help=f"repeatable; default: {', '.join(OPS)}"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: a check, not a figure")
    parser.add_argument(
        "--write", metavar="FOLDER", type=Path, help="also write <device>.json there, row by row"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; `pyrlk doctor` says why")
    facts = measure.conditions(args.device) | ({"quick": True} if args.quick else {})
    file = record.path(args.write, args.device, facts) if args.write else None
    rows: list[dict] = []
    broken = []
    for op in args.op or OPS:
        print(f"{op} …", flush=True)
        try:
            for row in importlib.import_module(f".{op}", __name__).main(args.device, args.quick):
                rows.append(row)
                if file:
                    record.add(file, facts, row)
        except Exception:  # the other ops are still worth their time
            traceback.print_exc()
            broken.append(op)
        measure.forget()
    print(table.markdown({"conditions": facts, "rows": rows}))
    if file and rows:
        print(f"written to {file}")
    if broken:
        print(f"ended by an error: {', '.join(broken)}")
    return 1 if broken or any("failed" in row for row in rows) else 0
