"""What the user sees while it runs: one bar a phase, and a line every tenth step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from .config import Config

LINE_EVERY = 10


class Progress:
    """A context manager; without a terminal only the lines are printed."""

    def __init__(self, config: Config):
        self._config = config
        self._console = Console(highlight=False)
        self._bars = Bars(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._warm_up: Any = None
        self._steps: Any = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def warm_up(self, step: int, pass_at_16: float) -> None:
        if self._warm_up is None:
            total = self._config.warmup_steps
            self._warm_up = self._bars.add_task("warm-up", total=total, state="")
        self._bars.update(self._warm_up, completed=step, state=f"pass@16 {pass_at_16:.2f}")

    def step(self, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """After a completed step."""
        state = _state(metrics, seconds)
        if self._steps is None:
            if self._warm_up is not None:
                self._bars.stop_task(self._warm_up)
            total = self._config.steps
            self._steps = self._bars.add_task(self._config.algorithm, total=total, state="")
        self._bars.update(self._steps, completed=metrics["step"], state=state)
        if "heldout" in metrics:
            self.note(
                f"held-out accuracy of version {metrics['version']}: {metrics['heldout']:.3f}"
            )
        if metrics["step"] % LINE_EVERY == 0:
            self.note(f"step {metrics['step']:>4}  {state}")


def _state(metrics: dict[str, Any], seconds: dict[str, float]) -> str:
    reward = "   –" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
    clip = metrics["clip_low"] + metrics["clip_high"]
    return (
        f"reward {reward}  entropy {metrics['entropy']:.2f}  clip {clip:.3f}  "
        f"kept {metrics['kept']}/{metrics['generated']}  update {seconds['sync'] * 1e3:.1f} ms"
    )
