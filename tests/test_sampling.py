"""sample: exact kept sets, replayable draws, the right distribution, and the scorer's log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyrlk
from pyrlk import Support, reference
from pyrlk.sampling import EMPTY, INF, NAN

# One token, two, and both neighbours of a group of 64 lanes and of a tile of 4096.
VOCABS = [1, 2, 63, 64, 65, 1000, 4095, 4097]
TEMPERATURES = [1e-6, 0.3, 1.0, 1e3]
# 0.25 and 0.5 end exactly on a token of an even row.
TOP_P = [0.0, 0.25, 0.3, 0.5, 0.9, 0.95, 1 - 2**-16, 1.0]


def adversarial_rows(vocab):
    """Where kept sets go wrong: ties of every kind, quantised logits, masks, one finite token."""
    yield torch.zeros(vocab)
    yield 3 * torch.randn(vocab)
    yield 8 * torch.randn(vocab)
    yield (3 * torch.randn(vocab)).bfloat16().float()
    yield (torch.rand(vocab) > 0.5).float()
    yield torch.where(torch.rand(vocab) > 0.5, 0.0, -0.0)
    z = torch.randn(vocab)
    z[torch.rand(vocab) > 0.1] = -math.inf
    z[vocab // 3] = 0.5
    yield z
    z = torch.full((vocab,), -math.inf)
    z[vocab // 2] = -7.0
    yield z
    yield torch.arange(vocab).float().neg()
    yield torch.linspace(-1.0, 1.0, vocab) * 3e38
    yield torch.where(torch.rand(vocab) > 0.9, math.inf, torch.randn(vocab))


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_kept_sets_equal_the_reference_exactly(vocab, order):
    """Each row under a random draw of the parameters: 5,200 (row, parameters) pairs in all."""
    torch.manual_seed(vocab)
    z = torch.stack([*adversarial_rows(vocab)]).repeat(30 if vocab < 4000 else 12, 1)
    rows = z.shape[0]

    def pick(values):
        return torch.tensor(values)[torch.randint(len(values), (rows,))]

    options = {
        "temperature": pick(TEMPERATURES),
        "top_k": pick([0, 1, 5, vocab - 1, vocab, vocab + 1]),
        "top_p": pick(TOP_P),
        "min_p": pick([0.0, 0.0, 0.05, 1.0]),
        "order": order,
    }
    got = pyrlk.sample(z, seed=vocab, return_support=True, **options)
    want = reference.kept_mask(z, **options)
    wrong = (got.support.to_mask(vocab) != want).any(-1)
    assert not wrong.any(), {k: v[wrong][0] for k, v in options.items() if k != "order"}
    assert torch.equal(got.kept, want.sum(-1).int())
    assert torch.equal(got.status, torch.where(z.isinf() & (z > 0), INF, 0).amax(-1).byte())
    assert want.gather(1, got.token[:, None]).all()


SETTINGS = [
    {},
    {"top_k": 50},
    {"top_p": 0.9, "temperature": 0.8},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 40, "top_p": 0.95, "order": "joint"},
    {"min_p": 0.1, "temperature": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_and_log_probs_equal_the_reference_and_the_scorer(settings, dtype):
    torch.manual_seed(0)
    z = (4 * torch.randn(100, 3000)).to(dtype)
    got = pyrlk.sample(z, seed=5, position=9, return_support=True, **settings)
    want = reference.sample(z, seed=5, position=9, **settings)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.support.to_mask(3000), want.mask)
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.full_logprob.double(), want.full_logprob, rtol=1e-6, atol=1e-6)
    scored = pyrlk.token_logprobs(z, got.token, temperature=settings.get("temperature", 1.0))
    assert torch.equal(got.full_logprob, scored)
    if not settings:
        assert torch.equal(got.logprob, got.full_logprob)


def test_a_vocabulary_of_a_real_model_equals_the_reference():
    torch.manual_seed(1)
    z = 3 * torch.randn(4, 151936)
    tau = torch.tensor([1.0, 0.7, 1.0, 30.0])
    options = {"temperature": tau, "top_k": torch.tensor([0, 50, 151935, 0]), "top_p": 0.95}
    got = pyrlk.sample(z, seed=3, return_support=True, **options)
    want = reference.sample(z, seed=3, **options)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.support.to_mask(151936), want.mask)
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.full_logprob, pyrlk.token_logprobs(z, got.token, temperature=tau))


def draws(z, count, **settings):
    """[V] counts of `count` draws from one row: one seed, `count` positions."""
    counts = torch.zeros(z.numel(), dtype=torch.int64)
    for first in range(0, count, 1 << 16):
        size = min(1 << 16, count - first)
        token = pyrlk.sample(
            z.expand(size, -1),
            seed=torch.full((size,), 11),
            position=torch.arange(first, first + size),
            **settings,
        ).token
        counts += torch.bincount(token, minlength=z.numel())
    return counts


def chi_square_z(counts, probability) -> float:
    """Pearson's statistic as a normal deviate, cells pooled until each expects 10 draws."""
    total = int(counts.sum())
    order = probability.argsort(descending=True)
    expected, seen = probability[order] * total, counts[order].double()
    assert seen[expected == 0].sum() == 0
    cell = (expected.flip(0).cumsum(0).flip(0) < 10).int()  # the tail is one cell
    cells = torch.where(cell.bool(), expected.numel(), torch.arange(expected.numel()))
    cells = torch.where(expected < 10, expected.numel(), cells)
    e = torch.zeros(expected.numel() + 1, dtype=torch.float64).index_add_(0, cells, expected)
    o = torch.zeros_like(e).index_add_(0, cells, seen)
    used = e > 0
    freedom = int(used.sum()) - 1
    statistic = float(((o - e)[used] ** 2 / e[used]).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


ROW = 1.5 * torch.randn(64, generator=torch.Generator().manual_seed(4))
FILTERS = [{"top_k": 20}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.9}, {"min_p": 0.05}]


@pytest.mark.parametrize("settings", FILTERS, ids=repr)
def test_a_million_draws_follow_the_distribution(settings):
    keep = reference.kept_mask(ROW[None], **settings)[0]
    p = torch.where(keep, ROW.double(), -math.inf).softmax(0)
    counts = draws(ROW, 1 << 20, **settings)
    assert abs(chi_square_z(counts, p)) < 6


@pytest.mark.parametrize(
    "fault",
    [{"top_k": 20, "temperature": 1.01}, {"top_k": 20, "top_p": 0.99}, {"top_k": 19}],
    ids=["temperature off by 1 %", "1 % of the tail dropped", "k off by one"],
)
def test_the_same_statistic_catches_a_planted_fault(fault):
    keep = reference.kept_mask(ROW[None], top_k=20)[0]
    p = torch.where(keep, ROW.double(), -math.inf).softmax(0)
    assert chi_square_z(draws(ROW, 1 << 19, **fault), p) > 6


def philox(counter, key):
    """Philox4x32-10 once more, on all four counter words, held to its published vectors below."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = divmod(0xD2511F53 * c[0], 1 << 32), divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high[0] ^ c[1] ^ k[0], high[1], low[0] ^ c[3] ^ k[1], low[1]]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_the_stream_is_philox_of_seed_and_position(seed, position):
    words = [seed % (1 << 32), seed >> 32, position % (1 << 32), position >> 32]
    first, second, *_ = philox([*words[2:], 0, 0], words[:2])
    assert reference.uniform_bits(seed, position) == first << 32 | second
    # Among 64 equal logits the draw is floor(64·u).
    assert pyrlk.sample(torch.zeros(64), seed=seed, position=position).token == first >> 26


def test_philox_equals_its_published_vectors():
    """The known answers of Random123, kat_vectors, philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_draw_depends_on_its_row_parameters_seed_and_position_alone():
    torch.manual_seed(2)
    z = 2 * torch.randn(64, 5000)
    parameters = {
        "temperature": 0.5 + torch.rand(64),
        "top_k": torch.randint(0, 100, (64,)),
        "top_p": 0.5 + 0.5 * torch.rand(64),
        "min_p": 0.1 * torch.rand(64),
        "seed": torch.randint(-(2**62), 2**62, (64,)),
        "position": torch.randint(0, 2**40, (64,)),
    }
    whole = pyrlk.sample(z, **parameters, return_support=True)
    shuffle = torch.randperm(64)
    moved = pyrlk.sample(z[shuffle], **{k: v[shuffle] for k, v in parameters.items()})
    for name in ("token", "logprob", "full_logprob", "kept", "status"):
        assert torch.equal(getattr(whole, name)[shuffle], getattr(moved, name))
    for row in (0, 17, 63):
        alone = pyrlk.sample(z[row], **{k: v[row : row + 1] for k, v in parameters.items()})
        assert alone.token == whole.token[row]
        assert alone.logprob == whole.logprob[row]
    parameters["position"] += 1
    assert (pyrlk.sample(z, **parameters).token != whole.token).any()


def test_an_int_seed_is_shorthand_for_consecutive_seeds():
    z = torch.zeros(32, 1000)
    short = pyrlk.sample(z, seed=7).token
    assert torch.equal(short, pyrlk.sample(z, seed=7 + torch.arange(32)).token)
    assert short.unique().numel() > 16  # equal prompts do not draw equal tokens
    top = (1 << 64) - 1
    assert pyrlk.sample(z[:1], seed=top).token == pyrlk.sample(z[:1], seed=-1).token


def test_degenerate_rows_report_themselves_and_leave_their_neighbours_alone():
    torch.manual_seed(3)
    z = torch.randn(8, 100)
    clean = pyrlk.sample(z, seed=1, top_k=10, return_support=True)
    z[1, 5] = math.nan
    z[3] = math.nan
    z[4] = -math.inf
    z[5, [7, 9]] = math.inf
    z[6, 2], z[6, 3], z[6, 4] = math.inf, math.nan, -math.inf
    got = pyrlk.sample(z, seed=1, top_k=10, return_support=True)
    assert got.status.tolist() == [0, NAN, 0, NAN | EMPTY, EMPTY, INF, INF | NAN, 0]
    for name in ("token", "logprob", "full_logprob", "kept"):
        same = [0, 2, 7]
        assert torch.equal(getattr(got, name)[same], getattr(clean, name)[same])
    hidden = z[1].clone()
    hidden[5] = -math.inf
    seed = torch.tensor([2])
    assert got.token[1] == pyrlk.sample(hidden, seed=seed, top_k=10).token
    for row in (3, 4):
        assert got.token[row] == -1
        assert got.kept[row] == 0
        assert got.logprob[row].isnan()
        assert got.full_logprob[row].isnan()
    assert got.token[5] in (7, 9)
    assert got.support.rows()[5] == [7, 9]
    assert got.logprob[5].item() == pytest.approx(-math.log(2), abs=1e-6)
    assert got.token[6] == 2
    assert got.logprob[6] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_zero_is_argmax_with_the_lowest_id_and_log_prob_zero(dtype):
    z = torch.tensor([[0.0, 5, 5, 1], [-0.0, 0.0, -1, -2], [1, 2, 3, math.nan]]).to(dtype)
    got = pyrlk.sample(z, temperature=0, top_p=0.5, seed=0, return_support=True)
    assert got.token.tolist() == [1, 0, 2]
    assert got.logprob.eq(0).all()
    assert got.full_logprob.eq(0).all()
    assert got.support.rows() == [[1], [0], [2]]
    assert torch.equal(pyrlk.sample(z, top_k=1, seed=0).token, got.token)


@given(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=6), max_size=6))
def test_a_support_survives_the_way_through_lists_masks_and_trim(rows):
    support = Support.from_lists(rows)
    assert support.rows() == [sorted(row) for row in rows]
    mask = support.to_mask(31)
    assert mask.shape == (len(rows), 31)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == support.rows()
    loose = Support(
        torch.cat([support.ids, torch.full((3,), 77, dtype=torch.int32)]), support.offsets
    )
    assert torch.equal(loose.trim().ids, support.ids)
    assert support.ids.dtype == torch.int32
    assert support.offsets.dtype == torch.int64


@pytest.mark.parametrize("view", ["wide", "transposed", "expanded", "three"])
def test_strided_rows_and_leading_shapes_equal_their_copies(view):
    base = torch.randn(6, 5, 90)
    z = {
        "wide": base[..., :77],
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(4, 5, 90),
        "three": base.unflatten(0, (2, 3)),
    }[view]
    got = pyrlk.sample(z, seed=3, top_k=7)
    want = pyrlk.sample(z.reshape(-1, z.shape[-1]), seed=3, top_k=7)
    for name in ("token", "logprob", "kept", "status"):
        assert getattr(got, name).shape == z.shape[:-1]
        assert torch.equal(getattr(got, name).flatten(), getattr(want, name))


def test_no_rows_at_all_work():
    got = pyrlk.sample(torch.zeros(0, 9), seed=0, return_support=True)
    assert got.token.shape == (0,)
    assert got.support.offsets.tolist() == [0]
    assert got.support.rows() == []
