"""The speed step: its order by hand, its arithmetic on made-up samples, and one real session of two real processes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from optikit.errors import InputMissingError, StageFailedError
from optikit.evaluation.results import Machine, Speed
from optikit.evaluation.speed import Trace
from optikit.evaluation.speed_schedule import AGAIN, REPEATING, Rounds, Sample, conduct, schedule, select, sort_prompts
from optikit.stage import Job
from optikit.stages.measure import speed

ARMS = [
    {"name": "baseline", "role": "baseline", "runtime": "transformers", "dtype": "float32"},
    {"name": "result", "role": "result", "runtime": "transformers", "dtype": "bfloat16"},
]


def test_every_round_runs_there_or_back_and_the_baseline_twice():
    runs = [(name, phase) for name, phase, index in schedule("AXB", Rounds(2, 2, 8)) if phase in ("measured", "again")]
    assert runs == [
        *(("A", "measured"), ("X", "measured"), ("B", "measured"), ("A", "again")),
        *(("A", "again"), ("B", "measured"), ("X", "measured"), ("A", "measured")),
    ]


def test_the_first_run_of_every_arm_is_cold():
    runs = list(schedule("AB", Rounds(3, 2, 8)))
    assert runs[:6] == [
        ("A", "cold", 0),
        ("B", "cold", 0),
        ("A", "warmup", 1),
        ("A", "warmup", 2),
        ("B", "warmup", 1),
        ("B", "warmup", 2),
    ]


def made_up(tpot_by_arm, rounds=12, seed=0):
    """Samples of a machine with 1 % jitter that slows down by half on the way."""
    draw = np.random.default_rng(seed)
    for place, (name, phase, index) in enumerate(schedule(list(tpot_by_arm), Rounds(1, rounds, 9))):
        pace = 1e6 * tpot_by_arm[name] * (1 + 0.5 * place / (3 * rounds)) * np.exp(draw.normal(0, 0.01))
        times = tuple(int(1e9 * place + 5 * pace + n * pace) for n in range(9))
        trace = Trace(start_ns=int(1e9 * place), token_ns=times, prompt_tokens=16)
        yield Sample(arm=name, phase=phase, round=index, prompt=0, trace=trace, tokens=(1,) * 9)


ABOUT = {"runtime": "transformers", "dtype": "float32", "threads": 1, "max_tokens": 64, "load_s": 1.0}
ABOUT |= {"device": "cpu", "device_memory_mib": None}
ABOUT |= {"joules_per_output_token": 0.25, "energy_source": "package-0", "energy_reason": ""}


def timed(tpot_by_arm, **how):
    options = speed.Options(arms=[ARMS[0] | {"name": name} for name in tpot_by_arm], new_tokens=9, prompt_tokens=16)
    about = {name: ABOUT | {"peak_memory_mib": 100.0} for name in tpot_by_arm}
    return facts_of(list(made_up(tpot_by_arm, **how)), options, about)


def facts_of(samples, options, about):
    machine = Machine(before={}, after={}, steal_share=None)
    return speed._timing(samples, options, about, 0, machine=machine, prompts=8).model_dump(mode="json")


def test_identical_arms_show_no_measurable_change():
    verdicts = Counter()
    for seed in range(20):
        found = timed({"baseline": 30.0, "result": 30.0}, seed=seed)["ratios"]["result"]
        verdicts.update(ratio["verdict"] for ratio in found.values())
    assert verdicts["no measurable change"] >= 39


def test_a_slow_down_of_3_percent_is_found_on_a_machine_that_slows_down_by_half():
    for seed in range(10):
        found = timed({"baseline": 30.0, "result": 30.9}, rounds=20, seed=seed)
        assert found["ratios"]["result"]["decode"]["verdict"] == "slower"
        low, high = found["ratios"]["result"]["decode"]["ci95"]
        assert low < 1 / 1.03 < high


def test_further_baselines_are_compared_with_the_last_arm():
    found = timed({"baseline": 30.0, "transformers-float32": 60.0, "result": 6.0})
    assert set(found["ratios"]) == {"transformers-float32", "result"}
    assert found["ratios"]["result"]["decode"]["value"] == pytest.approx(5, rel=0.03)
    assert found["ratios"]["transformers-float32"]["decode"]["verdict"] == "slower"
    assert set(found["last_against"]) == {"transformers-float32"}
    assert found["last_against"]["transformers-float32"]["decode"]["value"] == pytest.approx(10, rel=0.03)


def test_speed_keeps_the_definitions():
    found = Speed.model_validate(timed({"baseline": 30.0})["arms"]["baseline"])
    assert found.decode_tokens_per_s == pytest.approx(1000 / found.tpot_ms_p50)
    assert found.prefill_tokens_per_s == pytest.approx(16_000 / found.ttft_ms_p50)
    assert found.ttft_ms_p95 is None
    assert found.first_call_ms == pytest.approx(13 * 30, rel=0.05)
    assert (found.joules_per_output_token, found.energy_source) == (0.25, "package-0")


def test_options_refuse_arms_of_one_name_and_names_that_are_paths():
    with pytest.raises(ValidationError, match="different names: baseline, baseline"):
        speed.Options(arms=[ARMS[0], ARMS[0]])
    with pytest.raises(ValidationError, match="pattern"):
        speed.Options(arms=[ARMS[0] | {"name": "../x"}])


def test_a_prompt_beyond_the_context_is_found_while_planning(facts, target):
    fits = speed.Options(arms=ARMS, prompt_tokens=448, new_tokens=64)
    exceeds = speed.Options(arms=ARMS, prompt_tokens=449, new_tokens=64)
    assert list(speed.check(fits, facts, target)) == []
    assert next(speed.check(exceeds, facts, target)).fix == "keep their sum at 512 or less"


def test_the_estimate_grows_with_every_arm_and_token(facts, target):
    one = speed.estimate(speed.Options(arms=ARMS[:1]), facts, target, 0)
    both = speed.estimate(speed.Options(arms=ARMS), facts, target, 0)
    longer = speed.estimate(speed.Options(arms=ARMS, new_tokens=640), facts, target, 0)
    assert one.seconds < both.seconds < longer.seconds
    narrow = speed.estimate(speed.Options(arms=[*ARMS[1:], ARMS[1] | {"name": "again"}]), facts, target, 0)
    assert narrow.peak_bytes < one.peak_bytes == both.peak_bytes  # of the largest process, as the report has it
    assert speed.after(speed.Options(arms=ARMS), facts) is facts


def job(tmp_path, tiny_llama, prose, **inputs):
    dest = tmp_path / "dest"
    dest.mkdir()
    given = {"baseline": tiny_llama, "result": tiny_llama, "tokenizer": tiny_llama, "prompts": prose}
    return Job(source=tiny_llama, dest=dest, scratch=tmp_path / "scratch", inputs=given | inputs, threads=1)


def test_a_real_session(tmp_path, tiny_llama, prose):
    options = speed.Options(arms=ARMS, prompt_tokens=24, new_tokens=5, repetitions=3, warmup=2)
    given = job(tmp_path, tiny_llama, prose)
    events = []
    found = speed.run(options, Job(**(vars(given) | {"progress": lambda *event: events.append(event)})))
    found = json.loads(json.dumps(found, allow_nan=False))
    samples = [json.loads(line) for line in (given.dest / "samples.jsonl").read_text().splitlines()]
    counted = Counter((sample["arm"], sample["phase"]) for sample in samples)
    for name in ("baseline", "result"):
        assert (counted[name, "cold"], counted[name, "warmup"], counted[name, "measured"]) == (1, 1, 3)
        measured = Speed.model_validate(found["arms"][name])
        assert measured.peak_memory_mib > 50
        assert measured.load_s > 0
        assert measured.threads == 1
        assert (measured.joules_per_output_token is None) == bool(measured.energy_reason)
    assert counted["baseline", "again"] == 3
    assert found["arms"]["result"]["dtype"] == "bfloat16"
    assert all(len(sample["tokens"]) == 5 and sample["prompt_tokens"] == 24 for sample in samples)
    by_prompt = {(s["prompt"], s["arm"]): s["tokens"] for s in samples if s["phase"] == "measured"}
    for again in (s for s in samples if s["phase"] == "again"):
        assert again["tokens"] == by_prompt[again["prompt"], "baseline"]  # greedy: the same prompt, the same answer
    by_start = sorted(samples, key=lambda sample: sample["start_ns"])
    assert by_start == samples
    for earlier, later in pairwise(samples):  # never two arms at a time
        assert earlier["start_ns"] + earlier["token_ns"][-1] <= later["start_ns"]
    assert found["host"]["before"]["threads"] >= 1
    assert events[-1] == (len(samples), len(samples), "run")
    times = [s["token_ns"][0] / 1e6 for s in samples if (s["arm"], s["phase"]) == ("result", "measured")]
    assert found["arms"]["result"]["ttft_ms_p50"] == pytest.approx(float(np.median(times)))


def test_a_model_that_cannot_be_loaded_ends_the_test_with_its_name(tmp_path, tiny_llama, prose):
    given = job(tmp_path, tiny_llama, prose, result=tmp_path / "nothing")
    options = speed.Options(arms=ARMS[1:], prompt_tokens=8, new_tokens=2, repetitions=2)
    with pytest.raises((InputMissingError, StageFailedError), match="result: "):
        speed.run(options, given)


def test_prompts_that_are_too_short_end_it_before_any_model_is_loaded(tmp_path, tiny_llama, prose):
    options = speed.Options(arms=ARMS, prompt_tokens=10**6, new_tokens=2)
    with pytest.raises(InputMissingError, match="no prompt of"):
        speed.run(options, job(tmp_path, tiny_llama, prose))


def test_samples_are_paired_by_round_whatever_their_order():
    samples = list(made_up({"A": 1.0}, rounds=4))
    forward, backward = select(samples, "A", "again"), select(samples[::-1], "A", "again")
    assert forward == backward
    assert len(forward) == 4


def test_a_chain_compares_each_arm_with_the_one_before_it():
    paces = {"baseline": 8, "engine": 4, "result": 1}
    samples = [
        Sample(
            arm=name,
            phase=phase,
            round=index,
            prompt=0,
            trace=Trace(start_ns=0, token_ns=(pace * 10**6, 2 * pace * 10**6, 3 * pace * 10**6), prompt_tokens=4),
            tokens=(1, 2, 3),
        )
        for name, pace in paces.items()
        for phase in ("cold", "measured", AGAIN)
        for index in range(8)
    ]
    arms = [{"name": name, "role": "model", "runtime": "transformers"} for name in paces]
    options = speed.Options.model_validate({"arms": arms, "chain": list(paces), "new_tokens": 3})
    read_back = {"runtime": "r", "dtype": "d", "threads": 1, "load_s": 1.0, "peak_memory_mib": 1.0}
    read_back |= {"device": "cpu", "device_memory_mib": None}
    read_back |= {"joules_per_output_token": None, "energy_source": "", "energy_reason": "no counter"}
    found = facts_of(samples, options, dict.fromkeys(paces, read_back))
    assert {name: each["decode"]["value"] for name, each in found["chain"].items()} == {
        "engine": pytest.approx(2),
        "result": pytest.approx(4),
    }


class Canned:
    """An arm that answers a prompt with the tokens written in it."""

    def ask(self, verb, *, prompt, new_tokens):
        assert verb == "decode"
        return {"tokens": prompt[:new_tokens]}


def test_prompts_whose_answer_repeats_itself_are_timed_apart():
    steady, looping = list(range(40)), [*range(10), *range(10), *range(20)]
    prompts = [looping, steady, looping, steady, steady, steady]
    found = sort_prompts(Canned(), prompts, Rounds(1, 3, 40), lambda *_: None)
    assert (found.seen, found.repeats) == (5, 2)
    assert list(found.steady) == [steady] * 3
    assert list(found.repeating) == [looping] * 2
    plan = list(schedule("AB", Rounds(1, 2, 8, repeating=2)))
    assert plan[-4:] == [("A", REPEATING, 0), ("B", REPEATING, 0), ("B", REPEATING, 1), ("A", REPEATING, 1)]
    assert all(phase != REPEATING for _, phase, _ in plan[:-4])


class Paced:
    """An arm that takes a given time per token, with a little scatter, on a clock of its own."""

    def __init__(self, ms, scatter, seed):
        self.ms, self.scatter, self.draw, self.asked = ms, scatter, np.random.default_rng(seed), []

    def ask(self, verb, *, prompt, new_tokens):
        assert (verb, prompt) == ("decode", [1, 2])
        self.asked.append(new_tokens)
        run = np.exp(self.draw.normal(0, self.scatter))
        gaps = 1e6 * self.ms * run * np.exp(self.draw.normal(0, 0.01, new_tokens))
        times = [int(at) for at in np.cumsum(gaps)]
        return {"start_ns": 0, "token_ns": times, "tokens": [1] * new_tokens}


def session(paces, scatter=0.01, precision=0.1, repetitions=12, chain=(), seed=0):
    """Conduct a session of made-up arms as the step does; return the arms, and what is told of it."""
    listed = [ARMS[0] | {"name": name} for name in paces]
    options = speed.Options(
        arms=listed, prompt_tokens=2, new_tokens=48, repetitions=repetitions, precision=precision, chain=chain
    )
    arms = {name: Paced(ms, scatter, seed + place) for place, (name, ms) in enumerate(paces.items())}
    samples = conduct(arms, [[1, 2]], speed._rounds(options, 0), lambda *_: None)
    about = {name: ABOUT | {"peak_memory_mib": 100.0} for name in paces}
    return arms, facts_of(samples, options, about)


def test_a_slow_baseline_writes_few_tokens_in_few_rounds():
    arms, told = session({"baseline": 60.0, "result": 10.0})
    whole, _ = session({"baseline": 60.0, "result": 10.0}, precision=0)
    assert arms["baseline"].asked[0] == 48
    assert set(arms["baseline"].asked[1:]) == {9}
    assert set(arms["result"].asked) == {48}
    assert len(arms["result"].asked) == 2 + 4  # known at the second look
    assert whole["baseline"].asked == [48] * (2 + 2 * 12)
    assert sum(arms["baseline"].asked) < 0.15 * sum(whole["baseline"].asked)
    ratio = told["ratios"]["result"]["decode"]
    assert ratio["value"] == pytest.approx(6, rel=0.05)
    assert ratio["ci95"][0] < 6 < ratio["ci95"][1]
    assert [told["arms"][name]["new_tokens"] for name in arms] == [9, 48]
    assert [told["arms"][name]["repetitions"] for name in arms] == [4, 4]


def test_what_is_not_known_is_timed_to_the_end():
    arms, told = session({"baseline": 10.0, "result": 9.95}, scatter=0.03)
    assert len(arms["result"].asked) == 2 + 12
    assert told["ratios"]["result"]["decode"]["verdict"] == "no measurable change"


def test_the_baseline_stops_first_while_stages_are_told_apart():
    chain = ("baseline", "engine", "result")
    arms, told = session({"baseline": 60.0, "engine": 10.0, "result": 9.95}, scatter=0.03, chain=chain)
    assert len(arms["baseline"].asked) < 2 + 2 * 12
    assert [told["arms"][name]["repetitions"] for name in chain][1:] == [12, 12]
    assert told["chain"]["engine"]["decode"]["value"] == pytest.approx(6, rel=0.1)


def test_an_arm_that_speculates_writes_whole_answers():
    listed = [ARMS[0], ARMS[1] | {"speculator": "made"}]
    options = speed.Options(arms=listed, new_tokens=48)
    assert speed._rounds(options, 0).plain == {"baseline"}
