"""`optikit bench`: servers and artifacts under the same load; what it says is what their clients saw."""

import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from optikit.cli.app import app
from optikit.errors import InputMissingError, UnavailableError, UsageError
from optikit.evaluation import bench_results, load_test
from optikit.evaluation.bench_results import Level, Reply
from optikit.evaluation.cost import Hour
from optikit.evaluation.latency_limits import Limits
from optikit.runtime.completions_client import Streamed
from tests.completions_server import Model, serving

LINES = '{"prompt": "stone"}\n{"prompt": "a river", "max_tokens": 6}\n'


@pytest.fixture(scope="module")
def model(tiny_onnx):
    return Model(tiny_onnx)


def streamed(start_ms, *pieces_ms, text="", ids=()):
    return Streamed(
        start_ns=int(start_ms * 1e6),
        piece_ns=tuple(int(each * 1e6) for each in pieces_ms),
        prompt_tokens=3,
        output_tokens=len(pieces_ms),
        text=text,
        token_ids=ids,
    )


def test_an_artifact_beside_a_server(model, tiny_onnx, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(LINES)
    with serving(model) as server:
        arguments = ["bench", server.url, str(tiny_onnx), "--prompts", str(tmp_path / "prompts.jsonl")]
        arguments += ["--out", str(tmp_path / "out"), "--clients", "1,2", "--rate", "50", "--requests", "4"]
        arguments += ["--new-tokens", "5", "--usd-per-hour", "2", "--ttft-ms", "1e9", "--progress", "none", "--json"]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["kind"], row["load"]) for row in found["rows"]] == [
        ("clients", 1),
        ("clients", 1),
        ("clients", 2),
        ("clients", 2),
        ("rate", 50),
        ("rate", 50),
    ]
    here = tiny_onnx.name
    assert [row["variant"] for row in found["rows"][:2]] == [server.url, here]
    assert found["identity"] == [{"variant": here, "against": server.url, "prompts": 2, "first_token": 2, "whole": 2}]
    for row in found["rows"]:
        assert (row["requests"], row["errors"], row["good_share"]) == (4, 0, 1.0)
        price = 2 / (row["output_tokens_per_s"] * 3600 / 1e6)
        assert row["usd_per_million_output_tokens"] == pytest.approx(price)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 24
    assert {(each["prompt"], each["output_tokens"]) for each in samples} == {(0, 5), (1, 6)}
    page = (tmp_path / "out" / "bench.html").read_text()
    assert page.count("<svg") == 4  # throughput, both times and the price over clients; one rate is no curve
    assert here in (tmp_path / "out" / "bench.md").read_text()
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "bench.html",
        "bench.json",
        "bench.md",
        "samples.jsonl",
    ]


def test_a_server_that_answers_nothing_and_one_that_sometimes_fails(model, tmp_path):
    (tmp_path / "prompts").write_text("stone\n")
    with serving(model, fault="500") as server:
        arguments = ["bench", server.url, "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")]
        assert isinstance(CliRunner().invoke(app, arguments).exception, UnavailableError)
    assert not (tmp_path / "out" / "bench.json").exists()

    def send(number):
        if number % 2:
            raise UnavailableError("dropped")
        return streamed(0, 1, 2)

    replies = load_test.closed_loop(send, range(10), 3)
    assert [each.error for each in replies] == ["", "dropped"] * 5
    row = bench_results.row(Level("a", "clients", 3), replies, Limits(tpot_ms=1e9), hour=None)
    assert (row.errors, row.good_share) == (5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "text", "error", "said"),
    [
        (["--clients", "x"], LINES, UsageError, "no list of whole numbers"),
        (["--clients", ""], LINES, UsageError, "no load"),
        (["--rate", "-1"], LINES, UsageError, "no list of numbers"),
        (["--rate", "nan"], LINES, UsageError, "no list of numbers"),
        ([], "\n", InputMissingError, "holds no prompts"),
        ([], '{"prompt": ""}\n', UsageError, "record 1 has no `prompt`"),
        ([], '{"prompt": "a", "max_tokens": 1}\n', UsageError, "record 1"),
        (["--key-from", "NO_SUCH_VARIABLE"], LINES, UsageError, "not set"),
    ],
)
def test_what_cannot_be_asked(tmp_path, arguments, text, error, said):
    (tmp_path / "p.jsonl").write_text(text)
    given = ["bench", "http://127.0.0.1:9", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*given, *arguments])
    assert isinstance(result.exception, error)
    assert said in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_requests_come_when_they_are_due_and_are_timed_from_then():
    """A server that takes one at a time can't hide that others waited."""
    one_at_a_time = threading.Lock()

    def send(number):
        with one_at_a_time:
            time.sleep(0.02)
            now = time.perf_counter_ns()
            return Streamed(start_ns=now, piece_ns=(now, now), prompt_tokens=1, output_tokens=2)

    replies = load_test.open_loop(send, range(12), 1e6, seed=3)
    due = np.array([each.due_ns for each in replies])
    gaps = np.random.default_rng(3).exponential(1e-6, 12)
    assert np.diff(due) / 1e9 == pytest.approx(gaps[1:], abs=1e-8)
    waited = sorted(each.ttft_ms for each in replies)
    assert waited[0] >= 20
    assert waited[-1] >= 12 * 20 - 1


@given(
    pieces=st.lists(st.floats(1, 1000), min_size=2, max_size=9).map(sorted),
    late=st.floats(0, 100),
)
def test_figures_of_one_answer(pieces, late):
    reply = Reply(prompt=0, due_ns=0, streamed=streamed(late, *(late + each for each in pieces)))
    assert reply.ttft_ms == pytest.approx(late + pieces[0], abs=1e-3)
    assert reply.e2e_ms == pytest.approx(late + pieces[-1], abs=1e-3)
    assert reply.tpot_ms == pytest.approx((pieces[-1] - pieces[0]) / (len(pieces) - 1), abs=1e-3)
    assert reply.keeps(Limits(ttft_ms=reply.ttft_ms, e2e_ms=reply.e2e_ms))
    assert not reply.keeps(Limits(e2e_ms=reply.e2e_ms * 0.9 - 1))


def test_price_of_a_closed_loop():
    """Amazon's example: 8 at a time, 20 ms per token, 10 $ per hour."""
    reply = Reply(prompt=0, due_ns=0, streamed=streamed(0, *range(20, 1020, 20)))
    row = bench_results.row(Level("a", "clients", 8), [reply] * 8, Limits(), hour=Hour(usd=10))
    assert row.usd_per_million_blended_tokens == pytest.approx(1.7361, abs=1e-4)
    less = bench_results.row(Level("a", "clients", 8), [reply] * 8, Limits(), hour=Hour(usd=10, discount=0.25))
    assert less.usd_per_million_blended_tokens == pytest.approx(0.75 * 1.7361, abs=1e-4)
    assert less.usd_per_million_output_tokens == pytest.approx(0.75 * row.usd_per_million_output_tokens)
    rate = bench_results.row(Level("a", "rate", 8), [reply], Limits(), hour=Hour(usd=10))
    assert rate.usd_per_million_blended_tokens is None
    assert "blended price: it is that of a fixed number of requests at a time" in rate.reason
    unpriced = bench_results.row(Level("a", "clients", 8), [reply], Limits(), hour=None)
    assert "price: what the machine costs wasn't said" in unpriced.reason


def test_identity_compares_tokens_where_both_tell_them():
    def replies(*pairs):
        return [
            Reply(prompt=i, due_ns=0, streamed=streamed(0, 1, 2, text=t, ids=ids)) for i, (t, ids) in enumerate(pairs)
        ]

    first = replies(("ab", (1, 2)), ("cd", (3, 4)), ("ef", ()), ("gh", (7, 8)))
    other = replies(("ab", (1, 9)), ("cd", ()), ("ex", (5, 6)), ("gh", (6, 8)))
    (found,) = bench_results.identities([("a", first), ("b", other)])
    assert (found.variant, found.against) == ("b", "a")
    assert (found.prompts, found.first_token, found.whole) == (4, 3, 1)
    pairs = [(each.variant, each.against) for each in bench_results.identities([(name, first) for name in "abc"])]
    assert pairs == [("b", "a"), ("c", "a"), ("c", "b")]
