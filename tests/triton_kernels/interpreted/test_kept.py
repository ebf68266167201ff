"""Support replay: log-probs, losses and gradients over kept sets, against float64."""

import math

import pytest
import torch

from pyrlk import objective, reference
from pyrlk.support import Support
from pyrlk.triton_kernels import kept as kept_sets
from pyrlk.triton_kernels import logprob

# Rows with NaN and infinities are part of the contract; numpy, under the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = math.nan, math.inf
TERMS = objective.terms(objective.DAPO(), kl="k3", kl_coef=0.3, entropy_coef=0.05)
VOCAB = 300


def some(size, vocab, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(vocab, generator=g)[:size].tolist()


# In steps of 32 members and tiles of 64 columns: one member, both ends of the row, a step less one,
# a step, one more, several steps, a run across tiles, all but one column.
SETS = [
    [0],
    [VOCAB - 1],
    [0, VOCAB - 1],
    some(31, VOCAB, 1),
    some(32, VOCAB, 2),
    some(33, VOCAB, 3),
    some(90, VOCAB, 4),
    list(range(50, 140)),
    list(range(1, VOCAB)),
]


class Batch:
    """Rows with a kept set each; the action of a row is a member of its set."""

    def __init__(self, sets=SETS, vocab=VOCAB, dtype=torch.float32):
        g = torch.Generator().manual_seed(vocab)
        rows = len(sets)
        self.support = Support.from_lists(sets)
        self.logits = (torch.randn(rows, vocab, generator=g) * 2).to(dtype)
        self.tokens = torch.tensor([s[len(s) // 2] for s in sets])
        self.temperature = torch.rand(rows, generator=g) + 0.5
        z = self.logits.double()
        exact = reference.token_logprobs(
            z, self.tokens, temperature=self.temperature.double(), support=self.support
        )
        self.old = (exact + torch.randn(rows, generator=g) * 0.1).float()
        self.ref = (exact + torch.randn(rows, generator=g)).float()
        self.advantages = torch.randn(rows, generator=g)
        self.weight = torch.rand(rows, generator=g) + 0.1

    def score(self, score, support=True):
        kept = self.support if support else None
        return score(self.logits, self.tokens, self.temperature, kept=kept)

    def learn(self, learn, support=True, **options):
        return learn(
            self.logits,
            self.tokens,
            self.old,
            self.advantages,
            self.weight,
            TERMS,
            ref=self.ref,
            temperature=self.temperature,
            kept=self.support if support else None,
            **options,
        )

    def backward(self, stats, g, h, support=True, vocab_size=None):
        grad = torch.full_like(self.logits, NAN)
        kept = self.support if support else None
        vocab_size = vocab_size or self.logits.shape[-1]
        logprob.token_logprobs_bwd(
            self.logits, self.tokens, kept, self.temperature, vocab_size, stats, g, h, grad
        )
        return grad

    def truth(self):
        """(z, log-prob, entropy) in float64, with autograd."""
        z = self.logits.double().requires_grad_()
        tau = self.temperature.double()
        return z, *reference.token_logprobs(
            z, self.tokens, temperature=tau, support=self.support, return_entropy=True
        )

    def check_learn(self, out, bound=4e-6):
        z, exact, entropy = self.truth()
        loss = objective.token_loss(
            exact,
            self.old.double(),
            self.advantages.double(),
            self.ref.double(),
            entropy,
            TERMS,
        )
        (loss * self.weight.double()).sum().backward()
        torch.testing.assert_close(out.loss.double(), loss.detach(), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(out.logprob.double(), exact.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(out.entropy.double(), entropy.detach(), atol=1e-6, rtol=0)
        assert (out.grad.double() - z.grad).norm() <= bound * z.grad.norm()
        outside = ~self.support.to_mask(z.shape[-1])
        assert torch.equal(out.grad[outside], torch.zeros_like(out.grad[outside]))


def same(a, b, fields=("loss", "logprob", "entropy", "grad"), rows=slice(None)):
    return all(torch.equal(getattr(a, f)[rows], getattr(b, f)[rows]) for f in fields)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 4e-6), (torch.float16, 1e-3)], ids=str
)
def test_scores_losses_and_gradients_match_float64(score, learn, small_tiles, dtype, bound):
    batch = Batch(dtype=dtype)
    z, exact, entropy = batch.truth()
    g, h = torch.randn(len(SETS)), torch.randn(len(SETS))
    (exact * g + entropy * h).sum().backward()
    out = batch.score(score)
    torch.testing.assert_close(out.logprob.double(), exact.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.entropy.double(), entropy.detach(), atol=1e-6, rtol=0)
    grad = batch.backward(out.stats, g, h)
    assert (grad.double() - z.grad).norm() <= bound * z.grad.norm()
    assert ((grad != 0) <= batch.support.to_mask(VOCAB)).all()
    batch.check_learn(batch.learn(learn), bound)


def test_sets_of_more_than_a_tile_match_float64_in_place(learn):
    # Tiles as they are: one member, tens, five steps of members that cross every tile of the row.
    sets = [[8999], some(50, 9000, 5), some(5000, 9000, 6)]
    apart, batch = Batch(sets, 9000).learn(learn), Batch(sets, 9000)
    batch.check_learn(apart)
    assert same(batch.learn(learn, grad=batch.logits), apart)


def test_in_place_on_a_strided_view_leaves_the_rest_of_the_buffer(learn, small_tiles):
    batch = Batch()
    apart = batch.learn(learn)
    buffer = torch.full((3, 5, VOCAB + 7), 7.0)
    view = buffer[:, 1:4, :VOCAB]
    view.copy_(batch.logits.reshape(3, 3, VOCAB))
    batch.logits = view
    out = batch.learn(learn, grad=view)
    out.grad = view.reshape(9, VOCAB)
    assert same(out, apart)
    view.fill_(7.0)
    assert (buffer == 7.0).all()


def test_a_whole_vocabulary_has_the_bits_of_the_row(score, learn, small_tiles):
    batch = Batch([list(range(VOCAB))] * 2)
    out, dense = batch.score(score), batch.score(score, support=False)
    assert same(out, dense, ("logprob", "entropy", "stats"))
    g = torch.ones(2)
    assert torch.equal(batch.backward(out.stats, g, g), batch.backward(out.stats, g, g, False))
    assert same(batch.learn(learn), batch.learn(learn, support=False))


def test_the_sampler_reports_the_bits_of_the_replay(draw, score, small_tiles, monkeypatch):
    logits = torch.randn(8, 150, generator=torch.Generator().manual_seed(5)) * 3
    logits[6:, ::3] = -INF  # a grammar's mask
    top_k = torch.tensor([1, 5, 20, 40, 149, 0, 0, 0])
    top_p = torch.tensor([1.0, 0.9, 0.9, 1.0, 1.0, 0.99, 1.0, 0.7])
    out = draw(logits, temperature=0.7, top_k=top_k, top_p=top_p)
    kept = out.ids, out.offsets
    replayed = score(logits, out.token, 0.7, kept=kept)
    assert torch.equal(out.logprob, replayed.logprob)
    # The bits know neither the steps of the replay nor where in the row the members lie.
    monkeypatch.setattr(kept_sets, "TILE", 128)
    assert torch.equal(score(logits, out.token, 0.7, kept=kept).stats, replayed.stats)
    flipped = Support.from_mask(out.mask.flip(-1))
    moved = score(logits.flip(-1), 149 - out.token, 0.7, kept=flipped)
    assert torch.equal(moved.stats, replayed.stats)


def test_masked_rows_may_have_any_support(score, learn, small_tiles):
    plain, batch = Batch(), Batch()
    masked = torch.tensor([1, 4, 6])
    good = torch.ones(len(SETS), dtype=torch.bool).index_fill_(0, masked, False)
    lists = [s if good[i] else [] for i, s in enumerate(SETS)]
    lists[4] = [2**31 - 1]
    batch.support = Support.from_lists(lists)
    for x in (batch.logits, batch.old, batch.ref, batch.advantages):
        x[masked] = NAN
    batch.weight[masked[:2]] = 0
    batch.tokens[masked[2]] = -100
    out, whole = batch.learn(learn), plain.learn(learn)
    for name in ("loss", "logprob", "entropy", "grad"):
        assert (getattr(out, name)[masked] == 0).all(), name
    assert same(out, whole, rows=good)
    batch.tokens[masked] = -100
    scored = batch.score(score)
    assert (scored.logprob[masked] == 0).all()
    assert same(scored, plain.score(score), ("logprob", "entropy"), rows=good)
    batch.support = Support(torch.empty(0, dtype=torch.int32), torch.zeros(10, dtype=torch.int64))
    batch.tokens[:] = -100
    assert (batch.score(score).logprob == 0).all()


BROKEN = {
    "the token is no member": ([3, 5, 9], None, 4),
    "the token is no column": ([3, 5, 9], None, VOCAB),
    "the token is negative": ([3, 5, 9], None, -1),
    "an empty set": ([], None, 5),
    "an id beyond the row": ([3, 5, VOCAB], None, 5),
    "an id far beyond": ([3, 5, 2**31 - 1], None, 2**31 - 1),
    "a negative id": ([-(2**31), 3, 5], None, 5),
    "ids that descend": ([5, 3, 9], None, 5),
    "an id twice": ([3, 5, 5, 9], None, 5),
    "offsets beyond the ids": ([3, 5, 9], (0, 2**40), 5),
    "offsets that fall": ([3, 5, 9], (3, 0), 5),
    "a negative offset": ([3, 5, 9], (-(2**40), 3), 5),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_support_gives_nan_and_no_read_out_of_bounds(score, learn, small_tiles, name):
    # Memory this far away is not the interpreter's: a read there ends the process.
    ids, offsets, token = BROKEN[name]
    batch = Batch([[5]])
    begin, end = offsets or (0, len(ids))
    batch.support = Support(torch.tensor(ids, dtype=torch.int32), torch.tensor([begin, end]))
    batch.tokens[0] = token
    scored, out = batch.score(score), batch.learn(learn)
    grad = batch.backward(scored.stats, torch.ones(1), torch.ones(1))
    for x in (scored.logprob, scored.entropy, out.loss, out.logprob, out.entropy, out.grad, grad):
        assert x.isnan().all()


def test_nan_and_infinity_count_inside_the_set_alone(score, learn, small_tiles):
    sets = [[3, 5, 200]] * 5
    plain, batch = Batch(sets), Batch(sets)
    inside = batch.support.to_mask(VOCAB)
    batch.logits[0][~inside[0]] = torch.tensor([NAN, INF, -INF] * 99)
    batch.logits[1, 200] = NAN
    batch.logits[2, 3] = INF
    batch.logits[3, [3, 5, 200]] = -INF
    batch.logits[4, [3, 200]] = -INF
    out, expected = batch.learn(learn), plain.learn(learn)
    assert same(out, expected, rows=slice(1))
    for x in (out.loss, out.logprob, out.entropy):
        assert x.isnan().tolist() == [False, True, True, True, False]
    # As on CPU: the poison is in the kept columns, the rest of the gradient is 0.
    assert out.grad[1:4][inside[1:4]].isnan().all()
    assert torch.equal(out.grad[1:4][~inside[1:4]], torch.zeros(3 * 297))
    assert out.logprob[4] == out.entropy[4] == 0
    assert torch.equal(out.grad[4], torch.zeros(VOCAB))


def test_padding_columns_have_no_gradient(score, learn, small_tiles):
    plain, batch = Batch(), Batch()
    batch.logits = torch.full((len(SETS), 500), NAN)
    batch.logits[:, :VOCAB] = plain.logits
    out, expected = batch.learn(learn, vocab_size=VOCAB), plain.learn(learn)
    assert torch.equal(out.grad[:, VOCAB:], torch.zeros(len(SETS), 200))
    out.grad = out.grad[:, :VOCAB]
    assert same(out, expected)
    batch.tokens[0] = VOCAB  # broken: NaN in the vocabulary, 0 in the padding all the same
    grad = batch.learn(learn, vocab_size=VOCAB).grad[0]
    assert grad[:VOCAB].isnan().all()
    assert torch.equal(grad[VOCAB:], torch.zeros(200))
