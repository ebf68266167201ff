"""What each rank of a small gloo group checks of weights.gather; one test a check.

Every rank also has the whole checkpoint, and compares bit by bit.
"""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist
from harness import check, collectives, main
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.placement_types import _StridedShard
from toy_megatron import CONFIG, EXPERTS, VOCAB, build, checkpoint

from pyrlk import weights
from pyrlk.weights import gather, memory
from pyrlk.weights import layout as layouts


def rank():
    return dist.get_rank()


def ranks():
    return dist.get_world_size()


def same_bits(got, wanted):
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(
        got.contiguous().view(-1).view(torch.uint8), wanted.contiguous().view(-1).view(torch.uint8)
    )


def gathered_equals(gathered, whole, *, buckets=(700, 20_000, 1 << 20), receivers=None):
    """For each bucket size, and for all ranks, one, and two as receivers."""
    choices = [range(ranks()), [0], [ranks() - 1]] if receivers is None else receivers
    for bucket_bytes in buckets:
        for receiving in choices:
            mine, seen = rank() in receiving, {}
            for tensors in gathered.stream(bucket_bytes, receive=mine):
                seen |= {name: tensor.clone() for name, tensor in tensors.items()}
            if not mine:
                assert not seen
                continue
            assert seen.keys() == whole.keys()
            for name, tensor in whole.items():
                same_bits(seen[name], tensor)


def holder(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@check
def dtensors_of_every_placement_are_whole_again():
    """1-D and 2-D meshes, every order of shard and replicate; even, uneven and empty shards."""
    whole = {
        "even": noise(8, 16, seed=1),
        "uneven": noise(7, 5, seed=2, dtype=torch.bfloat16),
        "short": noise(1, 9, seed=3),
        "cube": noise(5, 6, 7, seed=4, dtype=torch.float16),
        "line": noise(11, seed=5),
        "long": noise(1001, 33, seed=6),
    }
    meshes = [(init_device_mesh("cpu", (ranks(),)), [[Shard(0)], [Shard(1)], [Replicate()]])]
    if ranks() == 4:
        two = [Shard(0), Shard(1), Replicate()]
        pairs = [[a, b] for a in two for b in two]
        meshes.append((init_device_mesh("cpu", (2, 2)), pairs))
    for mesh, choices in meshes:
        for placements in choices:
            sharded = {}
            for name, tensor in whole.items():
                fitting = [
                    Shard(0) if p.is_shard() and p.dim >= tensor.ndim else p for p in placements
                ]
                sharded[name] = distribute_tensor(tensor, mesh, fitting)
            gathered_equals(gather.dtensor(holder(**sharded)), whole, buckets=(700, 1 << 20))


@check
def strided_shards_are_whole_again():
    """FSDP over tensor parallelism: the rows of a rank are those of a chunk of a chunk."""
    if ranks() < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    for rows in (8, 16, 12):
        tensor = noise(rows, 3, seed=rows)
        sharded = distribute_tensor(
            tensor, mesh, [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None
        )
        assert sharded.placements[0].split_factor == 2
        same_bits(sharded.full_tensor(), tensor)
        gathered_equals(gather.dtensor(holder(w=sharded)), {"w": tensor})


def tiny(tied=False, moe=True, seed=3):
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "tie_word_embeddings": tied,
    }  # fmt: skip
    if not moe:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    config = transformers.Qwen3MoeConfig(
        **sizes, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20
    )
    return transformers.Qwen3MoeForCausalLM(config)


@check
def fsdp2_models_go_by_their_checkpoint_names():
    """Fused experts that FSDP cuts between experts, tied weights, uneven shards, a 2-D mesh."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for tied, moe in ((False, True), (True, True), (True, False)):
        whole = {name: t.detach().clone() for name, t in gather.hf(tiny(tied, moe))}
        assert ("lm_head.weight" in whole) == (not tied)
        shapes = [(ranks(),)] + [(2, 2)] * (ranks() == 4)
        for shape in shapes:
            for tensor_parallel in (False, True) if len(shape) == 2 else (False,):
                model = tiny(tied, moe)
                names = ("dp", "tp") if tensor_parallel else ("replicate", "shard")
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])
                if tensor_parallel:
                    plan = {
                        "model.layers.*.self_attn.q_proj": ColwiseParallel(),
                        "model.layers.*.self_attn.k_proj": ColwiseParallel(),
                        "model.layers.*.self_attn.v_proj": ColwiseParallel(),
                        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
                    }
                    parallelize_module(model, mesh["tp"], plan)
                    mesh = mesh["dp"]
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                q = model.model.layers[0].self_attn.q_proj.weight
                assert isinstance(q, DTensor)
                if tensor_parallel:
                    assert isinstance(q.placements[0], _StridedShard)
                    assert q.device_mesh.ndim == 2
                gathered_equals(gather.dtensor(model), whole, buckets=(9000, 1 << 20))


@check
def an_unsharded_root_is_sharded_again_first():
    """After a forward FSDP2 leaves its root's parameters whole, as plain tensors."""
    model = tiny(moe=False)
    whole = {name: t.detach().clone() for name, t in gather.hf(model)}
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks(),)))
    gathered = gather.dtensor(model)
    gathered_equals(gathered, whole, buckets=(1 << 20,), receivers=[[0]])
    model(torch.zeros(1, 3, dtype=torch.long))
    gathered_equals(gathered, whole, buckets=(1 << 20,), receivers=[[0]])


@check
def modules_that_every_rank_has_are_not_moved():
    """Plain tensors: a receiver packs its own, and no byte travels."""
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3))
    for parameter in model.parameters():
        parameter.data = noise(*parameter.shape, seed=parameter.numel())
    model.register_buffer("steps", torch.tensor(5))
    model.extra = model[1].weight  # tied: sent once
    whole = {name: t.detach() for name, t in model.state_dict().items()}
    gathered = gather.dtensor(model)
    gathered_equals(gathered, whole)
    specs = {spec.name: spec for spec in gathered.specs()}
    assert sum(spec.alias is not None for spec in specs.values()) == 1
    layout = layouts.plan(gathered.specs(), 1 << 20)
    assert gathered.peak_bytes(1 << 20) == layout.peak_bytes(2)


def groups_of(*shape):
    """This rank's group along each axis of the grid of ranks; a collective."""
    grid = torch.arange(ranks()).view(shape)
    mine = []
    for axis in range(len(shape)):
        for row in grid.movedim(axis, -1).reshape(-1, shape[axis]).tolist():
            group = dist.new_group(row)
            if rank() in row:
                mine.append(group)
    return mine


def place(group):
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


@check
def megatron_models_are_whole_again():
    """Fused QKV, gate and up, padded vocabulary; every way to lay TP, PP and EP over the ranks."""
    whole = checkpoint()
    pairs = groups_of(ranks() // 2, 2)  # stage or expert, tensor
    line = dist.group.WORLD
    layouts_ = [
        {"tensor": line},
        {"stage": line},
        {"expert": line},
        {"tensor": line, "expert": line},  # experts over the tensor-parallel ranks, as Megatron may
        {"expert_tensor": line, "tensor": line},
        {"stage": pairs[0], "tensor": pairs[1], "expert": pairs[1]},
        {"expert": pairs[0], "tensor": pairs[1], "expert_tensor": pairs[1]},
    ]
    for groups in layouts_:
        for grouped in (False, True):
            places = {name: place(group) for name, group in groups.items()}
            model = build(whole, grouped=grouped, **places)
            gathered = gather.megatron(
                model, vocab_size=VOCAB,
                **{f"{n}_group": g for n, g in groups.items() if n != "stage"},
            )  # fmt: skip
            gathered_equals(gathered, whole, buckets=(5000,), receivers=[[0], range(ranks())])


@check
def megatron_takes_wrappers_virtual_stages_and_rules_of_ones_own():
    whole = checkpoint()
    places = {"tensor": place(dist.group.WORLD)}
    stages = [build(whole, stage=(i, 2), **places) for i in range(2)]
    wrapped = []
    for stage in stages:
        wrapper = nn.Module()
        wrapper.module = stage
        wrapped.append(wrapper)
    rules = (
        gather.Rule("decoder.layers.{layer}.mlp.router.weight", "router.{layer}"),
        gather.Rule("decoder.final_layernorm.weight", ()),
        *gather.RULES,
    )
    renamed = {
        re.sub(r"model.layers.(\d).mlp.gate.weight", r"router.\1", name): tensor
        for name, tensor in whole.items()
        if name != "model.norm.weight"
    }
    gathered = gather.megatron(
        wrapped, vocab_size=VOCAB, tensor_group=dist.group.WORLD, rules=rules, config=CONFIG
    )
    gathered_equals(gathered, renamed, buckets=(5000,))
    tied = build(whole, tied=True, **places)
    del whole["lm_head.weight"]
    gathered = gather.megatron(tied, vocab_size=VOCAB, tensor_group=dist.group.WORLD)
    gathered_equals(gathered, whole, buckets=(5000,))


@check
def partition_strides_interleave():
    """partition_stride 2: the local rows are a block of each half, as in a fused gate and up."""
    whole = noise(8 * ranks(), 3)
    local = torch.cat([half.chunk(ranks())[rank()] for half in whole.chunk(2)])
    model = nn.Module()
    model.weight = nn.Parameter(local)
    model.weight.tensor_model_parallel = True
    model.weight.partition_dim, model.weight.partition_stride = 0, 2
    rules = [gather.Rule("weight", "fused")]
    gathered = gather.megatron(model, rules=rules, tensor_group=dist.group.WORLD)
    gathered_equals(gathered, {"fused": whole})


def many(count, rows=16, columns=32):
    """A module of `count` tensors, each sharded along dimension 0 or 1, and the whole of it."""
    mesh = init_device_mesh("cpu", (ranks(),))
    whole = {f"layer{i}": noise(rows, columns, seed=i) for i in range(count)}
    sharded = {
        name: DTensor.from_local(t.chunk(ranks(), i % 2)[rank()].clone(), mesh, [Shard(i % 2)],
                                 run_check=False)
        for i, (name, t) in enumerate(whole.items())
    }  # fmt: skip
    return holder(**sharded), whole


@check
def collectives_are_those_of_the_buckets_and_two():
    """3,000 tensors: from the making of the gather to its last bucket; then the buckets alone."""
    module, whole = many(3000)
    found = []

    def once():
        gathered = gather.dtensor(module)
        found.append(gathered)
        for _ in gathered.stream(1 << 20, receive=rank() == 0):
            pass

    def again():
        for _ in found[0].stream(1 << 20, receive=rank() == 0):
            pass

    buckets = len(layouts.plan([layouts.Spec(n, t.shape, t.dtype) for n, t in whole.items()],
                               1 << 20).buckets)  # fmt: skip
    seen = collectives(once)
    assert seen == ["c10d::_allgather_base_"] * 2 + ["c10d::alltoall_base_"] * buckets
    assert collectives(again) == ["c10d::_allgather_base_"] + ["c10d::alltoall_base_"] * buckets
    gathered_equals(found[0], whole, buckets=(1 << 20,), receivers=[[0]])


@check
def sums_and_bytes_are_those_of_pack():
    """Into a Segment: what a publisher would have packed from the whole tensors, with its sums."""
    module, whole = many(40, 30, 17)
    gathered = gather.dtensor(module)
    layout = layouts.plan(gathered.specs(), 20_000)
    for checksum in (True, False):
        for bucket, pieces in enumerate(layout.pieces):
            entries = [layout.entries[i] for i in pieces]
            copies = memory.Copies([(whole[e.name], e.offset) for e in entries])
            packed, out = memory.Host(layout.slot_bytes), memory.Host(layout.slot_bytes)
            wanted = packed.pack(copies, checksum=checksum, threads=1)
            work = gathered.start(layout, bucket, out, checksum=checksum)
            got = work.wait(10)
            assert got == (wanted if checksum else None)
            assert work.wait(10) == got
            assert torch.equal(out.flat, packed.flat)
            packed.close()
            out.close()


@check
def two_buckets_are_in_flight_at_most():
    module, whole = many(40, 30, 17)
    gathered = gather.dtensor(module)
    layout = layouts.plan(gathered.specs(), 20_000)
    outs = [torch.empty(layout.slot_bytes, dtype=torch.uint8) for _ in range(2)]
    works = [gathered.start(layout, bucket, outs[bucket]) for bucket in range(2)]
    with pytest.raises(RuntimeError, match="two buckets are in flight"):
        gathered.start(layout, 2, outs[0])
    works[0].wait(10)
    # The rest is abandoned, as after an engine that failed: the next update drains it.
    gathered_equals(gathered, whole, buckets=(20_000,), receivers=[range(ranks())])


@check
def updates_follow_the_weights():
    """Changed in place, or other memory of the same form; other forms are refused."""
    module, whole = many(20)
    gathered = gather.dtensor(module)
    gathered_equals(gathered, whole, buckets=(9000,))
    for parameter in module.parameters():
        parameter.to_local().mul_(2)
    gathered_equals(gathered, {n: t * 2 for n, t in whole.items()}, buckets=(9000,))
    mesh = init_device_mesh("cpu", (ranks(),))
    for name, parameter in list(module.named_parameters()):
        local = DTensor.from_local(parameter.to_local() + 1, mesh, parameter.placements)
        module.register_parameter(name, nn.Parameter(local, requires_grad=False))
    gathered_equals(gathered, {n: t * 2 + 1 for n, t in whole.items()}, buckets=(9000,))
    module.layer3 = nn.Parameter(module.layer3.to(torch.bfloat16), requires_grad=False)
    with pytest.raises(ValueError, match="module: its tensors are others"):
        list(gathered.stream())
    module.layer3 = nn.Parameter(module.layer3.float(), requires_grad=False)
    if rank() == 0:
        del module.layer4
    kind, text = (ValueError, "module:") if rank() == 0 else (weights.UpdateError, "rank 0: module")
    with pytest.raises(kind, match=text):
        list(gathered.stream())


@check
def memory_is_known_beforehand():
    module, _ = many(60, 64, 32)
    gathered = gather.dtensor(module)
    nbytes = 60 * 64 * 32 * 4
    for bucket_bytes in (40_000, 1 << 20):
        layout = layouts.plan(gathered.specs(), bucket_bytes)
        in_flight = min(2, len(layout.buckets))
        for receivers in ([0], range(ranks())):
            gathered.release_staging()
            stated = gathered.peak_bytes(bucket_bytes, receivers=receivers)
            mine = rank() in receivers
            fresh = gather.dtensor(module)
            list(fresh.stream(bucket_bytes, receive=mine))
            used = sum(b.send.numel() + b.receive.numel() for b in fresh._buffers)
            assert stated == used + (layout.peak_bytes(2) if mine else 0)
            # A share of a bucket to each receiver, and of the others' shares to a receiver.
            share = layout.slot_bytes / ranks() + 64 * len(layout.pieces[0])
            others = len(receivers) - mine
            assert used <= in_flight * share * (others + (ranks() - 1) * mine)
    assert nbytes < gathered.peak_bytes(1 << 20, receivers=[0]) < 4 * nbytes or rank()


@check
def experts_go_to_their_owners_alone():
    """wanted_by: what an engine rank does not need is not sent to it."""
    whole = checkpoint()
    pairs = groups_of(ranks() // 2, 2)
    model = build(whole, tensor=place(pairs[1]), expert=place(pairs[0]),
                  expert_tensor=place(pairs[1]))  # fmt: skip

    def owner(name):
        found = re.search(r"experts\.(\d+)\.", name)
        return None if found is None else [int(found[1]) * ranks() // EXPERTS]

    gathered = gather.megatron(
        model, vocab_size=VOCAB, tensor_group=pairs[1], expert_group=pairs[0],
        expert_tensor_group=pairs[1], wanted_by=owner,
    )  # fmt: skip
    seen = {}
    for tensors in gathered.stream(20_000):
        seen |= {name: tensor.clone() for name, tensor in tensors.items()}
    mine = {name: t for name, t in whole.items() if owner(name) in (None, [rank()])}
    assert seen.keys() == mine.keys() < whole.keys()
    for name, tensor in mine.items():
        same_bits(seen[name], tensor)
    everything = gather.megatron(
        model, vocab_size=VOCAB, tensor_group=pairs[1], expert_group=pairs[0],
        expert_tensor_group=pairs[1],
    )  # fmt: skip
    assert gathered.peak_bytes(1 << 20) < everything.peak_bytes(1 << 20)


@check
def a_subgroup_gathers_alone():
    if ranks() < 4:
        return
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank() // 2]
    tensor = noise(10, 4, seed=rank() // 2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))["inner"]
    local = tensor.chunk(2)[rank() % 2].clone()
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    gathered = gather.dtensor(holder(w=sharded), group=group)
    seen = next(iter(gathered.stream()))
    same_bits(seen["w"], tensor)


def refused(kind, text, call):
    with pytest.raises(kind, match=re.escape(text)):
        call()


@check
def errors_name_the_argument_on_every_rank():
    """What is wrong on one rank is an error on all of them, before a byte moves."""
    whole = checkpoint()
    line = dist.group.WORLD
    odd = rank() == 1

    def megatron(change=None, **options):
        model = build(whole, tensor=place(line))
        if change is not None and odd:
            change(model)
        return gather.megatron(model, **({"vocab_size": VOCAB, "tensor_group": line} | options))

    def every(text, change):
        kind, prefix = (ValueError, "") if odd else (weights.UpdateError, "rank 1: ")
        refused(kind, prefix + text, lambda: megatron(change))

    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"

    def without_rule(model):
        model.strange = nn.Parameter(torch.zeros(2))

    def bad_dim(model):
        model.get_parameter(qkv).partition_dim = 5

    def bad_stride(model):
        model.get_parameter(qkv).partition_stride = 0

    def other_heads(model):
        model.config = type(CONFIG)(**vars(CONFIG) | {"num_attention_heads": 16})

    def no_heads(model):
        model.config = type(CONFIG)(kv_channels=8)

    every("rules: none maps 'strange'", without_rule)
    every(f"module: {qkv!r} is tensor_model_parallel, and its partition_dim is 5", bad_dim)
    every(f"module: {qkv!r} has partition_stride 0", bad_stride)
    every(f"{qkv!r} has {128 // ranks()} rows, wanted", other_heads)
    every("config.num_attention_heads must be a positive int", no_heads)

    def other_dtype(model):
        model.decoder.final_layernorm.float()

    refused(ValueError, "is [32] bfloat16 on rank 0 and [32] float32 on rank 1",
            lambda: megatron(other_dtype))  # fmt: skip

    def grown(model):
        del model.decoder.final_layernorm

    gathered = megatron(grown)  # a replica that is missing on one rank is no loss
    gathered_equals(gathered, whole, buckets=(1 << 20,), receivers=[[1]])

    mesh = init_device_mesh("cpu", (ranks(),))
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    refused(weights.Unsupported, "'w' is", lambda: gather.dtensor(holder(w=partial)))
    refused(TypeError, "module must be an nn.Module, got dict", lambda: gather.dtensor({}))
    refused(TypeError, "module must be nn.Modules, got int", lambda: gather.megatron([3]))
    refused(ValueError, "vocab_size must be", lambda: megatron(vocab_size=0))
    refused(TypeError, "tensor_group must be", lambda: megatron(tensor_group="tp"))
    refused(ValueError, "vocab_size must be in [1, ", lambda: megatron(vocab_size=10**6))
    two = (gather.Rule("decoder.final_layernorm.weight", ("a", "b")), *gather.RULES)
    refused(ValueError, "gives 1 tensors for 2 names", lambda: megatron(rules=two))
    twice = (gather.Rule("decoder.final_layernorm.weight", "lm_head.weight"), *gather.RULES)
    refused(ValueError, "'lm_head.weight' comes twice", lambda: megatron(rules=twice))

    model = build(whole, tensor=place(line))
    del model.decoder.layers[1]
    if odd:
        model = build(whole, tensor=place(line))
    refused(ValueError, "module: the ranks hold",
            lambda: gather.megatron(model, vocab_size=VOCAB, tensor_group=line))  # fmt: skip

    gathered = gather.dtensor(many(6)[0])
    layout = layouts.plan(gathered.specs(), 3000 if odd else 9000)
    refused(ValueError, "bucket_bytes must be equal on every rank",
            lambda: gathered.start(layout, 0, None))  # fmt: skip
    layout = layouts.plan(gathered.specs(), 9000)
    out = torch.empty(layout.slot_bytes, dtype=torch.uint8)
    refused(TypeError, "out must be", lambda: gathered.start(layout, 0, out.float()))
    refused(ValueError, "out has 10 bytes", lambda: gathered.start(layout, 0, out[:10]))
    gathered.start(layout, 0, out).wait(10)
    refused(ValueError, "out: a rank has memory", lambda: gathered.start(layout, 1, None))
    other = layouts.plan(gathered.specs(), 3000)
    refused(ValueError, "layout: an update begins with bucket 0",
            lambda: gathered.start(other, 1, out))  # fmt: skip
    gathered_equals(gathered, many(6)[1], buckets=(3000,))


@check
def a_silent_rank_is_a_timeout():
    """The others stop within their deadline, and the gather says so from then on. Comes last."""
    module, _ = many(20)
    group = dist.new_group()
    gathered = gather.dtensor(module, group=group)
    list(gathered.stream())
    dist.barrier()
    if rank() == 1:
        time.sleep(1.5)
        dist.barrier()
        return
    begin = time.monotonic()
    with pytest.raises(weights.Timeout, match=r"did not take part within 0\.3 s"):
        list(gathered.stream(timeout=0.3))
    assert time.monotonic() - begin < 1.2
    with pytest.raises(weights.Timeout, match="this gather failed before"):
        list(gathered.stream())
    dist.barrier()


if __name__ == "__main__":
    main()
