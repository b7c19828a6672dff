#!/bin/sh
# Wait until the server is ready, then ask for a few tokens. sh check.sh [URL] [SECONDS]: exit code 0 if they come.
set -eu
url=${1:-http://127.0.0.1:8000}
end=$(( $(date +%s) + ${2:-1200} ))
until curl -fsS -o /dev/null "$url/v2/health/ready" 2> /dev/null; do
  if [ "$(date +%s)" -ge "$end" ]; then echo "$url/v2/health/ready doesn't answer" >&2; exit 1; fi
  sleep 2
done
curl -fsS "$url/v3/completions" -H 'Content-Type: application/json' -d '{"model": "smollm2-openvino", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
echo
