"""docs/frameworks.md and the tests of deviations name each other, so that neither can go stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "frameworks.md"


@pytest.mark.skipif(not PAGE.exists(), reason="an installed copy without docs")
def test_every_deviation_has_a_row_and_a_test():
    named = re.findall(r"`(test_deviation_\w+)`", PAGE.read_text())
    tests = [
        name
        for file in sorted(HERE.glob("test_*.py"))
        for name in re.findall(r"^def (test_deviation_\w+)", file.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == sorted(tests)
    assert len(set(named)) == len(named)
