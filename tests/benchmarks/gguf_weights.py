"""Read a gguf file: every tensor against the gguf package's own reader, time and memory beside transformers' reading.

    python tests/benchmarks/gguf_weights.py MODEL.gguf --out examples/gguf_weights.md

Each way of reading runs in a process of its own; peak memory is the kernel's count of it. Both write a model directory
in bf16. Tensors are then compared one by one with `GGUFReader` and `gguf.quants.dequantize`, rounded once to the dtype
that was written; nothing of optikit takes part in that but the names of tensors. It is for families whose rows lie in
the file as in the model directory, as Qwen2's do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from record import commit

from optikit import host

BEGINS = "import json, sys, time; from pathlib import Path; start = time.monotonic(); facts = {}\n"
ENDS = (
    "\nfrom optikit.process.memory import peak_mib\npeak = peak_mib()\n"
    "print(json.dumps({'seconds': time.monotonic() - start, 'peak_mib': peak, 'facts': facts}))\n"
)
OURS = (
    "from optikit.stage import Job\nfrom optikit.stages.acquire import gguf\n"
    "source, dest = map(Path, sys.argv[1:])\n"
    "facts = gguf.run(gguf.Options(), Job(source=source, dest=dest, scratch=dest))"
)
PEER = (
    "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig\n"
    "source, dest = map(Path, sys.argv[1:])\n"
    "told = dict(gguf_file=source.name, local_files_only=True)\n"
    "model = AutoModelForCausalLM.from_pretrained(\n"
    "    source.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **told)\n"
    "model.save_pretrained(dest)\nAutoTokenizer.from_pretrained(source.parent, **told).save_pretrained(dest)"
)


def read(way: str, source: Path, dest: Path) -> dict[str, Any]:
    """Read a file in one way, in a process of its own; return its seconds, peak memory and facts."""
    dest.mkdir()
    command = [sys.executable, "-c", BEGINS + way + ENDS, str(source), str(dest)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(source: Path, written: Path) -> Counter[str]:
    """Return how many tensors of each type are what the gguf package reads, rounded once.

    Raises:
        SystemExit: One isn't; the message names it.
    """
    import gguf
    from safetensors import safe_open

    from optikit.formats.gguf_weights import GgufWeights

    weights = GgufWeights(source)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    names = {tensor: name for name, tensor in weights.header.tensors.items()}
    found: Counter[str] = Counter()
    with safe_open(written / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensor = theirs[names[weights.places[name].tensor]]
            twice = name == "model.embed_tokens.weight" and "output.weight" in theirs
            if twice and theirs["output.weight"].n_bytes > tensor.n_bytes:
                tensor = theirs["output.weight"]
            mine = file.get_tensor(name)
            if not torch.equal(mine, _dequantized(tensor, mine.dtype).reshape(mine.shape)):
                raise SystemExit(f"{name} isn't what the gguf package reads as {tensor.name}")
            found[tensor.tensor_type.name] += 1
    return found


def _dequantized(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of the package's reader, some rows at a time."""
    from gguf.quants import dequantize

    data = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
    parts = [dequantize(data[at : at + 4096], tensor.tensor_type) for at in range(0, len(data), 4096)]
    return torch.cat([torch.from_numpy(part.copy()).to(dtype) for part in parts])


def main() -> None:
    """Read a file in both ways and write a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="a sentence on how the machine was used meanwhile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = args.file.resolve()
        ours = read(OURS, source, Path(place) / "ours")
        equal = compare(source, Path(place) / "ours")
        peer = read(PEER, source, Path(place) / "peer")
    page = _page(source, ours, peer, equal, args.note)
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


def _page(source: Path, ours: dict[str, Any], peer: dict[str, Any], equal: Counter[str], note: str) -> str:
    facts = ours["facts"]
    here = f"{host.cpu_model()}, {host.threads()} threads, {host.memory_bytes() / 2**30:.0f} GiB"
    versions = host.versions(("gguf", "transformers"))
    types = ", ".join(f"{count} of {name}" for name, count in sorted(equal.items()))
    rows = "\n".join(
        f"| {name} | {run['seconds']:.0f} s | {run['peak_mib']:.0f} MiB |"
        for name, run in (("optikit", ours), (f"transformers {versions['transformers']}", peer))
    )
    size, weights = f"{source.stat().st_size / 2**20:.0f} MiB", f"{facts['parameters'] / 1e6:.0f}M"
    return PAGE.format(
        name=source.name, size=size, weights=weights, commit=commit(), here=here, rows=rows, types=types,
        count=sum(equal.values()), gguf=versions["gguf"], note=f"\n{note}\n" if note else "", **facts,
    )  # fmt: skip


PAGE = """# Reading a gguf file

```sh
python tests/benchmarks/gguf_weights.py {name} --out examples/gguf_weights.md
```

`{name}` ({size}, {weights} weights) as a model directory in {dtype},
with its tokenizer; peak memory of the process, libraries included. Commit {commit}; {here}.

| read by | time | peak memory |
|---|---|---|
{rows}
{note}
All {count} tensors that were written ({types})
are, bit by bit, what gguf {gguf} reads and dequantizes, rounded once. {exact} of them have the file's very values;
of the {rounded} others, which were integer blocks, the one that rounding changed most is
{largest_rounding} of its length apart.
"""


if __name__ == "__main__":
    main()
