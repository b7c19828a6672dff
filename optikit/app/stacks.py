"""Every stack that a model could get on a target: weights, engine or server, accelerators, batch, length, drafts.

Arithmetic goes first: of each way to store the weights and each engine, the degrees, batches and lengths that fit are
put in order by their floors, and stages and rules are asked from the best on until they agree to one. What costs more
is tried on the best of these only: pruning with training before it, speculation after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

from optikit.deploy.servers import SERVERS
from optikit.models.facts import DTYPE_BYTES, ModelFacts
from optikit.problems import Problem
from optikit.rules.engine import check, rules
from optikit.rules.stack import Placed, Stack
from optikit.stage import row_problems
from optikit.stages import load, methods
from optikit.stages.compile import _neuron_options
from optikit.targets import Target, neuron, parallel
from optikit.targets.estimate import cache_bytes, decode_floor

Stages = tuple[tuple[str, str, Mapping[str, Any]], ...]
"""Verb, method and options of each stage."""
Goal = Literal["latency", "throughput", "cost"]
BITS = (4, 8)
GROUP_SIZES = (128, 64, 32)
BATCHES: Mapping[Goal, tuple[int, ...]] = {
    "latency": (1,),
    "throughput": (64, 32, 16, 8, 4, 2, 1),
    "cost": (64, 32, 16, 8, 4, 2, 1),
}
"""Sequences at once that are tried, where none are asked for."""
SHORTEST = 256
"""Tokens below which no shorter sequences are tried."""
AS_A_SERVER = {"cuda": ("vllm",), "cpu": ("vllm",)}
"""Servers of a directory that isn't compiled."""
NAMES_OF_TARGETS = {"llama-cpp": "llama.cpp"}
"""Engine of a compile stage → its name among a target's engines."""
SHARED_OUT = frozenset({"tensorrt-llm", "vllm"})
"""Engines that share a model out over GPUs; the others run on one."""
DRAFTING = {
    "onnxruntime": ("lookup", "medusa", "draft"),
    "openvino": ("lookup", "draft"),
    "vllm": ("lookup", "draft"),
}
"""Engine or server → ways to speculate that it has."""
BEST = 4
"""Stacks on which pruning and speculation are tried."""
RECOVERED: tuple[Stages, ...] = (
    (("prune", "depth", {}), ("finetune", "distill", {})),
    (("prune", "width", {}), ("finetune", "distill", {})),
)
"""What leaves weights out so that a token takes less, and trains the rest."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How something is served: accelerators that share it, and what they serve at once.

    Attributes:
        tensor, pipeline: Accelerators or cores that share every layer; groups of them that share the layers.
        batch, length: Sequences at once, tokens of each.
    """

    tensor: int = 1
    pipeline: int = 1
    batch: int = 1
    length: int = 2048

    @property
    def devices(self) -> int:
        """Accelerators or cores that one copy of the model takes."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True)
class Made:
    """Weights after some stages: their facts, and why a stage can't make them."""

    stages: Stages
    facts: ModelFacts
    placed: tuple[Placed, ...] = ()
    problems: tuple[Problem, ...] = ()

    def then(self, stage: tuple[str, str, Mapping[str, Any]], target: Target) -> Made:
        """Return what a further stage makes of them."""
        verb, method, chosen = stage
        module = load(verb, method)
        options = module.Options(**chosen)
        found = [Problem(code="needs-trait", message=f"{method} needs {t}") for t in module.NEEDS - self.facts.traits]
        found += [each for each in row_problems(module, method, options, self.facts) if each.level == "error"]
        found += module.check(options, self.facts, target)
        after = module.after(options, self.facts)
        values = options.model_dump(mode="json")
        placed = Placed(verb=verb, method=method, options=values, before=self.facts, after=after)
        return Made(
            stages=(*self.stages, stage),
            facts=after,
            placed=(*self.placed, placed),
            problems=(*self.problems, *found),
        )


@dataclass(frozen=True, kw_only=True)
class End:
    """What runs the result: an engine that a compile stage writes for, or a server of the directory."""

    engine: str
    compiled: bool
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def options(self, shape: Shape, target: Target) -> dict[str, Any]:
        """Return what the compile stage or the entry of `serve` says."""
        if self.engine == "vllm" and target.device == "cpu":
            return dict(self.fixed)
        found: dict[str, Any] = {"tensor_parallel": shape.tensor}
        if not self.compiled and shape.pipeline > 1:
            found["pipeline_parallel"] = shape.pipeline
        found |= {"batch_size": shape.batch, "sequence_length": shape.length}
        known = (load("compile", self.engine) if self.compiled else SERVERS[self.engine]).Options.model_fields
        return {**{name: value for name, value in found.items() if name in known}, **self.fixed}

    def degrees(self, facts: ModelFacts, target: Target) -> Iterator[tuple[int, int]]:
        """Yield (tensor, pipeline) degrees to try."""
        if self.engine == "neuron":
            yield from (
                (degree, 1) for degree in dict.fromkeys((*neuron.degrees(target), *target.older_tensor_parallel))
            )
        elif target.device == "cuda" and self.engine in SHARED_OUT:
            for tensor, pipeline in parallel.rows()[self.engine].degrees(facts, target.count):
                if pipeline == 1 or not self.compiled:
                    yield tensor, pipeline
        else:
            yield 1, 1


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A stack that stages and rules have been asked about: `made` is compiled if its end is, `before` isn't."""

    before: Made
    made: Made
    end: End
    shape: Shape
    target: Target
    problems: tuple[Problem, ...]
    fits: bool

    @property
    def legal(self) -> bool:
        """Whether nothing refuses it."""
        return all(problem.level == "warning" for problem in self.problems)

    @property
    def refusals(self) -> frozenset[str]:
        """Codes of what refuses it."""
        return frozenset(problem.code for problem in self.problems if problem.level == "error")

    @cached_property
    def seconds_per_token(self) -> float:
        """Least time per token on the whole target, copies of the model working side by side."""
        return per_token(as_served(self.made.facts, self.end), self.target, self.shape)

    @property
    def served(self) -> dict[str, Any] | None:
        """The entry of `serve:`; None where a compile stage says it all."""
        return None if self.end.compiled else {"server": self.end.engine, **self.end.options(self.shape, self.target)}


def search(facts: ModelFacts, target: Target, *, goal: Goal, batch: int | None, length: int) -> list[Judged]:
    """Return stacks without pruning and speculation: of each way to store weights and each engine the best."""
    whole = Made(stages=(), facts=facts)
    weights = [whole, *(whole.then(stage, target) for stage in _quantized(facts, shared=target.count > 1))]

    def tried(choice: Iterable[End]) -> list[Judged]:
        return [_best(made, end, target, goal, batch, length) for end in choice for made in weights]

    found = tried(_compilers(target))
    if target.device == "cpu" and any(one.legal and one.fits for one in found):
        return found  # a server of the directory gains nothing over an engine there
    return found + tried(_servers(target))


def pruned(best: list[Judged], facts: ModelFacts, *, goal: Goal, batch: int | None, length: int) -> Iterator[Judged]:
    """Yield the same stacks of a model that was pruned and trained before."""
    for one in best[:BEST]:
        if "dense" not in facts.traits:
            return
        for way in RECOVERED:
            made = Made(stages=(), facts=facts)
            for stage in (*way, *(each for each in one.made.stages if each[0] == "quantize")):
                made = made.then(stage, one.target)
            yield _best(made, one.end, one.target, goal, batch, length)


def speculating(best: list[Judged]) -> Iterator[tuple[Judged, str]]:
    """Yield the same stacks with each way to speculate that their engine has."""
    for one in [one for one in best if one.end.engine in DRAFTING][:BEST]:
        for method in DRAFTING[one.end.engine]:
            yield _judge(one.before.then(("speculate", method, {}), one.target), one.end, one.shape, one.target), method


def _compilers(target: Target) -> Iterator[End]:
    """Yield the compile stages that write for a target."""
    for engine in methods("compile"):
        if NAMES_OF_TARGETS.get(engine, engine) in target.engines and (target.device == "cpu" or engine != "llama-cpp"):
            yield from _compiled(engine, target)


def _servers(target: Target) -> Iterator[End]:
    """Yield what serves a directory on a target."""
    for server in AS_A_SERVER.get(target.device, ()):
        if server in target.engines or not target.engines:
            old = target.device == "cuda" and (target.compute_capability or 80) < 80
            yield End(engine=server, compiled=False, fixed={"dtype": "float16"} if old else {})


def _compiled(engine: str, target: Target) -> Iterator[End]:
    if engine != "neuron":
        yield End(engine=engine, compiled=True)
        return
    first = _neuron_options.backend_for(target)
    for backend in dict.fromkeys((first, *get_args(_neuron_options.Backend))):
        yield End(engine=engine, compiled=True, fixed={"backend": backend})
    int8 = {"quantization_dtype": "int8", "quantized_checkpoints_path": "quantized"}
    yield End(engine=engine, compiled=True, fixed={"backend": "nxd-inference", **int8})


def _quantized(facts: ModelFacts, *, shared: bool) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for method in methods("quantize"):
        for options in presets(method, facts, shared=shared):
            yield "quantize", method, options


def presets(method: str, facts: ModelFacts, *, shared: bool = False) -> Iterator[Mapping[str, Any]]:
    """Yield the options to try: bits or schemes where the method lets one choose, and groups of weights.

    Args:
        method: Of quantize.
        facts: The model.
        shared: It may be shared out over accelerators, whose parts the largest groups needn't divide.
    """
    known = load("quantize", method).Options.model_fields
    if "dtype" in known and DTYPE_BYTES.get(facts.dtype, 0) <= 2:
        return  # a cast that saves nothing
    sizes = _groups(facts, shared=shared) if "group_size" in known else (0,)
    for options in _kinds(known):
        yield from ({**options, "group_size": size} if size else options for size in sizes)


def _kinds(known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the bits or schemes that a method lets one choose; nothing to say where it doesn't."""
    kind = next((name for name in ("bits", "scheme") if name in known), "")
    if not kind:
        yield {}
        return
    values = get_args(known[kind].annotation)
    yield from ({kind: value} for value in values if kind != "bits" or value in BITS)


def _groups(facts: ModelFacts, *, shared: bool) -> tuple[int, ...]:
    """Return the largest usual group that divides the model, and the smallest where it is shared out; 0 for none."""
    fitting = [size for size in GROUP_SIZES if facts.widths[0] % size == 0] or [0]
    return tuple(dict.fromkeys((fitting[0], fitting[-1]))) if shared else (fitting[0],)


def _best(made: Made, end: End, target: Target, goal: Goal, batch: int | None, length: int) -> Judged:
    """Return the legal stack with the least time per token, else the one that came nearest."""
    stored = as_served(made.facts, end)
    for longest in _lengths(length):
        shapes = _shapes(made.facts, end, target, (batch,) if batch else BATCHES[goal], longest)
        fitting = sorted((one for one in shapes if _fits(stored, target, one)), key=_order(stored, target))
        if fitting:
            return _first_legal(made, end, target, fitting)
    return _judge(made, end, Shape(batch=1, length=length), target, fits=False)


def _first_legal(made: Made, end: End, target: Target, shapes: list[Shape]) -> Judged:
    """Return the first stack that nothing refuses, asking once of each degree; the first refused where all are."""
    first: Judged | None = None
    degrees = {(shape.tensor, shape.pipeline): shape for shape in reversed(shapes)}
    for shape in sorted(degrees.values(), key=shapes.index):
        found = _judge(made, end, shape, target)
        if found.legal:
            return found
        if first is not None and first.refusals == found.refusals and not found.refusals & _of_degrees():
            return first  # what another degree doesn't change
        first = first or found
    assert first is not None  # noqa: S101 - there is a shape
    return first


@cache
def _of_degrees() -> frozenset[str]:
    """Return the codes of what another degree may mend: rules that point at it."""
    return frozenset(rule.id for rule in rules().values() if rule.at == "serve.tensor_parallel")


def _lengths(length: int) -> Iterator[int]:
    """Yield a length, and while nothing fits, half of it."""
    yield length
    while length >= 2 * SHORTEST:
        length //= 2
        yield length


def _shapes(facts: ModelFacts, end: End, target: Target, batches: tuple[int, ...], length: int) -> Iterator[Shape]:
    for tensor, pipeline in end.degrees(facts, target):
        for batch in batches:
            yield Shape(tensor=tensor, pipeline=pipeline, batch=batch, length=length)


def _order(stored: ModelFacts, target: Target) -> Any:
    """Return the key that puts shapes in order: least time per token; of equals the fewest groups, then devices.

    Degrees that only older texts allow come after all others.
    """
    older = set(target.older_tensor_parallel) - set(target.tensor_parallel)

    def key(shape: Shape) -> tuple[bool, float, int, int]:
        return shape.tensor in older, per_token(stored, target, shape), shape.pipeline, shape.devices

    return key


def _fits(facts: ModelFacts, target: Target, shape: Shape) -> bool:
    room = part(target, shape).memory_bytes
    caches = cache_bytes(facts, batch=shape.batch, length=shape.length) * parallel.cache_copies(facts, shape.tensor)
    return room is None or facts.weight_bytes + caches < room


def as_served(facts: ModelFacts, end: End) -> ModelFacts:
    """Return a model as it is served: Neuron's libraries make its weights bfloat16, or int8."""
    if end.engine != "neuron":
        return facts
    size = facts.parameters if "quantization_dtype" in end.fixed else min(facts.weight_bytes, 2 * facts.parameters)
    return facts if size == facts.weight_bytes else replace(facts, weight_bytes=size)


def part(target: Target, shape: Shape) -> Target:
    """Return the part of a target that one copy of the model takes, at its share of the price."""
    return target.part(shape.devices)


def copies(target: Target, shape: Shape) -> int:
    """Return how many copies of a model a target has room for side by side."""
    return target.copies(shape.devices)


def per_token(facts: ModelFacts, target: Target, shape: Shape) -> float:
    """Return the least time per token of a whole target: one sequence's where the batch is one, else all copies'.

    Stages of a pipeline wait for one another while there is one sequence. Bytes where the bandwidth isn't known.
    """
    alone = shape.batch == 1
    at_once = replace(shape, pipeline=1) if alone else shape
    seconds = decode_floor(facts, part(target, at_once), batch=shape.batch, length=shape.length)
    if seconds is None:
        seconds = (facts.first_bytes + cache_bytes(facts, batch=shape.batch, length=shape.length)) / at_once.devices
    return seconds / (1 if alone else shape.batch * copies(target, shape))


def _judge(made: Made, end: End, shape: Shape, target: Target, *, fits: bool = True) -> Judged:
    """Ask the stages and the rules."""
    options = end.options(shape, target)
    done = made.then(("compile", end.engine, options), target) if end.compiled else made
    served = {"engine": SERVERS[end.engine].engine, **options} if not end.compiled else {}
    stack = Stack(
        stages=done.placed,
        target=target,
        model=made.placed[0].before if made.placed else made.facts,
        serve=served,
        gates=("decode_speedup",),
    )
    return Judged(
        before=made, made=done, end=end, shape=shape, target=target, problems=(*done.problems, *check(stack)), fits=fits
    )
