"""`optikit serve` under attack: 200 connections at once that mean harm, beside clients that must get their answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from optikit import runtime
from optikit.runtime.generate import TextGenerator
from tests.campaign.figures import SCALE, Figures, draw
from tests.serve_process import Running
from tests.serving.conftest import speaking

pytestmark = pytest.mark.slow
COUNT, AT_ONCE, FRIENDS = 2000, 200, 8
MOST_BODY = 2**20
PATIENCE_S = 90.0
"""Seconds until an attacker takes silence for an answer: longer than the server waits for a head or a body."""
MOST_GROWTH_MIB = 400
"""Of a server that holds 200 bodies of up to 1 MiB, as text, and as JSON."""
REFUSED = frozenset({"400", "404", "405", "408", "413", "429", "431", "closed"})
PROMPTS = [f"stone {number} river" for number in range(16)]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def _post(body: bytes, length: int | None = None, path: bytes = b"/v1/completions") -> bytes:
    size = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, size) + body


def _asking(**more: object) -> bytes:
    return json.dumps({"prompt": "stone", "max_tokens": 100, "ignore_eos": True, **more}).encode()


async def _status(reader: asyncio.StreamReader) -> str:
    """Return the status of an answer, or `closed` where none comes and the connection ends."""
    line = await reader.readline()
    return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"


async def _send(streams: Streams, data: bytes) -> str:
    streams[1].write(data)
    await streams[1].drain()
    return await _status(streams[0])


async def _pour(streams: Streams, part: bytes) -> str:
    """Send the same again and again until there is an answer; return its status."""
    answer = asyncio.ensure_future(_status(streams[0]))
    try:
        while not answer.done():
            streams[1].write(part)
            await streams[1].drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass  # the answer may lie there nevertheless
    return await answer


async def garbage(streams: Streams, random: Random) -> str:
    """Bytes that are no HTTP."""
    return await _send(streams, random.randbytes(random.randrange(1, 5000)) + b"\r\n\r\n")


async def broken_json(streams: Streams, random: Random) -> str:
    """A request with some of its bytes changed."""
    body = bytearray(_asking(stop=["a"], n=2, logprobs=3))
    for _ in range(random.randrange(1, 8)):
        body[random.randrange(len(body))] = random.randrange(256)
    return await _send(streams, _post(bytes(body)))


async def long_body(streams: Streams, random: Random) -> str:
    """10 MB of a prompt, of brackets or of nothing."""
    filling = random.choice([b'{"prompt": "' + b"a" * 10**7 + b'"}', b"[" * 10**7, bytes(10**7)])
    return await _send(streams, _post(filling))


async def endless_chunks(streams: Streams, _: Random) -> str:
    """Chunks without an announced length, until it is enough."""
    streams[1].write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    return await _pour(streams, b"10000\r\n" + b" " * 65536 + b"\r\n")


async def endless_head(streams: Streams, _: Random) -> str:
    """A header that doesn't end."""
    streams[1].write(b"GET /health HTTP/1.1\r\nX: ")
    return await _pour(streams, b"a" * 65536)


async def silent(streams: Streams, random: Random) -> str:
    """Nothing, half a head, or half a body."""
    return await _send(streams, random.choice([b"", b"POST /v1/comp", _post(b'{"prompt": "', 1000)]))


async def left_stream(streams: Streams, random: Random) -> str:
    """A stream whose reader resets the connection."""
    body = _asking(stream=True, n=random.randrange(1, 4), max_tokens=random.randrange(1, 400))
    status = await _send(streams, _post(body))
    await streams[0].read(random.randrange(1, 2000))
    own = streams[1].get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return status


async def slow_reader(streams: Streams, _: Random) -> str:
    """A stream, read a little at a time; it has to end as it should."""
    body = _asking(stream=True, logprobs=20, max_tokens=200)
    status = await _send(streams, _post(body))
    came = b""
    while status == "200" and not came.endswith(b"0\r\n\r\n"):
        part = await streams[0].read(20_000)
        if not part:
            return "cut off"
        came = came[-100:] + part
        await asyncio.sleep(0.05)
    return status if status != "200" or b"[DONE]" in came else "cut off"


async def pipelined(streams: Streams, _: Random) -> str:
    """Many requests before the first answer is read."""
    return await _send(streams, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 200)


async def odd_heads(streams: Streams, random: Random) -> str:
    """Heads that contradict themselves, or that want another protocol."""
    body = _asking(max_tokens=2)
    return await _send(
        streams,
        random.choice(
            [
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
                b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\nZZ\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET /../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
                b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
                _post(body, path=b"/v1/completions?" + b"a=b&" * 500),
            ]
        ),
    )


Attack = Callable[[Streams, Random], Awaitable[str]]
ATTACKS: dict[Attack, frozenset[str]] = {
    garbage: REFUSED,
    broken_json: REFUSED | {"200"},
    long_body: REFUSED - {"closed"},
    endless_chunks: REFUSED - {"closed"},
    endless_head: REFUSED,
    silent: REFUSED,
    left_stream: frozenset({"200", "429"}),
    slow_reader: frozenset({"200", "429"}),
    pipelined: frozenset({"200"}),
    odd_heads: REFUSED | {"200"},
}
"""What may come of each: an answer or a refusal, never a failure, never nothing."""


@pytest.fixture(scope="module")
def attacked(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    directory = tmp_path_factory.mktemp("attacked") / "model"
    shutil.copytree(tiny_onnx, directory)
    speaking(directory)
    server = Running(directory, "--batch", "4", "--queue", "64", "--max-body", str(MOST_BODY))
    yield server, directory
    server.process.kill()
    server.process.wait()


async def _attack(
    port: int, number: int, free: asyncio.Semaphore, seen: Counter[str], wrong: dict[str, list[str]]
) -> None:
    kinds = list(ATTACKS)
    kind = kinds[number % len(kinds)]
    async with free:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            ended = await asyncio.wait_for(kind((reader, writer), draw("attack", number)), PATIENCE_S)
        except TimeoutError:
            ended = "hung"
        except ConnectionError:
            ended = "closed"
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
    seen[f"{kind.__name__} {ended}"] += 1
    if ended not in ATTACKS[kind]:
        wrong[f"{number}"] = [f"{kind.__name__}: {ended}"]


async def _befriend(port: int, number: int, known: list[list[int]], over: asyncio.Event, seen: Counter[str]) -> None:
    """Ask again and again, as a client that means well; every answer has to be the right one."""
    while not over.is_set():
        number = (number + 5) % len(PROMPTS)
        body = _asking(prompt=PROMPTS[number], max_tokens=8, temperature=0, return_token_ids=True)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status = await _send((reader, writer), _post(body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        told = json.loads(await reader.readexactly(size))
        writer.close()
        if status == "429":
            await asyncio.sleep(0.1)
        right = status == "429" or told["choices"][0]["token_ids"] == known[number]
        seen[status if right else "wrong"] += 1


async def _all(port: int, known: list[list[int]], seen: Counter[str], friendly: Counter[str]) -> dict[str, list[str]]:
    over, free, wrong = asyncio.Event(), asyncio.Semaphore(AT_ONCE), dict[str, list[str]]()
    friends = [asyncio.create_task(_befriend(port, number, known, over, friendly)) for number in range(FRIENDS)]
    count = max(len(ATTACKS), round(COUNT * SCALE))
    await asyncio.gather(*(_attack(port, number, free, seen, wrong) for number in range(count)))
    over.set()
    await asyncio.gather(*friends)
    return wrong


def _rss_mib(pid: int) -> float:
    resident: int = psutil.Process(pid).memory_info().rss
    return resident / 2**20


def test_attacked_server(attacked: tuple[Running, Path], figures: Figures) -> None:
    server, directory = attacked
    decoder = runtime.load(directory)
    generator = TextGenerator(decoder, directory)
    known = [[int(t) for t in decoder.greedy(generator.encode(each, chat=False), 8)] for each in PROMPTS]
    assert len({tuple(tokens) for tokens in known}) > len(PROMPTS) // 2
    group, began = figures.group(f"attacks on `optikit serve`, {AT_ONCE} at once", COUNT), time.monotonic()
    friends = figures.group(f"requests of {FRIENDS} clients in the meantime, each answer held to plain decoding", 0)
    before = _rss_mib(server.process.pid)
    group.wrong |= asyncio.run(_all(server.port, known, group.ended, friends.ended))
    friends.wanted = friends.count
    group.seconds = friends.seconds = time.monotonic() - began
    grown = _rss_mib(server.process.pid) - before
    deadline = time.monotonic() + 60
    while (told := json.loads(server.raw("GET", "/health")[1]))["running"] + told["waiting"]:
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    assert group.wrong == {}
    assert friends.ended["200"] > 0
    assert set(friends.ended) <= {"200", "429"}
    assert grown < MOST_GROWTH_MIB
    assert server.end() == (0, "")
