"""An SGLang target against a double of the server: order of the steps, refusals, both modes."""

import gc
import json
import os
import struct
import weakref

import pytest
import torch
from engines import Derived, Forgetful, Fused, Named, Raising, Rebinding, Scaled, Tied
from fake_sglang import NO_SESSIONS, FakeSGLang

from pyrlk import weights
from pyrlk.weights.sglang_server import LOADER, Lock

META = {n: t.to("meta") for n, t in Fused.checkpoint(0).items()}


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def target(fake, mode="auto", **options):
    return weights.SGLang(fake.url, mode=mode, expect=options.pop("expect", META), **options)


def publisher(fake, mode="auto", *, verify="copy", bucket_bytes=1 << 20, **options):
    engine = target(fake, mode, **options)
    return weights.Publisher(engine, timeout=10, verify=verify, bucket_bytes=bucket_bytes)


def same(model, sent):
    return all(torch.equal(t, model.wanted(sent)[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("mode", ["bucket", "plan"])
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1 << 10])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_ends_with_what_load_weights_makes(mode, bucket_bytes, ranks):
    workers = [Fused(rank, ranks) for rank in range(ranks)]
    with (
        FakeSGLang(*workers) as fake,
        publisher(fake, mode, bucket_bytes=bucket_bytes) as p,
    ):
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert all(same(worker, sent) for worker in workers)
            assert (fake.version, fake.paused, fake.open) == (str(version), False, False)
            assert (report.mode, report.tensors, report.names_from) == (mode, 9, "expect")
            if mode == "plan" and version > 1:
                assert report.planned == report.tensors, report.fallback
                assert not report.fallback


def test_the_order_is_durable():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket") as p:
        fake.flushes_refused = 2
        p.update(Fused.checkpoint(0), version=7)
        assert fake.calls == [
            "pause_generation",
            "flush_cache",
            "flush_cache",
            "flush_cache",
            "update_weight_version pyrlk-updating:7",
            "begin_weight_update",
            "update_weights_from_tensor",
            "end_weight_update",
            "update_weight_version 7",
            "continue_generation",
        ]
        fake.calls.clear()
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket", pause="in_place") as p:
        p.update(Fused.checkpoint(0), version=7)
        assert "flush_cache" not in fake.calls


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_casting_is_planned_too(mode):
    worker = Fused(dtype=torch.bfloat16)
    with FakeSGLang(worker, dtype="bfloat16") as fake, publisher(fake, mode) as p:
        for version in range(1, 4):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert same(worker, sent)
        assert report.planned == (9 if mode == "plan" else 0)


def broken(case):
    sent = Fused.checkpoint(1)
    if case == "unknown":
        sent["extra.weight"] = torch.zeros(3)
    elif case == "missing":
        del sent["q.weight"]
    elif case == "shape":
        sent["q.weight"] = torch.zeros(9, 12)
    elif case == "dtype":
        sent["q.weight"] = sent["q.weight"].to(torch.int8)
    elif case == "twice":
        return [*sent.items(), ("q.weight", sent["q.weight"])]
    return sent


CASES = {
    "unknown": weights.UnknownName,
    "missing": weights.MissingName,
    "shape": weights.ShapeMismatch,
    "dtype": weights.DtypeMismatch,
    "twice": ValueError,
}


@pytest.mark.parametrize("mode", ["bucket", "plan"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_found_before_the_engine_is_touched(mode, case):
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, mode) as p:
        p.update(Fused.checkpoint(0), version=1)
        fake.calls.clear()
        with pytest.raises(CASES[case]):
            p.update(broken(case), version=2)
        assert fake.calls == []
        assert same(worker, Fused.checkpoint(0))
        p.update(Fused.checkpoint(2), version=2)
        assert same(worker, Fused.checkpoint(2))


def test_plan_mode_learns_the_names_from_the_engine():
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, "plan", expect=None) as p:
        report = p.update(Fused.checkpoint(0), version=1)
        assert report.names_from == "engine"
        with pytest.raises(weights.UnknownName, match=r"extra\.weight"):
            p.update(broken("unknown"), version=2)
        with pytest.raises(weights.MissingName, match="qk"):
            p.update(broken("missing"), version=2)
        with pytest.raises(weights.ApplyFailed, match=r"AssertionError at 'q\.weight'"):
            p.update(broken("shape"), version=2)
        assert same(worker, Fused.checkpoint(0))
        assert (fake.version, fake.paused, fake.open) == ("1", False, False)
        p.update(Fused.checkpoint(2), version=2)
        assert same(worker, Fused.checkpoint(2))


def test_bucket_mode_does_not_guess_names(tmp_path):
    with FakeSGLang(Fused()) as fake:
        with (
            publisher(fake, "bucket", expect=None) as p,
            pytest.raises(weights.ManifestUnknown, match="expect"),
        ):
            p.update(Fused.checkpoint(0), version=1)
        assert fake.calls == []
        with publisher(fake, "bucket", expect=None, unchecked_names=True) as p:
            assert p.update(Fused.checkpoint(0), version=1).names_from == "unchecked"
    header = {
        n: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [0, 0]} for n, t in META.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with (
        FakeSGLang(Fused(), model_path=str(tmp_path)) as fake,
        publisher(fake, "bucket", expect=None) as p,
    ):
        assert p.update(Fused.checkpoint(0), version=1).names_from == "checkpoint"
        with pytest.raises(weights.ShapeMismatch):
            p.update(broken("shape"), version=2)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_load_leaves_all_ranks_as_they_were(failing):
    workers = [Raising(rank, 2) for rank in range(2)]
    for worker in workers:
        worker.armed = False
    with FakeSGLang(*workers) as fake, publisher(fake, "plan") as p:
        p.update(Fused.checkpoint(0), version=1)
        for version in range(2, 6):
            workers[failing].armed = True
            sent = Fused.checkpoint(version)
            sent.pop("norm.weight")  # another manifest: it is recorded anew
            with pytest.raises(weights.ApplyFailed, match=rf"rank {failing}.*no more") as caught:
                p.update(sent, version=version, partial=True)
            assert not caught.value.dirty
            workers[failing].armed = False
            assert (fake.version, fake.paused, fake.open) == ("1", False, False)
            assert all(same(worker, Fused.checkpoint(0)) for worker in workers)
        p.update(Fused.checkpoint(9), version=9)
        assert all(same(worker, Fused.checkpoint(9)) for worker in workers)


STEPS = [
    "/pause_generation",
    "/update_weight_version",
    "/begin_weight_update",
    "/update_weights_from_tensor",
    "/end_weight_update",
    "/continue_generation",
]


@pytest.mark.parametrize("mode", ["bucket", "plan"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_taken_back_or_marked(mode, step):
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, mode) as p:
        p.update(Fused.checkpoint(0), version=1)
        fake.fail[step] = 400
        with pytest.raises(weights.ApplyFailed) as caught:
            p.update(Fused.checkpoint(1), version=2)
        del fake.fail[step]
        if not caught.value.dirty:
            assert same(worker, Fused.checkpoint(0))
            assert (fake.version, fake.open) == ("1", False)
        else:
            assert fake.paused
        # Whatever is left behind, a full update mends it.
        p.update(Fused.checkpoint(2), version=3)
        assert same(worker, Fused.checkpoint(2))
        assert (fake.version, fake.paused, fake.open) == ("3", False, False)


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_a_dead_publishers_update_is_taken_up_by_the_next(mode):
    worker = Fused()
    with FakeSGLang(worker) as fake:
        fake.version, fake.paused, fake.open = "pyrlk-updating:5", True, True
        with publisher(fake, mode) as p:
            with pytest.raises(weights.EngineDirty):
                p.update({"norm.weight": torch.ones(12)}, version=6, partial=True)
            assert fake.paused
            p.update(Fused.checkpoint(0), version=5)
        assert same(worker, Fused.checkpoint(0))
        assert (fake.version, fake.paused, fake.open) == ("5", False, False)


def test_another_ones_session_is_left_alone():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket") as p:
        fake.open = True
        with pytest.raises(weights.Busy, match="somebody else"):
            p.update(Fused.checkpoint(0), version=1)
        assert fake.open
        assert (fake.version, fake.paused) == ("default", False)


def mapped():
    """Segments that this process maps: the publisher's and those of the workers."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:pyrlk" in line for line in maps)


@pytest.mark.parametrize("ranks", [1, 2])
def test_staging_is_given_back_between_updates(ranks):
    workers = [Fused(rank, ranks) for rank in range(ranks)]
    gc.collect()  # workers of other tests
    before = mapped()
    with FakeSGLang(*workers) as fake, publisher(fake, "plan", bucket_bytes=1 << 10) as p:
        p.release_staging()  # nothing yet
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert all(same(worker, sent) for worker in workers)
            assert mapped() == before + 2 * (1 + ranks)
            fake.calls.clear()
            p.release_staging()
            assert mapped() == before
            assert fake.calls == [
                "pause_generation",
                f"update_weight_version pyrlk-updating:{version}",
                "begin_weight_update",
                "update_weights_from_tensor",
                "end_weight_update",
                f"update_weight_version {version}",
                "continue_generation",
            ]
            p.release_staging()
            assert len(fake.calls) == 7
        assert report.planned == report.tensors


def test_staging_that_cannot_be_given_back_changes_nothing():
    worker = Fused()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        p.update(Fused.checkpoint(1), version=1)
        fake.fail["/update_weights_from_tensor"] = 500
        with pytest.raises(weights.ApplyFailed, match="made to fail") as caught:
            p.release_staging()
        assert not caught.value.dirty
        assert (fake.version, fake.paused, fake.open) == ("1", False, False)
        fake.fail.clear()
        p.update(Fused.checkpoint(2), version=2)
        assert same(worker, Fused.checkpoint(2))


def test_one_publisher_an_engine():
    with FakeSGLang(Fused()) as fake, publisher(fake) as p:
        p.update(Fused.checkpoint(0), version=1)
        with publisher(fake) as other, pytest.raises(weights.Busy, match="another publisher"):
            other.update(Fused.checkpoint(1), version=2)
        p.close()
        with publisher(fake) as other:
            other.update(Fused.checkpoint(1), version=2)


def test_a_forked_child_does_not_keep_the_lock():
    with FakeSGLang(Fused()) as fake:
        lock = Lock(fake.url)
        ready, done = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b".")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        lock.close()
        Lock(fake.url).close()
        os.write(done[1], b".")
        os.waitpid(child, 0)


def test_versions_rise():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket") as p:
        p.update(Fused.checkpoint(0), version=5)
        with pytest.raises(weights.StaleVersion):
            p.update(Fused.checkpoint(0), version=5)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"dp_size": 2}, "--dp-size"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"enable_eplb": True}, "--enable-eplb"),
    ],
)
def test_engines_that_would_break_are_refused(info, said):
    with (
        FakeSGLang(Fused(), **info) as fake,
        publisher(fake) as p,
        pytest.raises(weights.Unsupported, match=said),
    ):
        p.update(Fused.checkpoint(0), version=1)


def test_modes_follow_the_server():
    with FakeSGLang(Fused(), custom_weight_loader=[]) as fake:
        with publisher(fake, "auto") as p:
            assert p.update(Fused.checkpoint(0), version=1).mode == "bucket"
        with publisher(fake, "plan") as p, pytest.raises(weights.Unsupported, match=LOADER):
            p.update(Fused.checkpoint(0), version=2)
    with FakeSGLang(Fused()) as fake, publisher(fake, "auto") as p:
        assert p.update(Fused.checkpoint(0), version=1).mode == "plan"


def test_the_api_key_is_sent():
    with FakeSGLang(Fused(), api_key="secret") as fake:
        with publisher(fake) as p, pytest.raises(weights.Unsupported, match="api_key"):
            p.update(Fused.checkpoint(0), version=1)
        with publisher(fake, api_key="secret") as p:
            p.update(Fused.checkpoint(0), version=1)


OLDER = {
    "slime's": NO_SESSIONS,
    "without post-processing": NO_SESSIONS | {"post_process_weights"},
    "oldest": NO_SESSIONS | {"post_process_weights", "update_weight_version"},
}


@pytest.mark.parametrize("dialect", OLDER)
def test_the_older_dialect(dialect):
    """No session, no selector; what the server lacks is left out, the rest keeps its order."""
    worker = Fused()
    with FakeSGLang(worker, lacks=OLDER[dialect]) as fake:
        with publisher(fake, "auto", bucket_bytes=1 << 10) as p:
            report = p.update(Fused.checkpoint(0), version=3)
        assert report.mode == "bucket"  # although the server names our loader
        assert same(worker, Fused.checkpoint(0))
        assert (fake.version, fake.paused) == ("3", False)
        updates = ["update_weights_from_tensor"] * report.buckets
        calls = [
            "pause_generation",
            "flush_cache",
            "update_weight_version pyrlk-updating:3",
            "post_process_weights restore",
            *updates,
            "post_process_weights process",
            "update_weight_version 3",
            "continue_generation",
        ]
        assert fake.calls == [c for c in calls if c.split()[0] not in OLDER[dialect]]
        with publisher(fake, "plan") as p, pytest.raises(weights.Unsupported, match="bucket"):
            p.update(Fused.checkpoint(1), version=4)


def test_the_oldest_dialect_shows_a_version_with_the_last_bucket():
    worker = Fused()
    with FakeSGLang(worker, lacks=OLDER["oldest"]) as fake, publisher(fake, "bucket") as p:
        p.update(Fused.checkpoint(0), version=3)
        update = fake.update_weights_from_tensor
        seen = []

        def watched(body):
            answer = update(body)
            seen.append(fake.version)
            return answer

        fake.update_weights_from_tensor = watched
        p.close()
        with publisher(fake, "bucket", bucket_bytes=1 << 10) as small:
            small.update(Fused.checkpoint(1), version=4)
        assert seen == ["3"] * (len(seen) - 1) + ["4"]
        assert len(seen) > 1


def test_a_restarted_server_is_planned_anew():
    first, second = Fused(), Fused()
    with FakeSGLang(first) as fake, publisher(fake, "plan") as p:
        p.update(Fused.checkpoint(0), version=1)
        p.update(Fused.checkpoint(1), version=2)
        fake.workers = (second,)
        fake.info["startup_time"] = {"load_weight": 0.5}
        fake.version = "default"
        with pytest.raises(weights.EngineDirty, match="restarted"):
            p.update({"norm.weight": torch.ones(12)}, version=3, partial=True)
        report = p.update(Fused.checkpoint(2), version=3)
        assert same(second, Fused.checkpoint(2))
        assert report.planned == 0


def test_nobody_there():
    engine = weights.SGLang("http://127.0.0.1:9")
    with weights.Publisher(engine, timeout=0.3) as p, pytest.raises(weights.PeerLost):
        p.update(Fused.checkpoint(0), version=1)


def test_what_cannot_be_planned_says_why():
    worker = Scaled()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            doubled = {**sent, "norm.weight": sent["norm.weight"] * 2}
            assert same(worker, doubled)
        assert report.planned == 8
        assert list(report.fallback) == ["norm.weight"]
        assert "computes with it" in report.fallback["norm.weight"]


def test_a_replay_that_differs_is_never_trusted():
    worker = Forgetful()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 5):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
        assert report.planned == 0
        assert torch.equal(worker.norm, sent["norm.weight"] + 1)


def test_derived_tensors_are_made_again():
    worker = Derived()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 5):
            report = p.update(Fused.checkpoint(version), version=version)
            assert torch.equal(worker.w_kc, worker.qk * 3)
        assert report.planned == report.tensors
        before = worker.calls
        p.update(Fused.checkpoint(9), version=9)
        assert worker.calls == before  # load_weights is not needed any more
        assert torch.equal(worker.w_kc, worker.qk * 3)


def test_a_loader_that_rebinds_is_not_planned():
    worker = Rebinding()
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 4):
            sent = Fused.checkpoint(version)
            report = p.update(sent, version=version)
            assert same(worker, sent)
        assert report.planned == 0
        assert "rebinds" in report.fallback["norm.weight"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_byte_that_changes_on_the_way_is_seen(ranks, monkeypatch):
    workers = [Fused(rank, ranks) for rank in range(ranks)]
    with FakeSGLang(*workers) as fake, publisher(fake, "plan") as p:
        for version in range(1, 4):
            p.update(Fused.checkpoint(version), version=version)
        pack = weights.memory.Segment.pack

        def torn(self, sources, **options):
            sums = pack(self, sources, **options)
            self.flat[100] += 1
            return sums

        monkeypatch.setattr(weights.memory.Host, "pack", torn)
        with pytest.raises(weights.ChecksumMismatch):
            p.update(Fused.checkpoint(5), version=5)
        assert fake.paused
        assert fake.version == "pyrlk-updating:5"
        monkeypatch.setattr(weights.memory.Host, "pack", pack)
        p.update(Fused.checkpoint(6), version=6)
        assert all(same(worker, Fused.checkpoint(6)) for worker in workers)


def test_a_model_that_is_gone_leaves_nothing_behind():
    worker = Fused()
    gone = weakref.ref(worker)
    with FakeSGLang(worker) as fake, publisher(fake, "plan") as p:
        for version in range(1, 4):
            p.update(Fused.checkpoint(version), version=version)
        fake.workers = ()
    del worker
    gc.collect()
    assert gone() is None


def speculating(**options):
    """A server with a target and a draft that shares its embedding, on each of two ranks."""
    targets = [Named(embed=(6, 4), layer=(4, 4)) for _ in range(2)]
    drafts = [Tied(embed=target.embed, mtp=(3, 4)) for target in targets]
    workers = map(list, zip(targets, drafts, strict=True))
    return FakeSGLang(*workers, speculative_algorithm="EAGLE", **options), targets, drafts


def numbers(seed, **shapes):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}


def holds(models, sent):
    return all(torch.equal(t, sent[n]) for m in models for n, t in m.state_dict().items())


# One bucket, and more than the ring holds.
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1])
def test_target_and_draft_take_one_update(bucket_bytes):
    server, targets, drafts = speculating()
    with server as fake, publisher(fake, "plan", expect=None, bucket_bytes=bucket_bytes) as p:
        calls = []
        for version in range(1, 5):
            sent = numbers(version, embed=(6, 4), layer=(4, 4), mtp=(3, 4))
            report = p.update(sent, version=version)
            calls.append(tuple(model.calls for model in (*targets, *drafts)))
            assert holds([*targets, *drafts], sent)
            assert report.planned == (3 if version > 1 else 0), report.fallback
            assert (fake.version, fake.paused) == (str(version), False)
        # Models are counted once; from the third update on load_weights is not called.
        assert fake.calls.count("update_weights_from_tensor") == 5
        assert len(set(calls[1:])) == 1


def test_a_name_is_unknown_only_if_no_model_takes_it():
    server, targets, drafts = speculating()
    first = numbers(1, embed=(6, 4), layer=(4, 4), mtp=(3, 4))
    with server as fake, publisher(fake, "plan", expect=None) as p:
        p.update(first, version=1)
        with pytest.raises(weights.UnknownName, match="stranger"):
            p.update({**first, "stranger": torch.ones(3)}, version=2)
        # The embedding is tied: sent to the target, it is not missing from the draft.
        with pytest.raises(weights.MissingName, match="mtp"):
            p.update({n: first[n] for n in ("embed", "layer")}, version=2)
        assert holds([*targets, *drafts], first)
        assert (fake.version, fake.paused, fake.open) == ("1", False, False)
        p.update(numbers(2, embed=(6, 4), layer=(4, 4), mtp=(3, 4)), version=2)


def test_a_selector_means_some_models():
    server, targets, drafts = speculating()
    with server as fake, publisher(fake, "plan", expect=None) as p:
        sent = numbers(1, embed=(6, 4), layer=(4, 4), mtp=(3, 4))
        p.update(sent, version=1)
        sent |= numbers(2, mtp=(3, 4))
        p.update({"mtp": sent["mtp"]}, version=2, selector="draft", partial=True)
        assert holds([*targets, *drafts], sent)
        sent |= numbers(3, embed=(6, 4), layer=(4, 4))
        p.update({n: sent[n] for n in ("embed", "layer")}, version=3, selector="target")
        assert holds([*targets, *drafts], sent)
        with pytest.raises(weights.UnknownName, match="mtp"):
            p.update({**sent, "mtp": sent["mtp"]}, version=4, selector="target")


def test_one_of_two_models_fails_and_neither_changes():
    class Broken(Tied):
        armed = False

        def load_weights(self, weights):
            if self.armed:
                raise KeyError("no such layer")
            super().load_weights(weights)

    target = Named(embed=(6, 4))
    draft = Broken(embed=target.embed, mtp=(3, 4))
    with (
        FakeSGLang([target, draft], speculative_algorithm="EAGLE") as fake,
        publisher(fake, "plan", expect=None) as p,
    ):
        first = numbers(1, embed=(6, 4), mtp=(3, 4))
        p.update(first, version=1)
        draft.armed = True
        with pytest.raises(weights.ApplyFailed, match="no such layer") as caught:
            p.update({"mtp": torch.ones(3, 4)}, version=2, partial=True)
        assert not caught.value.dirty
        assert holds([target, draft], first)
        draft.armed = False
        second = numbers(2, embed=(6, 4), mtp=(3, 4))
        p.update(second, version=2)
        assert holds([target, draft], second)


def test_ranks_with_different_numbers_of_models_are_refused():
    target = Named(embed=(6, 4))
    workers = [[target, Tied(embed=target.embed, mtp=(3, 4))], [Named(embed=(6, 4))]]
    with (
        FakeSGLang(*workers, speculative_algorithm="EAGLE") as fake,
        publisher(fake, "plan", expect=None) as p,
        pytest.raises(weights.Unsupported, match="different numbers of models"),
    ):
        p.update(numbers(1, embed=(6, 4), mtp=(3, 4)), version=1)
    assert (fake.version, fake.paused, fake.open) == ("default", False, False)


def test_a_draft_that_is_gone_leaves_nothing_behind():
    server, targets, drafts = speculating()
    gone = [weakref.ref(model) for model in (*targets, *drafts)]
    with server as fake, publisher(fake, "plan", expect=None) as p:
        for version in range(1, 4):
            sent = numbers(version, embed=(6, 4), layer=(4, 4), mtp=(3, 4))
            p.update(sent, version=version)
        fake.workers = ()
    del targets, drafts
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


# A name belongs to one stage; stages share the payload of their tensor-parallel rank.
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1])
def test_every_pipeline_stage_takes_its_own(bucket_bytes):
    first = [Named(embed=(6, 4), layer_0=(4, 4)) for _ in range(2)]
    last = [Named(layer_1=(4, 4), head=(6, 4)) for _ in range(2)]
    shapes = {"embed": (6, 4), "layer_0": (4, 4), "layer_1": (4, 4), "head": (6, 4)}
    with (
        FakeSGLang(*first, *last, pp_size=2) as fake,
        publisher(fake, "plan", expect=None, bucket_bytes=bucket_bytes) as p,
    ):
        calls = []
        for version in range(1, 5):
            sent = numbers(version, **shapes)
            report = p.update(sent, version=version)
            calls.append(tuple(model.calls for model in (*first, *last)))
            assert holds([*first, *last], sent)
            assert report.planned == (4 if version > 1 else 0), report.fallback
        # What a stage does not read is no work for its load_weights.
        assert len(set(calls[1:])) == 1
        with pytest.raises(weights.UnknownName, match="layer_2"):
            p.update({**sent, "layer_2": torch.ones(4, 4)}, version=5)
        with pytest.raises(weights.MissingName, match="layer_1"):
            p.update({n: t for n, t in sent.items() if n != "layer_1"}, version=5)
        assert holds([*first, *last], sent)
        p.update(numbers(9, **shapes), version=5)


def test_the_names_of_a_draft_are_read_from_its_own_files(tmp_path):
    def checkpoint(name, **shapes):
        header = {
            n: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()
        }
        text = json.dumps(header).encode()
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        return str(folder)

    paths = {
        "model_path": checkpoint("target", embed=[6, 4], layer=[4, 4]),
        "speculative_draft_model_path": checkpoint("draft", mtp=[3, 4]),
    }
    server, targets, drafts = speculating(**paths)
    with server as fake, publisher(fake, "bucket", expect=None) as p:
        sent = numbers(1, embed=(6, 4), layer=(4, 4), mtp=(3, 4))
        assert p.update(sent, version=1).names_from == "checkpoint"
        assert holds([*targets, *drafts], sent)
        with pytest.raises(weights.MissingName, match="mtp"):
            p.update({n: sent[n] for n in ("embed", "layer")}, version=2)
        p.update({n: sent[n] for n in ("embed", "layer")}, version=2, selector="target")
        with pytest.raises(weights.UnknownName, match="embed"):
            p.update(sent, version=3, selector="draft")
    clash = paths | {"speculative_draft_model_path": checkpoint("other", mtp=[3, 4], embed=[2, 4])}
    server, *_ = speculating(**clash)
    with (
        server as fake,
        publisher(fake, "bucket", expect=None) as p,
        pytest.raises(weights.Unsupported, match="'embed' has shape"),
    ):
        p.update(sent, version=1)


class Leaky(Fused):
    """Now and then an engine keeps an old weight: its loader says that all is well."""

    leaks = False

    def load_weights(self, weights):
        kept = self.norm.data.clone()
        super().load_weights(weights)
        if self.leaks:
            self.norm.data.copy_(kept)


@pytest.mark.parametrize("mode", ["bucket", "plan"])
def test_an_engine_that_holds_other_weights_than_its_replica_is_found(mode):
    engines = [Leaky(), Leaky()]
    with FakeSGLang(engines[0]) as first, FakeSGLang(engines[1]) as second:
        targets = [target(first, mode), target(second, mode)]
        with weights.Publisher(targets, verify="engine", timeout=10) as p:
            p.update(Fused.checkpoint(1), version=1)
            report = p.update(Fused.checkpoint(2), version=2)
            assert [entry.error for entry in report.engines] == [None, None]
            calls = first.calls
            assert calls.index("weights_checker") > calls.index("end_weight_update")
            assert calls.index("weights_checker") < calls.index("update_weight_version 1")
            # Another manifest: plan mode is at its first load_weights again.
            engines[1].leaks = True
            sent = dict(reversed(Fused.checkpoint(3).items()))
            report = p.update(sent, version=3)
            good, bad = report.engines
            assert good.error is None
            assert isinstance(bad.error, weights.ChecksumMismatch)
            assert bad.error.dirty
            assert "norm" in str(bad.error)
            assert first.url in str(bad.error)
            assert (first.version, first.paused) == ("3", False)
            assert (second.version, second.paused) == ("pyrlk-updating:3", True)
            engines[1].leaks = False
            assert [e.error for e in p.ensure(3).engines] == [None]
            assert (second.version, second.paused) == ("3", False)
            assert same(engines[1], sent)


def test_the_same_weights_again_have_the_same_checksums():
    engine = Leaky()
    with FakeSGLang(engine) as fake, publisher(fake, "bucket", verify="engine") as p:
        p.update(Fused.checkpoint(1), version=1)
        p.update(Fused.checkpoint(2), version=2)
        p.update(Fused.checkpoint(1), version=3)
        p.update({"norm.weight": torch.ones(12)}, version=4, partial=True)
        p.update(Fused.checkpoint(1), version=5)
        engine.leaks = True
        with pytest.raises(weights.ChecksumMismatch, match="norm"):
            p.update({"norm.weight": torch.ones(12)}, version=6, partial=True)
        with pytest.raises(weights.EngineDirty):
            p.update({"norm.weight": torch.ones(12)}, version=7, partial=True)
        engine.leaks = False
        p.update(Fused.checkpoint(1), version=7)
        assert (fake.version, fake.paused) == ("7", False)


def test_a_partial_update_onto_unknown_weights_is_not_compared():
    with FakeSGLang(Fused()) as fake:
        for seed in (1, 2):
            with publisher(fake, "bucket") as p:  # somebody else's full update
                p.update(Fused.checkpoint(seed), version=10 * seed)
            with publisher(fake, "bucket", verify="engine") as p:
                some = {"norm.weight": torch.ones(12)}
                p.update(some, version=10 * seed + 1, partial=True)
                assert "weights_checker" not in fake.calls


def test_a_server_without_a_checker_is_refused_before_it_is_touched():
    with (
        FakeSGLang(Fused(), lacks={"weights_checker"}) as fake,
        publisher(fake, "bucket", verify="engine") as p,
    ):
        with pytest.raises(weights.Unsupported, match=r"no /weights_checker"):
            p.update(Fused.checkpoint(1), version=1)
        assert fake.calls == []


def test_a_checker_that_fails_leaves_the_engine_paused():
    with FakeSGLang(Fused()) as fake, publisher(fake, "bucket", verify="engine") as p:
        fake.fail["/weights_checker"] = 400
        with pytest.raises(weights.ApplyFailed, match="made to fail") as caught:
            p.update(Fused.checkpoint(1), version=1)
        assert caught.value.dirty
        assert (fake.version, fake.paused) == ("pyrlk-updating:1", True)
        del fake.fail["/weights_checker"]
        p.update(Fused.checkpoint(1), version=1)
        assert (fake.version, fake.paused) == ("1", False)
