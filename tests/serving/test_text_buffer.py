"""Text while it comes: whole characters, nothing of a stop string, whatever the borders of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from optikit.serving.completion import TextBuffer

TEXTS = st.text(st.sampled_from("ab\u00e9\U0001f600 \n"), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


def cut(text, stops):
    """Return what stands before the stop string that is complete first; of those, before the one that begins first."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)]
    return text


@given(text=TEXTS, stops=st.lists(st.text(st.sampled_from("ab\u00e9 "), min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_before_the_first_stop_string(tokenizer, text, stops):
    buffer = TextBuffer(tokenizer, (), stops)
    pieces = [buffer.feed([token]) for token in tokenizer.encode(text).ids]  # a token is a byte
    before_the_end = "".join(pieces)
    assert cut(text, stops).startswith(before_the_end)
    assert before_the_end + buffer.rest() == cut(text, stops)


def test_text_is_held_back_no_longer_than_needed(tokenizer):
    buffer = TextBuffer(tokenizer, (), ["abc"])
    said = [buffer.feed([token]) for token in tokenizer.encode("xabaabd").ids]
    assert said == ["x", "", "", "ab", "a", "", "abd"]
