"""The guide: every python block of these pages runs, a page in one namespace, and links resolve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
# weights.md shows two processes and stays out: tests/weights runs them.
PAGES = ["losses", "logprobs", "from_logprobs", "linear", "batch", "mtp"]


def blocks(page):
    text = (DOCS / f"{page}.md").read_text()
    return [
        (text.count("\n", 0, m.start(1)), m[1])
        for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page):
    found, names = blocks(page), {}
    assert found, "no code on this page"
    for line, code in found:
        exec(compile("\n" * line + code, f"docs/{page}.md", "exec"), names)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_links_of_a_page_resolve(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (DOCS / target).exists(), target
