"""The sampler on a device: the CPU's choices, the scorer's bits, graphs, no synchronisation."""

import pytest
import torch
from dry_device import DRY, size

import pyrlk
from pyrlk import reference

pytest.importorskip("triton")

from pyrlk.triton_kernels import sample as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = size([torch.float32, torch.float16, torch.bfloat16], [torch.bfloat16])
VOCAB = size(151936, 320)
SMALL = size(32000, 160)
ROWS = size(12, 2)
# Lists of candidates; rows too flat for one; nothing cut; every filter at once.
SETTINGS = [
    {"top_k": 50, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 50, "top_p": 0.95, "order": "joint"},
    {"top_p": 0.9},
    {"top_p": 0.95, "temperature": 0.3},
    {"top_k": size(20000, 300), "top_p": 0.999},
    {"min_p": 0.05},
    {},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.01, "ties": "keep"},
]
SETTINGS = size(SETTINGS, SETTINGS[::3])  # the search takes the interpreter a second a row


def rows_of(count, dtype, vocab=VOCAB, seed=0):
    torch.manual_seed(seed)
    spread = torch.linspace(0.2, 6, count, device="cuda")[:, None]
    return (torch.randn(count, vocab, device="cuda") * spread).to(dtype)


def assert_same(a, b, rows=slice(None), other=slice(None)):
    for name in ("token", "logprob", "full_logprob", "kept", "status"):
        x, y = getattr(a, name)[rows], getattr(b, name)[other]
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name


def degenerate(dtype, vocab=VOCAB):
    logits = rows_of(9, dtype, vocab)
    logits[0] = 0.0
    logits[1] = -torch.inf
    logits[2, 5] = torch.nan
    logits[3, [7, vocab - 1]] = torch.inf
    logits[4, 1:] = -torch.inf
    logits[5] = (torch.arange(vocab, device="cuda") % 2).to(dtype)
    logits[6] = torch.nan
    logits[7] = torch.inf
    return logits[size(slice(None), slice(1, 6, 2))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_portable_token_and_kept_set_are_those_of_the_cpu(dtype, settings):
    for logits in (
        rows_of(ROWS, dtype),
        degenerate(dtype),
        rows_of(size(5, 1), dtype, size(4097, 65)),
    ):
        options = {"seed": 3, "return_support": True, "support_capacity": logits.numel()}
        out = pyrlk.sample(logits, portable=True, **options, **settings)
        cpu = pyrlk.sample(logits.cpu(), **options, **settings)
        assert torch.equal(out.token.cpu(), cpu.token)
        assert torch.equal(out.status.cpu(), cpu.status)
        assert torch.equal(out.kept.cpu(), cpu.kept)
        assert out.support.rows() == cpu.support.rows()
        torch.testing.assert_close(
            out.logprob.cpu(), cpu.logprob, atol=2e-6, rtol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_log_probs_are_the_scorers_bits(dtype, settings, portable):
    logits = rows_of(ROWS, dtype)
    out = pyrlk.sample(
        logits, seed=3, portable=portable, return_support=True, support_capacity=logits.numel(),
        **settings,
    )  # fmt: skip
    tau = settings.get("temperature", 1.0)
    full = pyrlk.token_logprobs(logits, out.token, temperature=tau)
    kept = pyrlk.token_logprobs(logits, out.token, temperature=tau, support=out.support)
    assert torch.equal(out.full_logprob, full)
    assert torch.equal(out.logprob, kept)


def test_float_masses_choose_as_float64_does():
    logits = rows_of(size(64, 3), torch.bfloat16, SMALL)
    options = {"top_p": 0.9, "seed": 5}
    out = pyrlk.sample(logits, return_support=True, support_capacity=logits.numel(), **options)
    truth = reference.sample(logits, **options)
    differ = (out.support.to_mask(SMALL).cpu() != truth.mask).any(-1)
    differ |= out.token.cpu() != truth.token
    # A boundary or a draw lies within 2^-20 of an edge in well under one row in a hundred.
    assert differ.sum() <= 1


# Rows of 50257 begin on 16 bytes only by chance.
@pytest.mark.parametrize("vocab", [VOCAB, size(50257, 57)])
@pytest.mark.parametrize("portable", [False, True])
def test_a_row_has_the_same_bits_in_any_batch_and_slot(portable, vocab):
    count = size(300, 9)
    logits = rows_of(count, torch.bfloat16, vocab)
    seed = torch.arange(count, device="cuda") * 17
    options = {"top_p": 0.95, "top_k": 50, "portable": portable}
    together = pyrlk.sample(logits, seed=seed, **options)
    assert_same(together, pyrlk.sample(logits, seed=seed, **options))
    for k in (7, 8):
        alone = pyrlk.sample(logits[k : k + 1], seed=seed[k : k + 1], **options)
        assert_same(together, alone, slice(k, k + 1))
    turned = torch.randperm(count, device="cuda")
    assert_same(together, pyrlk.sample(logits[turned], seed=seed[turned], **options), turned)


def test_a_poisoned_row_leaves_its_neighbours_alone():
    logits = rows_of(4, torch.bfloat16)
    clean = pyrlk.sample(logits, seed=1, top_p=0.9)
    for poison in (torch.nan, torch.inf, -torch.inf):
        bad = logits.clone()
        bad[2] = poison
        out = pyrlk.sample(bad, seed=1, top_p=0.9)
        assert_same(out, clean, [0, 1, 3], [0, 1, 3])
        assert out.status[2] != 0


def test_forbidden_tokens_are_minus_infinity():
    logits = rows_of(size(6, 2), torch.bfloat16)
    words = torch.randint(-(2**31), 2**31, (len(logits), VOCAB // 32), device="cuda").to(
        torch.int32
    )
    may = (words[:, :, None] >> torch.arange(32, device="cuda") & 1).flatten(1).bool()
    masked = torch.where(may, logits, -torch.inf)
    for settings in SETTINGS:
        out = pyrlk.sample(logits, seed=2, allowed=words, **settings)
        assert_same(out, pyrlk.sample(masked, seed=2, **settings))


def test_rows_beyond_the_buffer_are_bits():
    logits = rows_of(size(6, 3), torch.float32)
    whole = pyrlk.sample(
        logits, seed=2, top_p=0.9, return_support=True, support_capacity=logits.numel()
    )
    short = pyrlk.sample(
        logits, seed=2, top_p=0.9, return_support=True, support_capacity=VOCAB // 100
    )
    assert (short.status == kernels.OVERFLOW).any()
    assert short.support.rows() == whole.support.rows()
    assert torch.equal(short.support.to_mask(VOCAB), whole.support.to_mask(VOCAB))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_synchronises_and_a_graph_replays_it(settings, portable):
    rows = size(8, 2)
    logits = rows_of(rows, torch.bfloat16)
    seed = torch.arange(rows, device="cuda")
    position = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def draw():
        return pyrlk.sample(
            logits, seed=seed, position=position, return_support=True, portable=portable, **settings
        )

    draw()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = draw()
    for step in (1, 2):
        logits.copy_(rows_of(rows, torch.bfloat16, seed=step))
        position.fill_(step)
        graph.replay()
        assert_same(out, draw())


@pytest.mark.skipif(DRY, reason="nothing is compiled")
def test_batch_sizes_and_parameters_compile_nothing_twice():
    def compiled():
        kinds = (
            kernels.sample_tiles_fwd_kernel,
            kernels.sample_masses_fwd_kernel,
            kernels.sample_fwd_kernel,
            kernels.support_fwd_kernel,
        )
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kinds]

    def draw(rows, top_k):
        logits = rows_of(rows, torch.bfloat16, SMALL)
        pyrlk.sample(logits, seed=0, top_k=top_k, top_p=0.9, return_support=True)

    draw(1, 1)
    draw(16, 16)
    before = compiled()
    for rows in (2, 3, 15, 17, 64, 300):
        draw(rows, rows)
    assert compiled() == before
