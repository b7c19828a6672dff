"""`optikit publish` as one function: what a run wrote, laid out for servers, with a card, sealed, and put where asked.

A server looks for config.json at the top; so the model directory goes there, what was compiled and the speculator stay
in their folders, and recipe, lock and reports go to `optikit/`. All of it is sealed again, so that it can be verified.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optikit import text
from optikit.app import verify
from optikit.app.verify import MADE_AGAIN, SIGNATURE
from optikit.errors import (
    CannotCreateError,
    InputMissingError,
    IntegrityError,
    UnavailableError,
    UsageError,
)
from optikit.store import files, manifest

CARD = "README.md"
RECORDS = "optikit"
"""Folder of what tells how it was made."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for.

    Attributes:
        directory: An output of `optikit run`.
        dest: `hf:org/name`, `oci:registry/name:tag`, `oci-layout:PATH[:tag]`, a URL that fsspec knows, or a directory.
        key: PEM file of a private key to sign with; None doesn't sign.
        licence: Of the base model; "" takes what the model's own card says.
        private: A new repository of the hub is private.
        dry: Only tell.
    """

    directory: Path
    dest: str
    key: Path | None = None
    licence: str = ""
    private: bool = False
    dry: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """What went, or would go, where: path → bytes, the card's first lines, and a digest where the place has one."""

    dest: str
    files: Mapping[str, int]
    card: str
    digest: str = ""


def publish(request: Request, note: Callable[[str], None]) -> Published:
    """Put an output where it is asked for.

    Raises:
        InputMissingError: No output of a run, or no key.
        IntegrityError: It isn't as it was sealed.
        RefusedError: A file holds a credential.
        CannotCreateError: The directory to write exists.
        UnavailableError: The place can't be reached, or a package or program that reaches it isn't there.
        UsageError: No such kind of place.
    """
    send = _place(request)
    found = verify.verify(request.directory)
    if found.damage:
        raise IntegrityError(f"{request.directory}: {found.damage[0]}", fix=MADE_AGAIN)
    with tempfile.TemporaryDirectory(prefix="optikit-publish-") as made:
        staged = Path(made) / "published"
        card = _stage(request, staged)
        names = {name: stat.st_size for name, stat in files.walk(staged).items()}
        if request.dry:
            return Published(dest=request.dest, files=names, card=card)
        note(f"publishing {len(names)} files to {request.dest}")
        return Published(dest=request.dest, files=names, card=card, digest=send(staged, sorted(names)))


def place_of(name: str) -> str:
    """Return where a file of an output is published.

    >>> place_of("model/config.json"), place_of("compiled/onnxruntime/model.onnx"), place_of("report.md")
    ('config.json', 'compiled/onnxruntime/model.onnx', 'optikit/report.md')
    """
    if name.startswith("model/"):
        return name.removeprefix("model/")
    return name if "/" in name else f"{RECORDS}/{name}"


def _stage(request: Request, staged: Path) -> str:
    """Lay out what is published, with its card, its seal and its signature; return the card."""
    from optikit.report import model_card, write

    sealed, said = manifest.read(request.directory)
    report = write.load(request.directory)
    for name in sealed.files:
        if place_of(name) == CARD or name.startswith("serve/"):
            continue  # the base model's card isn't ours; paths of an output's servers don't hold there
        files.require_no_credential(request.directory / name)
        target = staged / place_of(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(request.directory / name, target)
    recipe = (request.directory / "recipe.yaml").read_text(encoding="utf-8")
    licence = request.licence or _licence(request.directory / "model" / CARD)
    card = model_card.render(report, recipe, licence=licence, serving=_serving(request, sealed))
    (staged / CARD).write_text(card, encoding="utf-8")
    manifest.seal(staged, replace(sealed, files={}, created=sealed.created or report.created))
    again = manifest.read(staged)[1]
    files.write_whole(staged / manifest.NAME, manifest.dumps(_without_self(said | again)).encode())
    if request.key is not None:
        _sign(staged, request.key)
    return card


def _without_self(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name != manifest.SELF}


def _licence(card: Path) -> str:
    """Return the licence that the base model's own card names, or ""."""
    import yaml

    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0].removeprefix("---")
    try:
        front = yaml.safe_load(lines)
    except yaml.YAMLError:
        return ""
    found = front.get("license", "") if isinstance(front, dict) else ""
    return text.clean(str(found))[:100]


def _serving(request: Request, sealed: manifest.Manifest) -> list[tuple[str, str]]:
    """Return the ways to run it, each with its command."""
    kind, _, rest = request.dest.partition(":")
    where = rest if kind == "hf" else "DIR"
    ways = [("On this kind of machine, compiled", f"optikit serve {where if kind != 'hf' else 'DIR'}")]
    if not any(name.startswith("compiled/") for name in sealed.files):
        ways = [("With optikit", "optikit serve DIR")]
    if any(name.startswith("model/") and name.endswith(".safetensors") for name in sealed.files):
        ways.append(("The weights, with vLLM", f"vllm serve {where}"))
    return ways


def _sign(staged: Path, key: Path) -> None:
    """Write model.sig beside the files: OpenSSF's model signing with an elliptic-curve key."""
    if not key.is_file():
        raise InputMissingError(f"{key} is no file", fix="give the PEM file of a private key")
    try:
        from model_signing import signing
    except ModuleNotFoundError as error:
        raise _lacking(error) from error
    try:
        signing.Config().use_elliptic_key_signer(private_key=key).sign(staged, staged / SIGNATURE)
    except (ValueError, TypeError) as error:
        message = f"{key} can't sign: {error}"
        raise UsageError(
            message, fix="make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        ) from error


def _lacking(error: ModuleNotFoundError) -> UnavailableError:
    return UnavailableError(f"publishing there needs {error.name}", fix="pip install 'optikit[publish]'")


Send = Callable[[Path, list[str]], str]


def _place(request: Request) -> Send:
    """Return what puts a staged directory in its place, after checking what can be known now."""
    kind, colon, rest = request.dest.partition(":")
    if colon and kind == "hf" and not rest.startswith("//"):
        return lambda staged, _: _to_hub(request, rest, staged)
    if colon and kind == "oci-layout":
        path, _, tag = rest.partition(":")
        return _to_layout(Path(path), tag or "latest")
    if colon and kind == "oci":
        return lambda staged, names: _to_registry(rest, staged, names)
    if "://" in request.dest:
        return lambda staged, names: _to_url(request.dest, staged, names)
    return _to_directory(Path(rest if kind == "dir" and colon else request.dest))


def _require_new(path: Path) -> None:
    if not str(path) or path.exists():
        raise CannotCreateError(f"{str(path)!r} exists", fix="name a directory that doesn't")


def _to_directory(path: Path) -> Send:
    _require_new(path)

    def send(staged: Path, _: list[str]) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(staged, path)
        return ""

    return send


def _labels(staged: Path) -> dict[str, str]:
    sealed = manifest.load(staged)
    return {"org.opencontainers.image.created": sealed.created, "org.opencontainers.image.title": "optikit model"}


def _to_layout(path: Path, tag: str) -> Send:
    from optikit.deploy import oci

    _require_new(path)
    return lambda staged, names: oci.write(staged, names, path, tag=tag, labels=_labels(staged))


def _to_registry(name: str, staged: Path, names: list[str]) -> str:
    """Push with skopeo or oras, whichever is there: both take their credentials from where docker keeps them."""
    from optikit.deploy import oci
    from optikit.process import program

    tools = {
        "skopeo": lambda layout: ["copy", "--preserve-digests", f"oci:{layout}:latest", f"docker://{name}"],
        "oras": lambda layout: ["cp", "--from-oci-layout", f"{layout}:latest", name],
    }
    tool = next((each for each in tools if shutil.which(each)), None)
    if tool is None:
        message = "pushing to a registry needs skopeo or oras, and neither is installed"
        raise UnavailableError(message, fix="install one, or publish to oci-layout:PATH and push that")
    with tempfile.TemporaryDirectory(prefix="optikit-oci-") as made:
        layout = Path(made) / "layout"
        digest = oci.write(staged, names, layout, tag="latest", labels=_labels(staged))
        done = program.run([tool, *tools[tool](layout)])
        if done.code:
            said = text.clean(done.errors.strip().splitlines()[-1] if done.errors.strip() else f"exit code {done.code}")
            raise UnavailableError(f"{tool} couldn't push to {name}: {said[:300]}", fix="check name and credentials")
    return digest


def _to_hub(request: Request, name: str, staged: Path) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(name, private=request.private, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=staged, commit_message="Published by optikit")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        message = f"the hub didn't take {name}: {text.clean(str(error))[:300]}"
        raise UnavailableError(message, fix="log in with `hf auth login`, and check the name") from error
    return str(done.oid)


def _to_url(url: str, staged: Path, names: list[str]) -> str:
    """Put the files below a URL that fsspec knows, s3:// for one; the seal goes last."""
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise _lacking(error) from error
    try:
        system, root = fsspec.core.url_to_fs(url)
        for name in sorted(names, key=lambda each: each == manifest.NAME):
            system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            system.put_file(str(staged / name), f"{root}/{name}")
    except ImportError as error:
        raise UnavailableError(f"{url}: {error}", fix="install the package that it names") from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}", fix="use hf:, oci:, oci-layout:, s3:// or a directory") from error
    except Exception as error:  # clients of clouds raise anything
        message = f"{url} didn't take it: {type(error).__name__}: {text.clean(str(error))[:300]}"
        raise UnavailableError(message, fix="check the address and its credentials") from error
    return ""


def as_json(found: Published) -> dict[str, Any]:
    """Return what went where, as the command line prints it."""
    return {"dest": found.dest, "files": dict(found.files), "digest": found.digest}
