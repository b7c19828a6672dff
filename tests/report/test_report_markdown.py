"""Markdown: the golden text, and words from outside that stay words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from optikit.report import markdown

GOLDEN = Path(__file__).parent / "golden"
ACTIVE = {
    "html_block",
    "html_inline",
    "link_open",
    "image",
    "em_open",
    "s_open",
    "blockquote_open",
    "ordered_list_open",
}


def tokens(source):
    for token in MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(source):
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("name", ["full", "thin"])
def test_golden(name, request):
    """`UPDATE_GOLDEN=1 pytest` writes the files anew; look at the difference before committing it."""
    rendered = markdown.render(request.getfixturevalue(f"{name}_report"))
    path = GOLDEN / f"{name}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(rendered, encoding="utf-8")
    assert rendered == path.read_text(encoding="utf-8")


def test_hostile_names_open_nothing(hostile_report):
    found = {token.type for token in tokens(markdown.render(hostile_report))}
    assert "table_open" in found
    assert not found & ACTIVE


def test_hostile_names_add_no_columns_rows_or_blocks(named_report, hostile_words):
    def shape(words):
        return [t.type for t in tokens(markdown.render(named_report(words))) if t.type.endswith(("_open", "_close"))]

    plain = [kind for kind in shape("plain") if not kind.startswith("strong")]
    assert [kind for kind in shape(hostile_words) if not kind.startswith("strong")] == plain


@given(st.text())
def test_escaped_words_are_read_back_as_they_were(value):
    from optikit import text

    html = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(f"x {markdown.escape(value)}")
    shown = html.removeprefix("<p>x").removesuffix("</p>\n").strip()
    assert "<" not in shown
    import html as entities

    expected = " ".join(text.clean(value).split())
    assert " ".join(entities.unescape(shown).replace("\u2060", "").split()) == expected


@given(st.text(alphabet="ab`| \\"))
def test_code_spans_hold_whatever_is_put_into_a_cell(value):
    lines = markdown.table(("a", "b"), [(markdown.code(value), "end")], "ll")
    cells = [t.type for t in tokens("\n".join(lines)) if t.type == "td_open"]
    assert len(cells) == 2


def test_mentions_references_and_links_are_defused():
    shown = markdown.escape("@someone #12 GH-3 http://evil.example www.evil.example")
    assert "@s" not in shown
    assert "#1" not in shown
    assert "://" not in shown
    assert "www." not in shown
