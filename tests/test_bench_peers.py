"""Other packages beside ours in the bench: asked by their own signatures, and for the same values.

None of them is a dependency, and most need a GPU. Here each is a stand-in: the signature of a
release, the mathematics in torch. Where a package is installed its source must agree with that.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch

import pyrlk
from pyrlk.bench import peers


def quack_cross_entropy(
    x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean",
    inplace_backward=False,
):  # fmt: skip
    loss = torch.nn.functional.cross_entropy(x.float(), target, reduction=reduction)
    return Overwriting.apply(x, loss) if inplace_backward else loss


class Overwriting(torch.autograd.Function):
    """As the kernel does it: what the logits were is gone after backward."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.x = x
        return loss.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.x.data.fill_(7.0)
        return None, g


def quack_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
    use_scaled_exp=None,
):  # fmt: skip
    assert reduction in ("mean", "sum")
    return torch.nn.functional.cross_entropy((x @ weight.t()).float(), target, reduction=reduction)


def cce_linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
    filter_eps="high", impl="cce",
):  # fmt: skip
    assert impl == "torch_compile"  # on a CPU
    return torch.nn.functional.cross_entropy((e @ c.t()).float(), targets, reduction=reduction)


def liger_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9,
    beta=0.04, eps_low=0.2, eps_high=0.4, inplace=True, loss_type="dapo",
    max_completion_length=None, importance_sampling_level="token", reduce=False,
    sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vllm_is_ratio=None, delta=None,
    use_bias_correction_kl=False, num_items_in_batch=None, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
    vespo_k_neg=3.0, vespo_lambda_neg=2.0,
):  # fmt: skip
    assert beta == 0.0
    assert reduce
    assert not inplace
    z = logits[:, :-1].float() / temperature
    own = z.log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]
    ratio, a = torch.exp(own - old_logp), advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - eps_low, 1 + eps_high) * a)
    return loss.mean(), [torch.zeros(())]


def trl_log_softmax_and_entropy(
    logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
):
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, index[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def flashinfer_top_k_top_p(
    logits, top_k, top_p, indices=None, filter_apply_order="top_k_first", deterministic=True,
    generator=None, check_nan=False, seed=None, offset=None, top_k_max=None,
):  # fmt: skip
    assert logits.dtype == torch.float32
    return logits.argmax(-1).int()


# Distribution, module and name of each function that peers.py calls; where its source is.
FUNCTIONS = {
    quack_cross_entropy: ("quack-kernels", "quack", "cross_entropy", "cross_entropy.py"),
    quack_linear_cross_entropy: (
        "quack-kernels",
        "quack.linear_cross_entropy",
        "chunked_linear_cross_entropy",
        "linear_cross_entropy.py",
    ),
    cce_linear_cross_entropy: (
        "cut-cross-entropy",
        "cut_cross_entropy",
        "linear_cross_entropy",
        "linear_cross_entropy.py",
    ),
    liger_grpo_loss: (
        "liger-kernel",
        "liger_kernel.transformers.grpo_loss",
        "triton_grpo_loss",
        "transformers/grpo_loss.py",
    ),
    trl_log_softmax_and_entropy: (
        "trl",
        "trl.trainer.utils",
        "selective_log_softmax_and_entropy",
        "trainer/utils.py",
    ),
    flashinfer_top_k_top_p: (
        "flashinfer-python",
        "flashinfer.sampling",
        "top_k_top_p_sampling_from_logits",
        "sampling.py",
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_stand_in_has_the_signature_of_the_installed_package(function):
    """Read from the source: importing some of them needs a GPU."""
    _, module, name, file = FUNCTIONS[function]
    spec = importlib.util.find_spec(module.split(".")[0])
    if spec is None:
        pytest.skip(f"{module} is not installed")
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    theirs = [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    assert theirs == list(inspect.signature(function).parameters)


@pytest.fixture
def stand_ins(monkeypatch):
    """All packages, by stand-ins."""
    versions = {}
    for function, (distribution, module, name, _) in FUNCTIONS.items():
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            if package not in sys.modules or not hasattr(sys.modules[package], "__stand_in__"):
                made = types.ModuleType(package)
                made.__stand_in__, made.__path__ = True, []
                monkeypatch.setitem(sys.modules, package, made)
        setattr(sys.modules[module], name, function)
        versions[distribution] = "1.0"
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)


@pytest.fixture
def batch():
    """logits, tokens, old log-probs and advantages; hidden states and a head."""
    torch.manual_seed(0)
    b = types.SimpleNamespace()
    b.hidden = torch.randn(20, 16).requires_grad_()
    b.weight = (torch.randn(100, 16) / 2).requires_grad_()
    b.logits = (b.hidden @ b.weight.t()).detach()
    b.tokens = torch.randint(100, (20,))
    b.old = pyrlk.token_logprobs(b.logits, b.tokens) + 0.3 * torch.randn(20)
    b.advantages = torch.randn(20)
    return b


def gradient(logits, *rest):
    leaf = logits.clone().requires_grad_()
    pyrlk.dapo_loss(leaf, *rest).backward()
    return leaf.grad


def linear_gradients(b, **options):
    loss = pyrlk.linear_policy_loss(b.hidden, b.weight, b.tokens, b.old, b.advantages, **options)
    return torch.autograd.grad(loss, (b.hidden, b.weight))


def assert_near(x, y):
    torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_quack_computes_our_loss_and_gradient(stand_ins, batch):
    rest = batch.tokens, batch.old, batch.advantages
    leaf = batch.logits.clone().requires_grad_()
    peer = peers.quack_dapo(lambda: leaf, *rest)
    assert_near(peer.step(), pyrlk.dapo_loss(batch.logits, *rest))
    assert_near(peer.truth, pyrlk.dapo_loss(batch.logits, *rest))
    assert_near(leaf.grad, gradient(batch.logits, *rest))
    peer.run()
    assert leaf.grad is None


def test_quack_in_place_is_given_memory_that_it_may_take(stand_ins, batch):
    rest = batch.tokens, batch.old, batch.advantages
    buffer, handle = batch.logits.clone(), torch.zeros((), requires_grad=True)
    from pyrlk.bench.policy_loss import Graph

    peer = peers.quack_dapo(lambda: Graph.apply(handle, buffer), *rest, inplace=True)
    assert_near(peer.run(), peer.truth)
    assert (buffer == 7).all()


def test_quacks_linear_cross_entropy_is_reinforce_with_every_advantage_1(stand_ins, batch):
    peer = peers.quack_linear(batch.hidden, batch.weight, batch.tokens)
    assert_near(peer.step(), peer.truth)
    batch.advantages = torch.ones(20)
    wanted = linear_gradients(batch, objective=pyrlk.REINFORCE())
    for leaf, want in zip(peer.leaves, wanted, strict=True):
        assert_near(leaf.grad, want)


@pytest.mark.parametrize("filtered", [True, False])
def test_cce_computes_our_linear_loss_and_gradients(stand_ins, batch, filtered):
    check_cce(batch, filtered)


@pytest.mark.parametrize("filtered", [True, False])
def test_so_does_the_installed_cce(batch, filtered):
    pytest.importorskip("cut_cross_entropy")
    with torch.compiler.set_stance("force_eager"):
        check_cce(batch, filtered)


def check_cce(b, filtered):
    peer = peers.cce_linear(b.hidden, b.weight, b.tokens, b.old, b.advantages, filtered=filtered)
    assert_near(peer.step(), peer.truth)
    for leaf, want in zip(peer.leaves, linear_gradients(b), strict=True):
        assert_near(leaf.grad, want)
    with torch.no_grad():
        scores = peers.cce_scores(b.hidden, b.weight, b.tokens)
        assert_near(scores.step(), scores.truth)
        assert_near(scores.truth, pyrlk.token_logprobs(b.logits, b.tokens))


def test_liger_computes_our_loss_and_gradient_of_one_sequence(stand_ins, batch):
    ones = torch.ones(20)
    peer = peers.liger_grpo(batch.logits, batch.tokens, batch.old)
    assert_near(peer.step(), peer.truth)
    wanted = gradient(batch.logits, batch.tokens, batch.old, ones)
    assert_near(peer.leaves[0].grad[0, :-1], wanted)


def test_trl_computes_our_log_probs(stand_ins, batch):
    peer = peers.trl_scores(batch.logits, batch.tokens)
    assert_near(peer.step(), peer.truth)


def test_flashinfer_is_left_to_gpus_and_gets_float32(stand_ins, batch, monkeypatch):
    assert (
        peers.usable({"FlashInfer": lambda: peers.flashinfer_sampler(batch.logits, 5, 0.9)}) == {}
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert peers.flashinfer_sampler(batch.logits.bfloat16(), 5, 0.9).run().shape == (20,)


def test_who_is_missing_wrong_or_broken_is_left_out_and_the_others_are_named(stand_ins, capsys):
    def missing():
        raise ImportError

    def broken():
        raise RuntimeError("no kernel image")

    right, wrong = torch.zeros(3), torch.ones(3)
    sides = peers.usable(
        {
            "Liger": missing,
            "TRL": broken,
            "CCE": lambda: peers.Peer(lambda: wrong, (), right),
            "CCE unfiltered": lambda: peers.Peer(lambda: right, (), right),
            "QuACK": lambda: peers.Peer(lambda: right * torch.nan, (), right),
        }
    )
    assert list(sides) == ["CCE 1.0 unfiltered"]
    said = capsys.readouterr().out
    assert "TRL is left out: RuntimeError: no kernel image" in said
    assert "CCE is left out: its values are 1 from ours" in said
    assert "QuACK is left out: its values are nan from ours" in said
    assert "Liger" not in said
