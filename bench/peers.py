"""Other packages' kernels for the same work, timed beside ours where they are installed.

Liger, FlashInfer and TRL are asked for what a trainer would call, which need not be the same:
Liger knows one advantage a sequence, FlashInfer no log-prob.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .measure import Timing

Call = Callable[[], object]
PACKAGES = {"Liger": "liger-kernel", "FlashInfer": "flashinfer-python", "TRL": "trl"}


def usable(candidates: Mapping[str, Callable[[], Call]]) -> dict[str, Call]:
    """The calls whose package is installed and that run once, by name and version.

    A failure is printed, not raised.
    """
    sides = {}
    for name, make in candidates.items():
        try:
            version = importlib.metadata.version(PACKAGES[name])
            call = make()
            call()
        except ImportError:
            continue
        except Exception as error:  # whatever another package raises
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}")
            continue
        sides[f"{name} {version}"] = call
    return sides


def ratios(times: Mapping[str, Timing], sides: Mapping[str, Call], ours: str) -> dict[str, float]:
    """How many times as long as `ours` each takes."""
    return {name: times[name].over(times[ours]) for name in sides}


def said(row: dict) -> str:
    """The same, for a table."""
    return "".join(f", {name} {ratio:.1f}×" for name, ratio in row.get("peers", {}).items())


def liger_grpo(logits: Tensor, tokens: Tensor, old: Tensor) -> Call:
    """Its DAPO loss, forward + backward, of one sequence; it wants a row beyond the last token."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = torch.cat([logits, logits[:1]])[None].requires_grad_()
    advantages = torch.ones(1, device=logits.device)

    def step() -> None:
        loss, _ = triton_grpo_loss(
            leaf, old[None], None, tokens[None], advantages, temperature=1.0, beta=0.0,
            eps_low=0.2, eps_high=0.28, inplace=False, loss_type="dapo", reduce=True,
        )  # fmt: skip
        loss.backward()
        leaf.grad = None

    return step


def trl_scores(logits: Tensor, tokens: Tensor) -> Call:
    """Its log-probs and entropies: two reads."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def scores() -> tuple[Tensor, Tensor]:
        return selective_log_softmax(logits, tokens), entropy_from_logits(logits)

    return scores


def flashinfer_sampler(logits: Tensor, top_k: int, top_p: float) -> Call:
    """Its tokens; without log-probs and kept sets."""
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    if not logits.is_cuda:
        raise ImportError("FlashInfer needs CUDA")
    return lambda: top_k_top_p_sampling_from_logits(logits, top_k, top_p)
