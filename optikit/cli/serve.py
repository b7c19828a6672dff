"""`optikit serve DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optikit.app.device import DeviceChoice


def serve(
    directory: Annotated[
        Path, typer.Argument(help="Output of `optikit run`, a compiled directory or a model.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Answers that are written at once.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 429.")] = 64,
    api_key: Annotated[
        str, typer.Option(help="What clients have to send.", envvar="OPTIKIT_API_KEY", show_default=False)
    ] = "",
    name: Annotated[
        str, typer.Option(help="What the model is called; by default as its directory.", show_default=False)
    ] = "",
    max_body: Annotated[int, typer.Option(min=1024, help="Longest body of a request, bytes.")] = 2**20,
    stream_interval: Annotated[
        float,
        typer.Option(
            min=0, max=1000, help="Tokens that come within so many milliseconds are one event of a stream; 0: each is."
        ),
    ] = 20,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Longest text, prompt and answer; by default the context.", show_default=False),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all.", show_default=False)] = None,
    speculator: Annotated[
        Path | None,
        typer.Option(help="Directory of its speculation; by default the run's own.", show_default=False),
    ] = None,
    device: Annotated[DeviceChoice, typer.Option(help="Where a model for transformers computes.")] = DeviceChoice.CPU,
) -> None:
    """Serve what a run wrote behind OpenAI's API: completions, chats, streams, log-probabilities, metrics.

    It uses the artifact's own speculator, and stops on Ctrl-C or SIGTERM when the answers it writes are whole.
    """
    from optikit.app.serve import Settings
    from optikit.app.serve import serve as run

    settings = Settings(
        directory=directory,
        host=host,
        port=port,
        batch=batch,
        queue=queue,
        api_key=api_key,
        name=name,
        most_bytes=max_body,
        stream_interval_ms=stream_interval,
        max_tokens=max_length,
        threads=threads,
        device=device,
        speculator=speculator,
    )
    run(settings, lambda address: typer.echo(f"{address}/v1", err=True))
