"""A safe repair makes the messages' own hints, and whatever it does leaves what the author asked for as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit import stages, targets
from optikit.errors import RecipeError
from optikit.problems import Problem, misspelt
from optikit.recipe.load import loads
from optikit.recipe.node import plain
from optikit.recipe.yaml12 import compose
from optikit.rules import foreign_words
from optikit.rules.meaning import differences
from optikit.rules.repair import Repair, repair

TOP = "model: ./m\ntarget: l4\ncalibration: {text: t.txt, samples: 4, length: 64}\n"


def problems(text: str) -> tuple[Problem, ...]:
    """Return what loading a recipe complains about."""
    try:
        loads(text, Path("r.yaml"), known_targets=targets.names())
    except RecipeError as error:
        return error.problems
    return ()


def mended(text: str, **how: Any) -> Repair | None:
    return repair(text, problems(text), problems, **how)


def stage(text: str) -> dict[str, Any]:
    root = compose(text, "r.yaml").root
    assert root is not None
    (only,) = plain(root)["stages"]
    return only


ALONE = {
    "misspelt key": ("quantize: {method: gptq, grop_size: 32}", "quantize: {method: gptq, group_size: 32}"),
    "misspelt method": ("quantize: {method: GPTQ}", "quantize: {method: gptq}"),
    "misspelt verb": ("quantise: {method: gptq}", "quantize: {method: gptq}"),
    "quoted number": ('quantize: {method: gptq, bits: "4"}', "quantize: {method: gptq, bits: 4}"),
    "number with a point": ("speculate: {method: lookup, tokens: 4.0}", "speculate: {method: lookup, tokens: 4}"),
    "YAML 1.1 boolean": ("quantize: {method: gptq, sym: no}", "quantize: {method: gptq, sym: false}"),
    "number that is text": ("speculate: {method: draft, model: 1.20}", 'speculate: {method: draft, model: "1.20"}'),
    "one text for a list": ("prune: {method: wanda, ignore: q_proj}", 'prune: {method: wanda, ignore: ["q_proj"]}'),
    "case of a choice": ("quantize: {method: int8, scheme: W8A8}", "quantize: {method: int8, scheme: w8a8}"),
    "AutoAWQ": (
        "quantize: {method: awq, w_bit: 4, q_group_size: 128, zero_point: true, version: GEMM}",
        "quantize: {method: awq, bits: 4, group_size: 128, sym: false}",
    ),
    "AutoGPTQ": (
        "quantize: {method: gptq, bits: 8, desc_act: false, damp_percent: 0.1}",
        "quantize: {method: gptq, bits: 8, act_order: false, damp: 0.1}",
    ),
    "GPTQ-for-LLaMa": (
        "quantize: {method: gptq, wbits: 8, groupsize: 32}",
        "quantize: {method: gptq, bits: 8, group_size: 32}",
    ),
    "an earlier name of ours": (
        "speculate: {method: lookup, remember: 5}",
        "speculate: {method: lookup, datastore_answers: 5}",
    ),
    "engine called method": ("compile: {method: onnxruntime}", "compile: {engine: onnxruntime}"),
    "method called otherwise": ("quantize: {quant_method: awq}", "quantize: {method: awq}"),
    "method for a verb": ("gptq: {bits: 8}", "quantize: {method: gptq, bits: 8}"),
    "method alone": ("quantize: gptq", "quantize: {method: gptq}"),
    "the same twice": ("quantize: {method: gptq, bits: 8, bits: 8}", "quantize: {method: gptq, bits: 8}"),
    "alias": ("quantize: {method: gptq, grop_size: &g 32, damp: 0.1}", None),
}


@pytest.mark.parametrize(("broken", "right"), ALONE.values(), ids=ALONE)
def test_a_hint_is_made_as_the_message_says_it(broken, right):
    found = mended(f"{TOP}stages:\n  - {broken}\n")
    assert found is not None
    assert found.left == ()
    assert found.lost == ()
    if right is not None:
        assert found.text == f"{TOP}stages:\n  - {right}\n"


BLOCKS = {
    "a line out of line": "stages:\n  - quantize:\n      method: gptq\n     bits: 8\n      sym: true\n",
    "a tab": "stages:\n  - quantize:\n      method: gptq\n\t\tbits: 8\n      sym: true\n",
    "stages as a mapping": "stages:\n  quantize:\n    method: gptq\n    bits: 8\n    sym: true\n",
    "stages as a mapping in braces": "stages: {quantize: {method: gptq, bits: 8, sym: true}}\n",
    "options beside the verb": "stages:\n  - quantize:\n    method: gptq\n    bits: 8\n    sym: true\n",
    "an option beside the verb": "stages:\n  - quantize:\n      method: gptq\n      sym: true\n    bits: 8\n",
}


@pytest.mark.parametrize("broken", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_layout_is_mended_and_line_ends_stay(broken, end):
    found = mended((TOP + broken).replace("\n", end))
    assert found is not None
    assert found.left == ()
    assert stage(found.text) == {"quantize": {"method": "gptq", "bits": 8, "sym": True}}
    assert found.text.count(end) == found.text.count("\n")


@pytest.mark.parametrize(
    "merging", ["{<<: *x, method: gptq}", "\n      <<: *x\n      method: gptq", "{<<: [*x, *x], method: gptq}"]
)
def test_what_a_merge_key_brings_is_written_out(merging):
    text = f"{TOP}stages:\n  - quantize: &x {{method: rtn, bits: 8, sym: false, mse: true}}\n  - quantize: {merging}\n"
    found = mended(text)
    assert found is not None
    assert found.left == ()
    root = compose(found.text, "r.yaml").root
    assert root is not None
    assert plain(root)["stages"][1] == {"quantize": {"method": "gptq", "bits": 8, "sym": False, "mse": True}}


def test_what_a_merge_key_brings_and_nobody_knows_goes():
    text = TOP.replace("calibration: ", "calibration: &c ") + "stages:\n  - quantize: {<<: *c, method: gptq}\n"
    found = mended(text)
    assert found is not None
    assert found.text == text.replace("<<: *c, ", "")


def test_two_verbs_in_one_item_become_two_stages():
    text = f"{TOP}stages:\n  - quantize:\n      method: gptq\n    compile:\n      engine: onnxruntime\n"
    for broken in (text, f"{TOP}stages: [{{quantize: {{method: gptq}}, compile: {{engine: onnxruntime}}}}]\n"):
        found = mended(broken)
        assert found is not None
        assert [list(each) for each in plain(compose(found.text, "r").root)["stages"]] == [["quantize"], ["compile"]]


LOST = {
    "bits that there aren't": ("quantize: {method: gptq, bits: 3}", "bits"),
    "bits twice": ("quantize: {method: gptq, bits: 4, bits: 8}", "bits"),
    "method of another tool": ("quantize: {method: smoothquant, alpha: 0.5}", "method"),
    "a server": ("compile: {engine: vllm}", "compile"),
    "a scheme alone": ("quantize: {scheme: W4A16}", "method"),
    "an unknown key": ("quantize: {method: gptq, colour: red}", "colour"),
    "an unknown word": ("quantize: {method: gptq, version: GEMM}", "version"),
}


@pytest.mark.parametrize(("broken", "lost"), LOST.values(), ids=LOST)
def test_what_would_change_the_meaning_is_unsafe_and_says_so(broken, lost):
    text = f"{TOP}stages:\n  - {broken}\n  - prune: {{method: wanda}}\n"
    assert mended(text) is None
    found = mended(text, unsafe=True)
    assert found is not None
    assert found.left == ()
    assert any(lost in clause for clause in found.lost)


def test_another_target_is_unsafe_where_more_than_its_case_differs():
    text = f"{TOP}stages: []\n"
    assert mended(text.replace("l4", "L4")).text == text
    assert mended(text.replace("l4", "A10")) is None
    assert "a10g" in mended(text.replace("l4", "A10"), unsafe=True).text


def test_a_server_is_called_one():
    (found,) = problems(f"{TOP}stages:\n  - compile: {{engine: vllm}}\n")
    assert found.fix.startswith("vLLM is a server")


def test_safe_hints_are_made_where_others_are_left():
    text = f"{TOP}stages:\n  - quantize: {{method: gptq, grop_size: 32, bits: 3}}\n"
    found = mended(text)
    assert found.text == text.replace("grop", "group")
    assert [problem.message for problem in found.left] == ["bits can't be 3"]


def test_a_hint_that_would_break_the_text_is_left_out():
    text = f"{TOP}stages:\n  - quantize: {{method: gptq, grop_size: 32, group_size: 64, smy: true}}\n"
    found = mended(text)
    assert found.text == text.replace("smy", "sym")
    assert [problem.code for problem in found.left] == ["unknown-key"]


def test_hints_for_another_file_are_not_made():
    text = f"{TOP}stages:\n  - quantize: {{method: gptq, grop_size: 32}}\n"
    assert repair(text, problems(text), problems, file="base.yaml") is None


def test_two_hundred_stages_of_one_kind_take_one_change():
    text = TOP + "stages:\n" + "  - prune: {method: wanda, sparsty: 0.5}\n  - quantize: {method: gptq, bits: 3}\n" * 100
    tried = []

    def counted(source: str) -> tuple[Problem, ...]:
        tried.append(source)
        return problems(source)

    found = repair(text, problems(text), counted, unsafe=True, seconds=600)
    assert found.left == ()
    assert found.text == text.replace("sparsty", "sparsity").replace("bits: 3", "bits: 4")
    assert len(tried) <= 5


def test_nothing_is_tried_when_time_is_up():
    text = f"{TOP}stages:\n  - quantize: {{method: gptq, grop_size: 32}}\n"
    assert repair(text, problems(text), problems, seconds=0) is None


# ---------------------------------------------------------------- whatever is wrong, together

METHODS = {
    "gptq": ("quantize", {"bits": ["4", "8"], "group_size": ["32", "64", "-1"], "act_order": ["true", "false"]}),
    "awq": ("quantize", {"bits": ["4"], "group_size": ["32", "128"], "sym": ["true", "false"]}),
    "rtn": ("quantize", {"bits": ["4", "8"], "mse": ["true", "false"]}),
    "int8": ("quantize", {"scheme": ["w8a8", "w8a16"], "smooth": ["0.5", "search"]}),
    "wanda": ("prune", {"sparsity": ["0.25", "0.5"], "pattern": ["2:4", "unstructured"]}),
    "lora": ("finetune", {"rank": ["8", "16"], "steps": ["5", "10"]}),
    "lookup": ("speculate", {"tokens": ["4", "8"], "longest_match": ["2", "3"]}),
    "draft": ("speculate", {"model": ["./a", "./b"], "tokens": ["4", "8"]}),
    "onnxruntime": ("compile", {"precision": ["int4", "int8", "auto"]}),
    "tensorrt-llm": ("compile", {"batch_size": ["1", "8"], "tensor_parallel": ["1", "2"]}),
}
BY_OUR_WORD = {
    (place, word.becomes): word.name
    for place, words in foreign_words.words().items()
    for word in words
    if word.becomes and not word.values
}
ASKED = ("method", "engine", "bits", "model", "scheme", "precision", "pattern")

Entries = list[tuple[str, str]]


def slipped(draw: Any, word: str, known: tuple[str, ...]) -> str:
    """Return the word with two letters swapped, where that can only be this word."""
    at = draw(st.integers(0, len(word) - 2))
    wrong = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return wrong if misspelt(wrong, known) == word and wrong not in known else word


@st.composite
def recipes(draw: Any) -> tuple[str, list[dict[str, str]]]:
    """Draw a recipe with faults, and what every stage of it asks for: words as an author means them."""
    asked, items = [], []
    for name in draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=4)):
        verb, options = METHODS[name]
        key = stages.method_key(verb)
        known = tuple(stages.load(verb, name).Options.model_fields)
        chosen = {option: draw(st.sampled_from(values)) for option, values in options.items() if draw(st.booleans())}
        asked.append({"verb": verb, key: name, **{k: v for k, v in chosen.items() if k in ASKED}})
        entries: Entries = [(key, draw(st.sampled_from([name, name.upper()])))]
        for option, value in chosen.items():
            foreign = BY_OUR_WORD.get((f"{verb}.{name}", option)) or BY_OUR_WORD.get((verb, option))
            words = [option, slipped(draw, option, known), *([foreign] if foreign else [])]
            entries.append((draw(st.sampled_from(words)), draw(st.sampled_from([value, json.dumps(value)]))))
        fault = draw(st.sampled_from(["", "", "bits", "unknown", "twice"]))
        if fault == "bits" and "bits" not in chosen and "bits" in options:
            entries.append(("bits", "3"))
            asked[-1]["bits"] = "3"
        elif fault == "unknown":
            entries.append(("colour", "red"))
        elif fault == "twice":
            entries.append(draw(st.sampled_from(entries)))
        items.append((slipped(draw, verb, stages.VERBS), entries))
    target = draw(st.sampled_from(["l4", "L4", "A10", "cpu"]))
    return _written(draw, items, target), [*asked, {"target": target}]


def _written(draw: Any, items: list[tuple[str, Entries]], target: str) -> str:
    lines = ["model: ./m  # mine", f"target: {target}", "calibration: {text: t.txt}", "stages:"]
    for verb, entries in items:
        if draw(st.booleans()):
            lines += [f"  - {verb}: {{{', '.join(f'{key}: {value}' for key, value in entries)}}}"]
        else:
            lines += [f"  - {verb}:  # this", *(f"      {key}: {value}" for key, value in entries)]
    return draw(st.sampled_from(["\n", "\r\n"])).join([*lines, ""])


def asked_in(text: str) -> list[dict[str, str]]:
    """Read what each stage of a mended text asks for, without the code under test."""
    root = compose(text, "r.yaml").root
    assert root is not None
    data = plain(root)
    assert data["model"] == "./m"
    found = []
    for item in data["stages"]:
        ((verb, options),) = item.items()
        found.append({"verb": verb, **{name: str(options[name]) for name in ASKED if name in options}})
    return [*found, {"target": data["target"]}]


@given(recipes())
def test_a_safe_repair_never_changes_what_is_asked_for(case):
    text, meant = case
    found = mended(text)
    after = found.text if found else text
    left = problems(after)
    assert (found.left if found else left) == left
    assert differences(text, after) == ()
    if any(problem.code == "duplicate-key" for problem in left):
        return  # two values: what is meant isn't known, and isn't looked at
    for asked, is_ in zip(meant, asked_in(after), strict=True):
        for name, value in asked.items():
            if name == "verb" or not any(problem.code.startswith("unknown") for problem in left):
                assert is_[name].lower() == value.lower()
    reasons = {problem.code for problem in left}
    assert reasons <= {"unknown-key", "bad-choice", "unknown-target", "duplicate-key"}
    keys = {problem.message for problem in left if problem.code == "unknown-key"}
    assert keys <= {"unknown key 'colour'"}
    again = mended(after)
    assert again is None or again.text == after


@given(recipes())
def test_an_unsafe_repair_plans_and_says_what_is_lost(case):
    text, _meant = case
    found = mended(text, unsafe=True, seconds=60)
    if found is None:
        return
    assert problems(found.text) == ()
    assert found.lost or differences(text, found.text) == ()


# ---------------------------------------------------------------- words of other tools


@pytest.mark.parametrize("place", sorted(foreign_words.words()))
def test_other_tools_words_become_ours(place):
    for word in foreign_words.words()[place]:
        assert word.becomes or word.without or word.told, word.name
        assert word.tool, word.name
    if place.partition(".")[0] not in stages.VERBS:
        return
    verb, _, method = place.partition(".")
    chosen = [method] if method else stages.methods(verb)
    known = [{*stages.load(verb, each).Options.model_fields, stages.method_key(verb)} for each in chosen]
    for word in foreign_words.words()[place]:
        assert not word.becomes or any(word.becomes in each for each in known), word.name
        assert not all(word.name in each for each in known), word.name


@pytest.mark.parametrize("verb", stages.VERBS)
def test_other_tools_methods_are_none_of_ours(verb):
    for name, row in foreign_words._table()["methods"].get(verb, {}).items():
        found = foreign_words.method(verb, name)
        assert name not in stages.methods(verb)
        assert found.told == row["told"]
        for value in found.repair(verb).get(verb, {}).get(stages.method_key(verb), ()) or ():
            assert isinstance(value, str)
        assert bool(found.repair(verb)) == bool(found.instead or found.remove)


def test_a_word_that_is_another_method_is_not_taken_for_a_misspelt_one():
    (found,) = problems(f"{TOP}stages:\n  - finetune: {{method: qlora}}\n")
    assert found.hint is None
    assert found.fix.startswith("QLoRA")


@given(st.sampled_from(["gptq", "group_size", "act_order", "onnxruntime"]), st.text(max_size=14))
def test_a_word_is_misspelt_only_if_it_is_like(choice, word):
    meant = misspelt(word, [choice, "another_word"])
    assert meant in {None, choice, "another_word"}
    assert misspelt(choice, [choice]) == choice
    if meant == choice:
        assert [c for c in word if c.isdigit()] == []
