"""TP=2 × PP=2 × EP=2: what eight_ranks.py checks."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("eight_ranks.py")
RANKS = (8,)

pytestmark = pytest.mark.distributed


def test_on_every_rank(on_every_rank):
    pass
