"""The page: self-contained, valid, accessible, and deaf to whatever a name says."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.report import html

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, every attribute once."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[tuple[str, str]] = []
        self.comments: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        self.comments.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def skeleton(self):
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]


@pytest.fixture(params=["full", "thin", "emitted", "hostile"])
def source(request):
    return html.render(request.getfixturevalue(f"{request.param}_report"))


def test_the_page_is_small_and_well_formed(source):
    assert len(source.encode()) < 300_000
    assert source.startswith("<!DOCTYPE html>")
    page = Page(source)
    assert page.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_runs_and_nothing_is_fetched(source):
    page = Page(source)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "form",
        "base",
        "a",
        "audio",
        "video",
        "use",
        "image",
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    style = re.search(r"<style>(.*)</style>", source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_words_add_no_element_and_no_attribute(named_report, hostile_words):
    hostile, plain = (Page(html.render(named_report(words))) for words in (hostile_words, "plain"))
    assert hostile.skeleton == plain.skeleton
    assert hostile.comments == []
    shown = "".join(words for _, words in hostile.words)
    assert "<script>alert(1)</script>" in shown  # to be read, not run
    assert "{{7*7}}" in shown
    for character in "\x1b\x9b\u202e\u2066\x00\ufeff\r":
        assert character not in shown


@settings(max_examples=15)
@given(words=st.text(min_size=1, max_size=60))
def test_any_words_add_no_element_and_no_attribute(named_report, words):
    found, plain = (Page(html.render(named_report(each))) for each in (f"→{words}", "plain"))
    assert found.skeleton == plain.skeleton


def test_it_can_be_read_aloud(source):
    page = Page(source)
    assert {"header", "main", "footer"} <= {tag for tag, _ in page.elements}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    ids = {attributes.get("id") for _, attributes in page.elements}
    for tag, attributes in page.elements:
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in ids
        if tag == "section":
            assert attributes.get("aria-labelledby")
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert [end.rsplit("-", 1)[1] for end in attributes["aria-labelledby"].split()] == ["title", "desc"]
    assert all(attributes.get("scope") for attributes in page.all("th"))


def test_every_picture_has_words_in_its_title_and_description(full_report):
    source = html.render(full_report)
    titled = re.findall(r"<svg[^>]*role=\"img\"[^>]*>|<svg[^>]*>(?=<title)", source)
    assert len(titled) >= 10
    assert len(re.findall(r"<title id=[^>]*>[^<]+</title><desc id=[^>]*>[^<]+</desc>", source)) == len(titled)


def test_sections_appear_only_with_their_numbers(full_report, thin_report):
    full, thin = html.render(full_report), html.render(thin_report)
    for section in ("tradeoff-heading", "speculation", "kl-heading", "attribution", "others", "warnings"):
        assert f'<h2 id="{section}"' in full
        assert f'<h2 id="{section}"' not in thin
    for section in ("gates", "figures", "steps", "reproduce", "environment", "definitions"):
        assert f'<h2 id="{section}"' in thin
    assert "not measured" in thin
    assert "NaN" not in full + thin
    assert "None" not in full + thin


def test_a_broken_histogram_and_free_form_speculation_are_left_out(full_report):
    quality = full_report.result.quality
    kl = quality.kl_divergence.model_copy(update={"histogram": ((0.0, 1.0, 3), (2.0, 1.0, 3))})
    result = full_report.result.model_copy(update={"quality": quality.model_copy(update={"kl_divergence": kl})})
    report = full_report.model_copy(update={"result": result, "speculation": {"acceptance_by_position": ["x"]}})
    charts = [svg for svg in Page(html.render(report)).all("svg") if svg.get("class") == "chart"]
    assert [chart["aria-labelledby"] for chart in charts] == ["tradeoff-title tradeoff-desc"]


def test_what_a_window_costs_is_drawn_and_nonsense_is_not(full_report):
    def charts(window_ms):
        speculation = {**full_report.speculation, "window_ms": window_ms}
        page = Page(html.render(full_report.model_copy(update={"speculation": speculation})))
        return [svg for svg in page.all("svg") if svg.get("aria-labelledby") == "windows-title windows-desc"]

    assert len(charts({"1": 4.15, "2": 4.64, "32": 31.0})) == 1
    for nonsense in ({}, [1.0], {"one": 4.0}, {"1": 0.0}, {"1": float("nan")}, {"1": "4"}):
        assert charts(nonsense) == []


def test_gains_are_drawn_from_two_prompts_on(full_report):
    def charts(rows):
        page = Page(html.render(full_report.model_copy(update={"speculation": {"by_prompt": rows}})))
        return [svg for svg in page.all("svg") if svg.get("aria-labelledby") == "gains-title gains-desc"]

    rows = [{"acceptance_length": 1 + i, "speedup": 0.9 + i, "predicted_speedup": 1 + i} for i in range(3)]
    assert len(charts(rows)) == 1
    for nonsense in (rows[:1], 3, [1, 2, 3], [*rows[:1], {"acceptance_length": "a"}], [*rows[:1], {"speedup": 1.0}]):
        assert charts(nonsense) == []


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(full_report, scheme):
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, on the paper and on panels."""
    blocks = re.findall(r":root \{(.*?)\}", html.render(full_report), re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})\b", blocks[scheme]))
    for ground in ("paper", "panel"):
        for ink in ("ink", "soft", "good", "warn", "bad", "accent"):
            light, dark = sorted((_luminance(colours[ground]), _luminance(colours[ink])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)
