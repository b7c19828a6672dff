"""Tasks with right answers: multiple choice, written answers and SQL, item by item against the baseline.

Equal accuracy can hide answers lost and as many won, so every item is kept and compared with the baseline's own.

Paper   scoring of choices as in lm-evaluation-harness 0.4 (arXiv:2405.14782); flips of Dutta et al. 2024
        (arXiv:2407.09141), exact McNemar per task with Holm's adjustment, a permutation test over tasks
Cost    one forward pass per item and choice, or one greedy answer per item
Differs choices are judged by log-likelihood per character of the choice; answers are written greedily, without chat
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optikit.described import Described
from optikit.errors import InputMissingError, StageFailedError
from optikit.evaluation.task_items import Choice, Question, tokens_needed
from optikit.evaluation.task_items import kind as kind_of
from optikit.evaluation.task_items import read as read_task
from optikit.models import tokenizer
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, PLANNED, Estimate, Facts, Input, Job, StageOptions, no_objection
from optikit.stages.measure._streaming import is_streamed, opened, streaming, whole_bytes
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.evaluation.flips import Flips
    from optikit.evaluation.streamed import Streamed
    from optikit.evaluation.task_items import Item
    from optikit.evaluation.tasks import Answered, Chosen
    from optikit.runtime.decoder import Decoder

SUMMARY = "right answers to tasks, and the items that flipped against the baseline"
NEEDS = ANY
WRITES = "measurement"
USES_TARGET = False
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "llama-cpp-python",
)
ENVIRONMENT = MAIN
fits = no_objection

ITEMS, ABOUT = "items.jsonl", "about.json"
FLOPS = 60e9
"""Floating-point operations per second of two CPU cores in float32, as transformers reaches them."""
BYTES_PER_SECOND = 10e9
"""Weights that two CPU cores read per second while decoding."""
SQL_BYTES = 200 * 2**20
"""What tasks take beside the model: their items, and a sandbox for queries."""
CHOICES = 4
"""Of an item, assumed while planning."""
TOKENS_PER_ITEM = 200
"""Assumed while planning: nobody has read the items yet."""
EXAMPLES = 3
"""Flips of each direction that a report shows."""
SHOWN = 240
"""Characters of a prompt or answer in an example."""


class Task(Described):
    """One task."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Its name; its items are the input `task:NAME`."""
    items: int = Field(default=200, ge=2)
    """Number of items, from the start of the file."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest written answer, tokens."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end a written answer."""
    written: bool = True
    """Answers may have to be written; else every one is a choice, which is scored as text is."""


class Options(StageOptions):
    """What to ask, and through what."""

    runtime: Literal["transformers", "onnxruntime", "openvino", "llama-cpp"] = "transformers"
    """Runtime that loads the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and arithmetic, where the runtime lets one choose."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """Tasks, in the order of the report."""


def role(name: str) -> str:
    """Return the input that holds a task's items."""
    return f"task:{name}"


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare every task's items, whose tokens, and the answers that these are compared with."""
    return dict.fromkeys((*(role(task.name) for task in options.tasks), "tokenizer", "baseline"), PLANNED)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be asked of this model: a written answer that alone exceeds the context."""
    for index, task in enumerate(options.tasks):
        if task.max_tokens >= facts.max_positions:
            message = f"answers of {task.max_tokens} tokens leave no room in the model's context"
            fix = f"set max_tokens below {facts.max_positions}"
            yield Problem(code="answer-exceeds-context", message=message, fix=fix, loc=("tasks", index, "max_tokens"))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate with prompts of 200 tokens: reading them, and half of the longest answers."""
    return _estimate(options, facts)


def _estimate(options: Options, facts: ModelFacts) -> Estimate:
    items = sum(task.items for task in options.tasks)
    written = sum(task.items * task.max_tokens for task in options.tasks) / 2
    reading = 2 * facts.parameters * items * TOKENS_PER_ITEM / FLOPS
    whole = Estimate(
        seconds=15 + reading + written * facts.weight_bytes / BYTES_PER_SECOND,
        peak_bytes=SQL_BYTES + whole_bytes(facts, options.runtime, TOKENS_PER_ITEM),
        disk_bytes=400 * items,
    )
    if options.runtime != "transformers" or any(task.written for task in options.tasks):
        return whole  # each token that is written needs all blocks once more
    return streaming(whole, facts, length=TOKENS_PER_ITEM, tokens=CHOICES * items * TOKENS_PER_ITEM)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def run(options: Options, job: Job) -> Facts:
    """Answer `job.inputs["task:NAME"]` of every task with `job.source`; against `job.inputs["baseline"]` if given.

    Raises:
        InputMissingError: A file that holds no task, or an item that is longer than the model's context.
        StageFailedError: The model returned NaN, or was compared across protocols.
    """
    asked = {task.name: _items(task, job.inputs[role(task.name)]) for task in options.tasks}
    by = _Tokenizer(job.inputs["tokenizer"])
    longest = _require_fit(options.tasks, asked, by)
    _require_sound(asked)
    about = {task.name: _protocol(asked[task.name], job.inputs[role(task.name)]) for task in options.tasks}
    baseline = job.inputs.get("baseline")
    if baseline is not None:
        _require_same(about, json.loads((baseline / ABOUT).read_text(encoding="utf-8")))
    model = opened(job, partial(_estimate, options), runtime=options.runtime, dtype=options.dtype, max_tokens=longest)
    answers = _answered(options, model, by, asked, job)
    (job.dest / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    _keep(answers, job.dest / ITEMS)
    return _facts(options, asked, answers, about, job) | {
        "runtime": model.runtime,
        "dtype": model.dtype,
        "files": [ABOUT, ITEMS],
    }


class _Tokenizer:
    """The baseline's tokenizer, as `evaluation.tasks` asks of one: with the token that opens a text where it has one.

    As lm-eval has it: Llama reads worse without its <s>. What a tokenizer puts at the end would part prompt and choice.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._by = tokenizer.load(directory)

    def encode(self, text: str) -> Sequence[int]:
        return tokenizer.encode(self._by, text)

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._by.decode(list(tokens))
        return text

    def start_token(self, ends: frozenset[int]) -> int:
        """Return the token that stands before an empty prompt: the beginning of a text, or else the end of one."""
        begins = self._configured().get("bos_token_id")
        return begins if isinstance(begins, int) else min(ends, default=0)

    def context(self) -> int:
        """Return the longest sequence of the model, tokens."""
        settings = self._configured()
        return int(settings.get("max_position_embeddings") or settings["context_length"])

    def _configured(self) -> dict[str, Any]:
        """Return config.json, or what a compiled directory says instead."""
        path = self.directory / "config.json"
        if path.is_file():
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return settings
        compiled: dict[str, Any] = json.loads((self.directory / "genai_config.json").read_text(encoding="utf-8"))
        return dict(compiled["model"])


def _items(task: Task, path: Path) -> Sequence[Item]:
    try:
        return read_task(path)[: task.items]
    except InputMissingError as error:  # the file that was fetched and cut has no name that its author knows
        raise InputMissingError(f"task {task.name!r}: {error.message}", fix=error.fix) from error


def _protocol(asked: Sequence[Item], path: Path) -> str:
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{kind_of(asked)}-{digest[:8]}@{len(asked)}"


def _require_fit(wanted: Sequence[Task], asked: dict[str, Sequence[Item]], by: _Tokenizer) -> int:
    """Return the most tokens that any item needs.

    Raises:
        InputMissingError: An item that exceeds the model's context.
    """
    limit = by.context()
    longest = 0
    for task in wanted:
        for item in asked[task.name]:
            need = tokens_needed(item, task.max_tokens, lambda text: len(by.encode(text)))
            if need > limit:
                message = f"{task.name}: item {item.id} needs {need} tokens, and the model's context holds {limit}"
                raise InputMissingError(message, fix="shorten its prompt, leave it out, or lower max_tokens")
            longest = max(longest, need)
    return longest


def _require_sound(asked: dict[str, Sequence[Item]]) -> None:
    from optikit.evaluation import sql, tasks

    with sql.Sandbox() as sandbox:
        for name, items in asked.items():
            try:
                tasks.require_sound(items, sandbox)
            except InputMissingError as error:
                raise InputMissingError(f"task {name!r}: {error.message}", fix=error.fix) from error


def _require_same(about: dict[str, str], baseline: dict[str, str]) -> None:
    for name, protocol in about.items():
        if baseline.get(name) != protocol:
            message = f"{name}: can't compare {protocol} with the baseline's {baseline.get(name, 'nothing')}"
            raise StageFailedError(message, fix="put the same items to both")


def _answered(
    options: Options, model: Decoder | Streamed, by: _Tokenizer, asked: dict[str, Sequence[Item]], job: Job
) -> dict[str, list[Chosen | Answered]]:
    """Return what the model makes of every item, by task."""
    from optikit.runtime.generate import end_tokens

    ends = end_tokens(by.directory)
    if is_streamed(model):
        return _chosen_by_block(model, by, asked, by.start_token(ends), job)
    total = sum(len(items) for items in asked.values())
    answers: dict[str, list[Chosen | Answered]] = {}
    for task in options.tasks:
        answers[task.name] = _answers(model, by, task, asked[task.name], ends, job, (answers, total))
    return answers


def _chosen_by_block(
    model: Streamed, by: _Tokenizer, asked: dict[str, Sequence[Item]], start: int, job: Job
) -> dict[str, list[Chosen | Answered]]:
    """Return the choices of a model that is read block by block: prompt and choice are a text like any other."""
    import numpy as np

    from optikit.evaluation import scoring, tasks

    choices = {name: [item for item in items if isinstance(item, Choice)] for name, items in asked.items()}
    pairs = [pair for items in choices.values() for item in items for pair in tasks.pairs(by, item, start_token=start)]
    texts = [scoring.Window(np.array([*head, *tail], np.int64), len(tail)) for head, tail in pairs]
    try:
        with model.reading(texts, job.scratch, progress=job.progress, note=job.note) as read:
            nll = scoring.score(read, texts).nll
    except scoring.NotFiniteError as error:
        message = f"{model.runtime} ({model.dtype}): {error}"
        raise StageFailedError(message, fix="the model overflows; try another dtype, or a milder stage") from error
    likelihoods = iter((-np.nansum(nll, axis=1)).tolist())
    return {
        name: [tasks.chosen(item, tuple(islice(likelihoods, len(item.choices)))) for item in items]
        for name, items in choices.items()
    }


def _answers(
    decoder: Decoder,
    by: _Tokenizer,
    task: Task,
    items: Sequence[Item],
    ends: frozenset[int],
    job: Job,
    progress: tuple[dict[str, list[Chosen | Answered]], int],
) -> list[Chosen | Answered]:
    from optikit.evaluation import sql, tasks

    done, total = sum(len(each) for each in progress[0].values()), progress[1]
    start = by.start_token(ends)
    found: list[Chosen | Answered] = []
    limits: dict[str, Any] = {"max_tokens": task.max_tokens, "stop": task.stop, "end_tokens": ends}
    try:
        with sql.Sandbox() as sandbox:
            for item in items:
                if isinstance(item, Choice):
                    found.append(tasks.choose(decoder, by, item, start_token=start))
                else:
                    found.append(tasks.answer(decoder, by, item, sandbox=sandbox, **limits))
                job.progress(done + len(found), total, "item")
    except tasks.NotFiniteError as error:
        message = f"{task.name}: {decoder.runtime} ({decoder.dtype}): {error}"
        raise StageFailedError(message, fix="the model overflows; try another dtype, or a milder stage") from error
    return found


def _keep(answers: dict[str, list[Chosen | Answered]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for name, found in answers.items():
            for each in found:
                file.write(json.dumps({"task": name} | asdict(each), ensure_ascii=False) + "\n")


def read_items(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the answers that a step kept, by task, in the order of the items."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (path / ITEMS).read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            found.setdefault(row.pop("task"), []).append(row)
    return found


def _facts(
    options: Options,
    asked: dict[str, Sequence[Item]],
    answers: dict[str, list[Chosen | Answered]],
    about: dict[str, str],
    job: Job,
) -> Facts:
    from optikit.evaluation import flips
    from optikit.evaluation.results import TaskResult, TasksVerdict

    before = read_items(job.inputs["baseline"]) if "baseline" in job.inputs else {}
    own = {name: [asdict(each) for each in found] for name, found in answers.items()}
    results = {name: _alone(asked[name], rows, about[name]) for name, rows in own.items()}
    if not before:
        return {"tasks": {n: TaskResult(**each).model_dump(mode="json") for n, each in results.items()}}
    compared = {name: _compare(before[name], own[name]) for name in own}
    verdict = flips.over_tasks(compared, seed=job.seed)
    for name, each in compared.items():
        results[name] |= _against(asked[name], before[name], own[name], each, job.seed)
        results[name]["p_worse"] = verdict.p_by_task[name]
    together = TasksVerdict(
        change=verdict.change,
        change_ci95=verdict.change_ci95,
        p_worse=verdict.p_worse,
        worse=verdict.worse,
        conclusion=verdict.conclusion,
    )
    return {
        "tasks": {name: TaskResult(**each).model_dump(mode="json") for name, each in results.items()},
        "tasks_verdict": together.model_dump(mode="json"),
    }


def _right(row: dict[str, Any]) -> bool:
    return bool(row.get("correct_norm", row["correct"]))


def _answer(row: dict[str, Any]) -> Any:
    return row["choice_norm"] if "choice_norm" in row else row["text"]


def _alone(items: Sequence[Item], rows: Sequence[dict[str, Any]], protocol: str) -> dict[str, Any]:
    from optikit.evaluation import statistics

    right, count = sum(map(_right, rows)), len(rows)
    kind = kind_of(items)
    plain = sum(row["correct"] for row in rows) / count if kind == "choice" else None
    return {
        "protocol": protocol,
        "kind": kind,
        "items": count,
        "accuracy": right / count,
        "accuracy_ci95": statistics.share_interval(right, count),
        "accuracy_unnormalized": plain,
    }


def _compare(before: Sequence[dict[str, Any]], after_: Sequence[dict[str, Any]]) -> Flips:
    import numpy as np

    from optikit.evaluation import flips

    sides = [np.array([_right(row) for row in rows]) for rows in (before, after_)]
    answers = [_answer(row) for row in before], [_answer(row) for row in after_]
    return flips.compare(*sides, answers=answers)


def _against(
    items: Sequence[Item],
    before: Sequence[dict[str, Any]],
    now: Sequence[dict[str, Any]],
    compared: Flips,
    seed: int,
) -> dict[str, Any]:
    """Return what `TaskResult` says about a task against the baseline."""
    from optikit.evaluation import flips

    told = ("change", "change_ci95", "lost", "won", "flip_rate", "changed_answers", "detectable")
    found: dict[str, Any] = {name: getattr(compared, name) for name in told}
    found["flips"] = tuple(_examples(items, before, now))
    lengths = [[row["tokens"] for row in rows] for rows in (before, now) if "tokens" in rows[0]]
    if lengths and sum(lengths[0]):
        ratio, interval = flips.length_ratio(lengths[0], lengths[1], seed=seed)
        found |= {"output_length_ratio": ratio, "output_length_ratio_ci95": interval}
    return found


def _examples(
    items: Sequence[Item], before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> Iterator[dict[str, str]]:
    """Yield the first few items of each direction."""
    for change, sign in (("lost", True), ("won", False)):
        pairs = zip(items, before, now, strict=True)
        flipped = [each for each in pairs if _right(each[1]) is sign and _right(each[2]) is not sign]
        for item, one, other in flipped[:EXAMPLES]:
            yield {
                "item": item.id,
                "prompt": item.prompt[-SHOWN:],
                "expected": _expected(item)[:SHOWN],
                "baseline": _told(item, one)[:SHOWN],
                "result": _told(item, other)[:SHOWN],
                "change": change,
            }


def _expected(item: Item) -> str:
    if isinstance(item, Choice):
        return item.choices[item.answer]
    return " or ".join(item.answers) if isinstance(item, Question) else item.answer


def _told(item: Item, row: dict[str, Any]) -> str:
    answer = item.choices[row["choice_norm"]] if isinstance(item, Choice) else str(row["text"])
    return answer.strip()
