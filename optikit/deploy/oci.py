"""A directory as an OCI image that holds nothing but a model: a ModelCar, one layer a file, the same bytes every time.

KServe mounts such an image as a model's volume, Kubernetes since 1.33 as an image volume; `oras` and `skopeo` push the
layout to a registry. Each layer is an uncompressed tar of one file below `models/`, so that its digest is also its
diff_id and a changed file changes one layer (OCI image specification 1.1, image-layout.md and layer.md).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
ROOT = "models"
BLOCK = 2**20


def write(directory: Path, names: Iterable[str], layout: Path, *, tag: str, labels: dict[str, str]) -> str:
    """Write an OCI image layout; return the digest of the image's manifest.

    Args:
        directory: Where the files lie.
        names: Their paths below it.
        layout: Directory to make.
        tag: Name of the image in the layout.
        labels: Annotations, e.g. `org.opencontainers.image.title`.
    """
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers = [_layer(directory / name, f"{ROOT}/{name}", blobs) for name in sorted(names)]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        "history": [
            {"created_by": f"optikit: {layer['annotations']['org.opencontainers.image.title']}"} for layer in layers
        ],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _blob(config, CONFIG, blobs),
        "layers": layers,
        "annotations": labels,
    }
    described = _blob(manifest, MANIFEST, blobs)
    named = {**described, "annotations": {"org.opencontainers.image.ref.name": tag}}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]}
    (layout / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
    digest: str = described["digest"]
    return digest


def _blob(content: Any, kind: str, blobs: Path) -> dict[str, Any]:
    """Write a JSON blob; return its descriptor."""
    data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def _layer(path: Path, name: str, blobs: Path) -> dict[str, Any]:
    """Write a file as a layer; return its descriptor."""
    partial = blobs / "partial"
    info = tarfile.TarInfo(name)
    info.size, info.mode = path.stat().st_size, 0o644
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as out, path.open("rb") as file:
        for piece in _tarred(info, file):
            out.write(piece)
            digest.update(piece)
            size += len(piece)
    shutil.move(partial, blobs / digest.hexdigest())
    title = {"org.opencontainers.image.title": name.removeprefix(f"{ROOT}/")}
    return {"mediaType": LAYER, "digest": f"sha256:{digest.hexdigest()}", "size": size, "annotations": title}


def _tarred(info: tarfile.TarInfo, file: Any) -> Iterable[bytes]:
    """Yield a tar of one file: its head, its bytes, and zeros up to a whole number of records."""
    head = info.tobuf(tarfile.PAX_FORMAT)
    yield head
    length = len(head)
    while piece := file.read(BLOCK):
        length += len(piece)
        yield piece
    padded = -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
    whole = -(-padded // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    yield bytes(whole - length)
