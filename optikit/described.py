"""Pydantic models whose fields are described by the strings below them, read when a schema is asked for.

Pydantic's own `use_attribute_docstrings` reads the source of every class when it is defined, which a command that
prints no schema would wait for; so would building a validator for each. Here both are done at first use.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema


class Described(BaseModel):
    """A frozen model without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Put the string below each field into its schema."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name in properties.keys() & (said := docstrings(cls)).keys():
            properties[name].setdefault("description", said[name])
        return schema


@cache
def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return what the strings below a model's fields say, those of its bases included; field → text."""
    said: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, Described) and each is not Described:
            said |= _own(each)
    return said


def _own(model: type[BaseModel]) -> dict[str, str]:
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    said, name = {}, ""
    for line in getattr(defined, "body", ()):
        if name and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            said[name] = inspect.cleandoc(str(line.value.value))
        name = line.target.id if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) else ""
    return said
