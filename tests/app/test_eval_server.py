"""`optikit eval URL` against a real server over a real model; and servers that hang, drop, lie and refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optikit.app import eval_server
from optikit.errors import InputMissingError, StageTimeoutError, UnavailableError, UsageError
from optikit.recipe.schema import Evaluate, Gate, Price
from optikit.report import write
from optikit.runtime.completions_client import Client
from tests.completions_server import Model, serving


@pytest.fixture(scope="module")
def model(tiny_onnx):
    return Model(tiny_onnx)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))


def ask(url, out, prose, **changed):
    wanted = {"perplexity": {"text": str(prose), "window": 16, "windows": 3}}
    wanted |= {"speed": {"prompt_tokens": 8, "new_tokens": 6}}
    request = {"concurrency": (1, 2), "requests": 4, "timeout_s": 20, "progress": "none"} | changed
    return eval_server.measure(eval_server.Request(url=url, out=out, wanted=Evaluate.model_validate(wanted), **request))


def test_a_server_is_measured_by_concurrency_and_by_its_own_log_probabilities(model, prose, tmp_path):
    gates = {"ttft_ms_p50": Gate(max=1e6), "perplexity_ratio": Gate(max=2)}
    cost = Price(usd_per_hour=10, source="invoice", discount=0.25, concurrency=2)
    with serving(model) as server:
        report = ask(server.url, tmp_path / "out", prose, gates=gates, cost=cost)
    assert report.served is not None
    assert (report.served.model, report.served.tokens_counted_by) == ("tiny", "the server")
    assert report.served.end_of_text_ignored
    assert [row.concurrency for row in report.served.speed] == [1, 2]
    for row in report.served.speed:
        assert (row.requests, row.output_tokens_p50, row.prompt_tokens_p50) == (4, 6, pytest.approx(32, abs=2))
        assert 0 < row.ttft_ms_p50 < row.e2e_ms_p50
        assert row.tpot_ms_p50 > 0
        assert row.ttft_ms_p95 is None
        assert row.output_tokens_per_s == pytest.approx(6 * row.requests_per_s)
        hour = 7.5 / 3600 * 1e6
        assert row.usd_per_million_output_tokens == pytest.approx(hour / row.output_tokens_per_s)
        assert row.usd_per_million_blended_tokens == pytest.approx(hour / (row.concurrency / row.tpot_ms_p50 * 4e3))
    priced = report.result.cost
    assert (priced.concurrency, priced.price_source, priced.reason) == (2, "invoice", "")
    assert priced.usd_per_million_output_tokens == report.served.speed[1].usd_per_million_output_tokens
    text = prose.read_text(encoding="utf-8")
    nll = [-each for start in range(0, 192, 64) for each in model.echo(text[start : start + 64])["token_logprobs"][1:]]
    perplexity = report.result.quality.perplexity
    assert perplexity.value == pytest.approx(math.exp(np.mean(nll)))
    assert perplexity.bits_per_byte == pytest.approx(np.mean(nll) / math.log(2))  # one byte per token
    assert perplexity.tokens == 3 * 63
    assert {gate.name: gate.verdict for gate in report.gates} == {
        "ttft_ms_p50": "pass",
        "perplexity_ratio": "inconclusive",
    }
    assert write.load(tmp_path / "out") == report
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "By number of requests at a time" in page
    assert "Before and after" not in page
    assert "By number of requests at a time" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_server_that_knows_only_the_standard_is_timed_and_its_quality_has_a_reason(model, prose, tmp_path):
    with serving(model, strict=True) as server:
        report = ask(server.url, tmp_path / "out", prose)
    assert report.served is not None
    assert not report.served.end_of_text_ignored
    assert report.result.cost.reason == eval_server.UNPRICED
    assert report.result.quality.perplexity is None
    assert report.result.quality.reason == eval_server.NEEDS_LOGPROBS
    assert eval_server.NEEDS_LOGPROBS in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("hang", StageTimeoutError, "POST /v1/completions: no answer began within 0.5 s"),
        ("500", UnavailableError, "answered 500: .*out of"),
        ("nonsense", UnavailableError, "streamed 0 pieces|dropped the connection"),
        ("drop", UnavailableError, "dropped the connection"),
        ("cut", UnavailableError, "dropped the connection in the middle of its answer"),
    ],
)
def test_what_a_server_does_wrong_is_said(model, prose, tmp_path, fault, error, said):
    with serving(model, fault=fault) as server, pytest.raises(error, match=said) as caught:
        ask(server.url, tmp_path / "out", prose, timeout_s=0.5 if fault == "hang" else 20)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_price_that_nobody_knows_is_told_before_the_server_is_asked(prose, tmp_path):
    with pytest.raises(UsageError, match="no instance 'c7i-xlrage' with a price"):
        ask("http://127.0.0.1:9", tmp_path / "out", prose, cost=Price(instance="c7i-xlrage"))


def test_nobody_there(prose, tmp_path):
    with pytest.raises(UnavailableError, match="can't be reached"):
        ask("http://127.0.0.1:9", tmp_path / "out", prose)


def test_a_key_is_sent_and_never_told(model, prose, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serving(model) as server:
        ask(server.url, tmp_path / "out", prose, key_from="MY_KEY", concurrency=(1,), requests=2)
        assert server.keys == ["Bearer s3cret"]
    for path in (tmp_path / "out").iterdir():
        assert "s3cret" not in path.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="NO_SUCH_KEY: that variable is not set"):
        ask("http://127.0.0.1:9", tmp_path / "out", prose, key_from="NO_SUCH_KEY")


def test_addresses(model):
    with pytest.raises(UsageError, match="no http or https address"):
        Client("http://", timeout_s=1)
    assert Client("http://me:pw@host:81/api/v1/?k=1", timeout_s=1).url == "http://host:81/api/v1/"


def test_nothing_to_ask_and_too_short_a_text(model, tmp_path):
    request = eval_server.Request(url="http://127.0.0.1:9", out=tmp_path, wanted=Evaluate(), progress="none")
    with pytest.raises(UsageError, match="nothing to ask"):
        eval_server.measure(request)
    short = tmp_path / "short.txt"
    short.write_text("only this much " * 5)
    with serving(model) as server, pytest.raises(InputMissingError, match="has 75 characters, 192 are needed"):
        ask(server.url, tmp_path / "out", short)


def test_json_is_not_scored_as_prose(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "The old stone house."}\n' * 900)
    wanted = Evaluate.model_validate({"perplexity": {"text": str(tmp_path / "d.jsonl")}})
    request = eval_server.Request(url="http://127.0.0.1:9", out=tmp_path, wanted=wanted, progress="none")
    with pytest.raises(UsageError, match=r"d\.jsonl is JSON, and would be scored with its braces"):
        eval_server.measure(request)


def test_a_protocol_that_counts_tokens_is_refused_before_the_server_is_asked(prose, tmp_path):
    wanted = Evaluate.model_validate({"perplexity": {"text": str(prose), "protocol": "gptq"}})
    request = eval_server.Request(url="http://127.0.0.1:9", out=tmp_path, wanted=wanted, progress="none")
    with pytest.raises(UsageError, match="protocol gptq counts tokens"):
        eval_server.measure(request)
