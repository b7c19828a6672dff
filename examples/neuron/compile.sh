#!/bin/sh
# Compiles for inf2 with optimum-neuron, then decodes 8 tokens if a device is here.
set -eu
cd "$(dirname "$0")"
export NEURON_COMPILE_CACHE_URL="${NEURON_COMPILE_CACHE_URL:-/var/tmp/neuron-compile-cache}"
python3 job.py prepare "${MODEL:-../../model}"
OUT="compiled-$(python3 job.py key)"
export NEURON_PLATFORM_TARGET_OVERRIDE=trn1
if [ ! -f "$OUT/result.json" ]; then
rm -rf "$OUT"
optimum-cli export neuron \
  --model model \
  --task text-generation \
  --instance_type inf2 \
  --batch_size 1 \
  --sequence_length 2048 \
  --tensor_parallel_size 1 \
  --torch_dtype bfloat16 \
  "$OUT"
python3 job.py result "$OUT"
fi
if [ -e /dev/neuron0 ]; then python3 job.py smoke "$OUT"; fi
echo "$OUT"
