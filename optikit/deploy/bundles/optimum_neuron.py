"""optimum-neuron's vLLM server: the same start as `vllm_neuron`, in Hugging Face's container."""

from __future__ import annotations

from optikit.deploy.bundles.vllm_neuron import CHECKED, bundle

__all__ = ["CHECKED", "SUMMARY", "bundle"]

SUMMARY = "vLLM with optimum-neuron"
