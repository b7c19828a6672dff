"""Failing combinations of speculation that users have reported are refused or warned about at plan time.

One test each: the rule cites the report, its case fires it, and its near miss doesn't. Two reports are about drafts of
another vocabulary or tokenizer, which no recipe gets past planning.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from optikit.deploy.draft import problems
from optikit.rules import check, rules

spec = importlib.util.spec_from_file_location("stacks", Path(__file__).with_name("stacks.py"))
stacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stacks)

REPORTS = {
    # speculation with quantization
    "vllm-project/vllm#25883": "vllm-draft-quantization",
    "vllm ... #26411": "vllm-draft-quantization",
    "vllm ... #26590": "vllm-draft-quantization",
    "ggml-org/llama.cpp#25618": "llamacpp-quantized-greedy",
    "FasterDecoding/Medusa#65": "order-quantize-after-speculate",
    "FasterDecoding/Medusa ... #3": "order-quantize-after-speculate",
    "aws/sagemaker-python-sdk#6143": "lmi-draft-key",
    # speculation
    "vllm ... #4978": "speculate-large-batch",
    "vllm ... #6777": "speculate-large-batch",
    "FasterDecoding/Medusa#112": "tgi-medusa-shared-head",
    "Medusa ... #140": "tgi-medusa-shared-head",
    "text-generation-inference#1734": "tgi-medusa-shared-head",
    "vllm-project/vllm#21797": "vllm-draft-gap",
    "vllm ... #31883": "vllm-draft-gap",
    "vllm ... #32007": "vllm-draft-gap",
    "vllm-project/vllm#31345": "vllm-draft-tensor-parallel-equal",
    "vllm ... #31886": "vllm-draft-tensor-parallel-equal",
    "vllm ... #34106": "vllm-draft-tensor-parallel-equal",
    "vllm-project/vllm#48894": "draft-length",
    "huggingface/transformers#48280": "speculate-sliding-window",
    "NVIDIA/TensorRT-LLM#1798": "trtllm-medusa",
    "FasterDecoding/Medusa#85": "medusa-joint-gate",
    "hemingkx/Spec-Bench#13": "medusa-joint-gate",
}


@pytest.mark.parametrize(("report", "name"), REPORTS.items())
def test_reported_failure_is_known(report, name):
    assert "#" + report.partition("#")[2] in rules()[name].source
    case = stacks.CASES[name]
    assert name in [problem.code for problem in check(stacks.stack({k: v for k, v in case.items() if k != "near"}))]
    assert name not in [problem.code for problem in check(stacks.stack(stacks.near(case)))]


@pytest.mark.parametrize(
    ("report", "draft", "code"),
    [
        ("ggml-org/llama.cpp#10664", {"vocab": 32064}, "draft-vocabulary"),
        ("ggml-org/llama.cpp#3649", {"tokenizer": "another"}, "draft-tokenizer"),
    ],
)
def test_a_draft_with_other_words_is_refused(report, draft, code):
    found = [problem.code for problem in problems(stacks.facts(draft, base=stacks.SMALL), stacks.facts({}))]
    assert found == [code], report
    assert list(problems(stacks.facts({}, base=stacks.SMALL), stacks.facts({}))) == []
