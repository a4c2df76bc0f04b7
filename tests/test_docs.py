"""Every Python block of the README and of the pages runs, from top to bottom of its page, and prints what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.compile  # pages may compile, and are run as a reader's Python would run them
@every_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    text = page.read_text(encoding="utf-8")
    printed = pages.run(page)
    for block, output in zip(pages.blocks(text), printed, strict=True):
        assert bool(output.strip()) == bool(block.title), f"{page}:{block.line}: the page and the code differ: {output}"
        if block.same_everywhere:
            assert pages.without_numbers(block.shown) == pages.without_numbers(output), f"{page}:{block.line}"
    assert {path.name for path in tmp_path.glob("*.svg")} == pages.figures(text)


@every_page
def test_links_lead_somewhere(page):
    for target in LINK.findall(_without_code(page)):
        assert (page.parent / target).exists(), target


@every_page
def test_no_place_was_left_to_fill_in(page):
    assert not re.search(r"\b[A-Z]+_[A-Z_]+\b(?!=)", re.sub(r"`[^`]*`", "", _without_code(page)))


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_readme_names_its_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 'pip install -c constraints.txt -e ".[examples]" && python examples/train_byte_lm.py' in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in lines


def test_outputs_are_written_behind_their_blocks():
    text = 'a\n```python\nprint(1)\n```\n\n```text title="output"\nold\n```\nb\n```python\nx = 1\n```\nc\n'
    again = pages.written(text, ["one\n", ""])
    assert again == text.replace("\n\n```text", "\n\n```text").replace("old", "one")
    assert pages.written(again, ["one\n", ""]) == again
    assert [block.shown for block in pages.blocks(again)] == ["one\n", ""]


def test_the_dark_figure_of_the_readme_is_the_light_one_turned_over():
    light, dark = ((ROOT / "docs" / "assets" / f"mega_layer{kind}.svg").read_text() for kind in ("", "_dark"))
    assert dark == light.replace('640"', '640" style="filter: invert(1) hue-rotate(180deg)"', 1)
