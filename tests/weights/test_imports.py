import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk.weights

FILES = sorted(Path(pyrlk.weights.__file__).parent.glob("*.py"))
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg"}
# The one encoder of SGLang's payloads: it writes pickles, and reads none.
ENCODER = "sglang_payload.py"
ENCODES = {"Pickler", "dumps", "HIGHEST_PROTOCOL"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "load", "loads", "Unpickler"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_that_arrives_is_ever_evaluated(path):
    forbidden = FORBIDDEN_MODULES - ({"pickle"} if path.name == ENCODER else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & forbidden
            assert all(alias.asname is None for alias in node.names if alias.name == "pickle")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
            assert node.attr in ENCODES, f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            owner = getattr(getattr(called, "value", None), "id", "")
            assert name not in FORBIDDEN_CALLS or owner == "json", f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_it_imports_torch_the_standard_library_and_the_extension(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names}
            assert tops <= {"torch", *sys.stdlib_module_names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module == "pyrlk":
                assert [alias.name for alias in node.names] == ["_C"]
            else:
                assert node.module.split(".")[0] in {"torch", *sys.stdlib_module_names}


def test_the_loader_brings_nothing_else_into_an_engine():
    code = """
import sys, torch
before = set(sys.modules)
import pyrlk.weights.sglang_loader
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"pyrlk", "torch"} - set(sys.stdlib_module_names)))
print([m for m in ("torch._dynamo", "triton", "pyrlk.loss") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
