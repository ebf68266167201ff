"""weights.gather over 2 and 4 gloo processes: what gather_ranks.py checks, one test a check."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gather_ranks.py")

pytestmark = pytest.mark.distributed


def test_on_every_rank(on_every_rank):
    pass
