"""Run by a python that has compressed-tensors: `python compressed_tensors_reads.py INPUTS OUT SOURCE DIRECTORY …`.

Of each directory it parses config.json by the library's own classes, lets its compressor turn every packed linear into
floats, and writes those in float32 under the names of their weights, to DIRECTORY.safetensors beside it. Of floats
it also packs the source's weights, on the scales that are there, and writes that with scales of its own to
DIRECTORY.packed.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
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


def packed(linear, tensors, source, compressor, scheme):
    """Return the codes of a linear, and the scales that span its largest weights, as the library makes them."""
    weight = source[f"{linear}.weight"].float()
    scales, common = tensors["weight_scale"], tensors.get("weight_global_scale")
    floats = compressor._decompress_scale(scales, torch.float32)
    told = {"weight": weight, "weight_scale": floats} | ({} if common is None else {"weight_global_scale": common})
    groups = weight.unflatten(-1, (scales.shape[-1], -1))
    spanning, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, common)
    return {
        f"{linear}.weight_packed": compressor.compress(told, scheme)["weight_packed"].contiguous(),
        f"{linear}.weight_scale": compressor._compress_scale(spanning, scheme.weights).view(torch.uint8).contiguous(),
    }


def packed_fp8(linear, tensors, source, compressor, scheme):
    """Return the codes of a linear on the scales that are there, and the scales that span its largest weights."""
    weight = source[f"{linear}.weight"]
    told = {"weight": weight.float(), "weight_scale": tensors["weight_scale"]}
    spanning, _ = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), scheme.weights)
    codes = compressor.compress(told, scheme)["weight"]
    return {f"{linear}.weight": codes.view(torch.uint8), f"{linear}.weight_scale": spanning.view(torch.uint8)}


def main(source, directory):
    settings = told(json.loads((Path(directory) / "config.json").read_text())["quantization_config"])
    config = QuantizationConfig.model_validate(settings)
    [scheme] = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    state = load_file(Path(directory) / "model.safetensors")
    found, again = {}, {}
    dense = load_file(Path(source) / "model.safetensors")
    for name in state:
        linear, _, suffix = name.rpartition(".")
        if suffix not in FIRST or (suffix == "weight_scale" and f"{linear}.weight_packed" in state):
            continue
        tensors = {
            key.removeprefix(f"{linear}."): tensor for key, tensor in state.items() if key.startswith(f"{linear}.")
        }
        if "weight_scale_inv" in tensors:
            tensors["weight_scale"] = tensors.pop("weight_scale_inv")
        if "fp4" in config.format:
            again |= packed(linear, tensors, dense, compressor, scheme)
        else:
            tensors["weight_scale"] = tensors["weight_scale"].float()
        if settings["format"] == "float-quantized" and scheme.weights.strategy == "channel":
            again |= packed_fp8(linear, tensors, dense, compressor, scheme)
        weight = compressor.decompress(tensors, scheme)["weight"]
        assert weight.dtype == (torch.bfloat16 if "fp4" in config.format else torch.float32), weight.dtype
        found[f"{linear}.weight"] = weight.contiguous()
    save_file(found, f"{directory}.safetensors")
    save_file(again, f"{directory}.packed.safetensors")


def round_tokens(inputs, out):
    """Write inputs (tokens, channels) float32 as an FP8 server sees them: each token on a scale of its own."""
    args = QuantizationArgs(**FP8, strategy="token", dynamic=True)
    inputs = load_file(inputs)["inputs"]
    scales, zeros = calculate_qparams(inputs.amin(-1, keepdim=True), inputs.amax(-1, keepdim=True), args)
    save_file({"inputs": fake_quantize(inputs, scales, zeros, args)}, out)


if __name__ == "__main__":
    round_tokens(*sys.argv[1:3])
    for source, directory in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
        main(source, directory)
