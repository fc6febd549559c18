"""The companion files of an export: the same model, for what wants another form of it."""

from __future__ import annotations

import onnx

from simprune_deploy.onnx.exported_folder import FUSED_MODEL, INLINED_MODEL
from simprune_deploy.onnx.fused_attention import with_fused_attention
from simprune_deploy.onnx.options import ExportOptions
from simprune_deploy.onnx.variants import inlined


def companions(graph: onnx.ModelProto, options: ExportOptions) -> dict[str, onnx.ModelProto]:
    """Return the forms of an exported graph that were asked for, by the name of their file.

    Raises:
        SimpruneError: the graph's attention cannot be fused.
    """
    asked = ((INLINED_MODEL, options.inline, inlined),
             (FUSED_MODEL, options.fused_attention, with_fused_attention))  # fmt: skip
    return {name: made(graph) for name, wanted, made in asked if wanted}
