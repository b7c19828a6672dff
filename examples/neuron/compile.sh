#!/bin/sh
# Compiles for inf2 with optimum-neuron, then decodes 8 tokens if a device is here.
set -eu
cd "$(dirname "$0")"
[ ! -f env/bin/activate ] || . env/bin/activate
export NEURON_COMPILE_CACHE_URL="${NEURON_COMPILE_CACHE_URL:-/var/tmp/neuron-compile-cache}"
export NEURON_RT_VISIBLE_CORES="${NEURON_RT_VISIBLE_CORES:-0}"  # of the model, and of what drafts for it
python3 job.py prepare "${MODEL:-../../model}"
OUT="compiled-$(python3 job.py key)"
export NEURON_PLATFORM_TARGET_OVERRIDE=trn1
if [ ! -f "$OUT/result.json" ]; then
rm -rf "$OUT"
began=$(date +%s)
optimum-cli export neuron \
  --model model \
  --task text-generation \
  --instance_type inf2 \
  --batch_size 1 \
  --sequence_length 2048 \
  --tensor_parallel_size 1 \
  --torch_dtype bfloat16 \
  "$OUT"
python3 job.py result "$OUT" "$(($(date +%s) - began))"
fi
if [ -e /dev/neuron0 ]; then
python3 job.py smoke "$OUT" > smoke.log 2> smoke.err || { cat smoke.log smoke.err >&2; exit 70; }
cat smoke.log
python3 check.py record "$(python3 job.py seconds "$OUT")"
fi
echo "$OUT"
