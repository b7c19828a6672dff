"""Whose speculator it is: digests that don't depend on who computes them, refusals that name both."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from optikit.errors import UsageError
from optikit.models import tokenizer
from optikit.runtime.speculation import fingerprint


def model(directory, value=0.0):
    directory.mkdir(parents=True)
    save_file({"w": np.full(3, value, np.float32)}, directory / "model.safetensors")
    vocabulary = {"a": int(value), "b": 1 - int(value)} if value < 2 else {"a": 7, "b": 8}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    return directory


def test_the_digest_is_of_the_weights_wherever_they_lie(tmp_path):
    first, again, other = (model(tmp_path / name, value) for name, value in (("a", 1), ("b", 1), ("c", 2)))
    assert fingerprint.weights_digest(first) == fingerprint.weights_digest(again) != fingerprint.weights_digest(other)
    assert fingerprint.weights_digest(tmp_path) == ""


@pytest.mark.parametrize("above", [True, False])
def test_a_seal_spares_reading_the_weights(tmp_path, above):
    weights = model(tmp_path / "out" / "model")
    unsealed = fingerprint.weights_digest(weights)
    digest = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    files = {("model/" if above else "") + "model.safetensors": {"size": 1, "sha256": digest}}
    (weights.parent if above else weights).joinpath("artifact.json").write_text(json.dumps({"files": files}))
    (weights / "model.safetensors").write_bytes(b"never read")
    assert fingerprint.weights_digest(weights) == unsealed


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": []}', '{"files": {"model.safetensors": 3}}'])
def test_a_seal_that_is_none_is_left_alone(tmp_path, text):
    weights = model(tmp_path / "model")
    expected = fingerprint.weights_digest(weights)
    (weights / "artifact.json").write_text(text)
    assert fingerprint.weights_digest(weights) == expected


def test_other_weights_and_other_tokenizers_are_refused_with_both_digests(tmp_path):
    mine, other = model(tmp_path / "mine", 1), model(tmp_path / "other", 2)
    digests = [fingerprint.weights_digest(each)[:12] for each in (mine, other)]
    fingerprint.require_same_weights(fingerprint.weights_digest(mine), mine)
    fingerprint.require_same_weights("", other)
    with pytest.raises(UsageError, match=rf"for weights {digests[0]}, and .*other holds {digests[1]}"):
        fingerprint.require_same_weights(fingerprint.weights_digest(mine), other)
    sums = [tokenizer.describe(each).sha256[:12] for each in (mine, other)]
    fingerprint.require_same_tokenizer(mine, mine)
    fingerprint.require_same_tokenizer(tmp_path, mine)
    with pytest.raises(UsageError, match=rf"\({sums[0]}\) is not that of .*other \({sums[1]}\)"):
        fingerprint.require_same_tokenizer(mine, other)
