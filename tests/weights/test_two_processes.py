"""What only shows with a second process: handles, liveness, kills. The child is child.py."""

import os
import threading
import time

import pytest
import torch
from torch import nn

from pyrlk import weights

pytestmark = pytest.mark.distributed


def make_model(seed: int) -> nn.Module:
    """The one of child.py."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 300), nn.LayerNorm(300), nn.Linear(300, 64)).bfloat16()


def line(child) -> str:
    return child.stdout.readline().strip()


def test_weights_cross_a_process_boundary(socket_path, start):
    child = start("receiver", "--version", "3")
    with weights.Publisher(weights.Local(socket_path), bucket_bytes=20_000) as publisher:
        for version in (1, 2, 3):
            model = make_model(version)
            publisher.update(model, version=version)
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    assert line(child) == "listening"
    assert line(child) == f"version 3 dirty False sum {total!r}"


# The publisher dies while it packs bucket `at` of five; with the default bucket there is only one.
@pytest.mark.parametrize(
    ("bucket_bytes", "at", "dirty"), [(512 << 20, 0, False), (20_000, 0, False), (20_000, 3, True)]
)
def test_a_killed_publisher_leaves_the_old_version_or_a_dirty_mark(
    socket_path, start, bucket_bytes, at, dirty
):
    engine = make_model(1)
    before = [p.clone() for p in engine.parameters()]
    with weights.Receiver(engine, socket_path) as receiver:
        child = start("publisher", "--hang-at", str(at), "--bucket-bytes", str(bucket_bytes))
        killed_at = []

        def kill():
            assert line(child) == "packing"
            time.sleep(0.1)
            killed_at.append(time.monotonic())
            child.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        assert receiver.poll(30.0) is False
        noticed = time.monotonic()
        killer.join()
        assert noticed - killed_at[0] < 1.0
        assert isinstance(receiver.last_error, weights.PeerLost)
        assert (receiver.version, receiver.dirty) == (-1, dirty)
        same = all(torch.equal(a, b) for a, b in zip(before, engine.parameters(), strict=True))
        assert same is not dirty
        # The next publisher finds the receiver ready.
        with weights.Publisher(weights.Local(socket_path)) as publisher:
            model = make_model(2)
            update = threading.Thread(target=lambda: publisher.update(model, version=7))
            update.start()
            assert receiver.poll(10.0) is True
            update.join()
        assert (receiver.version, receiver.dirty) == (7, False)
        assert torch.equal(engine[0].weight, make_model(2)[0].weight)


def test_a_killed_receiver_is_noticed_within_a_second(socket_path, start):
    child = start("receiver", "--hang")
    killed_at = []

    def kill():
        assert line(child) == "listening"
        assert line(child) == "loading"
        killed_at.append(time.monotonic())
        child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with weights.Publisher(weights.Local(socket_path)) as publisher:
        with pytest.raises(weights.PeerLost, match=f"process {child.pid} "):
            publisher.update(make_model(2), version=1)
        noticed = time.monotonic()
        killer.join()
        assert noticed - killed_at[0] < 1.0
        child.wait()


def test_an_engine_that_died_between_updates_is_an_error_at_once(socket_path, start):
    child = start("receiver", "--stay")
    with weights.Publisher(weights.Local(socket_path)) as publisher:
        publisher.update(make_model(2), version=1)
        child.kill()
        child.wait()
        begin = time.monotonic()
        with pytest.raises(weights.PeerLost, match="no receiver listens"):
            publisher.update(make_model(2), version=2)
        assert time.monotonic() - begin < 1.0
        # A new engine under the same path is taken up without further ado.
        child = start("receiver", "--version", "3")
        assert line(child) == "listening"
        publisher.update(make_model(3), version=3)
    assert line(child).startswith("version 3 dirty False")


def test_a_forked_child_cannot_use_a_publisher(socket_path, serving):
    engine = make_model(1)
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(make_model(2), version=1)
        pid = os.fork()
        if pid == 0:
            try:
                publisher.update(make_model(2), version=2)
            except RuntimeError as error:
                os._exit(0 if "forked child" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        publisher.update(make_model(3), version=2)
        assert torch.equal(engine[0].weight, make_model(3)[0].weight)
