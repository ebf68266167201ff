"""Run by SGLang's interpreter: imports a server once, and forks one for each line of stdin.

    {"flags": ["--model-path", …], "env": {…}, "log": PATH}  →  the server's pid, also its group's

SGLang itself is unmodified; a server's processes are forked where it would spawn them, since each
would otherwise import everything again. When stdin ends, even by SIGKILL of the tests, or when this
process dies, every server dies with all of its processes.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1


def warm():
    """What every process of a server imports; none of it starts a thread or uses OpenMP."""
    for name in (
        "sglang.launch_server",
        "sglang.srt.plugins",
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.detokenizer_manager",
        "pyrlk.weights.sglang_loader",
    ):
        importlib.import_module(name)
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()
    gc.freeze()  # every /flush_cache on a CPU collects: half a second over all of these modules


def serve(job):
    """This process becomes one server."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(job["env"])
    sys.argv = ["sglang.launch_server", *job["flags"]]
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=True)

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(sys.argv[1:]))


SERVERS = set()


def reap(*_):
    """A server that has ended is nobody's zombie, and its number may soon be another's."""
    for server in list(SERVERS):
        if os.waitpid(server, os.WNOHANG)[0]:
            SERVERS.discard(server)


def main():
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints while it is imported is no answer
    warm()
    signal.signal(signal.SIGCHLD, reap)
    for line in jobs:
        child = os.fork()
        if child == 0:
            try:
                jobs.close()
                answers.close()
                serve(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        SERVERS.add(child)
        print(child, file=answers, flush=True)
    for server in list(SERVERS):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server, signal.SIGKILL)
    os._exit(0)  # without taking all those modules apart


if __name__ == "__main__":
    main()
