"""What runs a graph in a parity check: ONNX Runtime on the CPU, or engines on a GPU.

The parity check asks every backend the same: the outputs of the graph as it ships, and the outputs
and decisions of the same graph with its decisions shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress
from simprune_deploy.common.versions import package_version
from simprune_deploy.engine import flavours
from simprune_deploy.engine.build import EngineOptions, build_engine
from simprune_deploy.engine.builders import like
from simprune_deploy.engine.engine_metadata import EngineMetadata
from simprune_deploy.engine.gpu import find_gpu
from simprune_deploy.engine.inventory import FoundEngine, engine_to_verify
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.engine.profile import batch_of
from simprune_deploy.onnx.exported_folder import MODEL
from simprune_deploy.onnx.metadata import ModelMetadata
from simprune_deploy.onnx.precision import LARGEST_FLOAT16, emulated, with_ranges
from simprune_deploy.onnx.variants import with_diagnostics, with_function
from simprune_deploy.parity.checks import MAX_TURNED, check_range
from simprune_deploy.parity.tolerance import Tolerance
from simprune_deploy.parity.verdict import Check
from simprune_deploy.predict.records import Array
from simprune_deploy.predict.runners import Inputs, Run, onnxruntime_runner

if TYPE_CHECKING:
    import onnx
    from polygraphy.backend.base import BaseRunner


class Backend(Protocol):
    """Runs a graph for a parity check.

    Attributes:
        title: What runs, for progress.
        batch: The smallest and the largest batch that it takes.
    """

    title: str
    batch: tuple[int, int]

    def environment(self) -> dict[str, Any]:
        """Return what ran on what: "runtime", "gpu", and more."""

    def shipped(self) -> BaseRunner:
        """Return a runner of the graph as it ships."""

    def diagnosed(self) -> BaseRunner:
        """Return a runner of the graph that also shows its decisions."""

    def vouched(self, shipped: Run, diagnosed: Run, tolerance: Tolerance) -> Array:
        """Return bool[n]: the images for which the decisions shown are those of the outputs."""

    def checks(
        self, inputs: Inputs, shipped: Run, diagnosed: Run, tolerance: Tolerance, progress: Progress
    ) -> tuple[Check, ...]:
        """Ask what only this backend has to be asked."""

    def explain(self, error: Exception) -> SimpruneError:
        """Say in one line why it could not run."""


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU.

    Args:
        graph: The graph as it ships.
        metadata: Its own.
    """

    title = "ONNX Runtime"

    def __init__(self, graph: onnx.ModelProto, metadata: ModelMetadata) -> None:
        self._facts = metadata
        self.batch = metadata.batch
        # it has no plugin for a file that leaves the operator to one
        self._graph = with_function(graph)
        # and its CPU provider no bfloat16 kernels
        bf16 = metadata.precision == "bf16"
        self._runnable = emulated(self._graph, "bf16") if bf16 else self._graph

    def environment(self) -> dict[str, Any]:
        how = ["CPU"]
        if self._facts.precision == "bf16":
            how.append("emulating bfloat16")
        if not self._facts.has_function:
            how.append("function put back")
        version = package_version("onnxruntime") or "of unknown version"
        return {"runtime": f"ONNX Runtime {version} ({', '.join(how)})", "gpu": "none used"}

    def shipped(self) -> BaseRunner:
        return onnxruntime_runner(self._runnable.SerializeToString(), "onnxruntime")

    def diagnosed(self) -> BaseRunner:
        shown = with_diagnostics(self._runnable)
        return onnxruntime_runner(shown.SerializeToString(), "onnxruntime")

    def vouched(self, shipped: Run, diagnosed: Run, tolerance: Tolerance) -> Array:
        return np.ones(len(shipped.outputs), bool)  # the same kernels in the same order

    def checks(
        self, inputs: Inputs, shipped: Run, diagnosed: Run, tolerance: Tolerance, progress: Progress
    ) -> tuple[Check, ...]:
        found = []
        if self._facts.precision == "fp16":
            progress("ONNX Runtime, every float16 tensor measured")
            found.append(check_range(self._ranges(inputs), LARGEST_FLOAT16))
        elif self._facts.precision == "bf16":
            found.append(Check("run", None, NOT_RUN))
        if not self._facts.has_function:
            found.append(Check("plugin", None, NO_PLUGIN))
        return tuple(found)

    def _ranges(self, inputs: Inputs) -> dict[str, float]:
        """Return the largest magnitude over all images of every narrow tensor.

        Runtimes may widen float16 to float32 between operators, and so hide what leaves it; here
        every tensor is rounded.
        """
        measured, names = with_ranges(self._graph, self._facts.precision)
        largest = np.zeros(len(names), np.float32)
        with onnxruntime_runner(measured.SerializeToString(), "ranges") as runner:
            for chunk in inputs.mixed():
                found = runner.infer(inputs.feed(chunk, inputs.runtime_threshold))["ranges"]
                largest = np.maximum(largest, np.array(found))
        return dict(zip(names, largest.tolist(), strict=True))

    def explain(self, error: Exception) -> SimpruneError:
        return SimpruneError(f"ONNX Runtime cannot run the graph: {_one_line(error)}")


NOT_RUN = (
    "the bfloat16 file itself was not run: ONNX Runtime's CPU provider has no bfloat16 kernels. "
    "What ran is the same graph with every bfloat16 tensor held in float32 and rounded"
)

NO_PLUGIN = (
    "the file leaves the operator to a plugin, and none was run here: what ran is the same graph "
    "with the operator's function put back"
)


class EngineBackend:
    """Two engines on the GPU: the one that ships, and one of the graph with its decisions shown.

    Args:
        shipped, diagnosis: The engine files.
        metadata: What the metadata of the first says.
        plugin: The library with the plugin that is in them. None: there is none.
        gpu: What the GPU is called, for the verdict.
    """

    def __init__(
        self,
        shipped: Path,
        diagnosis: Path,
        metadata: EngineMetadata,
        plugin: Path | None,
        gpu: str,
    ) -> None:
        self._shipped, self._diagnosis, self._facts = shipped, diagnosis, metadata
        self._plugin, self._gpu = plugin, gpu
        self._errors: list[str] = []
        self.title = metadata.title
        self.batch = batch_of(metadata.profile)

    def environment(self) -> dict[str, Any]:
        metadata = self._facts
        return {
            "runtime": f"{metadata.title} on {self._gpu}, {metadata.engine.file}",
            "gpu": self._gpu,
            "engine": {"file": metadata.engine.file, "sha256": metadata.engine.sha256},
            "plugin": {"file": metadata.plugin.file, "sha256": metadata.plugin.sha256}
            if metadata.plugin
            else None,
            "decisions_from": (
                f"{self._diagnosis.name}: a second engine of the same graph, with its decisions as "
                "outputs; the outputs are the shipped engine's"
            ),
        }

    def shipped(self) -> BaseRunner:
        return self._runner(self._shipped)

    def diagnosed(self) -> BaseRunner:
        return self._runner(self._diagnosis)

    def _runner(self, engine: Path) -> BaseRunner:
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        trt = flavours.load_module(self._facts.flavour)
        runtime = trt.Runtime(flavours.error_logger(trt, self._errors))
        if self._plugin is not None:
            flavours.load_plugin(trt, self._facts.flavour, self._plugin)
        loaded = EngineFromBytes(engine.read_bytes(), runtime=runtime)()
        return TrtRunner(loaded, name=engine.name)

    def vouched(self, shipped: Run, diagnosed: Run, tolerance: Tolerance) -> Array:
        return images_alike(shipped, diagnosed, tolerance)

    def checks(
        self, inputs: Inputs, shipped: Run, diagnosed: Run, tolerance: Tolerance, progress: Progress
    ) -> tuple[Check, ...]:
        found = [check_same_engine(shipped, diagnosed, tolerance)]
        if self._facts.precision == "fp16":
            found.append(Check("range", None, NOT_MEASURED))
        return tuple(found)

    def explain(self, error: Exception) -> SimpruneError:
        why = self._errors[-1] if self._errors else _one_line(error)
        return SimpruneError(f"{self._facts.title} cannot run {self._facts.engine.file}: {why}")


NOT_MEASURED = (
    "what lies between an engine's layers is not seen; the parity check in ONNX Runtime measures "
    "every "
    "float16 tensor of the graph"
)


def images_alike(shipped: Run, diagnosed: Run, tolerance: Tolerance) -> Array:
    """Return bool[n]: the images to which two engines of one graph give the same outputs."""
    limit = tolerance.largest(diagnosed.outputs)
    apart = np.abs(shipped.outputs - diagnosed.outputs).reshape(len(shipped.outputs), -1).max(1)
    return np.asarray(apart <= limit)  # not where it is NaN


def check_same_engine(shipped: Run, diagnosed: Run, tolerance: Tolerance) -> Check:
    """Ask whether the engine that shows its decisions stands for the one that ships.

    A builder fuses and orders each graph by itself, so that a close call may fall otherwise in
    one of them. Such an image is counted as one with other decisions.
    """
    alike = images_alike(shipped, diagnosed, tolerance)
    apart = np.abs(shipped.outputs - diagnosed.outputs)
    passed = bool(np.isfinite(apart).all() and alike.mean() >= 1 - MAX_TURNED)
    return Check(
        "same_engine",
        passed,
        f"the engine that shows its decisions gives the shipped one's outputs on {alike.sum()} of "
        f"{len(alike)} images",
        {
            "images": len(alike),
            "alike": int(alike.sum()),
            "tolerance": tolerance.largest(diagnosed.outputs),
            "largest_difference": float(apart.max()) if np.isfinite(apart).all() else None,
        },
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def choose_backend(
    target: Path, plugin: str | Path | None, progress: Progress
) -> tuple[Backend, Path]:
    """Return what runs an engine in a parity check, and the exported folder that it belongs to.

    Args:
        target: The folder, whose engine for this machine is taken, or an engine.
        plugin: The library of the plugin that is in the engine. Default: looked for.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: no engine fits this machine, or the one that shows its decisions cannot be
            built.
    """
    library = Path(plugin) if plugin is not None else None
    found, folder = engine_to_verify(target, library)
    return _engine_backend(found, library, progress), folder


def _engine_backend(found: FoundEngine, plugin: Path | None, progress: Progress) -> Backend:
    """Build the engine that shows its decisions, if need be, and return what runs both."""
    metadata = found.metadata
    assert metadata is not None
    # before anything imports Polygraphy, which then chooses between the flavours
    flavours.choose_for_polygraphy(metadata.flavour)
    folder = found.path.absolute().parent.parent
    library = find_library(folder, plugin) if metadata.plugin is not None else None
    gpu = find_gpu()
    options = EngineOptions.like(metadata)
    diagnosis = build_engine(
        folder / MODEL, like(metadata, gpu, library), options, of="diagnosis", progress=progress
    )
    from simprune_deploy.parity.backends import EngineBackend

    described = f"{gpu.name} (SM {gpu.compute_capability[0]}.{gpu.compute_capability[1]})"
    return EngineBackend(found.path, diagnosis.path, metadata, library, described)
