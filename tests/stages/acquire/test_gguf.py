"""A gguf file becomes a model directory with exactly the weights that the file holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optikit.errors import IntegrityError, RecipeError
from optikit.models.gguf_header import read_header
from optikit.models.gguf_reader import read_gguf
from optikit.models.reader import read
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
    for name in ("linears", "traits", "dtype", "parameters", "tied", "heads", "intermediate"):
        assert getattr(promised, name) == getattr(found, name), name
    norms = 2 * (2 * gguf_files.LAYERS + 1) * gguf_files.HIDDEN  # whose values only float32 holds
    assert found.weight_bytes == promised.weight_bytes + norms
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


def factors(**scaling: Any) -> np.ndarray[Any, Any]:
    """What llama3 scaling divides each frequency by, from transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    told = {"rope_theta": 10000.0, **scaling}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=told)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    return np.asarray(plain / scaled.numpy())


LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "yarn": (
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 4.0,
            "llama__rope__scaling__original_context_length": 32,
        },
        YARN,
    ),
    "yarn, told of all": (
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 4.0,
            "llama__rope__scaling__original_context_length": 32,
            "llama__rope__scaling__attn_factor": 0.5,
            "llama__rope__scaling__yarn_beta_fast": 16.0,
            "llama__rope__scaling__yarn_beta_slow": 2.0,
        },
        {**YARN, "attention_factor": 0.5 * (0.1 * math.log(4) + 1), "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "none": ({"llama__rope__scaling__type": "none"}, {"rope_type": "default"}),
    "llama3": ({"tensors": {"rope_freqs.weight": factors(**LLAMA3)}}, LLAMA3),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rotary_embeddings_are_written_as_the_file_has_them(name: str, tmp_path: Path) -> None:
    told, wanted = SCALED[name]
    gguf_files.write(tmp_path / "tiny.gguf", **told)
    assert read_gguf(tmp_path / "tiny.gguf").config["rope_parameters"] == {"rope_theta": 10000.0, **wanted}
    acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    found = json.loads((tmp_path / "model" / "config.json").read_text())["rope_parameters"]
    assert found == {"rope_theta": 10000.0, **wanted}


def test_biases_are_read_where_all_of_a_kind_are_there(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    draw = np.random.default_rng(1)
    widths = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}
    biases = {f"blk.{n}.{name}.bias": draw.normal(size=width) for n in range(2) for name, width in widths.items()}
    held = gguf_files.write(tmp_path / "tiny.gguf", tensors=biases)
    acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    assert read(tmp_path / "model").config["attention_bias"] is True
    found = load_file(tmp_path / "model" / "model.safetensors")
    theirs = torch.from_numpy(held["blk.1.attn_v.bias"])
    assert torch.equal(found["model.layers.1.self_attn.v_proj.bias"], theirs)
    paired = torch.from_numpy(held["blk.0.attn_q.bias"]).reshape(4, -1, 2).transpose(1, 2).reshape(-1)
    assert torch.equal(found["model.layers.0.self_attn.q_proj.bias"], paired)
    del biases["blk.0.attn_output.bias"], biases["blk.1.attn_output.bias"]
    gguf_files.write(tmp_path / "three.gguf", tensors=biases)
    with pytest.raises(IntegrityError, match=r"no place for tensor model\.layers\.0\.self_attn\.k_proj\.bias"):
        read_gguf(tmp_path / "three.gguf")


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "a scaling": ({"llama__rope__scaling__type": "longrope"}, r"llama\.rope\.scaling\.type is 'longrope'"),
    "a setting": ({"llama__attn_logit_softcapping": 30.0}, r"llama\.attn_logit_softcapping is 30"),
    "experts": ({"llama__expert_count": 8}, r"num_experts_per_tok is None"),
    "another width": ({"llama__attention__value_length": 32}, r"llama\.attention\.value_length is 32"),
    "a factor without a type": ({"llama__rope__scaling__factor": 4.0}, r"llama\.rope\.scaling\.factor is 4"),
    "no factor": ({"llama__rope__scaling__type": "linear"}, r"llama\.rope\.scaling\.factor is None"),
    "a tensor": ({"tensors": {"blk.0.attn_sub_norm.weight": np.ones(64)}}, r"blk\.0\.attn_sub_norm\.weight"),
    "an output bias": ({"tensors": {"output.bias": np.ones(260)}}, r"output\.bias"),
    "another table": ({"tensors": {"rope_freqs.weight": np.linspace(1, 2, 8)}}, r"rope_freqs\.weight is 'a table"),
    "both": (
        {
            "tensors": {"rope_freqs.weight": np.ones(8)},
            "llama__rope__scaling__type": "linear",
            "llama__rope__scaling__factor": 2.0,
        },
        "a second scaling beside linear",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_is_refused_by_name(name: str, tmp_path: Path) -> None:
    told, message = UNKNOWN[name]
    gguf_files.write(tmp_path / "tiny.gguf", **told)
    with pytest.raises(RecipeError, match=message):
        read_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", spoil=value)
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight holds NaN or infinity"):
        acquire(tmp_path / "tiny.gguf", tmp_path / "model")


@pytest.mark.parametrize("scale", [b"\x00\x7e", b"\x00\x7c", b"\xff\xff"])
def test_scales_that_are_not_finite_are_refused(scale: bytes, tmp_path: Path) -> None:
    """In the middle of a tensor, as a damaged disk or a quantizer without calibration leaves them."""
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path)
    tensor = read_header(path).tensors["blk.1.ffn_down.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.start + 20 * 37)  # of a Q4_1 block
        file.write(scale)
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinity") as raised:
        acquire(path, tmp_path / "model")
    assert raised.value.code == 76


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"tensors": {"blk.0.ffn_up.weight": np.ones((64, 64))}}, "has shape"),
    "more blocks": ({"blocks": 3}, "model.layers.2"),
    "absurd blocks": ({"blocks": 4000}, "4000 blocks with 0 experts, and 20 tensors"),
    "a vector for a matrix": ({"tensors": {"blk.0.attn_v.weight": np.ones(64)}}, "attn_v|v_proj"),
    "another head": ({"tensors": {"output.weight": np.ones((250, 64))}}, "lm_head"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    told, message = CONTRADICTIONS[name]
    gguf_files.write(tmp_path / "tiny.gguf", **told)
    with pytest.raises((IntegrityError, RecipeError), match=message) as raised:
        read_gguf(tmp_path / "tiny.gguf")
    assert raised.value.code in (65, 76)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_matrix_that_is_there_twice_is_kept_once(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    source, dest = tmp_path / "tiny.gguf", tmp_path / "model"
    table = np.random.default_rng(5).normal(0, 0.1, (len(gguf_files.vocabulary()), gguf_files.HIDDEN)).astype("f4")
    held = gguf_files.write(
        source, tensors={"token_embd.weight": table, "output.weight": table}, kinds={"output.weight": kind}
    )
    assert read_gguf(source).tied
    assert acquire(source, dest)["one_matrix_twice"]
    tensors = load_file(dest / "model.safetensors")
    assert "lm_head.weight" not in tensors
    finer = "token_embd.weight" if kind == "Q4_0" else "output.weight"
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"].float().numpy(), bfloat16(held[finer]))
    assert read(dest).tied


def bfloat16(values: Any) -> Any:
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def test_two_matrices_stay_two_and_one_row_apart_is_told(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    shape = (len(gguf_files.vocabulary()), gguf_files.HIDDEN)
    table, other = draw.normal(0, 0.1, shape).astype("f4"), draw.normal(0, 0.1, shape).astype("f4")
    gguf_files.write(tmp_path / "two.gguf", tensors={"token_embd.weight": table, "output.weight": other})
    assert not read_gguf(tmp_path / "two.gguf").tied
    near = table + 0.3 * other  # trained apart from one start
    gguf_files.write(tmp_path / "near.gguf", tensors={"token_embd.weight": table, "output.weight": near})
    assert not read_gguf(tmp_path / "near.gguf").tied
    odd = table.copy()
    odd[3] = -odd[3]  # no row that is sampled
    gguf_files.write(
        tmp_path / "odd.gguf",
        tensors={"token_embd.weight": table, "output.weight": odd},
        kinds={"output.weight": "Q8_0"},
    )
    assert read_gguf(tmp_path / "odd.gguf").tied
    with pytest.raises(IntegrityError, match=r"one matrix, but for row 3, where"):
        acquire(tmp_path / "odd.gguf", tmp_path / "model")
