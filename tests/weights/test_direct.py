"""A trainer whose tensors an engine can map: nothing is packed, the engine copies from there."""

import gc
import os

import pytest
import torch
from torch import nn

from pyrlk import weights
from pyrlk.weights import memory


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 70), nn.BatchNorm1d(70), nn.Linear(70, 40, bias=False))
    model[2].bfloat16()
    return model


def same(left: nn.Module, right: nn.Module) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def no_staging(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("staging memory was packed")

    monkeypatch.setattr(memory.Segment, "pack", refuse)


def test_sharing_moves_data_and_keeps_the_parameters():
    model = make_model(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    assert weights.share(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with torch.no_grad():
        parameters[0].add_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0](torch.ones(3, 40)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"] + 1)
    assert memory.Exports().find(model[0].weight) is not None


def test_on_a_gpu_tensors_share_few_allocations(monkeypatch):
    # The CPU stands for the GPU: what is new there is who lies where.
    monkeypatch.setattr(memory, "_FLAT_BYTES", 10_000)
    tensors = [torch.randn(n)[::2].requires_grad_() for n in (2, 2000, 2400, 9000, 200, 400)]
    tensors.append(torch.randn(8, 6).bfloat16().t())
    before = [t.detach().clone() for t in tensors]
    memory._share_gpu(tensors, torch.device("cpu"))
    for was, tensor in zip(before, tensors, strict=True):
        assert torch.equal(was, tensor)
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % 256 == 0
    places = [(t.untyped_storage().data_ptr(), t.storage_offset()) for t in tensors]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert list(sizes.values()) == [256 + 4096 + 4864, 18176, 512 + 1024 + 256]  # one is too large
    assert len(set(places)) == len(tensors)


@pytest.mark.parametrize("verify", ["copy", "off"])
def test_a_shared_model_is_not_packed(socket_path, serving, no_staging, verify):
    engine, trainer = make_model(1), weights.share(make_model(2))
    with (
        serving(weights.Receiver(engine, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path), verify=verify) as publisher,
    ):
        for version in (1, 2, 3):
            with torch.no_grad():
                for parameter in trainer.parameters():
                    parameter.add_(version)
            report = publisher.update(trainer, version=version)
            assert report.mode == "direct"
            assert report.bytes == sum(t.nbytes for t in trainer.state_dict().values())
            assert same(engine, trainer)
            assert (receiver.version, receiver.dirty) == (version, False)


def test_what_cannot_be_shared_is_staged_beside_it(socket_path, serving):
    trainer = weights.share(make_model(2))
    tensors = dict(trainer.state_dict())
    tensors["0.weight"] = torch.randn(40, 70).t()  # of its own, and strided
    engine = make_model(1)
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        report = publisher.update(tensors, version=1)
        assert report.mode == "direct+bucket"
        assert torch.equal(engine[0].weight, tensors["0.weight"])
        assert torch.equal(engine[2].weight, tensors["2.weight"])
        # Another trainer's memory takes the place of the first one's.
        other = weights.share(make_model(3))
        assert publisher.update(other, version=2).mode == "direct"
        assert same(engine, other)
        publisher.release_staging()
        assert publisher.update(trainer, version=3).mode == "direct"
        assert same(engine, trainer)


def test_load_weights_sees_the_trainers_memory(socket_path, serving):
    got = {}

    def load(tensors):
        got.update((name, tensor.clone()) for name, tensor in tensors)

    trainer = weights.share(make_model(2))
    with (
        serving(weights.Receiver(load, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(trainer, version=1)
    assert all(torch.equal(got[name], t) for name, t in trainer.state_dict().items())


def test_a_weight_that_changes_during_the_update_is_caught(socket_path, serving, monkeypatch):
    trainer, engine = weights.share(make_model(2)), make_model(1)
    sums = memory.Segment.sums

    def then_change(self, ranges, **kwargs):
        out = sums(self, ranges, **kwargs)
        if isinstance(self, memory._Own):
            trainer[0].weight.data.view(-1)[5] += 1
        return out

    monkeypatch.setattr(memory.Segment, "sums", then_change)
    with (
        serving(weights.Receiver(engine, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        with pytest.raises(weights.ChecksumMismatch, match=r"'0\.weight'.*was copied") as caught:
            publisher.update(trainer, version=1)
        assert caught.value.dirty
        assert receiver.dirty
        monkeypatch.undo()
        publisher.update(trainer, version=1)
        assert same(engine, trainer)


def test_views_of_one_tensor_are_each_sent(socket_path, serving, no_staging):
    trainer = weights.share(nn.ParameterList([torch.randn(4, 8)]))
    fused = trainer[0].detach()
    got = {}

    def load(tensors):
        got.update((name, tensor.clone()) for name, tensor in tensors)

    parts = {"all": fused, **{f"row.{i}": fused[i] for i in range(4)}, "again": fused[1]}
    with (
        serving(weights.Receiver(load, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(parts, version=1)
    assert got.keys() == parts.keys()
    assert all(torch.equal(got[name], part) for name, part in parts.items())


def test_shared_memory_is_freed_with_its_last_tensor():
    gc.collect()
    fds, registered = len(os.listdir("/proc/self/fd")), len(memory._SHARED)
    model = weights.share(make_model(2))
    kept = model[0].weight.detach()
    assert len(memory._SHARED) == registered + 1
    del model
    gc.collect()
    assert bool(kept.isfinite().all())
    assert len(memory._SHARED) == registered + 1
    del kept
    gc.collect()
    assert len(memory._SHARED) == registered
    assert len(os.listdir("/proc/self/fd")) == fds
