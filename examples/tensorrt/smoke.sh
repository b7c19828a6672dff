#!/bin/sh
# Waits for the server and asks it for 8 tokens.
set -eu
URL="http://localhost:${PORT:-8000}"
i=0
until curl -sf "$URL/health" > /dev/null; do
  i=$((i + 1))
  [ "$i" -lt 300 ] || { echo "no server at $URL after 10 minutes" >&2; exit 70; }
  [ -z "${SERVER:-}" ] || kill -0 "$SERVER" 2> /dev/null || { echo "the server ended: server.log" >&2; exit 70; }
  sleep 2
done
curl -sf "$URL/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "model", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
