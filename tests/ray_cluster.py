"""A real Ray cluster on this machine: a head and a worker, each with its own folders and view of the store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "OPTIKIT_PROGRESS": "json",
}
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass
class Node:
    """One node: `ray start --block`, and all that it started."""

    name: str
    home: Path
    process: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """Return all its processes that live."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def runs(self) -> list[str]:
        """Return the recipes that it runs."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "optikit" in words and "run" in words:
                    found.append(words[words.index("run") + 1])
        return found

    def kill(self) -> list[str]:
        """Kill everything of it at once, as when a machine loses its power; return what was killed."""
        doomed = self.processes()
        told = []
        for process in doomed:
            with suppress(psutil.Error):
                process.suspend()  # so that none of them sees another die
        for process in doomed:
            with suppress(psutil.Error):
                told.append(f"{process.pid} {' '.join(process.cmdline())[:90]}")
                process.kill()
        self.process.wait()
        return told


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def two_nodes(work: Path, store: Path, *, cpus: int = 1) -> Iterator[tuple[str, Node, Node]]:
    """Start two nodes; yield the cluster's address, the head and the worker.

    Args:
        work: A short path: Ray puts sockets below it.
        store: What both views lead to.
        cpus: Of each node.
    """
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    nodes: list[Node] = []
    try:
        nodes.append(_start(work, store, "a", cpus, _head(address)))
        _wait(address, 1)  # or the worker gives up
        nodes.append(_start(work, store, "b", cpus, [f"--address={address}"]))
        _wait(address, 2)
        yield address, nodes[0], nodes[1]
    finally:
        for node in reversed(nodes):
            node.kill()


def _start(work: Path, store: Path, name: str, cpus: int, how: list[str]) -> Node:
    home = work / f"view-{name}"
    home.symlink_to(store, target_is_directory=True)
    command = [str(Path(sys.executable).with_name("ray")), "start", *how, f"--num-cpus={cpus}", "--block"]
    command += [f"--temp-dir={work / name}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    environ = os.environ | QUIET | {"OPTIKIT_HOME": str(home)}
    with (work / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    return Node(name=name, home=home, process=process)


def _head(address: str) -> list[str]:
    return ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]


WAIT = """
import sys, time
import ray
address, count, deadline = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
while True:
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        break
    except Exception:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) != count:
    if time.monotonic() > deadline:
        sys.exit(f"not {count} nodes: {ray.nodes()}")
    time.sleep(0.2)
"""


def _wait(address: str, count: int, seconds: float = 120) -> None:
    """Wait until so many nodes belong to a cluster, asked in a process of its own."""
    command = [sys.executable, "-c", WAIT, address, str(count), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TimeoutError(done.stderr[-800:])
