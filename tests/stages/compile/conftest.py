"""What tests of emitted folders share."""

from __future__ import annotations

import shutil

import pytest

from optikit import targets
from optikit.models.reader import read


@pytest.fixture(scope="module")
def facts(tiny_llama):
    return read(tiny_llama)


def target_row(name):
    target = targets.find(name)
    assert target is not None
    return target


def tampered(source, dest, tensor, change):
    """Copy a compiled directory and change one tensor in its data file."""
    from optikit.formats.onnx_graph import OnnxGraph

    shutil.copytree(source, dest)
    graph = OnnxGraph(dest / "model.onnx")
    place = {entry.key: entry.value for entry in graph.tensors[tensor].external_data}
    values = graph.read(tensor).copy()
    change(values)
    with (dest / "model.onnx.data").open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(values.tobytes())
    return dest
