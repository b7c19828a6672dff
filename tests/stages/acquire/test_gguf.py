"""A gguf file becomes a model directory with exactly the weights that the file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optikit.errors import IntegrityError
from optikit.models.reader import read, read_gguf
from optikit.stage import Job
from optikit.stages.acquire import gguf as stage
from optikit.targets import find
from tests.models import gguf_files

TOKENS = ["a", "abc", "Hello, wörld 🙂"]


def acquire(source: Path, dest: Path) -> dict[str, object]:
    dest.mkdir()
    return stage.run(stage.Options(), Job(source=source, dest=dest, scratch=dest))


def test_weights_tokenizer_and_template_are_those_of_the_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, dest = tmp_path / "tiny.gguf", tmp_path / "model"
    held = gguf_files.write(source)
    facts = acquire(source, dest)
    assert facts["tensor_types"] == {"F32": 5, "Q4_1": 15}
    tensors = load_file(dest / "model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    for layer in range(gguf_files.LAYERS):
        for linear, short in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
            mine = tensors[f"model.layers.{layer}.{linear}.weight"]
            theirs = torch.from_numpy(held[f"blk.{layer}.{short}.weight"]).to(torch.bfloat16)
            assert torch.equal(mine, theirs)
        for linear, short, heads in (("q_proj", "attn_q", gguf_files.HEADS), ("k_proj", "attn_k", gguf_files.KV_HEADS)):
            mine = tensors[f"model.layers.{layer}.self_attn.{linear}.weight"]
            theirs = torch.from_numpy(held[f"blk.{layer}.{short}.weight"]).to(torch.bfloat16)
            # llama.cpp interleaves the two halves of each head that rotary embedding pairs
            paired = theirs.reshape(heads, -1, 2, gguf_files.HIDDEN).transpose(1, 2).reshape(theirs.shape)
            assert torch.equal(mine, paired)
    assert torch.equal(
        tensors["model.embed_tokens.weight"], torch.from_numpy(held["token_embd.weight"]).to(torch.bfloat16)
    )

    config = json.loads((dest / "config.json").read_text())
    assert not [key for key in config if "name_or_path" in key]
    assert config["dtype"] == "bfloat16"
    tokenizer_config = json.loads((dest / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(tokenizer_config)
    tokenizer = AutoTokenizer.from_pretrained(dest)
    assert tokenizer.chat_template == gguf_files.TEMPLATE
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc", add_special_tokens=False).input_ids) == ["abc"]
    for text in TOKENS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    model = AutoModelForCausalLM.from_pretrained(dest)
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[0, 5, 6]])).logits).all()


def test_the_plan_knew_it_all_before(tmp_path: Path) -> None:
    source, dest = tmp_path / "tiny.gguf", tmp_path / "model"
    gguf_files.write(source)
    acquire(source, dest)
    promised = stage.after(stage.Options(), read_gguf(source))
    found = read(dest)
    for name in ("linears", "traits", "dtype", "weight_bytes", "parameters", "tied", "heads", "intermediate"):
        assert getattr(promised, name) == getattr(found, name), name
    cpu = find("cpu")
    assert cpu is not None
    estimate = stage.estimate(stage.Options(), promised, cpu, 0)
    assert estimate.disk_bytes >= sum(path.stat().st_size for path in dest.iterdir()) - 20_000
    assert list(stage.check(stage.Options(), promised, cpu)) == []


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        gguf_files.write(tmp_path / name / f"{name}.gguf")
        acquire(tmp_path / name / f"{name}.gguf", tmp_path / name / "model")
    for path in (tmp_path / "a" / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "model" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", spoil=value)
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight holds NaN or infinity"):
        acquire(tmp_path / "tiny.gguf", tmp_path / "model")
