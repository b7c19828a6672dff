"""Exit codes are a public contract: unique, complete, and able to cross a process border."""

from __future__ import annotations

import inspect

from optikit import errors
from optikit.errors import BY_CODE, Exit, OptikitError


def classes() -> list[type[OptikitError]]:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, OptikitError)]
    return sorted(found, key=lambda c: c.code)


def test_no_two_classes_share_a_code() -> None:
    codes = [c.code for c in classes()]
    assert len(codes) == len(set(codes))


def test_every_class_can_be_rebuilt_from_its_code() -> None:
    assert {BY_CODE[c.code] for c in classes()} == set(classes())


def test_every_code_of_the_contract_has_a_name() -> None:
    contract = {0, 1, 2, 10, 11, 65, 66, 69, 70, 73, 74, 75, 76, 77, 124, 130, 137, 143}
    assert {int(code) for code in Exit} == contract
