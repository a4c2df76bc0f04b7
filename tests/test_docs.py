"""Every Python block of the README and of the pages runs, from top to bottom of its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_place_was_left_to_fill_in(page):
    assert not re.search(
        r"\b[A-Z]+_[A-Z_]+\b(?!=)", BLOCK.sub("", page.read_text(encoding="utf-8")).replace("HYPOTHESIS_PROFILE", "")
    )


def test_the_readme_names_its_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 'pip install -c constraints.txt -e ".[examples]" && python examples/train_byte_lm.py' in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in lines
