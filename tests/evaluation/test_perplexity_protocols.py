"""How a text is cut: every token scored where the protocol says so, exactly once; names that tell protocols apart."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation import perplexity_protocols as p
from optikit.evaluation.perplexity_protocols import Shape, Span


def shape(protocol, window, windows=None, stride=1):
    return Shape(protocol=protocol, window=window, windows=windows, stride=stride)


def scored(spans):
    return [position for span in spans for position in range(span.end - span.scored, span.end)]


def test_windows_start_at_the_start_and_the_tail_is_dropped():
    assert p.spans(11, shape("windows", 3, 2)) == (Span(0, 3, 2), Span(3, 6, 2))
    assert p.spans(11, shape("gptq", 3)) == (Span(0, 3, 2), Span(3, 6, 2), Span(6, 9, 2))
    with pytest.raises(p.TooShortError, match="11 tokens: 3 windows of 3 fit, 4 were asked for") as caught:
        p.spans(11, shape("windows", 3, 4))
    assert caught.value.fit == 3


@given(st.integers(0, 300), st.integers(2, 60), st.data())
def test_overlapping_windows_score_every_token_but_the_first_once(tokens, window, data):
    stride = data.draw(st.integers(1, window - 1))
    spans = p.spans(tokens, shape("hf", window, stride=stride))
    assert scored(spans) == list(range(1, tokens))
    assert all(1 <= span.scored < span.end - span.begin <= window for span in spans)
    assert [span.begin for span in spans] == list(range(0, len(spans) * stride, stride))


def lm_eval_windows(tokens, window):
    """(context, continuation) as lm-eval's documentation has them: disjoint, with one token of context at least."""
    found, done = [], 0
    while done < len(tokens) - 1:
        take = min(window, len(tokens) - 1 - done)
        context = 1 if not done or take == window else window + 1 - take
        found.append((tokens[done + 1 - context : done + 1], tokens[done + 1 : done + 1 + take]))
        done += take
    return found


@given(st.integers(1, 200), st.integers(1, 40))
def test_rolling_spans_score_every_token_of_a_document_with_at_least_one_of_context(count, window):
    tokens = list(range(count))
    spans = p.spans(count, shape("lmeval", window))
    assert scored(spans) == tokens[1:]
    cut = [(tokens[s.begin : s.end - s.scored], tokens[s.end - s.scored : s.end]) for s in spans]
    assert cut == lm_eval_windows(tokens, window)
    assert all(span.end - span.begin - 1 <= window for span in spans)  # the last token isn't read


def test_names_tell_protocols_apart():
    digest = "3f9a12cdee" + "0" * 54
    shapes = {
        "text-3f9a12cd@2048x148": shape("windows", 2048, 148),
        "text-3f9a12cd-gptq@2048": shape("gptq", 2048),
        "text-3f9a12cd-gptq@2048:first40": shape("gptq", 2048, 40),
        "text-3f9a12cd-hf@1024/512": shape("hf", 1024, stride=512),
        "text-3f9a12cd-hf@1024/256": shape("hf", 1024, stride=256),
        "text-3f9a12cd-lmeval@2048": shape("lmeval", 2048),
    }
    assert {p.name(digest, each): each for each in shapes.values()} == shapes


def test_wt2_is_what_the_file_is_not_what_it_is_called():
    assert p.name(p.WIKITEXT2, shape("lmeval", 2048)) == "wt2-lmeval@2048"
    assert p.name("0" * 64, shape("lmeval", 2048)) == "text-00000000-lmeval@2048"


ARTICLES = (
    ' \n = Robert = \n \n He @-@ acted ( on stage ) . \n = = Career = = \n \n It \'s " fine " . \n'
    " = Du Fu = \n \n A poet . \n"
)


def test_wikitext_is_prepared_as_the_field_does(monkeypatch):
    monkeypatch.setattr(p, "KNOWN_TEXTS", {"x": "wt2"})
    (joined,) = p.documents(ARTICLES, "x", "gptq")
    rows = ["" if not row.strip() else row for row in re.findall(r".*\n", ARTICLES)]
    assert joined.text == "\n\n".join(rows)
    assert joined.text.startswith("\n\n = Robert = \n\n\n")
    robert, du_fu = p.documents(ARTICLES, "x", "lmeval")
    assert robert.text == ' = Robert =\n\nHe-acted (on stage).\n== Career ==\n\nIt\'s "fine". '
    assert du_fu.text == " = Du Fu =\n\nA poet.\n"
    assert du_fu.bytes == len(" = Du Fu = \n \n A poet . \n")
    assert du_fu.words == len(["", "=", "Du", "Fu", "=", "A", "poet", ".", ""])


@pytest.mark.parametrize("protocol", ["windows", "gptq", "hf", "lmeval"])
def test_any_other_text_is_read_as_it_is(protocol):
    (document,) = p.documents(ARTICLES, "another", protocol)
    assert document.text == ARTICLES
    assert document.bytes == len(ARTICLES.encode())
