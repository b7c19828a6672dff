"""Plan and artifacts → report: what was measured, put side by side, priced and judged. Nothing here measures.

Light: numpy is imported only where kept log-likelihoods of two steps are compared.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from optikit import __version__, host
from optikit.evaluation.cost import Hour
from optikit.evaluation.results import (
    Cost,
    GateResult,
    Loaded,
    Measurement,
    OtherBaseline,
    Payback,
    Quality,
    Ratio,
    Report,
    Served,
    Speed,
    Speedup,
    StepReport,
    Timing,
)
from optikit.models import gguf_parts
from optikit.plan.measurements import SCORING
from optikit.plan.model import BASELINE
from optikit.recipe import limits
from optikit.recipe.schema import as_written
from optikit.report import caveats, gate_values, pricing, speculation_table
from optikit.report import judge as judging
from optikit.report.judge import Value
from optikit.stage import VERIFIED
from optikit.text import duration, redact

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.plan import Plan, Step
    from optikit.store.store import Artifact

WEIGHT_SUFFIXES = frozenset({".safetensors", ".onnx", ".data", ".bin", ".xml", ".engine", ".plan", ".neff"})
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnxruntime", "onnxruntime-genai")
RESULT = "result"
SPEED = ("speed", "served_speed")
"""Methods of `measure` that time models in turns."""
NLL = "nll.npy"
SECTIONS = frozenset(Quality.model_fields)
"""Facts of a quality or tasks step that are the measurement itself; the rest is detail."""
FEW_WINDOWS = 8
FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64"})


def report(
    plan: Plan,
    artifacts: Mapping[str, Artifact],
    statuses: Mapping[str, str],
    *,
    seconds: float,
    command: str,
    rolled_back: str = "",
) -> Report:
    """Put together everything that a run found out.

    Args:
        plan: The plan that was executed.
        artifacts: Results by step key, those of measuring steps included.
        statuses: `executed`, `cached` or `emitted` by step name.
        seconds: Wall time of the whole run.
        command: The command line, for reproducing.
        rolled_back: Why this plan ends before its recipe does; "" where it doesn't.
    """
    run = _Run(plan, artifacts, statuses)
    judged = (*judge(plan, artifacts, statuses), *run.guessing())
    return Report(
        verdict=judging.overall(judged, known=run.known),
        recipe=_recipe(plan),
        model=_model(plan),
        target=asdict(plan.target),
        host=host.describe() | {"while_timing": run.timing.host.model_dump() if run.timing else None},
        versions={"optikit": __version__, "python": platform.python_version(), **host.versions(LIBRARIES)},
        baseline=run.baseline,
        result=run.result,
        steps=tuple(run.step(step, run.measurement(step)) for step in plan.steps),
        measures=tuple(run.step(step, None) for step in plan.measures),
        speedup=run.speedup(RESULT),
        other_baselines=tuple(run.other_baselines()),
        attribution=tuple(run.attribution()),
        speculation=run.speculation,
        served=run.served,
        loaded=run.loaded,
        payback=run.payback,
        gates=judged,
        warnings=(*filter(None, (rolled_back,)), *(problem.message for problem in plan.warnings), *run.warnings()),
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=redact(command),
    )


def judge(
    plan: Plan, artifacts: Mapping[str, Artifact], statuses: Mapping[str, str] | None = None, *, on_fail: str = ""
) -> tuple[GateResult, ...]:
    """Judge a recipe's gates by what has been measured; `on_fail` picks some. Steps that a plan leaves out aren't."""
    recipe, known = plan.recipe, {step.name for step in plan.steps}
    wanted = []
    steps: dict[str, tuple[str, Mapping[str, Value]]] = {}
    for each in limits.asked(recipe.gates, on_fail):
        name = next(iter(limits.steps_named(recipe, each.step)), "") if each.step else ""
        if name and name not in known:
            continue
        wanted.append(each)
        if name:
            steps[each.step] = (name, _Run(plan.until(name), artifacts, statuses or {}).values)
    return judging.judge(wanted, _Run(plan, artifacts, statuses or {}).values if wanted else {}, steps)


@dataclass(frozen=True)
class _Run:
    """A plan with what became of it, and the questions that a report asks of both."""

    plan: Plan
    artifacts: Mapping[str, Artifact]
    statuses: Mapping[str, str]

    @cached_property
    def timing(self) -> Timing | None:
        """What the speed test found; None where there was none."""
        found = self._measured(SPEED)
        if found is None:
            return None
        facts = found.manifest.facts.items()
        return Timing.model_validate({name: value for name, value in facts if name in Timing.model_fields})

    @cached_property
    def baseline(self) -> Measurement:
        """The untouched model, in the runtime its user would otherwise use."""
        key = self.plan.baseline_key
        size = weight_bytes(self.artifacts[key]) if key else self.plan.facts.weight_bytes
        return self._measurement(size, self._quality(BASELINE), BASELINE)

    @cached_property
    def result(self) -> Measurement:
        """The last artifact."""
        stages = [step for step in self.plan.steps if step.writes in ("model", "engine")]
        stages = [step for step in stages if not self.emitted(step)]
        if not stages:
            return self.baseline
        found = self.measurement(stages[-1], last=True)
        if found.size_bytes is not None:
            return found
        models = [self.measurement(step) for step in stages if step.writes == "model"]
        loaded = models[-1] if models else self.baseline  # the weights that a folder for a device loads
        return found.model_copy(update={"size_bytes": loaded.size_bytes})

    @property
    def known(self) -> bool:
        """Whether anything but files came of it: a measurement, or an engine that was built here."""
        return bool(self.plan.measures) or any(s.writes == "engine" and not self.emitted(s) for s in self.plan.steps)

    def guessing(self) -> Iterator[GateResult]:
        """Yield the gate that a model fails which does no better than guessing."""
        found, before = _perplexity(self.result), _perplexity(self.baseline)
        if found is not None and (failed := judging.guessing(found, before, self.plan.facts.vocab)):
            yield failed

    def emitted(self, step: Step) -> bool:
        """Return whether a step only wrote what another machine will do: there is nothing of it to measure."""
        return self.statuses.get(step.name) == "emitted"

    def _verified(self) -> Iterator[str]:
        """Yield which steps were finished on another machine, on which, and what they decoded there."""
        for step in self.plan.steps:
            facts = self.artifacts[step.key].manifest.facts if step.key in self.artifacts else {}
            if VERIFIED in facts:
                device = facts[VERIFIED]
                named = ", ".join([device["name"], *map(str, device["accelerators"])])
                decoded = " ".join(str(facts["decoded"]).split())[-160:]
                took = f"in {duration(facts['compile_seconds'])} " if facts["compile_seconds"] else ""
                yield f"{step.name} was finished {took}on {named} and came back verified: it decoded {decoded!r}."

    @cached_property
    def speculation(self) -> dict[str, Any] | None:
        """What speculation brought, and whether it is on; None where there is none."""
        found = self._measured(("speculation",))
        return dict(found.manifest.facts["speculation"]) if found else None

    @cached_property
    def served(self) -> Served | None:
        """What clients of a server saw, where the result was served; None where it wasn't."""
        kept = (self.artifacts[step.key].manifest.facts for step in self.plan.measures if step.key in self.artifacts)
        found = next((facts["served"] for facts in kept if "served" in facts), None)
        return pricing.priced(Served.model_validate(found), self._hour) if found else None

    @cached_property
    def loaded(self) -> Loaded | None:
        """What clients of the result saw under load, priced; None where it wasn't loaded."""
        found = self._measured(("serving", "served_load"))
        return pricing.loaded(Loaded.model_validate(found.manifest.facts["loaded"]), self._hour) if found else None

    def measurement(self, step: Step, *, last: bool | None = None) -> Measurement:
        """Return what was measured of the artifact of a step: its speed, too, if it is the last one."""
        is_last = step is self.plan.steps[-1] if last is None else last
        size = weight_bytes(self.artifacts[step.key]) or None  # a folder for a server holds no weights of its own
        if self.emitted(step):
            return Measurement(size_bytes=size, reason=f"emitted: {step.method} runs elsewhere, nothing was measured")
        if step.writes == "speculator":
            return Measurement(size_bytes=size, reason="it changes no weights; what it brings is told as speculation")
        quality = self._quality(_subject(step))
        return self._measurement(size, quality, RESULT if is_last and step.writes != "source" else "")

    def _measurement(self, size: int | None, quality: Quality | None, arm: str) -> Measurement:
        speed = self._speed(arm)
        return Measurement(
            size_bytes=size,
            quality=quality,
            speed=speed,
            cost=self._cost(speed, arm),
            reason="; ".join(self._missing(quality, speed, arm)),
        )

    def _cost(self, speed: Speed | None, arm: str) -> Cost | None:
        """Return what an arm's tokens cost: the result's under the load that the recipe prices, others' alone."""
        wanted = self.plan.recipe.cost
        if arm == RESULT and wanted.concurrency > 1:
            hour, reason = pricing.hour_of(self.plan.target, wanted), pricing.unpriced(self.plan.target)
            rows = pricing.of_clients(self.loaded, self.served)
            return pricing.under_load(hour, rows, wanted.concurrency, reason)
        return pricing.alone(self.plan.target, wanted, speed) if arm else None

    @cached_property
    def _hour(self) -> Hour | None:
        """What an hour of the machine costs, if what is measured here can be priced."""
        target = self.plan.target
        return None if pricing.unpriced(target) else pricing.hour_of(target, self.plan.recipe.cost)

    @property
    def payback(self) -> Payback | None:
        """What optimizing cost, and when it has paid for itself."""
        seconds = sum(self.artifacts[step.key].manifest.seconds for step in self.plan.steps)
        return pricing.payback(self._hour, seconds, self.baseline, self.result) if self.plan.steps else None

    def _missing(self, quality: Quality | None, speed: Speed | None, arm: str) -> Iterator[str]:
        wanted = self.plan.recipe.evaluate
        if quality is None:
            yield (
                "quality: the recipe has no `evaluate: {perplexity: …}` or `{tasks: …}`"
                if wanted.perplexity is None and not wanted.tasks
                else "quality: tasks are put to the result only"
                if wanted.perplexity is None and arm != RESULT
                else "quality: no runtime on this machine loads this artifact"
            )
        if speed is None and not arm:
            yield "speed: timed for the last step only"
        elif speed is None:
            yield (
                "speed: the recipe has no `evaluate: {speed: …}`"
                if wanted.speed is None
                else "speed: the recipe has `baseline: {runtime: none}`"
                if arm == BASELINE and wanted.baseline.runtime == "none"
                else "speed: timed only where the last step compiled for a runtime on this machine"
            )

    def _measured(self, methods: Sequence[str], subject: str = "") -> Artifact | None:
        """Return what one of some methods measured of the step `subject`, or of several together."""
        found = (step for step in self.plan.measures if step.method in methods and subject in ("", step.subject))
        return next((self.artifacts[step.key] for step in found if step.key in self.artifacts), None)

    def _quality(self, name: str) -> Quality | None:
        measured = (self._measured(("tasks",), name), self._measured(SCORING, name))
        found = [each.manifest.facts for each in measured if each]
        if not found:
            return None
        facts = {
            key: value for each in found for key, value in each.items() if key in SECTIONS and value not in ({}, None)
        }
        return Quality.model_validate(facts)

    def _speed(self, arm: str) -> Speed | None:
        return self.timing.arms.get(arm) if self.timing else None

    def speedup(self, arm: str) -> Speedup:
        """Return an arm's speed against the baseline's."""
        if self.timing is None:
            return Speedup()
        apart = self.timing.repeating if arm == RESULT else None
        return Speedup(**self._steady(self.timing.ratios.get(arm, {})), repeating=apart)

    def _steady(self, ratios: Mapping[str, Ratio]) -> dict[str, Ratio]:
        """Return ratios without that of decoding where every answer that was timed repeats itself."""
        apart = self.timing.repeating if self.timing else None
        return {name: ratio for name, ratio in ratios.items() if name != "decode" or apart is None or apart.steady}

    def other_baselines(self) -> Iterator[OtherBaseline]:
        """Yield further baselines; their speed-up is the result's against them, over the same rounds."""
        if self.timing is None:
            return
        for name, ratios in self.timing.last_against.items():
            yield OtherBaseline(name=name, speed=self.timing.arms[name], speedup=Speedup(**self._steady(ratios)))

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """What gates may limit, by metric name."""
        intervals = self.timing.intervals.get(RESULT, {}) if self.timing else {}
        return {
            **gate_values.of_quality(self.result),
            **gate_values.of_speed(self.result, self.speedup(RESULT), intervals),
            **gate_values.of_loads(self.loaded, self.result.reason),
            "size_ratio": gate_values.of_sizes(self.result.size_bytes, self.baseline.size_bytes),
        }

    def step(self, step: Step, measurement: Measurement | None) -> StepReport:
        """Return one step's part of the report."""
        manifest = self.artifacts[step.key].manifest
        facts = manifest.facts if step.writes != "measurement" else _details(manifest.facts)
        return StepReport(
            name=step.name,
            verb=step.verb,
            method=step.method,
            backend=step.backend,
            status=cast("Any", self.statuses[step.name]),
            key=step.key,
            seconds=manifest.seconds,
            peak_memory_mib=manifest.peak_memory_mib,
            artifact_bytes=manifest.size_bytes,
            estimate_seconds=step.estimate.seconds,
            estimate_peak_memory_mib=step.estimate.peak_bytes / 2**20,
            estimate_disk_bytes=step.estimate.disk_bytes,
            options=step.options.model_dump(mode="json"),
            facts=dict(facts),
            measurement=measurement,
        )

    def attribution(self) -> Iterator[dict[str, Any]]:
        """Yield what each step alone did to perplexity and size: against the artifact it was made from."""
        for step in self.plan.steps:
            if step.writes == "source" or self.emitted(step):
                continue
            if step.writes == "speculator":
                yield {"step": step.name, **self._own_drafts(step)}
                continue
            parent = next((other for other in self.plan.steps if other.key == step.source), None)
            before = self.measurement(parent) if parent else self.baseline
            own: dict[str, Any] = {"step": step.name}
            ratio = self._perplexity_ratio(parent, step)
            if ratio is not None:
                own["perplexity_ratio"] = ratio
            own |= self._own_speed(step)
            ratio_of_sizes = gate_values.of_sizes(self.measurement(step).size_bytes, before.size_bytes).value
            yield own | {"size_ratio": ratio_of_sizes}

    def _own_drafts(self, step: Step) -> dict[str, Any]:
        """Return what a speculate step's own drafter brought, on texts that don't repeat themselves if known.

        Heads and drafts share a text with lookup, which nobody trained: they are credited with what they are predicted
        to add to it, and with nothing where measuring chose not to ask them.
        """
        found = self.speculation or {}
        own = found.get("own_drafter") or {}
        name = speculation_table.NAMES.get(step.method)
        if name is None:
            measured = found.get("speedup_without_loops") or found.get("speedup")
            return {"decode_speedup": measured} if measured else {}
        if not own.get("used") or found.get("chosen") != step.method:
            return {"own_drafter": f"{name}: not used, 1.00× predicted"}
        return {"own_drafter": f"{name}: {own['predicted_speedup']:.2f}× predicted beside lookup"}

    def _own_speed(self, step: Step) -> dict[str, Any]:
        """Return what a step alone did to decode speed on the result's engine; nothing where that was not asked for."""
        if self.timing is None or not self.timing.chain:
            return {}
        chain = self.timing.chain
        if step.writes == "engine" and "engine-baseline" not in chain:
            return {}  # the baseline runs on the engine, too
        name = "engine-baseline" if step.writes == "engine" else f"engine-{step.name}"
        decode = chain.get(name, chain["result"])["decode"]
        return {"decode_speedup": {"value": decode.value, "ci95": list(decode.ci95)}}

    def _perplexity_ratio(self, parent: Step | None, step: Step) -> dict[str, Any] | None:
        before = self._measured(SCORING, _subject(parent) if parent else BASELINE)
        after = self._measured(SCORING, step.name)
        if before is None or after is None:
            return None
        import numpy as np

        from optikit.evaluation import statistics

        nll = [np.load(artifact.path / NLL, allow_pickle=False) for artifact in (before, after)]
        value, interval = statistics.perplexity_ratio(*nll, seed=self.plan.recipe.seed)
        return {"value": value, "ci95": list(interval)}

    def warnings(self) -> Iterator[str]:
        """Yield what a reader should know before trusting the numbers."""
        wanted = self.plan.recipe.evaluate
        types = self._source_types()
        if types - FLOAT_TYPES:
            packed = ", ".join(sorted(types - FLOAT_TYPES))
            yield f"The model's weights came from a {packed} file: what that lost is part of the baseline."
        if wanted.perplexity is not None and (wanted.perplexity.windows or FEW_WINDOWS) < FEW_WINDOWS:
            yield f"{wanted.perplexity.windows} windows are few: quality intervals are wide and rest on Student's t."
        before = _perplexity(self.baseline)
        if before is not None and judging.is_guessing(before, self.plan.facts.vocab):
            guessed = f"a perplexity of {before:,.4g} with {self.plan.facts.vocab:,} tokens"
            yield f"The model guesses before anything is done to it ({guessed}): what it loses can't be seen."
        for step in filter(self.emitted, self.plan.steps):
            yield f"{step.name} was emitted: size and quality are those of the weights that it will compile."
        yield from self._verified()
        if self.speculation is not None and self.speculation["chosen"] == "off":
            yield f"Speculation by {self.speculation['method']} was measured and is switched off: it doesn't pay here."
        timed = [step.name for step in self.plan.measures if step.method in SPEED]
        yield from caveats.of_timing(self.timing, stored="cached" in map(self.statuses.get, timed))

    def _source_types(self) -> frozenset[str]:
        """Return the tensor types of the file that the model was unpacked from."""
        unpacked = [self.artifacts[step.key].manifest.facts for step in self.plan.steps if step.writes == "source"]
        return frozenset(name for facts in unpacked for name in facts.get("tensor_types", ()))


def _perplexity(measurement: Measurement) -> float | None:
    """Return perplexity per token."""
    perplexity = measurement.quality.perplexity if measurement.quality else None
    return perplexity.value if perplexity else None


def _subject(step: Step) -> str:
    """Return the subject of what measures a step: the untouched model, unpacked or not, is the baseline."""
    return BASELINE if step.writes == "source" else step.name


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of an artifact's weights: safetensors files, or a compiled graph with its data."""
    files = artifact.manifest.files
    return sum(record.size for name, record in files.items() if PurePosixPath(name).suffix in WEIGHT_SUFFIXES)


def _recipe(plan: Plan) -> dict[str, Any]:
    written = plan.recipe.model_dump(mode="json", exclude={"stages", "sweep"})
    return written | {"stages": [as_written(entry) for entry in plan.recipe.stages]}


def _model(plan: Plan) -> dict[str, Any]:
    facts: ModelFacts = plan.facts
    whole = gguf_parts.files(plan.model.path) if plan.model.path.is_file() else ()
    packed = {"source_bytes": sum(part.stat().st_size for part in whole)} if whole else {}
    return packed | {
        "source": plan.model.resolved,
        "digest": plan.model.digest,
        "model_type": facts.model_type,
        "parameters": facts.parameters,
        "layers": facts.layers,
        "hidden": facts.hidden,
        "vocab": facts.vocab,
        "max_positions": facts.max_positions,
        "dtype": facts.dtype,
        "weight_bytes": facts.weight_bytes,
        "traits": sorted(facts.traits),
    }


def _details(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a measuring step's facts without what the measurements already hold."""
    shown = SECTIONS | {"served", "arms", "ratios", "last_against", "chain", "files", "speculation", "loaded"}
    return {name: value for name, value in facts.items() if name not in shown}
