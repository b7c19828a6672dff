"""A model as vLLM serves it, decoding like a `Decoder`: what an arm of a speed test asks. It tells no logits.

The server lives as long as the process that made the decoder, whatever becomes of that: it ends when a pipe to it is
closed. Times are those of a client on the same machine, with the server's HTTP in them, as in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from optikit.models.reader import read
from optikit.process import memory
from optikit.runtime import vllm_server
from optikit.runtime.completions_client import Client
from optikit.runtime.decoder import Tokens


class ServedDecoder:
    """Decodes greedily through a server of its own.

    Args:
        directory: Hugging Face directory.
        threads: CPU threads of the server.
        max_tokens: Longest sequence, prompt and answer together.
        log: File for what the server prints.
        hang_s: Seconds that it may take until it answers, and without a byte.
        speculator: What a `speculate` stage wrote, for the server to draft with.

    Raises:
        StageFailedError: vLLM doesn't load the directory: its words are quoted.
        StageTimeoutError: It doesn't answer in time.
    """

    runtime = "vllm"

    def __init__(
        self,
        directory: Path,
        *,
        threads: int,
        max_tokens: int,
        log: Path,
        hang_s: float,
        speculator: Path | None = None,
    ) -> None:
        facts = read(directory)
        how = vllm_server.Serving(
            directory=directory,
            max_tokens=max_tokens,
            requests=1,
            threads=threads,
            cache_gib=vllm_server.cache_gib(facts, max_tokens),
            speculation=vllm_server.speculation(speculator) if speculator is not None else None,
        )
        self.dtype = facts.config.get("quantization_config", {}).get("quant_method") or _name(facts.dtype)
        self.threads = threads
        self.vocab = facts.vocab
        self.max_tokens = max_tokens
        self._server = ExitStack()
        url, self._group = self._server.enter_context(vllm_server.serving(how, log=log, start_s=hang_s))
        self._client = self._server.enter_context(Client(url, timeout_s=hang_s))

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield exactly `new_tokens` greedy tokens after `prompt` (n,), each as soon as the server tells it."""
        return self._client.tokens(vllm_server.NAME, prompt.tolist(), new_tokens)

    def peak_mib(self) -> float:
        """Return the highest resident memory of the server's processes, summed, MiB."""
        return memory.group_peak_mib(self._group)


def _name(dtype: str) -> str:
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(dtype, dtype.lower())
