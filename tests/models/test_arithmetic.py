"""Values that a model can't compute with, each refused by its name; the names, against transformers' own."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit.errors import OptikitError, RecipeError
from optikit.models import architectures, arithmetic, expected
from optikit.models.reader import read

NAN, INFINITE = float("nan"), float("inf")


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"rms_norm_eps": NAN}, "rms_norm_eps is nan; a finite number is wanted"),
    "infinite": ({"rms_norm_eps": INFINITE}, "rms_norm_eps is inf"),
    "NaN deep in the file": ({"note": {"a": [1, {"b": NAN}]}}, "note.a.b is nan"),
    "no eps": ({"rms_norm_eps": 0}, "a number above 0 is wanted"),
    "an eps in quotes": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; a number above 0"),
    "an eps that is all": ({"rms_norm_eps": 1e5}, "a number below 1 is wanted"),
    "quoted false": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false is wanted"),
    "a bias of one": ({"attention_bias": 1}, "attention_bias is 1; true or false"),
    "a function": ({"hidden_act": "__import__('os')"}, "the name of an activation"),
    "functions": ({"hidden_act": ["silu"]}, "the name of an activation"),
    "a theta of 0": (rope(rope_theta=0), "rope_parameters.rope_theta is 0; a number above 0"),
    "a theta in quotes": (rope(rope_theta="x"), "rope_parameters.rope_theta is 'x'"),
    "an old theta": ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    "a list": ({"rope_parameters": [1, 2]}, "rope_parameters is [1, 2]; a mapping is wanted"),
    "an old list": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; a mapping is wanted"),
    "an unknown type": (rope(rope_type="evil"), "rope_parameters.rope_type is 'evil'; one of default, linear"),
    "no type": (rope(rope_type=None), "rope_parameters.rope_type is None"),
    "a type of types": (rope(rope_type=["yarn"]), "rope_parameters.rope_type is ['yarn']"),
    "no factor": (rope(rope_type="linear"), "rope_parameters.factor is None; what rope_type linear is computed with"),
    "no frequency": (rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0), "rope_parameters.high_freq_factor"),
    "a true factor": (rope(rope_type="linear", factor=True), "rope_parameters.factor is True"),
    "a negative beta": (rope(rope_type="yarn", factor=2.0, beta_fast=-1), "rope_parameters.beta_fast is -1"),
    "few factors": (rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0] * 8), "a list of 8 numbers"),
    "no long factors": (rope(rope_type="longrope", short_factor=[1.0] * 8), "rope_parameters.long_factor is None"),
    "a share of a head": (rope(partial_rotary_factor=-1), "rope_parameters.partial_rotary_factor is -1"),
    "few kinds of attention": ({"layer_types": ["full_attention"]}, "a list of 2 kinds of attention"),
}
RIGHT: dict[str, dict[str, Any]] = {
    "null": {"rope_scaling": None, "sliding_window": None, "attention_bias": None},
    "linear": rope(rope_type="linear", factor=4),
    "older words": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 500000},
    "yarn": rope(rope_type="yarn", factor=4.0, attention_factor=None, truncate=False),
    "longrope": rope(rope_type="longrope", short_factor=[1] * 8, long_factor=[2.5] * 8, factor=None),
    "half of a head": rope(partial_rotary_factor=0.5),
    "kinds of attention": {"layer_types": ["full_attention"] * 2},
    "another function": {"hidden_act": "relu"},
}


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model", dirs_exist_ok=True))


def write(directory: Path, values: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("values", "told"), WRONG.values(), ids=WRONG)
def test_a_value_that_cannot_be_meant_is_refused_by_name(copy: Path, values: dict[str, Any], told: str) -> None:
    write(copy, values)
    with pytest.raises(RecipeError) as caught:
        read(copy)
    assert told in caught.value.message


@pytest.mark.parametrize("values", RIGHT.values(), ids=RIGHT)
def test_what_models_have_is_accepted(copy: Path, values: dict[str, Any]) -> None:
    write(copy, values)
    read(copy)


def test_names_are_those_of_transformers() -> None:
    from transformers import AutoConfig
    from transformers.activations import ACT2CLS
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ACT2CLS) == arithmetic.ACTIVATIONS
    assert {*ROPE_INIT_FUNCTIONS, "default", "su"} == arithmetic.ROPES.keys()
    for model_type in architectures.names():
        defaults = AutoConfig.for_model(model_type).to_dict()
        truths = {key for key, value in defaults.items() if type(value) is bool and expected.looks_arithmetic(key)}
        assert {key for key in truths if not key.startswith("summary_")} <= arithmetic.TRUTHS  # of a classifier's head
        assert not {key for key in truths if arithmetic.POSITIVE.search(key)}


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)
KEYS = ["rope_parameters", "rope_scaling", "rms_norm_eps", "layer_types", "hidden_act", "partial_rotary_factor"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(KEYS),
    value=VALUES,
    parts=st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "short_factor", "full_attention"]), VALUES),
)
def test_whatever_a_value_is_the_error_has_a_name(
    tiny_llama: Path, copy: Path, key: str, value: Any, parts: dict[str, Any]
) -> None:
    shutil.copy(tiny_llama / "config.json", copy)
    write(copy, {"rope_scaling": parts, key: value})
    with contextlib.suppress(OptikitError):
        read(copy)
