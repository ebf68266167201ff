"""The picture of a run: reward, entropy, clip fraction, kept groups, update time over the steps."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .record import Record, read

_BLUE, _ORANGE, _GREY = "#2a6f97", "#e07a2f", "#8a8a8a"
# No dates, no random ids: the same metrics draw the same file.
_STYLE: Any = {
    "svg.hashsalt": "pyrlk",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def picture(record: Record) -> None:
    """Draw a run from its two files."""
    lines = read(record.metrics_path)
    steps = [line for line in lines if line.get("step", 0) > 0]
    timing = [line for line in read(record.timing_path) if line.get("step", 0) > 0]
    if not steps:
        return
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(5, 1, figsize=(6.4, 7.6), sharex=True, layout="constrained")
        _rewards(axes[0], steps, lines[-1])
        axes[1].plot(_column(steps, "step"), _column(steps, "entropy"), color=_BLUE)
        _label(axes[1], "entropy", "nats a token")
        _clips(axes[2], steps)
        _kept(axes[3], steps)
        axes[4].plot(
            _column(timing, "step"), [line["sync"] * 1e3 for line in timing], color=_BLUE, lw=1
        )
        axes[4].set_ylim(bottom=0)
        _label(axes[4], "weight update", "ms")
        axes[4].set_xlabel("step")
        axes[4].margins(x=0.01)
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
            path = record.folder / f"curve{suffix}"
            figure.savefig(path, dpi=160, metadata=metadata)
        plt.close(figure)


def _rewards(ax, steps: list[dict[str, Any]], last: dict[str, Any]) -> None:
    ax.plot(_column(steps, "step"), _column(steps, "reward"), color=_BLUE, label="rollouts")
    judged = [(s["version"], s["heldout"]) for s in steps if "heldout" in s]
    if "heldout_after" in last:
        judged.append((last["version"], last["heldout_after"]))
    if judged:
        ax.plot(*zip(*judged, strict=True), "o", ms=4, color=_ORANGE, label="held-out, greedy")
    ax.set_ylim(0, 1.03)
    ax.legend(loc="lower right")
    _label(ax, "reward", "share correct")


def _clips(ax, steps: list[dict[str, Any]]) -> None:
    ax.plot(_column(steps, "step"), _column(steps, "clip_high"), color=_BLUE, lw=1, label="above")
    ax.plot(_column(steps, "step"), _column(steps, "clip_low"), color=_ORANGE, lw=1, label="below")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right", ncols=2)
    _label(ax, "clip fraction", "of tokens")


def _kept(ax, steps: list[dict[str, Any]]) -> None:
    at = _column(steps, "step")
    ax.bar(at, _column(steps, "generated"), width=1, color="#dcdcdc", label="generated")
    ax.bar(at, _column(steps, "kept"), width=1, color=_BLUE, label="kept")
    ax.legend(loc="upper left", ncols=2)
    _label(ax, "kept groups", "a step")


def _label(ax, title: str, unit: str) -> None:
    ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
    ax.set_ylabel(unit, color=_GREY)


def _column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [float("nan") if line[name] is None else line[name] for line in lines]
