"""Options of `compile: {engine: neuron}`, and what they mean for an instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.stage import StageOptions
from optikit.targets import Target
from optikit.targets.neuron import Placement, Shapes, place

Backend = Literal["optimum-neuron", "nxd-inference", "vllm-neuron"]
Kind = Literal["", "draft", "medusa", "eagle3", "lookup"]
TAKES: Mapping[str, tuple[Kind, ...]] = {
    "optimum-neuron": ("", "draft"),
    "nxd-inference": ("", "draft", "medusa"),
    "vllm-neuron": ("", "eagle3"),
}
"""What of a speculate stage each backend can use. NxD Inference has EAGLE-3, too, but reads the model's output layer
from the drafter's directory, which the layout of `speculate: {method: eagle3}` doesn't hold."""


PLATFORMS = {"inf2": "trn1", "trn1": "trn1", "trn1n": "trn1", "trn2": "trn2"}
"""Instance families that optimum-neuron 0.4.5 compiles for → platform (optimum/neuron/utils/instance.py)."""


class Options(StageOptions):
    """Options of `compile: {engine: neuron}`."""

    backend: Backend = "optimum-neuron"
    """Library that compiles and serves."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Sequences per step; compiled in."""
    sequence_length: int = Field(default=2048, ge=16, le=1_048_576)
    """Longest sequence in tokens, prompt and answer together; compiled in."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Neuron cores that share the model, as the SDK counts them."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of weights and arithmetic."""
    on_device_sampling: bool | None = None
    """Choose tokens on the device; None does so wherever the way to speculate lets it: two programs compare logits."""
    speculation_length: int = Field(default=0, ge=0, le=31)
    """Tokens that are checked at once; 0 is no speculation."""
    draft: str = ""
    """Draft model for speculation: a directory, or `hf:ORG/NAME@REVISION`; it is put into the folder. Empty takes what
    a speculate stage before has made."""
    speculation: Literal["vanilla", "fused"] = "vanilla"
    """`vanilla`: draft and model are two programs; `fused`: one program drafts and checks (nxd-inference)."""
    acceptor: Literal["greedy", "rejection"] = "greedy"
    """Which drafted tokens stay: `greedy`, those that the model would choose; `rejection`, by chance, so that samples
    follow the model's own distribution (Leviathan et al. 2023; fused speculation of nxd-inference, vllm-neuron)."""
    first_core: int = Field(default=0, ge=0, le=1023)
    """First of the cores that model and draft lie on, so that several servers share an instance."""
    quantization_dtype: Literal["int8", "f8e4m3", "f8e5m2"] | None = None
    """Weights that nxd-inference quantizes to, per channel, before it compiles; None leaves them as they are."""
    quantized_checkpoints_path: str | None = None
    """Directory on the instance for those weights."""
    async_mode: bool = False
    """Prepare the next step while the device works on this one (nxd-inference)."""
    cache: str = "/var/tmp/neuron-compile-cache"  # noqa: S108 - the SDK's own default, on the instance
    """Compile cache on the instance: a directory, or s3://BUCKET/PREFIX to share it between instances."""
    sdk: str | None = None
    """Neuron SDK on the instance, e.g. `2.31`: what is in maintenance there is warned about."""


def samples_on_device(options: Options, kind: Kind) -> bool:
    """Return whether tokens are chosen on the device, where `kind` drafts."""
    if options.on_device_sampling is not None:
        return options.on_device_sampling
    return kind in ("", "eagle3") or options.speculation == "fused"


def kind_of(options: Options, facts: ModelFacts) -> Kind:
    """Return what drafts: the draft that is named, or what a stage before has put beside the model."""
    found: dict[str, Kind] = {"draft_model": "draft", "medusa_heads": "medusa", "eagle3": "eagle3"}
    found["prompt_lookup"] = "lookup"
    return "draft" if options.draft else next((kind for trait, kind in found.items() if trait in facts.traits), "")


def core_set(options: Options) -> str:
    """Return the cores of model and draft as NEURON_RT_VISIBLE_CORES names them."""
    last = options.first_core + options.tensor_parallel - 1
    return f"{options.first_core}-{last}" if options.tensor_parallel > 1 else str(last)


def instance_family(target: Target) -> str:
    """Return the instance family of a target: `inf2` for `inf2.48xlarge` or `ml.inf2.48xlarge`."""
    return target.name.removeprefix("ml.").split(".")[0]


def backend_for(target: Target) -> Backend:
    """Return the backend that compiles for a target: optimum-neuron where it knows the instance."""
    return "optimum-neuron" if instance_family(target) in PLATFORMS else "nxd-inference"


def placement(options: Options, facts: ModelFacts, drafts: Sequence[ModelFacts], medusa_heads: int = 0) -> Placement:
    """Return where the model, its drafts and its Medusa heads lie, in the shapes and dtype that are compiled in."""
    return place(options.tensor_parallel, (facts, *drafts), shapes(options), medusa_heads=medusa_heads)


def shapes(options: Options) -> Shapes:
    """Return what is compiled in."""
    return Shapes(
        dtype=options.dtype,
        quantized=options.quantization_dtype is not None,
        batch=options.batch_size,
        length=options.sequence_length,
    )
