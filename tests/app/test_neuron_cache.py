"""Neuron compile caches are listed as the compiler keys them: in a directory, and in S3 by a stand-in for `aws`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

FILES = {
    "neuronxcc-2.21.33363.0+82129205/MODULE_198775565831884870+d41d8cd9/model.neff": 4096,
    "neuronxcc-2.21.33363.0+82129205/MODULE_198775565831884870+d41d8cd9/compile_flags.json": 20,
    "neuronxcc-2.21.33363.0+82129205/MODULE_198775565831884870+4eb52b03/model.neff": 1000,
    "neuronxcc-2.22.1.0+0a/MODULE_12486829708343293975+d41d8cd9/model.log": 10,
    "neuron/compile_cache/00112233445566778899aabbccddeeff/graph.neff": 7,
    "README.md": 3,
}


def command(*arguments, **environment):
    line = [sys.executable, "-m", "optikit", "cache", "neuron", *arguments]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def cache(tmp_path):
    for name, size in FILES.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return tmp_path / "cache"


def test_graphs_are_told_by_compiler_graph_and_flags(cache):
    done = command("--directory", str(cache), "--json")
    found = json.loads(done.stdout)
    assert found["size_bytes"] == sum(FILES.values()) - FILES["README.md"]
    by_key = {(each["compiler"], each["graph"], each["flags"]): each for each in found["graphs"]}
    assert len(by_key) == 4
    first = by_key["2.21.33363.0+82129205", "198775565831884870", "d41d8cd9"]
    assert (first["size_bytes"], first["compiled"]) == (4116, True)
    assert by_key["2.22.1.0+0a", "12486829708343293975", "d41d8cd9"]["compiled"] is False
    assert by_key["", "00112233445566778899aabbccddeeff", ""]["compiled"] is True
    shown = command("--directory", str(cache)).stdout
    assert "4 graphs" in shown
    assert "no result" in shown


def test_a_bucket_is_listed_as_the_same_graphs(tmp_path):
    lines = "\n".join(f"2026-12-01 10:00:00 {size} pre/{name}" for name, size in FILES.items())
    tool = tmp_path / "aws"
    tool.write_text(f'#!/bin/sh\n[ "$4" = s3://bucket/pre/ ] || exit 1\ncat <<END\n{lines}\nEND\n')
    tool.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = command("--directory", "s3://bucket/pre", "--json", PATH=path)
    assert len(json.loads(done.stdout)["graphs"]) == 4, done.stderr
    assert command("--directory", "s3://bucket/other", PATH=path).returncode == 66


def test_what_is_not_there_is_said(tmp_path):
    done = command("--directory", str(tmp_path / "nowhere"))
    assert (done.returncode, "--directory" in done.stderr) == (66, True)
    done = command("--directory", "s3://bucket/x", PATH=str(tmp_path))
    assert (done.returncode, "aws" in done.stderr) == (69, True)
