"""Run by auto-gptq's own python: `python autogptq_decodes.py MODEL COUNT TOKEN…` prints the tokens it decodes, as JSON.

Greedy and without a cache, so that the tokens depend on the loader and the kernel alone.
"""

import json
import sys

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file

directory, count, *prompt = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(
    directory,
    device="cpu",
    use_safetensors=True,
    disable_exllama=True,
    disable_exllamav2=True,
    inject_fused_attention=False,
    inject_fused_mlp=False,
    torch_dtype=torch.float32,
)
# Its loader leaves tied embeddings as they were allocated (accelerate 1.15): only the packed linears are its own work.
stored = load_file(f"{directory}/model.safetensors")["model.embed_tokens.weight"]
model.model.get_input_embeddings().weight.data.copy_(stored)
tokens = [int(token) for token in prompt]
with torch.no_grad():
    for _ in range(int(count)):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
print(json.dumps(tokens[len(prompt) :]))
