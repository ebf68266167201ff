"""What each rank of a gloo group checks of Publisher(group=); conftest.py starts the ranks.

Rank 0 also runs the engines: receivers in threads, and a double of SGLang.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from engines import Fused
from fake_sglang import FakeSGLang
from harness import check, main
from scattered import Scattered, everywhere, raised

from pyrlk import weights

META = {n: t.to("meta") for n, t in Fused.checkpoint(0).items()}


@contextlib.contextmanager
def serving(count=1, of=Fused):
    """Receivers on rank 0; their sockets are known to every rank."""
    stack = contextlib.ExitStack()
    engines, paths = [of() for _ in range(count)], [None] * count
    if dist.get_rank() == 0:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        paths = [f"{folder}/{i}.sock" for i in range(count)]
        os.chmod(folder, 0o700)
        for engine, path in zip(engines, paths, strict=True):
            stack.enter_context(receiving(engine, path))
    dist.broadcast_object_list(paths, 0)
    with stack:
        yield engines, [weights.Local(path) for path in paths]
        dist.barrier()


@contextlib.contextmanager
def receiving(engine, path):
    receiver = weights.Receiver(lambda tensors: engine.load_weights(tensors), path)
    thread = threading.Thread(target=receiver.serve)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stop()
        thread.join(20)
        receiver.close()


def publisher(target, **options):
    options = {"group": dist.group.WORLD, "bucket_bytes": 1 << 10, "timeout": 10, **options}
    return weights.Publisher(target, **options)


def same(engine, sent):
    """On rank 0, where the engines are."""
    return dist.get_rank() != 0 or all(
        torch.equal(t, engine.wanted(sent)[n]) for n, t in engine.state_dict().items()
    )


@check
def replicated_tensors_are_sent_once_and_every_rank_has_the_report():
    with serving() as ([engine], [target]), publisher(target) as p:
        for version in (1, 2, 3):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert same(engine, sent)
            assert report.buckets > 1
            everywhere(report.to_json())
            assert (report.version, report.tensors) == (version, 9)


@check
def sharded_tensors_are_gathered_one_collective_a_bucket():
    with serving() as ([engine], [target]), publisher(target) as p:
        for version in (1, 2, 3):
            sent = Fused.checkpoint(version)
            shards = Scattered(sent)
            report = p.update(shards, version=version)
            assert same(engine, sent)
            assert shards.collectives == report.buckets > 1
            everywhere(report.to_json())
        # The same source again: other values, the same plan.
        for tensor in sent.values():
            tensor += 1
        p.update(shards, version=4)
        assert same(engine, sent)


@check
def sglang_gets_them_in_both_modes():
    workers = [Fused(rank, 2) for rank in range(2)]
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(FakeSGLang(*workers)) if dist.get_rank() == 0 else None
        urls = [fake and fake.url]
        dist.broadcast_object_list(urls, 0)
        for count, mode in enumerate(("bucket", "plan")):
            target = weights.SGLang(urls[0], mode=mode, expect=META)
            with publisher(target) as p:
                for version in (1, 2, 3):
                    sent = Fused.checkpoint(10 * count + version)
                    report = p.update(Scattered(sent), version=10 * count + version)
                    assert all(same(worker, sent) for worker in workers)
                    assert everywhere(report.mode) == mode
                    if fake:
                        assert (fake.version, fake.paused) == (str(10 * count + version), False)
        dist.barrier()


@check
def ranks_that_disagree_touch_nothing():
    rank = dist.get_rank()
    last = rank == dist.get_world_size() - 1
    with serving() as ([engine], [target]), publisher(target) as p:
        good = Fused.checkpoint(0)
        p.update(good, version=1)
        other = {n: t[:1] if n == "norm.weight" else t for n, t in good.items()}
        cases = [
            (lambda: p.update(good, version=2 + last), r"version: 2 on rank 0, 3 on rank"),
            (lambda: p.update(good, version=2, partial=last), "partial: False on rank 0, True"),
            (lambda: p.update(other if last else good, version=2), "named_tensors: 9 tensors"),
            (lambda: p.ensure(1) if last else p.update(good, version=2), "call: update on rank 0"),
        ]
        for call, match in cases:
            raised(weights.RanksDisagree, match, call)
            assert same(engine, good)
        p.update(Fused.checkpoint(2), version=2)
        assert same(engine, Fused.checkpoint(2))


@check
def one_rank_that_cannot_stops_all():
    last = dist.get_rank() == dist.get_world_size() - 1
    with serving() as ([engine], [target]), publisher(target) as p:
        good = Fused.checkpoint(0)
        p.update(good, version=1)
        for culprit in (last, dist.get_rank() == 0):
            with pytest.raises(ValueError, match="version must be in"):
                p.update(good, version=-1 if culprit else 2)
            with pytest.raises(TypeError, match="wanted a str and a Tensor"):
                p.update({"a": 1} if culprit else good, version=2)
        raised(weights.StaleVersion, "version", lambda: p.update(good, version=1))
        assert same(engine, good)


@check
def a_rank_whose_part_fails_is_named_by_all():
    """Of the first bucket: nothing was handed over. The collective is left behind in its group."""
    last = dist.get_rank() == dist.get_world_size() - 1
    group = dist.new_group()
    with serving() as ([engine], [target]):
        good = Fused.checkpoint(0)
        with publisher(target, group=group, timeout=2) as p:
            p.update(good, version=1)
            shards = Scattered(Fused.checkpoint(3), group)

            def fail(bucket):
                if last:
                    raise weights.Unsupported("no such shard")

            shards.before = fail
            start = time.monotonic()
            *_, dirty = raised(
                weights.Unsupported, r"rank \d: no such shard", lambda: p.update(shards, version=2)
            )
            assert not dirty
            assert time.monotonic() - start < 6
            assert same(engine, good)
            p.update(Fused.checkpoint(2), version=2)
            assert same(engine, Fused.checkpoint(2))


@check
def a_rank_that_does_not_come():
    last = dist.get_rank() == dist.get_world_size() - 1
    with serving() as ([engine], [target]), publisher(target, timeout=1.5) as p:
        good = Fused.checkpoint(0)
        p.update(good, version=1)
        start = time.monotonic()
        if last:
            time.sleep(3)
        with pytest.raises(weights.Timeout, match=r"rank \d of the trainer was not heard of"):
            p.update(Fused.checkpoint(2), version=2)
        assert time.monotonic() - start < 5
        assert same(engine, good)
        dist.barrier()
        p.update(Fused.checkpoint(2), version=3)
        assert same(engine, Fused.checkpoint(2))


@check
def ensure_brings_up_a_restarted_engine():
    leads = dist.get_rank() == 0
    with serving() as ([first], [target]), serving() as ([_], [other]):
        late = weights.Local(other.socket_path + ".late")

        def started(engine):
            return receiving(engine, late.socket_path) if leads else contextlib.nullcontext()

        with publisher([target, late]) as p:
            sent = Fused.checkpoint(1)
            shards = Scattered(sent)
            with started(Fused()):
                p.update(shards, version=1)
                assert p.ensure(1) is None
            second = Fused()
            with started(second):
                report = p.ensure(1)
                assert [e.target for e in report.engines] == [late]
                assert same(second, sent)
                everywhere(report.to_json())
            assert same(first, sent)


@check
def nothing_is_left_in_the_store():
    with serving() as ([_], [target]), publisher(target) as p:
        counts = []
        for version in range(1, 30):
            p.update(Scattered(Fused.checkpoint(0)), version=version)
            dist.barrier()
            counts.append(p._ranks._store.num_keys())
            dist.barrier()
        assert counts[-1] <= counts[4], counts


if __name__ == "__main__":
    main()
