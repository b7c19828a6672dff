"""Answers of another shape than the completions API has are errors that say what came, never figures."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import UnavailableError
from optikit.runtime.completions_client import Client
from tests.hostile_server import CLOSING, EVENT, echoed, fails, hostile, listed, ok, streamed, text, told


@pytest.mark.parametrize("answer", [[], None, 5, {"data": None}, {"data": [{"id": 5}]}, {"data": ["m"]}, {"data": {}}])
def test_a_list_of_models_that_is_none(answer):
    fails(ok(json.dumps(answer).encode()), listed, UnavailableError, "lists no models")


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([{"choices": 5}], "answered choices that .*: 5"),
        ([{"choices": ["a"]}], "answered choices"),
        ([{"choices": {"a": 1}}], "answered choices"),
        ([{"choices": [{"text": 5}]}], "answered a text"),
        ([{"choices": [{"token_ids": ["1"]}]}], "answered token numbers"),
        ([{"choices": [{"token_ids": 7}]}], "answered token numbers"),
        ([[1]], "answered an event"),
        ([text(usage="x")], "answered a usage"),
        ([text(), text(usage={"completion_tokens": "3"})], "a number of completion_tokens"),
        ([text(), text(usage={"completion_tokens": 10**12})], "a number of completion_tokens"),
        ([text(), text(usage={"completion_tokens": 4})], "answered 3 tokens"),
        ([text(), text(usage={"prompt_tokens": -5})], "a number of prompt_tokens"),
        ([{"choices": None}], "streamed 0 pieces"),
        ([text()], "streamed 1 pieces"),
        ([], "streamed 0 pieces"),
    ],
)
def test_a_stream_of_another_shape(events, said):
    fails(told(*events), streamed, UnavailableError, said)


def echo(logprobs, tokens=("he", "llo there")):
    inner = {"token_logprobs": logprobs, "tokens": list(tokens)}
    return ok(json.dumps({"choices": [{"text": "", "logprobs": inner}]}).encode())


@pytest.mark.parametrize("value", [5.0, 1e-9, float("nan"), float("inf"), float("-inf"), "x", True, -(10**400), None])
def test_no_log_probability(value):
    fails(echo([None, value]), echoed, UnavailableError, "answered a log-probability that")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (ok(b'{"choices": []}'), "answered an answer"),
        (ok(b"[]"), "answered an answer"),
        (ok(b'{"choices": [{"logprobs": 3}]}'), "answered log-probabilities"),
        (echo({"a": 1}), "answered log-probabilities"),
        (echo([None, -1.0], ["a", 5]), "answered tokens"),
        (echo([None, -1.0], ["a", "b", "c"]), "2 log-probabilities of 3 tokens"),
        (echo([None, -1.0], ["hello there", ""]), "a first token that is the whole prompt"),
    ],
)
def test_an_echo_of_another_shape(act, said):
    fails(act, echoed, UnavailableError, said)


def test_an_echo_is_read_and_its_absence_is_no_fault():
    with hostile(echo([None, -1.5])) as server, Client(server.url, timeout_s=5) as client:
        found = echoed(client)
    assert (found.logprobs, found.scored_bytes) == ((-1.5,), len("hello there") - len("he"))
    with hostile(echo([None, -1.5], ["<s>", "hello there"])) as server, Client(server.url, timeout_s=5) as client:
        assert echoed(client).scored_bytes == len("hello there")
    for absent in (ok(b'{"choices": [{"text": ""}]}'), echo([]), b"HTTP/1.1 400 no\r\nConnection: close\r\n\r\n"):
        with hostile(absent) as server, Client(server.url, timeout_s=5) as client:
            assert echoed(client) is None


def test_the_time_of_a_piece_is_that_of_its_line():
    def act(connection, done):
        connection.sendall(CLOSING + EVENT)
        done.wait(0.3)
        connection.sendall(EVENT[:10])
        done.wait(0.3)
        connection.sendall(EVENT[10:] + b"data: [DONE]\n\n")

    with hostile(act) as server, Client(server.url, timeout_s=10) as client:
        found = streamed(client)
    first, second = found.piece_ns
    assert second - first > 0.5e9  # it is whole only then
    assert found.start_ns < first


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "text", "usage", "token_ids", "logprobs", "tokens", "token_logprobs", "data", "id"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_ends_as_a_bug(answer):
    for act in (ok(json.dumps(answer).encode()), told(answer)):
        with hostile(act) as server, Client(server.url, timeout_s=5) as client:
            for ask in (listed, streamed, echoed, lambda client: client.token_logprobs("m", [1, 2])):
                with suppress(UnavailableError):
                    ask(client)
