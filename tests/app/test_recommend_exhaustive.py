"""`recommend` against a slow search that knows nothing of its code: 12 public shapes on 20 targets.

The reference counts bytes from config.json's numbers and tries every layout: bits, accelerators, groups of them. Where
it finds one that fits, `recommend` has to find one, about as light; where it finds none, none. The recipe of the best
is planned, and nothing refuses it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from optikit.app.recommend import candidates, facts_of, recipe, within
from optikit.plan.make import make_plan
from optikit.recipe.load import load
from optikit.store.sources import resolve_model
from optikit.store.store import Store
from optikit.targets import find, rows
from tests.conftest import byte_tokenizer


@dataclass(frozen=True)
class Public:
    """A published config.json, by its numbers."""

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int
    tied: bool = False
    head_dim: int = 0

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def linear(self) -> int:
        attention = self.hidden * self.width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def rest(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    def cache(self, tokens: int) -> int:
        return 2 * self.layers * self.kv_heads * self.width * tokens * 2


MODELS = {
    "SmolLM2-135M": Public("llama", 576, 1536, 30, 9, 3, 49152, 8192, True),
    "TinyLlama-1.1B": Public("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "Llama-3.2-1B": Public("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, 64),
    "Qwen2.5-0.5B": Public("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, True),
    "Qwen2.5-7B": Public("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "Qwen2.5-72B": Public("qwen2", 8192, 29568, 80, 64, 8, 152064, 32768),
    "Qwen3-8B": Public("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, False, 128),
    "Llama-2-7B": Public("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "Llama-2-13B": Public("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "Llama-2-70B": Public("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "Llama-3-8B": Public("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "Llama-3.1-405B": Public("llama", 16384, 53248, 126, 128, 8, 128256, 131072, False, 128),
}
CPU = replace(rows()["cpu"], memory_gib=64.0, bandwidth_gb_s=40.0, bf16_tflops=None)
TARGETS = {
    "cpu": CPU,
    **{
        name: rows()[name]
        for name in (
            *("t4", "a10g", "l4", "l40s", "a100-40", "a100-80", "h100", "h200", "b200"),
            *("g5.12xlarge", "g6.48xlarge", "g6e.12xlarge", "p4d.24xlarge", "p5.48xlarge"),
            *("inf2.xlarge", "inf2.24xlarge", "inf2.48xlarge", "trn1.32xlarge", "trn2.48xlarge"),
        )
    },
}
SHORTEST = 256
"""Tokens of the shortest sequences that are worth serving."""


def layouts(target) -> list[tuple[int, int, float]]:
    """Return (shared by, stages in a row, memory of all in bytes) of everything a target can be."""
    if target.device == "neuron":
        degrees = {*target.tensor_parallel, *target.older_tensor_parallel}
        return [(degree, 1, degree * target.core_memory_gb * 1e9) for degree in degrees]
    memory = target.memory_gib * 2**30
    pairs = [(tensor, deep) for tensor in range(1, target.count + 1) for deep in (1, 2, 4, 8)]
    return [(tensor, deep, tensor * deep * memory) for tensor, deep in pairs if tensor * deep <= target.count]


def divides(model: Public, tensor: int) -> bool:
    """Heads and the MLP are shared out evenly; key-value heads too, or each is copied equally often."""
    even = model.heads % tensor == 0 and model.intermediate % tensor == 0
    return even and (model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0)


def weights(model: Public, bits: int) -> float:
    """Bytes: 16 bits, 8 with a scale a row, or 4 in groups of 128 with a 16-bit scale and a 4-bit zero each."""
    each = {16: 2.0, 8: 1.0, 4: 0.5 + 2.5 / 128}[bits]
    return model.linear * each + model.rest * 2


def possible(model: Public, target) -> list[tuple[float, int, int]]:
    """Return (bytes per token and accelerator, bits, shared by) of every layout that fits."""
    lies = on_cores if target.device == "neuron" else on_gpus
    found = []
    for bits in (16, 8) if target.device == "neuron" else (16, 8, 4):
        for tensor, _, memory in layouts(target):
            need = lies(model, bits, tensor)
            if need is not None and need < 0.999 * memory:
                found.append((weights(model, bits) / tensor, bits, tensor))
    return sorted(found)


def on_gpus(model: Public, bits: int, tensor: int) -> float | None:
    """Return the bytes on all GPUs together, or None where a server can't share the model out like that."""
    copied = max(1, tensor // model.kv_heads)
    return weights(model, bits) + copied * model.cache(SHORTEST) if divides(model, tensor) else None


def on_cores(model: Public, bits: int, tensor: int) -> float:
    """Return the bytes on all Neuron cores: every weight in 2 or 1 bytes, heads padded to what the cores divide."""
    padded = -(-model.heads // tensor) * tensor
    attention = model.layers * model.hidden * model.width * 2 * model.heads
    more = attention * (padded / model.heads - 1)
    cached = padded if model.heads % tensor else max(model.kv_heads, tensor)
    return (model.linear + model.rest + more) * bits / 8 + model.cache(SHORTEST) * cached / model.kv_heads


def write(model: Public, directory: Path) -> Path:
    directory.mkdir()
    config = {
        "architectures": [f"{model.kind.capitalize()}ForCausalLM"],
        "model_type": model.kind,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.positions,
        "tie_word_embeddings": model.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("models")
    (home / "prose.txt").write_text("A river runs under the bridge, and nobody counts the stones.\n" * 4000)
    found = {}
    for name, model in MODELS.items():
        source = resolve_model(
            str(write(model, home / name)), Store(home / "store"), base=home, offline=True, note=print, weights=False
        )
        found[name] = facts_of(source)
    return home, found


DAILY = {"Qwen2.5-0.5B", "Llama-2-70B"}
"""Shapes that every run of the tests compares; the others take minutes."""


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_stack_is_found_exactly_where_there_is_one(name, models):
    _, facts = models
    for target in TARGETS.values():
        reference = possible(MODELS[name], target)
        good = within(candidates(facts[name], target), None)
        assert bool(good) == bool(reference), (target.name, reference[:3], [one.name for one in good[:3]])
        if good and target.device == "cuda":
            plain = [one for one in good if not any(verb in {"prune", "speculate"} for verb, _, _ in one.stages)]
            best = min((one.floors.weight_bytes + one.floors.kv_bytes) / one.shape.tensor for one in plain)
            limit = 1.15 * reference[0][0] + 2 * MODELS[name].cache(2048)
            assert best <= limit, (target.name, plain[0].name, reference[:2])


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_recommended_plans_clean(target, models, tmp_path):
    home, facts = models
    row = find(target)  # a CPU target is this machine, for the plan, too
    for name, goal in (("SmolLM2-135M", "latency"), ("Llama-2-70B", "cost")):
        for best in within(candidates(facts[name], row, goal=goal), None)[:1]:
            path = tmp_path / f"{name}.yaml"
            text = str(home / "prose.txt")
            path.write_text(recipe(best, path, row, model=str(home / name), most_loss=None, text=text))
            plan = make_plan(load(path), Store(home / "store"), weights=False)
            planned = [(step.verb, step.method) for step in plan.steps if step.verb != "acquire"]
            assert planned == [(verb, method) for verb, method, _ in best.stages]
