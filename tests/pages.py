"""Runs the Python blocks of a page of the documentation, from top to bottom.

    python tests/pages.py docs/tutorials/padding.md             runs the page in a folder of its own
    python tests/pages.py --write docs/tutorials/padding.md     and puts what it prints and draws where readers see it

A block of Python is followed by a block titled `output` where it prints something, or by one titled
`output, for example` where another machine may print other words. Figures are the SVG files that the page's code saves;
they stand in `figures/` beside the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TITLE = "output"
BLOCK = re.compile(r"^```python[^\n]*\n(?P<code>.*?)^```\n", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r'\n*```text title="(?P<title>output[^"]*)"\n(?P<text>.*?)^```\n', re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"!\[[^\]]*\]\(figures/([^)]+)\)")
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


class Block(NamedTuple):
    """A block of Python and what the page says that it prints."""

    code: str
    line: int
    title: str  # empty where the page shows no output
    shown: str
    span: tuple[int, int]  # where code and output stand in the page
    code_end: int

    @property
    def same_everywhere(self) -> bool:
        """Whether every machine prints these words, numbers aside."""
        return self.title in ("", TITLE)


def blocks(text: str) -> list[Block]:
    """The blocks of Python in a page."""
    found = []
    for match in BLOCK.finditer(text):
        output = OUTPUT.match(text, match.end())
        title, shown = (output["title"], output["text"]) if output else ("", "")
        end = output.end() if output else match.end()
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(match["code"], line, title, shown, (match.start(), end), match.end()))
    return found


def run(page: Path) -> list[str]:
    """Runs a page's blocks where the process stands, and returns what each printed."""
    import matplotlib.pyplot as plt

    style = page.parent / "matplotlibrc"
    names: dict[str, object] = {"__name__": page.stem}
    printed = []
    with plt.rc_context(fname=style if style.exists() else None):
        for block in blocks(page.read_text(encoding="utf-8")):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                # As many empty lines in front as make a traceback name the line of the page.
                exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            printed.append(out.getvalue())
        plt.close("all")
    return printed


def without_numbers(text: str) -> list[str]:
    """The words of a text, each number replaced by a sign."""
    return NUMBER.sub("#", text).split()


def figures(text: str) -> set[str]:
    """The figures that a page shows and draws."""
    return set(FIGURE.findall(text))


def written(text: str, printed: list[str]) -> str:
    """The page with its outputs replaced by what was printed."""
    for block, output in reversed(list(zip(blocks(text), printed, strict=True))):
        fence = f'\n```text title="{block.title or TITLE}"\n{output.rstrip()}\n```\n' if output.strip() else ""
        text = text[: block.code_end] + fence + text[block.span[1] :]
    return text


def main(arguments: list[str] | None = None) -> None:
    """Runs pages, and writes what they print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put outputs and figures into the documentation")
    options = parser.parse_args(arguments)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # figures drawn again are the same files
    os.environ.setdefault("MPLBACKEND", "agg")
    for page in [page.resolve() for page in options.pages]:
        text = page.read_text(encoding="utf-8")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            printed = run(page)
            seconds = time.perf_counter() - start
            drawn = sorted(Path(folder).glob("*.svg"))
            if options.write:
                page.write_text(written(text, printed), encoding="utf-8")
                for figure in drawn:
                    (page.parent / "figures").mkdir(exist_ok=True)
                    shutil.copy(figure, page.parent / "figures" / figure.name)
            else:
                print("\n".join(output for output in printed if output), end="")
            os.chdir(page.parent)  # out of the folder that is about to go
        print(f"{page.name}: {seconds:.1f} s, {len(drawn)} figures", file=sys.stderr)


if __name__ == "__main__":
    main()
