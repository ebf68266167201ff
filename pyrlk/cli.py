"""`pyrlk demo | bench | doctor | weights`. Heavy imports happen in the command that needs them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: 0 is success, 1 a failure, 2 a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    from pyrlk import __version__

    parser = argparse.ArgumentParser(
        prog="pyrlk", description="Kernels of one RL step on a language model.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pyrlk {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _demo_parser(commands)
    commands.add_parser("bench", help="measure the kernels (see: pyrlk bench --help)")
    doctor = commands.add_parser("doctor", help="what works on this machine", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.add_argument("--engine-url", metavar="URL", help="also look at a running SGLang server")
    doctor.add_argument("--api-key", metavar="KEY", help="its admin key")
    doctor.add_argument(
        "--engine-python", metavar="PYTHON", help="also import our loader with that interpreter"
    )
    doctor.set_defaults(run=_doctor)
    _weights_parser(commands)
    return parser


def _demo_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="DAPO post-training of a small language model on arithmetic",
        description="DAPO post-training of a small language model on arithmetic that is made on "
        "the fly: warm-up, rollouts in a second process, verified rewards, clip-higher loss, "
        "zero-copy weight updates, and a held-out evaluation before and after.",
        allow_abbrev=False,
    )
    # None means not given: --resume takes the run's own value then.
    parser.add_argument("--seed", type=_integer(0, 2**20), help="default 0")
    parser.add_argument("--steps", type=_integer(1, 10**6), help="default 40")
    parser.add_argument("--algorithm", choices=("dapo", "grpo", "ppo", "reinforce"))
    parser.add_argument("--model", metavar="PATH", help="a transformers causal LM folder")
    parser.add_argument("--device", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=_integer(1, 1024), help="default: all usable cores")
    parser.add_argument("--lr", type=_positive, help="learning rate of the RL steps")
    parser.add_argument("--warmup-lr", type=_positive, help="learning rate of the warm-up")
    parser.add_argument("--warmup-steps", type=_integer(0, 10**6), help="default 250")
    parser.add_argument("--name", help="files go to runs/NAME; default ALGORITHM-seedSEED")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help=argparse.SUPPRESS)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    start.add_argument("--overwrite", action="store_true", help="replace an unfinished run")
    parser.set_defaults(run=_demo, parser=parser)


def _weights_parser(commands) -> None:
    parser = commands.add_parser("weights", help="the weight hand-over", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    plan = verbs.add_parser(
        "plan",
        help="buckets and peak bytes of a model's update; nothing runs",
        allow_abbrev=False,
    )
    plan.add_argument("model", metavar="MODEL", help="a local transformers model folder")
    plan.add_argument("--bucket-bytes", type=_integer(1, 2**46), default=512 << 20)
    plan.add_argument("--buffers", type=_integer(1, 64), default=2)
    plan.set_defaults(run=_weights_plan)


def _weights_plan(args: argparse.Namespace) -> int:
    from pyrlk.weights import preview

    try:
        layout, source = preview.plan_of(args.model, args.bucket_bytes)
    except ValueError as error:
        return _fail(str(error))
    print(preview.describe(layout, source, args.bucket_bytes, args.buffers))
    return 0


def _demo(args: argparse.Namespace) -> int:
    # Trainer and engine take turns on the same cores: threads that wait must not spin. OpenMP reads
    # this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        return _fail(f'{error.name} is not installed: pip install "pyrlk[demo]"')
    from pyrlk import demo
    from pyrlk.demo.ranks import Ranks

    with Ranks() as ranks:
        config, folder = ranks.told(lambda: _demo_config(args))
        if ranks.size > 1 and config.device != "cpu":
            args.parser.error("argument --device: several ranks train on the CPU alone")
        try:
            result = demo.run(config, folder, resume=args.resume, ranks=ranks)
        except demo.Failed as error:
            return _fail(str(error)) if ranks.leads else 1
        if ranks.leads:
            print(
                f"held-out accuracy: {result.before:.3f} after the warm-up, {result.after:.3f} "
                f"after {result.steps} steps of {config.algorithm}"
            )
            if result.steps:  # else there is nothing to draw
                print(f"picture: {folder / 'curve.svg'}")
    return 0


def _demo_config(args: argparse.Namespace):
    """(settings, folder) of a new run or of the one to resume; exits with 2 where they clash."""
    from pyrlk.demo.config import Config
    from pyrlk.demo.record import Record

    fields = [field.name for field in dataclasses.fields(Config)]
    given: dict[str, Any] = {
        name: value for name, value in vars(args).items() if name in fields and value is not None
    }
    if "model" in given:
        if not (Path(given["model"]) / "config.json").is_file():
            args.parser.error(f"argument --model: {given['model']} holds no config.json")
        given.setdefault("lr", 1e-5)
        given.setdefault("warmup_lr", 2e-5)
    config = Config(**given)
    folder = args.runs / (args.name or f"{config.algorithm}-seed{config.seed}")
    record = Record(folder)
    if args.resume:
        if not record.checkpoint_path.is_file():
            args.parser.error(f"argument --resume: {record.checkpoint_path} does not exist")
        saved = Config(**record.load()["config"])
        for name in sorted(given.keys() - {"steps"}):
            if getattr(saved, name) != given[name]:
                option = "--" + name.replace("_", "-")
                args.parser.error(
                    f"argument --resume: {folder} was started with {option} "
                    f"{getattr(saved, name)}, not {given[name]}"
                )
        config = dataclasses.replace(saved, steps=given.get("steps", saved.steps))
    elif record.unfinished() and not args.overwrite:
        args.parser.error(
            f"{folder} holds an unfinished run: --resume continues it, --overwrite starts anew"
        )
    _check_device(args.parser, config.device)
    return config, folder


def _check_device(parser: argparse.ArgumentParser, name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"argument --device: {name!r} is no device; cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"argument --device: {name} is not there; `pyrlk doctor` says more")


def _doctor(args: argparse.Namespace) -> int:
    from pyrlk import doctor

    engine = doctor.Engine(args.engine_url, args.api_key, args.engine_python)
    return doctor.main(as_json=args.json, engine=engine)


def _bench(argv: list[str]) -> int:
    from pyrlk.bench import main as bench

    return bench(argv) or 0


def _fail(message: str) -> int:
    print(f"pyrlk: {message}", file=sys.stderr)
    return 1


def _integer(low: int, high: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"an integer in [{low}, {high}], got {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
