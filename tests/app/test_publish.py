"""`optikit publish`: what goes is what was sealed, with a card that says what was measured; no secret goes with it."""

import hashlib
import json
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from optikit.app.publish import place_of
from optikit.cli.app import app
from optikit.errors import (
    CannotCreateError,
    InputMissingError,
    IntegrityError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from optikit.report import write
from optikit.report.summary import following
from tests.app.outputs import seal_output

RECORDED = Path(__file__).parent.parent / "report" / "recorded" / "schema_1_medusa.json"


@pytest.fixture
def output(tiny_llama, tiny_onnx, tmp_path):
    """An output with a real model, graph and report."""
    directory = tmp_path / "out"
    shutil.copytree(tiny_llama, directory / "model")
    shutil.copytree(tiny_onnx, directory / "compiled" / "onnxruntime")
    (directory / "recipe.yaml").write_text("model: m\nstages: []\n")
    (directory / "optikit.lock").write_text("{}")
    write.write(write.load(RECORDED), directory)
    seal_output(directory)
    return directory


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_published_directory_is_served_verified_and_described(output, tmp_path):
    dry = run("publish", output, tmp_path / "new", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "new").exists()
    done = run("publish", output, tmp_path / "new", "--license", "apache-2.0")
    assert done.exit_code == 0, done.output
    there = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert there == set(json.loads(dry.stdout)["files"])
    assert {"config.json", "model.safetensors", "compiled/onnxruntime/model.onnx", "optikit/report.json"} <= there
    assert run("verify", tmp_path / "new").exit_code == 0
    sealed = json.loads((tmp_path / "new" / "artifact.json").read_text())
    assert sealed["target"] == "cpu"  # what the seal of the output says is kept
    said = run("generate", tmp_path / "new", "--prompt", "stone", "--max-tokens", "3", "--stats")
    assert said.exit_code == 0
    assert "onnxruntime" in said.stderr
    card = (tmp_path / "new" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    report = write.load(RECORDED)
    assert front["license"] == "apache-2.0"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == round(
        report.result.quality.perplexity.value, 4
    )
    assert "model: m\nstages: []" in card
    for warning in report.warnings:
        assert warning[:20] in card.replace("\\", "")
    with (tmp_path / "new" / "config.json").open("a") as file:
        file.write(" ")
    assert run("verify", tmp_path / "new").exit_code != 0


def test_the_base_model_s_own_card_gives_the_licence_and_stays_at_home(output, tmp_path):
    (output / "model" / "README.md").write_text("---\nlicense: mit\n---\nThe dense model.\n")
    seal_output(output)
    assert run("publish", output, tmp_path / "new").exit_code == 0
    card = (tmp_path / "new" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "The dense model." not in card


def test_a_signature_holds_until_a_byte_changes(output, tmp_path):
    from model_signing import hashing, verifying

    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    new = tmp_path / "new"
    assert run("publish", output, new, "--sign", key).exit_code == 0
    assert run("verify", new).exit_code == 0
    but_itself = hashing.Config().set_ignored_paths(paths=[new / "model.sig"], ignore_git_paths=False)
    by = verifying.Config().use_elliptic_key_verifier(public_key=public).set_hashing_config(but_itself)
    by.verify(new, new / "model.sig")
    with (new / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"config\.json"):
        by.verify(new, new / "model.sig")
    (tmp_path / "no.pem").write_text("no key")
    assert isinstance(run("publish", output, tmp_path / "b", "--sign", tmp_path / "no.pem").exception, UsageError)
    assert isinstance(run("publish", output, tmp_path / "b", "--sign", tmp_path / "none").exception, InputMissingError)


def test_an_image_has_a_layer_for_each_file_and_is_the_same_every_time(output, tmp_path):
    for name in ("one", "two"):
        assert run("publish", output, f"oci-layout:{tmp_path / name}:v1").exit_code == 0
    layout = tmp_path / "one"
    index = json.loads((layout / "index.json").read_text())
    assert index == json.loads((tmp_path / "two" / "index.json").read_text())
    assert index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] == "v1"

    def blob(described):
        data = (layout / "blobs" / "sha256" / described["digest"].removeprefix("sha256:")).read_bytes()
        assert (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") == (described["size"], described["digest"])
        return data

    manifest = json.loads(blob(index["manifests"][0]))
    config = json.loads(blob(manifest["config"]))
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    found = {}
    for layer in manifest["layers"]:
        blob(layer)
        path = layout / "blobs" / "sha256" / layer["digest"].removeprefix("sha256:")
        with tarfile.open(path) as tar:
            [member] = tar.getmembers()
            found[member.name] = tar.extractfile(member).read()
    assert found["models/model.safetensors"] == (output / "model" / "model.safetensors").read_bytes()
    assert "models/README.md" in found


def test_a_bucket_gets_the_seal_last(output):
    import fsspec

    assert run("publish", output, "memory://bucket/model").exit_code == 0
    system = fsspec.filesystem("memory")
    names = system.find("/bucket/model")
    assert "/bucket/model/config.json" in names
    assert max(names, key=system.created) == "/bucket/model/artifact.json"
    assert system.cat("/bucket/model/model.safetensors") == (output / "model" / "model.safetensors").read_bytes()


def test_what_is_not_published(output, tmp_path, monkeypatch):
    def failing(*arguments):
        result = run("publish", *arguments)
        assert result.exit_code != 0
        return result.exception

    assert isinstance(failing(output, output), CannotCreateError)
    assert isinstance(failing(output, "bogus://x/y"), UsageError)
    monkeypatch.setenv("PATH", "")
    assert isinstance(failing(output, "oci:localhost:1/x:y"), UnavailableError)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert isinstance(failing(tmp_path / "absent", tmp_path / "new"), InputMissingError)
    (output / "recipe.yaml").write_text("model: https://me:hunter2hunter2@host/model\nstages: []\n")
    assert isinstance(failing(output, tmp_path / "new"), IntegrityError)
    seal_output(output)
    assert isinstance(failing(output, tmp_path / "new"), RefusedError)
    assert not (tmp_path / "new").exists()


def test_places():
    assert place_of("speculator/tuning.json") == "speculator/tuning.json"
    assert place_of("model/additional_chat_templates/a.jinja") == "additional_chat_templates/a.jinja"


def test_a_run_ends_with_what_to_do_next(output, tmp_path):
    """Each line is a command of ours, of which the last only lists."""
    steps = list(following(output))
    assert [shlex.split(step)[:3] for step in steps] == [
        ["optikit", verb, str(output)] for verb in ("serve", "bench", "publish")
    ]
    assert run(*shlex.split(steps[2])[1:]).exit_code == 0
    assert list(following(tmp_path)) == []
    emitted = output / "compiled" / "neuron" / "run.sh"
    emitted.parent.mkdir(parents=True)
    emitted.write_text("exit 0\n")
    first, _ = following(output)
    assert shlex.split(first, comments=True) == ["sh", str(emitted)]
    (emitted.parent / "result.json").write_text("{}")
    assert len(list(following(output))) == 3
