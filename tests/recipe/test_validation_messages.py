"""pydantic's errors in plain words, for shapes that no stage has yet."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optikit.problems import Problem
from optikit.recipe.node import Marks
from optikit.recipe.schema import TaskOptions
from optikit.recipe.validation_messages import complaints, schema_at
from optikit.recipe.yaml12 import compose
from optikit.stages.speculate import lookup


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    even: int = Field(default=2, multiple_of=2, gt=0, lt=9)
    names: tuple[Annotated[str, Field(min_length=2)], ...] = Field(default=(), min_length=1, max_length=2)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    damp: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    inner: Inner | None = None
    many: dict[str, Inner] = {}
    code: str = Field(default="a", pattern="^[a-z]$")


def found(text: str, model: type[BaseModel] = Options) -> list[Problem]:
    root = compose(text, "r.yaml").root
    assert root is not None
    data: Any = json.loads(text)
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(text, strict=True)
    assert data
    return list(complaints(caught.value, model, Marks(root)))


SOME, TWO = "at least 1 values", "at most 2 values"
NO_LIST = "damp must be a number, not a list; or: damp can't be a list"
NOT_0 = "damp must be above 0, not 0; or: damp can't be 0"
THREE = f"names must have {TWO}, not 3"
IN_RANGE = "write a number above 0 and below 9"
LONGER = "write more, or remove the key"
ELSEWHERE = "`optikit schema` says what it may be"


@pytest.mark.parametrize(
    ("text", "code", "message", "fix", "column"),
    [
        # the branches of a union are one problem, where the value is; a list is shown by its key
        ('{"damp": []}', "wrong-type", NO_LIST, "write a number", 2),
        ('{"damp": 0}', "out-of-range", NOT_0, "write a number above 0", 10),
        ('{"inner": {"even": 3}}', "out-of-range", "even must be a multiple of 2, not 3", IN_RANGE, 20),
        ('{"many": {"a": {"evn": 3}}}', "unknown-key", "unknown key 'evn'", "did you mean 'even'?", 17),
        ('{"inner": {"names": []}}', "wrong-length", f"names must have {SOME}, not 0", f"write {SOME}", 12),
        ('{"inner": {"names": ["ab", "cd", "ef"]}}', "wrong-length", THREE, f"write {TWO}", 12),
        ('{"inner": {"names": ["ab", "c"]}}', "out-of-range", "names[1] must have at least 2 characters", LONGER, 28),
        ('{"code": "AB"}', "bad-value", "code: String should match pattern '^[a-z]$', not 'AB'", ELSEWHERE, 10),
    ],
)  # fmt: skip
def test_in_plain_words(text: str, code: str, message: str, fix: str, column: int) -> None:
    (problem,) = found(text)
    assert problem.mark is not None
    assert (problem.code, problem.message, problem.fix, problem.mark.column) == (code, message, fix, column)


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        (lookup.Options, "judged", "eval_prompts"),
        (lookup.Options, "judged_part", "eval_part"),
        (lookup.Options, "remember", "datastore_answers"),
        (TaskOptions, "most_tokens", "max_tokens"),
    ],
)
def test_a_key_that_was_renamed_is_told_its_new_name(model: type[BaseModel], old: str, new: str) -> None:
    problems = [problem for problem in found(json.dumps({old: 3}), model) if problem.code == "unknown-key"]
    assert [problem.fix for problem in problems] == [f"it is called {new!r} now"]


def test_every_error_of_a_model_is_its_own_problem() -> None:
    problems = found('{"damp": -1, "code": 3, "x": 1, "y": 2, "inner": {"even": 10, "names": "ab"}}')
    assert len(problems) == 6


def test_schema_at() -> None:
    schema = Options.model_json_schema()
    assert schema_at(schema, ("inner", "even"))["multipleOf"] == 2
    assert schema_at(schema, ("many", "any", "even"))["multipleOf"] == 2
    assert schema_at(schema, ("inner", "names", 1)) == {"minLength": 2, "type": "string"}
    assert schema_at(schema, ("nothing", "here")) == {}
