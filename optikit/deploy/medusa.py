"""Medusa heads in the layouts that servers load: one set of tensors, several names for them.

- `v1`: TGI, TensorRT-LLM's engine backend, and vLLM 0.32, as FasterDecoding/Medusa first wrote them. Every head carries
  an output layer of its own; heads that share the model's are given copies of it.
- `vllm`: vLLM's own names, for all its versions that know Medusa.
- `nxdi`: NxD Inference. It reads a torch file beside the model; that file holds plain tensors only and is read back
  with `weights_only=True`, which runs no code.

`optikit.deploy.support` says which versions of which server load what.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import UsageError
from optikit.models import intake
from optikit.models import tokenizer as files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from optikit.algorithms.medusa import MedusaHeads

V1_FILE = "medusa_lm_head.safetensors"
VLLM_FILE = "model.safetensors"
NXDI_FILE = "medusa_heads.pt"
SAGEMAKER_BASE = "/opt/ml/model/base-model/"
"""Where a SageMaker container finds the base model of a bundle."""


@dataclass(frozen=True, kw_only=True)
class HeadSet:
    """Heads, whatever they are called elsewhere.

    Attributes:
        blocks: Of each head, of each of its residual layers: weight (hidden, hidden) and bias (hidden,).
        outputs: Output layer (vocab, hidden) of each head; empty where all share the model's.
        lm_head: The model's own output layer (vocab, hidden).
    """

    blocks: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    outputs: tuple[Tensor, ...]
    lm_head: Tensor

    def __post_init__(self) -> None:
        vocab, hidden = self.lm_head.shape
        wrong = [each for each in self.outputs if each.shape != (vocab, hidden)]
        if wrong:
            message = (
                f"an output layer has shape {tuple(wrong[0].shape)}, not {(vocab, hidden)}: it can't draft all tokens"
            )
            raise UsageError(message, fix="train heads with the whole vocabulary, or with the model's output layer")
        if self.outputs and len(self.outputs) != len(self.blocks):
            message = f"{len(self.blocks)} heads have {len(self.outputs)} output layers"
            raise UsageError(message, fix="give each head one, or none")

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.blocks)

    @property
    def layers(self) -> int:
        """Residual layers per head."""
        return len(self.blocks[0])

    @property
    def vocab(self) -> int:
        """Tokens that can be drafted."""
        return int(self.lm_head.shape[0])

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(self.lm_head.shape[1])

    def output(self, head: int) -> Tensor:
        """Return the output layer that a head reads out through."""
        return self.outputs[head] if self.outputs else self.lm_head


def head_set(heads: MedusaHeads, lm_head: Tensor) -> HeadSet:
    """Return trained heads as a `HeadSet`.

    Heads that share the model's output layer are given all of it, also where they drafted from a part of the
    vocabulary here: no server knows which part.

    Args:
        heads: The heads.
        lm_head: (vocab, hidden): the model's own output layer.

    Raises:
        UsageError: Output layers of their own, cut to a draft vocabulary; or heads that see drafted tokens.
    """
    if heads.sequential:
        message = "heads that see the tokens drafted before theirs fit no server's layout"
        raise UsageError(message, fix="train heads with sequential: false")
    return HeadSet(
        blocks=tuple(tuple(heads.linears(head)) for head in range(heads.heads)),
        outputs=() if heads.shared else tuple(heads.outputs),
        lm_head=lm_head,
    )


def v1_tensors(heads: HeadSet) -> dict[str, Tensor]:
    """Return `{i}.{j}.linear.weight`, `{i}.{j}.linear.bias`, `{i}.{layers}.weight` for head i, layer j."""
    out = {}
    for i, blocks in enumerate(heads.blocks):
        for j, (weight, bias) in enumerate(blocks):
            out[f"{i}.{j}.linear.weight"] = weight
            out[f"{i}.{j}.linear.bias"] = bias
        out[f"{i}.{heads.layers}.weight"] = heads.output(i)
    return out


def v1_config(heads: HeadSet, base: str) -> dict[str, Any]:
    """Return a configuration that TGI, vLLM 0.32 and TensorRT-LLM each read their own part of.

    There is no `architectures`: TGI takes any for a sign of another kind of speculator and loads none. vLLM fills in
    `hidden_size` 4096, `vocab_size` 32001 and no biases where the keys are missing, and takes every key with "num" and
    "heads" or "layers" in it for the number of heads or layers. TensorRT-LLM reads both spellings of the first key.
    """
    return {
        "model_type": "medusa",
        "base_model_name_or_path": base,
        "medusa_num_heads": heads.heads,
        "num_medusa_heads": heads.heads,
        "medusa_num_layers": heads.layers,
        "medusa_fc_bias": True,
        "hidden_size": heads.hidden,
        "vocab_size": heads.vocab,
    }


def vllm_tensors(heads: HeadSet) -> dict[str, Tensor]:
    """Return `blocks.{i}.layers.{j}.weight|bias` and `lm_heads.{i}.weight`; one of the latter where heads share it."""
    out = {}
    for i, blocks in enumerate(heads.blocks):
        for j, (weight, bias) in enumerate(blocks):
            out[f"blocks.{i}.layers.{j}.weight"] = weight
            out[f"blocks.{i}.layers.{j}.bias"] = bias
    for i in range(heads.heads if heads.outputs else 1):
        out[f"lm_heads.{i}.weight"] = heads.output(i)
    return out


def vllm_config(heads: HeadSet) -> dict[str, Any]:
    """Return vLLM's MedusaConfig; `original_lm_head` is its word for one output layer shared by all heads."""
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.hidden,
        "vocab_size": heads.vocab,
        "truncated_vocab_size": None,
        "num_heads": heads.heads,
        "num_hidden_layers": heads.layers,
        "medusa_fc_bias": True,
        "original_lm_head": not heads.outputs,
    }


def nxdi_tensors(heads: HeadSet) -> dict[str, Tensor]:
    """Return `medusa_head_{i}.0.linear.weight|bias` and `medusa_head_{i}.1.weight`.

    Raises:
        UsageError: More than one layer per head; NxD Inference builds exactly one.
    """
    if heads.layers != 1:
        message = f"NxD Inference builds Medusa heads of one layer; these have {heads.layers}"
        raise UsageError(message, fix="train heads with layers: 1")
    return {f"medusa_head_{name}": tensor for name, tensor in v1_tensors(heads).items()}


def nxdi_config(heads: HeadSet) -> dict[str, Any]:
    """Return what NxD Inference's NeuronConfig has to hold; the tree is the chain of likeliest tokens."""
    chain = [[0] * depth for depth in range(1, heads.heads + 1)]
    return {
        "is_medusa": True,
        "num_medusa_heads": heads.heads,
        "medusa_speculation_length": len(chain) + 1,
        "medusa_tree": chain,
        "batch_size": 1,
    }


def write_v1(heads: HeadSet, dest: Path, *, base: str, tokenizer: Path, dtype: torch.dtype) -> None:
    """Write the `v1` directory; TGI is given it as its model, so the tokenizer is beside the heads.

    Args:
        heads: The heads.
        dest: Directory to write to.
        base: Hub id or path of the model that the heads belong to, as the server will see it.
        tokenizer: Directory whose tokenizer files are copied.
        dtype: Of the tensors; the model's own.
    """
    dest.mkdir(parents=True, exist_ok=True)
    _save(v1_tensors(heads), dest / V1_FILE, dtype)
    _write_json(v1_config(heads, base), dest / "config.json")
    files.copy(tokenizer, dest)


def write_vllm(heads: HeadSet, dest: Path, *, dtype: torch.dtype) -> None:
    """Write the directory that vLLM's `speculative_config` names as `model`."""
    dest.mkdir(parents=True, exist_ok=True)
    _save(vllm_tensors(heads), dest / VLLM_FILE, dtype)
    _write_json(vllm_config(heads), dest / "config.json")


def write_nxdi(heads: HeadSet, dest: Path, *, dtype: torch.dtype) -> None:
    """Write `medusa_heads.pt`, to be put into the model's directory, and `neuron_config.json` to merge into its own."""
    import torch

    dest.mkdir(parents=True, exist_ok=True)
    tensors = {name: each.detach().to(dtype).contiguous().clone() for name, each in nxdi_tensors(heads).items()}
    torch.save(tensors, dest / NXDI_FILE)
    torch.load(dest / NXDI_FILE, weights_only=True)
    _write_json(nxdi_config(heads), dest / "neuron_config.json")


def write_sagemaker(heads: HeadSet, dest: Path, *, model: Path, dtype: torch.dtype) -> None:
    """Write the contents of a SageMaker model archive for TGI: the heads on top, the model in `base-model/`."""
    write_v1(heads, dest, base=SAGEMAKER_BASE, tokenizer=model, dtype=dtype)
    base = dest / "base-model"
    base.mkdir(exist_ok=True)
    for name in intake.model_files(model):
        shutil.copyfile(model / name, base / name)


def _save(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Write tensors, each with memory of its own: heads may share one output layer, safetensors files may not."""
    from safetensors.torch import save_file

    own = {name: each.detach().to(dtype).contiguous().clone() for name, each in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
