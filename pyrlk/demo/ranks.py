"""The processes of a run: rank 0 leads (engine, rewards, files), and all of them learn, by FSDP2.

    update    rank r scores its share of the rows, with the denominator N / ranks of all of them:
              mean_r ∇Σ_{t of r} ℓ_t / (N / ranks) = Σ_t ∇ℓ_t / N,  the gradient of a single process
    decide    whatever depends on the engine, the clock or a signal is done by rank 0 and told

Under torchrun there are as many ranks as it started; otherwise one, and nothing is sent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyrlk
from pyrlk.objective import Objective

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another rank of the run ended."""


class Ranks:
    """This process among those of the run; a context manager."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def __enter__(self) -> Ranks:
        if dist.is_torchelastic_launched():
            # torchrun ends the others by SIGTERM when one is lost: leave by the way of an error.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            dist.init_process_group("gloo")
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if dist.is_initialized() and kind is None:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.size == 1 else dist.group.WORLD

    def threads(self, threads: int) -> int:
        """This rank's part of the machine's threads."""
        return max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def told(self, work: Callable[[], T]) -> T:
        """What `work()` of rank 0 returns, on every rank; what it raises is raised by all."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.leads:
            try:
                answer[0] = work()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    @torch.no_grad()
    def shard(self, model: nn.Module) -> None:
        """Give every rank its shards of rank 0's parameters: FSDP2, a unit a transformer block."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
        mesh = init_device_mesh("cpu", (self.size,))
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of the rows of an update: every one of them works in every update."""
        if len(rows) < self.size:
            raise ValueError(f"{self.size} ranks cannot share the {len(rows)} rows of an update")
        return rows.tensor_split(self.size)[self.rank]

    def normalizer(self, counted: Tensor, objective: Objective) -> Tensor | None:
        """The denominator of all ranks' rows, from those of this rank; None where there is one."""
        if self.size == 1:
            return None
        return pyrlk.normalizer(counted, objective, group=self.group)

    def mean(self, values: dict[str, float], weight: float = 1.0) -> dict[str, float]:
        """Means over the ranks, each with its weight; summed in rank order."""
        if self.size == 1:
            return values
        table = self._table([weight, *(weight * x for x in values.values())])
        total, *sums = table.sum(0).tolist()
        return dict(zip(values, (x / total for x in sums), strict=True))

    def largest(self, values: dict[str, float]) -> dict[str, float]:
        if self.size == 1:
            return values
        return dict(zip(values, self._table(values.values()).amax(0).tolist(), strict=True))

    def _table(self, row: Any) -> Tensor:
        mine = torch.tensor(list(row), dtype=torch.float64)
        every = mine.new_empty((self.size, len(mine)))
        dist.all_gather(list(every.unbind(0)), mine)
        return every


ALONE = Ranks()


def whole(value: Any) -> Any:
    """A tensor, or a nest of them, with every shard gathered; collective where there are any."""
    if isinstance(value, dict):
        return {name: whole(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(x) for x in value)
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Cut the whole tensors of a loaded state into the shards that their parameters have."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                mesh, placements = parameter.device_mesh, parameter.placements
                state[name] = distribute_tensor(value, mesh, placements, src_data_rank=None)


class Silent:
    """Stands for the files and the screen on the ranks that do not lead."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_options: None
