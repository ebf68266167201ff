"""Other packages' kernels for the same work, timed beside ours where they are installed.

Each is asked for what a trainer would call, and left out where its values are not ours:

    Liger        its DAPO loss; it knows one advantage a sequence, here 1
    QuACK        log-probs by its cross_entropy, clipped in torch: dapo_loss; in place too
    QuACK        its chunked linear cross-entropy, which is REINFORCE with every advantage 1
    CCE          log-probs by its linear cross-entropy, clipped in torch: linear_policy_loss. As it
                 comes it skips small entries of the gradient; `unfiltered` does not
    TRL          log-probs and entropies in one pass
    FlashInfer   tokens, without log-probs and kept sets
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import pyrlk

from .measure import Timing

Call = Callable[[], object]
PACKAGES = {
    "Liger": "liger-kernel",
    "QuACK": "quack-kernels",
    "CCE": "cut-cross-entropy",
    "TRL": "trl",
    "FlashInfer": "flashinfer-python",
}
NEAR = 2e-2  # of a mean of log-probs, from logits of 16 bits


class Peer(NamedTuple):
    """`step` does the work, and leaves gradients in `leaves`."""

    step: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    truth: Tensor | None = None  # what `step` must return

    def run(self) -> Tensor:
        result = self.step()
        for leaf in self.leaves:
            leaf.grad = None
        return result


def usable(candidates: Mapping[str, Callable[[], Peer]]) -> dict[str, Call]:
    """The calls whose package is installed, that run once and are right, by name and version.

    A name is a package's, or that and how it is used. A failure is printed, not raised.
    """
    sides: dict[str, Call] = {}
    for name, make in candidates.items():
        package, _, way = name.partition(" ")
        try:
            version = importlib.metadata.version(PACKAGES[package])
            peer = make()
            off = _error(peer.run(), peer.truth)
        except ImportError:
            continue
        except Exception as error:  # whatever another package raises
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}")
            continue
        if not off <= NEAR:
            print(f"{name} is left out: its values are {off:.3g} from ours")
            continue
        sides[f"{package} {version} {way}".strip()] = peer.run
    return sides


def _error(got: Tensor, truth: Tensor | None) -> float:
    return 0.0 if truth is None else (got.float() - truth.float()).abs().mean().item()


def ratios(times: Mapping[str, Timing], sides: Mapping[str, Call], ours: str) -> dict[str, float]:
    """How many times as long as `ours` each takes."""
    return {name: times[name].over(times[ours]) for name in sides}


def said(row: dict) -> str:
    """The same, for a table."""
    return "".join(f", {name} {ratio:.1f}×" for name, ratio in row.get("peers", {}).items())


def clipped(own: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """DAPO's loss of every token, as framework code writes it."""
    ratio = torch.exp(own - old)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)


@torch.no_grad()
def _truth(own: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return clipped(own, old, advantages).mean()


def liger_grpo(logits: Tensor, tokens: Tensor, old: Tensor) -> Peer:
    """Forward + backward of one sequence; it wants a row beyond the last token."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = torch.cat([logits, logits[:1]])[None].requires_grad_()
    advantages = torch.ones(1, device=logits.device)

    def step() -> Tensor:
        loss, _ = triton_grpo_loss(
            leaf, old[None], None, tokens[None], advantages, temperature=1.0, beta=0.0,
            eps_low=0.2, eps_high=0.28, inplace=False, loss_type="dapo", reduce=True,
        )  # fmt: skip
        loss.backward()
        return loss.detach()

    return Peer(step, (leaf,), _truth(pyrlk.token_logprobs(logits, tokens), old, advantages))


def quack_dapo(
    logits: Callable[[], Tensor],
    tokens: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    inplace: bool = False,
) -> Peer:
    """Forward + backward; in place, `logits` gives a tensor of a graph whose memory may go."""
    from quack import cross_entropy

    given = logits()

    def step() -> Tensor:
        own = -cross_entropy(logits(), tokens, reduction="none", inplace_backward=inplace)
        loss = clipped(own, old, advantages).mean()
        loss.backward()
        return loss.detach()

    own = pyrlk.token_logprobs(given.detach(), tokens)
    return Peer(step, (given,) if given.is_leaf else (), _truth(own, old, advantages))


def quack_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Peer:
    """Forward + backward, gradients of both leaves."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step() -> Tensor:
        loss = chunked_linear_cross_entropy(hidden, weight, tokens, reduction="mean")
        loss.backward()
        return loss.detach()

    return Peer(step, (hidden, weight), -_scores(hidden, weight, tokens).mean())


def cce_linear(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    filtered: bool = True,
) -> Peer:
    """Forward + backward, gradients of both leaves."""
    scores = _cce(hidden, weight, tokens, {} if filtered else {"filter_eps": None})

    def step() -> Tensor:
        loss = clipped(scores(), old, advantages).mean()
        loss.backward()
        return loss.detach()

    truth = _truth(_scores(hidden, weight, tokens), old, advantages)
    return Peer(step, (hidden, weight), truth)


def cce_scores(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Peer:
    """Log-probs, no gradient."""
    scores = _cce(hidden.detach(), weight.detach(), tokens, {})
    return Peer(scores, (), _scores(hidden, weight, tokens))


def _cce(hidden: Tensor, weight: Tensor, tokens: Tensor, options: dict) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    # Its kernels are Triton's; off a GPU it has the same in torch.
    kind = "cce" if hidden.is_cuda else "torch_compile"
    return lambda: (
        -linear_cross_entropy(
            hidden, weight, tokens, reduction="none", impl=kind, **options
        ).float()
    )


@torch.no_grad()
def _scores(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return pyrlk.linear_token_logprobs(hidden, weight, tokens)


def trl_scores(logits: Tensor, tokens: Tensor) -> Peer:
    """Its log-probs and entropies."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def scores() -> Tensor:
        logprobs, _ = selective_log_softmax_and_entropy(logits, tokens, False)
        return logprobs

    return Peer(scores, (), pyrlk.token_logprobs(logits, tokens))


def flashinfer_sampler(logits: Tensor, top_k: int, top_p: float) -> Peer:
    """It wants float32 logits: those of 16 bits are converted before they are timed."""
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    if not logits.is_cuda:
        raise ImportError("FlashInfer needs CUDA")
    wide = logits.float()
    return Peer(lambda: top_k_top_p_sampling_from_logits(wide, top_k, top_p))
