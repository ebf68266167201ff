"""sample: exact kept sets, replayable draws, the right distribution, and the scorer's log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyrlk
from pyrlk import Support, reference
from pyrlk.sampling import EMPTY, INF, NAN, OVERFLOW

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


@pytest.mark.parametrize("ties", ["trim", "keep"])
@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_kept_sets_equal_the_reference_exactly(vocab, order, ties):
    """Each row under a random draw of the parameters: 8,976 (row, parameters) pairs in all."""
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
        "ties": ties,
    }
    got = pyrlk.sample(z, seed=vocab, return_support=True, **options)
    want = reference.kept_mask(z, **options)
    wrong = (got.support.to_mask(vocab) != want).any(-1)
    assert not wrong.any(), {
        k: v[wrong][0] for k, v in options.items() if k not in ("order", "ties")
    }
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
    tau = settings.get("temperature", 1.0)
    replayed = pyrlk.token_logprobs(z, got.token, temperature=tau, support=got.support)
    assert torch.equal(got.logprob, replayed)
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


def test_replay_draws_again_in_any_batch_and_slot():
    torch.manual_seed(6)
    z = 2 * torch.randn(40, 3000)
    parameters = {
        "temperature": 0.5 + torch.rand(40),
        "top_k": torch.randint(0, 100, (40,)),
        "top_p": 0.5 + 0.5 * torch.rand(40),
        "seed": torch.randint(-(2**62), 2**62, (40,)),
        "position": torch.randint(0, 2**40, (40,)),
    }
    drawn = pyrlk.sample(z, **parameters, return_support=True)
    rows = drawn.support.rows()
    for slots in (torch.arange(40), torch.randperm(40), torch.tensor([31]), torch.arange(3, 30, 4)):
        again = pyrlk.replay(
            z[slots], **{k: v[slots] for k, v in parameters.items()}, return_support=True,
            portable=True,
        )  # fmt: skip
        for name in ("token", "logprob", "full_logprob", "kept", "status"):
            assert torch.equal(getattr(again, name), getattr(drawn, name)[slots])
        assert again.support.rows() == [rows[i] for i in slots]
    with pytest.raises(TypeError, match="seed"):
        pyrlk.replay(z)


def pack(mask):
    """int32 [B, ceil(V/32)]: bit i of word w is token 32·w + i."""
    bits = torch.nn.functional.pad(mask.long(), (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 31, 33, 64, 4099])
def test_what_a_grammar_forbids_is_a_logit_of_minus_infinity(vocab, dtype):
    torch.manual_seed(vocab)
    z = (3 * torch.randn(12, vocab)).to(dtype)
    may = torch.rand(12, vocab) > torch.rand(12, 1)
    may[0], may[1] = True, False
    may[2], may[2, vocab // 2] = False, True
    z[3][~may[3]] = math.nan  # forbidden NaN and +inf leave no trace
    z[4][~may[4]] = math.inf
    for options in ({}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}, {"temperature": 0.0}):
        got = pyrlk.sample(z, seed=1, allowed=pack(may), return_support=True, **options)
        want = pyrlk.sample(z.masked_fill(~may, -math.inf), seed=1, return_support=True, **options)
        for a, b in zip(got[:5], want[:5], strict=True):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        assert got.support.rows() == want.support.rows()
        truth = reference.kept_mask(z, allowed=pack(may), **options)
        assert torch.equal(got.support.to_mask(vocab), truth)
        drawn = got.token >= 0
        assert may[drawn].gather(1, got.token[drawn, None]).all()


@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 10_000])
def test_rows_that_overflow_the_support_come_as_bits(capacity):
    torch.manual_seed(8)
    z = torch.randn(9, 100)
    z[2], z[5] = -math.inf, 0.0
    options = {"top_p": 0.9, "seed": 3, "return_support": True}
    exact = pyrlk.sample(z, **options)
    got = pyrlk.sample(z, **options, support_capacity=capacity)
    assert exact.support.bits is None
    assert got.support.ids.numel() <= capacity
    over = (exact.support.offsets[1:] > capacity) & (exact.kept > 0)
    assert over.any() == (capacity < 10_000)
    assert torch.equal(got.status, exact.status | (OVERFLOW * over).byte())
    assert torch.equal(got.support.offsets, exact.support.offsets)
    assert torch.equal(got.support.to_mask(100), exact.support.to_mask(100))
    assert got.support.rows() == exact.support.rows()
    assert torch.equal(got.support.trim().ids, exact.support.ids)
    for a, b in zip(got[:4], exact[:4], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    tokens = got.token.masked_fill(got.token < 0, -100)
    scored = pyrlk.token_logprobs(z, tokens, support=got.support)
    assert torch.equal(scored[tokens >= 0], got.logprob[tokens >= 0])
    old, adv = torch.zeros(9), torch.ones(9)
    loss = pyrlk.dapo_loss(z, tokens, old, adv, support=got.support)
    assert torch.equal(loss, pyrlk.dapo_loss(z, tokens, old, adv, support=exact.support))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_shared_among_threads_has_the_bits_of_one_thread(dtype):
    """As many tokens as there may be: three parts of whole tiles; every filter."""
    torch.manual_seed(9)
    vocab = (1 << 19) - 1
    z = torch.randn(1, vocab)
    may = torch.randint(-(2**31), 2**31, (1, 1 << 14), dtype=torch.int64).int()
    filters = [{}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.95, "order": "joint"}]
    filters += [{"top_k": 60_000}, {"min_p": 0.3}, {"top_p": 0.5, "allowed": may}]
    before = torch.get_num_threads()
    try:
        for scale in (6.0, 1e-3, 0.0):
            for options in filters:
                drawn = []
                for threads in (1, 2, 4):
                    torch.set_num_threads(threads)
                    row = (scale * z).to(dtype)
                    drawn.append(pyrlk.sample(row, seed=4, return_support=True, **options))
                for other in drawn[1:]:
                    assert all(
                        torch.equal(a, b) for a, b in zip(other[:5], drawn[0][:5], strict=True)
                    )
                    assert torch.equal(other.support.ids, drawn[0].support.ids)
                truth = reference.kept_mask(row, **options)
                assert torch.equal(drawn[0].support.to_mask(vocab), truth)
                scored = pyrlk.token_logprobs(row, drawn[0].token, support=drawn[0].support)
                assert torch.equal(scored, drawn[0].logprob)
    finally:
        torch.set_num_threads(before)


POISONS = {
    "nan": math.nan, "all nan": [math.nan], "+inf": math.inf, "all +inf": [math.inf],
    "all -inf": [-math.inf], "largest": 3.4e38, "all equal": [0.0],
}  # fmt: skip


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_row_changes_no_bit_of_its_neighbours(poison):
    torch.manual_seed(10)
    z = 3 * torch.randn(16, 4500)
    options = {"seed": torch.arange(16), "top_k": 40, "top_p": 0.9, "return_support": True}
    clean = pyrlk.sample(z, **options)
    bad = [0, 7, 8, 15]
    value = POISONS[poison]
    for row in bad:
        if isinstance(value, list):
            z[row] = value[0]
        else:
            z[row, 100 * row] = value
    got = pyrlk.sample(z, **options)
    good = [row for row in range(16) if row not in bad]
    for a, b in zip(got[:5], clean[:5], strict=True):
        assert torch.equal(a[good], b[good])
    rows, clean_rows = got.support.rows(), clean.support.rows()
    assert all(rows[row] == clean_rows[row] for row in good)


def test_a_vocabulary_of_one_and_rows_of_one_finite_token_keep_it_for_certain():
    for z in (
        torch.tensor([[3.0], [-2.0]]),
        torch.full((2, 70), -math.inf).index_fill(1, torch.tensor(66), 5.0),
    ):
        for options in ({}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-6}):
            got = pyrlk.sample(z, seed=0, return_support=True, **options)
            assert got.token.tolist() == [z.shape[1] - 4 if z.shape[1] > 1 else 0] * 2
            assert got.logprob.tolist() == got.full_logprob.tolist() == [0.0, 0.0]
            assert got.kept.tolist() == [1, 1]
            assert got.status.tolist() == [0, 0]


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
