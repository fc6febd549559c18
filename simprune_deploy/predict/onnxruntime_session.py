"""ONNX Runtime on the CPU, as speed is measured with it."""

from __future__ import annotations

from typing import Any


def cpu_session(model: str | bytes, threads: int) -> Any:
    """Return a session for an ONNX file, by its path, or for its bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; it warns of every float16 operator it cannot fold
    # the idle threads of one session must not spin on the cores that another is timed on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
