"""mode="distributed" against doubles of SGLang: one group, one broadcast a bucket, isolation."""

import contextlib
import threading
import time

import pytest
import torch
import torch.distributed as dist
from engines import Fused, Raising
from fake_sglang import FakeSGLang

from pyrlk import weights

META = {n: t.to("meta") for n, t in Fused.checkpoint(0).items()}


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def target(fake, **options):
    return weights.SGLang(fake.url, mode="distributed", expect=META, **options)


def publisher(*fakes, **options):
    options = {"bucket_bytes": 1 << 10, "timeout": 10, **options}
    targets = [target(fake) for fake in fakes]
    return weights.Publisher(targets if len(fakes) > 1 else targets[0], **options)


def same(fake, sent):
    return all(
        torch.equal(t, worker.wanted(sent)[n])
        for worker in fake.workers
        for n, t in worker.state_dict().items()
    )


def state(fake):
    return fake.version, fake.paused, fake.open


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1 << 10])
@pytest.mark.parametrize("buffers", [1, 2])
def test_every_rank_ends_with_what_load_weights_makes(ranks, bucket_bytes, buffers):
    workers = [Fused(rank, ranks) for rank in range(ranks)]
    with FakeSGLang(*workers) as fake:
        with publisher(fake, bucket_bytes=bucket_bytes, buffers=buffers) as p:
            for version in (1, 2, 3):
                sent = Fused.checkpoint(version)
                report = p.update(sent, version=version)
                assert same(fake, sent)
                assert state(fake) == (str(version), False, False)
                assert (report.mode, report.tensors) == ("distributed", 9)
            assert fake.calls.count("init_weights_update_group") == 1
            assert len(fake.groups) == 1
        assert fake.calls[-1] == "destroy_weights_update_group"
        assert not fake.groups
    assert not dist.is_initialized()


def test_the_order_of_a_transaction_is_the_one_of_the_other_modes():
    with FakeSGLang(Fused()) as fake, publisher(fake, bucket_bytes=1 << 20) as p:
        p.update(Fused.checkpoint(0), version=7)
        assert fake.calls == [
            "pause_generation",
            "flush_cache",
            "update_weight_version pyrlk-updating:7",
            "begin_weight_update",
            "init_weights_update_group",
            "update_weights_from_distributed",
            "end_weight_update",
            "update_weight_version 7",
            "continue_generation",
        ]


def test_sixteen_and_eight_bit_tensors_keep_their_alignment():
    """Names in the order of the checkpoint would put a float32 at an odd offset."""
    worker = Fused(dtype=torch.bfloat16)
    with FakeSGLang(worker, dtype="bfloat16") as fake, publisher(fake, bucket_bytes=1 << 20) as p:
        sent = Fused.checkpoint(1)
        sent = {n: t.bfloat16() if i % 2 else t for i, (n, t) in enumerate(sent.items())}
        sent["norm.weight"] = sent["norm.weight"].float()
        p.update(sent, version=1)
        assert same(fake, sent)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2, 1)])
def test_several_engines_share_one_group(ranks):
    with contextlib.ExitStack() as stack:
        fakes = [
            stack.enter_context(FakeSGLang(*(Fused(rank, count) for rank in range(count))))
            for count in ranks
        ]
        p = stack.enter_context(publisher(*fakes))
        for version in (1, 2):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert all(same(fake, sent) for fake in fakes)
            assert all(e.error is None for e in report.engines)
            assert [e.target.url for e in report.engines] == [fake.url for fake in fakes]
        assert len({name for fake in fakes for name in fake.groups}) == 1
        assert all(fake.calls.count("init_weights_update_group") == 1 for fake in fakes)


def test_what_is_wrong_is_found_before_the_engine_is_touched():
    good = Fused.checkpoint(0)
    cases = {
        weights.UnknownName: {**good, "more": torch.ones(1)},
        weights.MissingName: {n: t for n, t in good.items() if n != "q.weight"},
        weights.ShapeMismatch: {**good, "q.weight": torch.zeros(9, 12)},
        weights.DtypeMismatch: {**good, "q.weight": good["q.weight"].to(torch.int8)},
    }
    with FakeSGLang(Fused()) as fake, publisher(fake) as p:
        p.update(good, version=1)
        fake.calls.clear()
        for kind, sent in cases.items():
            with pytest.raises(kind):
                p.update(sent, version=2)
        assert fake.calls == []
        assert same(fake, good)


def test_pipeline_stages_are_refused():
    with FakeSGLang(Fused(), Fused(), pp_size=2) as fake, publisher(fake) as p:
        with pytest.raises(weights.Unsupported, match="--pp-size 2"):
            p.update(Fused.checkpoint(0), version=1)
        assert fake.calls == []


def test_an_engine_that_cannot_join_goes_on_with_its_old_weights():
    with (
        FakeSGLang(Fused()) as first,
        FakeSGLang(Fused()) as second,
        publisher(first, second, timeout=4) as p,
    ):
        second.fail["/init_weights_update_group"] = 400
        before = second.version
        report = p.update(Fused.checkpoint(1), version=1)
        assert [type(e.error) for e in report.engines] == [type(None), weights.ApplyFailed]
        assert not report.engines[1].error.dirty
        assert same(first, Fused.checkpoint(1))
        assert state(first) == ("1", False, False)
        assert state(second) == (before, False, False)
        second.fail.clear()
        assert p.ensure(1).engines[0].error is None
        assert same(second, Fused.checkpoint(1))
        p.update(Fused.checkpoint(2), version=2)
        assert same(first, Fused.checkpoint(2))
        assert same(second, Fused.checkpoint(2))


def test_a_load_weights_that_raises_leaves_one_engine_paused():
    bad = Raising()
    with (
        FakeSGLang(Fused()) as first,
        FakeSGLang(bad) as second,
        publisher(first, second, timeout=8, bucket_bytes=1 << 20) as p,
    ):
        report = p.update(Fused.checkpoint(1), version=1)
        error = report.engines[1].error
        assert isinstance(error, weights.ApplyFailed)
        assert error.dirty
        assert same(first, Fused.checkpoint(1))
        assert state(first) == ("1", False, False)
        assert state(second) == ("pyrlk-updating:1", True, True)
        bad.armed = False
        p.update(Fused.checkpoint(2), version=2)
        assert same(first, Fused.checkpoint(2))
        assert same(second, Fused.checkpoint(2))
        assert state(second) == ("2", False, False)


def test_all_or_none_stops_everybody():
    with FakeSGLang(Fused()) as first, FakeSGLang(Raising()) as second:
        options = {"timeout": 4, "bucket_bytes": 1 << 20, "on_failure": "all"}
        with publisher(first, second, **options) as p, pytest.raises(weights.ApplyFailed):
            p.update(Fused.checkpoint(1), version=1)
        assert first.version == second.version == "pyrlk-updating:1"
        with publisher(first) as p:
            p.update(Fused.checkpoint(2), version=2)
        assert same(first, Fused.checkpoint(2))
        assert state(first) == ("2", False, False)


def test_an_engine_that_hangs_is_bounded_by_the_deadline():
    go = threading.Event()
    with (
        FakeSGLang(Fused()) as first,
        FakeSGLang(Fused()) as second,
        publisher(first, second, timeout=3) as p,
    ):
        p.update(Fused.checkpoint(1), version=1)
        second.before_broadcast = lambda rank: go.wait(20)
        start = time.monotonic()
        report = p.update(Fused.checkpoint(2), version=2)
        assert time.monotonic() - start < 12
        assert [type(e.error) for e in report.engines] == [type(None), weights.Timeout]
        assert report.engines[1].error.dirty
        assert same(first, Fused.checkpoint(2))
        assert state(first) == ("2", False, False)
        go.set()
