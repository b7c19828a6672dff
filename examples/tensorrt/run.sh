#!/bin/sh
# The one command: checks this machine, starts the server, decodes 8 tokens, stops it, writes result.json.
# Run it again after an interruption.
set -eu
cd "$(dirname "$0")"
python3 check.py
if command -v trtllm-serve > /dev/null; then
sh serve.sh > server.log 2>&1 &
else
echo "no trtllm-serve here: in NVIDIA's container, which is pulled the first time" >&2
docker build -q -t trtllm-model . > /dev/null
docker run --rm --init --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
  -p "${PORT:-8000}:8000" -v "$(cd ../.. && pwd):/out" trtllm-model > server.log 2>&1 &
fi
SERVER=$! ; export SERVER
sh smoke.sh > smoke.log &
ASKED=$!
trap 'kill "$SERVER" "$ASKED" 2> /dev/null || true' EXIT
trap 'exit 130' INT ; trap 'exit 143' TERM HUP
wait "$ASKED"
cat smoke.log
python3 check.py record
