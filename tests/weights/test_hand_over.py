"""Publisher and Receiver in one process, the receiver in a thread; see test_two_processes.py."""

import os
import threading
import time

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


class Tied(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# 256: every tensor alone, more buckets than slots; 16 KiB: several; default: one.
@pytest.mark.parametrize("bucket_bytes", [256, 16 << 10, 512 << 20])
@pytest.mark.parametrize("verify", ["copy", "off", "engine"])
def test_a_model_arrives_bit_for_bit(socket_path, serving, bucket_bytes, verify):
    engine = make_model(1)
    with (
        serving(weights.Receiver(engine, socket_path)) as receiver,
        weights.Publisher(
            weights.Local(socket_path), bucket_bytes=bucket_bytes, verify=verify
        ) as publisher,
    ):
        for version in (3, 4, 10):
            trainer = make_model(version)
            report = publisher.update(trainer, version=version)
            assert equal(state_of(engine), state_of(trainer))
            assert (receiver.version, receiver.dirty) == (version, False)
            assert (report.version, report.tensors, report.planned) == (version, 8, 8)
            assert report.bytes == sum(t.nbytes for t in trainer.state_dict().values())
            assert report.names_from == "module"
            assert f"version     {version}" in str(report)


@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_whose_tensors_overlap_is_found_by_reading_it_back(socket_path, serving, shared):
    """A later copy hits an earlier one: every copy was right, what the engine holds is not."""
    engine, trainer = (
        nn.ParameterList(fill(8) for _ in range(2)) for fill in (torch.zeros, torch.randn)
    )
    if shared:  # read from the trainer's own memory
        weights.share(trainer)
    whole = torch.zeros(12)
    engine[0].data, engine[1].data = whole[:8], whole[4:]
    with serving(weights.Receiver(engine, socket_path)) as receiver:
        with weights.Publisher(weights.Local(socket_path), verify="engine") as publisher:
            with pytest.raises(weights.ChecksumMismatch, match=r"'0'.*is in the engine") as caught:
                publisher.update(trainer, version=1)
            assert caught.value.dirty
            assert (receiver.version, receiver.dirty) == (-1, True)
            engine[0].data = torch.zeros(8)
            publisher.update(trainer, version=1)
            assert equal(state_of(engine), state_of(trainer))
        with weights.Publisher(weights.Local(socket_path)) as publisher:
            engine[0].data = whole[:8]
            publisher.update(trainer, version=2)  # sums of the copies alone do not tell


def test_a_load_weights_cannot_be_read_back(socket_path, serving):
    calls = []
    with (
        serving(weights.Receiver(calls.append, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path), verify="engine") as publisher,
    ):
        with pytest.raises(weights.Unsupported, match="hides where it puts its tensors"):
            publisher.update(make_model(1), version=1)
        assert (calls, receiver.version, receiver.dirty) == ([], -1, False)


def test_mappings_and_pairs_and_non_contiguous_sources(socket_path, serving):
    engine = nn.Linear(30, 20)
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        weight, bias = torch.randn(30, 20).t(), torch.randn(40)[::2]
        publisher.update({"weight": weight, "bias": bias}, version=1)
        assert torch.equal(engine.weight, weight)
        assert torch.equal(engine.bias, bias)
        publisher.update(iter([("bias", bias + 1)]), version=2, partial=True)
        assert torch.equal(engine.weight, weight)
        assert torch.equal(engine.bias, bias + 1)


def test_the_engine_learns_that_its_tensors_changed(socket_path, serving):
    engine = nn.Linear(3, 3)
    before = engine.weight._version
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(nn.Linear(3, 3), version=0)
    assert engine.weight._version > before


def test_tied_weights_are_sent_once_and_completeness_is_judged_by_memory(socket_path, serving):
    engine, trainer = Tied(), Tied()
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        report = publisher.update(trainer, version=1)
        assert report.bytes == trainer.embed.weight.nbytes
        assert report.tensors == 2
        assert torch.equal(engine.head.weight, trainer.embed.weight)
        # named_parameters() drops the second name of a tied weight; nothing is missing.
        publisher.update(trainer.named_parameters(), version=2)
        with pytest.raises(weights.Unsupported, match=r"'embed.weight' and 'head.weight' are tied"):
            publisher.update(Tied(tied=False), version=3)


def test_a_tied_trainer_fills_an_untied_engine(socket_path, serving):
    engine, trainer = Tied(tied=False), Tied()
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(trainer, version=1)
    assert torch.equal(engine.embed.weight, trainer.embed.weight)
    assert torch.equal(engine.head.weight, trainer.embed.weight)


GOOD = {"weight": torch.ones(3, 5), "bias": torch.ones(3)}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({**GOOD, "extra": torch.ones(1)}, weights.UnknownName, "'extra' is not a tensor of the"),
        ({"weight": GOOD["weight"]}, weights.MissingName, "lacks 'bias'.*partial=True"),
        ({**GOOD, "weight": torch.ones(5, 3)}, weights.ShapeMismatch, r"\(5, 3\).*\(3, 5\)"),
        ({**GOOD, "bias": torch.ones(3).half()}, weights.DtypeMismatch, "'bias'.*send tensor.to"),
        ({}, weights.MissingName, "2 of the engine's 2 tensors"),
    ],
)
def test_a_wrong_update_changes_nothing(socket_path, serving, tensors, error, message):
    engine = nn.Linear(5, 3)
    with (
        serving(weights.Receiver(engine, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(nn.Linear(5, 3), version=1)
        before = state_of(engine)
        with pytest.raises(error, match=message) as caught:
            publisher.update(tensors, version=2)
        assert not caught.value.dirty
        assert equal(state_of(engine), before)
        assert (receiver.version, receiver.dirty) == (1, False)
        assert type(receiver.last_error) is error
        # The connection and the version number are still good.
        publisher.update(GOOD, version=2)
        assert equal(state_of(engine), GOOD)
        assert receiver.last_error is None


@pytest.mark.parametrize("version", [5, 4, 0])
def test_a_version_that_does_not_rise_is_refused(socket_path, serving, version):
    with (
        serving(weights.Receiver(nn.Linear(2, 2), socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(nn.Linear(2, 2), version=5)
        with pytest.raises(weights.StaleVersion, match=f"version {version} is not above 5"):
            publisher.update(nn.Linear(2, 2), version=version)
        assert receiver.version == 5


def corrupt_bucket(monkeypatch, number: int) -> None:
    """Flip one bit of the staging memory after the given bucket has been packed."""
    packed = memory.Segment.pack
    count = iter(range(1000))

    def pack(self, sources, **kwargs):
        sums = packed(self, sources, **kwargs)
        if next(count) == number:
            self.flat[sources.offsets[-1]] ^= 4
        return sums

    monkeypatch.setattr(memory.Segment, "pack", pack)


# 8 tensors in 8 buckets: with 8 slots the update is checked as a whole, with 2 it is not.
@pytest.mark.parametrize(("buffers", "dirty"), [(8, False), (2, True)])
def test_a_flipped_bit_never_becomes_a_version(socket_path, serving, monkeypatch, buffers, dirty):
    engine = make_model(1)
    before = state_of(engine)
    corrupt_bucket(monkeypatch, 5)
    with (
        serving(weights.Receiver(engine, socket_path)) as receiver,
        weights.Publisher(
            weights.Local(socket_path), bucket_bytes=256, buffers=buffers
        ) as publisher,
    ):
        with pytest.raises(weights.ChecksumMismatch, match="arrived; send the update") as caught:
            publisher.update(make_model(2), version=1)
        assert caught.value.dirty is dirty
        assert (receiver.version, receiver.dirty) == (-1, dirty)
        assert equal(state_of(engine), before) is not dirty
        if dirty:
            with pytest.raises(weights.EngineDirty, match="full update"):
                publisher.update({"0.bias": torch.zeros(70)}, version=1, partial=True)
        publisher.update(make_model(2), version=1)
        assert equal(state_of(engine), state_of(make_model(2)))
        assert (receiver.version, receiver.dirty) == (1, False)


def test_memory_that_changes_between_check_and_copy_is_caught(socket_path, serving, monkeypatch):
    engine = nn.Linear(4, 4)
    unpack = memory.Segment.unpack

    def late(self, targets, **kwargs):
        sums = unpack(self, targets, **kwargs)
        return [*sums[:-1], sums[-1] ^ 1]

    monkeypatch.setattr(memory.Segment, "unpack", late)
    with (
        serving(weights.Receiver(engine, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        with pytest.raises(weights.ChecksumMismatch, match="was copied") as caught:
            publisher.update(nn.Linear(4, 4), version=1)
        assert caught.value.dirty
        assert (receiver.version, receiver.dirty) == (-1, True)


def test_load_weights_gets_every_tensor_and_its_error_comes_back(socket_path, serving):
    got: dict[str, torch.Tensor] = {}

    def load(tensors):
        for name, tensor in tensors:
            if tensor.isnan().any():
                raise ValueError(f"{name} is NaN")
            got[name] = tensor.clone()

    with (
        serving(weights.Receiver(load, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path), bucket_bytes=256) as publisher,
    ):
        sent = GOOD | {"empty": torch.zeros(0, 4, dtype=torch.bfloat16)}
        report = publisher.update(sent, version=1)
        assert equal(got, sent)
        assert report.planned == 0
        assert report.fallback.keys() == sent.keys()
        assert report.names_from == "unchecked"
        bad = {"weight": torch.full((3, 5), torch.nan)}
        with pytest.raises(weights.ApplyFailed, match="ValueError: weight is NaN") as caught:
            publisher.update(bad, version=2)
        assert caught.value.dirty
        assert (receiver.version, receiver.dirty) == (1, True)


def test_load_weights_is_checked_against_expected(socket_path, serving):
    receiver = weights.Receiver(lambda tensors: None, socket_path, expected=GOOD)
    with serving(receiver), weights.Publisher(weights.Local(socket_path)) as publisher:
        with pytest.raises(weights.MissingName, match="'bias'"):
            publisher.update({"weight": GOOD["weight"]}, version=1)
        assert publisher.update(GOOD, version=1).names_from == "expected"


def test_weights_change_inside_poll_only(socket_path):
    engine, trainer = nn.Linear(3, 3), nn.Linear(3, 3)
    before = state_of(engine)
    with weights.Receiver(engine, socket_path) as receiver:
        assert receiver.poll() is False
        publisher = weights.Publisher(weights.Local(socket_path))
        thread = threading.Thread(target=lambda: publisher.update(trainer, version=1))
        thread.start()
        time.sleep(0.2)
        assert equal(state_of(engine), before)
        assert receiver.poll(5.0) is True
        thread.join()
        assert equal(state_of(engine), state_of(trainer))
        publisher.close()
        start = time.monotonic()
        assert receiver.poll(0.0) is False
        assert time.monotonic() - start < 0.5


def test_an_engine_that_does_not_poll_is_a_timeout(socket_path):
    with (
        weights.Receiver(nn.Linear(1, 1), socket_path),
        weights.Publisher(weights.Local(socket_path), timeout=0.2) as publisher,
        pytest.raises(weights.Timeout),
    ):
        publisher.update(nn.Linear(1, 1), version=1)


def test_no_receiver_is_an_error_that_says_so(socket_path):
    publisher = weights.Publisher(weights.Local(socket_path), timeout=0.2)
    with pytest.raises(weights.PeerLost, match=r"no receiver listens .*start weights\.Receiver"):
        publisher.update(nn.Linear(1, 1), version=1)


def test_a_second_publisher_is_told_who_is_there(socket_path, serving):
    with (
        serving(weights.Receiver(nn.Linear(1, 1), socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path)) as first,
        weights.Publisher(weights.Local(socket_path)) as second,
    ):
        first.update(nn.Linear(1, 1), version=1)
        with pytest.raises(weights.Busy, match=f"process {os.getpid()}"):
            second.update(nn.Linear(1, 1), version=2)
        first.close()
        second.update(nn.Linear(1, 1), version=2)
        assert receiver.version == 2


def test_a_restarted_engine_needs_a_full_update(socket_path, serving):
    with weights.Publisher(weights.Local(socket_path)) as publisher:
        with serving(weights.Receiver(nn.Linear(5, 3), socket_path)):
            publisher.update(GOOD, version=1)
        engine = nn.Linear(5, 3)
        with serving(weights.Receiver(engine, socket_path)):
            with pytest.raises(weights.EngineDirty, match="restarted"):
                publisher.update({"bias": GOOD["bias"]}, version=2, partial=True)
            publisher.update(GOOD, version=2)
            assert equal(state_of(engine), GOOD)


def test_the_ring_grows_with_the_update_and_never_with_time(socket_path, serving):
    def held() -> tuple[int, int]:
        time.sleep(0.1)  # the receiver closes a descriptor after its answer
        with open("/proc/self/maps") as file:
            maps = sum("pyrlk-weights" in line for line in file)
        return len(os.listdir("/proc/self/fd")), maps

    small = {"a": torch.zeros(8), "b": torch.zeros(3, 3, dtype=torch.bfloat16)}
    with (
        serving(weights.Receiver(lambda tensors: None, socket_path)) as receiver,
        weights.Publisher(weights.Local(socket_path), bucket_bytes=256) as publisher,
    ):
        publisher.update(small, version=0)
        before = held()
        for version in range(1, 2001):
            publisher.update(small, version=version)
        assert held() == before
        # A larger tensor replaces both slots, on both sides.
        publisher.update({"c": torch.zeros(5000)}, version=3000)
        assert held() == before
        assert receiver.version == 3000


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (torch.zeros(3), TypeError, "named_tensors must be a mapping"),
        ([torch.zeros(3)], TypeError, r"must yield \(name, tensor\)"),
        ({"a": [1.0]}, TypeError, "'a' is a list, wanted a str and a Tensor"),
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], ValueError, "'a' comes twice"),
        ({"a": torch.zeros(1, device="meta")}, weights.Unsupported, "'a' is a meta tensor"),
        ({"a": torch.eye(3).to_sparse()}, weights.Unsupported, "'a' is a torch.sparse_coo tensor"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, weights.Unsupported, "complex64"),
        ({"a": torch._neg_view(torch.ones(1))}, weights.Unsupported, "'a' is a negated view"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_connecting(socket_path, tensors, error, message):
    publisher = weights.Publisher(weights.Local(socket_path), timeout=60)
    with pytest.raises(error, match=message):
        publisher.update(tensors, version=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bucket_bytes": 0}, ValueError, r"bucket_bytes must be in \[1, "),
        ({"bucket_bytes": 1.5}, TypeError, "bucket_bytes must be an int, got float"),
        ({"buffers": 0}, ValueError, r"buffers must be in \[1, 64\], got 0"),
        ({"verify": "all"}, ValueError, """must be "copy", "off" or "engine", got 'all'"""),
        ({"timeout": 0}, ValueError, "timeout must be a number of seconds above 0, .* got 0"),
        ({"timeout": float("inf")}, ValueError, r"timeout must .* at most 1e\+06, got inf"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds, got bool"),
    ],
)
def test_bad_options_are_named(socket_path, options, error, message):
    with pytest.raises(error, match=message):
        weights.Publisher(weights.Local(socket_path), **options)


def test_bad_arguments_are_named(socket_path):
    with pytest.raises(
        TypeError,
        match=r"target must be weights\.Local or weights\.SGLang, or a list of them, got str",
    ):
        weights.Publisher(socket_path)
    with pytest.raises(TypeError, match="model_or_load_weights must be an"):
        weights.Receiver(3, socket_path)
    with pytest.raises(ValueError, match="expected goes with a load_weights callable"):
        weights.Receiver(nn.Linear(1, 1), socket_path, expected={})
    with pytest.raises(TypeError, match="expected must map names to tensors, got list"):
        weights.Receiver(print, socket_path, expected=[1])
    with pytest.raises(ValueError, match=r"timeout must .* got inf"):
        weights.Receiver(print, socket_path, timeout=float("inf"))
    for path in (3, None):
        with pytest.raises(TypeError, match="socket_path must be a str or a path, got"):
            weights.Local(path)
        with pytest.raises(TypeError, match="socket_path must be a str or a path, got"):
            weights.Receiver(print, path)
    for path in ("", "a\0b"):
        with pytest.raises(ValueError, match="socket_path must name a file, got"):
            weights.Local(path)
    publisher = weights.Publisher(weights.Local(socket_path))
    with pytest.raises(TypeError, match="version must be an int, got bool"):
        publisher.update({}, version=True)
    with pytest.raises(ValueError, match="version must be in"):
        publisher.update({}, version=-1)
    with pytest.raises(TypeError, match="partial must be a bool"):
        publisher.update({}, version=1, partial=1)
    with pytest.raises(TypeError, match=r"named_tensors must be a mapping, .* got NoneType"):
        publisher.update(None, version=1)
    publisher.close()
    publisher.close()
    with pytest.raises(ValueError, match="closed"):
        publisher.update({}, version=1)
