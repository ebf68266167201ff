"""What each rank of a small gloo group checks; test_vocab_parallel.py has one test a check.

Every check runs on all ranks and compares with the whole vocabulary, which every rank also has.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types

import pytest
import torch
import torch.distributed as dist
from harness import check, collectives, main

import pyrlk
from pyrlk import reference
from pyrlk.integrations import slime
from pyrlk.parallel import sampling as sharded

T, V, H = 24, 1000, 32


class Case:
    """Inputs that every rank makes from the same seed, and this rank's share of the columns."""

    def __init__(self, group, widths=None, dtype=torch.float32, seed=0, vocab=V):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.widths = list(widths or uneven(vocab, self.ranks))
        self.first = sum(self.widths[: self.rank])
        self.columns = slice(self.first, self.first + self.widths[self.rank])
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g)

        self.logits = (2 * normal(T, vocab)).to(dtype)
        self.hidden, self.weight = normal(T, H).to(dtype), (normal(vocab, H) / 4).to(dtype)
        self.bias = normal(vocab).to(dtype)
        self.tokens = torch.randint(0, vocab, (T,), generator=g)
        self.tokens[3] = -100
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # Ratios near 1: losses of the size of the advantages, whose rounding can be bounded.
        own = pyrlk.token_logprobs(self.logits, self.tokens).to(wide)
        self.old = own + normal(T).to(wide) / 4
        self.ref, self.rollout = self.old + normal(T).to(wide) / 9, self.old + normal(T) / 9
        self.advantages = normal(T).to(wide)
        self.mask = (torch.rand(T, generator=g) > 0.2) & (self.tokens != -100)
        self.tau = (torch.rand(T, generator=g) + 0.5).to(wide)
        self.rollout = self.rollout.to(wide)

    def mine(self, x, dim=-1):
        return x.narrow(dim, self.first, self.widths[self.rank]).detach().clone()


def uneven(vocab, ranks):
    """Shares that no equal split gives: 600/400, 400/350/250, 400/0/350/250."""
    shares = {1: [1000], 2: [600, 400], 3: [400, 350, 250], 4: [400, 0, 350, 250]}[ranks]
    assert vocab >= sum(shares)
    return [*shares[:-1], vocab - sum(shares[:-1])]


def leaf(x):
    return x.detach().clone().requires_grad_()


def near(got, wanted, bound, label=""):
    """Absolute, and relative above 1."""
    error = (got.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)
    error = error.max() if got.numel() else 0
    assert error <= bound, f"{label}: {error} > {bound}"


def near_gradient(got, wanted, bound, whole):
    error, size = (got.double() - wanted.double()).norm(), whole.double().norm()
    assert error <= bound * size, f"{error / size} > {bound}"


def same_on_all_ranks(group, *tensors):
    """Every rank has the same bits."""
    mine = [x.detach().reshape(-1).view(torch.uint8).tolist() for x in tensors]
    every = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    assert all(other == mine for other in every)


def groups():
    """The whole world, and where it has four ranks the first three of them."""
    yield dist.group.WORLD
    if dist.get_world_size() == 4:
        three = dist.new_group([0, 1, 2])
        if dist.get_rank() < 3:
            yield three


def raises(error, match, call, **options):
    with pytest.raises(error, match=re.escape(match)):
        call(**options)


BOUNDS = {torch.float32: (2e-6, 4e-6), torch.float64: (1e-12, 1e-12)}


@check
def scores_and_their_gradient_equal_float64():
    """Scalar and per-token temperatures, both types whose gradient is not rounded to 16 bits."""
    for group in groups():
        for dtype, (bound, slope) in BOUNDS.items():
            case = Case(group, dtype=dtype)
            for tau in (1.0, 0.7, case.tau):
                z, local = leaf(case.logits.double()), leaf(case.mine(case.logits))
                wide = tau.double() if isinstance(tau, torch.Tensor) else tau
                options = {"return_entropy": True}
                wanted = reference.token_logprobs(z, case.tokens, temperature=wide, **options)
                got = pyrlk.token_logprobs(
                    local, case.tokens, temperature=tau, group=group, **options
                )
                for a, b in zip(got, wanted, strict=True):
                    near(a, b, bound)
                same_on_all_ranks(group, *got)
                slopes = case.advantages, case.old
                torch.autograd.backward(wanted, [s.double() for s in slopes])
                torch.autograd.backward(got, slopes)
                near_gradient(local.grad, z.grad[:, case.columns], slope, z.grad)


@check
def sixteen_bit_gradients_equal_the_unsharded_ones():
    """Rounded from values that agree to 1e-6: rarely a unit in the last place apart."""
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(dist.group.WORLD, dtype=dtype)
        z, local = leaf(case.logits), leaf(case.mine(case.logits))
        wanted = pyrlk.token_logprobs(z, case.tokens)
        got = pyrlk.token_logprobs(local, case.tokens, group=case.group)
        near(got, wanted, 2e-6)
        wanted.backward(case.advantages)
        got.backward(case.advantages)
        here = z.grad[:, case.columns]
        assert (local.grad != here).sum() <= 1e-2 * here.numel() + 1
        near_gradient(local.grad, here, torch.finfo(dtype).eps, z.grad)


@check
def padding_beyond_the_vocabulary_does_not_count():
    """The padding begins inside a shard, at its first column, and leaves the last one empty."""
    for size in (V - 1, V - 250, V - 400, 17):
        case = Case(dist.group.WORLD)
        tokens = torch.where(case.tokens == -100, -100, case.tokens % size)
        poisoned = case.logits.clone()
        poisoned[:, size:] = float("nan")
        z, local = leaf(case.logits.double()), leaf(case.mine(poisoned))
        wanted = reference.token_logprobs(z, tokens, vocab_size=size, return_entropy=True)
        got = pyrlk.token_logprobs(
            local, tokens, vocab_size=size, return_entropy=True, group=case.group
        )
        for a, b in zip(got, wanted, strict=True):
            near(a, b, 2e-6, f"vocab_size {size}")
        sum(x.sum() for x in wanted).backward()
        sum(x.sum() for x in got).backward()
        near_gradient(local.grad, z.grad[:, case.columns], 4e-6, z.grad)


@check
def rows_without_a_distribution_are_nan_on_every_rank_and_alone():
    """−inf is probability 0 also where it fills a shard; NaN, +inf or only −inf is NaN."""
    case = Case(dist.group.WORLD)
    z = case.logits.clone()
    z[0, : case.widths[0]] = -torch.inf  # the first shard has nothing
    z[0, case.tokens[0]] = 1.0
    z[1, 7], z[2, 990], z[4, :] = torch.nan, torch.inf, -torch.inf
    z[5, case.tokens[5]] = -torch.inf
    z[6, 990] = 3e38
    whole, local = leaf(z.double()), leaf(case.mine(z))
    options = {"return_entropy": True}
    wanted = pyrlk.token_logprobs(whole, case.tokens, **options)
    got = pyrlk.token_logprobs(local, case.tokens, group=case.group, **options)
    regular = torch.ones(T, dtype=torch.bool)
    regular[torch.tensor([1, 2, 4])] = False
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.isnan(), ~regular)
        assert torch.equal(b.isnan(), ~regular)
        finite = regular & b.isfinite()
        near(a[finite], b[finite] if a is got[1] else b.float()[finite], 2e-6)
    assert got[0][5] == -torch.inf
    (got[0] + got[1])[regular & got[0].isfinite()].sum().backward()
    (wanted[0] + wanted[1])[regular & got[0].isfinite()].sum().backward()
    near_gradient(local.grad, whole.grad[:, case.columns], 4e-6, whole.grad)
    bad = leaf(case.mine(z))
    pyrlk.token_logprobs(bad, case.tokens, group=case.group).backward(torch.ones(T))
    assert torch.equal(bad.grad.isnan().any(-1), ~regular & (bad.shape[1] > 0))
    assert torch.equal(bad.grad.isnan().all(-1), ~regular | (bad.shape[1] == 0))


LOSSES = {
    "DAPO with everything": {
        "kl_coef": 0.1, "entropy_coef": 0.05, "correction": pyrlk.TIS(), "return_stats": True,
    },
    "REINFORCE": {"objective": pyrlk.REINFORCE(), "normalizer": 7.0},
    "on policy, with a correction": {"old": None, "correction": pyrlk.TIS(mode="mask")},
    "GRPO": {"objective": pyrlk.GRPO(), "packed": True, "kl_coef": 0.1, "kl": "k2"},
    "GSPO": {"objective": pyrlk.GSPO(), "packed": True, "return_stats": True},
    "a callable": {"objective": lambda lp, old, adv, mask: -(lp - old).exp() * adv},
}  # fmt: skip


def loss_options(case, options):
    options = dict(options)
    old = options.pop("old", case.old)
    if options.pop("packed", False):
        options["cu_seqlens"] = torch.tensor([0, 5, 6, 17, T])
    if "correction" in options:
        options["rollout_logprobs"] = case.rollout
    if "kl_coef" in options:
        options["ref_logprobs"] = case.ref
    return (case.tokens, old, case.advantages, case.mask), options


def split(out):
    return out if isinstance(out, tuple) else (out, ())


@check
def policy_losses_equal_the_unsharded_ones():
    """Everything beside the logits is replicated: one objective of each way to a gradient."""
    for group in groups():
        case = Case(group)
        for name, given in LOSSES.items():
            inputs, options = loss_options(case, given)
            options["temperature"] = case.tau
            z, local = leaf(case.logits), leaf(case.mine(case.logits))
            wanted, stats = split(pyrlk.policy_loss(z, *inputs, **options))
            got, got_stats = split(pyrlk.policy_loss(local, *inputs, group=group, **options))
            near(got, wanted, 2e-6, name)
            for a, b in zip(got_stats, stats, strict=True):
                near(a, b, 4e-6, name)
            same_on_all_ranks(group, got, *got_stats)
            wanted.backward()
            got.backward()
            near_gradient(local.grad, z.grad[:, case.columns], 4e-6, z.grad)
            copy = case.mine(case.logits).requires_grad_() * 1.0
            copy.retain_grad()
            inplace, _ = split(
                pyrlk.policy_loss(copy, *inputs, group=group, inplace=True, **options)
            )
            inplace.backward()
            assert torch.equal(copy.detach(), local.grad), name
        for shorthand, more in ((pyrlk.dapo_loss, (case.old,)), (pyrlk.reinforce_loss, ())):
            rest = (case.tokens, *more, case.advantages, case.mask)
            got = shorthand(case.mine(case.logits), *rest, group=group)
            near(got, shorthand(case.logits, *rest), 2e-6)


def linear_calls(case, leaves, group, how):
    x, w, b = leaves
    options = {"bias": b, "temperature": case.tau, "group": group} | how
    score = pyrlk.linear_token_logprobs(x, w, case.tokens, return_entropy=True, **options)
    inputs, more = loss_options(case, LOSSES["DAPO with everything"])
    loss, stats = pyrlk.linear_policy_loss(x, w, *inputs, **options, **more)
    return *score, loss, torch.stack(stats)


@check
def linear_scores_and_losses_equal_the_unsharded_ones():
    """∂weight is local, ∂hidden the sum over the ranks; chunks, bias, softcap."""
    for group in groups():
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
            case = Case(group, dtype=dtype)
            for how in ({}, {"chunk": 5, "softcap": 3.0}):
                whole = [leaf(x) for x in (case.hidden, case.weight, case.bias)]
                share = [leaf(case.hidden), *(leaf(case.mine(x, 0)) for x in whole[1:])]
                wanted = linear_calls(case, whole, None, how)
                got = linear_calls(case, share, group, how)
                for a, b in zip(got, wanted, strict=True):
                    near(a, b, bound)
                for out in (wanted, got):
                    (out[0].sum() + out[1].sum() + 10 * out[2]).backward()
                near_gradient(share[0].grad, whole[0].grad, bound, whole[0].grad)
                for a, b in zip(share[1:], whole[1:], strict=True):
                    near_gradient(a.grad, b.grad[case.columns], bound, b.grad)
                same_on_all_ranks(group, *got, share[0].grad)


def mtp(case, hidden, weight, group, kind, **options):
    """The loss, its by-products, and backward."""
    teacher = case.hidden.flip(0) if kind == "tv" else None
    cu_seqlens = torch.tensor([0, 9, 10, T])
    loss, stats = pyrlk.mtp_loss(
        hidden, weight, case.tokens, mask=case.mask, cu_seqlens=cu_seqlens, kind=kind,
        teacher_hidden=teacher, detach_weight=False, group=group, return_stats=True, **options,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), *stats


@check
def the_loss_of_a_draft_head_equals_the_unsharded_one():
    """Both kinds, chunks, packed sequences, a mask, a token at the edge of a shard."""
    for group in groups():
        for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            case = Case(group, dtype=dtype)
            case.tokens[4], case.tokens[13] = case.widths[0] - 1, case.widths[0]
            for kind in ("ce", "tv"):
                for options in ({}, {"depth": 2, "chunk": 5}):
                    x, w = leaf(case.hidden), leaf(case.weight)
                    y, v = leaf(case.hidden), leaf(case.mine(case.weight, 0))
                    wanted, *counts = mtp(case, x, w, None, kind, **options)
                    got, *same = mtp(case, y, v, group, kind, **options)
                    near(got, wanted, bound, kind)
                    assert same == counts
                    near_gradient(y.grad, x.grad, 2 * bound, x.grad)
                    near_gradient(v.grad, w.grad[case.columns], 2 * bound, w.grad)
                    same_on_all_ranks(group, got, *same, y.grad)
                    z, u = leaf(case.hidden), leaf(case.mine(case.weight, 0))
                    assert torch.equal(mtp(case, z, u, group, kind, **options)[0], got)
                    assert torch.equal(z.grad, y.grad)
                    assert torch.equal(u.grad, v.grad)


@check
def equal_logits_of_two_ranks_count_as_argmax_has_them():
    """The first of the largest: the last rank repeats the first one's rows of the weight."""
    case = Case(dist.group.WORLD, dtype=torch.bfloat16)
    twins = case.weight.clone()
    twins[-100:] = twins[:100]
    best = (case.hidden @ twins.t()).argmax(-1)
    assert (best < 100).any()
    for shift in (0, V - 100):
        case.tokens[1:] = torch.where(best < 100, best + shift, best)[:-1]
        case.mask[:] = True
        options = {"mask": case.mask, "depth": 1, "return_stats": True}
        tokens = case.tokens.roll(1)
        whole = pyrlk.mtp_loss(case.hidden, twins, tokens, **options)[1]
        mine = case.mine(twins, 0)
        assert pyrlk.mtp_loss(case.hidden, mine, tokens, group=case.group, **options)[1] == whole
        assert (whole.matches == whole.tokens) == (shift == 0)


@check
def collectives_of_a_draft_head():
    """ "ce" meets once; "tv" needs the sums of whole rows before it knows which is larger."""
    case = Case(dist.group.WORLD)
    gather, reduce = "c10d::allgather_", "c10d::allreduce_"

    def run(hidden, kind):
        teacher = case.hidden if kind == "tv" else None
        options = {"kind": kind, "teacher_hidden": teacher, "group": case.group, "chunk": 5}
        loss = pyrlk.mtp_loss(
            hidden, leaf(case.mine(case.weight, 0)), case.tokens, detach_weight=False,
            return_stats=True, **options,
        )[0]  # fmt: skip
        loss.backward()

    run(case.hidden, "ce")
    for kind, gathers in (("ce", 1), ("tv", 2)):
        assert collectives(lambda k=kind: run(case.hidden, k)) == [gather] * gathers
        seen = collectives(lambda k=kind: run(leaf(case.hidden), k))
        assert seen == [gather] * gathers + [reduce]


@check
def a_draft_head_names_what_is_wrong():
    case = Case(dist.group.WORLD)
    call = {
        "hidden": case.hidden, "weight": case.mine(case.weight, 0), "tokens": case.tokens,
        "group": case.group,
    }  # fmt: skip
    far = case.tokens.index_fill(0, torch.tensor([8]), V)
    raises(
        ValueError, f"tokens[8] = {V} is outside [0, {V})", pyrlk.mtp_loss, **call | {"tokens": far}
    )
    other = case.tokens.index_fill(0, torch.tensor([8]), dist.get_rank())
    raises(
        ValueError, "tokens must be the same on every rank", pyrlk.mtp_loss,
        **call | {"tokens": other},
    )  # fmt: skip
    raises(TypeError, "group must be", pyrlk.mtp_loss, **call | {"group": 1})
    none = torch.full((T,), -100)
    assert pyrlk.mtp_loss(**call | {"tokens": none}) == 0


@check
def main_grad_of_a_sharded_weight_is_added_to():
    case = Case(dist.group.WORLD)
    plain, megatron = leaf(case.mine(case.weight, 0)), leaf(case.mine(case.weight, 0))
    megatron.main_grad = torch.ones(megatron.shape)
    for weight in (plain, megatron):
        pyrlk.linear_policy_loss(
            case.hidden, weight, case.tokens, case.old, case.advantages, group=case.group
        ).backward()
    assert megatron.grad is None
    near(megatron.main_grad, plain.grad + 1, 1e-6)


@check
def kept_sets_are_shared_out():
    """Ids of the whole vocabulary; some ranks keep none of a row's."""
    case = Case(dist.group.WORLD)
    drawn = pyrlk.sample(case.logits, top_k=9, top_p=0.9, seed=3, return_support=True)
    tokens = torch.where(case.tokens == -100, -100, drawn.token)
    options = {"support": drawn.support, "temperature": case.tau}
    z, local = leaf(case.logits), leaf(case.mine(case.logits))
    x, w, v = leaf(case.hidden), leaf(case.weight), leaf(case.mine(case.weight, 0))
    y, group = leaf(case.hidden), case.group
    more = {"return_entropy": True, **options}
    wanted = pyrlk.token_logprobs(z, tokens, **more)
    got = pyrlk.token_logprobs(local, tokens, group=group, **more)
    linear = pyrlk.linear_token_logprobs(x, w, tokens, chunk=7, **more)
    sharded = pyrlk.linear_token_logprobs(y, v, tokens, chunk=7, group=group, **more)
    for a, b in zip((*got, *sharded), (*wanted, *linear), strict=True):
        near(a, b, 2e-6)
    for out in (wanted, got, linear, sharded):
        (out[0] * case.advantages + out[1] * case.old).sum().backward()
    near_gradient(local.grad, z.grad[:, case.columns], 4e-6, z.grad)
    assert (local.grad != 0).sum() <= drawn.support.ids.numel()
    near_gradient(v.grad, w.grad[case.columns], 4e-6, w.grad)
    near_gradient(y.grad, x.grad, 4e-6, x.grad)
    outside = tokens.clone()
    outside[5] = next(i for i in range(V) if i not in drawn.support.rows()[5])
    message = f"tokens[5] = {outside[5]} is outside its support"
    again = {"tokens": outside, "group": group, **options}
    raises(ValueError, message, pyrlk.token_logprobs, logits=local, **again)


@check
def the_same_call_gives_the_same_bits_in_any_batch():
    case = Case(dist.group.WORLD)
    z = case.mine(case.logits)

    def run(rows):
        local = leaf(z[rows])
        out = pyrlk.token_logprobs(
            local, case.tokens[rows], return_entropy=True, temperature=0.9, group=case.group
        )
        torch.autograd.backward(out, [case.advantages[rows], case.old[rows]])
        return *out, local.grad

    first = [x.clone() for x in run(slice(0, T))]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(slice(0, T)), first, strict=True))
    for rows in (slice(0, 1), slice(4, 11)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), first, strict=True))


def hard_rows(case):
    """Ties, flat and peaked rows, −inf, NaN, +inf, one finite logit, none; shards without any."""
    z = case.logits.clone()
    z[1] = 0.0
    z[2] = z[2].bfloat16().float()
    z[3, 1:] = -torch.inf
    z[4] = -torch.inf
    z[5, :400] = -torch.inf
    z[6, 17], z[7, 640], z[7, 3] = torch.nan, torch.inf, torch.inf
    z[8] = torch.where(torch.arange(V) % 3 == 0, 1.0, -1.0)
    z[9] *= 1e37
    z[10, 0], z[10, 999] = 30.0, 30.0
    z[11] = -0.0
    z[11, ::2] = 0.0
    return z


DRAWS = [
    {}, {"top_k": 5}, {"top_k": 1}, {"top_p": 0.9}, {"top_p": 0.0}, {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.95}, {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "order": "joint"},
    {"top_k": 7, "ties": "keep"}, {"top_p": 0.5, "ties": "keep"}, {"top_k": V},
    {"top_p": 1 - 2**-16}, {"temperature": 0.0, "top_k": 3}, {"temperature": 1e-6},
    {"temperature": 1e3, "top_p": 0.7},
]  # fmt: skip


@contextlib.contextmanager
def ways_to_draw(way):
    """How rows are drawn from on the CPU: by candidates, by few of them, as on CUDA."""
    before = sharded.sample, sharded._MOST_CANDIDATES
    if way == "few candidates":
        sharded._MOST_CANDIDATES = 6
    if way == "digits":
        sharded.sample = sharded.digits.sample
    try:
        yield
    finally:
        sharded.sample, sharded._MOST_CANDIDATES = before


@check
def draws_by_candidates_are_those_of_the_whole_rows():
    draws_are_those_of_the_whole_rows("candidates")


@check
def draws_that_overflow_are_those_of_the_whole_rows():
    draws_are_those_of_the_whole_rows("few candidates")


@check
def draws_by_digits_are_those_of_the_whole_rows():
    draws_are_those_of_the_whole_rows("digits")


def draws_are_those_of_the_whole_rows(way):
    """Tokens, kept sets and status in every bit; log-probs to 2e-6."""
    for group in groups():
        case = Case(group)
        z = hard_rows(case)
        g = torch.Generator().manual_seed(5)
        each = {
            "temperature": torch.rand(T, generator=g) * (torch.arange(T) % 4 > 0),
            "top_k": torch.randint(-1, V + 2, (T,), generator=g),
            "top_p": torch.rand(T, generator=g), "min_p": torch.rand(T, generator=g) / 50,
            "seed": torch.randint(-(2**62), 2**62, (T,), generator=g), "position": torch.arange(T),
        }  # fmt: skip
        allowed = torch.randint(-(2**31), 2**31 - 1, (T, -(-V // 32)), generator=g).int()
        for given in (*DRAWS, each, {"allowed": allowed, "top_k": 9}):
            for dtype in (torch.float32, torch.bfloat16):
                options = {"seed": 11, **given, "return_support": True}
                wanted = pyrlk.sample(z.to(dtype), **options)
                with ways_to_draw(way):
                    got = pyrlk.sample(case.mine(z.to(dtype)), group=group, **options)
                assert torch.equal(got.token, wanted.token), given
                assert torch.equal(got.kept, wanted.kept), given
                assert torch.equal(got.status, wanted.status), given
                assert got.support.rows() == wanted.support.rows(), given
                drawn = wanted.token >= 0
                for name in ("logprob", "full_logprob"):
                    a, b = getattr(got, name), getattr(wanted, name)
                    assert torch.equal(a.isnan(), ~drawn)
                    near(a[drawn], b[drawn], 2e-6, f"{name} {given}")
                same_on_all_ranks(group, *got[:5])


@check
def draws_do_not_depend_on_the_users_defaults_for_new_tensors():
    case = Case(dist.group.WORLD)
    z = hard_rows(case)
    for way in ("candidates", "few candidates", "digits"):
        for given in ({}, {"top_p": 0.9}, {"top_k": 5}):
            options = {"seed": 3, **given, "return_support": True}
            wanted, mine = pyrlk.sample(z, **options), case.mine(z)
            with ways_to_draw(way), torch.device("meta"):
                torch.set_default_dtype(torch.float64)
                try:
                    got = pyrlk.sample(mine, group=case.group, **options)
                    score = pyrlk.token_logprobs(mine, case.tokens, group=case.group)
                finally:
                    torch.set_default_dtype(torch.float32)
            assert torch.equal(got.token, wanted.token), (way, given)
            assert got.support.rows() == wanted.support.rows(), (way, given)
            assert score.device.type == "cpu"


@check
def draws_of_many_positions_agree():
    """4,000 draws a filter: an edge of the running mass that moved by one unit would show."""
    case = Case(dist.group.WORLD)
    z = case.logits.repeat(4, 1)
    for given in ({}, {"top_p": 0.95}, {"top_k": 40}):
        for position in range(15):
            options = {"seed": 1, "position": position, **given}
            wanted = pyrlk.sample(z, **options)
            got = pyrlk.sample(case.mine(z), group=case.group, **options)
            assert torch.equal(got.token, wanted.token)


@check
def collectives_of_a_draw():
    """One; top-p of the whole row needs its mass, and a row that nothing cuts the place, too.

    The candidates of these rows fit: most of their mass is near the maximum.
    """
    case = Case(dist.group.WORLD)
    gather, reduce = "c10d::allgather_", "c10d::allreduce_"
    for given, wanted in (
        ({"top_k": 5}, [gather]),
        ({"min_p": 0.1}, [gather]),
        ({"top_k": 50, "top_p": 0.95}, [gather]),
        ({"top_k": 50, "top_p": 0.95, "min_p": 0.01}, [gather]),
        ({"temperature": 0.0}, [gather]),
        ({"top_p": 0.9}, [gather] * 2),
        ({}, [gather] * 2 + [reduce]),
    ):
        z = case.mine(8 * case.logits)
        pyrlk.sample(z, seed=0, group=case.group)
        seen = collectives(lambda z=z, o=given: pyrlk.sample(z, seed=0, group=case.group, **o))
        assert seen == wanted, given


@check
def the_draw_needs_no_candidates_where_nothing_is_cut():
    """Rows wider than the candidates that are sent; the log-prob is that of the whole row."""
    g = torch.Generator().manual_seed(2)
    z = 3 * torch.randn(8, 9000, generator=g)
    case = Case(dist.group.WORLD, vocab=9000)
    z[3, ::2], z[4, 100], z[5] = -torch.inf, torch.inf, -torch.inf
    for position in range(20):
        options = {"seed": 4, "position": position, "temperature": 0.8}
        wanted = pyrlk.sample(z, **options)
        got = pyrlk.sample(case.mine(z), group=case.group, **options)
        for name in ("token", "kept", "status"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        for name in ("logprob", "full_logprob"):
            a, b = getattr(got, name), getattr(wanted, name)
            near(a[wanted.token >= 0], b[wanted.token >= 0], 2e-6)
    support = pyrlk.sample(case.mine(z), group=case.group, return_support=True, **options).support
    assert support.rows() == pyrlk.sample(z, return_support=True, **options).support.rows()


@check
def errors_of_a_draw_name_the_argument():
    case = Case(dist.group.WORLD)
    z = {"logits": case.mine(case.logits), "group": case.group, "seed": 0}
    cold = torch.ones(T).index_fill(0, torch.tensor([3]), -1.0)
    raises(ValueError, "temperature[3] = -1.0", pyrlk.sample, **z, temperature=cold)
    words = torch.zeros(T, 5, dtype=torch.int32)
    raises(ValueError, "allowed must have", pyrlk.sample, **z, allowed=words)
    raises(ValueError, "support_capacity", pyrlk.sample, **z, support_capacity=5)
    raises(
        ValueError,
        "must be the same on every rank",
        pyrlk.sample,
        **(z | {"seed": dist.get_rank()}),
    )
    raises(TypeError, "group must be", pyrlk.sample, **(z | {"group": 1}))


@check
def one_collective_a_call():
    """Equal shards from the first call on, others from the second; ∂hidden is one all-reduce."""
    case = Case(dist.new_group(), [V // dist.get_world_size()] * dist.get_world_size())
    other = Case(case.group)
    gather, reduce = "c10d::allgather_", "c10d::allreduce_"

    def score(c):
        pyrlk.token_logprobs(leaf(c.mine(c.logits)), c.tokens, group=c.group).sum().backward()

    def linear(c, hidden):
        pyrlk.linear_policy_loss(
            hidden, leaf(c.mine(c.weight, 0)), c.tokens, c.old, c.advantages, c.mask, chunk=5,
            entropy_coef=0.1, group=c.group, return_stats=True,
        )[0].backward()  # fmt: skip

    assert collectives(lambda: score(case)) == [gather]
    first = collectives(lambda: score(other))
    assert first == [gather] * 2
    assert collectives(lambda: score(other)) == [gather]
    for c in (case, other):
        assert collectives(lambda c=c: linear(c, leaf(c.hidden))) == [gather, reduce]
        assert collectives(lambda c=c: linear(c, c.hidden)) == [gather]


@check
def layouts_that_share_a_width_do_not_mix():
    """One rank cannot tell them apart by its own shard; the numbers are right all the same."""
    if dist.get_world_size() < 4:
        return
    for widths in ([400, 200, 200, 200], [400, 0, 350, 250], [400, 200, 200, 200]):
        case = Case(dist.group.WORLD, widths)
        got = pyrlk.token_logprobs(case.mine(case.logits), case.tokens, group=case.group)
        near(got, pyrlk.token_logprobs(case.logits, case.tokens), 2e-6)


@check
def dtensors_sharded_on_the_vocabulary_are_recognised():
    """Their gradients are DTensors of the same placement; 1-D and 2-D meshes, uneven chunks."""
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    ranks = dist.get_world_size()
    meshes = [(init_device_mesh("cpu", (ranks,)), [])]
    if ranks == 4:
        meshes.append((init_device_mesh("cpu", (2, 2)), [Replicate()]))
    case = Case(dist.group.WORLD, vocab=V + 1)
    inputs, options = loss_options(case, LOSSES["DAPO with everything"])
    named = dict(zip(("tokens", "old_logprobs", "advantages", "mask"), inputs, strict=True))
    for mesh, rest in meshes:
        z = leaf(case.logits)
        wanted, _ = pyrlk.policy_loss(z, *inputs, **options)
        wanted.backward()
        for dim in (1, -1):
            logits = distribute_tensor(case.logits, mesh, [*rest, Shard(dim)]).requires_grad_()
            loss, _ = pyrlk.policy_loss(logits, *inputs, **options)
            loss.backward()
            near(loss, wanted, 2e-6)
            assert isinstance(logits.grad, DTensor)
            assert logits.grad.placements == logits.placements
            near_gradient(logits.grad.full_tensor(), z.grad, 4e-6, z.grad)
        score = pyrlk.token_logprobs(logits, case.tokens)
        near(score, pyrlk.token_logprobs(z, case.tokens), 2e-6)
        raises(
            ValueError, "leaf that requires grad", pyrlk.dapo_loss,
            logits=logits, inplace=True, **named,
        )  # fmt: skip

        x, w, b = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
        wanted, _ = pyrlk.linear_policy_loss(x, w, *inputs, bias=b, **options)
        wanted.backward()
        weight = distribute_tensor(case.weight, mesh, [*rest, Shard(0)]).requires_grad_()
        bias = distribute_tensor(case.bias, mesh, [*rest, Shard(0)]).requires_grad_()
        everywhere = [*rest, Replicate()]
        for hidden in (leaf(case.hidden), leaf(distribute_tensor(case.hidden, mesh, everywhere))):
            weight.grad = bias.grad = None
            loss, _ = pyrlk.linear_policy_loss(hidden, weight, *inputs, bias=bias, **options)
            loss.backward()
            near(loss, wanted, 2e-6)
            for got, whole in ((hidden, x), (weight, w), (bias, b)):
                full = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
                near_gradient(full, whole.grad, 4e-6, whole.grad)
            assert weight.grad.placements == weight.placements

        whole = leaf(distribute_tensor(case.logits, mesh, everywhere))
        pyrlk.token_logprobs(whole, case.tokens).sum().backward()
        assert whole.grad.placements == whole.placements
        score, head = pyrlk.token_logprobs, pyrlk.linear_token_logprobs
        rows = distribute_tensor(case.logits, mesh, [*rest, Shard(0)])
        states = distribute_tensor(case.hidden, mesh, [*rest, Shard(0)])
        same = {"tokens": case.tokens}
        raises(ValueError, "logits, a DTensor, must be Shard(1)", score, logits=rows, **same)
        raises(ValueError, "hidden must be", head, hidden=states, weight=weight, **same)
        raises(ValueError, "group must be", score, logits=whole, group=case.group, **same)


@check
def empty_batches_and_masked_ones_work():
    case = Case(dist.group.WORLD)
    none, local = torch.zeros(0, dtype=torch.long), leaf(case.mine(case.logits))
    assert pyrlk.token_logprobs(local[:0], none, group=case.group).shape == (0,)
    w, x = leaf(case.mine(case.weight, 0)), leaf(case.hidden)
    assert pyrlk.linear_token_logprobs(x[:0], w, none, group=case.group).shape == (0,)
    mask = torch.zeros(T)
    inputs = case.tokens, case.old, case.advantages, mask
    losses = [
        pyrlk.dapo_loss(local, *inputs, group=case.group),
        pyrlk.linear_policy_loss(x, w, *inputs, group=case.group),
    ]
    for loss in losses:
        loss.backward()
        assert loss == 0
    assert not any(leaf.grad.any() for leaf in (local, w, x))
    shaped = case.mine(case.logits).view(2, T // 2, -1)
    got = pyrlk.token_logprobs(shaped, case.tokens.view(2, -1), group=case.group)
    near(got.view(-1), pyrlk.token_logprobs(case.logits, case.tokens), 2e-6)


@check
def errors_name_the_argument_on_every_rank():
    case = Case(dist.group.WORLD)
    z, group = case.mine(case.logits), case.group

    def score(tokens=case.tokens, group=group, **options):
        return pyrlk.token_logprobs(z, tokens, group=group, **options)

    def with_token(value):
        return {"tokens": case.tokens.index_fill(0, torch.tensor([8]), value)}

    for bad in (V, -1, -99):
        raises(ValueError, f"tokens[8] = {bad} is outside [0, {V})", score, **with_token(bad))
    outside = "tokens[8] = 999 is outside [0, 999)"
    raises(ValueError, outside, score, **with_token(999), vocab_size=999)
    for size in (0, V + 1, 1 << 24):
        raises(ValueError, "vocab_size must", score, vocab_size=size)
    raises(TypeError, "vocab_size must be an integer", score, vocab_size=1.0)
    for bad in (object(), [0, 1], "0", dist.GroupMember.NON_GROUP_MEMBER):
        raises(TypeError, "group must be", score, group=bad)
    same, rank = "must be the same on every rank", dist.get_rank()
    raises(ValueError, f"tokens {same}", score, **with_token(rank))
    raises(ValueError, f"vocab_size {same}", score, vocab_size=V - rank)
    empty = {"logits": z[:, :0], "tokens": case.tokens, "group": group}
    raises(ValueError, "no columns on any rank", pyrlk.token_logprobs, **empty)
    ids = torch.tensor([5, 4], dtype=torch.int32)
    broken = pyrlk.Support(ids, torch.tensor([0, 2] + [2] * (T - 1)))
    raises(ValueError, "support.ids[1]", score, support=broken)
    near(score(), pyrlk.token_logprobs(case.logits, case.tokens), 2e-6)  # and goes on


@check
def the_normalizer_counts_all_ranks():
    """Data parallel: losses of the ranks, averaged, are the loss of all tokens together."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    case = Case(dist.group.WORLD)
    mask = case.mask.view(ranks, -1)
    share, group = case.mask.view(ranks, -1)[rank], dist.group.WORLD
    count = pyrlk.normalizer(share, pyrlk.DAPO(), group=group)
    assert count == case.mask.sum() / ranks
    assert pyrlk.normalizer(share, pyrlk.DAPO(), group=group, averaged=False) == case.mask.sum()
    two = pyrlk.normalizer(share, pyrlk.DAPO(), group=group, micro_batches=2)
    assert two == case.mask.sum() / ranks / 2
    sequences = pyrlk.normalizer(share[None], pyrlk.GRPO(), group=group)
    assert sequences == (mask.sum(-1) > 0).sum() / ranks

    def rows(x):
        return x.view(ranks, -1, *x.shape[1:])[rank]

    args = (case.tokens, case.old, case.advantages, case.mask)
    z, mine = leaf(case.logits), leaf(rows(case.logits))
    wanted = pyrlk.dapo_loss(z, *args)
    got = pyrlk.dapo_loss(mine, *map(rows, args), normalizer=count)
    wanted.backward()
    got.backward()
    dist.all_reduce(got := got.detach())
    near(got / ranks, wanted, 1e-6)
    near_gradient(mine.grad / ranks, rows(z.grad), 4e-6, z.grad)


@check
def slimes_loss_is_that_of_the_whole_vocabulary():
    """pyrlk.integrations.slime under Megatron's tensor parallelism: shards of uneven width."""
    case = Case(dist.group.WORLD)
    mpu = types.SimpleNamespace(get_tensor_model_parallel_group=lambda: case.group)
    core = types.ModuleType("megatron.core")
    core.mpu = mpu
    sys.modules |= {"megatron": types.ModuleType("megatron"), "megatron.core": core}
    lengths = [6, 9]  # of the responses; the samples have 10 and 14 tokens
    parts = {
        name: list(x[: sum(lengths)].split(lengths))
        for name, x in [("log_probs", case.old), ("advantages", case.advantages.abs() + 0.1)]
    }
    batch = parts | {
        "unconcat_tokens": list(case.tokens.clamp(min=0).split([10, 14])),
        "total_lengths": [10, 14],
        "response_lengths": lengths,
    }
    for estimator in ("grpo", "gspo", "cispo"):
        args = types.SimpleNamespace(
            advantage_estimator=estimator,
            eps_clip=0.2,
            eps_clip_high=0.28,
            eps_clip_c=None,
            entropy_coef=0.1,
            rollout_temperature=0.9,
            use_kl_loss=False,
            use_tis=False,
            use_rollout_logprobs=False,
            recompute_loss_function=False,
        )
        results = []
        for ranks, logits in [(1, case.logits), (case.ranks, case.mine(case.logits))]:
            mpu.get_tensor_model_parallel_world_size = lambda ranks=ranks: ranks
            z = leaf(logits[None])
            loss, metrics = slime.policy_loss(args, batch, z * 1.0, torch.mean)
            loss.backward()
            results.append((loss.detach(), metrics["entropy_loss"], z.grad[0]))
        (wanted, entropy, grad), (got, same_entropy, mine) = results
        near(got, wanted, 2e-6, estimator)
        near(same_entropy, entropy, 2e-6, estimator)
        near_gradient(mine, grad[:, case.columns], 4e-6, grad)


if __name__ == "__main__":
    main()
