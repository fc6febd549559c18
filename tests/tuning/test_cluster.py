"""Sweeps on a Ray cluster of this machine: the same table, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.datasets import DataOptions, DataSet, open_data
from simprune_deploy.predict.source import ModelSource, source_of_model
from simprune_deploy.tuning.cluster import RayRunner, connected
from simprune_deploy.tuning.results import Measurement, Setting
from simprune_deploy.tuning.sweep import LocalRunner, Runner, SweepOptions, start_sweep
from simprune_deploy.tuning.sweep_runtimes import runtime_of
from simprune_deploy.tuning.tallies import Models, Shard, ShardResult

MODEL = ROOT / "examples" / "fashion_mnist" / "vit"
IMAGES = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"
SETTINGS = [Setting("ours", threshold, (1, 3, 4)) for threshold in (0.9, 0.8)]
SHARDS = 6


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return source_of_model(str(MODEL), sd.prune(sd.load(MODEL), layers=[1, 3, 4]))


@pytest.fixture(scope="module")
def data(source: ModelSource) -> DataSet:
    return open_data(IMAGES, source.metadata, DataOptions(limit=8 * SHARDS))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayRunner]:
    pytest.importorskip("ray", reason="Ray is not installed")
    with connected("local", cpus=2) as runner:
        yield runner


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simprune_deploy.tuning.sweep.SHARD_IMAGES", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def sweep(
    source: ModelSource, data: DataSet, folder: Path, runner: Runner, resume: bool = False
) -> list[Measurement]:
    backend = runtime_of("torch", source, 8)
    started = start_sweep(
        source, data, backend, folder, SweepOptions(8, 0), runner=runner, resume=resume
    )
    return started.measure(SETTINGS)


@pytest.mark.parametrize("address", ["localhost:1", "tcp://x:1", "://", ":1", "localhost:x"])
def test_addresses_without_a_cluster_are_refused(address: str) -> None:
    with (
        pytest.raises(SimpruneError, match=r"no Ray cluster answers|is no address") as caught,
        connected(address),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_listener_that_is_no_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setattr("simprune_deploy.tuning.cluster.CONNECT_SECONDS", 3.0)
    with socket.create_server(("localhost", 0)) as server:
        threading.Thread(target=_hang_up, args=(server,), daemon=True).start()
        address = f"localhost:{server.getsockname()[1]}"
        with (
            pytest.raises(SimpruneError, match=r"no Ray cluster answers at .* within 3 seconds"),
            connected(address),
        ):
            pass


def _hang_up(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


@pytest.fixture(scope="module")
def alone(
    source: ModelSource, data: DataSet, tmp_path_factory: pytest.TempPathFactory
) -> list[Measurement]:
    """The sweep in this process, in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simprune_deploy.tuning.sweep.SHARD_IMAGES", 8)
        return sweep(source, data, tmp_path_factory.mktemp("alone") / "s", LocalRunner())


class Killing:
    """Runs on the cluster, and kills the process that gave the first result."""

    environment: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, cluster: RayRunner) -> None:
        self.cluster = cluster
        self.killed = 0
        self.processes: list[int] = []
        self.shards: list[int] = []

    def run(
        self, models: Models, data: DataSet, batch: int, shards: Sequence[Shard]
    ) -> Iterator[ShardResult]:
        for result in self.cluster.run(models, data, batch, shards):
            self.processes.append(result.process)
            self.shards.append(result.number)
            if not self.killed:
                self.killed = result.process  # it is at its next shard by now
                os.kill(self.killed, signal.SIGKILL)
            yield result


def test_a_killed_worker_costs_a_retry_and_changes_nothing(
    cluster: RayRunner, source: ModelSource, data: DataSet, alone: list[Measurement], tmp_path: Path
) -> None:
    runner = Killing(cluster)
    together = sweep(source, data, tmp_path / "together", runner)
    assert together == alone
    assert sorted(runner.shards) == list(range(SHARDS))
    assert os.getpid() not in runner.processes
    assert len(set(runner.processes)) >= 2
    with pytest.raises(ProcessLookupError):
        os.kill(runner.killed, 0)  # it is gone, and the sweep was finished without it


def test_what_is_finished_is_not_run_again(
    cluster: RayRunner, source: ModelSource, data: DataSet, alone: list[Measurement], tmp_path: Path
) -> None:
    class Half(LocalRunner):
        def run(
            self, models: Models, data: DataSet, batch: int, shards: Sequence[Shard]
        ) -> Iterator[ShardResult]:
            yield from super().run(models, data, batch, shards[: SHARDS // 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(source, data, tmp_path / "s", Half())
    rest = Killing(cluster)
    rest.killed = -1
    cells = sweep(source, data, tmp_path / "s", rest, resume=True)
    assert sorted(rest.shards) == list(range(SHARDS // 2, SHARDS))
    assert cells == alone


def test_an_error_in_a_worker_is_one_line(
    cluster: RayRunner, source: ModelSource, data: DataSet, tmp_path: Path
) -> None:
    vit = sd.load(MODEL)
    vit.get_parameter("head.bias").data[3] = float("nan")
    with pytest.raises(SimpruneError, match=r"^the model's outputs hold NaN") as caught:
        sweep(
            source_of_model("broken", sd.prune(vit, layers=[1, 3, 4])),
            data,
            tmp_path / "s",
            cluster,
        )
    assert "\n" not in str(caught.value)
