#!/bin/sh
# The one command: installs what is missing, checks this machine, compiles, decodes 8 tokens, writes result.json.
# Run it again after an interruption: what is finished stays.
set -eu
cd "$(dirname "$0")"
[ ! -d env ] || . env/bin/activate
python3 check.py packages 2> /dev/null || {
  python3 -m venv env
  . env/bin/activate
  pip install --quiet -r requirements.txt
}
python3 check.py
sh compile.sh
