"""Run by a python that has compressed-tensors: `python compressed_tensors_reads.py DIRECTORY …`.

Of each directory it parses config.json by the library's own classes, lets its compressor turn every packed linear into
floats, and writes those in float32 under the names of their weights, to DIRECTORY.safetensors beside it.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

FIRST = ("weight_packed", "weight_scale", "weight_scale_inv")
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
BLOCK = {**FP8, "strategy": "block", "block_structure": [128, 128]}


def told(settings):
    """Return settings of compressed-tensors; those of ModelOpt and DeepSeek in its words."""
    if settings["quant_method"] == "compressed-tensors":
        return settings
    weights = BLOCK if settings["quant_method"] == "fp8" else {**FP8, "strategy": "tensor"}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {**FP8, "strategy": "token", "dynamic": True},
        }
    }
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def main(directory, out):
    settings = told(json.loads((Path(directory) / "config.json").read_text())["quantization_config"])
    config = QuantizationConfig.model_validate(settings)
    [scheme] = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    state = load_file(Path(directory) / "model.safetensors")
    found = {}
    for name in state:
        linear, _, suffix = name.rpartition(".")
        if suffix not in FIRST or (suffix == "weight_scale" and f"{linear}.weight_packed" in state):
            continue
        tensors = {
            key.removeprefix(f"{linear}."): tensor for key, tensor in state.items() if key.startswith(f"{linear}.")
        }
        if "weight_scale_inv" in tensors:
            tensors["weight_scale"] = tensors.pop("weight_scale_inv")
        tensors["weight_scale"] = tensors["weight_scale"].float()
        weight = compressor.decompress(tensors, scheme)["weight"]
        assert weight.dtype == torch.float32, weight.dtype
        found[f"{linear}.weight"] = weight.contiguous()
    save_file(found, out)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each, f"{each}.safetensors")
