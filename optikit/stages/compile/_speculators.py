"""What a speculate stage has made, brought into an emitted folder: a draft, Medusa heads, an EAGLE-3 drafter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.errors import StageFailedError
from optikit.models import intake
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import Input, Job
from optikit.stages.compile._overlay import overlay

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.stage import StageOptions

DRAFT = "draft"
"""The folder's directory for what drafts."""
MADE = {kind: Input(of="step", made_by=("speculate", kind)) for kind in ("draft", "medusa", "eagle3")}
HEADS = "medusa_heads.pt"
TREE = "medusa_tree.json"


def inputs(draft: str) -> Mapping[str, Input]:
    """Declare a draft that is named, or else what the newest speculate stage of each kind has made."""
    if draft:
        return {"draft": Input(of="model", spec=draft, option="draft")}
    return {f"made_{kind}": one for kind, one in MADE.items()}


def fits(options: StageOptions, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Yield why the draft that is named can't serve this model."""
    from optikit.deploy.draft import problems

    yield from (problem.under("draft") for draft in models.values() for problem in problems(draft, facts))


def place_draft(job: Job, dtype: str = "") -> Path | None:
    """Put the draft, or the EAGLE-3 drafter, into the folder; return where it came from, None where there is none.

    Its configuration is written as transformers 4.57 and 5 both read it, in the dtype that the model is compiled in.
    """
    places = {"draft": "", "made_draft": "draft", "made_eagle3": "eagle3"}
    given = dict(job.inputs)
    found = (given[role] / below for role, below in places.items() if role in given)
    source = next(found, None)
    if source is None:
        return None
    place = job.dest / DRAFT
    place.mkdir(parents=True, exist_ok=True)
    for name in intake.model_files(source):
        shutil.copyfile(source / name, place / name)
    for name, value in overlay(source, dtype):
        (place / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return source


def place_heads(job: Job) -> int:
    """Put Medusa heads beside the model as NxD Inference reads them, and their tree; return how many there are.

    Raises:
        StageFailedError: They were written in no layout that it can be made of, or have several layers.
    """
    given = dict(job.inputs)
    if "made_medusa" not in given:
        return 0
    import torch
    from safetensors.torch import load_file

    path = given["made_medusa"] / "v1" / "medusa_lm_head.safetensors"
    if not path.is_file():
        message = "the heads were written in no layout that NxD Inference can read"
        raise StageFailedError(message, fix="set layouts: [v1] in the speculate stage, and sequential: false")
    tensors: dict[str, Tensor] = load_file(path)
    heads = len({name.partition(".")[0] for name in tensors})
    if len(tensors) != 3 * heads:
        message = f"NxD Inference builds Medusa heads of one layer; these have {(len(tensors) // heads - 1) // 2}"
        raise StageFailedError(message, fix="set layers: 1 in the speculate stage")
    model = job.dest / "model"
    model.mkdir(parents=True, exist_ok=True)
    torch.save({f"medusa_head_{name}": each for name, each in tensors.items()}, model / HEADS)
    torch.load(model / HEADS, weights_only=True)
    (job.dest / TREE).write_text(json.dumps(chain(heads)) + "\n", encoding="utf-8")
    return heads


def chain(heads: int) -> list[list[int]]:
    """Return the tree of the heads' likeliest tokens, as Medusa writes trees: a path per node.

    >>> chain(2)
    [[0], [0, 0]]
    """
    return [[0] * depth for depth in range(1, heads + 1)]
