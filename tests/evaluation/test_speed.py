"""Speed on traces made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from optikit.evaluation.bench_results import Level, Reply, row
from optikit.evaluation.latency_limits import Limits
from optikit.evaluation.speed import Trace, summarize, tail
from optikit.runtime.completions_client import Streamed


def trace(start_ms, *token_ms, prompt_tokens=100):
    return Trace(
        start_ns=int(start_ms * 1e6), token_ns=tuple(int(t * 1e6) for t in token_ms), prompt_tokens=prompt_tokens
    )


def test_the_definitions_on_one_trace():
    one = trace(1000, 1050, 1060, 1070, 1090)
    assert one.ttft_ms == 50
    assert one.tpot_ms == pytest.approx(40 / 3)
    assert one.e2e_ms == 90


def test_tokens_that_arrive_together_keep_their_mean_time():
    """A speculating decoder yields accepted tokens at one instant: the median gap is 0 ms, the time per token isn't."""
    speculative = trace(0, 100, 130, 130, 130, 160, 160, 160)
    gaps = np.diff(speculative.token_ns) / 1e6
    assert np.median(gaps) == 0
    assert speculative.tpot_ms == 10


def test_summary_of_three_requests():
    summary = summarize([trace(0, 50, 60, 70), trace(100, 140, 160, 180), trace(200, 260, 275, 290)])
    assert summary.requests == 3
    assert summary.ttft_ms_p50 == 50
    assert summary.tpot_ms_p50 == 15
    assert summary.e2e_ms_p50 == 80
    assert summary.prefill_tokens_per_s == pytest.approx(2000)
    assert summary.decode_tokens_per_s == pytest.approx(1000 / 15)
    assert summary.ttft_ms_p50_ci95[0] < 50 < summary.ttft_ms_p50_ci95[1]


def test_a_tail_is_claimed_only_with_90_requests():
    requests = [trace(0, 50 + i, 60 + 2 * i) for i in range(90)]
    assert summarize(requests[:89]).ttft_ms_p95 is None
    assert summarize(requests).ttft_ms_p95 == pytest.approx(50 + 0.95 * 89)
    assert tail(np.arange(44.0), 0.90) == pytest.approx(38.7)


def test_bad_traces_are_refused():
    with pytest.raises(ValueError, match="at least two tokens"):
        trace(0, 10)
    with pytest.raises(ValueError, match="backwards"):
        trace(0, 20, 10)
    with pytest.raises(ValueError, match="different lengths"):
        summarize([trace(0, 1, 2, prompt_tokens=5), trace(0, 1, 2, prompt_tokens=6)])
    with pytest.raises(ValueError, match="at least two"):
        summarize([trace(0, 1, 2)])


NO_LIMITS = Limits()


def under_load(traces, limits=NO_LIMITS):
    """Return the figures of requests as a load test has them."""
    replies = []
    for each in traces:
        pieces = tuple(each.token_ns)
        came = Streamed(start_ns=each.start_ns, piece_ns=pieces, prompt_tokens=None, output_tokens=len(pieces))
        replies.append(Reply(prompt=0, due_ns=each.start_ns, streamed=came))
    return row(Level("a", "clients", 1), replies, limits, hour=None)


def test_goodput_counts_requests_within_every_limit():
    requests = [trace(0, 100, 200, 300), trace(0, 400, 450, 500), trace(500, 600, 900, 1000)]
    assert under_load(requests, Limits(e2e_ms=1e9)).goodput_per_s == pytest.approx(3)
    assert under_load(requests, Limits(ttft_ms=100)).goodput_per_s == pytest.approx(2)
    assert under_load(requests, Limits(ttft_ms=100, tpot_ms=100)).goodput_per_s == pytest.approx(1)
    assert under_load(requests, Limits(e2e_ms=10)).goodput_per_s == 0


def test_throughput_spans_first_call_to_last_token():
    assert under_load([trace(0, 100, 200), trace(50, 150, 500)]).output_tokens_per_s == pytest.approx(8)
