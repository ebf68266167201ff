"""A row whose columns are sharded: the statistics of the shards, combined, and their gradients."""

import math

import numpy as np
import pytest
import torch

from pyrlk import reference
from pyrlk._rows import Actions, wrong_tokens
from pyrlk.parallel import digits, vocab
from pyrlk.support import Support
from pyrlk.triton_kernels import logprob

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # −inf in numpy

WIDTHS = (130, 0, 70, 100)  # across tiles of 64, none, a part


def make():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=g) * 3
    tokens = torch.tensor([0, 129, 130, 299, -100, 200])
    logits[1, :130] = logits[2, 130:] = -torch.inf
    logits[1, 129] = 1.0
    rows = [sorted({int(t) % 300, 5, 131}) for t in tokens[:5]] + [[200, 250]]
    return logits, tokens, Support.from_lists(rows)


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
@pytest.mark.parametrize("vocab_size", [300, 260, 170])
def test_combined_shards_match_float64_on_the_whole_row(small_tiles, kept, vocab_size):
    """Padding inside the last shard, and one that is nothing but padding."""
    logits, tokens, support = make()
    tokens = torch.where(tokens < vocab_size, tokens, 131)
    logits[3, 131] = 0.5
    if kept:
        mask = support.to_mask(300)
        mask[:, vocab_size:] = False
        mask[range(6), tokens.clamp(min=0)] = True
        support = Support.from_mask(mask)
    tau, g, h = torch.full((6,), 0.7), torch.linspace(-1, 1, 6), torch.linspace(2, -1, 6)
    z = logits.double().requires_grad_()
    truth = reference.token_logprobs(
        z, tokens, temperature=0.7, vocab_size=vocab_size, return_entropy=True,
        support=support if kept else None,
    )  # fmt: skip
    torch.autograd.backward(truth, [g.double(), h.double()])

    at = Actions(tokens, support if kept else None, 1.0, tau, vocab_size)
    firsts = [sum(WIDTHS[:r]) for r in range(len(WIDTHS))]
    parts = torch.full((len(WIDTHS), 6, 4), torch.nan)
    for first, width, part in zip(firsts, WIDTHS, parts, strict=True):

        def local(here, out, shard=logits[:, first : first + width]):
            scores = torch.empty(6), torch.empty(6)
            pair = here.kept and here.kept[:2]
            logprob.token_logprobs_fwd(
                shard, here.tokens, pair, here.temperatures, here.vocab, *scores, out
            )

        vocab.statistics_of(local, vocab.columns(at, first, width), part)
    scale, c = vocab._temperature(at, logits)
    m, s, e, z_a = vocab.combine(parts.double(), c)
    counted = tokens != -100
    assert torch.equal(wrong_tokens(tokens, at.kept, vocab_size), ~counted)
    got = (z_a - m) / scale - s.log(), s.log() - e / s * 0.6931471805599453
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a[counted], b.detach()[counted], atol=2e-6, rtol=2e-7)

    stats = torch.stack([m, s, e, z_a], -1).float()
    for first, width in zip(firsts, WIDTHS, strict=True):
        if width == 0:
            continue
        here, grad = vocab.columns(at, first, width), torch.full((6, width), torch.nan)
        logprob.token_logprobs_bwd(
            logits[:, first : first + width], here.tokens, here.kept and here.kept[:2], tau,
            here.vocab, stats, g, h, grad,
        )  # fmt: skip
        error = (grad.double() - z.grad[:, first : first + width]).norm()
        assert error <= 4e-6 * z.grad.norm()


def test_broken_kept_sets_are_found_without_a_loop():
    """Ids that fall or leave the vocabulary, offsets beyond the ids; the rows beside them stand."""
    ids = torch.tensor([1, 4, 4, 2, 3, 9, 0, 7], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 4, 6, 6, 7, 12])
    tokens = torch.tensor([4, 4, 3, 0, 0, 7])
    wrong = wrong_tokens(tokens, Support(ids, offsets), 9)
    assert wrong.tolist() == [False, True, True, True, False, True]


def test_the_scale_of_sharded_masses_is_an_ieee_quotient():
    # As `mass_scale_of` in prefix.py divides: a product with 1/τ would differ for one τ in four.
    tau = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 + 0.01
    c = np.float32(math.log2(math.e)) / tau.numpy()
    assert torch.equal(digits.scale_of(tau), torch.from_numpy(c))
