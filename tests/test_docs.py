"""The pages: a short README, links that lead somewhere, and figures as they were measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

from loadtest import report

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")])
#: With the anchors that GitHub gives to headings.
MARKDOWN = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)


def tokens(page: Path) -> Iterator[Token]:
    for block in MARKDOWN.parse(page.read_text()):
        yield block
        yield from block.children or []


def links(page: Path) -> list[str]:
    found = (token.attrs.get("href", token.attrs.get("src")) for token in tokens(page))
    return [str(link) for link in found if link]


def test_the_readme_is_a_landing_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:20])
    assert "](loadtest/results/overview.png)" in first_screen
    assert "| nDCG@10 " in first_screen


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {ROOT / link for link in links(ROOT / "README.md")}
    assert {ROOT / "README.md", *reached} >= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        url = urlsplit(link)
        if not url.scheme:
            target = page.parent / unquote(url.path) if url.path else page
            assert target.exists(), link
            anchors = {token.attrs.get("id") for token in tokens(target)} if url.fragment else {""}
            assert url.fragment in anchors, link


def test_the_packages_page_needs_no_repository() -> None:
    assert all(urlsplit(link).scheme for link in links(ROOT / "client" / "README.md"))


def test_figures_are_those_of_the_results(tmp_path: Path) -> None:
    written = ["README.md", "loadtest/RESULTS.md", "docker/README.md"]
    shutil.copytree(ROOT / "loadtest" / "results", tmp_path / "loadtest" / "results")
    (tmp_path / "docker").mkdir()
    for name in written:
        shutil.copy(ROOT / name, tmp_path / name)
    report.main(tmp_path)
    for name in written:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "run loadtest.report"
