#!/usr/bin/env bash
# Everything that one GPU can prove, in less than 8 minutes: tests/cuda/run.sh [DIRECTORY]
#
#   DEVICE=cpu    the same with small shapes on the processor, to see that the script is right
#   SECONDS_MAX   all of it (460); sections that find no time left are named in the result
#   PYTHON        interpreter (python3) that has torch, transformers, tokenizers, safetensors, onnxruntime, onnx
#
# DIRECTORY (cuda-results) gets cuda.json, whose fields tests/cuda/suite.py describes, and table.txt. Nothing is fetched.
# Packages that the interpreter lacks are taken from wheels in .whl/, where there are some (pydantic, pydantic-core and
# annotated-types are what optikit needs beside the above).
set -u
cd "$(dirname "$0")/../.." || exit 2
out=${1:-cuda-results}
python=${PYTHON:-python3}
if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 2
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
[ "${DEVICE:-cuda}" = cpu ] && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # small shapes
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m tests.cuda.suite "$out" --device "${DEVICE:-cuda}" --seconds "${SECONDS_MAX:-460}"
