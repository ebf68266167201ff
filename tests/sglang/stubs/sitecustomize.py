"""Runs at the start of every process of the tested server.

torchvision's wheel is linked against CUDA: beside a CPU torch its operators are undeclared, and its
import dies of that. Faults: with PYRLK_TEST_FAULTS=FOLDER, load_weights of Qwen3 raises on the rank
whose file FOLDER/raise-<rank> exists, after its first tensors; after as many passes as that file
has bytes.
"""

import importlib.abc
import importlib.util
import os
import sys


class _Torchvision(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _Torchvision.library is None:
            import torch

            if not torch.version.cuda:
                library = _Torchvision.library = torch.library.Library("torchvision", "DEF")
                for op in ("nms", "qnms"):
                    library.define(f"{op}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return None


class _Faults(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "sglang.srt.models.qwen3":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.wrap(module.Qwen3ForCausalLM)

        spec.loader.exec_module = exec_module
        return spec

    def wrap(self, model):
        load_weights = model.load_weights

        def faulty(self, weights):
            import torch.distributed as dist

            path = f"{os.environ['PYRLK_TEST_FAULTS']}/raise-{dist.get_rank()}"
            left = os.path.getsize(path) if os.path.exists(path) else -1
            if left > 0:
                os.truncate(path, left - 1)

            def some():
                for count, pair in enumerate(weights):
                    if count == 3 and left == 0:
                        raise RuntimeError("injected into load_weights")
                    yield pair

            return load_weights(self, some())

        model.load_weights = faulty


sys.meta_path.insert(0, _Torchvision())
if os.environ.get("PYRLK_TEST_FAULTS"):
    sys.meta_path.insert(0, _Faults())
