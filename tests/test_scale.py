"""The simulator of bench/scale.py: it returns what was measured, and keeps every byte."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pyrlk.bench import scale

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MEASURED = json.loads((RESULTS / "scale" / "cpu.json").read_text())
HOST = scale.host_costs(json.loads((RESULTS / "cpu.json").read_text()))
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_in_buckets_takes_what_was_measured(ranks):
    """Computed from two single all-gathers of other sizes; the machine repeats itself to 1.5."""
    computed, measured = scale.local_point(MEASURED, ranks)
    assert 1 / 1.5 <= computed / measured <= 1.5


@pytest.mark.parametrize("job", scale.JOBS, ids=lambda job: job.name)
@pytest.mark.parametrize("count", COUNTS)
def test_every_byte_that_a_gpu_ends_up_with_came_one_way(job, count):
    update = scale.simulate(job, scale.gpus(count, HOST))
    came = update.own + update.inside + update.between
    assert came == pytest.approx(job.arriving, rel=1e-12)
    assert update.memory["shard"] * count == pytest.approx(job.nbytes, rel=1e-12)
    assert (update.between == 0) == (count <= 8)
    assert min(update.own, update.inside, update.between) >= 0


@pytest.mark.parametrize("job", scale.JOBS, ids=lambda job: job.name)
def test_nothing_becomes_faster_by_more_bytes_or_a_slower_part(job):
    for count in (8, 64, 1024):
        on = scale.gpus(count, HOST)
        before = scale.simulate(job, on).total
        more = dataclasses.replace(job, nbytes=2 * job.nbytes)
        assert scale.simulate(more, on).total > before
        slower = [
            dataclasses.replace(on, copy=on.copy / 2),
            dataclasses.replace(on, hand_over=2 * on.hand_over),
            dataclasses.replace(on, per_tensor=2 * on.per_tensor),
            dataclasses.replace(on, inside=dataclasses.replace(on.inside, rate=on.inside.rate / 2)),
            dataclasses.replace(on, between=scale.Link(2 * on.between.latency, on.between.rate)),
        ]
        assert all(scale.simulate(job, other).total >= before for other in slower)


@pytest.mark.parametrize("job", scale.JOBS, ids=lambda job: job.name)
def test_overlap_lies_between_the_slowest_stage_and_all_of_them(job):
    for count in COUNTS:
        update = scale.simulate(job, scale.gpus(count, HOST))
        stages = update.seconds.values()
        assert max(stages) + update.once <= update.total <= sum(stages) + update.once + 1e-12


def test_more_nodes_take_longer_by_latency_and_larger_buckets_take_it_back():
    job = scale.JOBS[0]
    times = [scale.simulate(job, scale.gpus(count, HOST)).total for count in COUNTS[3:]]
    assert times == sorted(times)
    wide = dataclasses.replace(job, bucket=4 * job.bucket)
    assert scale.simulate(wide, scale.gpus(1024, HOST)).total < times[-1]


def test_the_page_holds_what_the_files_give():
    text = (ROOT / "docs" / "scaling.md").read_text().split(scale.BEGIN)[1].split(scale.END)[0]
    assert "nothing below was run" in text
    tables = scale.tables(MEASURED, json.loads((RESULTS / "cpu.json").read_text()))
    measured = [line for line in tables.splitlines() if line.startswith(("| 2 |", "| 4 |"))]
    assert len(measured) == 2
    assert all(line in text for line in measured)
