"""Results of separate calls stand together in one file, and a call that breaks off loses no row."""

import json
import types

import pytest

from pyrlk import bench
from pyrlk.bench import measure, record

FACTS = {"device": "NVIDIA H200", "torch": "2.11", "commit": "abc", "date": "2026-01-01"}


def row(op, ms, vocab=300):
    times = {"copy": {"ms": 1.0}, "kernel": {"ms": ms}}
    return {
        "op": op, "shape": [4, vocab], "dtype": "bfloat16",
        "times": times, "over_copy": ms, "gradient_error": 0.0,
    }  # fmt: skip


def read(file):
    return [(r["op"], r["times"]["kernel"]["ms"]) for r in json.loads(file.read_text())["rows"]]


def test_a_file_is_named_after_its_device(tmp_path):
    assert record.path(tmp_path, "cuda", FACTS).name == "nvidia-h200.json"
    assert record.path(tmp_path, "cpu", {"device": "Intel"}).name == "cpu.json"


def test_a_row_takes_the_place_of_its_older_self_alone(tmp_path):
    file = tmp_path / "results/gpu.json"
    for one in (row("a", 1.0), row("b", 2.0), row("a", 5.0, vocab=400), row("a", 3.0)):
        record.add(file, FACTS, one)
    assert read(file) == [("b", 2.0), ("a", 5.0), ("a", 3.0)]


def test_another_day_goes_on_and_other_conditions_begin_anew(tmp_path):
    file = tmp_path / "gpu.json"
    record.add(file, FACTS, row("a", 1.0))
    record.add(file, FACTS | {"date": "2026-01-02", "free_gib": 3.0}, row("b", 2.0))
    assert read(file) == [("a", 1.0), ("b", 2.0)]
    assert json.loads(file.read_text())["conditions"]["date"] == "2026-01-02"
    for change in ({"commit": "abd"}, {"torch": "2.12"}, {"quick": True}):
        record.add(file, FACTS | change, row("c", 3.0))
        assert read(file) == [("c", 3.0)]
        record.add(file, FACTS, row("a", 1.0))
    file.write_text("cut o")
    record.add(file, FACTS, row("a", 1.0))
    assert read(file) == [("a", 1.0)]


@pytest.fixture
def ops(monkeypatch):
    """score breaks off after its first row, sample is well."""

    def breaks(device, quick):
        yield row("score", 1.0)
        raise MemoryError("of the device")

    def well(device, quick):
        return [row("sample", 2.0)]

    mains = {".score": breaks, ".sample": well}
    monkeypatch.setattr(measure, "conditions", lambda device: dict(FACTS))
    fake = types.SimpleNamespace(
        import_module=lambda name, package: types.SimpleNamespace(main=mains[name])
    )
    monkeypatch.setattr(bench, "importlib", fake)


def test_an_op_that_breaks_off_leaves_its_rows_and_the_other_ops(ops, tmp_path, capsys):
    assert bench.main(["--op", "score", "--op", "sample", "--write", str(tmp_path)]) == 1
    assert read(tmp_path / "cpu.json") == [("score", 1.0), ("sample", 2.0)]
    said = capsys.readouterr()
    assert "MemoryError: of the device" in said.err
    assert "ended by an error: score" in said.out
    assert bench.main(["--op", "sample", "--write", str(tmp_path)]) == 0
    assert read(tmp_path / "cpu.json") == [("score", 1.0), ("sample", 2.0)]


def test_a_changed_tree_is_another_commit_with_every_change(monkeypatch):
    answers = {"rev-parse": "abc", "diff": "", "status": ""}
    monkeypatch.setattr(measure, "_git", lambda verb, *rest: answers[verb])
    assert measure.commit() == "abc"
    answers["diff"] = "-x +y"
    first = measure.commit()
    answers["diff"] = "-x +z"
    assert measure.commit().startswith("abc+")
    assert measure.commit() != first


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    def no_git(*_):
        raise OSError

    monkeypatch.setattr(measure, "_git", no_git)
    monkeypatch.delenv("PYRLK_COMMIT", raising=False)
    assert measure.commit() == "unknown"
    monkeypatch.setenv("PYRLK_COMMIT", "abc123")
    assert measure.commit() == "abc123"
