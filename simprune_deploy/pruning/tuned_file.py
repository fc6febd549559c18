"""The file in which ``tune`` leaves what it found, as ``export`` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.pruning.calibrated_curve import CalibratedCurve

FORMAT = 1
MOST_BYTES = 1 << 26


def read_configuration(path: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the arguments of :func:`simprune_deploy.prune` that such a file holds.

    Beside them, TensorRT's size hints for its prune layers (``ExportOptions.opt_tokens``).

    Raises:
        ArtifactError: it is missing, or no configuration of ours.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, and this version reads {FORMAT}")
        pruning = values["pruning"]
        tokens = pruning["tokens"]
        hints = tuple(int(each["opt_tokens"]) for each in values["calibration"]["size_hints"])
        arguments = {
            "threshold": float(pruning["threshold"]),
            "layers": [int(layer) for layer in pruning["layers"]],
            "selection": str(pruning["selection"]),
            "reduction": str(pruning["reduction"]),
            "place": str(pruning["place"]),
            "features": str(pruning["features"]),
            "proportional_attention": bool(pruning["proportional_attention"]),
            "tokens": "dynamic" if tokens == "dynamic" else [int(count) for count in tokens],
            "multiple_of": int(pruning["multiple_of"]),
        }
        if (curve := pruning.get("curve")) is not None:
            arguments["curve"] = CalibratedCurve.from_dict(curve)
        return arguments, hints
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no configuration that `simprune-deploy tune` wrote ({error!r})"
        ) from error
