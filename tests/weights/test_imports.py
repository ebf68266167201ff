import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk

PACKAGE = Path(pyrlk.__file__).parent
FILES = sorted((PACKAGE / "weights").rglob("*.py"))
EVERYTHING = sorted(
    path
    for folder in (PACKAGE, PACKAGE / "triton_kernels", PACKAGE / "bench")
    for path in folder.rglob("*.py")
)
MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Encodes what SGLang unpickles; a file that would decode is listed nowhere.
ENCODER = PACKAGE / "weights" / "sglang_payload.py"


def what_evaluates(source: str) -> list[str]:
    """The imports and calls of a file that can turn data into code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            top = (node.module or "").split(".")[0]
            names = [node.module] if top in MODULES else []
            names += [f"torch.{a.name}" for a in node.names if (top, a.name) == ("torch", "load")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            whole = f"{node.value.id}.{node.attr}"
            names = [whole] if whole in ("torch.load", "np.load", "numpy.load") else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in BUILTINS else []
        found += names
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_that_arrives_is_ever_evaluated(path):
    found = what_evaluates(path.read_text())
    if path == ENCODER:
        assert set(found) == {"pickle"}
        # As a whole word: its docstring may speak of unpickling, its code may not do it.
        called = {
            n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        }
        assert not called & {"load", "loads", "Unpickler"}
    else:
        assert found == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "eval('1')", "exec(x)", "torch.load(f)",
     "from torch import load", "import marshal as m", "from _pickle import Unpickler"],
)  # fmt: skip
def test_the_search_finds(source):
    assert what_evaluates(source)


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
