#!/bin/sh
# Serves the compiled model with an OpenAI-compatible API.
set -eu
cd "$(dirname "$0")"
[ ! -f env/bin/activate ] || . env/bin/activate
export NEURON_COMPILE_CACHE_URL="${NEURON_COMPILE_CACHE_URL:-/var/tmp/neuron-compile-cache}"
export NEURON_RT_VISIBLE_CORES="${NEURON_RT_VISIBLE_CORES:-0}"  # of the model, and of what drafts for it
python3 job.py prepare "${MODEL:-../../model}"
OUT="compiled-$(python3 job.py key)"
exec optimum-cli neuron serve \
  --model "$OUT" \
  --served_model_name model \
  --batch_size 1 \
  --sequence_length 2048 \
  --tensor_parallel_size 1 \
  --port "${PORT:-8080}"
