"""Runs on the nodes of a Ray cluster: a task that a node takes with it is done again on another, from where it was.

Ray says where and when, and nothing else: the artifacts go through the shared store, the outputs through the sweep's
folder.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from optikit.errors import UnavailableError
from optikit.execution.child_runs import Outcome, Task, run

LOST_NODES = 8
"""How many nodes a task may lose before it counts as failed."""
STOP_SECONDS = 60.0
MIB = 2**20


class OnRay:
    """Runs tasks on a cluster, as many at a time as its processors, GPUs and memory allow.

    Args:
        address: `auto` for the cluster that this machine belongs to, `local` for one made now, or HOST:PORT.
        cpus: Processors that one run takes; None is all of the smallest node.
        gpus: GPUs that one run takes.

    Raises:
        UnavailableError: There is no Ray here, or no cluster.
    """

    def __init__(self, address: str, *, cpus: int | None, gpus: int) -> None:
        ray = self._ray = _import()
        local = address == "local"
        try:
            ray.init(
                address=None if local else address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            fix = "start one with `ray start --head`, or use --address local"
            raise UnavailableError(f"no Ray cluster at {address!r}: {error}", fix=fix) from None
        self._alive = [node for node in ray.nodes() if node["Alive"]]
        counts = [int(node["Resources"].get("CPU", 0)) for node in self._alive]
        self._cpus, self._gpus = cpus or min((count for count in counts if count), default=1), gpus
        self._memory = max(int(node["Resources"].get("memory", 0)) for node in self._alive)
        self._running: dict[Any, Task] = {}
        self._begun: dict[str, float] = {}
        self._perform = ray.remote(_perform)

    @property
    def slots(self) -> int:
        """See `Runner`."""
        return max(1, sum(self._room(node["Resources"]) for node in self._alive))

    @property
    def nodes(self) -> tuple[str, ...]:
        """See `Runner`."""
        return tuple(
            f"{node['NodeManagerHostname']} {node['NodeID'][:8]}: {node['Resources'].get('CPU', 0):g} processors"
            for node in self._alive
        )

    def _room(self, resources: dict[str, float]) -> int:
        """Return how many tasks a node takes at a time."""
        count = int(resources.get("CPU", 0)) // self._cpus
        return min(count, int(resources.get("GPU", 0)) // self._gpus) if self._gpus else count

    def start(self, task: Task) -> None:
        """See `Runner`."""
        asked = self._perform.options(
            name=task.name,
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            memory=min(task.memory_bytes, self._memory),  # a run refuses by itself what no node can hold
            max_retries=LOST_NODES,
            retry_exceptions=False,
        )
        self._running[asked.remote(task)] = task
        self._begun[task.name] = time.monotonic()

    def ended(self, seconds: float) -> list[Outcome]:
        """See `Runner`."""
        if not self._running:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._outcome(each) for each in done]

    def _outcome(self, each: Any) -> Outcome:
        task = self._running.pop(each)
        try:
            found: Outcome = self._ray.get(each)
        except self._ray.exceptions.TaskCancelledError:
            return Outcome(name=task.name, code=None, seconds=time.monotonic() - self._begun[task.name])
        except self._ray.exceptions.RayError as error:
            if isinstance(getattr(error, "cause", None), KeyboardInterrupt):
                return Outcome(name=task.name, code=None, seconds=time.monotonic() - self._begun[task.name])
            reason = str(error).strip().splitlines()[0]
            return Outcome(name=task.name, code=UnavailableError.code, message=f"its node was lost: {reason}")
        return found

    def stop(self) -> list[Outcome]:
        """See `Runner`."""
        found, deadline = [], time.monotonic() + STOP_SECONDS
        for each in self._running:
            self._ray.cancel(each, force=False)
        while self._running and time.monotonic() < deadline:
            found += self.ended(1.0)
        found += [Outcome(name=task.name, code=None) for task in self._running.values()]
        self._running = {}
        self._ray.shutdown()
        return found


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UnavailableError(
            "Ray isn't installed", fix="pip install 'optikit[ray]', or leave out --address"
        ) from None
    return ray


def _perform(task: Task) -> Outcome:
    """Run a task in a process of Ray's, on the processors that Ray gave it."""
    import ray

    context = ray.get_runtime_context()
    cpus = int(context.get_assigned_resources().get("CPU", 0)) or None
    outcome = run(_with_cpus(task, cpus))
    return Outcome(**{**vars(outcome), "node": f"{outcome.node} {context.get_node_id()[:8]}"})


def _with_cpus(task: Task, cpus: int | None) -> Task:
    return Task(**{**vars(task), "cpus": cpus, "log": Path(task.log)})
