"""Properties of losses and log-probs on a device, in every dtype, judged by float64."""

import pytest
import torch
from dry_device import size

import pyrlk
from pyrlk import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOUND = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
VOCAB = size(20000, 300)


@pytest.fixture
def batch():
    """logits [2, 3, V], tokens, old log-probs and advantages on the CPU."""
    torch.manual_seed(1)
    logits = torch.randn(2, 3, VOCAB) * 3
    tokens = torch.randint(VOCAB, (2, 3))
    old = reference.token_logprobs(logits.double(), tokens).float()
    return logits, tokens, old + 0.1 * torch.randn(2, 3), torch.randn(2, 3)


def gradient(logits, *rest, **options):
    """(loss, ∂loss/∂logits) on the device, both back on the CPU."""
    leaf = logits.cuda().requires_grad_()
    on_device = [x if x is None else x.cuda() for x in rest]
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss = pyrlk.policy_loss(leaf, *on_device, **options)
    loss.backward()
    return loss.detach().cpu(), leaf.grad.cpu()


def truth(logits, tokens, *rest, **options):
    z = logits.double().requires_grad_()
    rest = [x.double() for x in rest]
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss = reference.policy_loss(z, tokens, *rest, **options)
    loss.backward()
    return loss.detach(), z.grad


def assert_near(got, want, dtype):
    torch.testing.assert_close(got[0].double(), want[0], atol=2e-6, rtol=2e-6)
    assert (got[1].double() - want[1]).norm() <= BOUND[dtype] * want[1].norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0])
def test_loss_and_gradient_equal_float64(batch, dtype, spread):
    logits, tokens, _, advantages = batch
    logits = (logits * spread).to(dtype)
    own = reference.token_logprobs(logits.double(), tokens)
    options = {"temperature": torch.rand(2, 3) + 0.5, "entropy_coef": 0.02, "kl_coef": 0.1}
    options["ref_logprobs"] = (own + 0.1).float()
    old = (own + 0.05).float()
    got = gradient(logits, tokens, old, advantages, **options)
    want = truth(logits, tokens, old, advantages, **options)
    # A log-prob of large logits is itself large, and rounded as such before the ratio.
    torch.testing.assert_close(got[0].double(), want[0], atol=2e-6 * max(1, spread), rtol=1e-5)
    assert (got[1].double() - want[1]).norm() <= 2 * max(1, spread) * BOUND[dtype] * want[1].norm() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_raw_gradient_sum_to_zero(batch, dtype):
    logits, tokens, _, advantages = batch
    z = logits.to(dtype)
    got = pyrlk.reinforce_grad(z.cuda(), tokens.cuda(), advantages.cuda()).cpu().double()
    want = reference.reinforce_grad(z.double(), tokens, advantages.double())
    assert (got - want).norm() <= BOUND[dtype] * want.norm()
    assert (got.sum(-1).abs() <= 4 * BOUND[dtype] * advantages.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_may_hold_anything(batch, dtype):
    logits, tokens, old, advantages = (x.clone() for x in batch)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    clean = gradient(logits.to(dtype), tokens, old, advantages, mask)
    hidden = mask == 0
    for x in (logits, old, advantages):
        x[hidden] = torch.nan
    tokens[hidden] = VOCAB + 7
    dirty = gradient(logits.to(dtype), tokens, old, advantages, mask)
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x, y)
    assert (dirty[1][hidden] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_poisoned_row_poisons_itself_alone(batch, bad):
    logits, tokens, *_ = batch
    logits = logits.clone()
    logits[0, 1, 5] = bad
    leaf = logits.cuda().requires_grad_()
    logprob = pyrlk.token_logprobs(leaf, tokens.cuda())
    logprob.sum().backward()
    assert logprob.isnan().tolist() == [[False, True, False], [False, False, False]]
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert leaf.grad.cpu()[others].isfinite().all()


def test_minus_infinity_is_probability_zero(batch):
    logits, tokens, *_ = batch
    logits = logits.clone()
    logits[:, :, 1::2] = -torch.inf
    tokens = tokens // 2 * 2
    got, entropy = pyrlk.token_logprobs(logits.cuda(), tokens.cuda(), return_entropy=True)
    want, spread = reference.token_logprobs(logits.double(), tokens, return_entropy=True)
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.cpu().double(), spread, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_bits_of_its_contiguous_copy(batch, dtype):
    logits, tokens, old, advantages = (x.cuda() for x in batch)
    wide = torch.full((2, 5, VOCAB + 8), torch.nan, device="cuda", dtype=dtype)
    view = wide[:, 1:4, :VOCAB]
    view.copy_(logits)
    results = []
    for z in (view, view.contiguous()):
        leaf = z.detach().requires_grad_()
        loss = pyrlk.dapo_loss(leaf, tokens, old, advantages)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_padded_columns_are_never_read_and_get_gradient_zero(batch):
    logits, tokens, old, advantages = batch
    padded = torch.cat([logits, torch.full((2, 3, 40), torch.nan)], -1)
    got = gradient(padded, tokens, old, advantages, vocab_size=VOCAB)
    want = gradient(logits, tokens, old, advantages)
    torch.testing.assert_close(got[0], want[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[1][..., :VOCAB], want[1], atol=1e-7, rtol=1e-5)
    assert (got[1][..., VOCAB:] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_tokens_work(shape):
    leaf = torch.randn(*shape, VOCAB, device="cuda", requires_grad=True)
    tokens = torch.zeros(shape, dtype=torch.int64, device="cuda")
    zeros = torch.zeros(shape, device="cuda")
    loss = pyrlk.dapo_loss(leaf, tokens, zeros, zeros)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad.shape == leaf.shape
    logprob, entropy = pyrlk.token_logprobs(leaf, tokens, return_entropy=True)
    assert logprob.shape == entropy.shape == shape


@pytest.mark.parametrize("objective", [pyrlk.DAPO(), pyrlk.GSPO()], ids=repr)
def test_no_token_counted_gives_zero_and_never_nan(batch, objective):
    logits, tokens, old, advantages = batch
    mask = torch.zeros(2, 3)
    loss, grad = gradient(logits, tokens, old, advantages, mask, objective=objective)
    assert loss == 0
    assert (grad == 0).all()
