"""The sampler against float64 kept sets and against an integer oracle, bit for bit."""

import math
import os

import numpy as np
import pytest
import torch

import pyrlk
from pyrlk import reference
from pyrlk.triton_kernels import sample

# Rows with NaN and infinities are part of the contract; numpy, under the interpreter, warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles"),
]

NAN, INF = math.nan, math.inf
P_TOP = 1 - 2.0**-16


def masses(row, temperature):
    """w = floor(2^44·2^y) of sampling.md as Python integers, from float32 arithmetic in numpy."""
    z = row.float().numpy()
    c = np.float32(1.4426950408889634) / np.float32(temperature)
    y = np.maximum((z - z.max()) * c, np.float32(-127))
    n = (y + np.float32(12582912.0)) - np.float32(12582912.0)
    f = y - n
    p = np.full_like(f, np.float32(0.00015196693129837513))
    for coefficient in (
        0.0013391304528340697,
        0.009619002230465412,
        0.055503588169813156,
        0.24022643268108368,
        0.6931471824645996,
        1.0,
    ):
        p = p * f + np.float32(coefficient)
    e = (p.view(np.int32) + (n.astype(np.int32) << 23)).view(np.float32)
    return [int(2**44 * float(x)) for x in e]


def oracle(row, *, temperature, top_k=0, top_p=1.0, min_p=0.0, seed, position, joint=False):
    """(token, kept ids) by sorting, in exact integers."""
    top_p, min_p, temperature = (float(np.float32(x)) for x in (top_p, min_p, temperature))
    weight, z = masses(row, temperature), row.double().tolist()
    order = sorted((i for i in range(len(z)) if z[i] > -INF), key=lambda i: (-z[i], i))
    by_k = order[:top_k] if top_k > 0 else order
    keep = len(by_k)
    if top_p < 1:
        pool = sum(weight[i] for i in (order if joint else by_k))
        need = max(-(-int(top_p * 2**32) * pool // 2**32), 1)
        running, reach = 0, 0
        while running < need:
            running += weight[order[reach]]
            reach += 1
        keep = min(keep, reach)
    if min_p > 0:
        floor = max(z) + temperature * math.log(min_p)
        keep = min(keep, sum(z[i] >= floor for i in order))
    kept = sorted(order[:keep])
    target = reference.uniform_bits(seed, position) * sum(weight[i] for i in kept) >> 64
    running = 0
    for i in kept:
        running += weight[i]
        if running > target:
            return i, kept
    raise AssertionError("no token")


def adversarial(vocab):
    """Rows that break samplers: all tied, two values, coarse, masked, one token, ±0, peaked."""
    g = torch.Generator().manual_seed(vocab)
    equal = torch.zeros(vocab)
    two = (torch.arange(vocab) % 2).float()
    coarse = torch.randn(vocab, generator=g).bfloat16().float().round()
    masked = torch.randn(vocab, generator=g)
    masked[torch.rand(vocab, generator=g) < 0.7] = -INF
    masked[vocab // 2] = 0.5
    one = torch.full((vocab,), -INF)
    one[vocab - 1] = -3.0
    zeros = torch.where(torch.arange(vocab) % 3 == 0, -0.0, 0.0)
    peaked = torch.randn(vocab, generator=g) * 8
    return torch.stack([equal, two, coarse, masked, one, zeros, peaked])


# Each filter alone at its edges, then together; temperatures at both ends of their range.
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": "V-1"},
    {"top_k": "V"},
    {"top_k": "V+1"},
    {"top_k": 3, "temperature": 1e-6},
    {"top_p": 0.0, "temperature": 1e3},
    {"top_p": P_TOP},
    {"top_p": 0.9, "top_k": 5},
    {"top_p": 0.9, "top_k": 5, "joint": True},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_p": 0.95, "top_k": 20, "min_p": 0.05, "temperature": 0.7},
]


def resolve(filters, vocab):
    ks = {"V-1": vocab - 1, "V": vocab, "V+1": vocab + 1}
    k = filters.get("top_k")
    return filters | ({"top_k": ks[k]} if k in ks else {})


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_kept_sets_equal_float64_on_adversarial_rows(draw, filters):
    logits = adversarial(100).half().float()
    filters = resolve(filters, 100)
    out = draw(logits.half(), **filters)
    options = {k: v for k, v in filters.items() if k != "joint"}
    order = "joint" if filters.get("joint") else "top_k_first"
    truth = reference.kept_mask(logits, order=order, **options)
    assert torch.equal(out.mask, truth)
    assert torch.equal(out.kept, truth.sum(-1).to(torch.int32))
    assert out.mask.gather(1, out.token[:, None]).all()
    assert (out.status == 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 64, 65])
def test_tiny_vocabularies(draw, vocab):
    logits = adversarial(vocab).half()
    out = draw(logits, top_k=max(vocab - 1, 1), top_p=0.6)
    truth = reference.kept_mask(logits.float(), top_k=max(vocab - 1, 1), top_p=0.6)
    assert torch.equal(out.mask, truth)


def test_token_and_kept_set_equal_the_integer_oracle(draw):
    # Float32 logits: every bit of the key matters. Parameters, seeds and positions differ by row.
    g = torch.Generator().manual_seed(7)
    rows = 10
    logits = torch.randn(rows, 100, generator=g) * torch.linspace(0.1, 12, rows)[:, None]
    logits[3] = logits[3].bfloat16()
    temperature = torch.tensor([1.0, 0.7, 1e-6, 1e3, 1.0, 0.3, 2.0, 1.0, 0.9, 1.0])
    top_k = torch.tensor([0, 40, 0, 7, 0, 150, 2, 0, 30, 1])
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.999, P_TOP, 0.95, 1.0, 0.1, 0.8, 0.3])
    min_p = torch.tensor([0.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 1e-3, 0.0])
    seed = torch.tensor([0, 1, -1, 2**62, 5, 6, 7, 8, 9, 10])
    position = torch.tensor([0, 2**40, 3, 4, 2**63 - 1, 6, 7, 8, 9, 10])
    # "joint" differs only where a row has both filters.
    for joint, chosen in ((False, range(rows)), (True, [1, 8])):
        out = draw(
            logits[list(chosen)],
            temperature=temperature[list(chosen)],
            top_k=top_k[list(chosen)],
            top_p=top_p[list(chosen)],
            min_p=min_p[list(chosen)],
            seed=seed[list(chosen)],
            position=position[list(chosen)],
            joint=joint,
        )
        for slot, r in enumerate(chosen):
            token, kept = oracle(
                logits[r],
                temperature=temperature[r].item(),
                top_k=top_k[r].item(),
                top_p=top_p[r].item(),
                min_p=min_p[r].item(),
                seed=seed[r].item(),
                position=position[r].item(),
                joint=joint,
            )
            assert out.mask[slot].nonzero()[:, 0].tolist() == kept, r
            assert out.token[slot] == token, r


def test_many_draws_of_one_row_equal_the_integer_oracle(draw):
    row = torch.randn(100, generator=torch.Generator().manual_seed(3)) * 2
    seed = torch.arange(40)
    out = draw(row.expand(40, -1), temperature=0.8, seed=seed, position=11)
    drawn = [oracle(row, temperature=0.8, seed=s, position=11)[0] for s in range(40)]
    assert out.token.tolist() == drawn
    assert len(set(drawn)) > 10


def test_the_draw_depends_on_seed_and_position_not_on_the_slot(draw):
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(4))
    other = torch.randn(3, 300) * 5
    alone = draw(row, seed=123, position=9)
    batch = draw(
        torch.cat([other, row]),
        seed=torch.tensor([1, 2, 3, 123]),
        position=torch.tensor([0, 0, 0, 9]),
    )
    assert batch.token[3] == alone.token[0]
    assert torch.equal(batch.logprob[3:], alone.logprob)
    again = draw(row.expand(8, -1), seed=123, position=torch.arange(8))
    assert again.token.unique().numel() > 2


def test_logprobs_are_the_scorers_bits_and_match_float64(draw, score):
    logits = torch.randn(4, 150, generator=torch.Generator().manual_seed(5)) * 3
    out = draw(logits, temperature=0.7, top_k=20, top_p=0.9)
    assert torch.equal(out.full_logprob, score(logits, out.token, 0.7).logprob)
    kept = (out.ids, out.offsets)
    assert torch.equal(out.logprob, score(logits, out.token, 0.7, kept=kept).logprob)
    truth = reference.sample(
        logits, temperature=0.7, top_k=20, top_p=float(np.float32(0.9)), seed=torch.arange(4)
    )
    assert torch.equal(out.token, truth.token)
    # float64 has τ = 0.7 and the kernel its float32, as the contract has it.
    torch.testing.assert_close(out.logprob.double(), truth.logprob, atol=2e-6, rtol=0)
    untouched = draw(logits, temperature=0.7)
    assert torch.equal(untouched.logprob, untouched.full_logprob)


def test_strided_rows_and_half_precision(draw):
    buffer = torch.randn(4, 3, 200, generator=torch.Generator().manual_seed(6)).half()
    view = buffer[:, -1, :100]
    out, dense = draw(view, top_k=9), draw(view.float().contiguous(), top_k=9)
    assert torch.equal(out.token, dense.token)
    assert torch.equal(out.mask, dense.mask)


def test_temperature_zero_is_argmax(draw):
    logits = torch.randn(3, 150)
    logits[0, 20] = logits[0, 90] = 9.0
    out = draw(logits.half(), temperature=0.0, top_k=7, top_p=0.9, min_p=0.1)
    assert out.token.tolist() == [20, *logits[1:].argmax(-1).tolist()]
    assert out.logprob.tolist() == out.full_logprob.tolist() == [0.0] * 3
    assert out.kept.tolist() == [1] * 3
    assert (out.status == 0).all()


def test_degenerate_rows(draw):
    logits = torch.randn(7, 150)
    logits[0, 5] = NAN
    logits[1, [3, 77, 140]] = INF
    logits[1, 4] = NAN
    logits[2] = -INF
    logits[3] = NAN
    logits[4, [3, 77, 140]] = INF
    logits[5, [140, 3]] = INF
    out = draw(
        logits,
        top_k=torch.tensor([0, 0, 3, 3, 2, 0, 0]),
        temperature=torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 1.0]),
        top_p=torch.tensor([1.0, 1.0, 0.5, 0.5, 1.0, 0.9, 1.0]),
    )
    NAN_, INF_, EMPTY = sample.NAN, sample.INF, sample.EMPTY
    assert out.status.tolist() == [NAN_, NAN_ | INF_, EMPTY, NAN_ | EMPTY, INF_, INF_, 0]
    assert out.kept.tolist() == [149, 3, 0, 0, 2, 1, 150]
    assert not out.mask[0, 5]
    assert out.mask[1].nonzero()[:, 0].tolist() == [3, 77, 140]
    assert out.mask[4].nonzero()[:, 0].tolist() == [3, 77]
    assert out.token[2:4].tolist() == [-1, -1]
    assert out.token[5] == 3
    assert out.logprob[2:4].isnan().all()
    assert out.full_logprob[2:4].isnan().all()
    third, half = math.log(1 / 3), math.log(1 / 2)
    assert out.full_logprob[[1, 4, 5]].tolist() == pytest.approx([third, third, 0.0])
    assert out.logprob[[1, 4, 5]].tolist() == pytest.approx([third, half, 0.0])
    clean = torch.where(logits[:1].isnan(), -INF, logits[:1])
    assert out.full_logprob[0] == draw(clean).full_logprob[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_p": -0.1},
        {"top_p": 1.5},
        {"top_p": NAN},
        {"min_p": 1.1},
        {"min_p": NAN},
    ],
    ids=str,
)
def test_a_bad_row_parameter_marks_its_row_alone(draw, bad):
    name, value = next(iter(bad.items()))
    good = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}[name]
    logits = torch.randn(2, 20)
    logits[0] = NAN  # not even read
    out = draw(logits, **{name: torch.tensor([value, good])})
    assert out.status.tolist() == [sample.INVALID, 0]
    assert out.token[0] == -1
    assert out.kept.tolist() == [0, 20]
    assert out.logprob.isnan().tolist() == out.full_logprob.isnan().tolist() == [True, False]


def test_negative_top_k_is_off(draw):
    assert draw(torch.randn(1, 20), top_k=-5).kept.tolist() == [20]


def test_a_full_support_buffer_overflows_by_row(draw):
    logits = torch.randn(4, 100).half()
    out = draw(logits, top_k=torch.tensor([3, 2, 4, 1]), capacity=6)
    assert out.offsets.tolist() == [0, 3, 5, 9, 10]
    assert out.status.tolist() == [0, 0, sample.OVERFLOW, sample.OVERFLOW]
    assert out.ids[5] == -9
    assert out.kept.tolist() == [3, 2, 4, 1]
    assert out.mask.sum(-1).tolist() == [3, 2, 4, 1]  # as bits where the buffer has ended


def test_min_p_floor_is_compared_in_float64(draw):
    # The floor m + τ·ln(min_p) lies between two float32 neighbours; the upper one is kept.
    floor = 1.0 + math.log(float(np.float32(0.3)))
    upper = (
        np.float32(floor)
        if float(np.float32(floor)) >= floor
        else np.nextafter(np.float32(floor), np.float32(9))
    )
    lower = np.nextafter(upper, np.float32(-9))
    logits = torch.full((1, 20), -5.0)
    logits[0, 0], logits[0, 7], logits[0, 9] = 1.0, float(lower), float(upper)
    assert draw(logits, min_p=0.3).mask.nonzero()[:, 1].tolist() == [0, 9]


def same(a, b, rows=slice(None), other=slice(None)):
    """Every output of some rows of two draws, bit for bit."""
    names = ("token", "logprob", "full_logprob", "kept", "status", "mask")
    bits = {name: (getattr(a, name)[rows], getattr(b, name)[other]) for name in names}
    return all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in bits.values())


def pick(values, rows, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.tensor(values)[torch.randint(len(values), (rows,), generator=g)]


def random_parameters(rows, vocab, seed):
    """Every kind of filter, alone and together, at and beside its edges."""
    return {
        "temperature": pick([1e-6, 0.3, 1.0, 1.0, 1e3, 0.0], rows, seed),
        "top_k": pick([0, 0, 1, 5, vocab - 1, vocab, vocab + 1, 40, 100], rows, seed + 1),
        "top_p": pick([0.0, 0.25, 0.5, 0.9, 0.95, P_TOP, 1.0, 1.0], rows, seed + 2),
        "min_p": pick([0.0, 0.0, 0.0, 0.05, 1.0], rows, seed + 3),
    }


def degenerate(vocab):
    rows = adversarial(vocab).repeat(2, 1)
    rows[7, vocab // 3] = NAN
    rows[8, [1, vocab // 2]] = INF
    rows[9] = -INF
    rows[10] = torch.linspace(-1, 1, vocab) * 3e38
    rows[11] = INF
    return rows


# Five tiles of 64: lists (48 candidates) and rows searched themselves, both often. A round is 14
# rows of each kind of case; PYRLK_ROUNDS=20 compares 2,240.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ties", ["trim", "keep"])
@pytest.mark.timeout(3600)
def test_token_and_kept_set_are_those_of_the_cpu(draw, dtype, joint, ties):
    for number in range(int(os.environ.get("PYRLK_ROUNDS", 1))):
        compare_with_the_cpu(draw, dtype, joint, ties, number)


def compare_with_the_cpu(draw, dtype, joint, ties, number):
    vocab = 300
    logits = degenerate(vocab).clamp(-6e4 if dtype == torch.float16 else -3.4e38).to(dtype)
    rows = len(logits)
    g = torch.Generator().manual_seed(1 + number)
    logits[rows - 1] = torch.randn(vocab, generator=g) * 9
    options = random_parameters(rows, vocab, 100 * number + 10 * joint + (ties == "keep"))
    seed = torch.arange(rows) * 7919 + number
    out = draw(logits, seed=seed, position=3, joint=joint, keep_ties=ties == "keep", **options)
    order = "joint" if joint else "top_k_first"
    cpu = pyrlk.sample(
        logits, seed=seed, position=3, order=order, ties=ties, return_support=True, **options
    )
    assert torch.equal(out.status, cpu.status)
    assert torch.equal(out.mask, cpu.support.to_mask(vocab))
    assert torch.equal(out.token, cpu.token)
    assert torch.equal(out.kept, cpu.kept)
    torch.testing.assert_close(out.logprob, cpu.logprob, atol=2e-6, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        out.full_logprob, cpu.full_logprob, atol=2e-6, rtol=1e-6, equal_nan=True
    )


def test_flat_rows_are_searched_themselves(draw, score):
    # More candidates than a list holds, and more ties than that: by mass, by number, by both.
    vocab = 300
    g = torch.Generator().manual_seed(11)
    flat = torch.randn(vocab, generator=g) * 0.3
    ties = (torch.arange(vocab) % 5 == 0).float()
    logits = torch.stack([flat, flat, flat, ties, ties, -flat.abs()])
    options = {
        "top_p": torch.tensor([0.9, 1.0, 0.8, 0.7, 1.0, 0.99]),
        "top_k": torch.tensor([0, 200, 150, 0, 130, 0]),
    }
    out = draw(logits, **options)
    assert not out.listed.any()
    assert torch.equal(out.mask, reference.kept_mask(logits, **options))
    kept = (out.ids, out.offsets)
    assert torch.equal(out.logprob, score(logits, out.token, kept=kept).logprob)
    assert torch.equal(out.full_logprob, score(logits, out.token).logprob)


def test_the_float_mass_decides_as_the_exact_one(draw):
    # Rows no boundary or draw of which lies within 2^-20 of an edge: there the two may differ.
    vocab, rows = 300, 6
    g = torch.Generator().manual_seed(12)
    spread = torch.tensor([0.1, 9.0, 2.0, 4.0, 1.0, 0.1])
    logits = torch.randn(rows, vocab, generator=g) * spread[:, None]
    options = {
        "top_p": torch.tensor([0.9, 0.95, 0.9, 1.0, 1.0, 0.5]),
        "top_k": torch.tensor([0, 0, 120, 0, 20, 0]),
        "temperature": torch.tensor([0.7, 1.0, 1.3, 1.0, 1.0, 1.0]),
    }
    fast = draw(logits, exact=False, **options)
    truth = reference.sample(logits, seed=torch.arange(rows), **options)
    z = logits.double() / options["temperature"].double()[:, None]
    share = torch.where(truth.mask, z, -INF).softmax(-1).cumsum(-1)
    u = torch.tensor([reference.uniform_bits(seed, 0) / 2.0**64 for seed in range(rows)])
    assert ((share - u[:, None]).abs() > 2.0**-20).all()
    pool = torch.where(reference.kept_mask(logits, **options | {"top_p": 1.0}), z, -INF)
    reached = pool.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    edge = (reached - options["top_p"][:, None]).abs() < 2.0**-20
    assert not edge[options["top_p"] < 1].any()
    assert torch.equal(fast.mask, truth.mask)
    assert torch.equal(fast.token, truth.token)
    assert fast.listed.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("exact", [True, False])
def test_a_row_has_the_same_bits_in_any_batch_slot_and_split(draw, exact, monkeypatch):
    vocab = 300
    g = torch.Generator().manual_seed(13)
    logits = torch.randn(5, vocab, generator=g) * torch.tensor([0.1, 1, 3, 9, 0.5])[:, None]
    options = {
        "top_p": torch.tensor([0.9, 0.9, 1.0, 0.95, 1.0]),
        "top_k": torch.tensor([0, 30, 5, 0, 0]),
        "seed": torch.arange(5) * 3 + 1,
        "position": torch.arange(5),
    }
    together = draw(logits, exact=exact, **options)
    monkeypatch.setattr(sample, "_PROGRAMS", 1)  # one program takes all tiles of a row
    turned = torch.tensor([3, 4, 0, 1, 2])
    other = draw(logits[turned], exact=exact, **{k: v[turned] for k, v in options.items()})
    assert same(together, other, turned)
    alone = draw(logits[1:2], exact=exact, **{k: v[1:2] for k, v in options.items()})
    assert same(together, alone, slice(1, 2))


def test_a_poisoned_row_leaves_its_neighbours_alone(draw):
    vocab = 200
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(14))
    options = {"top_p": 0.9, "seed": torch.arange(3)}
    clean = draw(logits, **options)
    for poison in (NAN, INF, -INF):
        bad = logits.clone()
        bad[1] = poison
        out = draw(bad, **options)
        assert same(out, clean, [0, 2], [0, 2])
        assert out.status[1] != 0
    temperature = torch.tensor([1.0, -1.0, 1.0])
    assert same(draw(logits, temperature=temperature, **options), clean, [0, 2], [0, 2])


@pytest.mark.parametrize("exact", [True, False])
def test_forbidden_tokens_are_minus_infinity(draw, exact):
    # Words of 32 tokens that end beyond the row, all forbidden in one row; a forbidden NaN is none.
    vocab = 170
    g = torch.Generator().manual_seed(15)
    logits = torch.randn(4, vocab, generator=g)
    may = torch.rand(4, vocab, generator=g) < 0.4
    may[3] = False
    may[2, 1:] = False
    may[:3, 0] = True
    logits[1, ~may[1]] = NAN
    weights = 1 << torch.arange(32)
    padded = torch.nn.functional.pad(may, (0, -vocab % 32)).unflatten(1, (-1, 32))
    words = (padded * weights).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    masked = torch.where(may, logits, -INF)
    options = {"top_p": torch.tensor([1.0, 0.8, 1.0, 0.9]), "exact": exact, "capacity": 60}
    out = draw(logits, allowed=words, **options)
    assert same(out, draw(masked, **options))
    assert (out.status & sample.EMPTY).bool().tolist() == [False, False, False, True]
    assert out.kept[0] == may[0].sum()
    assert not (out.mask & ~may).any()
