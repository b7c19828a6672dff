"""Real processes on this machine, as noisy as it is: a model against itself, and against itself slowed down by 3 %.

Run alone, on a machine that does nothing else, some minutes: pytest -m slow tests/stages/measure/test_measure_noise.py
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest

from optikit.evaluation import speed, texts
from optikit.evaluation.speed_client import Arm
from optikit.evaluation.speed_schedule import AGAIN, Rounds, conduct, select
from optikit.models import tokenizer

pytestmark = pytest.mark.slow

SLOWER = """
import sys, time
from optikit.evaluation import speed_worker

def slowed(tokens):
    last = time.perf_counter_ns()
    for token in tokens:
        end = time.perf_counter_ns() + int(0.03 * (time.perf_counter_ns() - last))
        while time.perf_counter_ns() < end:
            pass
        yield token
        last = time.perf_counter_ns()

class Slowed:
    def __init__(self, decoder):
        self._decoder = decoder
    def greedy(self, prompt, new_tokens):
        return slowed(self._decoder.greedy(prompt, new_tokens))

load = speed_worker.load
speed_worker.load = lambda request: (lambda decoder, answer: (Slowed(decoder), answer))(*load(request))
speed_worker.serve()
"""


@pytest.fixture
def session(tmp_path, tiny_llama, prose):
    """Start two arms of one model; return a function that compares them over some rounds."""
    prompts = texts.prompts(prose, tokenizer.load(tiny_llama), length=32, wanted=40, seed=0)
    arms = {}

    def start(name, command=None):
        arms[name] = Arm(name, log=tmp_path / f"{name}.log", hang_s=120, command=command).__enter__()
        arms[name].ask(
            "load", directory=str(tiny_llama), runtime="transformers", dtype="float32", threads=1, max_tokens=128
        )

    def compare(rounds, new_tokens=12):
        samples = list(conduct(arms, prompts, Rounds(1, rounds, new_tokens), lambda *_: None))
        first, other = (select(samples, name, "measured") for name in arms)
        noise = speed.compare(first, select(samples, "baseline", AGAIN))
        return speed.compare(first, other, noise=noise)["decode"]

    yield start, compare
    for arm in arms.values():
        arm.__exit__(None, None, None)


def test_a_model_against_itself_20_times(session):
    start, compare = session
    start("baseline")
    start("result")
    verdicts = Counter(compare(8).verdict for _ in range(20))
    assert verdicts["no measurable change"] >= 19


def test_a_planted_slow_down_of_3_percent(session):
    start, compare = session
    start("baseline")
    start("result", [sys.executable, "-c", SLOWER, str(os.getpid())])
    found = compare(600)
    assert found.verdict == "slower", found
