"""Speculator directories: read back what was written, prefer what was tuned, refuse what is damaged."""

import json
from dataclasses import replace

import numpy as np
import pytest

from optikit import runtime
from optikit.errors import InputMissingError, IntegrityError
from optikit.runtime.speculation import ngram_table, speculator
from optikit.runtime.speculation.drafters import NoDraft, PromptLookup
from optikit.runtime.speculation.speculator import SpeculatingDecoder, Speculator
from tests.runtime.speculation.markov import MarkovDecoder

LOOKUP = Speculator(method="lookup", lengths={3: 8, 2: 4}, min_window=2)


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "speculator.json").write_text(json.dumps(LOOKUP.as_json() | {"loads_in": {"vllm": ">=0.10"}}))
    assert speculator.read(tmp_path) == LOOKUP
    (tmp_path / "tuning.json").write_text(json.dumps(LOOKUP.as_json() | {"method": "off"}))
    assert speculator.read(tmp_path).method == "off"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"method": "eagle", "lengths": {}, "gate": 0.4, "min_window": 1}',
        '{"method": "lookup", "lengths": {"2": 1}, "gate": 0, "min_window": 1}',
        '{"method": "lookup", "lengths": {"2": 0}, "gate": 0.4, "min_window": 1}',
        '{"method": "lookup", "lengths": {"two": 1}, "gate": 0.4, "min_window": 1}',
        '{"method": "lookup", "lengths": {"2": 1}, "gate": 0.4, "min_window": 3}',
    ],
)
def test_damage_is_named(tmp_path, text):
    (tmp_path / "speculator.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"speculator\.json is"):
        speculator.read(tmp_path)


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(InputMissingError, match=r"has no speculator\.json"):
        speculator.read(tmp_path)


def test_drafters_by_method():
    drafter = LOOKUP.drafter()
    assert isinstance(drafter, PromptLookup)
    assert drafter.lengths == {3: 8, 2: 4}
    assert isinstance(Speculator(method="off").drafter(), NoDraft)
    assert isinstance(Speculator(method="lookup").drafter(), NoDraft)


def test_habits_come_between_long_matches_and_single_tokens():
    datastore = ngram_table.build([(np.array([9]), np.array([5, 6, 7]))] * 9)
    drafter = replace(LOOKUP, lengths={2: 3, 1: 1}, datastore=datastore).drafter()
    rng = np.random.default_rng(0)

    def by(*text):
        drafter.start(np.array(text))
        draft = drafter.draft(8, rng)
        return draft.by, draft.tokens.tolist()

    assert by(5, 1, 2, 3, 5, 1) == ("lookup", [2, 3, 5])
    assert by(1, 3, 1, 2, 5) == ("ngram", [6, 7])
    assert by(1, 3, 2, 1) == ("lookup", [3])
    only = replace(LOOKUP, lengths={}, datastore=datastore).drafter()
    only.start(np.array([5]))
    assert only.draft(8, rng).by == "ngram"


def test_a_tuned_speculator_brings_its_datastore(tmp_path):
    datastore = ngram_table.build([(np.array([9]), np.array([5, 6, 7]))])
    files = speculator.write_tuning(replace(LOOKUP, datastore=datastore), tmp_path, {"predicted_speedup": 1.5})
    assert files == ("tuning.json", "ngrams.safetensors")
    found = speculator.read(tmp_path)
    assert found == LOOKUP
    assert found.datastore.after([5]) == datastore.after([5])
    assert json.loads((tmp_path / "tuning.json").read_text())["predicted_speedup"] == 1.5
    (tmp_path / "off").mkdir()
    off = speculator.write_tuning(replace(LOOKUP, datastore=datastore, method="off"), (tmp_path / "off"), {})
    assert off == ("tuning.json",)


def test_older_outputs_are_read_under_their_names(tmp_path):
    datastore = ngram_table.build([(np.array([9]), np.array([5, 6, 7]))])
    for name in speculator.write_tuning(replace(LOOKUP, datastore=datastore), tmp_path, {}):
        (tmp_path / name).rename(tmp_path / speculator.FORMER[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choice.json", "recall.safetensors"]
    found = speculator.read(tmp_path)
    assert found == LOOKUP
    assert found.datastore.after([5]) == datastore.after([5])


def test_a_speculating_decoder_is_a_decoder_with_the_same_texts():
    prompt = np.array([1, 2, 3])
    inner = MarkovDecoder()
    decoder = SpeculatingDecoder(inner, LOOKUP)
    assert list(decoder.greedy(prompt, 50)) == list(MarkovDecoder().greedy(prompt, 50))
    assert decoder.statistics.acceptance_length > 1.2
    assert min(inner.windows) == 2
    assert (decoder.vocab, decoder.max_tokens, decoder.runtime) == (8, 4096, "toy")
    np.testing.assert_array_equal(decoder.forward(prompt, 0, 1), MarkovDecoder().forward(prompt, 0, 1))
    stopped = decoder.greedy(prompt, 50)
    next(stopped)
    stopped.close()
    assert list(decoder.greedy(prompt, 5)) == list(MarkovDecoder().greedy(prompt, 5))


def test_switched_off_is_the_plain_decoder():
    inner = MarkovDecoder()
    assert speculator.speculating(inner, Speculator(method="off")) is inner


def test_loading_finds_what_a_run_left_beside_the_model(tmp_path, tiny_llama):
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "speculator").mkdir()
    (tmp_path / "speculator" / "speculator.json").write_text(json.dumps(LOOKUP.as_json()))
    found = runtime.load(tmp_path, dtype="float32", threads=1)
    assert isinstance(found, SpeculatingDecoder)
    prompt = np.arange(10, 20)
    plain = runtime.load(tmp_path, dtype="float32", threads=1, speculator=None)
    assert not isinstance(plain, SpeculatingDecoder)
    assert list(found.greedy(prompt, 20)) == list(plain.greedy(prompt, 20))
    assert not isinstance(runtime.load(tmp_path / "model", dtype="float32", threads=1), SpeculatingDecoder)
    named = runtime.load(tiny_llama, dtype="float32", threads=1, speculator=tmp_path / "speculator")
    assert isinstance(named, SpeculatingDecoder)
