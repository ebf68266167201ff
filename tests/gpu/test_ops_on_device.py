"""Every op on a device: it waits for nothing, a graph captures it, the values are the CPU's."""

import pytest
import torch
from dry_device import size

import pyrlk
from pyrlk import TIS, Support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS, LENGTH, WIDTH, VOCAB = 3, size(40, 3), size(64, 16), size(5000, 150)
OBJECTIVES = [
    pyrlk.REINFORCE(),
    pyrlk.PPO(dual_clip=3.0),
    pyrlk.GRPO(delta=4.0),
    pyrlk.BNPO(),
    pyrlk.DrGRPO(max_length=LENGTH),
    pyrlk.DAPO(),
    pyrlk.GSPO(0.2, 0.2),
    pyrlk.CISPO(),
    pyrlk.SAPO(),
    pyrlk.GMPO(),
    pyrlk.LUSPO(),
    pyrlk.VESPO(),
    pyrlk.DPPO("tv"),
    pyrlk.DPPO("kl"),
    pyrlk.DRO(0.1),
    pyrlk.KLCov(),
]
COMMON = {"kl_coef": 0.1, "entropy_coef": 0.02, "return_stats": True}


@pytest.fixture
def batch():
    """Arguments of every op on the CPU, by name."""
    torch.manual_seed(0)
    shape = (ROWS, LENGTH)
    logits = torch.randn(*shape, VOCAB) * 2
    tokens = torch.randint(VOCAB, shape)
    tokens[0, 0] = -100
    own = pyrlk.token_logprobs(logits, tokens)
    kept = torch.rand(ROWS * LENGTH, VOCAB) < 0.05
    kept.scatter_(1, tokens.clamp(min=0).view(-1, 1), True)
    return {
        "logits": logits,
        "hidden": torch.randn(*shape, WIDTH),
        "weight": torch.randn(VOCAB, WIDTH) / 4,
        "tokens": tokens,
        "old": own + 0.05 * torch.randn(shape),
        "ref": own + 0.1 * torch.randn(shape),
        "rollout": own + 0.05 * torch.randn(shape),
        "advantages": torch.randn(shape),
        "mask": (torch.rand(shape) > 0.2).float(),
        "tau": torch.rand(shape) + 0.5,
        "ids": Support.from_mask(kept).ids,
        "offsets": Support.from_mask(kept).offsets,
        "bounds": torch.tensor([0, LENGTH + 1, LENGTH + 1, 3 * LENGTH]),  # of packed sequences
    }


def there(batch):
    return {name: x.cuda() for name, x in batch.items()}


def policy(b, objective, leaf, **options):
    return pyrlk.policy_loss(
        leaf, b["tokens"], b["old"], b["advantages"], b["mask"], objective=objective, **options
    )


def loss_of(objective):
    def run(b):
        leaf = b["logits"].detach().requires_grad_()
        loss, stats = policy(b, objective, leaf, ref_logprobs=b["ref"], **COMMON)
        loss.backward()
        return [loss.detach(), *stats[:3], leaf.grad]

    return run


def in_place(objective):
    def run(b):
        leaf = b["logits"].detach().requires_grad_()
        policy(b, objective, leaf * 1.0, inplace=True).backward()
        return [leaf.grad]

    return run


def kept_and_tempered(b):
    leaf = b["logits"].detach().requires_grad_()
    options = {"temperature": b["tau"], "support": Support(b["ids"], b["offsets"])}
    options |= {"rollout_logprobs": b["rollout"], "correction": TIS(level="sequence")}
    loss = policy(b, pyrlk.DAPO(), leaf, **options)
    loss.backward()
    return [loss.detach(), leaf.grad]


def packed(objective):
    def run(b):
        leaf = b["logits"].flatten(0, 1).detach().requires_grad_()
        rest = (b[name].flatten() for name in ("tokens", "old", "advantages", "mask"))
        loss = pyrlk.policy_loss(leaf, *rest, objective=objective, cu_seqlens=b["bounds"])
        loss.backward()
        return [loss.detach(), leaf.grad]

    return run


def from_logprobs(b):
    leaf = b["old"].detach().requires_grad_()
    loss = pyrlk.policy_loss_from_logprobs(leaf, b["rollout"], b["advantages"], b["mask"])
    loss.backward()
    return [loss.detach(), leaf.grad]


def score(b):
    leaf = b["logits"].detach().requires_grad_()
    logprob, entropy = pyrlk.token_logprobs(leaf, b["tokens"], return_entropy=True)
    (logprob * b["advantages"] + entropy).sum().backward()
    return [logprob.detach(), entropy.detach(), leaf.grad]


def raw_gradient(b):
    return [pyrlk.reinforce_grad(b["logits"], b["tokens"], b["advantages"])]


def linear_loss(objective):
    def run(b):
        leaves = [b[name].detach().requires_grad_() for name in ("hidden", "weight")]
        loss = pyrlk.linear_policy_loss(
            *leaves, b["tokens"], b["old"], b["advantages"], b["mask"],
            objective=objective, entropy_coef=0.02, softcap=8.0,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return run


def linear_score(b):
    leaves = [b[name].detach().requires_grad_() for name in ("hidden", "weight")]
    logprob = pyrlk.linear_token_logprobs(*leaves, b["tokens"], temperature=b["tau"])
    grads = torch.autograd.grad((logprob * b["advantages"]).sum(), leaves)
    return [logprob.detach(), *grads]


def draft_loss(kind):
    def run(b):
        leaf = b["hidden"].detach().requires_grad_()
        teacher = b["hidden"].flip(0) if kind == "tv" else None
        loss, stats = pyrlk.mtp_loss(
            leaf, b["weight"], b["tokens"], kind=kind, teacher_hidden=teacher, return_stats=True
        )
        return [loss.detach(), *stats, *torch.autograd.grad(loss, leaf)]

    return run


def advantages(b):
    return [pyrlk.group_advantages(b["old"].view(-1), ROWS), b["mask"]]


ON_LOGITS = {f"loss {o}": loss_of(o) for o in OBJECTIVES}
ON_LOGITS |= {f"in place {o}": in_place(o) for o in (pyrlk.DAPO(), pyrlk.GSPO(0.2, 0.2))}
ON_LOGITS |= {f"packed {o}": packed(o) for o in (pyrlk.GRPO(), pyrlk.GSPO(0.2, 0.2))}
ON_LOGITS |= {
    "kept, tempered, corrected": kept_and_tempered,
    "from log-probs": from_logprobs,
    "score": score,
    "reinforce_grad": raw_gradient,
    "advantages": advantages,
}
# These count their rows on the host, except in a capture.
ON_STATES = {
    "linear loss": linear_loss(pyrlk.DAPO()),
    "linear loss, two passes": linear_loss(pyrlk.GSPO(0.2, 0.2)),
    "linear score": linear_score,
    "mtp ce": draft_loss("ce"),
    "mtp tv": draft_loss("tv"),
}
EVERY = ON_LOGITS | ON_STATES


def assert_near(got, want, bound=2e-4):
    for x, y in zip(got, want, strict=True):
        x, y = x.cpu().double(), y.cpu().double()
        assert (x - y).norm() <= bound * y.norm() + 1e-6, (x, y)


@pytest.mark.parametrize("name", EVERY)
def test_an_op_gives_the_values_of_the_cpu(batch, name):
    assert_near(EVERY[name](there(batch)), EVERY[name](batch))


@pytest.mark.parametrize("name", ON_LOGITS)
def test_an_op_on_logits_waits_for_nothing(batch, name):
    on_device = there(batch)
    ON_LOGITS[name](on_device)  # the first call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ON_LOGITS[name](on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", EVERY)
def test_a_graph_captures_an_op_and_replays_it_on_new_inputs(batch, name):
    on_device = there(batch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        EVERY[name](on_device)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = EVERY[name](on_device)
    for changed in ("logits", "hidden", "old"):
        batch[changed] = batch[changed] + 0.1 * torch.randn_like(batch[changed])
        on_device[changed].copy_(batch[changed])
    graph.replay()
    assert_near(captured, EVERY[name](batch))


@pytest.mark.parametrize("name", ON_LOGITS)
def test_equal_calls_give_equal_bits(batch, name):
    on_device = there(batch)
    for x, y in zip(ON_LOGITS[name](on_device), ON_LOGITS[name](on_device), strict=True):
        assert torch.equal(x, y)


def test_bad_values_are_errors_where_they_are_asked_for(batch, monkeypatch):
    b = there(batch)
    broken = b["tokens"].clone()
    broken[1, 1] = VOCAB
    assert pyrlk.token_logprobs(b["logits"], broken).isnan().sum() == 1
    short = pyrlk.sample(
        b["logits"], seed=0, top_p=0.9, return_support=True, support_capacity=VOCAB
    )
    assert pyrlk.token_logprobs(b["logits"], short.token, support=short.support).isnan().any()
    tau = torch.ones(ROWS, device="cuda")
    tau[1] = -1.0
    assert pyrlk.sample(b["logits"][:, 0], seed=0, temperature=tau).status.tolist() == [0, 8, 0]

    monkeypatch.setenv("PYRLK_CHECK", "1")
    arguments = b["old"], b["advantages"], b["mask"]
    at = rf"tokens\[{LENGTH + 1}\] = {VOCAB} is outside \[0, {VOCAB}\)"
    b["mask"][1, 1] = 1.0
    for call in (
        lambda: pyrlk.token_logprobs(b["logits"], broken),
        lambda: pyrlk.dapo_loss(b["logits"], broken, *arguments),
        lambda: pyrlk.policy_loss(b["logits"], broken, *arguments, objective=pyrlk.GSPO()),
        lambda: pyrlk.linear_token_logprobs(b["hidden"], b["weight"], broken),
        lambda: pyrlk.linear_policy_loss(b["hidden"], b["weight"], broken, *arguments),
        lambda: pyrlk.reinforce_grad(b["logits"], broken, b["advantages"]),
    ):
        with pytest.raises(ValueError, match=at):
            call()
    with pytest.raises(ValueError, match=r"row \d+ is bits \(status OVERFLOW\).*trim\(\)"):
        pyrlk.token_logprobs(b["logits"], short.token, support=short.support)
    pyrlk.token_logprobs(b["logits"], short.token, support=short.support.trim())
    with pytest.raises(ValueError, match=r"temperature\[1\] = -1.0 is outside"):
        pyrlk.sample(b["logits"][:, 0], seed=0, temperature=tau)
    with pytest.raises(ValueError, match=r"mask\[0\] = -1.0"):
        pyrlk.dapo_loss(b["logits"], b["tokens"].clamp(min=0), *arguments[:2], b["mask"] * 0 - 1)
