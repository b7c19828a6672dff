"""`optikit serve` as one function: an artifact behind OpenAI's API, on this machine, with its speculator.

It listens to this machine alone unless told otherwise: without `api_key` anybody who reaches the port may ask.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optikit.errors import UnavailableError

GRACE_SECONDS = 30
"""How long answers may go on after the server was told to stop."""
SWITCH_SECONDS = 0.0005
"""How long the decoder's thread may keep Python from the answers that wait to be sent; 0.005 by default."""
MOST_CONNECTIONS = 1000
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asked for.

    Attributes:
        directory: What to serve: an output, a compiled directory or a model.
        host: Address to listen at.
        port: Port; 0 takes a free one.
        batch: Answers written at once.
        queue: Requests that may wait.
        api_key: What clients have to send; "" lets everybody in.
        name: What the model is called; "" is the directory's name.
        most_bytes: Longest body of a request.
        stream_interval_ms: Least time between two events of a stream but its first and its last.
        max_tokens: Longest text, prompt and answer together; None is the model's context.
        threads: CPU threads; None is all.
        device: Where a model for transformers computes.
        speculator: Directory of its speculation; None is the one that a run left beside the model.
    """

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 4
    queue: int = 64
    api_key: str = field(default="", repr=False)
    name: str = ""
    most_bytes: int = 2**20
    stream_interval_ms: float = 20.0
    max_tokens: int | None = None
    threads: int | None = None
    device: str = "cpu"
    speculator: Path | None = None


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until a signal comes; answers that are being written are finished first.

    Args:
        settings: What to serve, and how.
        ready: Told the address once it answers.

    Raises:
        UnavailableError: The packages of the extra `serve` aren't installed, or the address is taken.
        OptikitError: The directory can't be served; see `door.enter` and `runtime.load`.
    """
    from optikit import runtime
    from optikit.app import door
    from optikit.app.device import choose
    from optikit.runtime.generate import TextGenerator

    try:
        import uvicorn

        from optikit.serving.guarded_http import GuardedProtocol
        from optikit.serving.scheduler import Scheduler
        from optikit.serving.service import Limits, Service
    except ModuleNotFoundError as error:
        raise UnavailableError(f"serving needs {error.name}", fix="pip install 'optikit[serve]'") from error
    _, place = door.enter(settings.directory)
    interval_s = settings.stream_interval_ms / 1000
    limits = Limits(api_key=settings.api_key, most_bytes=settings.most_bytes, interval_s=interval_s)
    with _bound(settings.host, settings.port) as listening:
        how: dict[str, Any] = {"threads": settings.threads, "max_tokens": settings.max_tokens}
        how["speculator"] = settings.speculator or "auto"
        decoder = runtime.load(settings.directory, device=choose(settings.device), **how)
        generator = TextGenerator(decoder, place)
        name = settings.name or settings.directory.resolve().name
        sys.setswitchinterval(SWITCH_SECONDS)
        with Scheduler(decoder, places=settings.batch, most_waiting=settings.queue) as scheduler:
            app = Service(scheduler, generator, name, limits).app()
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            url = f"http://{host}:{listening.getsockname()[1]}"
            server = _server(uvicorn, app, GuardedProtocol, lambda: ready(url))
            server.run(sockets=[listening])


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Take an address before the model is loaded: that it is taken shows at once.

    Raises:
        UnavailableError: It can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise UnavailableError(
            f"can't listen at {host}:{port}: {error}", fix="choose another --port or --host"
        ) from error
    with listening:
        yield listening


def _server(uvicorn: Any, app: Any, protocol: type, ready: Callable[[], None]) -> Any:
    """Return a server that says when it answers, and that ends as asked by a signal, not by it."""

    class Server(uvicorn.Server):  # type: ignore[misc]  # the package is imported only where it is used
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            former = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
            try:
                yield
            finally:
                for number, handler in former.items():
                    signal.signal(number, handler)

    config = uvicorn.Config(
        app,
        http=protocol,
        log_level="error",
        access_log=False,
        lifespan="off",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    return Server(config)
