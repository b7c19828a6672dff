"""gguf headers: read as the gguf package reads them, and refused where they could harm or confuse a reader."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit.errors import IntegrityError, RecipeError
from optikit.models import architectures, gguf_names, gguf_reader
from optikit.models.gguf_header import BLOCKS, read_header
from tests.models import gguf_files


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write(path)
    return path


def test_types_are_those_of_the_format() -> None:
    for number, (name, per_block, size) in BLOCKS.items():
        kind = GGMLQuantizationType(number)
        assert kind.name == name
        assert GGML_QUANT_SIZES[kind] == (per_block, size)


@pytest.mark.parametrize("name", [name for name, row in architectures.rows().items() if row.gguf or row.gguf_as])
def test_names_are_those_of_the_format(name: str) -> None:
    """Every tensor's, by gguf-py's own table of the architecture."""
    row = architectures.rows()[name]
    gguf = row.gguf or row.gguf_as
    arch = next(each for each, called in MODEL_ARCH_NAMES.items() if called == gguf)
    names = get_tensor_name_map(arch, 2)
    compared = 0
    for pattern, words in row.tensors.items():
        full = pattern.replace("*", row.block(1), 1)
        theirs = names.get_name(full.replace(".#", ""), (".weight", ".bias"))
        mine = gguf_names.of_tensor(row, gguf, full.replace("#", "3"))
        assert mine == theirs or not words or theirs is None, pattern
        compared += theirs is not None
    assert compared >= 9


@pytest.mark.parametrize("name", [name for name, row in architectures.rows().items() if row.gguf])
def test_places_are_the_way_back(name: str) -> None:
    row = architectures.rows()[name]
    for pattern, words in row.tensors.items():
        full = pattern.replace("*", row.block(7), 1)
        stored = gguf_names.of_tensor(row, row.gguf, full.replace("#", "0"))
        if words and stored is not None:
            found = gguf_names.places(row, [stored], 3)
            assert found[stored] == tuple(full.replace("#", str(each)) for each in range(3 if "#" in full else 1))
    assert gguf_names.places(row, ["blk.01.ffn_up.weight", "blk.0.other.weight", "v.weight"], 3) == {}


def test_it_reads_what_the_packages_own_reader_reads(llama: Path) -> None:
    header, peer = read_header(llama), GGUFReader(llama)
    assert {name: (t.type, t.shape, t.bytes) for name, t in header.tensors.items()} == {
        t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist())), t.n_bytes) for t in peer.tensors
    }
    for name in ("general.architecture", "llama.block_count", "llama.rope.freq_base", "tokenizer.chat_template"):
        field = peer.get_field(name)
        assert field is not None
        assert header.metadata[name] == field.contents()
    assert header.metadata["tokenizer.ggml.tokens"] == (), "long lists aren't kept"
    assert header.metadata["tokenizer.ggml.merges"] == ("a b", "ab c")


def test_facts(llama: Path) -> None:
    facts = gguf_reader.read_gguf(llama)
    assert (facts.model_type, facts.hidden, facts.intermediate, facts.layers) == ("llama", 64, 96, 2)
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.vocab) == (4, 2, 16, 260)
    assert (facts.max_positions, facts.tied, facts.dtype, facts.traits) == (128, True, "BF16", frozenset())
    assert facts.linears["model.layers.1.mlp.gate_proj"] == (96, 64)
    assert facts.linears["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert len(facts.linears) == 14
    assert facts.parameters == sum(
        size[0] * (size[1] if len(size) == 2 else 1) for size in gguf_files.shapes(260).values()
    )
    assert facts.weight_bytes < llama.stat().st_size


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_files.write(path, leave_out="blk.1.ffn_down.weight")
    with pytest.raises(IntegrityError, match=r"no weights for model\.layers\.1\.mlp\.down_proj"):
        gguf_reader.read_gguf(path)
    gguf_files.write(path, leave_out="token_embd.weight")
    with pytest.raises(IntegrityError, match=r"token_embd\.weight"):
        gguf_reader.read_gguf(path)
    gguf_files.write(path, "mamba")
    with pytest.raises(RecipeError, match="'mamba' isn't known") as raised:
        gguf_reader.read_gguf(path)
    assert "llama" in raised.value.fix
    gguf_files.write(path, split__count=3)
    with pytest.raises(IntegrityError, match="says that it is one of 3 parts, and by its name it is one of 1"):
        gguf_reader.read_gguf(path)


def test_a_width_that_is_not_told_is_taken_from_the_weights(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "a.gguf", intermediate=False)
    assert gguf_reader.read_gguf(tmp_path / "a.gguf").intermediate == 96


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _file(entries: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, number, count) + entries + tensors


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + sizes + struct.pack("<IQ", kind, offset)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "another format": (b"GGML" + bytes(60), "doesn't begin"),
    "version 1": (_file(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "ends in its header": (_file()[:-1], "in the middle"),
    "entries without end": (_file(count=2**63), "metadata entries"),
    "tensors without end": (_file(number=2**63), "tensors"),
    "text beyond the file": (_file(struct.pack("<Q", 1000), 1), "in the middle"),
    "text beyond memory": (_file(struct.pack("<Q", 2**40), 1), "text of"),
    "unknown type": (_file(_text("a") + struct.pack("<I", 99), 1), "unknown type 99"),
    "array of arrays": (_file(_text("a") + struct.pack("<IIQ", 9, 9, 1), 1), "array of type 9"),
    "array beyond the file": (_file(_text("a") + struct.pack("<IIQ", 9, 4, 2**62), 1), "in the middle"),
    "texts beyond the file": (_file(_text("a") + struct.pack("<IIQ", 9, 8, 2**62) + bytes(64), 1), "list of texts"),
    "text in a list beyond the file": (
        _file(_text("a") + struct.pack("<IIQ", 9, 8, 20) + struct.pack("<Q", 2**63) + bytes(200), 1),
        "list of texts",
    ),
    "key twice": (_file((_text("a") + struct.pack("<IB", 0, 1)) * 2, 2), "there twice"),
    "not UTF-8": (_file(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1), 1), "decode"),
    "no dimensions": (_file(tensors=_tensor("t", (), 0, 0), number=1), "0 dimensions"),
    "five dimensions": (_file(tensors=_tensor("t", (1,) * 5, 0, 0), number=1), "5 dimensions"),
    "unknown tensor type": (_file(tensors=_tensor("t", (1,), 77, 0), number=1), "unknown type 77"),
    "broken block": (_file(tensors=_tensor("t", (31,), 3, 0) + bytes(99), number=1), "blocks of 32"),
    "data beyond the file": (_file(tensors=_tensor("t", (64,), 0, 0) + bytes(99), number=1), "ends after the file"),
    "size that overflows": (
        _file(tensors=_tensor("t", (2**32, 2**32, 4), 0, 0) + bytes(99), number=1),
        "ends after the file",
    ),
    "overlap": (
        _file(tensors=_tensor("t", (4,), 0, 0) + _tensor("u", (4,), 0, 8) + bytes(200), number=2),
        "overlaps",
    ),
    "tensor twice": (
        _file(tensors=_tensor("t", (4,), 0, 0) + _tensor("t", (4,), 0, 32) + bytes(200), number=2),
        "tensor is there twice",
    ),
    "alignment of nothing": (
        _file(_text("general.alignment") + struct.pack("<II", 4, 0), 1, bytes(64)),
        "general.alignment is 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_file_is_refused_naming_it(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=words) as raised:
        read_header(path)
    assert str(path) in raised.value.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(at=st.integers(0, 1500), value=st.integers(0, 255), length=st.none() | st.integers(0, 100_000))
def test_a_spoilt_file_is_read_or_refused_never_worse(
    at: int, value: int, length: int | None, llama: Path, tmp_path: Path
) -> None:
    content = bytearray(llama.read_bytes())
    content[at] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(content)[:length])
    with contextlib.suppress(IntegrityError, RecipeError):
        gguf_reader.read_gguf(path)
