"""What a child may see of this process's environment: what a worker needs, by name, and no credential."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""No hub, and nothing sent home."""
NO_REPOSITORY = {"GIT_DIR": os.devnull}
"""git finds none: a library that lies below somebody's repository would write that one's commit into what it makes."""

_NAME = re.compile(
    r"""
      PATH | HOME | USER | LOGNAME | SHELL | LANG | LANGUAGE | TZ | TERM | COLUMNS | NO_COLOR | TMPDIR | TMP | TEMP
    | VIRTUAL_ENV | SOURCE_DATE_EPOCH | CC | CXX | CPP | CFLAGS | CXXFLAGS | CPPFLAGS | LDFLAGS | MAKEFLAGS | MAX_JOBS
    | CPATH | C_INCLUDE_PATH | CPLUS_INCLUDE_PATH | LIBRARY_PATH | GLIBC_TUNABLES | HUGGINGFACE_HUB_CACHE
    | SSL_CERT_FILE | SSL_CERT_DIR | REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE
    | (?i: (HTTP | HTTPS | ALL | NO) _PROXY)
    """,
    re.VERBOSE,
)
_PREFIX = re.compile(
    r"""
      OPTIKIT_ | PYTHON | XDG_ | LC_ | LD_ | DYLD_ | MALLOC_
    | OMP_ | KMP_ | GOMP_ | MKL_ | OPENBLAS_ | BLIS_ | NUMEXPR_ | VECLIB_ | DNNL_ | ONEDNN_ | ATEN_
    | TORCH (?!ELASTIC_)  # what torchrun tells its processes: a child is none of them
    | PYTORCH_ | TRITON_ | NCCL_ | GLOO_ | CUDA | CUDNN_ | CUBLAS_ | NVIDIA_ | TENSORRT_ | TRTLLM_ | TLLM_
    | NEURON_ | XLA_ | HIP_ | HSA_ | ROCM_ | ROCR_ | OPENVINO_ | OV_ | ORT_ | VLLM_ | BNB_
    | HF_ | TRANSFORMERS_ | TOKENIZERS_ | SAFETENSORS_
    """,
    re.VERBOSE,
)
_CREDENTIAL = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTHORIZATION|APIKEY|NETRC"
    r"|(^|_)(PASS|PWD|AUTH|KEYS?|CREDS?|COOKIE|PRIVATE|PAT|DSN)(_|$)"
)
"""What a name with one of these prefixes must not say."""
_USERINFO = re.compile(r"(?<![/\w.+-])[A-Za-z][\w.+-]*://\S*@")
"""An address that holds a user's name or password. Directories on PATH may have `//` and `@`, but no scheme."""


def kept(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of `environ`, by default this process's, that a child may see.

    >>> kept({"PATH": "/bin", "HF_HOME": "/h", "HF_TOKEN": "x", "DATABASE_URL": "y", "https_proxy": "http://me:z@h"})
    {'PATH': '/bin', 'HF_HOME': '/h'}
    """
    found = os.environ if environ is None else environ
    return {name: value for name, value in found.items() if _needed(name) and not _holds_user(name, value)}


def threads(count: int) -> dict[str, str]:
    """Return the variables that tell numerical libraries how many threads to take."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def _needed(name: str) -> bool:
    return bool(_NAME.fullmatch(name) or (_PREFIX.match(name) and not _CREDENTIAL.search(name.upper())))


def _holds_user(name: str, value: str) -> bool:
    """Return whether a value names a user in an address; that of a proxy may lack its scheme."""
    return bool(_USERINFO.search(value)) or (name.upper().endswith("_PROXY") and "@" in value)
