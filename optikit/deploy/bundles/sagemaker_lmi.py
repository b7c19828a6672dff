"""SageMaker with AWS' Large Model Inference container: serving.properties on top of the model's prefix."""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import Bundle, SageMaker, Served, speculation
from optikit.deploy.bundles import lmi

SUMMARY = "SageMaker endpoint on AWS' Large Model Inference container"
CHECKED = "requests validated by SageMaker's own service model"


def bundle(options: Any, served: Served) -> Bundle:
    """Return what SageMaker is asked for."""
    _, place = speculation("lmi", served)
    text = lmi.properties("lmi", options, served)
    uploads = (("serve/sagemaker-lmi/serving.properties", "serving.properties"), ("model", "model"))
    return Bundle(
        image=options.image or f"{lmi.REPOSITORY.format(region=options.region)}:{lmi.TAG}",
        port=8080,
        health="/ping",
        api="openai",
        name=options.name or served.name,
        model=options.name or served.name,
        files={"serving.properties": text},
        needs=("model", *([place] if place else [])),
        sagemaker=SageMaker(
            uploads=(*uploads, *([(place, place)] if place else [])), environment={"HF_HUB_OFFLINE": "1"}
        ),
        limits=lmi.LIMITS[1:],
        source="djl-serving 0.36 docs lmi/deployment_guide, lmi/user_guides/vllm_user_guide.md",
    )
