"""The documentation as a reader meets it: built strictly, opened from a folder in a browser that has no network."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PUBLIC = ("megablocks", "megablocks.functional", "megablocks.models", "megablocks.huggingface")
LOADED = re.compile(r"""(?:\bsrc=|<link\b[^>]*\bhref=|url\(|@import\s)["']?((?:https?:)?//[^"')\s>]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as continuous integration builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_nothing_public_is_missing_from_the_reference():
    entries = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        entries |= set(re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    shown = {id(thing) for thing in map(_find, entries)}
    for room in (*PUBLIC, "megablocks.interop.fairseq"):
        module = importlib.import_module(room)
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                assert id(thing) in shown, f"{room}.{name} stands on no page of docs/api"
    state = importlib.import_module("megablocks.state")
    for name, thing in vars(state).items():
        if callable(thing) and not name.startswith("_") and inspect.getmodule(thing) is state:
            assert id(thing) in shown, f"megablocks.state.{name} stands on no page of docs/api"


def _find(path: str) -> Any:
    """What a dotted path names."""
    parts = path.split(".")
    thing: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if hasattr(thing, part) and not (inspect.ismodule(thing) and depth < len(parts)):
            thing = getattr(thing, part)
        else:
            thing = importlib.import_module(".".join(parts[:depth]))
    return thing


def test_no_page_names_a_foreign_host_to_load_from(site):
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    assert len(files) > 20
    for path in files:
        assert not LOADED.findall(path.read_text(encoding="utf-8")), path


@pytest.fixture
def browser() -> Iterator[Any]:
    """A browser without a network."""
    if BROWSER is None:
        pytest.skip("needs Chromium: `apt-get install chromium`, or Chrome")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def _listen(page: Any, troubles: list[str]) -> None:
    """Notes what a page asks another host for, and what it complains about."""
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or troubles.append(r.url))
    page.on("console", lambda m: m.type in ("error", "warning") and troubles.append(m.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))


def test_every_page_shows_whole_from_a_folder(site, browser):
    troubles: list[str] = []
    for width, scheme in ((1300, "light"), (400, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page = context.new_page()
        _listen(page, troubles)
        for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # that one is for servers
            page.goto(path.as_uri())
            found = page.evaluate(
                """() => ({
                    unset: document.querySelectorAll(".arithmatex:not(:has(.katex))").length,
                    misread: document.querySelectorAll(".katex-error").length,
                    unseen: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
                    nameless: [...document.images].filter(i => !i.alt).map(i => i.src),
                    wide: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
                    unturned: [...document.querySelectorAll(".md-typeset img[src$='.svg']")]
                        .filter(i => (getComputedStyle(i).filter === "none") !==
                                     (document.body.dataset.mdColorScheme === "default")).map(i => i.src),
                })"""
            )
            troubles += [f"{path.name} at {width}: {name} {what}" for name, what in found.items() if what]
        context.close()
    assert not troubles


def test_search_finds_a_class_and_code_copies(site, browser):
    context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto((site / "index.html").as_uri())
    page.click("[data-md-type=copy] >> nth=1")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("import torch\nfrom megablocks import MovingAverageGatedAttention")

    for name, where in (("MultiDimensionDampedEMA", "api/layers.html"), ("MegaForCausalLM", "api/huggingface.html")):
        page.goto((site / "index.html").as_uri())  # anew: a search is begun by keys, which `fill` does not press
        page.fill("input.md-search__input", name)
        page.wait_for_selector(f".md-search-result__link[href*='{where}']", state="attached", timeout=60_000)
    context.close()
