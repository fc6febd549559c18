"""An exported graph in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from typing import Any, Literal

import numpy as np

from simprune_deploy.common.errors import RequirementError, ToolFailedError
from simprune_deploy.predict.predictor import (
    BatchAnswer,
    Form,
    Predictor,
    Provider,
    RuntimeInfo,
    counted,
    decisions_shown,
    graph_inputs,
)
from simprune_deploy.predict.records import Array

PROVIDERS: dict[Provider, tuple[str, str]] = {"cpu": ("CPUExecutionProvider", "CPU")}
"""By name: ONNX Runtime's own name for it, and what it computes on."""

Shows = Literal["nothing", "counts", "decisions"]


@dataclasses.dataclass(frozen=True)
class OnnxSpec:
    """A graph for ONNX Runtime, as it travels to the process that runs it.

    Attributes:
        graph: As it ships, serialized; with the operator's function or without.
        form: Default "pruned".
        provider: Default "cpu".
        threads: Cores to compute with. Default None: OMP_NUM_THREADS, or all of them.
        keep_memory: Whether ONNX Runtime may keep memory for the next run. Default True; False
            shows what a run needs.
        fused: Attention as ``com.microsoft.MultiHeadAttention``. Default False.
    """

    graph: bytes
    form: Form = "pruned"
    provider: Provider = "cpu"
    threads: int | None = None
    keep_memory: bool = True
    fused: bool = False

    @functools.cached_property
    def key(self) -> str:
        digest = hashlib.sha256(self.graph).hexdigest()
        return (
            f"{digest} {self.form} {self.provider} {self.threads} {self.keep_memory} {self.fused}"
        )

    def open(self) -> Predictor:
        return OnnxPredictor(self)


class OnnxPredictor(Predictor):
    """An exported graph, or the dense model out of it, in ONNX Runtime.

    What runs is the file, but for four things that :attr:`runtime` notes: the operator's function
    is put back where the file leaves it to a plugin; bfloat16, for which the CPU provider has no
    kernels, is emulated by rounding float32; attention is fused where that is asked for; and where
    counts or decisions are asked for, the graph has them as outputs too.

    Args:
        spec: What to open.

    Raises:
        RequirementError: ONNX Runtime is not installed.
        ToolFailedError: it does not load the graph.
    """

    def __init__(self, spec: OnnxSpec) -> None:
        import onnx

        from simprune_deploy.onnx.fused_attention import with_fused_attention
        from simprune_deploy.onnx.metadata import read_metadata
        from simprune_deploy.onnx.precision import emulated
        from simprune_deploy.onnx.variants import dense, pruned_layers, with_function

        self.spec = spec
        shipped = onnx.load_from_string(spec.graph)
        metadata = read_metadata(shipped)
        pruned = spec.form == "pruned"
        graph = with_function(shipped) if pruned else dense(shipped)
        if spec.fused:
            graph = with_fused_attention(graph)
        self.emulates = metadata.precision == "bf16"
        #: the graph as it ships, whole: with its function, in its own precision
        self.graph = graph
        self._runnable = emulated(graph, "bf16") if self.emulates else graph
        notes = ["emulating bfloat16"] if self.emulates else []
        if pruned and not metadata.has_function:
            notes.append("function put back")
        if spec.fused:
            notes.append("attention fused")
        runtime = RuntimeInfo("ONNX Runtime", _version(), PROVIDERS[spec.provider][1], tuple(notes))
        layers = pruned_layers(graph) if pruned else ()
        super().__init__(metadata, spec.form, runtime, metadata.batch, layers)
        self._takes_threshold = pruned and bool(metadata.export["runtime_threshold"])
        self.fixed_threshold = pruned and not self._takes_threshold
        self._sessions: dict[Shows, Any] = {}

    def prepare(self, images: Array, threshold: float | None = None) -> Any:
        self._session("nothing")
        return self._feed(images, self.thresholds(threshold, 1))

    def run(self, prepared: Any) -> float | None:
        self._session("nothing").run(None, prepared)
        return None

    def close(self) -> None:
        self._sessions.clear()

    def _run_batch(
        self, images: Array, limits: Array | None, counts: bool, decisions: bool
    ) -> BatchAnswer:
        from simprune_deploy.onnx.variants import DIAGNOSTICS, diagnostic_name, kept_name

        shows: Shows = "decisions" if decisions else "counts" if counts else "nothing"
        session = self._session(shows if self.layers else "nothing")
        names = [self.metadata.output]
        if shows == "counts":
            names += [kept_name(layer) for layer in self.layers]
        if decisions:
            names += [diagnostic_name(layer, what) for layer in self.layers for what in DIAGNOSTICS]
        try:
            found = dict(zip(names, session.run(names, self._feed(images, limits)), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise _failed(error) from error
        kept = None
        prefix = self.metadata.num_prefix_tokens
        traces = decisions_shown(found, self.layers) if decisions else None
        if shows == "counts" and self.layers:
            kept = np.stack([found[kept_name(layer)] for layer in self.layers], 1) - prefix
        elif counts and traces:
            assignments = [trace["assignment"] for trace in traces.values()]
            kept = counted(assignments, prefix, self.metadata.num_patches)
        return BatchAnswer(found[self.metadata.output], kept, traces)

    def _feed(self, images: Array, limits: Array | None) -> dict[str, Array]:
        return graph_inputs(images, limits if self._takes_threshold else None)

    def _session(self, shows: Shows) -> Any:
        """Return the session of a form of the graph, made when it is first asked for."""
        from simprune_deploy.onnx.variants import with_diagnostics, with_kept_counts

        if shows not in self._sessions:
            graph = self._runnable
            if shows == "counts":
                graph = with_kept_counts(graph)
            elif shows == "decisions":
                graph = with_diagnostics(graph)
            self._sessions[shows] = open_session(graph.SerializeToString(), self.spec)
        return self._sessions[shows]


def open_session(graph: bytes, spec: OnnxSpec | None = None) -> Any:
    """Return an ONNX Runtime session, as the spec of a predictor has it.

    Raises:
        RequirementError: ONNX Runtime is not installed.
        ToolFailedError: it does not load the graph.
    """
    spec = spec or OnnxSpec(b"")
    try:
        import onnxruntime
    except ImportError as error:
        raise RequirementError(
            f"onnxruntime does not load ({error}): pip install onnxruntime",
            what="onnxruntime",
            remedy="pip install onnxruntime",
        ) from None
    options = onnxruntime.SessionOptions()
    threads = spec.threads
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; it warns of every float16 operator it cannot fold
    # an arena, or a block planned for the largest shapes, would hide what a run needs
    options.enable_cpu_mem_arena = options.enable_mem_pattern = spec.keep_memory
    # the idle threads of one session must not spin on the cores that another runs on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=[PROVIDERS[spec.provider][0]])
    except Exception as error:  # its errors have no base of their own
        raise _failed(error) from error


def _failed(error: Exception) -> ToolFailedError:
    said = " ".join(str(error).split())[:400]
    return ToolFailedError(f"ONNX Runtime cannot run the graph: {said}", what="ONNX Runtime")


def _version() -> str:
    from simprune_deploy.common.versions import package_version

    return package_version("onnxruntime") or "of unknown version"
