"""The transformers decoder: what it loads, that its greedy loop is `generate`, and that it rolls back."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, MistralForCausalLM

from optikit import formats, runtime
from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.formats.checkpoint import Checkpoint, save_tensors

PROMPT = np.random.default_rng(0).integers(3, 259, 40)


@pytest.fixture(scope="module")
def decoder(tiny_llama):
    return runtime.load(tiny_llama, dtype="float32", threads=1)


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()


def test_says_what_it_is(decoder, tiny_llama):
    assert (decoder.runtime, decoder.dtype, decoder.threads) == ("transformers", "float32", 1)
    assert (decoder.vocab, decoder.max_tokens) == (260, 512)
    assert runtime.load(tiny_llama, threads=1).dtype == "bfloat16"


def test_logits_are_the_model_s(decoder, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    np.testing.assert_array_equal(decoder.forward(PROMPT, 0), logits_of(model, PROMPT))


def test_a_packed_directory_is_the_model_it_stands_for(tiny_gptq, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.load_state_dict(formats.load_state(tiny_gptq, torch.float32), strict=False)
    packed = runtime.load(tiny_gptq, dtype="float32", threads=1)
    np.testing.assert_array_equal(packed.forward(PROMPT, 0), logits_of(model, PROMPT))
    assert runtime.load(tiny_gptq, threads=1).dtype == "bfloat16"


def test_int8_directories_round_the_inputs_too(tiny_llama, tmp_path):
    from optikit.formats import compressed_tensors

    shutil.copytree(tiny_llama, directory := tmp_path / "w8a8")
    state = {name: Checkpoint(tiny_llama).read(name) for name in Checkpoint(tiny_llama)}
    name = "model.layers.1.mlp.down_proj"
    weight = state.pop(f"{name}.weight").float()
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    packed = compressed_tensors.pack((weight / scales).round(), scales)
    save_tensors(directory / "model.safetensors", state | {f"{name}.{suffix}": t for suffix, t in packed.items()})
    config = json.loads((directory / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": eight, "input_activations": eight}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    inputs = []
    int8 = runtime.load(directory, dtype="float32", threads=1)
    int8._model.get_submodule(name).register_forward_hook(lambda _, given, __: inputs.append(given[0][0]))
    int8.forward(PROMPT, 0)
    steps = inputs[0] / (inputs[0].abs().amax(dim=1, keepdim=True) / 127)
    assert (steps - steps.round()).abs().max() < 1e-4  # every input is on its token's grid
    assert len(steps.round().unique()) > 50


def test_rolling_back_forgets_what_came_after(decoder, tiny_llama):
    whole = decoder.forward(PROMPT, 0)
    decoder.forward(PROMPT[:3], 20)
    np.testing.assert_allclose(decoder.forward(PROMPT[10:], 10), logits_after_ten(tiny_llama, whole), atol=2e-6)


def logits_after_ten(tiny_llama, whole):
    fresh = runtime.load(tiny_llama, dtype="float32", threads=1)
    np.testing.assert_array_equal(fresh.forward(PROMPT, 0), whole)
    return whole[10:]


def test_rolls_back_beyond_an_attention_window(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        max_position_embeddings=128,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokens = np.random.default_rng(2).integers(0, 64, 30)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    windowed = runtime.load(tmp_path, threads=1)
    wanted = logits_of(model, tokens)
    windowed.forward(tokens, 0)
    np.testing.assert_allclose(windowed.forward(tokens[5:], 5), wanted[5:], atol=2e-6)


@pytest.mark.parametrize("new_tokens", [1, 2, 30])
def test_greedy_is_generate_and_the_argmax_of_forward(decoder, tiny_llama, new_tokens):
    tokens = list(decoder.greedy(PROMPT, new_tokens))
    assert len(tokens) == new_tokens
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.from_numpy(PROMPT)[None]
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=2)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    assert tokens == theirs[0, len(PROMPT) :].tolist()
    logits = decoder.forward(np.array([*PROMPT, *tokens[:-1]]), 0)
    assert tokens == logits[len(PROMPT) - 1 :].argmax(axis=1).tolist()


def test_end_of_text_and_sampling_settings_are_ignored(decoder, tiny_llama, tmp_path):
    wanted = list(decoder.greedy(PROMPT, 12))
    shutil.copytree(tiny_llama, directory := tmp_path / "eager")
    settings = {"eos_token_id": wanted[3], "pad_token_id": 2, "repetition_penalty": 2.0, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    eager = runtime.load(directory, dtype="float32", threads=1)
    assert list(eager.greedy(PROMPT, 12)) == wanted


def test_leaving_early_ends_the_generation(decoder):
    before = threading.active_count()
    tokens = decoder.greedy(PROMPT, 400)
    next(tokens)
    tokens.close()
    assert threading.active_count() == before


def test_an_error_while_generating_reaches_the_caller(tiny_llama):
    broken = runtime.load(tiny_llama, dtype="float32", threads=1)
    broken._model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="shape"):
        list(broken.greedy(PROMPT, 3))


def test_too_long(decoder):
    with pytest.raises(UsageError, match="513 tokens don't fit: this decoder holds 512"):
        list(decoder.greedy(PROMPT, 473))


def test_unknown_dtype(tiny_llama):
    with pytest.raises(UsageError, match="can't run in int4"):
        runtime.load(tiny_llama, dtype="int4")


def test_no_cache_beyond_the_context(tiny_llama):
    with pytest.raises(UsageError, match="513 is beyond"):
        runtime.load(tiny_llama, max_tokens=513)


def test_weights_cut_off(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, directory := tmp_path / "bad")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(IntegrityError, match="can't load"):
        runtime.load(directory, runtime="transformers")


def test_weights_gone(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, directory := tmp_path / "bad")
    (directory / "model.safetensors").unlink()
    with pytest.raises((IntegrityError, InputMissingError)):
        runtime.load(directory)


@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_tensor_is_not_made_up(tiny_llama, tiny_gptq, tmp_path, packed):
    source = tiny_gptq if packed else tiny_llama
    shutil.copytree(source, directory := tmp_path / "bad")
    checkpoint = Checkpoint(source)
    kept = {name: checkpoint.read(name) for name in checkpoint if "layers.1.post_attention_layernorm" not in name}
    save_tensors(directory / "model.safetensors", kept)
    with pytest.raises(IntegrityError, match=r"lacks tensor model\.layers\.1\.post_attention_layernorm\.weight"):
        runtime.load(directory)
