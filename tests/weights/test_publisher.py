"""Several engines under one publisher, late ones, and staging memory between updates."""

import contextlib
import gc
import os
import time

import pytest
import torch
from torch import nn

from pyrlk import weights


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def paths(socket_path):
    return [f"{socket_path}{i}" for i in range(3)]


def test_every_engine_of_a_list_gets_the_weights(paths, serving):
    engines = [make_model(i) for i in range(3)]
    with contextlib.ExitStack() as stack:
        for engine, path in zip(engines, paths, strict=True):
            stack.enter_context(serving(weights.Receiver(engine, path)))
        publisher = stack.enter_context(weights.Publisher([weights.Local(p) for p in paths]))
        for version in (1, 2):
            trainer = make_model(10 + version)
            report = publisher.update(trainer, version=version)
            assert all(same(engine, trainer) for engine in engines)
            assert [e.target.socket_path for e in report.engines] == paths
            assert all(e.error is None and e.report.version == version for e in report.engines)
            assert str(report).count("updated") == 3


def test_a_failing_engine_does_not_keep_the_others_back(paths, serving):
    engines = [make_model(0), nn.Linear(3, 3), make_model(2)]
    with contextlib.ExitStack() as stack:
        for engine, path in zip(engines, paths, strict=True):
            stack.enter_context(serving(weights.Receiver(engine, path)))
        publisher = stack.enter_context(weights.Publisher([weights.Local(p) for p in paths]))
        report = publisher.update(make_model(5), version=1)
        assert [type(e.error) for e in report.engines] == [
            type(None),
            weights.UnknownName,
            type(None),
        ]
        assert same(engines[0], make_model(5))
        assert same(engines[2], make_model(5))
        with pytest.raises(weights.UnknownName):
            publisher.update({"nobody's": torch.ones(1)}, version=2)


def test_all_or_none_updates_nobody_unless_everybody_accepts(paths, serving):
    engines = [make_model(0), nn.Linear(3, 3)]
    with contextlib.ExitStack() as stack:
        receivers = [
            stack.enter_context(serving(weights.Receiver(engine, path)))
            for engine, path in zip(engines, paths, strict=False)
        ]
        targets = [weights.Local(p) for p in paths[:2]]
        publisher = stack.enter_context(weights.Publisher(targets, on_failure="all"))
        with pytest.raises(weights.UnknownName):
            publisher.update(make_model(5), version=1)
        assert [r.version for r in receivers] == [-1, -1]
        assert not receivers[0].dirty
        assert same(engines[0], make_model(0))


def test_ensure_brings_up_a_restarted_engine_and_no_other(paths, serving):
    first, second = make_model(0), make_model(1)
    trainer = make_model(5)
    targets = [weights.Local(p) for p in paths[:2]]
    with serving(weights.Receiver(first, paths[0])), weights.Publisher(targets) as publisher:
        with pytest.raises(ValueError, match=r"last update \(none\), got 1"):
            publisher.ensure(1)
        with serving(weights.Receiver(second, paths[1])):
            publisher.update(trainer, version=1)
            assert publisher.ensure(1) is None
        late = make_model(2)
        with serving(weights.Receiver(late, paths[1])) as receiver:
            report = publisher.ensure(1)
            assert [e.target.socket_path for e in report.engines] == [paths[1]]
            assert same(late, trainer)
            assert receiver.version == 1
            assert publisher.ensure(1) is None
        # Weights that have moved on are not the old version.
        with serving(weights.Receiver(make_model(3), paths[1])) as receiver:
            with torch.no_grad():
                trainer[0].weight.add_(1)
            with pytest.raises(weights.StaleVersion, match="have changed since"):
                publisher.ensure(1)
            assert receiver.version == -1


def test_ensure_keeps_no_tensor_alive(socket_path, serving):
    with (
        serving(weights.Receiver(lambda tensors: None, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update({"a": torch.ones(3)}, version=1)
        publisher._engines[0].session.channel.close()
        publisher._engines[0].session = None
        with pytest.raises(ValueError, match="its tensors are gone"):
            publisher.ensure(1)


def maps() -> int:
    with open("/proc/self/maps") as file:
        return sum("pyrlk-weights" in line for line in file)


def test_staging_memory_can_be_given_back_between_updates(socket_path, serving):
    engine = make_model(0)
    gc.collect()
    before, descriptors = maps(), len(os.listdir("/proc/self/fd"))
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.release_staging()  # nothing yet
        for version in (1, 2, 3):
            publisher.update(make_model(version), version=version)
            assert maps() == before + 2  # ours and the engine's
            publisher.release_staging()
            publisher.release_staging()
            end = time.monotonic() + 5
            while maps() != before and time.monotonic() < end:
                time.sleep(0.01)
            assert maps() == before
            assert same(engine, make_model(version))
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        ([], {}, ValueError, "must not be empty"),
        (["x"], {}, TypeError, "target must be .* got str"),
        ([weights.Local("/tmp/a")] * 2, {}, ValueError, "name an engine twice"),
        (weights.Local("/tmp/a"), {"on_failure": "x"}, ValueError, "on_failure must be"),
        (weights.Local("/tmp/a"), {"group": 1}, TypeError, "group must be a ProcessGroup"),
    ],
)
def test_bad_arguments_are_named(target, options, error, message):
    with pytest.raises(error, match=message):
        weights.Publisher(target, **options)
