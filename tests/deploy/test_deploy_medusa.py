"""Head layouts, loaded by the rules of the servers' own loaders: names, shapes, biases, configuration keys."""

import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from optikit.algorithms.medusa import MedusaHeads
from optikit.deploy import medusa, support
from optikit.errors import UsageError
from optikit.models import traits
from optikit.stages.speculate.medusa import Layout

VOCAB, HIDDEN = 260, 64


@pytest.fixture(params=[(1, True), (1, False), (2, True), (2, False)], ids=lambda p: f"{p[0]}-layers-shared-{p[1]}")
def trained(request):
    """Heads with weights that differ everywhere, and the model's output layer."""
    layers, shared = request.param
    torch.manual_seed(1)
    lm_head = torch.randn(VOCAB, HIDDEN)
    heads = MedusaHeads(lm_head, heads=3, layers=layers, shared=shared)
    with torch.no_grad():
        for each in (*heads.blocks.parameters(), *([] if shared else heads.outputs)):
            each.normal_(0, 0.2)
    return heads, medusa.head_set(heads, lm_head)


@pytest.fixture
def states():
    return torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))


def chain(states, blocks, output):
    """What every one of these servers computes: x + SiLU(W x + b), as often as there are layers, then the output."""
    for weight, bias in blocks:
        states = states + nn.functional.silu(nn.functional.linear(states, weight, bias))
    return states @ output.T


class Strict(dict):
    """Tensors of which every one has to be used."""

    def take(self, name, *shape):
        tensor = self.pop(name)
        assert tuple(tensor.shape) == shape
        return tensor


def load_as_tgi(directory, speculate):
    """MedusaHeadV1 of TGI 3.3: `--speculate` heads, `medusa_num_layers` blocks with bias, an output layer without."""
    config = json.loads((directory / "config.json").read_text())
    assert "medusa_num_heads" in config  # what makes TGI take this for Medusa heads
    assert "architectures" not in config  # and what would make it load no speculator
    assert speculate <= config["medusa_num_heads"]
    tensors = Strict(load_file(directory / "medusa_lm_head.safetensors"))
    layers = config["medusa_num_layers"]
    found = []
    for i in range(speculate):
        blocks = [
            (
                tensors.take(f"{i}.{j}.linear.weight", HIDDEN, HIDDEN),
                tensors.take(f"{i}.{j}.linear.bias", HIDDEN),
            )
            for j in range(layers)
        ]
        found.append((blocks, tensors.take(f"{i}.{layers}.weight", VOCAB, HIDDEN)))
    assert not tensors
    return config, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v1_loads_as_tgi_loads_it(tmp_path, trained, states, tiny_llama, dtype):
    heads, found = trained
    medusa.write_v1(found, tmp_path, base="/models/base", tokenizer=tiny_llama, dtype=dtype)
    config, loaded = load_as_tgi(tmp_path, 3)
    assert config["base_model_name_or_path"] == "/models/base"
    assert (tmp_path / "tokenizer.json").is_file()
    for k, (blocks, output) in enumerate(loaded):
        assert output.dtype == dtype
        exact = heads(states)[:, k]
        logits = chain(states, [(w.float(), b.float()) for w, b in blocks], output.float())
        torch.testing.assert_close(logits, exact, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}))


def read_as_vllm(config):
    """MedusaConfig of vLLM: defaults, and any key with num and heads, or num and layers, renamed."""
    out = {"hidden_size": 4096, "vocab_size": 32001, "num_heads": 5, "num_hidden_layers": 1, "medusa_fc_bias": False}
    for key, value in config.items():
        name = key
        if "num" in key and "heads" in key:
            name = "num_heads"
        elif "num" in key and "layers" in key:
            name = "num_hidden_layers"
        assert name == key or out.get(f"renamed {name}", value) == value, "two spellings that disagree"
        out[f"renamed {name}"] = value
        out[name] = value
    out["truncated_vocab_size"] = out.get("truncated_vocab_size") or out["vocab_size"]
    return out


def load_as_vllm(directory, file):
    """Medusa.load_weights of vLLM 0.32: unknown names are dropped silently, so every one has to be known."""
    config = read_as_vllm(json.loads((directory / "config.json").read_text()))
    assert config["model_type"] == "medusa"
    assert config["truncated_vocab_size"] == config["vocab_size"] == VOCAB
    tensors = Strict(load_file(directory / file))
    layers = config["num_hidden_layers"]
    if file == medusa.V1_FILE:  # the remapping that 0.32 has
        tensors = Strict({remap_v1(name, layers): each for name, each in tensors.items()})
    found = []
    for i in range(config["num_heads"]):
        blocks = []
        for j in range(layers):
            weight = tensors.take(f"blocks.{i}.layers.{j}.weight", config["hidden_size"], config["hidden_size"])
            bias = tensors.take(f"blocks.{i}.layers.{j}.bias", HIDDEN) if config["medusa_fc_bias"] else None
            blocks.append((weight, bias))
        found.append(blocks)
    shared = config.get("original_lm_head", False)
    outputs = [tensors.take(f"lm_heads.{i}.weight", VOCAB, HIDDEN) for i in range(1 if shared else config["num_heads"])]
    assert not tensors
    return [(blocks, outputs[0 if shared else i]) for i, blocks in enumerate(found)]


def remap_v1(name, layers):
    head, block, *rest = name.split(".")
    if int(block) == layers:
        return f"lm_heads.{head}.weight"
    assert rest[0] == "linear"
    return f"blocks.{head}.layers.{block}.{rest[1]}"


@pytest.mark.parametrize("layout", ["vllm", "v1"])
def test_both_layouts_load_as_vllm_loads_them(tmp_path, trained, states, tiny_llama, layout):
    heads, found = trained
    if layout == "vllm":
        medusa.write_vllm(found, tmp_path, dtype=torch.float32)
        loaded = load_as_vllm(tmp_path, medusa.VLLM_FILE)
    else:
        medusa.write_v1(found, tmp_path, base="base", tokenizer=tiny_llama, dtype=torch.float32)
        loaded = load_as_vllm(tmp_path, medusa.V1_FILE)
    assert len(loaded) == 3
    for k, (blocks, output) in enumerate(loaded):
        torch.testing.assert_close(chain(states, blocks, output), heads(states)[:, k])


def test_tensorrt_llm_finds_both_spellings(tmp_path, trained, tiny_llama):
    """convert_checkpoint.py reads `num_medusa_heads` in one place and `medusa_num_heads` in another."""
    _, found = trained
    medusa.write_v1(found, tmp_path, base="base", tokenizer=tiny_llama, dtype=torch.float16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_medusa_heads"] == config["medusa_num_heads"] == 3


def test_nxdi_gets_plain_tensors_under_its_names(tmp_path, trained, states):
    heads, found = trained
    if found.layers != 1:
        with pytest.raises(UsageError, match="heads of one layer; these have 2"):
            medusa.write_nxdi(found, tmp_path, dtype=torch.float32)
        return
    medusa.write_nxdi(found, tmp_path, dtype=torch.float32)
    tensors = Strict(torch.load(tmp_path / "medusa_heads.pt", weights_only=True))
    config = json.loads((tmp_path / "neuron_config.json").read_text())
    for i in range(config["num_medusa_heads"]):
        block = (
            tensors.take(f"medusa_head_{i}.0.linear.weight", HIDDEN, HIDDEN),
            tensors.take(f"medusa_head_{i}.0.linear.bias", HIDDEN),
        )
        output = tensors.take(f"medusa_head_{i}.1.weight", VOCAB, HIDDEN)
        torch.testing.assert_close(chain(states, [block], output), heads(states)[:, i])
    assert not tensors
    assert config["medusa_tree"] == [[0], [0, 0], [0, 0, 0]]
    assert config["medusa_speculation_length"] == 4


def test_a_sagemaker_bundle_holds_the_model_too(tmp_path, trained, tiny_llama):
    from transformers import AutoModelForCausalLM

    _, found = trained
    for _ in range(2):  # writing again replaces
        medusa.write_sagemaker(found, tmp_path / "bundle", model=tiny_llama, dtype=torch.bfloat16)
    config, _ = load_as_tgi(tmp_path / "bundle", 3)
    assert config["base_model_name_or_path"] == "/opt/ml/model/base-model/"
    AutoModelForCausalLM.from_pretrained(tmp_path / "bundle" / "base-model")


def test_heads_with_a_part_of_the_vocabulary():
    lm_head = torch.randn(VOCAB, HIDDEN)
    part = torch.arange(0, VOCAB, 2)
    shared = medusa.head_set(MedusaHeads(lm_head, heads=2, token_ids=part), lm_head)
    assert medusa.v1_tensors(shared)["1.1.weight"].shape == (VOCAB, HIDDEN)
    with pytest.raises(UsageError, match="can't draft all tokens"):
        medusa.head_set(MedusaHeads(lm_head, heads=2, shared=False, token_ids=part), lm_head)


def test_heads_that_see_drafted_tokens_fit_no_layout():
    lm_head = torch.randn(VOCAB, HIDDEN)
    with pytest.raises(UsageError, match="fit no server's layout"):
        medusa.head_set(MedusaHeads(lm_head, heads=2, embedding=lm_head), lm_head)


def test_support_has_rows_with_real_versions():
    from packaging.specifiers import SpecifierSet

    rows = support.rows()
    assert len({(row.what, row.server, row.versions) for row in rows}) == len(rows)
    for row in rows:
        SpecifierSet(row.versions)
        assert row.source
    drafters = {*get_args(Layout), "sequential", "sagemaker", "draft", "lookup", "eagle3"}
    assert {row.what for row in rows} - set(traits.rows()) == drafters, "what isn't a speculator is a packing"
    assert "0.33.0" not in SpecifierSet(support.loads_in("vllm")["vllm"])
    assert "0.32.0" in SpecifierSet(support.loads_in("v1")["vllm"])
