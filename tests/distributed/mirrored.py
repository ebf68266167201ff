"""What each of two gloo ranks checks of staging on several GPUs; test_mirrored.py starts the ranks.

Rank r has GPU r of the fake driver. Doubles of SGLang with workers on both run in a third process:
a driver refuses to open a handle where it was made.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from child import build_fake_cuda, use_fake_cuda
from engines import Fused
from fake_sglang import FakeSGLang
from harness import check, main
from scattered import Scattered, everywhere, raised

from pyrlk import weights
from pyrlk.weights import sglang_loader

META = {n: t.to("meta") for n, t in Fused.checkpoint(0).items()}
FORK = multiprocessing.get_context("fork")
BUFFERS = 2


def gpu(number: int) -> bytes:
    return bytes([0xA0 + number] * 16)


class Failing(Fused):
    gpu = 0
    fails = False

    def load_weights(self, tensors):
        super().load_weights(tensors)
        if self.fails:
            raise RuntimeError("no more")


def serve(pipe) -> None:
    """Three engines: one of TP=2, a rank on each GPU, then one on each."""
    use_fake_cuda()
    torch.set_num_threads(1)
    engines = [[Failing(0, 2), Failing(1, 2)], [Failing()], [Failing()]]
    engines[0][1].gpu = engines[2][0].gpu = 1
    sglang_loader.Models.gpu = lambda models: gpu(models._engines[0]._module().gpu)
    with contextlib.ExitStack() as stack:
        fakes = [stack.enter_context(FakeSGLang(*workers)) for workers in engines]
        pipe.send([fake.url for fake in fakes])
        while True:
            number, fails = pipe.recv()
            for worker in engines[number]:
                worker.fails = fails
            pipe.send(_state(fakes[number], engines[number]))


def _state(fake: FakeSGLang, workers: list) -> dict:
    sessions = [
        loader._session for loader in map(sglang_loader._LOADERS.get, workers) if loader is not None
    ]
    with open("/proc/self/maps") as maps:
        owners = sorted({int(p) for p in re.findall(r"pyrlk-fake-(\d+)-", maps.read())})
    return {
        "weights": [worker.state_dict() for worker in workers],
        "version": (fake.version, fake.paused),
        "gpus": [[s.handle.uuid for s in session.segments] for session in sessions if session],
        "owners": owners,
    }


PIPE, ENGINE_PIPE = FORK.Pipe()


def engine(number: int = 0, fails: bool = False) -> dict:
    """What an engine is in now, and whether it fails from now on; every rank asks."""
    state = [None]
    if dist.get_rank() == 0:
        PIPE.send((number, fails))
        assert PIPE.poll(20), "the engine hangs"
        state = [PIPE.recv()]
    dist.broadcast_object_list(state, 0)
    return state[0]


def serves(state: dict, sent: dict, version: int) -> bool:
    ranks = len(state["weights"])
    wanted = [Fused(rank, ranks).wanted(sent) for rank in range(ranks)]
    return state["version"] == (str(version), False) and all(
        torch.equal(tensor, want[name])
        for worker, want in zip(state["weights"], wanted, strict=True)
        for name, tensor in worker.items()
    )


def allocated() -> int:
    """Segments of this rank's GPU."""
    return len(glob.glob(f"/dev/shm/pyrlk-fake-{os.getpid()}-*"))


def trainers() -> list[int]:
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, os.getpid())
    return sorted(every)


def scattered(seed: int) -> tuple[Scattered, dict]:
    sent = Fused.checkpoint(seed)
    source = Scattered(sent)
    source.device = torch.device("cuda", dist.get_rank())
    return source, sent


def publisher(*numbers: int, bucket_bytes: int = 1 << 10) -> weights.Publisher:
    urls = json.loads(os.environ["ENGINES"])
    targets = [weights.SGLang(urls[i], mode="plan", expect=META) for i in numbers or (0,)]
    return weights.Publisher(
        targets if numbers else targets[0],
        group=dist.group.WORLD,
        buffers=BUFFERS,
        bucket_bytes=bucket_bytes,
        timeout=10,
    )


@check
def each_engine_rank_reads_on_its_own_gpu():
    with publisher() as p:
        for version in (1, 2, 3):
            source, sent = scattered(version)
            report = p.update(source, version=version)
            assert source.collectives == report.buckets > BUFFERS
            state = engine()
            assert serves(state, sent, version)
            assert state["gpus"] == [[gpu(0)] * BUFFERS, [gpu(1)] * BUFFERS]
            assert state["owners"] == trainers()
            assert allocated() == BUFFERS
        assert everywhere(report.planned) == report.tensors
        p.release_staging()
        state = engine()
        assert (state["version"], state["owners"], allocated()) == (("3", False), [], 0)
        p.release_staging()
        source, sent = scattered(4)
        p.update(source, version=4)
        assert serves(engine(), sent, 4)
        assert allocated() == BUFFERS


@check
def tensors_of_rank_0_are_read_where_they_are():
    with publisher() as p:
        sent = Fused.checkpoint(5)
        source, _ = scattered(4)
        p.update(source, version=5)
        # Not gathered: only rank 0 has them.
        use_placement()
        p.update(sent, version=6)
        state = engine()
        assert serves(state, sent, 6)
        assert state["gpus"] == [[gpu(0)] * BUFFERS] * 2
        source, sent = scattered(7)
        p.update(source, version=7)
        state = engine()
        assert serves(state, sent, 7)
        assert state["gpus"][1] == [gpu(1)] * BUFFERS
        assert allocated() == BUFFERS


@check
def another_publisher_frees_what_the_one_before_has_left():
    for version in (8, 9, 10):
        with publisher(bucket_bytes=256 * version) as p:
            source, sent = scattered(version)
            p.update(source, version=version)
            assert serves(engine(), sent, version)
            assert allocated() == BUFFERS


@check
def a_gpu_without_memory_is_named_by_all():
    with publisher() as p:
        for rank in range(2):
            good, sent = scattered(0)
            version = 20 + 2 * rank
            p.update(good, version=version)
            p.release_staging()
            if dist.get_rank() == rank:
                os.environ["FAKE_CUDA_FAIL"] = f"alloc {version}"
            other, _ = scattered(1)
            update = functools.partial(p.update, other, version=version + 1)
            said = "rank 1: CUDA" if rank else "CUDA staging memory"
            *_, dirty = raised(weights.StagingError, said, update)
            assert not dirty
            assert serves(engine(), sent, version)
        p.update(good, version=30)
        assert serves(engine(), sent, 30)
        assert allocated() == BUFFERS


@check
def a_mirror_with_other_bytes_is_found():
    with publisher() as p:
        bad, _ = scattered(3)
        if dist.get_rank() == 1:
            bad.after = lambda flat: flat[:1].bitwise_xor_(1)
        *_, dirty = raised(
            weights.ChecksumMismatch, "rank 1: .* arrived", lambda: p.update(bad, version=41)
        )
        # The other rank of the engine may have copied its own.
        assert dirty
        assert engine()["version"] == ("pyrlk-updating:41", True)
        good, sent = scattered(2)
        p.update(good, version=42)
        assert serves(engine(), sent, 42)


@check
def one_gather_serves_engines_on_several_gpus():
    kept = allocated()  # of the first engine, which may still have it open
    with publisher(1, 2) as p:
        for version in range(1, 7):
            engine(2, fails=version == 2)
            source, sent = scattered(version)
            report = p.update(source, version=version)
            assert source.collectives == report.buckets
            assert [entry.error is None for entry in report.engines] == [True, version != 2]
            assert serves(engine(1), sent, version)
            if version != 2:
                assert serves(engine(2), sent, version)
                assert [engine(i)["gpus"] for i in (1, 2)] == [[[gpu(i)] * BUFFERS] for i in (0, 1)]
                # A session that breaks leaves nothing: its engine has come anew.
                assert allocated() == kept + BUFFERS
        p.release_staging()
        assert allocated() == kept


def use_placement() -> None:
    """Tensors of the CPU stand for those of this rank's GPU."""
    from pyrlk.weights import memory

    memory.placement = lambda tensors: torch.device("cuda", dist.get_rank())


if __name__ == "__main__":
    use_fake_cuda()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        os.environ["PYRLK_LIBCUDA"] = build_fake_cuda(Path(folder))
        process = FORK.Process(target=serve, args=(ENGINE_PIPE,), daemon=True)
        process.start()
        assert PIPE.poll(20), "the engines do not start"
        os.environ["ENGINES"] = json.dumps(PIPE.recv())
        try:
            main()
        finally:
            process.kill()
            process.join()
            for left in glob.glob("/dev/shm/pyrlk-fake-*"):
                if not Path("/proc", left.split("-")[2]).exists():
                    os.unlink(left)
