"""The rollout engine: a second process with its own copy of the model.

    trainer                                     engine
    Engine.generate(prompts)  ── pipe ──▶       rollout.generate with pyrlk.sample
    Engine.expect(n)          ── pipe: n ──▶    Receiver.poll()
    Publisher.update(…, n)    ── pyrlk.weights ──▶                   weights travel by it alone

The pipe carries a few kilobytes of Python objects between the two halves of one program. Neither
side outlives the other: the engine ends at the end of the pipe, the trainer sees the process end.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import shutil
import signal
import tempfile
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import nn

from pyrlk import weights

from . import model as models
from .config import Config
from .determinism import fix
from .rollout import Rollout, generate, response_seeds

START_SECONDS = 300.0  # imports and a --model folder on a slow disk
SYNC_SECONDS = 30.0


class EngineLost(RuntimeError):
    """The engine process ended, or failed, before it answered."""


class Generate(NamedTuple):
    """Draw `repeat` responses to each prompt; the first is response number `first` of the run."""

    prompts: list[str]
    repeat: int
    first: int
    temperature: float


class Sync(NamedTuple):
    """New weights are about to come."""

    version: int


class Engine:
    """The trainer's handle of the engine process; a context manager."""

    def __init__(self, config: Config):
        self._directory = tempfile.mkdtemp(prefix="pyrlk-")
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(config, self.socket, theirs), name="pyrlk-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        self._ready = False

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def socket(self) -> str:
        """Where the engine takes weights from a `weights.Publisher`."""
        return f"{self._directory}/weights"

    def expect(self, version: int) -> None:
        """Have the engine wait for weights of this number; `taken` hears how that ended."""
        self._wait_until_ready()
        self._send(Sync(version))

    def taken(self) -> None:
        self._receive()

    def generate(
        self, prompts: list[str], *, repeat: int = 1, first: int = 0, temperature: float = 1.0
    ) -> Rollout:
        """`repeat` responses to each prompt, in order; on the CPU."""
        self._wait_until_ready()
        self._send(Generate(prompts, repeat, first, temperature))
        tokens, logprobs = self._receive()
        return Rollout(torch.from_numpy(tokens), torch.from_numpy(logprobs))

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True

    def _send(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self.lost("its pipe is closed") from error

    def _receive(self, timeout: float | None = None) -> Any:
        """The engine's answer; its end wakes this up at once."""
        ready = multiprocessing.connection.wait([self._pipe, self._process.sentinel], timeout)
        if not ready:
            raise EngineLost(f"the engine process did not start within {timeout:g} s")
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self.lost("its pipe is closed") from error
        if isinstance(answer, BaseException):
            raise EngineLost(f"the engine process failed: {answer}") from answer
        return answer

    def lost(self, otherwise: str) -> EngineLost:
        """The error for an engine that failed: how it ended, or `otherwise`."""
        self._process.join(1.0)
        code = self._process.exitcode
        if code is None:
            return EngineLost(f"the engine process does not answer: {otherwise}")
        if code < 0:
            return EngineLost(f"the engine process was killed by {signal.Signals(-code).name}")
        return EngineLost(f"the engine process ended with exit code {code}")


def _serve(config: Config, socket: str, pipe: Connection) -> None:
    """The engine process, until the trainer closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when to stop
    try:
        fix(config.threads)
        model, codec = models.build(config.model, config.seed, config.device)
        with weights.Receiver(model, socket) as receiver:
            pipe.send("ready")
            while True:
                message = pipe.recv()
                if isinstance(message, Sync):
                    pipe.send(_take(receiver, message.version))
                else:
                    pipe.send(_rollout(model, codec, config, message))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer is gone
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _take(receiver: weights.Receiver, version: int) -> int:
    if not receiver.poll(SYNC_SECONDS) or receiver.version != version:
        raise RuntimeError(f"weights of version {version} did not arrive: {receiver.last_error}")
    return receiver.version


def _rollout(model: nn.Module, codec: models.Codec, config: Config, message: Generate):
    prompts = [text for text in message.prompts for _ in range(message.repeat)]
    seeds = response_seeds(config.seed, message.first, len(prompts)).to(config.device)
    drawn = generate(
        model,
        codec,
        prompts,
        seeds,
        temperature=message.temperature,
        max_length=config.max_length,
    )
    return drawn.tokens.cpu().numpy(), drawn.logprobs.cpu().numpy()
