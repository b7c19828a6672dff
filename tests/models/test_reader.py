"""Facts of real directories, dense and quantized; configurations that are absurd, or that would run code."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from optikit.errors import InputMissingError, IntegrityError, RecipeError, RefusedError
from optikit.models import architectures
from optikit.models.reader import read
from tests.families import CONFIGS, model_of

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(directory: Path, change: Edit, name: str = "config.json") -> None:
    path = directory / name
    loaded = json.loads(path.read_text()) if path.exists() else {}
    change(loaded)
    path.write_text(json.dumps(loaded))


def test_facts_of_a_dense_directory(tiny_llama: Path) -> None:
    facts = read(tiny_llama)
    assert (facts.model_type, facts.hidden, facts.intermediate, facts.layers) == ("llama", 64, 128, 2)
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.vocab) == (4, 2, 16, 260)
    assert (facts.max_positions, facts.tied, facts.dtype) == (512, True, "BF16")
    assert facts.traits == {"dense"}
    assert facts.linears["model.layers.1.mlp.down_proj"] == (64, 128)
    assert facts.weight_bytes == 2 * facts.parameters
    assert len(facts.tokenizer_sha256) == 64
    assert facts.config["model_type"] == "llama"
    assert facts.sliding_window is None


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_of_every_architecture(name: str, tmp_path: Path) -> None:
    model, row = model_of(name), architectures.rows()[name]
    model.save_pretrained(tmp_path)
    facts = read(tmp_path)
    assert facts.architecture is row
    modules = dict(model.named_modules())
    for linear, shape in facts.linears.items():
        weight = tuple(modules[linear].weight.shape)
        assert shape == (weight[::-1] if row.transposed else weight)
    assert (facts.hidden, facts.layers, facts.heads, facts.vocab, facts.head_dim) == (64, 2, 4, 260, 16)
    assert facts.intermediate == modules[f"{row.block(0)}.{row.linears[-1]}"].weight.shape[row.transposed ^ 1]
    told = {"num_key_value_heads", "num_kv_heads"} & CONFIGS[name].keys()
    assert facts.kv_heads == (2 if told else row.fixed.get("kv_heads", 4))
    assert facts.dtype == "F32"
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert facts.tied is tied


def test_a_checkpoint_without_the_first_part_of_its_names(tmp_path: Path) -> None:
    model_of("gpt2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    assert read(tmp_path).linears["transformer.h.0.attn.c_attn"] == (192, 64)


def _pack(directory: Path, rename: Callable[[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]) -> None:
    """Replace every linear of every block but one by what a quantizer would write."""
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = {name: t.to(torch.float16).numpy() for name, t in load_torch(directory / "model.safetensors").items()}
    packed = {}
    for name, tensor in tensors.items():
        if "proj.weight" in name and "layers.1.mlp.up" not in name:
            packed |= rename(name.removesuffix(".weight"), tensor)
        else:
            packed[name] = tensor
    save_file(packed, directory / "model.safetensors")


def gptq(bits: int) -> Callable[[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    def rename(name: str, weight: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        rows, columns = weight.shape
        return {
            f"{name}.qweight": np.zeros((columns * bits // 32, rows), np.int32),
            f"{name}.qzeros": np.zeros((columns // 32, rows * bits // 32), np.int32),
            f"{name}.scales": np.zeros((columns // 32, rows), np.float16),
            f"{name}.g_idx": np.zeros(columns, np.int32),
        }

    return rename


def awq(name: str, weight: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    rows, columns = weight.shape
    return {
        f"{name}.qweight": np.zeros((columns, rows // 8), np.int32),
        f"{name}.qzeros": np.zeros((columns // 32, rows // 8), np.int32),
        f"{name}.scales": np.zeros((columns // 32, rows), np.float16),
    }


def w8a8(name: str, weight: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{name}.weight": np.zeros(weight.shape, np.int8),
        f"{name}.weight_scale": np.zeros((weight.shape[0], 1), np.float16),
    }


def nf4(name: str, weight: np.ndarray[Any, Any], shape: Any = None) -> dict[str, np.ndarray[Any, Any]]:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": shape or list(weight.shape)})
    return {
        f"{name}.weight": np.zeros((weight.size // 2, 1), np.uint8),
        f"{name}.weight.absmax": np.zeros(weight.size // 64, np.float32),
        f"{name}.weight.quant_map": np.zeros(16, np.float32),
        f"{name}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
    }


def int8(name: str, weight: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{name}.weight": np.zeros(weight.shape, np.int8), f"{name}.SCB": np.zeros(weight.shape[0], np.float32)}


def _with(directory: Path, more: dict[str, np.ndarray[Any, Any]]) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = directory / "model.safetensors"
    save_torch(load_torch(path) | {name: torch.from_numpy(value) for name, value in more.items()}, path)


INT8 = {"num_bits": 8, "type": "int"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"weights": INT8, "input_activations": INT8, "targets": ["Linear"]}},
}
QUANTIZED = {
    "gptq 4": (gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": 32, "tokenizer": None}, "int4_gptq"),
    "gptq 8": (gptq(8), {"quant_method": "gptq", "bits": 8, "group_size": 32}, "int8_gptq"),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "int4_awq"),
    "w8a8": (w8a8, W8A8, "int8_w8a8"),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8_llm"),
    "nf4": (nf4, NF4, "nf4"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_facts_of_a_quantized_directory(name: str, copy: Path) -> None:
    dense = read(copy)
    rename, settings_, trait = QUANTIZED[name]
    _pack(copy, rename)
    edit(copy, lambda config: config.update(quantization_config=settings_))
    facts = read(copy)
    assert facts.linears == dense.linears
    assert facts.traits == {trait}
    assert facts.dtype == "F16"
    assert facts.weight_bytes < dense.weight_bytes


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_weights_that_nothing_tells_of_are_refused(name: str, copy: Path) -> None:
    rename, _, _ = QUANTIZED[name]
    _pack(copy, rename)
    with pytest.raises(RecipeError, match=r"holds packed weights \(.*\), and config.json has no quantization_config"):
        read(copy)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantization_that_no_weight_has_is_refused(name: str, copy: Path) -> None:
    _, settings_, trait = QUANTIZED[name]
    edit(copy, lambda config: config.update(quantization_config=settings_))
    with pytest.raises(RecipeError, match=f"promises weights that are {trait}, and not one is packed"):
        read(copy)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_a_weight_of_no_float_is_packed(dtype: str, copy: Path) -> None:
    path = copy / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    rows = json.loads(path.read_bytes()[8 : 8 + length])
    name = "model.layers.0.mlp.down_proj.weight"
    rows[name]["dtype"], rows[name]["shape"][0] = dtype, 2 * rows[name]["shape"][0]
    header = json.dumps(rows).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + path.read_bytes()[8 + length :])
    with pytest.raises(RecipeError, match=name):
        read(copy)


@pytest.mark.parametrize("shape", [[4, 4], [0, 64], [64], "64x64", [64, 64, 1]])
def test_a_packed_weight_whose_stated_shape_is_not_its_own_is_refused(shape: Any, copy: Path) -> None:
    _pack(copy, lambda name, weight: nf4(name, weight, shape))
    edit(copy, lambda config: config.update(quantization_config=NF4))
    with pytest.raises(IntegrityError, match=r"quant_state|stated"):
        read(copy)


UNKNOWN: list[Any] = [
    {"quant_method": "gptq", "bits": 5},
    {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    {"quant_method": "awq", "bits": 4, "version": "gemv_fast"},
    {"quant_method": "aqlm"},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "pre_quant_scale": True},
    NF4 | {"bnb_4bit_quant_storage": "bfloat16"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    W8A8 | {"config_groups": {"group_0": {"weights": INT8 | {"num_bits": 4}, "input_activations": INT8}}},
    W8A8 | {"config_groups": {"a": {"weights": INT8}, "b": {"weights": INT8 | {"num_bits": 4}}}},
    W8A8 | {"transform_config": {"config_groups": {"R1": {}}}},
    W8A8 | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "gptq",
]


@pytest.mark.parametrize("settings_", UNKNOWN)
def test_a_quantization_that_is_not_known_is_named(settings_: Any, copy: Path) -> None:
    edit(copy, lambda config: config.update(quantization_config=settings_))
    with pytest.raises(RecipeError, match="quantization"):
        read(copy)


CODE: dict[str, tuple[str, Edit]] = {
    "auto_map": ("config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling.Evil"})),
    "auto_map of a tokenizer": ("tokenizer_config.json", lambda c: c.update(auto_map=["tok.Evil", None])),
    "auto_map inside": ("config.json", lambda c: c.update(text_config={"deep": [{"auto_map": {"AutoConfig": "x.y"}}]})),
    "trust_remote_code": ("config.json", lambda c: c.update(trust_remote_code=True)),
    "trust in a quantization": (
        "config.json",
        lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4, "trust_remote_code": True}),
    ),
    "_attn_implementation_internal": (
        "config.json",
        lambda c: c.update(_attn_implementation_internal="evil/kernel"),
    ),
    "_experts_implementation_internal": ("config.json", lambda c: c.update(_experts_implementation_internal="x")),
    "attention kernel": ("config.json", lambda c: c.update(_attn_implementation="evil/kernel:run")),
    "model_file": ("config.json", lambda c: c.update(model_file="evil.py")),
    "foreign tokenizer": (
        "config.json",
        lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4, "tokenizer": "evil/repo"}),
    ),
    "foreign processor": ("config.json", lambda c: c.update(quantization_config={"processor": "evil/repo"})),
    "openvino": ("openvino_config.json", lambda c: c.update(quantization_config={"tokenizer": "evil/repo"})),
    "generation": ("generation_config.json", lambda c: c.update(assistant_model="evil/repo")),
}


@pytest.mark.parametrize("name", CODE)
def test_a_configuration_that_runs_code_is_refused(name: str, copy: Path) -> None:
    file, change = CODE[name]
    edit(copy, change, file)
    with pytest.raises(RefusedError, match=file.replace(".", r"\.")) as raised:
        read(copy)
    assert "remove" in raised.value.fix


def test_harmless_forms_of_the_same_keys_are_accepted(copy: Path) -> None:
    edit(copy, lambda c: c.update(auto_map=None, trust_remote_code=False, _attn_implementation="sdpa", tokenizer=None))
    edit(copy, lambda c: c.update(name_or_path="org/name", auto_map={}), "tokenizer_config.json")
    assert read(copy).layers == 2


def test_an_adapter_is_refused(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/repo"}')
    with pytest.raises(RefusedError, match="adapter"):
        read(copy)


ABSURD = [0, -1, 10**12, 1.5, 64.0, True, "64", None, [64], {}, 2**64]
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_an_absurd_number_is_named_with_its_key(key: str, value: Any, copy: Path) -> None:
    edit(copy, lambda config: config.update({key: value}))
    with pytest.raises(RecipeError, match=key) as raised:
        read(copy)
    assert repr(value)[:8] in raised.value.message


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 1.5, True, "64"], ids=repr)
def test_an_absurd_optional_number_is_named_too(key: str, value: Any, copy: Path) -> None:
    edit(copy, lambda config: config.update({key: value}))
    with pytest.raises(RecipeError, match=key):
        read(copy)


def test_figures_that_may_be_left_out(copy: Path) -> None:
    edit(copy, lambda config: [config.pop(key) for key in ("head_dim", "intermediate_size")])
    facts = read(copy)
    assert (facts.head_dim, facts.intermediate) == (16, 128)
    edit(copy, lambda config: config.update(num_attention_heads=5))
    with pytest.raises(RecipeError, match="num_attention_heads 5 doesn't divide hidden_size 64"):
        read(copy)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_weights_that_are_not_what_the_configuration_says(key: str, copy: Path) -> None:
    edit(copy, lambda config: config.update({key: config[key] * 2}))
    with pytest.raises(IntegrityError, match=r"embed_tokens\.weight has shape \(260, 64\)"):
        read(copy)


def test_missing_layers_are_named(copy: Path) -> None:
    edit(copy, lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(IntegrityError, match=r"no weights for model\.layers\.2\.self_attn\.q_proj"):
        read(copy)


@pytest.mark.parametrize("model_type", ["mamba", "lama", None, 1, ["llama"]])
def test_an_unknown_family_is_named(model_type: Any, copy: Path) -> None:
    edit(copy, lambda config: config.update(model_type=model_type))
    with pytest.raises(RecipeError, match="model_type") as raised:
        read(copy)
    assert "llama" in raised.value.fix


def test_a_row_that_does_not_hold_is_refused(tmp_path: Path) -> None:
    model_of("opt").save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.update(do_layer_norm_before=False))
    with pytest.raises(RecipeError, match="do_layer_norm_before is False"):
        read(tmp_path)


def test_sliding_windows(copy: Path) -> None:
    biases = {f"model.layers.{n}.self_attn.{name}_proj.bias": np.zeros(64 if name == "q" else 32, np.float32)
              for n in range(2) for name in "qkv"}  # fmt: skip
    edit(copy, lambda config: config.update(model_type="mistral", sliding_window=256))
    assert read(copy).sliding_window == 256
    edit(copy, lambda config: config.update(model_type="qwen2", use_sliding_window=False))
    _with(copy, biases)
    assert read(copy).sliding_window is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(content: str, copy: Path) -> None:
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(IntegrityError, match=r"config\.json"):
        read(copy)


def test_no_configuration(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(InputMissingError, match=r"config\.json"):
        read(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    key=st.sampled_from(
        [*KEYS, "model_type", "quantization_config", "tie_word_embeddings", "sliding_window", "auto_map", "head_dim"]
    ),
    value=json_values,
)
def test_whatever_a_configuration_says_the_error_has_a_name(
    key: str, value: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    if not directory.exists():
        shutil.copytree(tiny_llama, directory)
    original = json.loads((tiny_llama / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(original | {key: value}))
    with contextlib.suppress(RecipeError, RefusedError, IntegrityError):
        read(directory)
