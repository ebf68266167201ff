"""Threads and processes: concurrent Python threads, forked children, errors in the middle."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

import pyrlk


def work(seed):
    """One of everything on rows of its own."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(16, 6000, generator=generator, requires_grad=True)
    tokens = torch.randint(6000, (16,), generator=generator)
    adv = torch.randn(16, generator=generator)
    loss = pyrlk.dapo_loss(z, tokens, adv - 8, adv, entropy_coef=0.1)
    loss.backward()
    drawn = pyrlk.sample(z, top_k=20, top_p=0.9, seed=seed, return_support=True)
    lp = pyrlk.token_logprobs(z.detach(), drawn.token)
    return [loss.detach(), z.grad, drawn.token, drawn.logprob, drawn.support.ids, lp]


def test_python_threads_calling_at_once_get_the_bits_of_calling_alone():
    want = [work(seed) for seed in range(4)]
    wrong, start = [], threading.Barrier(4)

    def run(seed):
        start.wait()
        for _ in range(8):
            got = work(seed)
            if not all(torch.equal(a, b) for a, b in zip(got, want[seed], strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interpreter_runs_while_a_kernel_does():
    z = torch.zeros(64, 120_000)
    options = {"seed": torch.arange(64), "top_p": 0.999}
    pyrlk.sample(z, **options)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    pyrlk.sample(z, **options)
    end = time.perf_counter()
    done.set()
    thread.join()
    inside = [t for t in ticks if begin < t < end]
    assert len(inside) >= 3, f"{len(inside)} ticks in {end - begin:.3f} s"


FORK = """
import os, signal, sys, torch, pyrlk
torch.set_num_threads(4)
def work():
    torch.manual_seed(0)
    z = torch.randn(32, 5000, requires_grad=True)
    tokens = pyrlk.sample(z, seed=0, top_k=9).token
    loss = pyrlk.dapo_loss(z, tokens, torch.zeros(32) - 8, torch.ones(32), entropy_coef=0.1)
    loss.backward()
    scored = pyrlk.token_logprobs(z, tokens)
    return loss.item(), z.grad.sum().item(), tokens.tolist(), scored.tolist()
want = work()
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.set_num_threads(1)  # torch's own regions hang in a forked child; pyrlk's do not
    os._exit(0 if work()[0] == want[0] and work()[2:] == want[2:] else 3)
_, status = os.waitpid(child, 0)
assert work() == want
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_computes_after_its_parent_used_threads():
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_more_threads_than_rows_or_cores_are_no_harm(rows):
    before = torch.get_num_threads()
    z, tokens = torch.randn(rows, 300), torch.randint(300, (rows,))
    want = pyrlk.token_logprobs(z, tokens)
    try:
        torch.set_num_threads(32)
        assert torch.equal(pyrlk.token_logprobs(z, tokens), want)
    finally:
        torch.set_num_threads(before)


# Fewer rows than threads, as many, a few more; wide enough to be shared, with a ragged last tile.
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_threads_share_have_the_bits_of_one_thread(rows, dtype):
    g = torch.Generator().manual_seed(rows)
    width, vocab = 140_037, 140_001
    z = torch.randn(rows, width, generator=g, dtype=torch.float64).mul_(3).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    adv = torch.randn(rows, generator=g, dtype=torch.float64).to(wide)
    tokens = torch.randint(vocab, (rows,), generator=g)
    if rows == 5:
        z[1, 70_000], z[2, 139_000] = torch.nan, torch.inf
        tokens[3] = -100
        adv[4] = 0

    def work():
        leaf = z.detach().requires_grad_()
        lp, entropy = pyrlk.token_logprobs(leaf, tokens, vocab_size=vocab, return_entropy=True)
        (two,) = torch.autograd.grad((lp * adv + entropy).sum(), leaf)
        options = {"vocab_size": vocab, "entropy_coef": 0.1, "normalizer": 1.0}
        loss = pyrlk.dapo_loss(leaf, tokens, adv - 12, adv, **options)
        (one,) = torch.autograd.grad(loss, leaf)
        inside = leaf.clone()
        pyrlk.dapo_loss(inside, tokens, adv - 12, adv, inplace=True, **options)
        plain = pyrlk.reinforce_grad(z[:, :vocab], tokens, adv)
        return [x.detach() for x in (lp, entropy, two, loss, one, inside, plain)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = work()
        for threads in (2, 3, 4, 4):
            torch.set_num_threads(threads)
            for a, b in zip(work(), want, strict=True):
                kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
                assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    finally:
        torch.set_num_threads(before)


def test_memory_does_not_grow_over_calls_and_errors():
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    z, adv = torch.randn(64, 8000, requires_grad=True), torch.randn(64)
    tokens = torch.randint(8000, (64,))
    bad = tokens.clone()
    bad[5] = 8000

    def calls(count):
        for _ in range(count):
            loss = pyrlk.dapo_loss(z, tokens, adv, adv, return_stats=True)[0]
            torch.autograd.grad(loss, z)
            pyrlk.sample(z, seed=1, top_p=0.99, return_support=True)
            with pytest.raises(ValueError, match=r"tokens\[5\]"):
                pyrlk.dapo_loss(z, bad, adv, adv)

    calls(10)
    before = resident()
    calls(60)
    gradient = z.numel() * 4
    assert resident() - before < 8 * gradient  # 180 gradients or supports would show
