"""Shards on a Ray cluster: the same code as on one machine, and the same result.

A worker that is lost costs its shard another try. Nothing here is imported without ``--ray``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    RequirementError,
    SimpruneError,
    ToolFailedError,
    argument,
)
from simprune_deploy.tuning.tallies import Models, Shard, ShardResult, evaluate_shard

if TYPE_CHECKING:
    from simprune_deploy.evaluate.datasets import DataSet

RETRIES = 3
"""How often a shard is tried again after its worker was lost."""

ANSWER_SECONDS = 5.0
CONNECT_SECONDS = 60.0
DEFAULT_PORTS = {"": 6379, "ray": 10001}
PACKAGES = ("simprune-deploy", "numpy", "pillow", "timm", "torch", "onnxruntime")


class RayRunner:
    """Runs shards as tasks of a cluster that :func:`connected` joined.

    Args:
        address: As the user gave it.
        cpus: Of the cluster.
        nodes: Machines in it.
    """

    def __init__(self, address: str, cpus: int, nodes: int) -> None:
        self.cpus = cpus
        machines = f"{nodes} machine{'s' if nodes != 1 else ''}"
        self.environment: dict[str, Any] = {
            "ray": f"{machines}, {cpus} cores, joined by {address!r}",
            "timed on": "the machine of the command, alone, after the cluster's work",
        }

    def run(
        self, models: Models, data: DataSet, batch: int, shards: Sequence[Shard]
    ) -> Iterator[ShardResult]:
        """Yield the shards' results as they come.

        Raises:
            SimpruneError: a shard failed, or its workers were lost again and again.
        """
        import ray

        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_run_shard)
        common = [ray.put(each) for each in (_versions(), models, data)]
        left = list(reversed(shards))
        running: list[Any] = []
        while left or running:
            # a few more than there are cores, so that none waits, and no more, for memory's sake
            while left and len(running) < self.cpus + 2:
                running.append(task.remote(*common, batch, left.pop()))
            finished, running = ray.wait(running, num_returns=1)
            yield _result(finished[0])


def _result(reference: Any) -> ShardResult:
    import ray

    try:
        found: ShardResult = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, SimpruneError):
            raise ToolFailedError(str(cause)) from error
        text = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise ToolFailedError(f"a worker of the cluster failed: {text}") from error
    except ray.exceptions.RayError as error:
        raise ToolFailedError(
            f"a worker of the cluster was lost {RETRIES + 1} times on the same shard "
            f"({type(error).__name__}): what is finished is kept, go on with "
            f"{argument('resume', True)}"
        ) from error


def _run_shard(
    versions: dict[str, str], models: Models, data: DataSet, batch: int, shard: Shard
) -> ShardResult:
    """Run in a worker."""
    here = _versions()
    if here != versions:
        name = next(name for name in versions if here[name] != versions[name])
        raise ToolFailedError(
            f"a worker has {name} {here[name]} and the command {versions[name]}: results could "
            "differ, install the same"
        )
    return evaluate_shard(models, data, batch, shard)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@contextlib.contextmanager
def connected(address: str, cpus: int | None = None) -> Iterator[RayRunner]:
    """Join a cluster while the block runs.

    Args:
        address: "host:port" or "ray://host:port" of a cluster, "auto" for the one that this
            machine belongs to, "local" to start one here.
        cpus: Cores to use with "local". Default: all.

    Raises:
        SimpruneError: Ray is not installed, or no cluster answers.
    """
    if address not in ("auto", "local"):
        _check_answers(address)
    # nobody was asked whether Ray may report home
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    try:
        import ray
    except ImportError:
        raise RequirementError(
            'Ray is not installed: pip install "simprune-deploy[ray]", or leave '
            f"{argument('ray')} out"
        ) from None
    if address != "local":
        _check_connects(address)
    own = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="critical", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        text = " ".join(str(error).split())[:200]
        raise ToolFailedError(
            f"no Ray cluster answers at {address!r} ({text}): {_START}"
        ) from error
    try:
        total = int(ray.cluster_resources().get("CPU", 1))
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        yield RayRunner(address, max(1, total), nodes)
    finally:
        ray.shutdown()


_START = f"start one with `ray start --head`, or leave {argument('ray')} out"


def _check_connects(address: str) -> None:
    """Join in a process of its own first: at a listener that is not Ray it would wait for long."""
    join = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='critical')"
    command = [sys.executable, "-c", join, address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONNECT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ToolFailedError(
            f"no Ray cluster answers at {address!r} within {CONNECT_SECONDS:g} seconds: {_START}"
        ) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ToolFailedError(
            f"no Ray cluster answers at {address!r} ({lines[-1][:200]}): {_START}"
        )


def _check_answers(address: str) -> None:
    """Refuse an address at which nothing listens, before Ray waits for it for minutes."""
    scheme, separator, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":") if ":" in rest else (rest, "", "")
    if scheme not in DEFAULT_PORTS or (separator and not scheme) or not host:
        raise InvalidArgumentError(
            f"{argument('ray')} {address!r} is no address: write host:port, ray://host:port, auto "
            f"or local"
        )
    try:
        number = int(port) if port else DEFAULT_PORTS[scheme]
        with socket.create_connection((host, number), timeout=ANSWER_SECONDS):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise ToolFailedError(
            f"no Ray cluster answers at {address!r} ({error}): {_START}"
        ) from error
