"""`pyrlk demo | bench | doctor`: what a wrong command line says; doctor tells the truth."""

from __future__ import annotations

import builtins
import json
import sys

import pytest

from pyrlk import cli, doctor


def refused(capsys, *argv: str) -> str:
    """The last line on stderr of a command that ends with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sed", "1"], "pyrlk: error: unrecognized arguments: --sed 1"),
        (
            ["--seed", "-1"],
            "pyrlk demo: error: argument --seed: an integer in [0, 1048576], got '-1'",
        ),
        (
            ["--steps", "many"],
            "pyrlk demo: error: argument --steps: an integer in [1, 1000000], got 'many'",
        ),
        (["--lr", "nan"], "pyrlk demo: error: argument --lr: a number above 0, got 'nan'"),
        (
            ["--model", "/nowhere"],
            "pyrlk demo: error: argument --model: /nowhere holds no config.json",
        ),
        (
            ["--device", "tpu"],
            "pyrlk demo: error: argument --device: 'tpu' is no device; cpu, cuda or cuda:N",
        ),
        (
            ["--device", "cuda:99"],
            "pyrlk demo: error: argument --device: cuda:99 is not there; `pyrlk doctor` says more",
        ),
        (
            ["--resume", "--name", "none"],
            "pyrlk demo: error: argument --resume: runs/none/checkpoint.safetensors does not exist",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "demo", *argv) == message
    assert not any(tmp_path.iterdir())


def test_an_unknown_algorithm_lists_those_there_are(capsys):
    message = refused(capsys, "demo", "--algorithm", "trpo")
    assert "--algorithm" in message
    assert all(name in message for name in ("trpo", "dapo", "grpo", "ppo", "reinforce"))


def test_an_unfinished_run_is_not_overwritten_by_accident(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "dapo-seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    assert refused(capsys, "demo") == (
        "pyrlk demo: error: runs/dapo-seed0 holds an unfinished run: --resume continues it, "
        "--overwrite starts anew"
    )


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["transformers", "rich", "matplotlib"])
def test_a_missing_package_is_one_line_with_its_cure(capsys, monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        f'pyrlk: {package} is not installed: pip install "pyrlk[demo]"\n'
    )


def test_doctor_reports_what_works_here(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "extension", "cpu handles", "cuda handles", "/dev/shm"):
        assert f"\n{name}" in f"\n{text}"
    assert text.endswith("pyrlk is usable here\n")


def test_doctor_json_says_the_same(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["usable"] is True
    handles = next(line for line in answer["lines"] if line["name"] == "cpu handles")
    assert handles["value"].startswith("yes")


def test_doctor_says_why_handles_cannot_be_exported(capsys, monkeypatch):
    def forbidden(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("pyrlk.weights.memory.create", forbidden)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "cpu handles" in text
    assert "no: OSError: Operation not permitted" in text
    assert text.endswith("pyrlk is not usable here\n")


def test_doctor_survives_without_the_extension(capsys, monkeypatch):
    import pyrlk

    monkeypatch.delattr(pyrlk, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "pyrlk._C", None)
    for name in [name for name in sys.modules if name.startswith("pyrlk.weights")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pyrlk, "weights", raising=False)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "extension" in text
    assert "not built" in text
    assert "→ pip install" in text


def test_doctor_warns_of_expandable_segments(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    line = next(line for line in doctor.report() if line.name == "allocator")
    assert line.cure
