"""The memory of large CPU gradients stays warm between steps, and is never given out twice."""

from __future__ import annotations

import copy
import ctypes
import io
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrlk
from pyrlk import _C, _warm


@pytest.fixture(autouse=True)
def every_gradient_is_large(monkeypatch):
    """Small gradients take the way of large ones: the same code, in milliseconds."""
    monkeypatch.setattr(_warm, "WARM_BYTES", 1)
    pyrlk.empty_cache()
    yield
    pyrlk.empty_cache()


def problem(rows=8, vocab=5000, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=g).to(dtype)
    adv = torch.randn(rows, generator=g)
    return z, torch.randint(vocab, (rows,), generator=g), adv - 8, adv


def gradient(args):
    z, tokens, old, adv = args
    leaf = z.detach().requires_grad_()
    pyrlk.dapo_loss(leaf, tokens, old, adv).backward()
    return leaf.grad


def cold(args, monkeypatch):
    with monkeypatch.context() as m:
        m.setenv("PYRLK_WARM_GRADIENTS", "0")
        return gradient(args)


def used_and_kept():
    return _C.warm_pages()


def test_the_next_step_gets_the_memory_of_the_last(monkeypatch):
    args = problem()
    first = gradient(args)
    at = first.data_ptr()
    assert used_and_kept() == (first.nbytes + -first.nbytes % 4096, 0)
    del first
    assert used_and_kept()[0] == 0
    again = gradient(args)
    assert again.data_ptr() == at
    assert torch.equal(again, cold(args, monkeypatch))


@pytest.mark.parametrize(
    "hold",
    [
        lambda g: g,
        lambda g: g[3:4, 17:900],
        lambda g: g.detach().view(-1)[::7],
        lambda g: g.t(),
        lambda g: torch.from_numpy(g.numpy()),
        lambda g: torch.from_dlpack(g),
        lambda g: g.untyped_storage(),
        lambda g: g.view(torch.int32),
        lambda g: memoryview(g.numpy()),
    ],
    ids=["itself", "slice", "stride", "transpose", "numpy", "dlpack", "storage", "dtype", "buffer"],
)  # fmt: skip
def test_memory_with_a_view_alive_is_not_given_out(hold):
    """Ten more steps, larger, equal and smaller, leave what is held as it was."""
    grad = gradient(problem())
    want, at = grad.clone(), grad.data_ptr()
    kept = hold(grad)
    del grad
    for seed in range(10):
        other = gradient(problem(rows=7 + seed % 3, seed=seed + 1))
        assert other.data_ptr() != at
    assert torch.equal(floats_at(at, want.numel()).view(want.shape), want)
    del kept, other
    assert used_and_kept()[0] == 0


def floats_at(address, count):
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_lengths_that_change_from_step_to_step_get_the_bits_of_fresh_memory(dtype, monkeypatch):
    for rows in (4, 9, 9, 2, 1, 12, 3, 11):
        args = problem(rows, dtype=dtype, seed=rows)
        if dtype == torch.float64:
            args = tuple(x.double() if x.is_floating_point() else x for x in args)
        got = gradient(args)
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got, cold(args, monkeypatch))


def test_no_more_is_kept_than_was_in_use_at_once():
    most = 0
    held = []
    g = torch.Generator().manual_seed(3)
    for step in range(120):
        held.append(gradient(problem(int(torch.randint(1, 12, (1,), generator=g)), seed=step)))
        used, kept = used_and_kept()
        most = max(most, used)
        assert used + kept <= most
        while len(held) > int(torch.randint(0, 4, (1,), generator=g)):
            held.pop(int(torch.randint(len(held), (1,), generator=g)))
        used, kept = used_and_kept()
        assert used + kept <= most
    held.clear()
    used, kept = used_and_kept()
    assert used == 0
    assert pyrlk.empty_cache() == kept
    assert used_and_kept() == (0, 0)


GROWTH = """
import resource, sys, torch, pyrlk
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
tokens, adv = torch.randint(150_000, (64,)), torch.randn(64)
z = torch.randn(64, 150_000, requires_grad=True)      # 38 MB: above the threshold
def step(rows):
    z.grad = None
    part = z[:rows]
    pyrlk.dapo_loss(z if rows == 64 else part, tokens[:rows], adv[:rows], adv[:rows]).backward()
for rows in (64, 58, 64):
    step(rows)
before = resident()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(30):
    step((60, 57, 64)[i % 3])
assert resident() - before < 0.1 * z.nbytes, (resident(), before)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 0.1 * z.nbytes / 1024
z.grad = None
used, kept = pyrlk._C.warm_pages()
assert used == 0 and 0 < kept <= 2.1 * z.nbytes
low = resident()
assert pyrlk.empty_cache() == kept
assert resident() <= low - 0.9 * kept + 4e6, (low, resident(), kept)
"""


def test_resident_memory_does_not_grow_over_steps_and_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


FORK = """
import os, signal, sys, torch, pyrlk
from pyrlk import _C, _warm
_warm.WARM_BYTES = 1
torch.set_num_threads(1)
def work(seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(8, 5000, generator=g).requires_grad_()
    adv = torch.randn(8, generator=g)
    pyrlk.dapo_loss(z, torch.arange(8), adv - 8, adv).backward()
    return z.grad
want = [work(seed).clone() for seed in range(3)]
held = work(0)
work(1)                                               # leaves one mapping behind
assert _C.warm_pages()[1] > 0
child = os.fork()
if child == 0:
    signal.alarm(60)
    good = _C.warm_pages()[1] == 0 and torch.equal(held, want[0])
    for seed in (1, 2, 1):
        good = good and torch.equal(work(seed), want[seed])
    held.fill_(7)                                     # the child's own copy
    os._exit(0 if good else 3)
for seed in (2, 1, 2):
    assert torch.equal(work(seed), want[seed])
_, status = os.waitpid(child, 0)
assert torch.equal(held, want[0])
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_has_memory_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_that_take_and_give_back_at_once_never_share():
    args = [problem(rows=4, seed=seed) for seed in range(4)]
    want = [gradient(a).clone() for a in args]
    wrong, start = [], threading.Barrier(4)

    def run(i):
        start.wait()
        held = None
        for _ in range(40):
            got = gradient(args[i])
            if held is not None and not torch.equal(held, want[i]):
                wrong.append(i)
            held = got
        if not torch.equal(held, want[i]):
            wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert used_and_kept()[0] == 0


def test_autograd_takes_the_gradient_without_a_copy_and_accumulates_into_it():
    z, tokens, old, adv = problem()
    leaf = z.requires_grad_()
    pyrlk.dapo_loss(leaf, tokens, old, adv).backward()
    once, at = leaf.grad.clone(), leaf.grad.data_ptr()
    assert used_and_kept()[0] > 0  # the leaf's .grad is the kernel's memory itself
    pyrlk.dapo_loss(leaf, tokens, old, adv).backward()
    assert leaf.grad.data_ptr() == at
    assert torch.equal(leaf.grad, 2 * once)
    leaf.grad.zero_()
    pyrlk.dapo_loss(leaf, tokens, old, adv).backward()
    assert torch.equal(leaf.grad, once)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_steps_by_it(make, monkeypatch):
    def trained():
        z, tokens, old, adv = problem()
        leaf = torch.nn.Parameter(z)
        optimizer = make([leaf], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            pyrlk.dapo_loss(leaf, tokens, old, adv).backward()
            torch.nn.utils.clip_grad_norm_([leaf], 1e-3)
            optimizer.step()
        return leaf.detach()

    got = trained()
    monkeypatch.setenv("PYRLK_WARM_GRADIENTS", "0")
    assert torch.equal(got, trained())


def saved_and_loaded(g):
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, copy.copy, saved_and_loaded, lambda g: g.share_memory_(),
     lambda g: torch.tensor(g.numpy())],
    ids=["deepcopy", "copy", "save", "share_memory", "numpy"],
)  # fmt: skip
def test_it_is_a_tensor_like_any_other(twin):
    grad = gradient(problem())
    want = grad.clone()
    other = twin(grad)
    del grad
    for seed in range(3):
        gradient(problem(seed=seed + 1))
    assert torch.equal(other, want)


def test_it_shrinks_but_its_memory_does_not_grow():
    grad = gradient(problem())
    want = grad[:2].clone()
    assert torch.equal(grad.resize_(2, 5000), want)
    with pytest.raises(RuntimeError, match="not resizable"):
        grad.resize_(100, 5000)


def test_fake_tensors_take_no_memory():
    z, tokens, old, adv = problem()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (z, tokens, old, adv)]
        grad = gradient(fake)
    assert type(grad).__name__ == "FakeTensor"
    assert used_and_kept() == (0, 0)


def test_a_compiled_step_gets_the_same_gradient(monkeypatch):
    args = problem()
    compiled = torch.compile(pyrlk.dapo_loss, fullgraph=True)

    def compiled_gradient():
        leaf = args[0].detach().requires_grad_()
        compiled(leaf, *args[1:]).backward()
        return leaf.grad

    want = cold(args, monkeypatch)
    for _ in range(3):
        assert torch.equal(compiled_gradient(), want)
    assert used_and_kept()[1] > 0


def test_a_capsule_that_nobody_takes_gives_its_memory_back():
    capsule = _C.warm_tensor((3, 5), 0)
    assert used_and_kept()[0] == 4096
    del capsule
    assert used_and_kept()[0] == 0


def test_more_than_the_address_space_is_left_to_torch_to_refuse():
    assert _C.warm_tensor((1 << 50, 1 << 10), 0) is None
