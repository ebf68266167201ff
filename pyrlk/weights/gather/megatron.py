"""Tensor, pipeline and expert parallelism by Megatron's conventions → checkpoint names.

With t tensor-parallel ranks, of which this is r:

    column, row       partition_dim of size n:   whole[r·n + i] = local[i]
    partition_stride  s blocks of m = n/s:       whole[(k·t + r)·m + i] = local[k·m + i]
    fused QKV         G/t of G query groups, each of g query heads, one key and one value head:
                      local rows = [group][q_1 … q_g | k | v][head_dim]
    gate and up       local rows = [gate rows of this rank | up rows of this rank]
    experts           local expert e of expert-parallel rank p is expert p·E_local + e
    vocabulary        padded to a multiple of t: rows from vocab_size on are left out
    layers            numbered from 0 in a pipeline stage; `layer_number` (from 1) is the model's

Sources: megatron.core 0.14, tensor_parallel/layers.py (set_tensor_model_parallel_attributes,
ColumnParallelLinear, VocabParallelEmbedding), transformer/attention.py (order of linear_qkv),
transformer/mlp.py (linear_fc1 of a gated MLP), transformer/moe/experts.py (local experts),
transformer/transformer_layer.py (layer_number). Nothing of it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import BUFFERS
from .exchange import Gathered
from .table import Held, Index


@dataclass(frozen=True)
class Share:
    """One rank's part of a Megatron parameter, as a split is given it.

    Attributes
    ----------
    name : of the parameter, for errors
    tensor : this rank's part
    dim : partition_dim, or None for a parameter that every rank has whole
    stride : partition_stride
    rank, ranks : place in the (expert) tensor-parallel group, and its size; 0 and 1 without `dim`
    config : the model's TransformerConfig, or what was given for it
    vocab_size : without padding, or None
    """

    name: str
    tensor: Tensor
    dim: int | None
    stride: int
    rank: int
    ranks: int
    config: Any
    vocab_size: int | None

    def number(self, key: str) -> int:
        """A number of the config."""
        value = getattr(self.config, key, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.{key} must be a positive int for {self.name!r}, got {value!r}"
            )
        return value


class Slab(NamedTuple):
    """What a share holds of one checkpoint tensor: `view` at `start` of `grid`.

    `grid` is `shape` with dimensions split as far as it takes for the view to be a box.
    """

    shape: Index
    grid: Index
    start: Index
    view: Tensor


Split = Callable[[Share], list[Slab]]  # one slab a name of the rule


def whole(share: Share) -> list[Slab]:
    """One checkpoint tensor, sharded along partition_dim by partition_stride."""
    shape, dim = list(share.tensor.shape), share.dim
    if dim is None:
        return [Slab(tuple(shape), tuple(shape), (0,) * len(shape), share.tensor)]
    shape[dim] *= share.ranks
    if share.stride == 1:
        return [_along(share, share.tensor, dim, share.rank)]
    blocks = (share.stride, 1, share.tensor.shape[dim] // share.stride)
    view = share.tensor.unflatten(dim, blocks)
    grid, start = list(view.shape), [0] * view.ndim
    grid[dim + 1], start[dim + 1] = share.ranks, share.rank
    return [Slab(tuple(shape), tuple(grid), tuple(start), view)]


def vocabulary(share: Share) -> list[Slab]:
    """`whole` along dimension 0, without the rows that pad the vocabulary."""
    (slab,) = whole(share)
    size = share.vocab_size
    if size is None:
        return [slab]
    if not 0 < size <= slab.shape[0]:
        raise ValueError(f"vocab_size must be in [1, {slab.shape[0]}], the rows of {share.name!r}")
    shape = (size, *slab.shape[1:])
    return [Slab(shape, shape, slab.start, slab.view[: max(0, size - slab.start[0])])]


def gate_up(share: Share) -> list[Slab]:
    """Two checkpoint tensors: the first half of the local rows, and the second."""
    _rows(share, 2)
    return [_along(share, half, 0, share.rank) for half in share.tensor.chunk(2)]


def qkv(share: Share) -> list[Slab]:
    """Three checkpoint tensors: queries, keys, values, interleaved by query group."""
    heads, dim = share.number("num_attention_heads"), share.number("kv_channels")
    groups = share.number("num_query_groups")
    if heads % groups or groups % share.ranks:
        raise ValueError(
            f"{share.name!r}: {heads} heads in {groups} query groups do not divide by "
            f"{share.ranks} tensor-parallel ranks"
        )
    each, local = heads // groups, groups // share.ranks
    if share.tensor.shape[0] != local * (each + 2) * dim:
        raise ValueError(
            f"{share.name!r} has {share.tensor.shape[0]} rows, wanted {local} groups of "
            f"({each} + 2) heads of {dim}"
        )
    view = share.tensor.unflatten(0, (local, each + 2, dim))
    rest = share.tensor.shape[1:]
    slabs = []
    for first, count in ((0, each), (each, 1), (each + 1, 1)):
        shape, grid = (groups * count * dim, *rest), (groups, count, dim, *rest)
        start = (share.rank * local, *(0,) * (len(grid) - 1))
        slabs.append(Slab(shape, grid, start, view[:, first : first + count]))
    return slabs


def _along(share: Share, view: Tensor, dim: int, rank: int) -> Slab:
    shape, start = list(view.shape), [0] * view.ndim
    shape[dim] *= share.ranks
    start[dim] = rank * view.shape[dim]
    return Slab(tuple(shape), tuple(shape), tuple(start), view)


def _rows(share: Share, multiple: int) -> None:
    if share.dim not in (None, 0) or share.tensor.shape[0] % multiple:
        raise ValueError(
            f"{share.name!r}: partition_dim {share.dim} and {share.tensor.shape[0]} rows, wanted "
            f"dimension 0 and a multiple of {multiple}"
        )


@dataclass(frozen=True)
class Rule:
    """Parameters that match `pattern` make the checkpoint tensors `names`.

    Attributes
    ----------
    pattern : str
        A parameter's name, as in "decoder.layers.{layer}.mlp.linear_fc2.weight". {layer} is the
        model's layer from 0, {expert} the model's expert from 0; any other {word} is a number too.
    names : str or tuple of str
        Checkpoint names with the same words; an empty tuple: not sent.
    split : callable
        Share → one Slab a name: `whole`, `vocabulary`, `gate_up`, `qkv`, or your own.
    dim : int, optional
        Partition dimension instead of the parameter's own.
    """

    pattern: str
    names: str | tuple[str, ...]
    split: Split = whole
    dim: int | None = None

    def match(self, name: str) -> dict[str, int] | None:
        form = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(self.pattern))
        found = re.fullmatch(form, name)
        return None if found is None else {k: int(v) for k, v in found.groupdict().items()}

    def targets(self, words: dict[str, int]) -> list[str]:
        names = (self.names,) if isinstance(self.names, str) else self.names
        return [name.format(**words) for name in names]


def _gated(here: str, there: str, weight: str = ".weight") -> list[Rule]:
    """A gated MLP: linear_fc1 and linear_fc2."""
    names = (f"{there}.gate_proj.weight", f"{there}.up_proj.weight")
    return [
        Rule(f"{here}.linear_fc1{weight}", names, gate_up),
        # Grouped experts have been seen with partition_dim 0 here: it is row parallel all the same.
        Rule(f"{here}.linear_fc2{weight}", f"{there}.down_proj.weight", dim=1),
    ]


def _llama() -> Iterator[Rule]:
    here, there = "decoder.layers.{layer}", "model.layers.{layer}"
    attention = f"{there}.self_attn"
    yield Rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary)
    for kind in ("weight", "bias"):
        names = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        yield Rule(f"{here}.self_attention.linear_qkv.{kind}", names, qkv)
    yield Rule(f"{here}.self_attention.linear_proj.weight", f"{attention}.o_proj.weight")
    yield Rule(f"{here}.self_attention.q_layernorm.weight", f"{attention}.q_norm.weight")
    yield Rule(f"{here}.self_attention.k_layernorm.weight", f"{attention}.k_norm.weight")
    for name in ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"):
        yield Rule(f"{here}.{name}", f"{there}.input_layernorm.weight")
    for name in ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"):
        yield Rule(f"{here}.{name}", f"{there}.post_attention_layernorm.weight")
    yield from _gated(f"{here}.mlp", f"{there}.mlp")
    yield Rule(f"{here}.mlp.router.weight", f"{there}.mlp.gate.weight")
    yield Rule(f"{here}.mlp.router.expert_bias", f"{there}.mlp.gate.e_score_correction_bias")
    expert = f"{there}.mlp.experts.{{expert}}"
    yield from _gated(f"{here}.mlp.experts.local_experts.{{expert}}", expert)
    yield from _gated(f"{here}.mlp.experts", expert, ".weight{expert}")
    yield from _gated(f"{here}.mlp.shared_experts", f"{there}.mlp.shared_expert")
    yield Rule(f"{here}.mlp.shared_experts.gate_weight", f"{there}.mlp.shared_expert_gate.weight")
    yield Rule("decoder.final_layernorm.weight", "model.norm.weight")
    yield Rule("output_layer.weight", "lm_head.weight", vocabulary)


# Llama, Qwen2, Qwen3 and their mixtures of experts. The first rule that matches counts.
RULES: tuple[Rule, ...] = tuple(_llama())


def megatron(
    module: nn.Module | Sequence[nn.Module],
    *,
    group: dist.ProcessGroup | None = None,
    tensor_group: dist.ProcessGroup | None = None,
    expert_group: dist.ProcessGroup | None = None,
    expert_tensor_group: dist.ProcessGroup | None = None,
    config: Any = None,
    rules: Sequence[Rule] = RULES,
    vocab_size: int | None = None,
    first_layer: int = 0,
    buffers: Sequence[str] = BUFFERS,
    wanted_by: Callable[[str], Collection[int] | None] | None = None,
    timeout: float = 30.0,
) -> Gathered:
    """The whole tensors of a Megatron model, under the names of its Hugging Face checkpoint.

    Collective over `group`: every rank calls it, once; pass the result to `Publisher.update` as
    often as the weights change.

    Parameters
    ----------
    module : nn.Module or sequence of them
        This rank's pipeline stage: a GPTModel, wrapped or not, or its virtual stages. Parameters
        are sharded by their attributes tensor_model_parallel, partition_dim, partition_stride.
    group : ProcessGroup, optional
        Ranks that together hold the model: every stage, tensor and expert rank. Default: all.
    tensor_group, expert_group, expert_tensor_group : ProcessGroup, optional
        This rank's own: `parallel_state.get_tensor_model_parallel_group()`,
        `get_expert_model_parallel_group()`, `get_expert_tensor_parallel_group()`. Default: of one.
    config : object, optional
        With num_attention_heads, num_query_groups, kv_channels. Default: `module.config`.
    rules : sequence of Rule
        Parameter → checkpoint names; the first that matches counts. Extend it with
        `(*mine, *gather.RULES)`.
    vocab_size : int, optional
        True rows of embedding and head. Default: padding is sent.
    first_layer : int
        The model's number of this stage's layer 0, where layers have no `layer_number`.
    buffers : sequence of str
        Buffers that are weights, by the last part of their name.
    wanted_by, timeout
        As in `gather.dtensor`.

    Raises
    ------
    TypeError, ValueError
        A parameter that no rule maps, attributes or sizes that do not fit, a name that comes twice;
        ranks that disagree, a part that no rank holds.
    UpdateError
        Another rank could not take part; PeerLost, Timeout: it is gone, or silent.

    Notes
    -----
    The head of a model with `share_embeddings_and_output_weights` is not sent: it is the embedding.
    """
    chunks = [module] if isinstance(module, nn.Module) else list(module)
    for chunk in chunks:
        if not isinstance(chunk, nn.Module):
            raise TypeError(f"module must be nn.Modules, got {type(chunk).__name__}")
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 1):
        raise ValueError(f"vocab_size must be a positive int, got {vocab_size!r}")
    places = {
        "tensor": _place("tensor_group", tensor_group),
        "expert": _place("expert_group", expert_group),
        "expert_tensor": _place("expert_tensor_group", expert_tensor_group),
    }
    model = _Model(chunks, places, config, tuple(rules), vocab_size, first_layer, tuple(buffers))
    return Gathered(model, group, wanted_by, timeout)


def _place(name: str, group: Any) -> tuple[int, int]:
    if group is None:
        return 0, 1
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a ProcessGroup, got {type(group).__name__}")
    return dist.get_rank(group), dist.get_world_size(group)


class _Model:
    """`Shards` of one rank's pipeline stages."""

    def __init__(
        self,
        chunks: list[nn.Module],
        places: dict[str, tuple[int, int]],
        config: Any,
        rules: tuple[Rule, ...],
        vocab_size: int | None,
        first_layer: int,
        buffers: tuple[str, ...],
    ):
        self._chunks, self._places, self._rules = chunks, places, rules
        self._config, self._vocab_size = config, vocab_size
        self._first_layer, self._buffers = first_layer, buffers

    def tensors(self) -> dict[str, Tensor]:
        """Under `stage:name`, the name without wrappers."""
        return {key: tensor.detach() for key, (_, _, tensor) in self._named().items()}

    def held(self, tensors: dict[str, Tensor]) -> list[Held]:
        out: list[Held] = []
        experts = self._local_experts()
        names: set[str] = set()
        for key, (chunk, name, tensor) in self._named().items():
            rule, words = self._rule(name)
            if name == "output_layer.weight" and getattr(
                chunk, "share_embeddings_and_output_weights", False
            ):
                continue
            if "layer" in words:
                words["layer"] = self._layer(chunk, name, words["layer"])
            if "expert" in words:
                words["expert"] += self._places["expert"][0] * experts
            share = self._share(chunk, name, tensor, tensors[key], rule, "expert" in words)
            targets = rule.targets(words)
            slabs = rule.split(share) if targets else []
            if len(slabs) != len(targets):
                raise ValueError(
                    f"rules: the split of {rule.pattern!r} gives {len(slabs)} tensors for "
                    f"{len(targets)} names"
                )
            for target, slab in zip(targets, slabs, strict=True):
                if target in names:
                    raise ValueError(f"rules: {target!r} comes twice, from {name!r} too")
                names.add(target)
                parts = [(slab.start, slab.view)]
                out.append(Held(target, slab.shape, tensor.dtype, slab.grid, parts))
        return out

    def _named(self) -> dict[str, tuple[nn.Module, str, Tensor]]:
        named: dict[str, tuple[nn.Module, str, Tensor]] = {}
        for stage, chunk in enumerate(map(_unwrapped, self._chunks)):
            for name, parameter in chunk.named_parameters():
                named[f"{stage}:{name}"] = chunk, name, parameter
            for name, buffer in chunk.named_buffers():
                if name.rpartition(".")[2] in self._buffers:
                    named[f"{stage}:{name}"] = chunk, name, buffer
        return named

    def _rule(self, name: str) -> tuple[Rule, dict[str, int]]:
        for rule in self._rules:
            words = rule.match(name)
            if words is not None:
                return rule, words
        raise ValueError(
            f"rules: none maps {name!r}; pass rules=(Rule(…), *gather.RULES), with names=() for "
            "what is not sent"
        )

    def _local_experts(self) -> int:
        """Experts of a layer on this rank."""
        found = (self._rule(name)[1].get("expert", -1) for _, name, _ in self._named().values())
        return 1 + max(found, default=-1)

    def _layer(self, chunk: nn.Module, name: str, local: int) -> int:
        path = name[: name.index(f".{local}.")] + f".{local}"
        number = getattr(chunk.get_submodule(path), "layer_number", None)
        return self._first_layer + local if number is None else int(number) - 1

    def _share(
        self, chunk: nn.Module, name: str, tensor: Any, data: Tensor, rule: Rule, expert: bool
    ) -> Share:
        """Read the partition attributes."""
        rank, ranks = self._places["expert_tensor" if expert else "tensor"]
        dim, stride = None, 1
        duplicated = getattr(tensor, "parallel_mode", None) == "duplicated"
        if getattr(tensor, "tensor_model_parallel", False) and not duplicated:
            dim = getattr(tensor, "partition_dim", None) if rule.dim is None else rule.dim
            stride = getattr(tensor, "partition_stride", 1)
            if not isinstance(dim, int) or not 0 <= dim < data.ndim:
                raise ValueError(
                    f"module: {name!r} is tensor_model_parallel, and its partition_dim is {dim!r}: "
                    f"wanted one of its {data.ndim} dimensions"
                )
            if not isinstance(stride, int) or stride < 1 or data.shape[dim] % stride:
                raise ValueError(
                    f"module: {name!r} has partition_stride {stride!r}, which does not divide its "
                    f"{data.shape[dim]} rows or columns"
                )
        if dim is None:
            rank, ranks = 0, 1
        config = getattr(chunk, "config", None) if self._config is None else self._config
        return Share(name, data, dim, stride, rank, ranks, config, self._vocab_size)


def _unwrapped(chunk: nn.Module) -> nn.Module:
    """Without the wrappers of mixed precision and data parallelism, each of which has `module`."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk
