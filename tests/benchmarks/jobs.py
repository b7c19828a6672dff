"""Folders for four schedulers, as `optikit submit` writes them: examples/jobs and its table.

    python tests/benchmarks/jobs.py --store HOME

The recipe is `recipes/quickstart.yaml`, whose sources a package index has; each folder's files are checked by the
scheduler's own schema or parser in tests/deploy/jobs, which the table names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from optikit.deploy import jobs
from tests.benchmarks.record import commit

ROOT = Path(__file__).parents[2]
OUT = ROOT / "examples" / "jobs"
PAGE = """\
# Jobs

`recipes/quickstart.yaml` as a folder for four schedulers, commit {commit}:

```sh
{commands}
```

| folder | what | checked by |
|---|---|---|
{rows}
`pytest tests/deploy/jobs` (SkyPilot's with `-m slow`) repeats these checks. The pod's own command line was run on one
machine, with the recipe and a volume at the places where the manifest mounts them: {run}.

No cluster was reached: {unreached}.
"""


def main() -> None:
    """Write the folders and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="directory of the store")
    parser.add_argument("--run", default="not run", help="what running the pod's command line gave, in a sentence")
    args = parser.parse_args()
    commands, rows = [], ""
    for name in jobs.SCHEDULERS:
        words = ["submit", "recipes/quickstart.yaml", "--to", name, "--out", f"examples/jobs/{name}", "--cpus", "2"]
        shutil.rmtree(OUT / name, ignore_errors=True)
        environment = {**os.environ, "OPTIKIT_HOME": str(args.store.resolve())}
        subprocess.run([sys.executable, "-m", "optikit", *words], cwd=ROOT, env=environment, check=True)
        commands.append(f"optikit {' '.join(words)}")
        module = jobs.load(name)
        rows += f"| [{name}]({name}/README.md) | {module.SUMMARY} | {module.CHECKED} |\n"
    unreached = "scheduling, preemption by a cluster, mounts and images are as their documentation says"
    text = PAGE.format(commit=commit(), commands="\n".join(commands), rows=rows, run=args.run, unreached=unreached)
    (OUT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
