"""A rank of a trainer is killed at a random moment of an update: nobody hangs, nothing is mixed."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "weights"))
from engines import Fused  # noqa: E402
from fake_sglang import FakeSGLang  # noqa: E402

RANKS, TIMEOUT = 3, 6.0
MOMENTS = 20

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(pyrlk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "killed_ranks.py")],
        env={**environment, "XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "log").open("w"), text=True,
    )  # fmt: skip
    yield process
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


def run(parent, **job):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job["port"] = probe.getsockname()[1]
    parent.stdin.write(json.dumps(job) + "\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "done\n"
    return {
        rank: json.loads(Path(f"{job['out']}.{rank}").read_text())
        for rank in range(job["ranks"])
        if rank != job["victim"]
    }


def filled_with(worker):
    """The one value of all weights, where they are of one version; padding is zero."""
    values = {v for t in worker.state_dict().values() for v in t.unique().tolist()} - {0.0}
    return values.pop() if len(values) == 1 else None


def test_every_other_rank_stops_and_the_engine_has_one_version(parent, tmp_path):
    moments = random.Random(0)
    kinds = set()
    for moment in range(MOMENTS):
        mode = ("plan", "bucket")[moment % 2]
        victim = 0 if moment % 5 == 4 else moments.choice(range(1, RANKS))
        worker = Fused()
        with FakeSGLang(worker) as fake:
            met = run(
                parent, url=fake.url, mode=mode, ranks=RANKS, victim=victim, timeout=TIMEOUT,
                delay=moments.uniform(0.0, 0.3), out=str(tmp_path / f"met-{moment}"),
                bucket_bytes=moments.choice((1 << 10, 1 << 20)),
            )  # fmt: skip
            told = f"moment {moment}, {mode}, rank {victim} was killed: {met}"
            for one in met.values():
                assert one["kind"] in ("PeerLost", "Timeout", "UpdateError"), told
                assert one["seconds"] < 2 * TIMEOUT, told
            kinds |= {one["kind"] for one in met.values()}
            assert len({one["kind"] for one in met.values()}) == 1, told
            dirty = fake.version.startswith("pyrlk-updating:")
            if victim:
                # Rank 0 has taken back what no byte was copied of, and said so.
                assert len({one["dirty"] for one in met.values()}) == 1, told
                assert dirty == met[0]["dirty"] == fake.paused, told
            if not dirty:
                # One that lost its publisher itself may be paused; its weights are still whole.
                assert victim == 0 or not fake.paused, told
                assert filled_with(worker) == int(fake.version), told
    assert kinds <= {"PeerLost", "Timeout"}, kinds
