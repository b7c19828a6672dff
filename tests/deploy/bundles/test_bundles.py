"""Every server's folder, held to the parser of whoever reads it: Compose, Kubernetes, SageMaker's model, Triton's."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from optikit import targets
from optikit.deploy import bundles, folder
from optikit.deploy.bundle import Served
from optikit.deploy.bundles import bundled
from optikit.deploy.servers import SERVERS
from optikit.deploy.vllm import vllm

SAGEMAKER = tuple(name for name in bundles.names() if name.startswith("sagemaker"))
CONTAINERS = tuple(name for name in bundles.names() if name not in SAGEMAKER)
DEVICES = {
    **dict.fromkeys(("tgi", "lmi", "sagemaker-tgi", "sagemaker-lmi", "triton", "tensorrt-llm"), "ml.g5.12xlarge"),
    "vllm-neuron": "inf2.48xlarge",
}
LAYOUTS = {"medusa": ("speculator/v1", "speculator/vllm"), "draft": ("speculator/draft",), "lookup": ()}


def served(server: str, method: str = "", **changed: Any) -> Served:
    """Return an artifact with everything that any server could want, and a speculator."""
    directory = {"medusa": "speculator/vllm", "draft": "speculator/draft"}.get(method, "")
    told = {"vllm": {"speculative_config": vllm(method, tokens=3, directory=directory)}} if method else {}
    speculation = {"method": method, "lengths": {"3": 8, "2": 4}, "servers": told} if method else {}
    engines = ("onnxruntime", "openvino", "llama-cpp", "tensorrt-llm", "neuron")
    folders = {"model", *(f"compiled/{each}" for each in engines), *LAYOUTS.get(method, ())}
    found: dict[str, Any] = {
        "name": "smollm2",
        "folders": frozenset(folders | ({"speculator"} if method else set())),
        "files": frozenset({"compiled/llama-cpp/smollm2.gguf"}),
        "size": 3 * 2**30,
        "context": 2048,
        "speculation": speculation,
        "target": targets.find(DEVICES.get(server, "cpu")),
    }
    return Served(**{**found, **changed})


def written(server: str, method: str = "", **options: Any) -> dict[str, str]:
    artifact = served(server, method)
    chosen = SERVERS[server].Options(**options)
    return folder.files(server, bundled(server).bundle(chosen, artifact), artifact, replicas=chosen.replicas)


@pytest.mark.parametrize("server", CONTAINERS)
@pytest.mark.parametrize("method", ["", "lookup", "medusa", "draft"])
def test_compose_files_are_read_by_a_parser_of_the_specification(server: str, method: str) -> None:
    files = written(server, method)
    PyCompose.from_yaml(files["compose.yaml"]).validate()
    service = yaml.safe_load(files["compose.yaml"])["services"]["smollm2"]
    writes = bundled(server).bundle(SERVERS[server].Options(), served(server, method)).writes
    assert ("../..:/out" if writes else "../..:/out:ro") in service["volumes"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_parser_of_compose_files_refuses_what_is_wrong() -> None:
    broken = written("vllm")["compose.yaml"].replace("volumes:", "volums:")
    with pytest.raises(ValueError, match="volums"):
        PyCompose.from_yaml(broken)


def manifests(server: str, method: str = "") -> Iterator[dict[str, Any]]:
    files = written(server, method)
    if "kubernetes.yaml" in files:
        yield from yaml.safe_load_all(files["kubernetes.yaml"])


@pytest.mark.parametrize("server", CONTAINERS)
def test_manifests_hold_to_kubernetes_schemas(server: str) -> None:
    for method in ("", "medusa"):
        for document in manifests(server, method):
            kubernetes_validate.validate(document, "1.33", strict=True)


def test_the_schemas_of_kubernetes_refuse_what_is_wrong() -> None:
    deployment = next(each for each in manifests("vllm") if each["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.33", strict=True)


@pytest.mark.parametrize("server", CONTAINERS)
def test_services_select_pods_and_pods_find_their_volumes(server: str) -> None:
    found = {each["kind"]: each for each in manifests(server)}
    if not found:
        return
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    container = pod["spec"]["containers"][0]
    port = found["Service"]["spec"]["ports"][0]["targetPort"]
    assert port == container["ports"][0]["containerPort"] == container["readinessProbe"]["httpGet"]["port"]
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
    assert (
        volumes["artifact"]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    )


@pytest.mark.parametrize("server", CONTAINERS)
def test_kserves_predictor_is_a_pod_with_its_own_container_name(server: str) -> None:
    files = written(server)
    if "kserve.yaml" not in files:
        return
    service = yaml.safe_load(files["kserve.yaml"])
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = service["spec"]["predictor"]
    assert predictor["containers"][0]["name"] == "kserve-container"
    pod = {name: value for name, value in predictor.items() if name not in ("minReplicas", "maxReplicas")}
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
    kubernetes_validate.validate(document, "1.33", strict=True)


REQUESTS = {
    "create_model.json": "CreateModelInput",
    "create_endpoint_config.json": "CreateEndpointConfigInput",
    "create_endpoint.json": "CreateEndpointInput",
}


def shapes() -> botocore.model.ServiceModel:
    return botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("sagemaker", "service-2"))


def pattern_faults(shape: Any, value: Any, place: str = "") -> Iterator[str]:
    """Yield what a request breaks of the patterns in the service's model, which botocore itself doesn't look at."""
    if shape.type_name == "structure":
        for name, each in value.items():
            yield from pattern_faults(shape.members[name], each, f"{place}.{name}")
    elif shape.type_name == "list":
        for index, each in enumerate(value):
            yield from pattern_faults(shape.member, each, f"{place}[{index}]")
    elif shape.type_name == "map":
        for name, each in value.items():
            yield from pattern_faults(shape.key, name, f"{place}[{name}]")
            yield from pattern_faults(shape.value, each, f"{place}[{name}]")
    elif shape.type_name == "string":
        pattern = shape.metadata.get("pattern")
        if pattern and not re.fullmatch(pattern.replace("\\p{L}", "A-Za-z"), value):
            yield f"{place}: {value!r} isn't {pattern}"
        if shape.enum and value not in shape.enum:
            yield f"{place}: {value!r} is none of the service's words"


@pytest.mark.parametrize("server", SAGEMAKER)
@pytest.mark.parametrize("method", ["", "lookup", "medusa"])
def test_requests_hold_to_sagemakers_own_model(server: str, method: str) -> None:
    model = shapes()
    files = written(server, method)
    for name, shape in REQUESTS.items():
        request = json.loads(files[name])
        report = botocore.validate.ParamValidator().validate(request, model.shape_for(shape))
        assert not report.has_errors(), report.generate_report()
        assert list(pattern_faults(model.shape_for(shape), request)) == []


def test_sagemakers_model_refuses_what_is_wrong() -> None:
    model = shapes()
    request = json.loads(written("sagemaker-tgi")["create_endpoint_config.json"])
    request["ProductionVariants"][0]["InstanceType"] = "g5.12xlarge"
    assert any("g5.12xlarge" in each for each in pattern_faults(model.shape_for("CreateEndpointConfigInput"), request))
    request["ProductionVariants"][0]["Instances"] = request["ProductionVariants"][0].pop("InitialInstanceCount")
    assert (
        botocore.validate.ParamValidator().validate(request, model.shape_for("CreateEndpointConfigInput")).has_errors()
    )


def laid_out(place: Path, server: str, method: str) -> Path:
    """Write a folder, and model and heads beside it, as an output directory has them; return deploy.py."""
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    (place / "speculator" / "v1").mkdir(parents=True)
    (place / "speculator" / "v1" / "config.json").write_text('{"medusa_num_heads": 3, "base_model_name_or_path": "x"}')
    (place / "speculator" / "v1" / "medusa_lm_head.safetensors").write_bytes(b"heads")
    here = place / "serve" / server
    here.mkdir(parents=True)
    for name, text in written(server, method).items():
        (here / name).write_text(text)
    return here / "deploy.py"


def test_an_endpoint_with_heads_is_uploaded_in_the_layout_of_the_sample(tmp_path: Path) -> None:
    program = laid_out(tmp_path, "sagemaker-tgi", "medusa")
    asked = [sys.executable, str(program), "--bucket", "mine", "--role", "arn:aws:iam::123456789012:role/me"]
    told = subprocess.run([*asked, "--dry-run"], check=True, capture_output=True, text=True).stdout
    uploads = re.findall(r"upload (\S+) -> s3://mine/smollm2/(\S+)( \(edited\))?", told)
    assert sorted(uploads) == [
        ("model/config.json", "base-model/config.json", ""),
        ("speculator/v1/config.json", "config.json", " (edited)"),
        ("speculator/v1/medusa_lm_head.safetensors", "medusa_lm_head.safetensors", ""),
    ]
    sent = json.loads(told[told.index("\n{") :])
    assert sent["create_model"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"] == "s3://mine/smollm2/"
    wrong = subprocess.run([*asked[:-1], "me", "--dry-run"], check=False, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "no role's ARN" in wrong.stderr


def test_tritons_configuration_is_its_own_message() -> None:
    files = written("triton", "draft")
    config = text_format.Parse(files["models/smollm2/config.pbtxt"], model_config_pb2.ModelConfig())
    assert config.backend == "vllm"
    assert config.model_transaction_policy.decoupled
    arguments = json.loads(files["models/smollm2/1/model.json"])
    assert arguments["model"] == "/out/model"
    assert arguments["tensor_parallel_size"] == 4


def test_properties_of_lmi_are_keys_and_values() -> None:
    text = written("lmi", "draft", tensor_parallel=2, batch_size=16)["serving.properties"]
    found = dict(line.split("=", 1) for line in text.splitlines())
    assert found["engine"] == "Python"
    assert found["option.model_id"] == "/opt/ml/model/model"
    assert found["option.tensor_parallel_degree"] == "2"
    assert found["option.max_num_seqs"] == "16"
    drafting = json.loads(found["option.speculative_config"])
    assert drafting["model"] == "/opt/ml/model/speculator/draft"
    assert drafting["draft_tensor_parallel_size"] == 2


@pytest.mark.parametrize("server", bundles.names())
def test_scripts_are_valid_and_pages_name_only_what_is_there(server: str, tmp_path: Path) -> None:
    files = written(server, "medusa")
    for name, text in files.items():
        if name.endswith(".sh"):
            path = tmp_path / name
            path.write_text(text)
            subprocess.run(["sh", "-n", str(path)], check=True)
        if name.endswith(".py"):
            compile(text, name, "exec")
    named = set(re.findall(rf"serve/{server}/([\w./-]+)", files["README.md"]))
    assert named <= set(files)


@pytest.mark.parametrize("server", CONTAINERS)
def test_dockerfiles_copy_what_is_read(server: str) -> None:
    text = written(server, "draft")["Dockerfile"]
    artifact = served(server, "draft")
    for folder_name in bundled(server).bundle(SERVERS[server].Options(), artifact).needs:
        assert f"COPY {folder_name} /out/{folder_name}\n" in text
    assert all(re.match(r"(#|FROM|RUN|COPY|ENV|EXPOSE|ENTRYPOINT|CMD) ?", line) for line in text.splitlines())
    for line in text.splitlines():
        if line.startswith(("ENTRYPOINT", "CMD")):
            assert all(isinstance(word, str) for word in json.loads(line.split(" ", 1)[1]))


def test_options_reach_the_command_line() -> None:
    text = yaml.safe_load(written("vllm", batch_size=3, sequence_length=256, name="mine")["compose.yaml"])
    command = text["services"]["mine"]["command"]
    told = dict(zip(command[::2], command[1::2], strict=True))
    assert told["--max-num-seqs"] == "3"
    assert told["--max-model-len"] == "256"
    assert told["--served-model-name"] == "mine"
    assert shlex.join(command)


def test_every_server_that_is_bundled_has_a_row() -> None:
    assert set(bundles.names()) <= set(SERVERS)
