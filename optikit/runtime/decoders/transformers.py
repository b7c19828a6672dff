"""`TorchDecoder`: transformers as its users run it, for dense directories and for packed ones unpacked while loading.

`greedy` is `model.generate` with a streamer, not a loop of ours: its speed is the baseline that results are compared
with. `forward` keeps a cache of full length per layer, which can be cut back to any position.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.utils import logging

from optikit import host
from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.formats import activations, dense_model
from optikit.models import architectures, language_part
from optikit.runtime.decoder import Logits, Tokens
from optikit.runtime.decoders.checks import cache_argument, check_call, check_room, require_blocks
from optikit.runtime.decoders.transformers_batch import KINDS, TorchBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DOWN = (".down_proj", ".w2")
"""What experts' down projections are called."""
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without progress bars: stderr belongs to whoever called."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(directory: Path, dtype: str = "auto") -> Any:
    """Return the transformers model of a directory, dense or packed in a format that `optikit.formats` reads.

    Raises:
        InputMissingError: config.json or the weights are missing.
        IntegrityError: A file is damaged, or the weights aren't what config.json says.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise InputMissingError(f"{directory} has no config.json", fix="give a Hugging Face model directory")
    wanted = "auto" if dtype == "auto" else DTYPES[dtype]
    try:
        told = json.loads(config_file.read_text(encoding="utf-8"))
        ours = "quantization_config" in told or language_part.is_wrapped(
            told
        )  # transformers' wrappers want images, too
        model, missing = _unpack(directory, wanted) if ours else _read(directory, wanted)
    except (ValueError, OSError, SafetensorError) as error:
        raise IntegrityError(
            f"transformers can't load {directory}: {error}", fix="check the model directory"
        ) from error
    if missing:  # transformers would go on with random numbers
        raise IntegrityError(f"{directory} lacks tensor {min(missing)}", fix="fetch or write the model again")
    return model


def _read(directory: Path, dtype: torch.dtype | str) -> tuple[Any, set[str]]:
    """Load a dense directory; return the model and the names of missing tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL
    )
    return model, set(info["missing_keys"])


def _unpack(directory: Path, dtype: torch.dtype | str) -> tuple[Any, set[str]]:
    """Build the dense model that a packed directory stands for, without the packer's library.

    Returns:
        The model, and the names of missing tensors.
    """
    model, missing, _ = dense_model.load(directory, dtype)
    round_activations(model, directory)
    return model.eval(), missing


def round_activations(model: torch.nn.Module, directory: Path) -> None:
    """Let a model round what its linears are given where a server of the directory does."""
    rounded = {_within(name): rounding for name, rounding in activations.of(directory).items()}
    for name, module in model.named_modules():
        if _within(name) in rounded:
            module.register_forward_pre_hook(partial(_round_input, rounded[_within(name)]))
        elif hasattr(module, "_apply_gate") or _is_llama4(module):
            block = _within(name).split(".")[:2]
            _round_experts(
                module, {n: each for n, each in rounded.items() if ".experts." in n and n.split(".")[:2] == block}
            )


def _within(name: str) -> str:
    """Return a module's name from its list of blocks on: checkpoints of wrappers have others before it."""
    return name[max(name.find("layers."), 0) :]


def _round_input(
    rounding: activations.Rounding, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Round inputs as the server does, so that quality is that of the served model."""
    return (rounding(inputs[0]), *inputs[1:])


def _round_experts(module: Any, rounded: Mapping[str, activations.Rounding]) -> None:
    """Round what a block's stacked experts are given, and what their down projections are given."""
    inner = [each for name, each in rounded.items() if name.endswith(DOWN)]
    outer = [each for name, each in rounded.items() if not name.endswith(DOWN)]
    if outer:
        module.register_forward_pre_hook(partial(_round_input, activations.shared(outer)))
    if not inner:
        return
    rounding = activations.shared(inner)
    if _is_llama4(module):
        module.forward = lambda hidden: _llama4_experts(module, hidden, rounding)
        return
    gate = module._apply_gate  # noqa: SLF001 - transformers' only seam there
    module._apply_gate = lambda joined: rounding(gate(joined))  # noqa: SLF001


def _is_llama4(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _llama4_experts(module: Any, hidden: torch.Tensor, rounding: activations.Rounding) -> torch.Tensor:
    """Compute what Llama 4's experts do, with rounded inputs of their down projections."""
    each = hidden.view(len(module.gate_up_proj), -1, module.hidden_size)
    gate, up = torch.bmm(each, module.gate_up_proj).chunk(2, dim=-1)
    return torch.bmm(rounding(up * module.act_fn(gate)), module.down_proj).view(-1, module.hidden_size)


class _AbandonedError(Exception):
    """The reader has gone."""


class _Streamer:
    """What `generate` calls with the prompt and then with each token: passes them on, until the reader has gone."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self._queue = queue
        self._prompt_seen = False
        self.abandoned = False

    def put(self, value: torch.Tensor) -> None:
        if self.abandoned:
            raise _AbandonedError
        if self._prompt_seen:
            self._queue.put(int(value.item()))
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing: the thread says when it is over."""


class TorchDecoder:
    """A Hugging Face directory with its cache; see `decoder.Decoder`.

    Args:
        directory: Dense, or packed in a format that `optikit.formats` reads.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        threads: CPU threads; None is all that this process may use. torch has one setting per process.
        max_tokens: Longest sequence; None is what the model was made for.
        device: torch device of weights and cache; tokens and logits are the caller's, on the CPU.

    Raises:
        InputMissingError: config.json or the weights are missing.
        IntegrityError: A file is damaged, or the weights aren't what config.json says.
        UsageError: Unknown dtype, or `max_tokens` beyond the model's context.
    """

    runtime = "transformers"

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        max_tokens: int | None = None,
        device: str = "cpu",
    ) -> None:
        if dtype not in ("auto", *DTYPES):
            raise UsageError(f"transformers can't run in {dtype}", fix=f"use auto, {', '.join(DTYPES)}")
        self.threads = threads or host.threads()
        torch.set_num_threads(self.threads)
        with _quiet():
            self._model = load_model(directory, dtype).to(device)
        self.device = device
        config = self._model.config
        told = architectures.context(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        context = told or int(config.max_position_embeddings)
        if max_tokens is not None and max_tokens > context:
            message = f"max_tokens {max_tokens} is beyond the model's context of {context} tokens"
            raise UsageError(message, fix=f"use {context} or less")
        self.max_tokens = max_tokens or context
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.vocab = int(config.vocab_size)
        self.width = int(config.hidden_size)
        # Nothing of the checkpoint's sampling settings, and no end-of-text: `greedy` has a fixed length.
        self._model.generation_config = GenerationConfig()
        # A recurrent layer's memory of a text can't be cut back, so that the text is kept to be read again.
        self._recurrent = not set(getattr(config, "layer_types", None) or ()) <= KINDS
        self._text = np.empty(0, np.int64)
        self._forget()
        self._seen = self._states = torch.empty(0)
        self._model.get_output_embeddings().register_forward_pre_hook(self._keep_states)
        self._features: dict[int, torch.Tensor] = {}
        gc.collect()

    def _forget(self) -> None:
        self._cache = DynamicCache(config=self._model.config) if self._recurrent else DynamicCache()
        self._cached = cache_argument(self._model, self._cache)

    def _keep_states(self, _head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen = inputs[0]  # of any forward of the model: a batch on it has its own

    def show_features(self, blocks: Sequence[int]) -> None:
        """Show from now on what some blocks are given; see `decoding_loop.FeatureDecoder`."""
        row = architectures.find(self._model.config.model_type)
        every = self._model.get_submodule(row.blocks) if row else ()
        require_blocks(blocks, len(every))
        for block in blocks:
            if block not in self._features:
                every[block].register_forward_pre_hook(partial(self._keep_input, block))
        self._features = {block: torch.empty(0) for block in blocks}

    def _keep_input(self, block: int, _block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if block in self._features:
            self._features[block] = inputs[0]

    def features(self) -> NDArray[np.float32]:
        """Return what the shown blocks were given in the last `forward`; see `decoding_loop.FeatureDecoder`."""
        found: NDArray[np.float32] = torch.cat([each[0] for each in self._features.values()], dim=-1).float().numpy()
        return found

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    def _given(self, tokens: Tokens) -> torch.Tensor:
        return torch.from_numpy(tokens)[None].to(self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run `tokens` (m,) at `position`; see `decoder.Decoder.forward`."""
        filled = len(self._text) if self._recurrent else self._cache.get_seq_length()
        check_call(tokens, position, rows=rows, filled=filled, vocab=self.vocab, max_tokens=self.max_tokens)
        if self._recurrent:
            before, self._text = self._text[:position], np.concatenate([self._text[:position], tokens])
            if position < filled:
                self._forget()
                if position:
                    self._model(self._given(before), **self._cached, use_cache=True, logits_to_keep=1)
        elif position < filled:
            self._cache.crop(position - filled)
        output = self._model(self._given(tokens), **self._cached, use_cache=True, logits_to_keep=rows or 0)
        self._states = self._seen[0]
        logits: Logits = output.logits[0].float().cpu().numpy()
        return logits

    def hidden(self, row: int) -> NDArray[np.float32]:
        """Return what the output head read for a row of the last `forward`; see `decoding_loop.HiddenDecoder`."""
        state: NDArray[np.float32] = self._states[row].float().cpu().numpy()
        return state

    def batched(self, places: int) -> TorchBatch:
        """Return caches for several texts at once, on the same weights.

        Raises:
            UsageError: The model has layers that can't be rolled back.
        """
        return TorchBatch(self._model, places=places, max_tokens=self.max_tokens)

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield `new_tokens` greedy tokens after `prompt`; see `decoder.Decoder.greedy`."""
        check_call(prompt, 0, filled=0, vocab=self.vocab, max_tokens=self.max_tokens)
        check_room(len(prompt) + new_tokens, self.max_tokens)
        queue: SimpleQueue[Any] = SimpleQueue()
        streamer = _Streamer(queue)
        settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens)
        thread = Thread(target=self._generate, args=(prompt, settings, streamer, queue), daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            streamer.abandoned = True
            thread.join()

    def _generate(
        self, prompt: Tokens, settings: GenerationConfig, streamer: _Streamer, queue: SimpleQueue[Any]
    ) -> None:
        tokens = self._given(np.ascontiguousarray(prompt))
        try:
            self._model.generate(
                tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, streamer=streamer
            )
        except BaseException as error:  # noqa: BLE001 - whatever it is has to reach the caller's thread
            queue.put(error)
        else:
            queue.put(None)
