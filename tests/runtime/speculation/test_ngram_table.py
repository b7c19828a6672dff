"""NGramDrafter: the table against counting by hand, and drafts that follow it."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import IntegrityError
from optikit.runtime.speculation import ngram_table
from optikit.runtime.speculation.drafters import EMPTY
from optikit.runtime.speculation.ngram_table import LONGEST, NGramDrafter

RNG = np.random.default_rng(0)
documents = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=5), st.lists(st.integers(0, 4), max_size=12)), max_size=5
)


def arrays(texts):
    return [(np.array(prompt, np.int64), np.array(text, np.int64)) for prompt, text in texts]


def slow_table(texts):
    """Count successors of every n-gram that ends before a token of a text."""
    counts = defaultdict(Counter)
    for prompt, text in texts:
        whole = [*prompt, *text]
        for at in range(len(prompt), len(whole)):
            for n in range(1, LONGEST + 1):
                if at >= n:
                    counts[tuple(whole[at - n : at])][whole[at]] += 1
    return counts


@settings(max_examples=200)
@given(texts=documents, context=st.lists(st.integers(0, 4), max_size=6))
def test_the_table_equals_counting(texts, context):
    table, counts = ngram_table.build(arrays(texts)), slow_table(texts)
    assert len(table.keys) == len(counts)
    known = [tuple(context[-n:]) for n in range(min(LONGEST, len(context)), 0, -1) if tuple(context[-n:]) in counts]
    found = table.after(context)
    if not known:
        assert found is None
        return
    of = counts[known[0]]
    most = max(of.values())
    assert found[0] == min(token for token, count in of.items() if count == most)
    assert found[1] == pytest.approx(most / (of.total() + 1))


def test_hashes_agree_for_one_and_for_many():
    windows = np.random.default_rng(0).integers(0, 200_000, (500, 3))
    assert ngram_table._hashes(windows).tolist() == [ngram_table._hash(row) for row in windows.tolist()]
    assert ngram_table._hash([0]) != ngram_table._hash([0, 0])
    many = ngram_table._hashes(np.random.default_rng(1).integers(0, 50_000, (200_000, 4)))
    assert len(np.unique(many)) == len(many)


def test_drafts_follow_the_table_up_to_the_gate():
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    once = ngram_table.build(arrays([([0], text)]))
    twice = ngram_table.build(arrays([([0], text)] * 2))
    often = ngram_table.build(arrays([([0], text)] * 20))

    def draft(table, gate, limit=8, length=8):
        drafter = NGramDrafter(table, gate=gate, length=length)
        drafter.start(np.array([0]))
        drafter.extend(np.array([1, 2]), None)
        return drafter.draft(limit, RNG).tokens.tolist()

    assert draft(once, 0.4) == [3]  # a half, then a quarter
    assert draft(twice, 0.4) == [3, 4]
    assert draft(often, 0.4) == [3, 4, 5, 6, 7, 8]
    assert draft(often, 0.4, length=2) == [3, 4]
    assert draft(often, 0.4, limit=1) == [3]
    assert draft(once, 0.6) == []
    drafter = NGramDrafter(often)
    drafter.start(np.array([99, 98]))
    assert drafter.draft(4, RNG) is EMPTY


def test_what_comes_after_a_prompt_is_recalled_but_no_prompt():
    table = ngram_table.build(arrays([([7, 8, 9], [1, 2])]))
    assert table.after([7, 8, 9])[0] == 1
    assert table.after([7]) is None


def test_tables_are_files(tmp_path):
    table = ngram_table.build(arrays([([1], [2, 3, 2, 4])]))
    ngram_table.save(table, tmp_path / "table.safetensors")
    found = ngram_table.load(tmp_path / "table.safetensors")
    np.testing.assert_array_equal(found.keys, table.keys)
    assert found.after([1]) == table.after([1])
    assert ngram_table.build([]).after([1]) is None


def test_damaged_tables_are_named(tmp_path):
    path = tmp_path / "table.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(IntegrityError, match="isn't a datastore"):
        ngram_table.load(path)
    table = ngram_table.build(arrays([([1], [2, 3, 2, 4])]))
    ngram_table.save(ngram_table.NGramDatastore(table.keys[::-1].copy(), table.tokens, table.sure), path)
    with pytest.raises(IntegrityError, match="out of order"):
        ngram_table.load(path)
