"""From a trainer's module to the names and tensors of its checkpoint, without a copy.

transformers 5 keeps the experts of a layer in one tensor and takes it apart when it saves:

    model.layers.0.mlp.experts.gate_up_proj [E, 2I, H]
      → model.layers.0.mlp.experts.{e}.gate_proj.weight [I, H], ….up_proj.weight [I, H]

The same functions are run once here, with every copy they make replaced by a view; what each name
views (tensor, offset, size, stride) is kept, so that later updates only apply it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import Unsupported
from ..source import ModuleState, Table

# Buffers that are weights: part of a checkpoint and changed in training.
BUFFERS = ("e_score_correction_bias", "expert_bias")


def hf(module: nn.Module, *, buffers: Sequence[str] = BUFFERS) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a transformers model as its `save_pretrained` would write them.

    Parameters
    ----------
    module : PreTrainedModel
        Unsharded. Fused experts come as one view per expert and projection.
    buffers : sequence of str
        Persistent buffers whose last name part is listed come too; others stay behind.

    Yields
    ------
    (name, tensor)
        Tensors share the module's memory. A tied weight comes once, under the name that is saved.

    Raises
    ------
    TypeError
        `module` is no transformers model.
    Unsupported
        A name whose values transformers computes when it saves, so that no view of them exists.
    """
    if not is_hf(module):
        raise TypeError(f"module must be a transformers model, got {type(module).__name__}")
    with torch.no_grad():
        yield from Checkpoint(module, buffers).tensors().items()


def is_hf(module: object) -> bool:
    """Whether it is a model of transformers, which is not imported for that."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


@torch.no_grad()
def saved_forms(module: nn.Module, buffers: Sequence[str] = BUFFERS) -> dict[str, Tensor]:
    """Names, shapes and dtypes of `hf(module)` where the module has no data (meta tensors)."""
    return _as_saved(module, _kept(module, buffers, ModuleState(module).tensors()))


class View(NamedTuple):
    """A checkpoint name as a part of one tensor of the module."""

    source: str
    offset: int  # elements from the start of `source`
    size: torch.Size
    stride: tuple[int, ...]


class Checkpoint:
    """`hf(module)`, asked for again and again."""

    def __init__(self, module: nn.Module, buffers: Sequence[str] = BUFFERS):
        self._state = ModuleState(module)
        self._buffers = tuple(buffers)
        self._views: dict[str, View] = {}
        self._noted: Table | None = None  # the tensors that the views were found in

    def of(self, module: object) -> bool:
        return self._state.of(module)

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor on the module's memory. Call it under no_grad."""
        state = self._state.tensors()
        table = Table(state)
        if self._noted is None or not table.fits(self._noted):
            table.note()
            self._views = views(self._state.module(), state, self._buffers)
            self._noted = table
        self._noted.forget_tensors()
        return {
            name: state[view.source].as_strided(
                view.size, view.stride, int(state[view.source].storage_offset()) + view.offset
            )
            for name, view in self._views.items()
        }


def views(
    module: nn.Module, state: dict[str, Tensor], buffers: Sequence[str] = BUFFERS
) -> dict[str, View]:
    """Of each checkpoint name, which part of which tensor of `state` it is; meta tensors will do.

    `state` has the names of the module's state_dict; tied names have the same tensor.
    """
    kept = _kept(module, buffers, state)
    # A tensor and a view of it share a storage: the outermost one, where several do.
    ends: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in kept.items():
        ends.setdefault(_storage(tensor), []).append((name, tensor))
    return {name: _locate(name, view, ends) for name, view in _as_saved(module, kept).items()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _kept(module: nn.Module, buffers: Sequence[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    left_out = _untrained(module, buffers) | _second_names(module, state)
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def _as_saved(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    loading = importlib.import_module("transformers.core_model_loading")
    with _NoCopies():
        return loading.revert_weight_conversion(module, state)


class _NoCopies(TorchDispatchMode):
    """A clone is its source: `contiguous()` of a slice stays the slice."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def _locate(name: str, view: Tensor, candidates: dict[int, list[tuple[str, Tensor]]]) -> View:
    for source, tensor in candidates.get(_storage(view), []):
        offset = int(view.storage_offset()) - int(tensor.storage_offset())
        inside = offset >= 0 and extent(view) + offset <= extent(tensor)
        if inside and view.dtype == tensor.dtype:
            return View(source, offset, view.size(), view.stride())
    raise Unsupported(
        f"{name!r}: transformers computes it when it saves, so it is no view of the module's "
        "memory; pass named tensors instead of the module"
    )


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last one, both counted."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * z for n, z in zip(tensor.shape, tensor.stride(), strict=True))


def _untrained(module: nn.Module, buffers: Sequence[str]) -> set[str]:
    named = module.named_buffers(remove_duplicate=False)
    return {name for name, _ in named if name.rpartition(".")[2] not in buffers}


def _second_names(module: nn.Module, state: dict[str, Tensor]) -> set[str]:
    """Names that save_pretrained drops: tied by declaration and still the same memory."""
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    return {
        name
        for name, owner in tied.items()
        if name in state
        and owner in state
        and name != owner
        and (state[name] is state[owner] or 0 != state[name].data_ptr() == state[owner].data_ptr())
    }
