"""An op runs with the device of its tensors as the current one, which Triton launches on."""

import contextlib
import types

import pytest
import torch

from pyrlk import _op

HERE = 0


@pytest.fixture
def visited(monkeypatch):
    """The devices that were made current, in order."""
    seen = []

    @contextlib.contextmanager
    def current(device):
        seen.append(device.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: HERE)
    monkeypatch.setattr(torch.cuda, "device", current)
    return seen


def tensor(index):
    return types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))


@pytest.mark.parametrize(("index", "changes"), [(HERE, []), (1, [1])])
def test_a_kernel_is_launched_where_its_first_tensor_is(visited, index, changes):
    kernel = _op.by_device(cpu=None, cuda=lambda x, y: (list(visited), y))
    assert _op._on_its_device(kernel)(tensor(index), 5) == (changes, 5)


def test_the_cpu_asks_no_driver(visited, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", None)
    kernel = _op.by_device(cpu=lambda x, y: y, cuda=None)
    assert _op._on_its_device(kernel)(torch.ones(1), 5) == 5


def test_ops_are_guarded_with_torch_library_and_without(visited):
    made = _op._Eager(None, None, _op._on_its_device(lambda x: list(visited)), lambda args: args)
    assert made._body(tensor(1)) == [1]
