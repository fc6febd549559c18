"""How an exported graph is to look, as what a user says of it. Imports no torch."""

from __future__ import annotations

import dataclasses

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.requests import batch_range, check_whole
from simprune_deploy.onnx.function_body import MAX_OPSET, MIN_OPSET
from simprune_deploy.onnx.metadata import FLOAT32_NCHW, UINT8_NHWC, InputForm, check_input
from simprune_deploy.onnx.precision import Precision, check_precision

COMPANION_FIELDS = ("inline", "fused_attention")
"""The options that are about other files than the model, which says nothing of them."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What the exported graph looks like, beside the model itself.

    Args:
        opset: ONNX opset, 18 to 23. Default 20, the first with a native Gelu.
        batch: Smallest and largest batch; one number, or equal ones, make the batch static. Default
            1 to 8.
        runtime_threshold: Make the threshold a graph input, float32[1] or one per image.
        normalize: Take pixels in [0, 1] and put mean and deviation into the graph.
        input: "float32-nchw" (the default), or "uint8-nhwc": images as a camera gives them,
            uint8[B, H, W, C], which the graph converts, scales by 1/255 and normalizes. The second
            implies `normalize`.
        softmax: Give probabilities instead of logits.
        log_size_in_keys: Let attention read the log-sizes as a channel of the keys, which is
            faster on a CPU. False adds them to the scores, the form that GPU kernels fuse, and
            in float32 whatever the precision. Default (None): True in "fp32", else False.
        emit_assignments: Add an output ``assignment_<block>`` int64[B, N] per prune layer.
        opt_tokens: TensorRT's hint for each prune layer: how many tokens usually stay, with the
            prefix tokens. It changes no result. Default (): :func:`simprune_deploy.export` counts
            them on the pictures of the parity check, where counts are dynamic; without that check
            a guess.
        precision: "fp32", "fp16" or "bf16": the types in the graph; see docs/precision.md. Inputs
            and outputs stay float32. Default (None): what suits the targets, "fp16" where one of
            them builds its engine with TensorRT itself (a Jetson), else "fp32".
        inline: Write model-inlined.onnx too: the model in standard operators, without the function.
        fused_attention: Write model-fused.onnx too: every block's attention as ONNX Runtime's
            MultiHeadAttention, for a GPU. Not in "bf16".

    Raises:
        SimpruneError: a value is out of its range.
    """

    opset: int = 20
    batch: tuple[int, int] = (1, 8)
    runtime_threshold: bool = False
    normalize: bool = False
    softmax: bool = False
    emit_assignments: bool = False
    log_size_in_keys: bool | None = None
    precision: Precision | None = None
    opt_tokens: tuple[int, ...] = ()
    input: InputForm = FLOAT32_NCHW
    inline: bool = False
    fused_attention: bool = False

    @property
    def companions(self) -> tuple[str, ...]:
        """The fields that ask for another file beside the model."""
        return tuple(name for name in COMPANION_FIELDS if getattr(self, name))

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_precision(self.precision)
        check_input(self.input)
        if self.fused_attention and self.precision == "bf16":
            raise InvalidArgumentError(
                f"{argument('fused_attention', True)} is for fp32 and fp16, and the model is bf16: "
                f"drop it, or use {argument('precision', 'fp16')}"
            )
        if self.input == UINT8_NHWC:
            object.__setattr__(self, "normalize", True)
        if self.log_size_in_keys is None and self.precision is not None:
            object.__setattr__(self, "log_size_in_keys", self.precision == "fp32")
        object.__setattr__(self, "batch", batch_range(self.batch))
        check_whole("opset", self.opset, 1)
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise InvalidArgumentError(
                f"opset {self.opset} is outside [{MIN_OPSET}, {MAX_OPSET}]: use "
                f"{argument('opset', 20)}"
            )

    def decided(self, usual: Precision = "fp32") -> ExportOptions:
        """Return the same with a precision: the one asked for, or else the usual one."""
        return self if self.precision is not None else dataclasses.replace(self, precision=usual)
