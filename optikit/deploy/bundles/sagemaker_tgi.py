"""SageMaker with Hugging Face's TGI container: heads on top of the model's prefix, the model in `base-model/`.

The layout is that of AWS' and Booking.com's sample of Medusa on SageMaker; it is uploaded as it is, without an archive.
"""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import Bundle, SageMaker, Served, speculation
from optikit.deploy.bundles import tgi

SUMMARY = "SageMaker endpoint on Hugging Face's TGI 3.3 container"
CHECKED = "requests validated by SageMaker's own service model; layout of the published sample"
REPOSITORY = "763104351884.dkr.ecr.{region}.amazonaws.com/huggingface-pytorch-tgi-inference"
VERSION = "3.3.6"
TAG = f"2.7.0-tgi{VERSION}-gpu-py311-cu124-ubuntu22.04"
MODEL = "/opt/ml/model"


def bundle(options: Any, served: Served) -> Bundle:
    """Return what SageMaker is asked for; heads make it serve one text at a time, as in the sample."""
    method, place = speculation("sagemaker-tgi", served, VERSION)
    heads = method == "medusa"
    environment = tgi.environment(options, served, method)
    environment["SM_NUM_GPUS"] = environment.pop("NUM_SHARD")
    if heads:
        environment["MAX_BATCH_SIZE"] = "1"
    uploads = (("model", "base-model"), (place, ""))
    return Bundle(
        image=options.image or f"{REPOSITORY.format(region=options.region)}:{TAG}",
        port=8080,
        health="/ping",
        api="openai",
        name=options.name or served.name,
        model=options.name or served.name,
        needs=("model", *([place] if place else [])),
        sagemaker=SageMaker(
            uploads=uploads if heads else (("model", ""),),
            environment={**environment, "HF_MODEL_ID": MODEL},
            base=f"{MODEL}/base-model" if heads else "",
        ),
        limits=LIMITS,
        source="text-generation-inference 3.3.7 sagemaker-entrypoint.sh; sagemaker-python-sdk huggingface-llm.json",
    )


LIMITS = (
    "With Medusa heads it answers one text at a time (MAX_BATCH_SIZE 1), as in the published sample.",
    "The account needs a role that may read the bucket, and a quota for the instance type.",
)
