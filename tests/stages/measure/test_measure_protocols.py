"""Named perplexity protocols against slow loops over transformers, and what they can't be asked for."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

from optikit.errors import InputMissingError, StageFailedError
from optikit.evaluation import perplexity_protocols, statistics
from optikit.models import tokenizer
from optikit.recipe.schema import PerplexityOptions
from optikit.stage import Job
from optikit.stages.measure import quality

BASE = {"runtime": "transformers", "dtype": "float32"}
GPTQ = {"protocol": "gptq", "window": 48, "windows": None}
HF = {"protocol": "hf", "window": 48, "windows": None, "stride": 20}
LMEVAL = {"protocol": "lmeval", "window": 48, "windows": None}


def measure(dest, source, text, tokenizer, baseline=None, **options):
    dest.mkdir()
    inputs = {"text": text, "tokenizer": tokenizer} | ({"baseline": baseline} if baseline else {})
    job = Job(source=source, dest=dest, scratch=dest.with_name("scratch"), inputs=inputs, threads=1)
    chosen = quality.Options.model_validate(BASE | {"keep_logits": baseline is None} | options)
    return json.loads(json.dumps(quality.run(chosen, job), allow_nan=False))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two WikiText articles of unequal length, with letters of several bytes."""
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    first = "A stone bridge ( built 1 @,@ 204 ) crosses the r\u00eda . \n" * 9
    path.write_text(f" \n = Bridge = \n \n {first} = Caf\u00e9 = \n \n Coffee is drunk here . \n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(tiny_llama, tmp_path_factory):
    """`tiny_llama` whose tokenizer opens every text with <s>, as Llama's does."""
    directory = tmp_path_factory.mktemp("opened") / "model"
    shutil.copytree(tiny_llama, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def tokens(directory, text):
    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids


def log_likelihoods(model, context, continuation):
    """ln p of every token of `continuation` after `context`, one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return rows.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()


def slow_gptq(model, ids, window):
    found = []
    for index in range(len(ids) // window):
        piece = ids[index * window : (index + 1) * window]
        found += log_likelihoods(model, piece[:1], piece[1:])
    return found


def slow_hf(model, ids, window, stride):
    found, before = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        found += log_likelihoods(model, ids[begin:before], ids[before:end])
        before = end
        if end == len(ids):
            return found
    raise AssertionError


def slow_lm_eval(model, ids, opening, window):
    """As lm-eval's rolling windows are defined: predict `window` tokens, then the next, always with a token before."""
    found, done = [], 0
    while done < len(ids):
        continuation = ids[done : done + window]
        context = [opening, *ids][: done + 1][-max(1, window - len(continuation) + 1) :]
        found += log_likelihoods(model, [opening] if done == 0 else context, continuation)
        done += len(continuation)
    return found


@pytest.mark.parametrize("directory", ["tiny_llama", "opened"])
def test_every_protocol_agrees_with_a_slow_loop(directory, request, model, text, tmp_path):
    source = request.getfixturevalue(directory)
    written = text.read_text(encoding="utf-8")
    ids = tokens(source, written)
    expected = {
        "gptq": (GPTQ, slow_gptq(model, ids, 48)),
        "hf": (HF, slow_hf(model, ids, 48, 20)),
        "lmeval": (LMEVAL, slow_lm_eval(model, ids, 0, 48)),
    }
    for name, (options, likelihoods) in expected.items():
        found = measure(tmp_path / name, source, text, source, **options)["perplexity"]
        assert found["tokens"] == len(likelihoods), name
        assert found["value"] == pytest.approx(math.exp(-np.mean(likelihoods)), rel=1e-4), name
    total = -sum(expected["lmeval"][1])
    assert found["word_perplexity"] == pytest.approx(math.exp(total / len(re.split(r"\s+", written))), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / len(written.encode())), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(written.encode()), rel=1e-4)


def slow_opened_windows(model, ids, opening, window, windows):
    """Pieces of window - 1 tokens, each behind the token that opens a text, all of them scored."""
    own = window - 1
    pieces = [ids[index * own : (index + 1) * own] for index in range(windows)]
    return [each for piece in pieces for each in log_likelihoods(model, [opening], piece)]


def test_windows_open_as_the_tokenizer_opens_texts(tiny_llama, opened, model, text, tmp_path):
    options = {"protocol": "windows", "window": 48, "windows": 5}
    plain = tokens(tiny_llama, text.read_text(encoding="utf-8"))
    expected = {"tiny": slow_gptq(model, plain[: 5 * 48], 48), "opened": slow_opened_windows(model, plain, 0, 48, 5)}
    found = {}
    for name, source in (("tiny", tiny_llama), ("opened", opened)):
        found[name] = measure(tmp_path / name, source, text, source, **options)["perplexity"]
        assert found[name]["tokens"] == len(expected[name]) == 5 * 47
        assert found[name]["value"] == pytest.approx(math.exp(-np.mean(expected[name])), rel=1e-4)
    scored = len(tokenizer.load(tiny_llama).decode(plain[: 5 * 47]).encode())
    assert found["opened"]["bits_per_byte"] == pytest.approx(-sum(expected["opened"]) / math.log(2) / scored, rel=1e-4)
    assert found["opened"]["protocol"] == f"{found['tiny']['protocol']}:opened"
    with pytest.raises(StageFailedError, match="can't compare with the baseline: its protocol is"):
        measure(tmp_path / "mixed", tiny_llama, text, opened, tmp_path / "tiny", **options)


def test_bits_per_byte_of_a_byte_tokenizer_is_the_token_cost(tiny_llama, text, tmp_path):
    """One token is one byte, so the two differ by a logarithm alone, whatever is read and whatever is scored."""
    for name, options in (("gptq", GPTQ), ("hf", HF)):
        found = measure(tmp_path / name, tiny_llama, text, tiny_llama, **options)["perplexity"]
        assert found["bits_per_byte"] == pytest.approx(math.log2(found["value"]), rel=1e-6)
        assert found["word_perplexity"] is None


def test_wikitext_is_scored_article_by_article(tiny_llama, model, text, tmp_path, monkeypatch):
    import hashlib

    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    monkeypatch.setattr(perplexity_protocols, "KNOWN_TEXTS", {digest: "wt2"})
    found = measure(tmp_path / "wt2", tiny_llama, text, tiny_llama, **LMEVAL)["perplexity"]
    pages = list(perplexity_protocols.pages(text.read_text(encoding="utf-8")))
    assert len(pages) == 2
    each = [slow_lm_eval(model, tokens(tiny_llama, perplexity_protocols.detokenized(page)), 0, 48) for page in pages]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert found["protocol"] == "wt2-lmeval@48"
    assert found["tokens"] == sum(map(len, each))
    assert found["word_perplexity"] == pytest.approx(math.exp(-sum(map(sum, each)) / words), rel=1e-4)


def test_windows_of_unequal_length_are_compared_token_by_token(tiny_llama, text, tmp_path):
    """The last window is short: its tokens weigh as much as any other, and no more."""
    baseline = measure(tmp_path / "base", tiny_llama, text, tiny_llama, **HF)
    again = measure(tmp_path / "again", tiny_llama, text, tiny_llama, tmp_path / "base", **HF)
    assert (again["perplexity"]["ratio"], again["top1_agreement"]) == (1, 1)
    assert again["kl_divergence"]["tokens"] == baseline["perplexity"]["tokens"]
    assert again["kl_divergence"]["max"] < 1e-5
    nll = np.load(tmp_path / "base" / "nll.npy")
    worse = nll + np.linspace(0, 0.1, len(nll))[:, None]
    known = ~np.isnan(nll)
    assert not known.all()
    ratio, (low, high) = statistics.perplexity_ratio(nll, worse)
    assert ratio == pytest.approx(math.exp((worse - nll)[known].mean()))
    assert low < ratio < high


def test_logits_beyond_the_budget_are_not_kept(tiny_llama, text, tmp_path, monkeypatch):
    per_window = 2 * 260 * 47
    monkeypatch.setattr(quality, "MOST_KEPT", 4 * per_window + 1)
    measure(tmp_path / "base", tiny_llama, text, tiny_llama, **GPTQ)
    assert (tmp_path / "base" / "logits.f16").stat().st_size == 4 * per_window
    found = measure(tmp_path / "again", tiny_llama, text, tiny_llama, tmp_path / "base", **GPTQ)
    assert found["kl_divergence"]["tokens"] == 4 * 47 < found["perplexity"]["tokens"]


@pytest.mark.parametrize("options", [HF, LMEVAL, GPTQ | {"window": 47}, GPTQ | {"windows": 5}])
def test_protocols_are_not_compared_with_each_other(options, tiny_llama, text, tmp_path):
    measure(tmp_path / "base", tiny_llama, text, tiny_llama, **GPTQ)
    with pytest.raises(StageFailedError, match=r"can't compare with the baseline: its protocol is text-.*-gptq@48,"):
        measure(tmp_path / "other", tiny_llama, text, tiny_llama, tmp_path / "base", **options)


@pytest.mark.parametrize("options", [GPTQ | {"window": 400}, HF | {"window": 4096}, LMEVAL | {"window": 4096}])
def test_one_window_is_too_few(options, tiny_llama, text, tmp_path):
    with pytest.raises(InputMissingError, match=r"makes 1 windows of .* tokens, and 2 are needed"):
        measure(tmp_path / "one", tiny_llama, text, tiny_llama, **options)


def test_a_recipe_gets_what_the_protocol_is_known_by():
    found = {
        name: PerplexityOptions(text="t", protocol=name).model_dump(include={"window", "windows", "stride"})
        for name in ("windows", "gptq", "hf", "lmeval")
    }
    assert found == {
        "windows": {"window": 512, "windows": 16, "stride": 512},
        "gptq": {"window": 2048, "windows": None, "stride": 512},
        "hf": {"window": 1024, "windows": None, "stride": 512},
        "lmeval": {"window": 2048, "windows": None, "stride": 512},
    }
    assert PerplexityOptions(text="t", protocol="gptq", window=4096, windows=40).windows == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "hf", "window": 512, "stride": 512}, "stride 512 is not below window 512"),
        ({"protocol": "lmeval", "windows": 16}, "protocol lmeval scores whole documents"),
        ({"protocol": "windows", "windows": None}, "protocol windows needs a number of windows"),
        ({"protocol": "wikitext"}, "'windows', 'gptq', 'hf' or 'lmeval'"),
    ],
)
def test_what_a_protocol_cant_be_asked_for(options, message):
    with pytest.raises(ValidationError, match=message):
        PerplexityOptions.model_validate({"text": "t", **options})


def test_the_estimate_knows_the_text(facts, target):
    def seconds(tokens, **options):
        return quality.estimate(quality.Options.model_validate(options), facts, target, tokens).seconds

    assert seconds(10_000, **GPTQ) < seconds(1_000_000, **GPTQ) < seconds(1_000_000, **HF)
    assert seconds(10_000, window=48, windows=9) == seconds(1_000_000, window=48, windows=9)
    everything = quality.Options.model_validate(GPTQ | {"keep_logits": True})
    assert quality.estimate(everything, facts, target, 10**9).disk_bytes == quality.MOST_KEPT
