"""Reads jobs, one JSON line each; forks a publisher for each, which kills itself at a named state.

The parent never uses OpenMP or shared memory: a forked child could not use them after that.
"""

import itertools
import json
import os
import signal
import sys

import torch
from safetensors.torch import load_file

from pyrlk import weights
from pyrlk.weights import memory, sglang_plan, sglang_server


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner, name, times=1):
    """Let owner.name do its work so often, then die."""
    method = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        result = method(*args, **kwargs)
        if next(calls) == times:
            die()
        return result

    setattr(owner, name, wrapped)


# The states of an update, in their order; "checked" and "handed over" are plan mode's own.
STATES = {
    "paused": lambda: after(sglang_server.Server, "pause"),
    "flushed": lambda: after(sglang_server.Server, "flush"),
    "marked": lambda: after(sglang_server.Server, "set_version"),
    "begun": lambda: after(sglang_server.Server, "begin"),
    "checked": lambda: after(sglang_plan.PlanSession, "_judge"),
    "packed": lambda: after(memory.Segment, "pack"),
    "handed over": lambda: after(sglang_plan.PlanSession, "_send"),
    "updated": lambda: after(sglang_server.Server, "update"),
    "ended": lambda: after(sglang_server.Server, "end"),
    "versioned": lambda: after(sglang_server.Server, "set_version", 2),
}


def publish(job):
    torch.set_num_threads(1)
    if job["state"]:
        STATES[job["state"]]()
    target = weights.SGLang(job["url"], mode=job["mode"])
    with weights.Publisher(target, timeout=60) as publisher:
        publisher.update(load_file(job["file"]), version=job["version"])


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            publish(json.loads(line))
            status = 0
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
