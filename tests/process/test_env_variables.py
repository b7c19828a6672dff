"""What a child sees of the environment: everything it needs, and no credential."""

from __future__ import annotations

import os
import sys

from hypothesis import given
from hypothesis import strategies as st

from optikit.process import env_variables, program

NEEDED = {
    "PATH": "/usr/local//bin:/opt/python@3.11/bin",
    "HOME": "/home/me",
    "LANG": "C.UTF-8",
    "LC_ALL": "C",
    "TMPDIR": "/scratch",
    "PYTHONPATH": "/src",
    "OPTIKIT_HOME": "/store",
    "XDG_CACHE_HOME": "/cache",
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "KMP_AFFINITY": "granularity=fine",
    "CUDA_VISIBLE_DEVICES": "0",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NEURON_CC_FLAGS": "--cache_dir=/c",
    "LD_LIBRARY_PATH": "/lib",
    "LD_PRELOAD": "libjemalloc.so",
    "HF_HOME": "/hf",
    "HF_HUB_CACHE": "/hf/hub",
    "TORCH_HOME": "/torch",
    "TORCHINDUCTOR_CACHE_DIR": "/ind",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "https_proxy": "http://proxy:3128",
    "no_proxy": "localhost",
    "SSL_CERT_FILE": "/ca.pem",
}
CREDENTIALS = {
    "HF_TOKEN": "x",
    "HUGGING_FACE_HUB_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_SESSION_TOKEN": "x",
    "DB_PASS": "x",
    "MYSQL_PWD": "x",
    "NPM_AUTH": "x",
    "DATABASE_URL": "postgres://me:x@host/db",
    "REDIS_URL": "redis://:x@host",
    "GOOGLE_APPLICATION_CREDENTIALS": "/x.json",
    "NETRC": "/x",
    "PIP_INDEX_URL": "https://me:x@index/simple",
    "UV_DEFAULT_INDEX": "https://me:x@index/simple",
    "SSH_AUTH_SOCK": "/x",
    "GITHUB_TOKEN": "x",
    "OPENAI_API_KEY": "x",
    "VLLM_API_KEY": "x",
    "KUBECONFIG": "/x",
    "https_proxy": "http://me:x/y@proxy:3128",
    "HTTP_PROXY": "me:x@proxy:3128",
    "HF_ENDPOINT": "https://me:x@hub",
    "PYTHON_DBPASSWORD": "x",
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "0",
    "MASTER_ADDR": "x",
}


def test_what_is_needed_is_kept() -> None:
    assert env_variables.kept(NEEDED) == NEEDED


def test_credentials_are_not() -> None:
    assert env_variables.kept(CREDENTIALS) == {}


def test_a_real_child_sees_none_of_the_canaries(monkeypatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value.replace("x", "canary"))
    done = program.run([sys.executable, "-c", "import os; print(*os.environ.items(), sep='\\n')"])
    assert (done.code, "canary" in done.output) == (0, False)
    assert "'PATH'" in done.output


words = st.sampled_from(["", "HF", "OMP", "CUDA", "PYTHON", "OPTIKIT", "MY", "X1"])
secret = st.sampled_from(
    ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "PWD", "AUTH", "KEY", "API_KEY", "CREDENTIALS", "token", "DSN"]
)
user = st.text(st.characters(categories=["L", "N", "P"], codec="ascii", exclude_characters="@"), min_size=1)


@given(words, secret, words, st.text())
def test_no_name_that_says_credential_passes(before: str, word: str, after: str, value: str) -> None:
    name = "_".join(filter(None, (before, word, after)))
    assert env_variables.kept({name: value}) == {}


@given(st.sampled_from(sorted(NEEDED)), st.sampled_from(["http", "https", "redis", "git+ssh"]), user, user, st.text())
def test_no_address_with_a_user_passes(name: str, scheme: str, who: str, password: str, rest: str) -> None:
    assert env_variables.kept({name: f"{scheme}://{who}:{password}@host/{rest}"}) == {}


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_it_invents_and_changes_nothing(environ: dict[str, str]) -> None:
    assert env_variables.kept(environ).items() <= environ.items()


def test_it_is_this_process_s_by_default() -> None:
    assert env_variables.kept() == env_variables.kept(os.environ)
