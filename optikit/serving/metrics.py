"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from optikit.serving.completion import Piece
    from optikit.serving.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """Counters of one server.

    Args:
        scheduler: Whose queue is told.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter("optikit_requests", "Requests, by path and status.", ("path", "status"), registry=own)
        self._prompt = Counter("optikit_prompt_tokens", "Tokens of prompts.", registry=own)
        self._written = Counter("optikit_generation_tokens", "Tokens written.", registry=own)
        self._drafted = Counter("optikit_draft_tokens", "Tokens that a speculator drafted.", registry=own)
        self._accepted = Counter("optikit_accepted_tokens", "Drafted tokens that were kept.", registry=own)
        self._first = Histogram(
            "optikit_time_to_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=own
        )
        self._each = Histogram(
            "optikit_time_per_output_token_seconds",
            "Mean after the first, per request.",
            buckets=PER_TOKEN,
            registry=own,
        )
        self._whole = Histogram(
            "optikit_request_duration_seconds", "From a request to its last token.", buckets=SECONDS, registry=own
        )
        waiting = Gauge("optikit_requests_waiting", "Requests that wait for a place.", registry=own)
        waiting.set_function(lambda: scheduler.waiting)
        running = Gauge("optikit_requests_running", "Texts that are being written.", registry=own)
        running.set_function(lambda: scheduler.running)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def begin(self, prompt_tokens: int) -> Watch:
        """Return what watches one request."""
        self._prompt.inc(prompt_tokens)
        return Watch(self)

    def count(self, piece: Piece) -> None:
        """Count what a piece brought."""
        self._written.inc(len(piece.tokens))
        if piece.drafted:
            self._drafted.inc(piece.drafted)
            self._accepted.inc(piece.accepted)

    def observe(self, first_s: float, whole_s: float, tokens: int) -> None:
        """Count the times of a request that was answered."""
        self._first.observe(first_s)
        self._whole.observe(whole_s)
        if tokens > 1:
            self._each.observe((whole_s - first_s) / (tokens - 1))


class Watch:
    """The times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._begun = metrics, time.perf_counter()
        self._first = 0.0
        self.tokens = 0

    def see(self, piece: Piece) -> None:
        """Take note of a piece."""
        if piece.tokens and not self.tokens:
            self._first = time.perf_counter() - self._begun
        self.tokens += len(piece.tokens)
        self._metrics.count(piece)

    def end(self) -> None:
        """Take note that the answer is whole."""
        if self.tokens:
            self._metrics.observe(self._first, time.perf_counter() - self._begun, self.tokens)
