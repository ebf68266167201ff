"""The fused policy loss against the float64 objective and its autograd."""

import itertools
import math

import pytest
import torch

from pyrlk import objective, reference
from pyrlk.triton_kernels import policy_loss

# Rows with NaN and infinities are part of the contract; numpy, under the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = math.nan, math.inf
T = 12

OBJECTIVES = {
    "reinforce": objective.REINFORCE(),
    "ppo": objective.PPO(eps_low=0.1, eps_high=0.3),
    "ppo-dual": objective.PPO(dual_clip=1.5),
    "grpo-delta": objective.GRPO(delta=1.4),
    "dapo": objective.DAPO(),
}
REGULARISERS = {
    "none": {},
    "k1": {"kl": "k1", "kl_coef": 0.3},
    "k2-importance": {"kl": "k2", "kl_coef": 0.3, "kl_importance": True},
    "k3": {"kl": "k3", "kl_coef": 0.3},
    "k3-importance-entropy": {
        "kl": "k3",
        "kl_coef": 0.3,
        "kl_importance": True,
        "entropy_coef": 0.05,
    },
    "entropy": {"entropy_coef": 0.05},
}


class Batch:
    """Rows whose ratios fall below, inside and above every bound, for A < 0, A = 0 and A > 0."""

    def __init__(self, vocab=150, dtype=torch.float32, rows=T, temperature=0.8, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.temperature = temperature
        self.logits = (torch.randn(rows, vocab, generator=g) * 2).to(dtype)
        self.tokens = torch.randint(vocab, (rows,), generator=g)
        exact = reference.token_logprobs(
            self.logits.double(), self.tokens, temperature=float(torch.tensor(temperature))
        )
        log_ratio = torch.linspace(-0.7, 0.7, rows).roll(3)
        self.old = (exact - log_ratio).float()
        self.ref = (exact + torch.randn(rows, generator=g)).float()
        self.advantages = torch.tensor([1.0, -1.0, 0.0, 0.5]).repeat(rows)[:rows]
        self.advantages = self.advantages * (1 + torch.rand(rows, generator=g))
        self.weight = torch.rand(rows, generator=g) + 0.1

    def truth(self, terms, on_policy=False, vocab_size=None):
        """Per-token loss, log-prob, entropy and weight·gradient in float64."""
        z = self.logits.double().requires_grad_()
        logprob, entropy = reference.token_logprobs(
            z,
            self.tokens,
            temperature=float(torch.tensor(self.temperature)),
            vocab_size=vocab_size,
            return_entropy=True,
        )
        old = None if on_policy else self.old.double()
        loss = objective.token_loss(
            logprob, old, self.advantages.double(), self.ref.double(), entropy, terms
        )
        (loss * self.weight.double()).sum().backward()
        return loss.detach(), logprob.detach(), entropy.detach(), z.grad

    def run(self, learn, terms, on_policy=False, **options):
        return learn(
            self.logits,
            self.tokens,
            None if on_policy else self.old,
            self.advantages,
            self.weight,
            terms,
            ref=self.ref if terms.kl_coef else None,
            temperature=self.temperature,
            **options,
        )


def close(x, truth, bound):
    return (x.double() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize(
    ("name", "regulariser", "on_policy"),
    # Every regulariser once, every objective without and with all of them: the two do not interact.
    [("dapo", regulariser, False) for regulariser in REGULARISERS]
    + [(*pair, False) for pair in itertools.product(OBJECTIVES, ["none", "k3-importance-entropy"])][
        :8
    ]
    + [("dapo", "k3-importance-entropy", True), ("reinforce", "none", True)],
)
def test_every_option_matches_float64(learn, small_tiles, name, regulariser, on_policy):
    terms = objective.terms(OBJECTIVES[name], **REGULARISERS[regulariser])
    batch = Batch()
    loss, logprob, entropy, grad = batch.truth(terms, on_policy)
    out = batch.run(learn, terms, on_policy)
    torch.testing.assert_close(out.loss.double(), loss, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(out.logprob.double(), logprob, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.entropy.double(), entropy, atol=1e-6, rtol=0)
    assert close(out.grad, grad, 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_whole_tiles_match_float64(learn, dtype):
    terms = objective.terms(objective.DAPO(), kl_coef=0.1, entropy_coef=0.01)
    batch = Batch(9000, dtype, rows=4)
    loss, _, _, grad = batch.truth(terms)
    out = batch.run(learn, terms)
    torch.testing.assert_close(out.loss.double(), loss, atol=2e-6, rtol=2e-6)
    assert close(out.grad, grad, 4e-6 if dtype == torch.float32 else 1e-3)


def test_temperature_of_each_row(learn, small_tiles):
    terms = objective.terms(objective.DAPO())
    batch = Batch()
    batch.temperature = torch.full((T,), 0.8)
    a, b = batch.run(learn, terms), Batch().run(learn, terms)
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(a.loss, b.loss)


def test_in_place_gives_the_same_bits(learn, small_tiles):
    terms = objective.terms(objective.DAPO(), entropy_coef=0.1)
    apart = Batch().run(learn, terms)
    batch = Batch()
    out = batch.run(learn, terms, grad=batch.logits)
    assert torch.equal(out.grad, apart.grad)
    assert torch.equal(out.loss, apart.loss)


def test_in_place_on_a_strided_view_leaves_the_rest_of_the_buffer(learn, small_tiles):
    terms = objective.terms(objective.DAPO())
    batch = Batch()
    apart = batch.run(learn, terms)
    buffer = torch.full((3, 5, 160), 7.0)
    view = buffer[:, 1:, :150]
    view.copy_(batch.logits.reshape(3, 4, 150))
    batch.logits = view
    out = batch.run(learn, terms, grad=view)
    assert torch.equal(view.reshape(T, 150), apart.grad)
    assert torch.equal(out.loss, apart.loss)
    view.fill_(7.0)
    assert (buffer == 7.0).all()


def test_padding_columns_are_not_read_and_have_no_gradient(learn, small_tiles):
    terms = objective.terms(objective.DAPO(), entropy_coef=0.1)
    batch = Batch()
    plain = batch.run(learn, terms)
    padded = torch.full((T, 300), NAN)
    padded[:, :150] = batch.logits
    batch.logits = padded
    out = batch.run(learn, terms, vocab_size=150)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(out.grad[:, :150], plain.grad)
    assert torch.equal(out.grad[:, 150:], torch.zeros(T, 150))


@pytest.mark.parametrize("masked_by", ["weight", "token"])
def test_masked_rows_may_hold_anything(learn, small_tiles, masked_by):
    terms = objective.terms(objective.DAPO(), kl_coef=0.1, entropy_coef=0.1)
    plain, batch = Batch().run(learn, terms), Batch()
    masked = torch.arange(T) % 3 == 1
    for x in (batch.logits, batch.old, batch.ref, batch.advantages):
        x[masked] = NAN
    if masked_by == "weight":
        batch.weight[masked] = 0
        batch.tokens[masked] = 10**9
    else:
        batch.tokens[masked] = -100
    out = batch.run(learn, terms)
    for name in ("loss", "logprob", "entropy", "grad"):
        got, kept = getattr(out, name), getattr(plain, name)
        assert torch.equal(got[masked], torch.zeros_like(got[masked])), name
        assert torch.equal(got[~masked], kept[~masked]), name


def test_rows_without_gradient_write_zeros(learn, small_tiles):
    # A = 0, and ratios beyond the bound that holds them: no second read, no stale memory.
    terms = objective.terms(objective.DAPO())
    batch = Batch()
    ratio = (batch.truth(terms)[1] - batch.old.double()).exp()
    up, down = batch.advantages > 0, batch.advantages < 0
    still = (batch.advantages == 0) | (up & (ratio > 1.28)) | (down & (ratio < 0.8))
    assert still.sum() >= 5
    assert (~still).sum() >= 3
    grad = batch.run(learn, terms).grad
    assert torch.equal(grad[still], torch.zeros_like(grad[still]))
    assert (grad[~still].abs().amax(-1) > 0).all()


def test_nan_stays_in_its_row(learn, small_tiles):
    terms = objective.terms(objective.DAPO())
    plain, batch = Batch().run(learn, terms), Batch()
    bad = torch.tensor([0, 4, 5, 8])
    batch.advantages[bad] = plain.loss.new_tensor([1.0, 1.0, -1.0, 1.0])
    batch.logits[0, 149] = NAN
    batch.logits[4, 3] = INF
    batch.logits[5] = -INF
    batch.tokens[8] = 150
    for on_policy in (False, True):
        out = batch.run(learn, terms, on_policy)
        assert out.loss[bad].isnan().all()
        assert out.logprob[bad].isnan().all()
        assert out.grad[bad].isnan().all()
        good = torch.ones(T, dtype=torch.bool).index_fill_(0, bad, False)
        assert out.loss[good].isfinite().all()
        assert out.grad[good].isfinite().all()


def test_a_token_scored_twice_has_ratio_one(learn, score, small_tiles):
    # eps 0 keeps the gradient on the bound alone: it survives only where the ratio is exactly 1.
    terms = objective.terms(objective.PPO(eps_low=0.0, eps_high=0.0))
    batch = Batch()
    batch.old = score(batch.logits, batch.tokens, batch.temperature).logprob
    out, on_policy = batch.run(learn, terms), batch.run(learn, terms, on_policy=True)
    assert torch.equal(out.logprob, batch.old)
    assert torch.equal(out.loss, -batch.advantages)
    assert torch.equal(out.grad, on_policy.grad)
    assert (out.grad.abs().amax(-1) > 0).equal(batch.advantages != 0)


def test_extreme_ratios(learn, small_tiles):
    # log-ratios of ±300: exp overflows, and only the side that the clip leaves open may show it.
    terms = objective.terms(objective.PPO(dual_clip=3.0))
    batch = Batch()
    batch.old = batch.old + torch.tensor([300.0, -300.0]).repeat(T // 2)
    loss, _, _, grad = batch.truth(terms)
    out = batch.run(learn, terms)
    torch.testing.assert_close(out.loss.double(), loss, atol=1e-6, rtol=1e-6)
    # Gradients below the range of float32 are 0.
    torch.testing.assert_close(out.grad.double(), grad, atol=1e-30, rtol=4e-6)


def test_without_a_gradient_nothing_else_changes(learn, small_tiles):
    terms = objective.terms(objective.DAPO(), entropy_coef=0.1)
    batch = Batch()
    full = batch.run(learn, terms)
    loss, logprob = torch.full((T,), NAN), torch.full((T,), NAN)
    policy_loss.policy_loss_fwd(
        batch.logits,
        batch.tokens,
        batch.old,
        batch.advantages,
        batch.weight,
        None,
        batch.temperature,
        150,
        terms,
        loss,
        logprob,
        None,
        None,
    )
    assert torch.equal(loss, full.loss)
    assert torch.equal(logprob, full.logprob)


def test_gradient_of_a_row_sums_to_zero(learn, small_tiles):
    terms = objective.terms(objective.DAPO(), kl_coef=0.1, entropy_coef=0.1)
    grad = Batch().run(learn, terms).grad.double()
    assert grad.sum(-1).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_multiplies_rows_in_place(small_tiles, dtype):
    buffer = torch.randn(3, 4, 200).to(dtype)
    before, view = buffer.clone(), buffer[:, :3, :150]
    policy_loss.scale_(view, torch.tensor(1.0))
    assert torch.equal(buffer, before)
    policy_loss.scale_(view, torch.tensor(-0.3))
    assert torch.equal(view, (before[:, :3, :150].float() * torch.tensor(-0.3)).to(dtype))
    assert torch.equal(buffer[:, 3], before[:, 3])
    assert torch.equal(buffer[..., 150:], before[..., 150:])
