"""Measuring speculation: a whole step on a tiny model, and the proof that texts stay the same, which has to be able to
fail."""

import json

import numpy as np
import pytest

from optikit.errors import InputMissingError, StageFailedError
from optikit.evaluation import lossless
from optikit.evaluation.paired_decoding import Pair, Writer
from optikit.runtime.speculation import speculator
from optikit.runtime.speculation.decoding_loop import Step
from optikit.runtime.speculation.speculator import Speculator
from optikit.runtime.speculation.tuning import Written
from optikit.stage import Job
from optikit.stages.measure import speculation
from optikit.stages.speculate import lookup
from tests.runtime.speculation.markov import MarkovDecoder

LOOKUP = Speculator(method="lookup", lengths={3: 8, 2: 4, 1: 1})


@pytest.fixture
def job(tmp_path, tiny_llama):
    for name in ("speculator", "dest"):
        (tmp_path / name).mkdir()
    lookup.run(lookup.Options(), Job(source=tiny_llama, dest=tmp_path / "speculator", scratch=tmp_path))
    lines = [
        json.dumps({"prompt": f"{word} {word} and {word} {i}"}) for i in range(4) for word in ("one", "two", "row")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    inputs = {"speculator": tmp_path / "speculator", "tokenizer": tiny_llama, "prompts": tmp_path / "prompts.jsonl"}
    return Job(source=tiny_llama, dest=tmp_path / "dest", scratch=tmp_path, inputs=inputs)


@pytest.mark.parametrize("tune", [True, False])
def test_a_step_measures_chooses_and_writes_its_choice(job, tune):
    options = speculation.Options(runtime="transformers", prompts=8, new_tokens=16, tune=tune)
    facts = speculation.run(options, job)
    found = facts["speculation"]
    assert found["exact_match"] == 1
    assert found["unexplained"] == 0
    assert found["prompts"] == 4
    assert found["acceptance_length"] > 1.2  # a random model loops
    assert found["looping"] > 0.4
    assert (found["lengths"] == {"3": 8, "2": 4}) or tune
    chosen = speculator.read(job.dest)
    assert chosen.method == found["chosen"]
    assert set(facts["files"]) == {path.name for path in job.dest.iterdir()}
    assert found["window_ms"]["1"] > 0
    assert found["predicted_single_drafter"]["lookup"] >= 1
    json.dumps(facts)


def test_prose_is_cut_into_prompts(job, prose):
    changed = Job(**{**vars(job), "inputs": {**job.inputs, "prompts": prose}})
    options = speculation.Options(runtime="transformers", prompts=4, prompt_tokens=12, new_tokens=8, tune=False)
    assert speculation.run(options, changed)["speculation"]["prompts"] == 2


def test_too_few_prompts_are_named(job):
    job.inputs["prompts"].write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(InputMissingError, match=r"has 2 prompts; 4 are needed"):
        speculation.run(speculation.Options(runtime="transformers"), job)
    job.inputs["prompts"].write_text("\n".join(json.dumps({"prompt": "x" * 600}) for _ in range(9)))
    with pytest.raises(InputMissingError, match="has 0 prompts"):
        speculation.run(speculation.Options(runtime="transformers"), job)


# ------------------------------------------------------------------------------------------------------------- identity


class Noisy(MarkovDecoder):
    """A kernel for one token that rounds otherwise than the one for several."""

    def __init__(self, noise, **kwargs):
        super().__init__(**kwargs)
        self.noise = noise

    def forward(self, tokens, position, rows=None):
        logits = super().forward(tokens, position, rows)
        if len(tokens) == 1:
            draw = np.random.default_rng([position, int(tokens[0])])
            logits = logits + draw.uniform(-self.noise, self.noise, logits.shape).astype(np.float32)
        return logits

    def greedy(self, prompt, new_tokens):
        row = self.forward(prompt, 0, 1)[0]
        for position in range(len(prompt), len(prompt) + new_tokens):
            token = int(row.argmax())
            yield token
            row = self.forward(np.array([token]), position)[0]


class Wrong(Noisy):
    """A bug: the last rows of a window are those of other tokens."""

    def forward(self, tokens, position, rows=None):
        logits = super().forward(tokens, position, rows)
        return np.roll(logits, 1, axis=1) if len(tokens) > 3 and position else logits


def pairs_of(decoder, count=30):
    writer = Writer(decoder, 40, frozenset())
    prompts = [np.random.default_rng(seed).integers(0, 8, 4) for seed in range(count)]
    return writer, [writer.pair(LOOKUP, prompt, plain_first=True) for prompt in prompts]


def texts_of(decoder):
    prompts = [np.random.default_rng(seed).integers(0, 8, 4) for seed in range(8)]
    return [Written(prompt, np.array(list(decoder.greedy(prompt, 40)))) for prompt in prompts]


def test_equal_texts_need_no_explanation():
    writer, pairs = pairs_of(MarkovDecoder())
    found = lossless.compare(writer, LOOKUP, pairs, 0.0)
    assert (found["exact_match"], found["explained_ties"], found["unexplained"]) == (1, 0, 0)


def test_differences_between_kernels_are_ties_within_their_noise():
    decoder = Noisy(0.4, vocab=8)
    noise = lossless.kernel_noise(decoder, texts_of(decoder))
    assert 0.2 < noise < 0.41
    writer, pairs = pairs_of(decoder)
    found = lossless.compare(writer, LOOKUP, pairs, noise)
    assert found["explained_ties"] > 3  # the noise does show
    assert found["exact_match"] == pytest.approx(1 - found["explained_ties"] / 30)
    assert 0 < found["largest_tie_margin"] <= 2 * noise


def test_a_difference_beyond_the_noise_fails():
    writer, pairs = pairs_of(Wrong(0.01))
    assert any(pair.parts_at is not None for pair in pairs)
    with pytest.raises(StageFailedError, match="speculation changed a text at token"):
        lossless.compare(writer, LOOKUP, pairs, 0.01)


def test_a_bug_does_not_hide_behind_noise():
    """Even where every margin is small enough: with the same kernels throughout, texts have to be equal."""
    writer, pairs = pairs_of(Wrong(0.01))
    with pytest.raises(StageFailedError, match="speculation changed a text"):
        lossless.compare(writer, LOOKUP, pairs, 100.0)


def test_a_text_that_just_ends_is_not_a_tie():
    prompt = np.array([1, 2])
    plain = np.array(list(MarkovDecoder().greedy(prompt, 10)))
    short = Pair(
        prompt=prompt,
        plain=plain,
        plain_ms=1,
        steps=(Step(tuple(plain[:4].tolist()), 0, 0, "", None),),
        speculated_ms=1,
    )
    assert short.parts_at == 4
    with pytest.raises(StageFailedError, match="at token 4"):
        lossless.compare(Writer(MarkovDecoder(), 10, frozenset()), LOOKUP, [short], 100.0)


def test_pairs_know_their_times_and_loops():
    steps = (Step((1,), 0, 0, "prompt", None), Step((2, 3), 1, 1, "lookup", "length"))
    pair = Pair(prompt=np.array([1]), plain=np.array([1, 2, 3]), plain_ms=8.0, steps=steps, speculated_ms=6.0)
    assert pair.ms_per_token == (4.0, 3.0)
    assert pair.parts_at is None
    assert not pair.loops
    again = Pair(prompt=pair.prompt, plain=np.arange(20) % 9, plain_ms=1, steps=steps, speculated_ms=1)
    assert again.loops
    alone = Pair(prompt=pair.prompt, plain=np.array([1]), plain_ms=0, steps=steps[:1], speculated_ms=0)
    assert alone.ms_per_token is None
