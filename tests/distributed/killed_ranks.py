"""Reads jobs, one JSON line each; forks the ranks of a trainer, of which one kills itself.

    {"url", "mode", "port", "ranks", "victim", "delay", "timeout", "out"}

Every rank publishes version after version, gathered from FSDP2 shards that are all of that value,
until it dies or fails; what it met lies in `out`.RANK. The parent starts no thread: a forked child
could not go on from it.
"""

import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from engines import Fused
from toy_megatron import put

from pyrlk import weights


def publish(job, rank):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{job['port']}",
        rank=rank,
        world_size=job["ranks"],
        timeout=datetime.timedelta(seconds=60),
    )
    checkpoint = Fused.checkpoint(0)
    model = nn.Module()
    for name, tensor in checkpoint.items():
        put(model, name, tensor)
    fully_shard(model, mesh=init_device_mesh("cpu", (job["ranks"],)))
    timeout = job["timeout"]
    source = weights.gather.dtensor(model, timeout=timeout)
    expect = {name: tensor.to("meta") for name, tensor in checkpoint.items()}
    target = weights.SGLang(job["url"], mode=job["mode"], expect=expect)
    publisher = weights.Publisher(
        target, group=dist.group.WORLD, timeout=timeout, bucket_bytes=job["bucket_bytes"]
    )
    version, began = 0, 0.0
    met = {"kind": None}
    try:
        while True:
            version += 1
            for parameter in model.parameters():
                parameter.to_local().fill_(version)
            began = time.monotonic()
            publisher.update(source, version=version)
            if version == 1 and rank == job["victim"]:
                threading.Timer(job["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    except weights.UpdateError as error:
        met = {"kind": type(error).__name__, "message": str(error), "dirty": error.dirty}
    except Exception:
        met["message"] = traceback.format_exc()
    met |= {"version": version, "seconds": time.monotonic() - began}
    Path(f"{job['out']}.{rank}").write_text(json.dumps(met))


def main():
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if child == 0:
                try:
                    publish(job, rank)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        print("done", flush=True)


if __name__ == "__main__":
    main()
