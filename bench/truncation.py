"""What truncated sampling does to the ratio, with and without the replayed support.

    rollout  token ~ top-p of softmax(z), behaviour log-prob under the truncated distribution
    trainer  z' = z + noise, the same weights in other arithmetic
    ratio    exp(log π'(token) − behaviour), π' over the vocabulary, or over the kept set

Rows are peaked like a language model's: power-law logits whose sharpness varies from row to row.

    python -m pyrlk.bench.truncation docs/truncation.svg
"""

from __future__ import annotations

import sys

import torch

import pyrlk

TOP_P, NOISE, ROWS, VOCAB = 0.8, 0.08, 8192, 8192


def ratios(
    rows: int = ROWS, vocab: int = VOCAB, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ratios over the vocabulary, ratios over the kept set) of `rows` draws."""
    g = torch.Generator().manual_seed(seed)
    whole, replayed = [], []
    for begin in range(0, rows, 256):
        count = min(256, rows - begin)
        sharpness = 1.0 + 5.0 * torch.rand(count, 1, generator=g)
        z = -sharpness * torch.log1p(torch.arange(vocab, dtype=torch.float32))
        draw = pyrlk.sample(z, top_p=TOP_P, seed=begin, return_support=True)
        trainer = z + NOISE * torch.randn(count, vocab, generator=g)
        for out, support in ((whole, None), (replayed, draw.support)):
            logprob = pyrlk.token_logprobs(trainer, draw.token, support=support)
            out.append(torch.exp(logprob - draw.logprob))
    return torch.cat(whole), torch.cat(replayed)


def outside(ratio: torch.Tensor) -> float:
    """Share of ratios outside [0.9, 1.1]."""
    return ((ratio < 0.9) | (ratio > 1.1)).float().mean().item()


def main(path: str) -> None:
    """Draws the two histograms and prints their figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole, replayed = ratios()
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    bins = torch.linspace(0.5, 1.3, 81).numpy()
    for ratio, name, colour in (
        (whole, "over the vocabulary", "#c05a3c"),
        (replayed, "over the replayed support", "#2f6f8f"),
    ):
        label = f"{name}: mean {ratio.mean():.3f}, {100 * outside(ratio):.1f} % outside [0.9, 1.1]"
        print(label)
        axis.hist(ratio.clamp(0.5, 1.3).numpy(), bins=bins, alpha=0.75, label=label, color=colour)
    for edge in (0.9, 1.1):
        axis.axvline(edge, color="0.4", linewidth=0.8, linestyle="--")
    axis.set(
        xlabel="ratio of an unchanged policy (should be 1)",
        ylabel="tokens",
        title=f"top-p {TOP_P}, {ROWS} draws from {VOCAB} tokens, trainer noise {NOISE}",
    )
    axis.title.set_fontsize(10)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m pyrlk.bench.truncation docs/truncation.svg")
    main(sys.argv[1])
