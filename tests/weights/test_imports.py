import ast
import sys
from pathlib import Path

import pytest

import pyrlk.weights

FILES = sorted(Path(pyrlk.weights.__file__).parent.glob("*.py"))
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "load", "loads", "Unpickler"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_that_arrives_is_ever_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            assert name not in FORBIDDEN_CALLS, f"line {node.lineno}"


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
