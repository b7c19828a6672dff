"""llm-compressor's GPTQ, run by its own environment's python: `python peers_llmcompressor.py REQUEST.json`.

Reads {model, tokens (a .npy of windows × length), group_size, dest}; writes `dest/dequantized.safetensors` (dense
float32 weights that the quantized ones stand for) and prints {"seconds": …, "versions": …} as its last line.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

request = json.loads(Path(sys.argv[1]).read_text())
tokens = np.load(request["tokens"])
torch.set_num_threads(request["threads"])
started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=request["group_size"])
recipe = GPTQModifier(
    config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
)
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
oneshot(
    model=model,
    dataset=rows,
    recipe=recipe,
    max_seq_length=tokens.shape[1],
    num_calibration_samples=len(tokens),
    shuffle_calibration_samples=False,
)
seconds = time.monotonic() - started

dense = {}
for name, module in model.named_modules():
    scale = getattr(module, "weight_scale", None)
    if scale is None:
        continue
    # The weights hold the rounded values already; rounding them again to the grid is idempotent and makes that certain.
    weight, scale = module.weight.data.float(), scale.data.float()
    groups = weight.unflatten(1, (scale.shape[1], -1))
    rounded = (groups / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
    dense[f"{name}.weight"] = rounded.flatten(1).contiguous()
dest = Path(request["dest"])
dest.mkdir(parents=True, exist_ok=True)
save_file(dense, dest / "dequantized.safetensors")
names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in names}}))
