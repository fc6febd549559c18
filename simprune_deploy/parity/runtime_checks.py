"""What only one kind of runtime has to be asked in a parity check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.progress import Progress
from simprune_deploy.onnx.precision import LARGEST_FLOAT16, with_ranges
from simprune_deploy.parity.checks import MAX_TURNED, check_range
from simprune_deploy.parity.runs import Inputs, Run
from simprune_deploy.parity.tolerance import Tolerance
from simprune_deploy.parity.verdict import Check
from simprune_deploy.predict.onnx_predictor import OnnxPredictor, open_session
from simprune_deploy.predict.predictor import one_or_each
from simprune_deploy.predict.records import Array

if TYPE_CHECKING:
    from simprune_deploy.predict.predictor import Predictor

NOT_RUN = (
    "the bfloat16 file itself was not run: ONNX Runtime's CPU provider has no bfloat16 kernels. "
    "What ran is the same graph with every bfloat16 tensor held in float32 and rounded"
)

NO_PLUGIN = (
    "the file leaves the operator to a plugin, and none was run here: what ran is the same graph "
    "with the operator's function put back"
)

NOT_MEASURED = (
    "what lies between an engine's layers is not seen; the parity check in ONNX Runtime measures "
    "every "
    "float16 tensor of the graph"
)


def same_outputs(predictor: Predictor, shown: Run, shipped: Run, tolerance: Tolerance) -> Array:
    """Return bool[n]: the images for which the decisions shown are those behind the outputs."""
    if not predictor.decides_elsewhere:
        return np.ones(len(shipped.outputs), bool)  # the same kernels in the same order
    return images_alike(shipped, shown, tolerance)


def runtime_checks(
    predictor: Predictor,
    inputs: Inputs,
    shipped: Run,
    shown: Run,
    tolerance: Tolerance,
    progress: Progress,
) -> tuple[Check, ...]:
    """Ask what only this runtime has to be asked.

    Args:
        predictor: What ran.
        inputs: The images.
        shipped: The run of the graph as it ships.
        shown: The run with the decisions.
        tolerance: For outputs.
        progress: Called with a word on what runs.
    """
    precision = predictor.metadata.precision
    if not isinstance(predictor, OnnxPredictor):
        found = [check_same_engine(shipped, shown, tolerance)]
        if precision == "fp16":
            found.append(Check("range", None, NOT_MEASURED))
        return tuple(found)
    found = []
    if precision == "fp16":
        progress("ONNX Runtime, every float16 tensor measured")
        found.append(check_range(_ranges(predictor, inputs), LARGEST_FLOAT16))
    elif precision == "bf16":
        found.append(Check("run", None, NOT_RUN))
    if not predictor.metadata.has_function:
        found.append(Check("plugin", None, NO_PLUGIN))
    return tuple(found)


def _ranges(predictor: OnnxPredictor, inputs: Inputs) -> dict[str, float]:
    """Return the largest magnitude over all images of every narrow tensor.

    Runtimes may widen float16 to float32 between operators, and so hide what leaves it; here
    every tensor is rounded.
    """
    measured, names = with_ranges(predictor.graph, predictor.metadata.precision)
    session = open_session(measured.SerializeToString(), predictor.spec)
    largest = np.zeros(len(names), np.float32)
    for chunk in inputs.mixed():
        feed: dict[str, Any] = {"images": inputs.images[chunk]}
        if predictor.metadata.export["runtime_threshold"]:
            feed["threshold"] = one_or_each(inputs.thresholds[chunk])
        largest = np.maximum(largest, session.run(["ranges"], feed)[0])
    return dict(zip(names, largest.tolist(), strict=True))


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
            "largest_difference": float(apart.max()),
        },
    )
