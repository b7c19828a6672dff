"""`optikit serve` as its clients see it: the official client, raw connections, and people who mean harm."""

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from optikit import runtime
from optikit.runtime.generate import TextGenerator
from tests.serve_process import KEY, Running

PROMPTS = ["stone", "a stone", "the", "two of the", "x", "on and on and on and", "(", "0 1 2 3 4 5 6 7"]


def complete(server, prompt, **more):
    asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    with server.client() as client:
        answer = client.completions.create(**(asked | more))
        return list(answer) if more.get("stream") else answer


def test_many_clients_at_once_get_what_they_would_get_alone(server, plain):
    assert len({plain(prompt, 12) for prompt in PROMPTS}) == len(PROMPTS)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda i: complete(server, PROMPTS[i % 8], max_tokens=4 + i), range(32)))
    for i, answer in enumerate(answers):
        assert answer.choices[0].text == plain(PROMPTS[i % 8], 4 + i)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 4 + i


def test_a_stream_is_the_answer_in_pieces(server, plain):
    events = complete(server, "stone", stream=True, n=2, stream_options={"include_usage": True})
    for choice in (0, 1):
        said = [each.choices[0] for each in events if each.choices and each.choices[0].index == choice]
        assert "".join(each.text for each in said) == plain("stone", 12)
        assert [each.finish_reason for each in said] == [None] * (len(said) - 1) + ["length"]
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == 24


def test_a_chat_goes_through_the_model_s_template(server, plain):
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    asked = {"model": "tiny", "messages": turns, "temperature": 0, "max_completion_tokens": 9}
    asked |= {"extra_body": {"ignore_eos": True}}
    with server.client() as client:
        answer = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
    wanted = plain("<system>be\n<user>hi\n<assistant>", 9)
    assert answer.choices[0].message.content == wanted
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == wanted


def test_log_probabilities_of_answers_and_prompts(server, chatting):
    decoder = runtime.load(chatting)
    answer = complete(server, "stone", max_tokens=4, logprobs=2, echo=True).choices[0]
    tokens = TextGenerator(decoder, chatting).encode("stone", chat=False)
    written = list(decoder.greedy(tokens, 4))
    logits = decoder.forward(np.array([*tokens, *written]), 0).astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    following = [*tokens[1:], *written]
    assert answer.logprobs.token_logprobs[0] is None
    found = answer.logprobs.token_logprobs[1:]
    assert found == pytest.approx([wanted[i, token] for i, token in enumerate(following)], abs=1e-4)
    assert answer.text.startswith("stone")
    assert "".join(answer.logprobs.tokens[:5]) == "stone"
    for i, likeliest in enumerate(answer.logprobs.top_logprobs[1:]):
        assert max(likeliest.values()) == pytest.approx(wanted[i].max(), abs=1e-4)
    with server.client() as client:
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            temperature=0,
            logprobs=True,
            top_logprobs=3,
            max_tokens=2,
        )
    for each in chat.choices[0].logprobs.content:
        assert each.logprob == pytest.approx(max(one.logprob for one in each.top_logprobs))
        assert bytes(each.bytes).decode() == each.token


def test_a_seed_repeats_a_draw_and_choices_differ(server):
    asked = {"temperature": 1.5, "n": 3, "seed": 5, "max_tokens": 20}
    one, two = (complete(server, "stone", **asked) for _ in range(2))
    texts = [each.text for each in one.choices]
    assert texts == [each.text for each in two.choices]
    assert len(set(texts)) == 3
    assert complete(server, "stone", temperature=1.5, max_tokens=20).choices[0].text not in texts


def test_stop_strings_are_not_part_of_the_answer(server, plain):
    whole = plain("stone", 40)
    stop = whole[10:13]
    answer = complete(server, "stone", max_tokens=40, stop=stop).choices[0]
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    said = [each.choices[0].text for each in complete(server, "stone", max_tokens=40, stop=[stop], stream=True)]
    assert "".join(said) == answer.text


def test_several_prompts_and_prompts_of_tokens(server, plain):
    answer = complete(server, ["stone", "a river"], n=2)
    assert [each.text for each in answer.choices] == [plain("stone", 12)] * 2 + [plain("a river", 12)] * 2
    tokens = [5, 6, 7]
    more = {"ignore_eos": True, "return_token_ids": True}
    answer = complete(server, [tokens], extra_body=more).choices[0]
    assert answer.text == plain(tokens, 12)
    assert len(answer.token_ids) == 12


def test_who_leaves_is_not_written_for(server):
    with server.client() as client:
        stream = client.completions.create(model="tiny", prompt="stone", max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    body = json.dumps({"prompt": "x", "max_tokens": 480, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as abandoned:
        abandoned.sendall(f"{head}\r\n\r\n{body}".encode())
    deadline = time.monotonic() + 20
    while (told := json.loads(server.raw("GET", "/health")[1]))["running"] + told["waiting"]:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


REFUSED = [
    (b"{", 400, "Invalid JSON"),
    (b"\xff\xfe", 400, "Invalid JSON"),
    (b"[" * 100_000, 400, ""),
    (b"[]", 400, "the body"),
    (b"{}", 400, "prompt"),
    (b'{"prompt": []}', 400, "prompt"),
    (b'{"prompt": [-1]}', 400, "prompt"),
    (b'{"prompt": [260]}', 400, "token 260 is outside the vocabulary"),
    (b'{"prompt": ""}', 400, "empty"),
    (b'{"prompt": "\\ud800"}', 400, ""),
    (b'{"prompt": "a", "max_tokens": 100000}', 400, "don't fit"),
    (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens is 0"),
    (b'{"prompt": "a", "temperature": NaN}', 400, ""),
    (b'{"prompt": "a", "temperature": "hot"}', 400, "temperature"),
    (b'{"prompt": "a", "top_p": 0}', 400, "top_p"),
    (b'{"prompt": "a", "n": 1000}', 400, "n: "),
    (b'{"prompt": "a", "stop": [""]}', 400, "stop"),
    (b'{"prompt": "a", "best_of": 3}', 400, "no parameter 'best_of'"),
    (b'{"prompt": "a", "suffix": "b"}', 400, "no parameter 'suffix'"),
    (b'{"prompt": "a", "logit_bias": {"260": 5}}', 400, "logit_bias"),
    (b'{"prompt": "a", "model": "gpt-4"}', 404, "no model 'gpt-4'"),
    (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413, "more than 1048576 bytes"),
]


@pytest.mark.parametrize(("body", "status", "said"), REFUSED)
def test_what_is_refused_is_named(server, body, status, said):
    code, answer = server.raw("POST", "/v1/completions", body)
    told = json.loads(answer)["error"]
    assert (code, said in told["message"]) == (status, True), told


def test_paths_methods_and_keys(server):
    assert server.raw("GET", "/")[0] == 404
    assert server.raw("GET", "/v1/completions")[0] == 405
    assert server.raw("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
    assert server.raw("POST", "/v1/completions", b"{}", Authorization="")[0] == 401
    assert server.raw("GET", "/health", Authorization="")[0] == 200
    code, body = server.raw(
        "POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "tools": [1]}'
    )
    assert code == 400
    assert b"tools" in body
    text = server.raw("GET", "/metrics", Authorization="")[1].decode()
    assert 'optikit_requests_total{path="/v1/completions",status="401"} 1.0' in text
    assert "optikit_time_to_first_token_seconds_bucket" in text


def test_a_full_queue_answers_429_and_a_stop_lets_answers_end(chatting, plain):
    """Also: garbage, connections that say nothing, and a signal while texts are written."""
    server = Running(chatting, "--batch", "1", "--queue", "1", "--name", "tiny")
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    silent[0].sendall(b"\x16\x03\x01 garbage\r\n\r\n")
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(complete, server, "stone", max_tokens=300) for _ in range(8)]
        failed = [error for each in asked if (error := each.exception()) is not None]
        assert failed
        assert all(isinstance(error, openai.RateLimitError) for error in failed)
        assert {error.response.headers["retry-after"] for error in failed} == {"1"}
        whole = [each.result().choices[0].text for each in asked if each.exception() is None]
        assert whole
        assert set(whole) == {plain("stone", 300)}
        last = clients.submit(complete, server, "stone", max_tokens=480)
        while not json.loads(server.raw("GET", "/health")[1])["running"]:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert last.result().choices[0].text == plain("stone", 480)
    for each in silent:
        each.close()
    assert server.process.communicate(timeout=40)[1] == ""
    assert server.process.returncode == 0


def test_what_cannot_be_served(chatting, tmp_path):
    def failing(*arguments):
        command = [sys.executable, "-m", "optikit", "serve", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = failing(chatting, "--port", taken.getsockname()[1])
    assert code == 69
    assert "choose another --port" in said
    assert failing(tmp_path / "absent")[0] == 66
    assert failing(chatting, "--host", "no such host.")[0] == 69
