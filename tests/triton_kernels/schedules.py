"""One loss by every schedule: what the interpreter and the device compare bit for bit."""

import math
import types

import torch

from pyrlk import objective
from pyrlk.triton_kernels import logprob, policy_loss

NAN, INF = math.nan, math.inf
ROWS, TAU = 10, 0.8
MASKED = [1, 2]  # by weight, by token; their logits are NaN
STILL = [3]  # A = 0: read once
TERMS = {
    "dapo": objective.terms(objective.DAPO()),
    "dapo+k3+entropy": objective.terms(objective.DAPO(), kl_coef=0.1, entropy_coef=0.02),
}


def batch(vocab, dtype, device="cpu", width=None, inner=None):
    """Rows of every kind, in a strided view of a wider buffer; padding columns hold NaN.

    Whole, masked, without gradient, all −inf, with NaN, with +inf, with −inf only in some tiles,
    at the edges of the range, with a token that is no column.
    """
    g = torch.Generator().manual_seed(vocab)
    width = width or vocab
    buffer = torch.full((2, ROWS // 2 + 1, width + 8), NAN)
    buffer[:, :-1, :vocab] = torch.randn(2, ROWS // 2, vocab, generator=g) * 3
    b = types.SimpleNamespace(vocab=vocab)
    b.tokens = torch.randint(vocab, (ROWS,), generator=g)
    b.advantages = torch.tensor([1.0, 1.0, NAN, 0.0, 1.0, -1.0, 0.5, -0.5, 1.0, 2.0])
    b.weight = torch.rand(ROWS, generator=g) + 0.1
    rows = buffer[:, :-1, :vocab].reshape(ROWS, vocab)
    rows[MASKED] = NAN
    b.weight[1], b.tokens[2] = 0.0, -100
    rows[4] = -INF
    rows[5, vocab // 2] = NAN
    rows[6, vocab - 1] = INF
    rows[7, vocab // 3 :] = -INF
    b.tokens[7] = 0
    if dtype == torch.float32:
        rows[8, 0], rows[8, vocab - 1] = 3e38, -3e38
    b.tokens[9] = vocab
    buffer[:, :-1, :vocab] = rows.reshape(2, ROWS // 2, vocab)
    columns = b.tokens.clamp(0, vocab - 1)[:, None]
    own = (rows.double() / TAU).log_softmax(-1).gather(1, columns)[:, 0].float()
    # Within the clip range, so that there is a gradient.
    b.old = own + torch.rand(ROWS, generator=g) * 0.1
    b.ref = own + torch.randn(ROWS, generator=g)
    b.logits = buffer.to(dtype).to(device)[:, :-1, :width]
    for name in ("tokens", "advantages", "weight", "old", "ref"):
        setattr(b, name, getattr(b, name).to(device))
    return b


def learn(b, terms, schedule, *, inplace=False):
    """Loss, log-prob, entropy and gradient of a batch; outputs start as NaN."""
    logits = b.logits
    if inplace:
        # Same strides, so that in place differs in nothing else.
        whole = torch.empty_strided(
            logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
        )
        logits = whole.copy_(logits)

    def nan():
        return torch.full((ROWS,), NAN, device=logits.device)

    out = types.SimpleNamespace(loss=nan(), logprob=nan(), entropy=nan())
    out.grad = logits if inplace else torch.full_like(logits, NAN)
    policy_loss.policy_loss_fwd(
        logits,
        b.tokens,
        None,
        b.old,
        b.advantages,
        b.weight,
        b.ref if terms.kl_coef else None,
        TAU,
        b.vocab,
        terms,
        out.loss,
        out.logprob,
        out.entropy,
        out.grad,
        schedule,
    )
    return out


def score(b, schedule):
    """Log-prob, entropy and statistics of a batch."""
    device = b.logits.device
    out = types.SimpleNamespace(
        logprob=torch.full((ROWS,), NAN, device=device),
        entropy=torch.full((ROWS,), NAN, device=device),
        stats=torch.full((ROWS, 4), NAN, device=device),
    )
    logprob.token_logprobs_fwd(
        b.logits, b.tokens, None, TAU, b.vocab, out.logprob, out.entropy, out.stats, schedule
    )
    return out


def assert_same_bits(a, b):
    for name, x in vars(a).items():
        torch.testing.assert_close(getattr(b, name), x, rtol=0, atol=0, equal_nan=True)


def assert_sound(out):
    """What must hold whatever the schedule: masked rows are 0, broken ones NaN, others neither."""
    grad = out.grad.reshape(ROWS, -1)
    assert (grad[MASKED] == 0).all()
    assert (out.loss[MASKED] == 0).all()
    assert out.loss[[4, 5, 6, 9]].isnan().all()
    assert out.loss[[0, 7]].isfinite().all()
    assert grad[[0, 7]].isfinite().all()
    assert (grad[[0, 7]] != 0).any(-1).all()
