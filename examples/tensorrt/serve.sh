#!/bin/sh
# Serves ../../model (or $MODEL) with TensorRT-LLM 1.3.0rc27 and an OpenAI-compatible API.
set -eu
cd "$(dirname "$0")"
MODEL="${MODEL:-../../model}"
[ -f "$MODEL/config.json" ] || { echo "no model in $MODEL: set MODEL to what optikit wrote" >&2; exit 66; }
for file in "$MODEL"/*; do
  name=$(basename "$file")
  [ -f "model/$name" ] || [ "$name" = artifact.json ] || ln -sf "$(realpath --relative-to=model "$file")" "model/$name"
done
exec trtllm-serve model --host 0.0.0.0 --port "${PORT:-8000}" --tp_size 1 --max_batch_size 8 --max_num_tokens 2048 --max_seq_len 4096 --config serve.yaml
