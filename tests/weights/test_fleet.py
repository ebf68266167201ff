"""Several SGLang engines in plan mode: packed once, and one that fails is left behind."""

import threading
import time

import pytest
import torch
from engines import Fused
from fake_sglang import FakeSGLang

from pyrlk import weights
from pyrlk.weights import packing

META = {n: t.to("meta") for n, t in Fused.checkpoint(0).items()}


class Stumbling(Fused):
    """Does something in the middle of an update: `stumble(count)` after the count-th load."""

    def __init__(self, rank=0, ranks=1):
        super().__init__(rank, ranks)
        self.stumble = None

    def load_weights(self, tensors):
        super().load_weights(tensors)
        if self.stumble is not None:
            self.loads += 1
            self.stumble(self.loads)

    def arm(self, stumble):
        self.loads, self.stumble = 0, stumble


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def fleet():
    """Three engines, the last of two ranks."""
    workers = [[Stumbling()], [Stumbling()], [Stumbling(0, 2), Stumbling(1, 2)]]
    fakes = [FakeSGLang(*of_engine) for of_engine in workers]
    yield list(zip(fakes, workers, strict=True))
    for fake in fakes:
        fake.__exit__()


def publisher(fleet, **options):
    targets = [weights.SGLang(fake.url, mode="plan", expect=META) for fake, _ in fleet]
    return weights.Publisher(targets, **{"bucket_bytes": 1 << 9, "timeout": 10, **options})


def serves(one, sent, version):
    fake, workers = one
    assert (fake.version, fake.paused, fake.open) == (str(version), False, False)
    return all(
        torch.equal(tensor, worker.wanted(sent)[name])
        for worker in workers
        for name, tensor in worker.state_dict().items()
    )


def errors(report):
    return [type(entry.error).__name__ if entry.error else "" for entry in report.engines]


def test_a_bucket_is_packed_once_for_all(fleet, monkeypatch):
    packed = []
    start = packing.TensorPlan.start

    def counting(self, bucket, *rest):
        packed.append(bucket)
        return start(self, bucket, *rest)

    monkeypatch.setattr(packing.TensorPlan, "start", counting)
    with publisher(fleet) as p:
        for version in (1, 2, 3):
            sent = Fused.checkpoint(version)
            packed.clear()
            report = p.update(sent, version=version)
            assert packed == list(range(report.buckets))
            assert report.buckets > 3
            assert errors(report) == ["", "", ""]
            assert all(serves(one, sent, version) for one in fleet)
        assert all(entry.report.planned == report.tensors for entry in report.engines)
        # Another number of engines, and all of them again.
        fleet[1][0].fail["/pause_generation"] = 500
        sent = Fused.checkpoint(4)
        assert errors(p.update(sent, version=4)) == ["", "ApplyFailed", ""]
        assert serves(fleet[0], sent, 4)
        fleet[1][0].fail.clear()
        sent = Fused.checkpoint(5)
        assert errors(p.update(sent, version=5)) == ["", "", ""]
        assert all(serves(one, sent, 5) for one in fleet)


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 3])
def test_an_engine_that_fails_is_left_behind(fleet, lost, at):
    def stumble(count):
        if count == at:
            raise RuntimeError("no more")

    with publisher(fleet) as p:
        p.update(Fused.checkpoint(1), version=1)
        fleet[lost][1][-1].arm(stumble)
        sent = Fused.checkpoint(2)
        report = p.update(sent, version=2)
        wanted = ["", "", ""]
        wanted[lost] = "ApplyFailed"
        assert errors(report) == wanted
        assert report.engines[lost].error.dirty
        others = [one for i, one in enumerate(fleet) if i != lost]
        assert all(serves(one, sent, 2) for one in others)
        assert fleet[lost][0].version == "pyrlk-updating:2"
        assert fleet[lost][0].paused
        fleet[lost][1][-1].stumble = None
        assert errors(p.ensure(2)) == [""]
        assert all(serves(one, sent, 2) for one in fleet)
        for version in (3, 4, 5):
            sent = Fused.checkpoint(version)
            assert errors(p.update(sent, version=version)) == ["", "", ""]
            assert all(serves(one, sent, version) for one in fleet)


def test_an_engine_that_hangs_does_not_take_the_others_with_it(fleet):
    awake = threading.Event()
    fleet[0][1][0].arm(lambda count: awake.wait(20) if count == 2 else None)
    with publisher(fleet, timeout=1.0) as p:
        fleet[0][1][0].stumble, hang = None, fleet[0][1][0].stumble
        p.update(Fused.checkpoint(1), version=1)
        fleet[0][1][0].stumble = hang
        sent = Fused.checkpoint(2)
        start = time.monotonic()
        report = p.update(sent, version=2)
        assert time.monotonic() - start < 4
        assert errors(report) == ["Timeout", "", ""]
        assert all(serves(one, sent, 2) for one in fleet[1:])
        assert fleet[0][0].paused
        awake.set()
        fleet[0][1][0].stumble = None
        sent = Fused.checkpoint(3)
        assert errors(p.update(sent, version=3)) == ["", "", ""]
        assert all(serves(one, sent, 3) for one in fleet)


@pytest.mark.parametrize("refusing", [0, 2])
def test_all_or_none(fleet, refusing):
    with publisher(fleet, on_failure="all") as p:
        good = Fused.checkpoint(1)
        p.update(good, version=1)
        fleet[refusing][0].fail["/begin_weight_update"] = 500
        with pytest.raises(weights.ApplyFailed, match="made to fail") as caught:
            p.update(Fused.checkpoint(2), version=2)
        assert not caught.value.dirty
        assert all(serves(one, good, 1) for one in fleet)
        fleet[refusing][0].fail.clear()

        # Once bytes are on their way the others go on.
        def stumble(count):
            if count == 2:
                raise RuntimeError("no more")

        fleet[refusing][1][0].arm(stumble)
        sent = Fused.checkpoint(3)
        with pytest.raises(weights.ApplyFailed, match="no more") as caught:
            p.update(sent, version=3)
        assert caught.value.dirty
        assert all(serves(one, sent, 3) for i, one in enumerate(fleet) if i != refusing)
        fleet[refusing][1][0].stumble = None
        sent = Fused.checkpoint(4)
        p.update(sent, version=4)
        assert all(serves(one, sent, 4) for one in fleet)


def test_staging_memory_that_fails_leaves_all_as_they_were(fleet, monkeypatch):
    with publisher(fleet) as p:
        good = Fused.checkpoint(1)
        p.update(good, version=1)
        p.release_staging()

        def full(device, nbytes):
            raise weights.StagingError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr("pyrlk.weights.memory.create", full)
            with pytest.raises(weights.StagingError, match="no memory") as caught:
                p.update(Fused.checkpoint(2), version=2)
        assert not caught.value.dirty
        assert all(serves(one, good, 1) for one in fleet)
        sent = Fused.checkpoint(3)
        assert errors(p.update(sent, version=3)) == ["", "", ""]
        assert all(serves(one, sent, 3) for one in fleet)
