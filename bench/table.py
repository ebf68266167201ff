"""Results as tables: the terminal's, and the README's between its two markers.

python -m pyrlk.bench.table README.md bench/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .peers import said

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def markdown(result: dict) -> str:
    """One device's results as a markdown table under a line of conditions."""
    facts = result["conditions"]
    where = ", ".join(
        f"{key} {facts[key]}"
        for key in ("isa", "threads", "driver", "torch", "triton", "sglang", "python", "date")
        if key in facts
    )
    lines = [
        f"{facts['device']}: {where}; commit `{facts['commit']}`. "
        "Medians of interleaved, warm rounds.",
        "",
        "| op | shape | dtype | ms | against | max error |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines += [f"| {' | '.join(cells)} |" for cells in _cells(row)]
    return "\n".join(lines)


def _cells(row: dict) -> list[list[str]]:
    shape, dtype = "×".join(map(str, row["shape"])), row["dtype"]
    if "failed" in row:
        return [[row["op"], shape, dtype, "—", row["failed"], "—"]]
    if "points" in row:
        return [_growth(row)]
    if "first_ms" in row:
        against = (
            f"{row['first_over_again']:.2f}× the calls after it (slowest first call "
            f"{row['slowest_first_ms']:.2f} ms); torch.compile made {row['compiled_graphs']} "
            "graph(s) of all"
        )
        first, error = f"{row['first_ms']:.2f}", f"{row['loss_error']:.1e}"
        return [[row["op"], shape, dtype, first, against, error]]
    ms = {side: f"{t['ms']:.2f}" for side, t in row["times"].items()}
    if row["op"] == "SGLang update":
        return _engine_update(row, ms)
    if "replay" in ms:
        against = f"the engine's load_weights takes {row['load_weights_over_replay']:.0f}×"
        op = "replay in the engine, small tensors"
        return [[op, shape, dtype, ms["replay"], against, "bit-exact"]]
    if "off" in ms:
        mode = {"off": "replay without sums", "copy": "replay with sums"}
        return [
            [name, shape, dtype, ms[side], f"{row[f'{side}_over_memcpy']:.2f}× memcpy", "bit-exact"]
            for side, name in mode.items()
        ]
    if "inplace" in ms:
        error = f"{row['gradient_error']:.1e}"
        peers = ""
        if "compile_over_drop_in" in row:
            peers = (
                f"; torch.compile takes {row['compile_over_drop_in']:.1f}×, "
                f"eager {row['eager_over_drop_in']:.1f}×{said(row)}"
            )
        return [
            [f"{row['op']}, in place", shape, dtype, ms["inplace"],
             f"{row['inplace_over_copy']:.2f}× a warm copy", error],
            [f"{row['op']}, drop-in", shape, dtype, ms["drop_in"],
             f"{row['drop_in_over_fresh']:.2f}× allocate + copy{peers}", error],
        ]  # fmt: skip
    if "kernel" in ms:
        kernel = f"{row['times']['kernel']['ms']:.4f}"
        ratio = f"{row['over_copy']:.2f}× a warm copy"
        return [[row["op"], shape, dtype, kernel, ratio, f"{row['gradient_error']:.1e}"]]
    if "linear" in ms:
        memory = row["unfused_peak_bytes"] / max(1, row["linear_peak_bytes"])
        ratio = (
            f"{row['linear_over_products']:.2f}× its three products; all logits at once take "
            f"{row['unfused_over_linear']:.2f}×, and {memory:.1f}× the memory{said(row)}"
        )
        return [[row["op"], shape, dtype, ms["linear"], ratio, f"{row['gradient_error']:.1e}"]]
    if "product" in ms:
        ratio = (
            f"{row['scores_over_product']:.2f}× its product; all logits at once take "
            f"{row['unfused_over_scores']:.2f}×{said(row)}"
        )
        return [[row["op"], shape, dtype, ms["scores"], ratio, f"{row['score_error']:.1e}"]]
    if "memcpy" in ms:
        rate = f"memcpy takes {row['memcpy_over_pack']:.2f}×; {row['gb_per_s']:.1f} GB/s"
        plain = f"memcpy takes {row['memcpy_over_pack_no_sum']:.2f}×"
        return [
            [f"{row['op']} with sums", shape, dtype, ms["pack"], rate, "bit-exact"],
            [f"{row['op']} without", shape, dtype, ms["pack_no_sum"], plain, "bit-exact"],
        ]
    if "mapping" in ms:
        stages = f"plan {ms['plan']}, check {ms['check']}, copy {ms['copy']} ms"
        return [[row["op"], shape, dtype, ms["module"], stages, "bit-exact"]]
    if "direct" in ms:
        ways = {
            "direct": "direct",
            "unverified": "direct, verify off",
            "staged": "staged",
            "bucket": "flattened buckets by torch",
            "per_tensor": "a tensor at a time by torch",
        }
        return [
            [f"{row['op']}, {way}", shape, dtype, ms[side],
             f"{row[f'{side}_over_copy']:.2f}× a plain copy of {row['bytes'] / 1e9:.2f} GB",
             "bit-exact"]
            for side, way in ways.items() if side in ms
        ]  # fmt: skip
    if "per_tensor" in ms:
        against = (
            f"a collective a tensor takes {row['per_tensor_over_gather']:.1f}×; with an engine as "
            f"slow as the network {row['overlapped_over_slowest_stage']:.2f}× the slowest stage"
        )
        name = f"{row['op']}, {row['ranks']} gloo ranks"
        return [[name, shape, dtype, ms["gather"], against, "bit-exact"]]
    if "score" in ms:
        ratio = (
            f"{row['score_over_copy']:.2f}× a warm copy; torch.compile takes "
            f"{row['compile_over_score']:.1f}×, eager {row['eager_over_score']:.1f}×{said(row)}"
        )
        return [[row["op"], shape, dtype, ms["score"], ratio, f"{row['score_error']:.1e}"]]
    if "verify" in ms:
        ratio = (
            f"{row['verify_over_copy']:.2f}× a warm copy of the target; torch takes "
            f"{row['torch_over_verify']:.0f}×{_graph(row)}"
        )
        return [[row["op"], shape, dtype, ms["verify"], ratio, f"{row['logprob_error']:.1e}"]]
    ratio = (
        f"{row['sample_over_copy']:.2f}× a warm copy; sorting in torch takes "
        f"{row['sort_over_sample']:.0f}×{said(row)}{_graph(row)}"
    )
    return [[row["op"], shape, dtype, ms["sample"], ratio, f"{row['logprob_error']:.1e}"]]


def _graph(row: dict) -> str:
    """The time of a replay, where the op was captured: microseconds matter there."""
    graph = row["times"].get("graph")
    return f"; {1e3 * graph['ms']:.1f} µs in a CUDA graph" if graph else ""


def _engine_update(row: dict, ms: dict[str, str]) -> list[list[str]]:
    """Whole updates of a server, floors included."""
    shape, dtype = "×".join(map(str, row["shape"])), row["dtype"]
    against = {
        "plan": f"above its floor {row['plan_net_over_bucket_net']:.2f}× bucket mode; SGLang's own "
        f"way takes {row['sglang_over_plan']:.1f}×",
        "bucket": f"SGLang's own way takes {row['sglang_over_bucket']:.1f}×",
        "sglang": "a fresh flattened bucket",
    }
    parts = {"pack": "pack", "hand-over": "hand-over", "load": "load"}
    lines = []
    for side, text in against.items():
        taken = row["stages"].get(side, {})
        split = ", ".join(f"{name} {taken[key]:.1f}" for key, name in parts.items() if key in taken)
        if split:
            text = f"floor {ms[f'{side}-floor']}, {split} ms; {text}"
        lines.append([f"SGLang update, {side}", shape, dtype, ms[side], text, "bit-exact"])
    return lines


def _growth(row: dict) -> list[str]:
    """Times of the smallest and the largest shape, and how far all large ones are from a line."""
    points = row["points"]
    sizes = [p["shape"][0] * p["shape"][1] for p in points]
    large = [p["over_linear"] for p, n in zip(points, sizes, strict=True) if n >= 1 << 20]
    against = (
        f"{min(large):.2f} … {max(large):.2f}× a line through 0, from 2^20 elements on"
        if large
        else "too small for a line"
    )
    first, last = points[0], points[-1]
    return [
        row["op"],
        f"{'×'.join(map(str, first['shape']))} … {'×'.join(map(str, last['shape']))}",
        row["dtype"],
        f"{first['ms']:.2f} … {last['ms']:.2f}",
        against,
        f"{row['loss_error']:.1e}",
    ]


def write_readme(readme: Path, results: Path) -> None:
    """Replaces what stands between the markers by the tables of every file in `results`."""
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme} has no {BEGIN} … {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    tables = [markdown(json.loads(f.read_text())) for f in sorted(results.glob("*.json"))]
    readme.write_text(f"{head}{BEGIN}\n" + "\n\n".join(tables) + f"\n{END}{tail}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m pyrlk.bench.table README.md bench/results")
    write_readme(Path(sys.argv[1]), Path(sys.argv[2]))
