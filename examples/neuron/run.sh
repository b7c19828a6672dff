#!/bin/sh
# The one command: installs what is missing, checks this machine, compiles, decodes 8 tokens, writes result.json.
# Run it again after an interruption: what is finished stays.
set -eu
cd "$(dirname "$0")"
[ ! -f env/bin/activate ] || . env/bin/activate
python3 check.py packages 2> /dev/null || {
  python3 check.py before
  python=python3
  for each in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if "$each" check.py python 2> /dev/null; then python=$each; break; fi
  done
  "$python" check.py python
  "$python" -m venv env
  . env/bin/activate
  pip install --quiet -r requirements.txt
}
python3 check.py
sh compile.sh
