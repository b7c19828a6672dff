"""SageMaker with AWS' Large Model Inference container: what `lmi` mounts lies under the model's prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optikit.deploy.bundle import Bundle, SageMaker, Served
from optikit.deploy.bundles import lmi

SUMMARY = "SageMaker endpoint on AWS' Large Model Inference container"
CHECKED = "requests validated by SageMaker's own service model"


def bundle(options: Any, served: Served) -> Bundle:
    """Return what SageMaker is asked for: it lays the prefix where the container looks."""
    made = lmi.bundle(options, served)
    uploads = tuple(
        (name.replace("serve/lmi/", "serve/sagemaker-lmi/"), place.removeprefix(f"{lmi.MODEL}/"))
        for name, place in made.mounts
    )
    told = SageMaker(uploads=uploads, environment=made.environment)
    return replace(made, sagemaker=told, mounts=(), limits=lmi.LIMITS[1:])
