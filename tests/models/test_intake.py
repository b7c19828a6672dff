"""What may be in a model directory: by name, by content, and where links lead."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit import runtime
from optikit.errors import IntegrityError, RefusedError
from optikit.models import intake


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


ADMITTED = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENCE.md",
    "LICENSE-MODEL",
    "NOTICE",
    "COPYING",
    "USE_POLICY.md",
]
LEFT_OUT = [
    "pytorch_model.bin",
    "optimizer.pt",
    "model.pth",
    "last.ckpt",
    "args.pkl",
    "modeling.py",
    "modeling.PY",
    "code.pyc",
    "lib.so",
    "data.joblib",
    "trace.npz",
    "array.npy",
    "run.sh",
    "setup.bat",
    "x.exe",
    "model.onnx",
    "model.gguf",
    "notes.txt",
    "requirements.txt",
    "LICENSE.py",
    "LICENSE.so",
    "README.md.py",
    "config.json.bak",
    "CONFIG.JSON",
    ".hidden.json",
    ".safetensors",
    "adapter_model.safetensors",
    "artifact.json",
    "consolidated.safetensors",
    "training_args.json",
]


@pytest.mark.parametrize("name", ADMITTED)
def test_names_that_go_along(name: str) -> None:
    assert intake.is_model_file(name)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_names_that_stay_behind(name: str) -> None:
    assert not intake.is_model_file(name)


def test_only_files_of_the_model_are_listed(copy: Path) -> None:
    before = intake.model_files(copy)
    for name in set(LEFT_OUT) - {"adapter_model.safetensors"}:
        (copy / name).write_bytes(b"\x7fELF")
    (copy / "onnx").mkdir()
    (copy / "link.bin").symlink_to("/etc/shadow")
    assert intake.model_files(copy) == before
    intake.admit(copy)


PICKLE = b"\x80\x04cos\nsystem\n(S'true'\ntR."
WRONG = [
    *((name, PICKLE) for name in ("LICENSE", "README.md", "extra.json", "tokenizer.model", "chat_template.jinja")),
    ("extra.safetensors", PICKLE),
    ("extra.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    ("LICENSE", b"\x7fELF\x02\x01\x01\x00"),
    ("LICENSE", "in latin: \xe9".encode("latin-1")),
    ("extra.json", b"[" * 200_000),
]


@pytest.mark.parametrize(("name", "content"), WRONG)
def test_a_file_that_is_not_what_its_name_says_is_refused(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    damaged = name.endswith((".safetensors", ".json"))
    with pytest.raises(IntegrityError if damaged else RefusedError, match="not what its name says"):
        intake.admit(copy)


RIGHT = [
    ("LICENSE", "© 2026: do good.\n\f\n".encode()),
    ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"),  # SentencePiece
    ("tokenizer.model", b"IQ== 0\nIg== 1\n"),  # tiktoken
    ("eval_results.json", b'{"loss": NaN}'),
    ("vocab.json", b'{"auto_map": 7, "model_file": 8}'),  # tokens, not settings
]


@pytest.mark.parametrize(("name", "content"), RIGHT)
def test_what_models_really_have_is_admitted(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    intake.admit(copy)
    assert name in intake.model_files(copy)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "tokenizer.json", "model.safetensors", "x_config.json"])
@pytest.mark.parametrize(
    "change", [_pipe, _loop, *map(_link, ("/etc/passwd", "/dev/zero", "../secret", "nothing", "."))]
)
def test_links_and_pipes_are_refused(copy: Path, name: str, change: Callable[[Path], None]) -> None:
    (copy.parent / "secret").write_text("{}")
    change(copy / name)
    with pytest.raises(RefusedError, match=name):
        intake.admit(copy)


def test_links_of_a_hub_cache_are_followed_to_its_blobs_only(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = cache / "snapshots" / ("a" * 40), cache / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    for path in copy.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert intake.model_files(snapshot) == intake.model_files(copy)
    named = tmp_path / "named"
    named.symlink_to(snapshot)  # whoever names a link means where it leads
    intake.admit(named)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("secret")
    for target in ("../../refs/main", "/etc/passwd", "../../blobs/../refs/main"):
        _link(target)(snapshot / "LICENSE")
        with pytest.raises(RefusedError, match="symbolic link"):
            intake.admit(snapshot)


DANGERS = [
    ("config.json", {"auto_map": {"AutoConfig": "evil.C"}}),
    ("config.json", {"text_config": {"attn_implementation": "evil/kernels"}}),
    ("config.json", {"_attn_implementation": "evil:kernels"}),
    ("config.json", {"attn_implementation": {"text_config": "evil/kernels"}}),
    ("config.json", {"_attn_implementation_internal": "eager"}),
    ("config.json", {"use_kernels": True}),
    ("config.json", {"kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernels:RMSNorm"}}}),
    ("config.json", {"quantization_config": {"tokenizer": "evil/repo"}}),
    ("generation_config.json", {"custom_generate": "evil/repo"}),
    ("special_tokens_map.json", {"auto_map": {"x": "y"}}),
    ("genai_config.json", {"model": {"decoder": {"session_options": {"custom_ops_library": "evil.so"}}}}),
    ("adapter_config.json", {"base_model_name_or_path": "evil/repo"}),
]


@pytest.mark.parametrize(("name", "value"), DANGERS)
def test_settings_that_run_code_are_refused_by_every_loader(copy: Path, name: str, value: dict[str, object]) -> None:
    found = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps(found | value))
    with pytest.raises(RefusedError, match=name):
        intake.admit(copy)
    with pytest.raises(RefusedError, match=name):
        runtime.load(copy)


@pytest.mark.parametrize("word", ["sdpa", "eager", "flash_attention_2", "paged|sdpa", None, ""])
def test_usual_implementations_are_admitted(copy: Path, word: str | None) -> None:
    found = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(found | {"_attn_implementation": word}))
    intake.admit(copy)


def test_a_configuration_has_bounds(copy: Path) -> None:
    with (copy / "config.json").open("ab") as file:
        file.truncate(2**27)
    with pytest.raises((RefusedError, IntegrityError)):
        intake.admit(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_what_git_lfs_has_not_fetched_is_named_as_that(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(IntegrityError, match="pointer of Git LFS") as told:
        intake.model_files(copy)
    assert told.value.fix == "run `git lfs pull` beside it"


def test_settings_have_a_size(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"notes": "x" * 2**22}))
    with pytest.raises(IntegrityError, match="more than 4194304"):
        intake.admit(copy)
