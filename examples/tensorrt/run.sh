#!/bin/sh
# The one command: checks this machine, starts the server, decodes 8 tokens, stops it, writes result.json.
# Run it again after an interruption: what is finished stays.
set -eu
cd "$(dirname "$0")"
python3 check.py
if command -v trtllm-serve > /dev/null; then
sh serve.sh > server.log 2>&1 &
else
docker build -q -t trtllm-model . > /dev/null
docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
  -p "${PORT:-8000}:8000" -v "$(cd ../.. && pwd):/out" trtllm-model > server.log 2>&1 &
fi
SERVER=$! ; export SERVER
trap 'kill "$SERVER" 2> /dev/null || true' EXIT
sh smoke.sh > smoke.log
cat smoke.log
python3 check.py record
