#!/bin/sh
# Wait until the server is ready, then ask for a few tokens. sh check.sh [URL] [SECONDS]: exit code 0 if they come.
set -eu
url=${1:-http://127.0.0.1:8000}
end=$(( $(date +%s) + ${2:-1200} ))
until curl -fsS -o /dev/null "$url/health" 2> /dev/null; do
  if [ "$(date +%s)" -ge "$end" ]; then echo "$url/health doesn't answer" >&2; exit 1; fi
  sleep 2
done
curl -fsS "$url/v1/completions" -H 'Content-Type: application/json' -d '{"model": "smollm2-cpu", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
echo
