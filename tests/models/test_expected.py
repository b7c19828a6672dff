"""Every tensor of every row, and every setting that it obeys, against transformers' own models and configurations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optikit.errors import IntegrityError, RecipeError
from optikit.models import architectures, expected
from optikit.models.reader import read, tensor_shapes
from tests.families import config_of

VARIANTS = {"untied": {"tie_word_embeddings": False}, "tied": {"tie_word_embeddings": True}}
VARIANTS |= {"biased": {"attention_bias": True, "mlp_bias": True}}


ROWS = {
    name: row for name, row in architectures.rows().items() if not row.experts and not row.computed_as
}  # mixtures.py has those


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ROWS)
def test_names_and_shapes_are_those_of_transformers(name: str, variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    obeyed = {"tie_word_embeddings", *ROWS[name].settings}
    config = config_of(name, **{key: value for key, value in VARIANTS[variant].items() if key in obeyed})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    facts = read(tmp_path)  # refuses what it doesn't expect
    found = tensor_shapes(facts)
    model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    assert found == {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    assert bool(tied) is facts.tied


@pytest.mark.parametrize("name", ROWS)
def test_settings_are_what_transformers_reads(name: str) -> None:
    from transformers import AutoConfig

    row = ROWS[name]
    config = AutoConfig.for_model(row.model_type)
    own = {key for key in config.to_dict() if expected.looks_arithmetic(key)}
    known = {*row.settings, *row.keys.values(), *row.when}
    refused = {"use_bidirectional_attention"} | ({"logit_scale"} if name == "mpt" else set())  # read by no class
    assert own - known <= refused
    older = {"rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "partial_rotary_factor"}
    older |= {"rotary_pct", "rotary_emb_base", "max_window_layers", "hidden_activation"}
    assert set(row.settings) - own <= older
    meant = row.meant({})
    assert {key: meant[key] for key in row.defaults} == {key: getattr(config, key, meant[key]) for key in row.defaults}
    assert meant.get("tie_word_embeddings", False) is bool(config.tie_word_embeddings)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


WRONG = {
    "no head": ({"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
    "width": ({"intermediate_size": 256}, r"layers\.0\.mlp\.gate_proj\.weight has shape \(128, 64\).*\(256, 64\)"),
    "heads": ({"num_attention_heads": 8}, r"q_proj\.weight has shape"),
    "kv heads": ({"num_key_value_heads": 4}, r"k_proj\.weight has shape"),
    "fewer layers": ({"num_hidden_layers": 1}, r"no place for tensor model\.layers\.1\..*, and 8 more"),
    "biases": ({"attention_bias": True}, r"no tensor model\.layers\.0\.self_attn\.k_proj\.bias, and 7 more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_that_contradicts_the_weights(name: str, copy: Path) -> None:
    changes, message = WRONG[name]
    configure(copy, **changes)
    with pytest.raises(IntegrityError, match=message):
        read(copy)


def test_a_missing_norm_and_a_strange_tensor_are_named(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    with pytest.raises(IntegrityError, match=r"no tensor model\.layers\.0\.input_layernorm\.weight"):
        read(copy)
    import torch

    bias = {"model.layers.1.mlp.up_proj.bias": torch.ones(128)}
    norm = {"model.layers.0.input_layernorm.weight": torch.ones(64)}
    change_tensors(copy, lambda tensors: tensors.update(norm | bias))
    with pytest.raises(IntegrityError, match=r"no place for tensor model\.layers\.1\.mlp\.up_proj\.bias"):
        read(copy)


def test_what_older_versions_kept_is_left_aside(copy: Path) -> None:
    import torch

    left = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(260, 64)}
    change_tensors(copy, lambda tensors: tensors.update(left))
    assert read(copy).tied


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("residual_multiplier", 0.22),
        ("logit_scale", 0.0625),
        ("qk_norm", True),
        ("final_logit_softcapping", 30.0),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
    ],
)
def test_settings_that_nobody_obeys_are_refused_by_name(key: str, value: object, copy: Path) -> None:
    configure(copy, **{key: value})
    with pytest.raises(RecipeError, match=key):
        read(copy)


def test_settings_that_change_nothing_are_accepted(copy: Path) -> None:
    configure(copy, logit_scale=1.0, residual_multiplier=1, qk_norm=False, sliding_window=None, pretraining_tp=1)
    configure(copy, layer_types=["full_attention"] * 2, rope_interleaved=False, _attn_implementation_autoset=True)
    assert read(copy).layers == 2


def test_packed_parts_are_compared_too(tiny_gptq: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(tiny_gptq, tmp_path / "whole"))
    assert not read(whole).left_dense
    lacking = Path(shutil.copytree(tiny_gptq, tmp_path / "lacking"))
    change_tensors(lacking, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(IntegrityError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.scales"):
        read(lacking)
    config = json.loads((whole / "config.json").read_text())
    eight = {"dynamic": {"+:.*down_proj": {"bits": 8}}}
    configure(whole, quantization_config=config["quantization_config"] | eight)
    with pytest.raises(RecipeError, match=r"another number of bits than the 4"):
        read(whole)
    configure(whole, quantization_config=None)
    with pytest.raises(RecipeError, match="no quantization_config"):
        read(whole)
