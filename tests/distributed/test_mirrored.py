"""Staging on the GPUs of several ranks, over a fake driver: what mirrored.py checks."""

import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mirrored.py")
RANKS = (2,)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="needs cc"),
]


def test_on_every_rank(on_every_rank):
    pass
