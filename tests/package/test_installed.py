"""What an installed pyrlk must hold, be it the source tree, a wheel or an sdist."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyrlk
from pyrlk import reference


def _distribution():
    return importlib.metadata.distribution("pyrlk")


def test_version_is_the_metadata_version():
    assert _distribution().version == pyrlk.__version__


def test_every_public_name_resolves():
    for name in pyrlk.__all__:
        assert getattr(pyrlk, name) is not None


def test_import_is_lazy():
    code = "import sys, pyrlk; sys.exit('torch' in sys.modules or 'pyrlk._C' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["trl_options", "verl", "slime"])
def test_the_integrations_are_installed(name):
    assert importlib.import_module(f"pyrlk.integrations.{name}").objective_of is not None


def test_top_level_is_pyrlk_alone():
    """A foreign package owns the name triton_kernels; shadowing it breaks SGLang and vLLM."""
    files = _distribution().files or []
    tops = {f.parts[0] for f in files if not f.parts[0].endswith(".dist-info")}
    assert "triton_kernels" not in tops
    if "__editable___pyrlk" not in " ".join(tops):
        assert tops <= {"pyrlk", "..", "bin"}, tops


def test_each_kernel_file_is_held_once():
    files = [str(f) for f in _distribution().files or []]
    kernels = [f for f in files if f.endswith("policy_loss.py") and "triton_kernels" in f]
    assert len(kernels) <= 1, kernels


def test_typing_files_are_installed():
    folder = Path(pyrlk.__file__).parent
    assert (folder / "py.typed").exists()
    assert (folder / "_C.pyi").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_extension_computes(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5000, generator=generator).to(dtype)
    tokens = torch.randint(5000, (4,), generator=generator)
    truth = reference.token_logprobs(logits.double(), tokens)
    torch.testing.assert_close(
        pyrlk.token_logprobs(logits, tokens).double(), truth, atol=1e-6, rtol=0
    )
    draw = pyrlk.sample(logits, top_k=5, seed=1)
    assert (draw.kept == 5).all()
