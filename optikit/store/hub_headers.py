"""A model on the hub as far as a plan needs it: its small files, and of its weights the headers, by range requests.

What is made is a directory like a snapshot, in which each file of weights has its header, its size, and a hole where
the data would be. Its digest is that of the whole: the hub knows the sha256 of every large file. It serves for planning
only; a run fetches the files themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError
from optikit.fileio import file_sha256
from optikit.models.headers import HOLLOW, MOST_HEADER_BYTES
from optikit.models.intake import is_model_file
from optikit.store import files
from optikit.store.keys import cache_key, is_key

if TYPE_CHECKING:
    from optikit.store.store import Store

MOST_FILE_BYTES = 2**50
_FIX = "get the model another way, and name its directory"
Note = Callable[[str], None]


def peek(repo: str, info: Any, store: Store, note: Note) -> tuple[Path, Mapping[str, str]] | None:
    """Return a directory of headers of a commit and the sha256 of every file, by name; kept for the next plan.

    Args:
        repo: ORG/NAME.
        info: What the hub says of the commit, with sizes and digests.
        store: Where it is kept.
        note: Told what is fetched.

    Returns:
        None where the hub doesn't tell a digest of its weights: the files themselves have to be fetched.

    Raises:
        IntegrityError: A header isn't one.
    """
    siblings = {each.rfilename: each for each in info.siblings or () if is_model_file(each.rfilename)}
    weights = {name: each for name, each in siblings.items() if name.endswith(".safetensors")}
    if not all(_sha256(each) and 0 < (each.size or 0) < MOST_FILE_BYTES for each in weights.values()):
        return None
    place = store.root / "downloads" / "headers" / cache_key(source="hf-headers", repo=repo, commit=str(info.sha))
    if not (place / HOLLOW).is_file():
        note(f"reading the headers of hf:{repo}@{str(info.sha)[:12]}: {len(weights)} files of weights stay there")
        _make(place, repo, str(info.sha), siblings, weights)
    digests: dict[str, str] = json.loads((place / HOLLOW).read_text(encoding="utf-8"))
    return place, digests


def _sha256(sibling: Any) -> str:
    lfs = getattr(sibling, "lfs", None)
    found = (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)) or ""
    return found if is_key(found) else ""


def _make(place: Path, repo: str, commit: str, siblings: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    from huggingface_hub import hf_hub_download, hf_hub_url

    partial = place.with_name(f"{place.name}.{os.getpid()}.part")
    files.remove_tree(partial)
    partial.mkdir(parents=True, mode=0o700)
    digests = {name: _sha256(each) for name, each in weights.items()}
    try:
        for name in siblings.keys() - weights.keys():
            fetched = hf_hub_download(repo, name, revision=commit)
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(fetched, partial / name)
            digests[name] = file_sha256(partial / name)
        for name, each in weights.items():
            (partial / name).write_bytes(_header(hf_hub_url(repo, name, revision=commit), name))
            os.truncate(partial / name, each.size)
        (partial / HOLLOW).write_text(json.dumps(digests), encoding="utf-8")
        files.remove_tree(place)
        partial.rename(place)
    finally:
        files.remove_tree(partial)


def _header(url: str, name: str) -> bytes:
    """Fetch the header of a safetensors file: its length, then so many bytes, and nothing else."""
    head = _range(url, 0, 8)
    length: int = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= MOST_HEADER_BYTES:
        raise IntegrityError(f"{name} on the hub has a header of {length} bytes", fix=_FIX)
    rest = _range(url, 8, length)
    if len(rest) != length:
        raise IntegrityError(f"{name} on the hub ends in the middle of its header", fix=_FIX)
    return head + rest


def _range(url: str, start: int, count: int) -> bytes:
    """Fetch some bytes of a file.

    Raises:
        IntegrityError: The server sends other ones.
    """
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    wanted = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=wanted, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # 200 is the whole file
            raise IntegrityError(f"{url.partition('?')[0]} can't be read in parts", fix=_FIX)
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) > count:
                raise IntegrityError(f"{url.partition('?')[0]} sends more than it was asked for", fix=_FIX)
    return bytes(found)
