"""The arrows of the package: who may import whom, and what the CUDA path may not do.

What a wheel holds is in package/test_installed.py.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyrlk

PACKAGE = Path(pyrlk.__file__).resolve().parent
ROOT = PACKAGE.parent

# Layers, lowest first: a module may import at its own level or below, never above.
LAYERS = [
    {"_C", "triton_kernels"},
    {"_check", "_op", "_warm", "objective", "reference"},
    {
        "support",
        "_rows",
        "_plan",
        "_head",
        "logprob",
        "from_logprobs",
        "reinforce",
        "loss",
        "linear",
        "sampling",
        "speculative",
        "mtp",
        "batch",
        "parallel",
        "weights",
    },
    {"integrations", "doctor"},
    {"demo", "bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """{dotted name below pyrlk: its file}, packages under their own name."""
    found = {}
    # triton_kernels is a symlink in a source tree: rglob would not follow it.
    walk = os.walk(PACKAGE, followlinks=True)
    files = [Path(folder) / name for folder, _, names in walk for name in names]
    for path in sorted(path for path in files if path.suffix == ".py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(name):
    """Dotted names that a module imports at any depth: 'pyrlk.x.y' for its own, else as written."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                home = package[: len(package) - (node.level - 1)]
                base = ["pyrlk", *home, *base]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                inside = full.removeprefix("pyrlk.")
                yield (full if inside in MODULES or inside == "_C" else ".".join(base)), node


def top(name):
    return name.split(".")[0]


def test_the_walk_sees_the_package():
    assert {"", "loss", "sampling", "objective", "reference", "triton_kernels"} <= set(MODULES)
    assert "pyrlk.objective" in {target for target, _ in imports("loss")}


@pytest.mark.parametrize("name", [n for n in MODULES if n])
def test_imports_point_downwards(name):
    assert top(name) in LEVEL, f"give {top(name)} a place in LAYERS"
    for target, _ in imports(name):
        if target == "pyrlk" or not target.startswith("pyrlk."):
            continue
        other = top(target.removeprefix("pyrlk."))
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[top(name)], f"{name} imports {target}"


def test_nothing_imports_an_integration():
    """Not even the command line: a framework is the user's choice, made by his own import."""
    assert "integrations.verl" in MODULES
    for name in MODULES:
        if top(name) != "integrations":
            targets = {t.removeprefix("pyrlk.") for t, _ in imports(name) if t.startswith("pyrlk.")}
            assert "integrations" not in {top(t) for t in targets}, name


# A subclass of a framework's class, and a registration by import: they are for its users alone.
OF_A_FRAMEWORK = {"integrations.trl", "integrations.verl_register"}


@pytest.mark.parametrize(
    "name", [n for n in MODULES if top(n) == "integrations" and n not in OF_A_FRAMEWORK]
)
def test_an_integration_imports_its_framework_where_it_is_needed(name):
    """A mapping needs none, so its module imports none."""
    code = (
        f"import sys, pyrlk.{name}; frameworks = {{'trl', 'verl', 'slime', 'megatron'}};"
        "sys.exit(', '.join(frameworks & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def third_party(name):
    return {top(t) for t, _ in imports(name)} - set(sys.stdlib_module_names) - {"pyrlk"}


def own(name):
    return {t.removeprefix("pyrlk.") for t, _ in imports(name) if t.startswith("pyrlk.")}


def test_the_judges_and_the_kernels_are_leaves():
    assert third_party("objective") == {"torch"}
    assert own("objective") == set()
    assert third_party("reference") == {"torch"}
    assert own("reference") == {"objective"}
    for name in MODULES:
        if top(name) == "triton_kernels":
            assert third_party(name) <= {"torch", "triton"}, name
            assert all(top(t) == "triton_kernels" for t in own(name)), name
            for node in ast.walk(ast.parse(MODULES[name].read_text())):
                if isinstance(node, ast.Import):
                    assert not any(alias.name.startswith("pyrlk") for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/kernels/*")), ids=lambda p: p.name)
def test_kernels_in_cpp_know_neither_python_nor_torch(path):
    text = path.read_text()
    assert not any(word in text for word in ("Python.h", "pybind11", "torch/", "ATen"))


def test_modules_form_no_cycle():
    """Also none inside a package; an import inside a function is as much an arrow as one on top."""
    below = {name: {t for t in own(name) if t in MODULES and t != name} for name in MODULES if name}
    done, path = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        path.append(name)
        for other in sorted(below[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in below:
        visit(name)


def test_importing_pyrlk_imports_nothing_else():
    code = (
        "import sys, pyrlk; heavy = {'torch', 'triton', 'numpy', 'transformers', 'pyrlk._C'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves_and_is_listed():
    for name in pyrlk.__all__:
        assert getattr(pyrlk, name) is not None
        assert name in dir(pyrlk)
    with pytest.raises(AttributeError, match="no_such_name"):
        pyrlk.no_such_name  # noqa: B018
    source = MODULES[""].read_text()
    for name in pyrlk.__all__:
        assert f" {name} as {name}" in source, f"{name} is missing under TYPE_CHECKING"


def test_the_kernel_folder_refuses_to_be_a_package_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "pyrlk.triton_kernels" in done.stderr


SYNCHRONISES = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "unique"}
# Functions that read values: they run on CPU alone, or on host data, or are documented to wait.
HOST = {
    "sampling": {"row_value_error", "_run_cpu", "rows", "trim", "from_lists", "to_mask"},
    "loss": set(),
    "_plan": set(),
    "from_logprobs": set(),
    "reinforce": set(),
    "logprob": set(),
    "_check": {
        "mask_values", "cu_seqlens_values", "temperature_values", "normalizer_value", "bad_token"
    },
    "_op": {"_scale_cpu"},
    "_rows": set(),
    "parallel.vocab": {"_layout"},  # in a group's first call with a layout
    "parallel.digits": {"_support", "_candidates"},
}  # fmt: skip


@pytest.mark.parametrize("name", HOST)
def test_the_cuda_path_never_waits_for_the_device(name):
    """No .item() and its kin outside the functions of the host."""
    for function in ast.walk(ast.parse(MODULES[name].read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name in HOST[name]:
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Attribute):
                assert called.attr not in SYNCHRONISES, f"{name}.{function.name}: .{called.attr}()"


FLAGS = {"temperature", "joint", "keep_ties", "exact"}


@pytest.mark.parametrize("name", [n for n in MODULES if top(n) == "triton_kernels"])
def test_launchers_never_wait_for_the_device(name):
    """What a CUDA graph captures: no value of a tensor reaches the host."""
    for function in ast.walk(ast.parse(MODULES[name].read_text())):
        if not isinstance(function, ast.FunctionDef) or is_kernel(function):
            continue
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            where = f"{name}.{function.name}: {ast.unparse(call)}"
            if isinstance(call.func, ast.Attribute):
                assert call.func.attr not in SYNCHRONISES, where
            elif isinstance(call.func, ast.Name) and call.func.id in ("bool", "int", "float"):
                # Numbers of the host: terms, flags, a temperature that is no tensor.
                argument = ast.unparse(call.args[0])
                assert argument.startswith("terms.") or argument in FLAGS, where


@pytest.mark.parametrize("name", ["_op", "logprob", "loss", "reinforce"])
def test_cuda_kernels_of_an_op_read_no_value(name):
    found = False
    for function in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_cuda"):
            found = True
            called = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
            assert not called & {"bool", "int", "float"}, f"{name}.{function.name}"
            assert not {c.split(".")[-1] for c in called} & SYNCHRONISES, f"{name}.{function.name}"
    assert found


def is_kernel(function):
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


MEMORY = {"warm_tensor", "release_warm_pages"}  # of _C, and no kernels


def loads(node):
    """Names that a piece of code reads, and whether kernels of _C are among them."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    native = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
              and isinstance(n.value, ast.Name) and n.value.id == "_C"}  # fmt: skip
    return names, bool(native - MEMORY)


@pytest.mark.parametrize("name", ["_op", "logprob", "loss", "reinforce", "sampling"])
def test_cuda_functions_never_call_the_cpu_kernels(name):
    """C++ stands in functions named _cpu alone, and those are called through by_device alone."""
    tree = ast.parse(MODULES[name].read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    kernels = {f.name for f in functions if f.name.endswith(("_cpu", "_cuda"))}
    assert any(loads(f)[1] for f in functions), "no kernel was found"
    for function in functions:
        names, native = loads(function)
        if name == "sampling":  # a body for each device
            assert not native or "cuda" not in function.name, f"{name}.{function.name}"
        else:
            assert not native or function.name.endswith("_cpu"), f"{name}.{function.name}"
            assert not names & kernels, f"{name}.{function.name} picks a device by itself"
