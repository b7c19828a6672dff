"""The walk against the whole model with hooks, killed at every boundary, starved of memory, and fed damaged input."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import stages
from optikit.algorithms import gptq
from optikit.algorithms.grid import Grid, dequantize
from optikit.algorithms.precision import compute_dtype
from optikit.calibration import blockwise, calibration_set
from optikit.calibration.gram import Gram, PairedGram
from optikit.calibration.method import Batch, Group
from optikit.errors import IntegrityError, RecipeError, StageFailedError
from optikit.formats import gptq as packing
from optikit.stage import Calibration, Job

SAMPLES, LENGTH = 5, 32
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
RESIDUALS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def make_job(source: Path, prose: Path, place: Path, **changes) -> Job:
    for name in ("dest", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    calibration = changes.pop("calibration", Calibration(text=prose, samples=SAMPLES, length=LENGTH))
    return Job(source=source, dest=place / "dest", scratch=place / "scratch", calibration=calibration, **changes)


def quantize(job: Job, method: str = "gptq", **options):
    stage = stages.load("quantize", method)
    return stage.run(stage.Options(**{"group_size": 32, **options}), job)


def digest(place: Path) -> str:
    return hashlib.sha256((place / "dest" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory):
    from tests.conftest import build_tiny_llama

    return build_tiny_llama(tmp_path_factory.mktemp("three"), layers=3)


class Whole:
    """The whole model in memory, run from its tokens every time."""

    def __init__(self, source: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=compute_dtype("cpu")).eval()

    def inputs(self, name: str, batch: torch.Tensor) -> torch.Tensor:
        found = []
        handle = self.model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
        with torch.no_grad():
            self.model(batch, use_cache=False)
        handle.remove()
        return found[0].flatten(0, 1)

    def weight(self, name: str) -> torch.nn.Parameter:
        return self.model.get_submodule(name).weight


@pytest.mark.parametrize("correct", [False, True])
def test_equals_the_whole_model_with_hooks(tiny_llama, prose, tmp_path, correct):
    grid = Grid(bits=4, group_size=32, sym=True)
    quantize(make_job(tiny_llama, prose, tmp_path, seed=3), correct=correct, correct_damp=0.1)
    written = load_file(tmp_path / "dest" / "model.safetensors")
    tokens = calibration_set.draw(tiny_llama, prose, samples=SAMPLES, length=LENGTH, seed=3)
    now, dense = Whole(tiny_llama), Whole(tiny_llama)
    for block in range(2):
        for names in GROUPS:
            full = [f"model.layers.{block}.{name}" for name in names]
            weights = tuple(dense.weight(name).detach().float() for name in full)
            target = torch.cat(weights)
            group = Group(names=tuple(full), weights=weights)
            gram = PairedGram(group, damp=0.1) if correct else Gram(group)
            gap = None
            if correct and names[0] in RESIDUALS:
                residual = f"model.layers.{block}.{RESIDUALS[names[0]]}"
                gap = dense.inputs(residual, tokens).float() - now.inputs(residual, tokens).float()
            held_out = tuple(calibration_set.held_out(SAMPLES).tolist())
            inputs, wanted = now.inputs(full[0], tokens), dense.inputs(full[0], tokens)
            gram.update(Batch(inputs=inputs, dense_inputs=wanted, residual_gap=gap, held_out=held_out))
            if isinstance(gram, PairedGram):
                target = gram.corrected().weight
            new = gptq.quantize(target, gram.mean(), grid, damp=0.01).quantized
            expected = torch.split(dequantize(*new), [len(weight) for weight in weights])
            for name, weight in zip(full, expected, strict=True):
                tensors = {suffix: written[f"{name}.{suffix}"] for suffix in packing.SUFFIXES}
                assert torch.equal(packing.dequantize(*packing.unpack(tensors, 4)), weight), name
                now.weight(name).data = weight.to(compute_dtype("cpu"))


@pytest.fixture(scope="module")
def uninterrupted(three_blocks, prose, tmp_path_factory):
    place = tmp_path_factory.mktemp("uninterrupted")
    facts = quantize(make_job(three_blocks, prose, place))
    return digest(place), facts


@pytest.mark.parametrize("block", [1, 2, 3])
def test_interrupted_after_a_block_it_goes_on_to_the_same_bytes(three_blocks, prose, tmp_path, uninterrupted, block):
    def interrupt(done: int, _total: int, _what: str) -> None:
        if done == block:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(make_job(three_blocks, prose, tmp_path, progress=interrupt))
    assert not (tmp_path / "dest" / "model.safetensors").exists()
    seen: list[int] = []
    facts = quantize(make_job(three_blocks, prose, tmp_path, progress=lambda done, *_: seen.append(done)))
    assert seen == list(range(block + 1, 4))
    assert (digest(tmp_path), facts) == uninterrupted


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x10  # of the last tensor: the header stays right
    path.write_bytes(content)


def _more_done(path: Path) -> None:
    path.write_text(path.read_text().replace('"done": 2', '"done": 3'))


def _a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [
    ("block-00000-000.safetensors", _one_bit),
    ("block-00001-000.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
    ("block-00001-000.safetensors.sha256", Path.unlink),
    ("hidden-00002.bin", _one_bit),
    ("resume.json", _more_done),
    ("resume.json", lambda path: path.write_text("[]")),
    ("resume.json", lambda path: os.truncate(path, 9)),
    ("resume.json", _a_directory),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_what_a_killed_walk_kept_is_read_back_by_its_sum(three_blocks, prose, tmp_path, uninterrupted, name, damage):
    def interrupt(done: int, _total: int, _what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(make_job(three_blocks, prose, tmp_path, progress=interrupt))
    damage(tmp_path / "scratch" / name)
    notes: list[str] = []
    facts = quantize(make_job(three_blocks, prose, tmp_path, note=notes.append))
    assert (digest(tmp_path), facts) == uninterrupted
    assert len(notes) == 1
    assert "damaged" in notes[0]


def test_a_block_that_rots_before_it_is_written_out_is_not_written(three_blocks, prose, tmp_path):
    def rot(done: int, _total: int, _what: str) -> None:
        if done == 3:
            _one_bit(tmp_path / "scratch" / "block-00001-000.safetensors")

    with pytest.raises(IntegrityError, match="changed on the disk"):
        quantize(make_job(three_blocks, prose, tmp_path, progress=rot))


KILLED = """
import os, signal, sys
from pathlib import Path
from optikit import stages
from optikit.algorithms import gptq
from optikit.stage import Calibration, Job
source, prose, place, fatal = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
calls, real = 0, gptq.quantize
def quantize(*args, **kwargs):
    global calls
    calls += 1
    if calls == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
gptq.quantize = quantize
for name in ("dest", "scratch"):
    (place / name).mkdir(exist_ok=True)
stage = stages.load("quantize", "gptq")
calibration = Calibration(text=prose, samples=5, length=32)
stage.run(stage.Options(group_size=32), Job(
    source=source, dest=place / "dest", scratch=place / "scratch", calibration=calibration))
"""


@pytest.mark.parametrize("fatal", [1, 6])
def test_killed_inside_a_block_it_goes_on_to_the_same_bytes(three_blocks, prose, tmp_path, uninterrupted, fatal):
    command = [sys.executable, "-c", KILLED, str(three_blocks), str(prose), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(stages.__file__).parents[2])}
    first = subprocess.run([*command, str(fatal)], env=environment, check=False)
    assert first.returncode == -signal.SIGKILL
    subprocess.run([*command, "0"], env=environment, check=True)
    assert digest(tmp_path) == uninterrupted[0]


def test_damaged_hidden_states_are_noticed(three_blocks, prose, tmp_path, uninterrupted):
    def interrupt(done: int, _total: int, _what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(make_job(three_blocks, prose, tmp_path, progress=interrupt))
    path = tmp_path / "scratch" / "dense-00002.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    seen: list[int] = []
    quantize(make_job(three_blocks, prose, tmp_path, progress=lambda done, *_: seen.append(done)))
    assert seen == [1, 2, 3]
    assert digest(tmp_path) == uninterrupted[0]


def test_scratch_of_other_options_is_not_taken_over(three_blocks, prose, tmp_path, uninterrupted):
    quantize(make_job(three_blocks, prose, tmp_path), damp=0.1)
    assert digest(tmp_path) != uninterrupted[0]
    quantize(make_job(three_blocks, prose, tmp_path))
    assert digest(tmp_path) == uninterrupted[0]


def test_without_memory_for_paused_passes_the_bytes_are_the_same(
    three_blocks, prose, tmp_path, uninterrupted, monkeypatch
):
    monkeypatch.setattr(blockwise, "BATCH_TOKENS", 64)
    for name, bound in (("some", 1_000_000), ("none", 1)):
        quantize(make_job(three_blocks, prose, tmp_path / name, max_memory_bytes=bound))
    quantize(make_job(three_blocks, prose, tmp_path / "all"))
    assert digest(tmp_path / "some") == digest(tmp_path / "none") == digest(tmp_path / "all")


def test_ignored_linears_keep_their_bytes(three_blocks, prose, tmp_path):
    facts = quantize(
        make_job(three_blocks, prose, tmp_path), ignore=("mlp.down_proj", "*.layers.1.*", "self_attn.q_proj")
    )
    before, after = (load_file(path / "model.safetensors") for path in (three_blocks, tmp_path / "dest"))
    packed = {name.rpartition(".")[0] for name in after if name.endswith(".qweight")}
    assert packed == {
        f"model.layers.{block}.{name}"
        for block in (0, 2)
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    assert facts["linears_packed"] == 10
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(after[name], tensor)
    config = json.loads((tmp_path / "dest" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.mlp\.down_proj$" in config["dynamic"]


def test_pruned_layers_keep_their_zeros(three_blocks, prose, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    for path in three_blocks.iterdir():
        (pruned / path.name).write_bytes(path.read_bytes())
    state = load_file(three_blocks / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    mask = torch.rand(state[f"{name}.weight"].shape, generator=torch.Generator().manual_seed(0)) > 0.5
    state[f"{name}.weight"] *= mask
    save_file(state, pruned / "model.safetensors", {"format": "pt"})
    quantize(make_job(pruned, prose, tmp_path / "out"))
    written = load_file(tmp_path / "out" / "dest" / "model.safetensors")
    new = packing.dequantize(*packing.unpack({s: written[f"{name}.{s}"] for s in packing.SUFFIXES}, 4))
    assert (new[~mask] == 0).all()
    assert (new[mask] == 0).float().mean() < 0.3


def damaged(source: Path, place: Path, name: str, value: float) -> Path:
    place.mkdir()
    for path in source.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    state[name].view(-1)[7] = value
    save_file(state, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(three_blocks, prose, tmp_path, method, value):
    name = "model.layers.1.mlp.down_proj.weight"
    source = damaged(three_blocks, tmp_path / "damaged", name, value)
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        quantize(make_job(source, prose, tmp_path / "out"), method)


def test_activations_that_overflow_are_named(three_blocks, prose, tmp_path):
    place = tmp_path / "loud"
    place.mkdir()
    for path in three_blocks.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    state = load_file(three_blocks / "model.safetensors")
    state["model.layers.0.post_attention_layernorm.weight"].fill_(3e38)
    save_file(state, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailedError, match=r"the inputs of model\.layers\.0\.mlp\.gate_proj are not finite"):
        quantize(make_job(place, prose, tmp_path / "out"))


def test_text_that_is_too_short_is_refused(three_blocks, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("few words")
    job = make_job(three_blocks, short, tmp_path)
    with pytest.raises(StageFailedError, match=r"short\.txt has 9 tokens, fewer than one calibration window of 32"):
        quantize(job)


def test_windows_beyond_the_model_are_refused(three_blocks, prose, tmp_path):
    job = make_job(three_blocks, prose, tmp_path, calibration=Calibration(text=prose, samples=1, length=513))
    with pytest.raises(StageFailedError, match=r"calibration\.length 513 is beyond the model's 512 positions"):
        quantize(job)


def test_gptq_without_text_is_refused(three_blocks, prose, tmp_path):
    with pytest.raises(StageFailedError, match="needs calibration text"):
        quantize(make_job(three_blocks, prose, tmp_path, calibration=None))


def test_an_unknown_architecture_is_refused_with_the_list(three_blocks, prose, tmp_path):
    place = tmp_path / "unknown"
    place.mkdir()
    for path in three_blocks.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(RecipeError, match="model_type 'mystery' isn't known here") as error:
        quantize(make_job(place, prose, tmp_path / "out"))
    assert "llama" in error.value.fix


def test_a_quantized_source_is_refused(three_blocks, prose, tmp_path):
    quantize(make_job(three_blocks, prose, tmp_path / "once"), "rtn")
    with pytest.raises(StageFailedError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'") as error:
        quantize(make_job(tmp_path / "once" / "dest", prose, tmp_path / "twice"), "rtn")
    assert "dense" in error.value.fix


def test_the_way_from_a_stage_to_its_kernel_is_five_calls(tiny_llama, prose, tmp_path):
    """What stands between a reader's stage file and the arithmetic; `trace_call_path.py` prints the whole way."""
    from tests.trace_call_path import stack_at

    job = make_job(tiny_llama, prose, tmp_path)
    stack = stack_at(gptq._round_columns.__code__, lambda: quantize(job))
    assert [call.partition("  ")[0] for call in stack] == [
        "optikit.stages.quantize.gptq.run",
        "optikit.calibration.blockwise.run",
        "optikit.calibration.methods.rounding.GramRounding.apply",
        "optikit.algorithms.gptq.quantize",
        "optikit.algorithms.gptq._round_columns",
    ]


MEASURED = """
import sys
from pathlib import Path
from optikit import stages
from optikit.process import memory
from optikit.stage import Calibration, Job
source, prose, place = map(Path, sys.argv[1:4])
for name in ("dest", "scratch"):
    (place / name).mkdir(parents=True)
stage = stages.load("quantize", "gptq")
stage.run(stage.Options(), Job(source=source, dest=place / "dest", scratch=place / "scratch",
    calibration=Calibration(text=prose, samples=4, length=128), max_memory_bytes=2**30))
print(round(memory.peak_mib() * 2**20))
"""
"""Not by getrusage, whose maximum survives exec: it would be that of the test that built the model."""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_layers(prose, tmp_path):
    from tests.conftest import build_tiny_llama

    peaks = []
    for layers in (4, 12):
        place = tmp_path / str(layers)
        source = build_tiny_llama(place / "model", layers=layers, hidden=1024, intermediate=4096)
        command = [sys.executable, "-c", MEASURED, str(source), str(prose), str(place / "out")]
        environment = os.environ | {"PYTHONPATH": str(Path(stages.__file__).parents[2])}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        peaks.append(int(done.stdout.split()[-1]))
    added = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096) * 2  # bytes of the eight further blocks in bfloat16
    assert peaks[1] - peaks[0] < 0.1 * added
