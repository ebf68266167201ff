"""One rank of a trainer that publishes into live servers; test_fleet.py starts four.

    fleet_ranks.py RANK RANKS PORT JOB
    JOB: {"trainer", "kind", "dtype", "updates": [[url, mode, seed, version], …]}

fsdp      fully_shard on a 2 × 2 mesh: replicated over one dimension, sharded over the other
megatron  TP 2 × PP 2, and EP 2 over the ranks of a tensor-parallel group
whole     every rank has all of it
"""

import datetime
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from live import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pyrlk import weights

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import toy_megatron


def fsdp(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    return weights.gather.dtensor(model)


def megatron(model):
    config = SimpleNamespace(
        num_attention_heads=model.config.num_attention_heads,
        num_query_groups=model.config.num_key_value_heads,
        kv_channels=model.config.head_dim,
    )
    whole = dict(weights.gather.hf(model))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage, part = divmod(dist.get_rank(), 2)
    stages = toy_megatron.build(
        whole, tensor=(part, 2), stage=(stage, 2), expert=(part, 2), config=config
    )
    pair = pairs[stage]
    return weights.gather.megatron(
        stages, tensor_group=pair, expert_group=pair, vocab_size=model.config.vocab_size
    )


TRAINERS = {"fsdp": fsdp, "megatron": megatron, "whole": lambda model: model}


def main(rank, ranks, port, job):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=300),
    )  # fmt: skip
    for url, mode, seed, version in job["updates"]:
        model = make_model(job["kind"], seed, getattr(torch, job["dtype"]))
        source = TRAINERS[job["trainer"]](model)
        target = weights.SGLang(url, mode=mode)
        options = {"bucket_bytes": 1 << 18, "timeout": 120}
        with weights.Publisher(target, group=dist.group.WORLD, **options) as publisher:
            report = publisher.update(source, version=version)
        print(json.dumps(report.to_json()), flush=True)
        if rank == 0:
            sys.stdin.readline()  # the test has looked at the server
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
