"""Facts of mixtures of experts and of wrapped models: names, shapes, figures, and what is refused at the door."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import targets
from optikit.errors import IntegrityError, RecipeError
from optikit.formats import loadable
from optikit.models import architectures, expected
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.targets.estimate import decode_floor, prefill_operations
from tests.mixtures import COMMON, FAMILIES

WRAPPED = {"qwen3_vl_moe_text"}
"""Language models that transformers has inside a wrapper only: tests/stages/test_wrapped.py runs them there."""
MIXTURES = tuple(name for name, row in architectures.rows().items() if row.experts and name not in WRAPPED)


def save(name: str, directory: Path, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **(COMMON | FAMILIES[name] | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def change(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_names_and_shapes_are_those_of_transformers(name: str, biased: bool, tmp_path: Path) -> None:
    row = architectures.find(name)
    assert row is not None
    more = {"attention_bias": True} if biased and "attention_bias" in row.settings else {}
    tied = {"tie_word_embeddings": biased}
    loadable.require(save(name, tmp_path, **more, **tied))
    facts = read(tmp_path)
    assert (facts.experts, facts.experts_chosen, facts.tied) == (4, 2, biased)
    assert 0 < facts.active_parameters < facts.parameters


@pytest.mark.parametrize("name", MIXTURES)
def test_settings_are_what_transformers_reads(name: str) -> None:
    from transformers import AutoConfig

    row = architectures.find(name)
    assert row is not None
    assert row.experts is not None
    config = AutoConfig.for_model(name)
    own = {key for key in config.to_dict() if expected.looks_arithmetic(key)}
    known = {*row.settings, *row.unread, *row.aliases, *row.keys.values(), *row.experts.keys}
    assert own - known <= {"mlp_bias", "norm_topk_prob"}  # true, they are refused: nothing here obeys them
    assert set(row.settings) - own <= {"rope_scaling", "rope_theta", "partial_rotary_factor"}


def facts_of_8x7b() -> ModelFacts:
    """Return Mixtral-8x7B as its published figures describe it."""
    attention = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    linears = {
        f"model.layers.{block}.self_attn.{name}": shape for block in range(32) for name, shape in attention.items()
    }
    for block in range(32):
        for expert in range(8):
            base = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
            linears |= {f"{base}.w1": (14336, 4096), f"{base}.w3": (14336, 4096), f"{base}.w2": (4096, 14336)}
    return ModelFacts(
        model_type="mixtral", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
        vocab=32000, max_positions=32768, tied=False, dtype="BF16", weight_bytes=2 * 46_702_792_704, linears=linears,
        traits=frozenset({"dense"}), experts=8, experts_chosen=2,
    )  # fmt: skip


def test_active_parameters_are_the_published_ones() -> None:
    facts = facts_of_8x7b()
    assert facts.parameters == pytest.approx(46.7e9, rel=0.001)
    assert facts.active_parameters == pytest.approx(12.9e9, rel=0.002)


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    facts, target = facts_of_8x7b(), targets.find("h100")
    one, many = (decode_floor(facts, target, batch=batch, length=64) for batch in (1, 64))
    assert one is not None
    assert many is not None
    bandwidth = target.bandwidth_gb_s * 1e9 * target.count
    assert one * bandwidth == pytest.approx(2 * 12.6e9, rel=0.02)  # active, without the embedding
    assert many * bandwidth == pytest.approx(2 * 46.6e9, rel=0.03)  # of 64 tokens some choose every expert
    assert prefill_operations(facts, batch=1, length=1000) == pytest.approx(2 * 12.6e9 * 1000, rel=0.05)


def test_a_latent_cache_is_counted_as_it_is(tmp_path: Path) -> None:
    facts = read(save("deepseek_v3", tmp_path))
    assert facts.kv_cache_bytes(10) == 2 * 10 * (32 + 16) * 2  # layers, tokens, rank and rotated key, bytes


def _headers_only(directory: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(config))


def test_headers_of_a_large_mixture_are_enough(tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 48 blocks of 128 experts, 18,432 linears; the file is a hole behind its header."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48, "norm_topk_prob": True,
        "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False,
    }  # fmt: skip
    row = architectures.find("qwen3_moe", config)
    assert row is not None
    sizes = {"hidden": 2048, "intermediate": 6144, "layers": 48, "heads": 32, "kv_heads": 4, "head_dim": 128}
    sizes |= {"vocab": 151936, "max_positions": 40960, "experts": 128, "expert_width": 768}
    shapes = expected.tensors(row, sizes, config)
    _headers_only(tmp_path, config, {name: list(shape) for name, shape in shapes.items()})
    facts = read(tmp_path)
    assert len(facts.linears) == 48 * (4 + 3 * 128)
    assert facts.parameters == pytest.approx(30.5e9, rel=0.002)
    assert facts.active_parameters == pytest.approx(3.35e9, rel=0.02)


BROKEN: dict[str, tuple[str, Any, str]] = {
    "an expert's tensor is missing": (
        "mixtral",
        lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        r"no weights for model\.layers\.1\.block_sparse_moe\.experts\.2\.w3",
    ),
    "an expert is missing": (
        "qwen3_moe",
        lambda tensors: [tensors.pop(f"model.layers.0.mlp.experts.3.{n}_proj.weight") for n in ("gate", "up", "down")],
        r"no weights for model\.layers\.0\.mlp\.experts\.3\.gate_proj",
    ),
    "an expert lies across": (
        "mixtral",
        lambda tensors: tensors.update(
            {name: t.T.contiguous() for name, t in tensors.items() if "experts.1.w2" in name}
            | {"model.layers.0.block_sparse_moe.experts.1.w2.weight": torch.zeros(32, 64)}
        ),
        r"experts\.1\.w2\.weight has shape \(32, 64\), and \(64, 64\) is promised",
    ),
    "the router is missing": (
        "deepseek_v3",
        lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"),
        r"no tensor model\.layers\.1\.mlp\.gate\.weight",
    ),
    "what the router adds to scores is missing": (
        "glm4_moe",
        lambda tensors: tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
        r"no tensor model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
    ),
    "a shared expert is missing": (
        "qwen2_moe",
        lambda tensors: tensors.pop("model.layers.1.mlp.shared_expert.up_proj.weight"),
        r"no weights for model\.layers\.1\.mlp\.shared_expert\.up_proj",
    ),
    "stacked experts lie across": (
        "granitemoe",
        lambda tensors: tensors.update(
            {name: t.transpose(1, 2).contiguous() for name, t in tensors.items() if "input_linear" in name}
        ),
        r"input_linear\.weight lies across: it has shape \(4, 64, 128\), and \(4, 128, 64\) is promised",
    ),
    "stacked experts are missing": (
        "granitemoe",
        lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.output_linear.weight"),
        r"no weights for model\.layers\.0\.block_sparse_moe\.experts\.0\.down_proj",
    ),
    "an expert too many": (
        "mixtral",
        lambda tensors: tensors.update({"model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.zeros(64, 64)}),
        r"no place for tensor model\.layers\.0\.block_sparse_moe\.experts\.4\.w1\.weight",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_mixture_is_named_at_the_door(case: str, tmp_path: Path) -> None:
    name, edit, message = BROKEN[case]
    change(save(name, tmp_path, intermediate_size=64), edit)
    with pytest.raises(IntegrityError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("mixtral", {"num_local_experts": 2**40}, "num_local_experts is"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 experts per token, and there are 4"),
        ("mixtral", {"num_experts_per_tok": "2"}, "num_experts_per_tok is '2'"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, r"mlp_only_layers is \[0.5\]"),
        ("qwen3_moe", {"decoder_sparse_step": "1"}, "decoder_sparse_step is '1'"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is None"),
        ("deepseek_v3", {"n_shared_experts": 1.5}, "n_shared_experts is 1.5"),
    ],
)
def test_absurd_figures_of_experts_are_named(name: str, changes: Any, message: str, tmp_path: Path) -> None:
    configure(save(name, tmp_path), **changes)
    with pytest.raises((RecipeError, IntegrityError), match=message):
        read(tmp_path)


def test_blocks_that_only_drafts_use_are_carried(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.enorm.weight": torch.ones(64)}
    change(tmp_path, lambda tensors: tensors.update(extra))
    assert read(tmp_path).carried == {"model.layers.2": 2}
    configure(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(IntegrityError, match=r"no place for tensor model\.layers\.2\.eh_proj"):
        read(tmp_path)
