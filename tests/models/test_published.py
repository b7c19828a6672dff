"""config.json of models that people really have, with all that is in them: planned, or refused by the key that is odd.

published.json: settings as models of these families are published with, but for what only names and documents, with the
billions of weights that their cards tell (of a wrapper, those of its language model), or the key that can't be obeyed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optikit.errors import OptikitError
from optikit.models import architectures, language_part
from optikit.models.reader import read

MODELS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_a_published_configuration_is_read_whole(name: str, tmp_path: Path) -> None:
    told = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(told["config"]))
    if "refused" in told:
        with pytest.raises(OptikitError, match=told["refused"]):
            read(tmp_path, promised=True)
        return
    facts = read(tmp_path, promised=True)
    assert facts.parameters / 1e9 == pytest.approx(told["billions"], abs=0.005)


def test_most_families_are_among_them() -> None:
    settings = [language_part.settings_of(told["config"]) for told in MODELS.values()]
    named = {str(each.get("model_type")) for each in settings}
    assert set(architectures.names()) - named <= {"ministral", "ministral3"}


def test_what_a_wrapper_leaves_out_is_what_transformers_means() -> None:
    """Its language model's settings, where they aren't told, are the defaults of transformers' class."""
    from transformers import AutoConfig

    for row in architectures.rows().values():
        if row.inside:
            config = AutoConfig.for_model(row.model_type)
            assert {key: getattr(config, key) for key in row.inside} == dict(row.inside)


def test_a_family_that_nothing_is_known_of_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k2", "architectures": ["X"]}))
    with pytest.raises(OptikitError, match=r"model_type 'kimi_k2' isn't known here.*weights aren't there"):
        read(tmp_path, promised=True)
