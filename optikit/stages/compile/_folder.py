"""What every emitted folder has: files that know their sha256, a check of the device, one command, and a way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit.stages.compile import _folder_check

if TYPE_CHECKING:
    from optikit.targets import Target

CHECK = "check.json"
RUN = "run.sh"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a folder wants of the machine that it is for.

    Attributes:
        kind: Of device.
        devices: Pattern of its device files.
        device_count: How many there have to be.
        python: First version that runs it, and first that doesn't.
        packages: Distribution → regular expression of its version; `a|b` is either.
        versions: More distributions whose versions the result names.
        tools: Programs on PATH; `a|b` is either.
        disk_bytes: Free disk.
        host_bytes: Memory of the machine itself.
    """

    kind: Literal["neuron", "cuda"]
    devices: str
    device_count: int = 1
    python: tuple[tuple[int, int], tuple[int, int]] = ((3, 9), (3, 15))
    packages: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    disk_bytes: int = 0
    host_bytes: int = 0


def write(dest: Path, files: Mapping[str, str], wanted: Wanted, target: Target) -> list[str]:
    """Write text files, check.py and check.json to a folder; return the names of all files in it."""
    ready = {**files, "check.py": Path(_folder_check.__file__).read_text(encoding="utf-8")}
    for name, text in ready.items():
        path = dest / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    digests = {name: sha256(text.encode()).hexdigest() for name, text in sorted(ready.items())}
    (dest / CHECK).write_text(json.dumps(_as_json(wanted, target) | {"files": digests}, indent=1) + "\n", "utf-8")
    return sorted(str(path.relative_to(dest)) for path in dest.rglob("*") if path.is_file())


def _as_json(wanted: Wanted, target: Target) -> dict[str, Any]:
    from dataclasses import asdict

    return {"target": target.name, **asdict(wanted)}


ACTIVATE = "[ ! -f env/bin/activate ] || . env/bin/activate\n"
"""Of every script: what run.sh has installed, also for whoever starts it from another shell."""
ENVIRONMENT = (
    ACTIVATE
    + """\
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
"""
)
"""Of run.sh: installs what is missing, into an environment of its own, then checks everything."""
HEAD = """\
#!/bin/sh
# The one command: {what}
# Run it again after an interruption{stays}.
set -eu
cd "$(dirname "$0")"
"""
SERVED = """\
SERVER=$! ; export SERVER
sh smoke.sh > smoke.log &
ASKED=$!
trap 'kill "$SERVER" "$ASKED" 2> /dev/null || true' EXIT
trap 'exit 130' INT ; trap 'exit 143' TERM HUP
wait "$ASKED"
cat smoke.log
python3 check.py record
"""
"""Of run.sh, after a server was started behind it: asks it for 8 tokens, stops it, writes result.json. A shell heeds
a signal only between two commands, or while it waits for what runs behind it; and of that it ends nothing by itself."""
SMOKE = """\
#!/bin/sh
# Waits for the server and asks it for 8 tokens.
set -eu
URL="http://localhost:${{PORT:-{port}}}"
i=0
until curl -sf "$URL/health" > /dev/null; do
  i=$((i + 1))
  [ "$i" -lt {tries} ] || {{ echo "no server at $URL after {minutes} minutes" >&2; exit 70; }}
  [ -z "${{SERVER:-}}" ] || kill -0 "$SERVER" 2> /dev/null || {{ echo "the server ended: server.log" >&2; exit 70; }}
  sleep 2
done
curl -sf "$URL/v1/completions" -H 'Content-Type: application/json' \\
  -d '{{"model": "model", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}}'
"""


def begin(what: str) -> str:
    """Return how run.sh begins where something has to be installed: what it does, an environment, the check."""
    return HEAD.format(what=what, stays=": what is finished stays") + ENVIRONMENT


def smoke(port: int, minutes: int) -> str:
    """Return smoke.sh for a server on a port, which may take so long to start."""
    return SMOKE.format(port=port, tries=30 * minutes, minutes=minutes)
