"""gguf files: what is refused, what is written, held to our reader, transformers' reader and llama.cpp itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import targets
from optikit.errors import IntegrityError, StageFailedError
from optikit.models import architectures, gguf_cuts
from optikit.models.gguf_header import read_header
from optikit.models.gguf_reader import read_gguf
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.acquire import gguf as acquire
from optikit.stages.compile import _gguf_tokenizer, _gguf_verify, _gguf_write, llama_cpp
from optikit.stages.compile._llama_cpp_options import Options
from optikit.targets import Target
from tests.conftest import byte_tokenizer, round_to_gptq

CPU = Target(name="cpu", device="cpu", engines=("llama.cpp",))
PYTHON = "OPTIKIT_TEST_LLAMA_CPP_PYTHON"
"""An interpreter with optikit and the packages of locks/llama-cpp.txt; without it, the managed environment is used."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "phi3": {"original_max_position_embeddings": 256},
    "gpt2": {"n_embd": 64, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def build(family, directory):
    """Save a seeded random model of a family in bf16, whose norms and biases do something."""
    import transformers
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    shared = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    own = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[family](**shared, **({} if family == "gpt2" else sizes) | own)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data = weight.data + 0.1 * torch.randn_like(weight) if weight.ndim == 1 else 3 * weight.data
    model.to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer(directory)
    merge(directory)
    return directory


def merge(directory):
    """Give a byte tokenizer one merge: llama.cpp loads none without."""
    path = directory / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"]["th"], told["model"]["merges"] = 259, [["t", "h"]]
    path.write_text(json.dumps(told))


@pytest.fixture(scope="module")
def tiny(tiny_gptq, tmp_path_factory):
    """A packed llama whose tokenizer has a merge."""
    shutil.copytree(tiny_gptq, dest := tmp_path_factory.mktemp("tiny") / "model")
    merge(dest)
    return dest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(family):
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return model


def written(source, work, **options):
    work.mkdir(exist_ok=True)
    job = Job(source=source, dest=work, scratch=work / "scratch")
    tensors = _gguf_write.write(Options(**options), job)
    return work / _gguf_write.NAME, tensors


def codes(facts, target=CPU, **options):
    return [problem.code for problem in llama_cpp.check(Options(**options), facts, target)]


def test_what_is_refused(tiny_llama, tiny_gptq):
    facts = read(tiny_llama)
    assert codes(facts) == codes(read(tiny_gptq)) == codes(facts, targets.find("cpu")) == []
    assert codes(facts, Target(name="l4", device="cuda", engines=("vllm",))) == ["engine-not-on-target"]
    assert codes(replace(facts, model_type="opt")) == ["unknown-architecture"]
    assert codes(replace(facts, config={"rope_parameters": {"rope_type": "yarn"}})) == ["unknown-rope"]
    assert codes(replace(facts, model_type="mistral", sliding_window=64)) == ["window-left-out"]
    gemma = replace(facts, model_type="gemma2", config={"query_pre_attn_scalar": 24})
    assert codes(gemma) == ["attention-scale"]


def test_every_family_has_an_architecture():
    named = {row.model_type for row in architectures.rows().values() if row.gguf_as}
    assert named == set(architectures.known_to("llama.cpp")) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_source_s(models, tmp_path, family):
    source = models(family)
    path, tensors = written(source, tmp_path / "out")
    found = _gguf_verify.compare(source, path, tensors)
    assert found["largest_rounding"] == 0
    assert found["tensors_bit_equal"] == len([each for each in tensors if each.source]) == len(read_names(source))
    assert set(found["tensors"]) == {"BF16", "F32"}
    header = read_header(path)
    size = sum(tensor.bytes for name, tensor in header.tensors.items() if name != "rope_freqs.weight")
    assert llama_cpp.after(Options(), read(source)).weight_bytes == size
    assert header.metadata["general.architecture"] == architectures.find(family).gguf_as
    assert header.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def read_names(source):
    return [name for name in load_file(source / "model.safetensors") if not name.endswith(".attn.bias")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_that_is_read_again_is_the_model(models, tmp_path, family):
    """Writer and reader are inverses: names, permutations, rotary scaling, tokenizer, tied or not."""
    source = models(family)
    path, _ = written(source, tmp_path / "out")
    facts, wanted = read_gguf(path), read(source)
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab", "tied", "linears"):
        assert getattr(facts, name) == getattr(wanted, name), name
    (back := tmp_path / "back").mkdir()
    acquire.run(acquire.Options(), Job(source=path, dest=back, scratch=tmp_path))
    theirs, mine = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    rope = read(back).config["rope_parameters"]
    assert rope["rope_type"] == ("llama3" if family == "llama" else "default")


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q5_0"), ("qwen2", "Q5_0")])
def test_codes_of_a_quantizer_are_blocks_as_they_are(models, tmp_path, family, kind):
    (packed := tmp_path / "packed").mkdir()
    round_to_gptq(models(family), packed)
    path, tensors = written(packed, tmp_path / "out")
    found = _gguf_verify.compare(packed, path, tensors)
    linears = [each for each in tensors if each.source.removesuffix(".weight") in read(packed).linears]
    assert all(each.exact for each in linears)
    assert {each.kind for each in linears} <= {kind, "Q4_1"}
    assert found["tensors"]["Q8_0"] == (1 if read(packed).tied else 2)
    planned, size = (
        llama_cpp.after(Options(), read(packed)).weight_bytes,
        sum(tensor.bytes for tensor in read_header(path).tensors.values()),
    )
    assert 0.9 * planned <= size <= 1.02 * planned


def test_planted_faults_are_found(tiny, tmp_path):
    path, tensors = written(tiny, tmp_path / "out")
    header, content = read_header(path), path.read_bytes()
    for name in ("blk.1.attn_k.weight", "blk.0.ffn_down.weight", "blk.1.ffn_norm.weight"):
        place = header.tensors[name].start
        path.write_bytes(content[: place + 4] + bytes([content[place + 4] ^ 1]) + content[place + 5 :])
        with pytest.raises(IntegrityError, match=r"weights in the file differ"):
            _gguf_verify.compare(tiny, path, tensors)
    place, size = header.tensors["token_embd.weight"].start, header.tensors["token_embd.weight"].bytes // 260
    rows = content[place : place + 2 * size]
    path.write_bytes(content[:place] + rows[size:] + rows[:size] + content[place + 2 * size :])
    with pytest.raises(IntegrityError, match=r"of their length apart"):
        _gguf_verify.compare(tiny, path, tensors)


def test_a_matrix_that_the_model_ties_is_written_once(models, tmp_path):
    path, _ = written(models("qwen2"), tmp_path / "out")
    assert "output.weight" not in read_header(path).tensors


def test_scales_and_rows_that_no_block_can_have(tiny, tmp_path):
    shutil.copytree(tiny, odd := tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    order = torch.randperm(tensors[f"{name}.g_idx"].numel(), generator=torch.Generator().manual_seed(0))
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order].contiguous()
    save_file(tensors, odd / "model.safetensors", {"format": "pt"})
    path, made = written(odd, tmp_path / "out")
    assert [each.source for each in made if each.kind == "Q8_0" and each.name.startswith("blk.")] == [f"{name}.weight"]
    assert 0 < _gguf_verify.compare(odd, path, made)["largest_rounding"] < 0.02


def test_tokenizers(tiny_llama, tiny, tmp_path):
    assert _gguf_tokenizer.cuts(None) == ()
    split = {"type": "Split", "pattern": {"Regex": gguf_cuts.LLAMA3}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    assert gguf_cuts.NAMES[_gguf_tokenizer.cuts(both)] == "llama-bpe"
    with pytest.raises(StageFailedError, match="has no merges"):
        written(tiny_llama, tmp_path / "merges")
    shutil.copytree(tiny, odd := tmp_path / "odd")
    told = json.loads((odd / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": "a+"}}]}
    (odd / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(StageFailedError, match=r"cuts text by a\+, which has no name here"):
        written(odd, tmp_path / "out")
    path, _ = written(odd, tmp_path / "named", pre_tokenizer="qwen2")
    assert read_header(path).metadata["tokenizer.ggml.pre"] == "qwen2"
    told["model"] = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}
    (odd / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(StageFailedError, match="holds a Unigram model"):
        written(odd, tmp_path / "unigram")


def test_scores_merge_in_the_order_of_the_ranks():
    tokens = ["a", "b", "c", "ab", "abc", "<s>"]
    scores = _gguf_tokenizer._scores(tokens, ["a b", "ab c"])
    assert scores[3] > scores[4] > scores[0] == scores[5]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_llama_cpp_decodes_what_transformers_does(models, tmp_path, family, packed):
    """The whole stage in its environment; in float32 the tokens are the same, for sure."""
    source = models(family)
    if packed:
        if read(source).linears.keys() and family == "gpt2":
            pytest.skip("no quantize stage packs transposed linears so")
        (rounded := tmp_path / "packed").mkdir()
        source = round_to_gptq(source, rounded)
    (dest := tmp_path / "dest").mkdir()
    program = (
        "import json, sys; from pathlib import Path\n"
        "import numpy as np\n"
        "from optikit import runtime\n"
        "from optikit.stage import Job\n"
        "from optikit.stages.compile import llama_cpp\n"
        "source, dest = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "options = llama_cpp.Options(**json.loads(sys.argv[3]))\n"
        "facts = llama_cpp.run(options, Job(source=source, dest=dest, scratch=dest.parent / 'scratch'))\n"
        "prompt = np.random.default_rng(0).integers(3, 259, 20)\n"
        "arms = [runtime.load(source, dtype='float32', threads=1), runtime.load(dest, threads=1)]\n"
        "facts['same'] = len({tuple(arm.greedy(prompt, 16)) for arm in arms}) == 1\n"
        "again = arms[1].forward(prompt[5:], 5)[-1]\n"
        "facts['rolled'] = float(np.abs(again - arms[1].forward(prompt, 0)[-1]).max())\n"
        "print(json.dumps(facts))\n"
    )
    options = json.dumps({} if packed else {"dense": "f32", "table": "f32"})
    command = [python(), "-c", program, str(source), str(dest), options]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["logits_apart"] < (0.1 if packed else 1e-2)  # the cache is float16
    assert facts["same"] or packed
    assert facts["rolled"] < 0.05


def python():
    if PYTHON in os.environ:
        return os.environ[PYTHON]
    from optikit.environments import ensure
    from optikit.store.store import Store

    return str(ensure("llama-cpp", Store.default()).python)
