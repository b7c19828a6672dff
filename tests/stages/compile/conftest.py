"""What tests of emitted folders share."""

from __future__ import annotations

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
