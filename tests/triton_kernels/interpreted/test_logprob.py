"""Row statistics, log-probs, entropy and their gradients against float64."""

import math

import pytest
import torch

from pyrlk import reference
from pyrlk.triton_kernels import logprob, policy_loss, row

# Rows with NaN and infinities are part of the contract; numpy, under the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = math.nan, math.inf

# Around the tile: one column, two, a part, one less, one tile, one more, two tiles and a part.
VOCABULARIES = (1, 2, 31, 4095, 4096, 4097, 9000)


def make(rows, vocab, dtype=torch.float32, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed + vocab)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=g)


def backward(logits, tokens, temperature, stats, g, h, vocab_size=None):
    grad = torch.full_like(logits, NAN)
    logprob.token_logprobs_bwd(
        logits, tokens, None, temperature, vocab_size or logits.shape[-1], stats, g, h, grad
    )
    return grad


def relative(x, truth):
    """Error in norm; absolute where the truth is 0."""
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logprob_entropy_and_gradient_match_float64(score, vocab, dtype):
    logits, tokens = make(4, vocab, dtype)
    temperature = torch.tensor([0.5, 1.0, 0.7, 3.0])
    z = logits.double().requires_grad_()
    truth, entropy = reference.token_logprobs(
        z, tokens, temperature=temperature.double(), return_entropy=True
    )
    g, h = torch.tensor([0.6, -0.5, 0.2, 0.5]), torch.tensor([2.1, 0.1, 0.2, -1.3])
    (truth * g + entropy * h).sum().backward()

    out = score(logits, tokens, temperature)
    near = truth.abs() <= 16
    torch.testing.assert_close(out.logprob[near].double(), truth[near].detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.logprob.double(), truth.detach(), atol=1e-6, rtol=2e-7)
    # The interpreter adds 512 partial sums one after the other, where a device adds in a tree.
    torch.testing.assert_close(out.entropy.double(), entropy.detach(), atol=4e-6, rtol=0)
    # Half an ulp of float16 is 2^-11.
    bound = 4e-6 if dtype == torch.float32 else 5e-4
    assert relative(backward(logits, tokens, temperature, out.stats, g, h), z.grad) <= bound
    # One number for all rows is the same as that number in each row.
    assert torch.equal(score(logits, tokens, 0.7).logprob[2], out.logprob[2])


def test_statistics_are_max_sum_entropy_sum_and_token_logit(score):
    logits, tokens = make(3, 9000)
    m, s, e, z = score(logits, tokens, 0.8).stats.double().unbind(-1)
    y = (logits.double() - m[:, None]) * math.log2(math.e) / 0.8
    assert torch.equal(m.float(), logits.max(-1).values)
    assert torch.equal(z.float(), logits.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(s, y.exp2().sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(e, (y.exp2() * y).sum(-1), rtol=1e-6, atol=0)


def test_a_row_has_the_same_bits_in_any_batch(score):
    logits, tokens = make(5, 4097)
    together = score(logits, tokens, 0.9)
    alone = score(logits[3:4], tokens[3:4], 0.9)
    assert torch.equal(together.stats[3], alone.stats[0])
    assert torch.equal(together.logprob[3], alone.logprob[0])


def test_masked_rows_are_never_read(score):
    logits, tokens = make(3, 100)
    logits[1] = NAN
    tokens[1] = -100
    out = score(logits, tokens)
    assert out.logprob[1] == 0
    assert out.entropy[1] == 0
    assert out.logprob.isfinite().all()
    # A cotangent of 0 and a masked token give zeros, whatever the row holds.
    logits[2] = NAN
    grad = backward(logits, tokens, 1.0, out.stats, torch.tensor([1.0, NAN, 0.0]), torch.zeros(3))
    assert torch.equal(grad[1:], torch.zeros(2, 100))
    assert grad[0].isfinite().all()


def test_nan_and_infinity_stay_in_their_row(score):
    logits, tokens = make(6, 5000)
    logits[0, 4999] = NAN
    logits[1, 7] = INF
    logits[2] = -INF
    logits[3, 4096:] = -INF  # a whole tile of −inf weighs nothing
    logits[3, :2] = torch.tensor([3e38, -3e38])
    tokens[3] = 0
    logits[4, 1:] = -INF
    tokens[4] = 0
    out = score(logits, tokens)
    assert out.logprob[:3].isnan().all()
    assert out.logprob[3:5].tolist() == [0.0, 0.0]
    assert out.entropy[3:5].tolist() == [0.0, 0.0]
    assert out.logprob[5].isfinite()
    grad = backward(logits, tokens, 1.0, out.stats, torch.ones(6), torch.ones(6))
    assert grad[:3].isnan().all()
    assert torch.equal(grad[3:5], torch.zeros(2, 5000))
    assert grad[5].isfinite().all()


def test_a_token_with_probability_zero_has_logprob_minus_infinity(score):
    logits, tokens = make(1, 50)
    logits[0, tokens[0]] = -INF
    assert score(logits, tokens).logprob.tolist() == [-INF]


@pytest.mark.parametrize("token", [-1, 50, 2**40])
def test_a_token_that_is_no_column_gives_nan(score, token):
    logits, tokens = make(2, 50)
    tokens[0] = token
    out = score(logits, tokens)
    assert out.logprob.isnan().tolist() == [True, False]
    grad = backward(logits, tokens, 1.0, out.stats, torch.ones(2), None)
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


def test_padding_columns_are_not_read_and_have_no_gradient(score):
    logits, tokens = make(2, 70)
    padded = torch.full((2, 5000), NAN)
    padded[:, :70] = logits
    plain, out = score(logits, tokens), score(padded, tokens, vocab_size=70)
    assert torch.equal(plain.stats, out.stats)
    g = torch.ones(2)
    grad = backward(padded, tokens, 1.0, out.stats, g, g, vocab_size=70)
    assert torch.equal(grad[:, :70], backward(logits, tokens, 1.0, plain.stats, g, g))
    assert torch.equal(grad[:, 70:], torch.zeros(2, 4930))


def test_strided_views_are_read_in_place(score):
    # What a trainer passes: all but the last position of each sequence, in a padded buffer.
    buffer, _ = make(4 * 5, 80)
    buffer = buffer.reshape(4, 5, 80)
    view = buffer[::2, :-1, :60]
    tokens = torch.randint(60, (2, 4))
    out, dense = score(view, tokens), score(view.contiguous(), tokens)
    assert torch.equal(out.stats, dense.stats)
    before, g = buffer.clone(), torch.ones(8)
    grad = torch.full_like(buffer, 7.0)
    inner = grad[::2, :-1, :60]
    logprob.token_logprobs_bwd(view, tokens.reshape(-1), None, 1.0, 60, out.stats, g, None, inner)
    truth = backward(view.contiguous().reshape(8, 60), tokens.reshape(-1), 1.0, out.stats, g, None)
    assert torch.equal(inner.reshape(8, 60), truth)
    inner.fill_(7.0)
    assert (grad == 7.0).all()
    assert torch.equal(buffer, before)


@pytest.mark.parametrize(
    ("shape", "strides", "count", "inner", "outer_stride", "inner_stride"),
    [
        ((9,), (1,), 1, 1, 0, 0),
        ((3, 9), (9, 1), 3, 3, 0, 9),
        ((2, 3, 9), (27, 9, 1), 6, 6, 0, 9),
        ((2, 3, 9), (36, 9, 1), 6, 3, 36, 9),
        ((2, 1, 3, 9), (36, 5, 9, 1), 6, 3, 36, 9),
        ((2, 2, 3, 9), (54, 27, 9, 1), 12, 12, 0, 9),
        ((4, 9), (0, 1), 4, 4, 0, 0),
        ((0, 9), (9, 1), 0, 1, 0, 9),
    ],
)
def test_rows_collapse_to_two_levels(shape, strides, count, inner, outer_stride, inner_stride):
    r = row.rows(torch.empty(200).as_strided(shape, strides))
    assert r[:4] == (count, inner, outer_stride, inner_stride)


def test_rows_of_three_levels_are_refused():
    with pytest.raises(ValueError, match="three levels"):
        row.rows(torch.empty(400).as_strided((2, 2, 2, 9), (100, 40, 10, 1)))


def test_rows_know_their_alignment():
    x = torch.empty(64, 16)
    assert row.rows(x).align == 4
    assert row.rows(x.half()).align == 8
    assert row.rows(x[:, 1:]).align == 1
    assert row.rows(torch.empty(4, 15)).align == 1
    # One row alone is read as in its batch, wherever it begins.
    assert [row.rows(torch.empty(9, 15)[k : k + 1]).align for k in (0, 1, 8)] == [1, 1, 1]
    assert row.rows(torch.empty(15)).align == 1
    assert row.rows(torch.empty(1, 16)).align == row.rows(torch.empty(16)).align == 4


def test_empty_inputs_do_nothing(score):
    assert score(torch.empty(0, 9), torch.empty(0, dtype=torch.int64)).logprob.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reinforce_gradient_matches_float64_and_sums_to_zero(dtype):
    logits, tokens = make(5, 4097, dtype)
    advantages = torch.tensor([1.5, -2.0, 0.0, 1.0, 3.0])
    tokens[3] = -100
    logits[2:4] = NAN  # neither A = 0 nor a masked token reads its row
    out = torch.full_like(logits, NAN)
    policy_loss.reinforce_grad(logits, tokens, advantages, 0.7, out)
    safe = torch.where(logits.isnan(), 0.0, logits.double())
    truth = reference.reinforce_grad(safe, tokens, advantages, temperature=0.7)
    assert relative(out, truth) <= (4e-6 if dtype == torch.float32 else 4e-4)
    assert torch.equal(out[2:4], torch.zeros_like(out[2:4]))
    if dtype == torch.float32:
        # To the rounding of s, a sum of 4097 numbers.
        assert (out.double().sum(-1).abs() <= 4e-7 * out.double().abs().sum(-1)).all()
    policy_loss.reinforce_grad(logits, tokens, advantages, 0.7, logits)
    assert torch.equal(logits, out)
