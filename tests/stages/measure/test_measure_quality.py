"""The quality step on real tiny models: baseline, candidate, and what can be wrong with a text or a model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

from optikit.errors import InputMissingError, StageFailedError
from optikit.evaluation.results import Quality
from optikit.stage import Job
from optikit.stages.measure import quality

OPTIONS = {"runtime": "transformers", "dtype": "float32", "window": 48, "windows": 9}


def measure(dest, source, text, tokenizer, baseline=None, **options):
    dest.mkdir()
    inputs = {"text": text, "tokenizer": tokenizer} | ({"baseline": baseline} if baseline else {})
    job = Job(source=source, dest=dest, scratch=dest.with_name("scratch"), inputs=inputs, threads=1)
    chosen = quality.Options.model_validate(OPTIONS | {"keep_logits": baseline is None} | options)
    facts = quality.run(chosen, job)
    return json.loads(json.dumps(facts, allow_nan=False))


def noisy(source, dest, scale):
    """Copy a model with noise on its MLP weights, in proportion to their size: what a coarse quantizer does."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, dest)
    weights = load_file(dest / "model.safetensors")
    torch.manual_seed(1)
    changed = {
        name: w + (scale * w.float().std() * torch.randn(w.shape)).to(w.dtype) if "mlp" in name else w
        for name, w in weights.items()
    }
    save_file(changed, dest / "model.safetensors", metadata={"format": "pt"})
    return dest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def baseline(root, tiny_llama, prose):
    return measure(root / "baseline", tiny_llama, prose, tiny_llama)


def test_the_baseline_has_transformers_own_perplexity(baseline, tiny_llama, prose):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    ids = Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode(prose.read_text(encoding="utf-8")).ids
    windows = torch.tensor(ids[: 48 * 9]).reshape(9, 48)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    found = Quality.model_validate({k: v for k, v in baseline.items() if k in Quality.model_fields})
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.perplexity.tokens == 9 * 47
    assert found.perplexity.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-4)  # one byte per token
    assert found.perplexity.ratio is None
    assert found.kl_divergence is None
    assert found.reason == ""


def test_the_baseline_keeps_what_candidates_need(baseline, root):
    assert baseline["files"] == ["about.json", "logits.f16", "nll.npy", "top1.npy"]
    assert (root / "baseline" / "logits.f16").stat().st_size == 9 * 47 * 260 * 2
    assert np.load(root / "baseline" / "nll.npy").shape == (9, 47)


def test_a_model_equals_itself(baseline, root, tiny_llama, prose):
    again = measure(root / "again", tiny_llama, prose, tiny_llama, root / "baseline")
    assert again["perplexity"]["ratio"] == 1
    assert again["perplexity"]["ratio_ci95"] == [1, 1]
    assert again["top1_agreement"] == 1
    assert again["kl_divergence"]["max"] < 1e-5
    assert "logits.f16" not in again["files"]


def test_damage_shows_in_every_figure_and_grows(baseline, root, tiny_llama, prose):
    found = []
    for scale in (1.0, 20.0):
        damaged = noisy(tiny_llama, root / f"noisy-{scale}", scale)
        found.append(measure(root / f"measured-{scale}", damaged, prose, tiny_llama, root / "baseline"))
    small, large = found
    assert 0 < small["kl_divergence"]["mean"] < large["kl_divergence"]["mean"]
    assert large["top1_agreement"] < small["top1_agreement"] <= 1
    for each in found:
        low, high = each["perplexity"]["ratio_ci95"]
        assert low <= each["perplexity"]["ratio"] <= high
        ratio = each["perplexity"]["value"] / baseline["perplexity"]["value"]
        assert each["perplexity"]["ratio"] == pytest.approx(ratio)
        assert each["perplexity"]["protocol"] == baseline["perplexity"]["protocol"]
        assert sum(count for _, _, count in each["kl_divergence"]["histogram"]) == 9 * 47
        low, high = each["kl_divergence"]["mean_ci95"]
        assert low <= each["kl_divergence"]["mean"] <= high
        assert each["divergence"]["ratio"] == pytest.approx(each["perplexity"]["ratio"])
        assert each["detectable_ratio"] > 1


def test_windows_longer_than_a_chunk_give_the_same_log_likelihoods(root, tiny_llama, prose, monkeypatch):
    """Chunks are joined by the key-value cache: how a window is cut can't change what it says."""
    from optikit.evaluation import scoring

    whole = measure(root / "whole", tiny_llama, prose, tiny_llama, windows=2)
    monkeypatch.setattr(scoring, "CHUNK", 7)
    measure(root / "pieces", tiny_llama, prose, tiny_llama, windows=2)
    one, other = (np.load(root / name / "nll.npy") for name in ("whole", "pieces"))
    assert whole["perplexity"]["tokens"] == 2 * 47
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_too_few_tokens_have_a_ratio_but_no_divergence(root, tiny_llama, prose):
    measure(root / "few", tiny_llama, prose, tiny_llama, window=16, windows=3)
    found = measure(root / "few-again", tiny_llama, prose, tiny_llama, root / "few", window=16, windows=3)
    assert found["perplexity"]["ratio"] == 1
    assert found["kl_divergence"] is None
    assert found["reason"] == "no divergence: 45 scored tokens are too few, 100 are needed"


def test_without_kept_logits_there_is_no_divergence_and_a_reason(root, tiny_llama, prose):
    measure(root / "thin", tiny_llama, prose, tiny_llama, keep_logits=False)
    found = measure(root / "thin-again", tiny_llama, prose, tiny_llama, root / "thin")
    assert found["top1_agreement"] == 1
    assert found["reason"] == "no divergence: the baseline's logits were not kept"


def test_a_short_text_says_how_many_windows_fit(root, tiny_llama, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 200)
    with pytest.raises(InputMissingError, match="200 tokens: 4 windows of 48 fit, 9 were asked for") as caught:
        measure(tmp_path / "short", tiny_llama, text, tiny_llama)
    assert caught.value.fix == "set windows to 4"


def test_another_text_is_not_compared(baseline, root, tiny_llama, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("another text " * 100)
    with pytest.raises(StageFailedError, match="can't compare with the baseline: its protocol is text-"):
        measure(tmp_path / "other", tiny_llama, text, tiny_llama, root / "baseline")


def test_a_model_that_returns_nan_is_named_with_the_window(tiny_llama, prose, tmp_path):
    broken = noisy(tiny_llama, tmp_path / "broken", float("nan"))
    with pytest.raises(StageFailedError, match=r"transformers \(float32\): a log-likelihood of window 0"):
        measure(tmp_path / "nan", broken, prose, tiny_llama)


def test_a_window_beyond_the_context_is_found_while_planning(facts, target):
    fits, exceeds = (quality.Options(window=window) for window in (512, 513))
    assert list(quality.check(fits, facts, target)) == []
    (problem,) = quality.check(exceeds, facts, target)
    assert "longer than the model's context of 512" in problem.message


def test_the_estimate_counts_the_kept_logits(facts, target):
    options = quality.Options(window=512, windows=16, keep_logits=True)
    assert quality.estimate(options, facts, target, 0).disk_bytes == 2 * 512 * 16 * 260
    assert quality.after(options, facts) is facts


COMPILED = """
import sys
from pathlib import Path
from optikit.stage import Job
from optikit.stages.measure import quality

source, text, dest = map(Path, sys.argv[1:])
found = Job(source=source, dest=dest, scratch=dest, inputs={"text": text, "tokenizer": source}, threads=1)
quality.run(quality.Options(runtime="onnxruntime", window=24, windows=3), found)
print(*sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_a_compiled_graph_is_scored_without_torch(tiny_onnx, prose, tmp_path):
    given = [sys.executable, "-c", COMPILED, str(tiny_onnx), str(prose), str(tmp_path)]
    ran = subprocess.run(given, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
