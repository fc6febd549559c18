"""A pruned model in, an ONNX model out: one SimilarityPrune node a prune layer, one function."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import nn

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    UnsupportedModelError,
    argument,
)
from simprune_deploy.common.images import fit_to_channels
from simprune_deploy.common.versions import __version__
from simprune_deploy.onnx.dynamic_counts import SLOTS, separate_token_counts
from simprune_deploy.onnx.function_body import (
    ATTRIBUTES,
    DOMAIN,
    DOMAIN_VERSION,
    INPUTS,
    NAMING_ATTRIBUTES,
    OP_TYPE,
    OUTPUTS,
)
from simprune_deploy.onnx.metadata import (
    UINT8_NHWC,
    ModelMetadata,
    write_metadata,
)
from simprune_deploy.onnx.names import make_readable
from simprune_deploy.onnx.options import COMPANION_FIELDS, ExportOptions
from simprune_deploy.onnx.precision import with_precision
from simprune_deploy.onnx.variants import (
    function_of,
    num_outputs,
    prune_nodes,
    set_size_hints,
    with_log_size_in_keys,
)
from simprune_deploy.pruning.model import PrunedViT, PruneTrace, describe_vit

IMAGES, THRESHOLD = "images", "threshold"
TRACED_SLOTS = 101
"""A token count for tracing, unlike any other size in a model."""

MAX_ONNX_BYTES = 2_000_000_000
"""Protobuf files end at 2 GiB; a little is left for the graph."""


class _TracedViT(PrunedViT):
    """The model with the operator in the form in which it is traced."""

    slots: torch.Tensor | None = None

    def _operator(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
        **values: Any,
    ) -> tuple[torch.Tensor, ...]:
        if values["capacity"]:
            return super()._operator(tokens, features, log_size, threshold, **values)
        return traced_prune(tokens, features, log_size, threshold, self.slots, **values)


class _ExportedModel(nn.Module):
    """The pruned model between the graph's inputs and outputs."""

    threshold: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: PrunedViT, options: ExportOptions) -> None:
        super().__init__()
        self.model = _TracedViT(model.vit, model.config)
        self.options = options
        self.register_buffer(
            "threshold", torch.tensor([model.config.threshold], dtype=torch.float32)
        )
        if options.normalize:
            preprocessing = _described(model)["preprocessing"]
            for name in ("mean", "std"):
                values = torch.tensor(preprocessing[name])
                self.register_buffer(name, values.view(1, -1, 1, 1))

    def forward(
        self,
        images: torch.Tensor,
        threshold: torch.Tensor | None,
        slots: torch.Tensor | None,
    ) -> Any:
        self.model.slots = slots
        if self.options.input == UINT8_NHWC:
            # converted first: TensorRT takes uint8 as an input alone, and casts it to floats only
            images = images.to(torch.float32).permute(0, 3, 1, 2) / 255
        if self.options.normalize:
            images = (images - self.mean) / self.std
        # a curve's tolerances at a threshold that is fixed are constants
        fixed = None if self.model.config.curve is not None else self.threshold
        limit = fixed if threshold is None else threshold
        traces: list[PruneTrace] = []
        output = self.model(images, threshold=limit, traces=traces)
        if self.options.softmax:
            output = output.softmax(-1)
        if self.options.emit_assignments:
            return (output, *(trace.assignment for trace in traces))
        return output


@torch.library.custom_op("simprune::traced_prune", mutates_args=())
def traced_prune(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    slots: torch.Tensor,
    num_prefix_tokens: int,
    selection: str,
    reduction: str,
    capacity: int,
    multiple_of: int,
    opt_tokens: int,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator as it is traced: the length of `slots` stands for the token count K.

    :mod:`simprune_deploy.onnx.dynamic_counts` says why, and takes `slots` out again.
    """
    raise RuntimeError("traced_prune is for tracing only")


@traced_prune.register_fake
def _(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    slots: torch.Tensor,
    num_prefix_tokens: int,
    selection: str,
    reduction: str,
    capacity: int,
    multiple_of: int,
    opt_tokens: int,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_tokens, dim = tokens.shape
    count = slots.shape[0]
    return (
        tokens.new_empty(batch, count, dim),
        log_size.new_empty(batch, count),
        tokens.new_empty((batch, count), dtype=torch.int64),
        tokens.new_empty((batch, num_tokens), dtype=torch.int64),
    )


def output_names(model: PrunedViT, options: ExportOptions) -> list[str]:
    """Return the names of the graph's outputs, the main one first."""
    if options.softmax:
        main = "probabilities"
    else:
        main = "logits" if model.vit.num_classes else "features"
    layers = model.config.layers if options.emit_assignments else ()
    return [main, *(f"assignment_{layer}" for layer in layers)]


def is_dense(model: PrunedViT, options: ExportOptions) -> bool:
    """Tell whether nothing can ever be pruned, so that the graph needs no prune nodes."""
    config = model.config
    return not config.layers or not (options.runtime_threshold or config.prunes)


def export_onnx(model: PrunedViT, options: ExportOptions | None = None) -> onnx.ModelProto:
    """Trace a pruned model and return it as ONNX, checked.

    The model is put into eval mode and back. A threshold above 1 that is fixed, or no prune
    layers, gives the dense model without prune nodes.

    Raises:
        SimpruneError: the model is too large for one file, or not float32 on the CPU.
    """
    options = (options or ExportOptions()).decided()
    _check_exportable(model)
    if options.softmax and not model.vit.num_classes:
        raise InvalidArgumentError(
            f"{argument('softmax', True)} is for classes, and the model gives features: drop it"
        )
    if options.softmax and model.vit.num_classes == 1:
        raise InvalidArgumentError(
            f"{argument('softmax', True)} over one output is 1 for every image: drop it, and take "
            "the logistic function of the logit behind the model"
        )
    if is_dense(model, options):
        dense = dataclasses.replace(model.config, layers=(), capacities=())
        exported = PrunedViT(model.vit, dense)
    else:
        exported = model
    wrapper = _ExportedModel(exported, options)
    was_training = model.training
    try:
        wrapper.eval()
        with _unfused_attention(wrapper), quiet_exporter(), _no_collections(), torch.no_grad():
            graph = _trace(wrapper, exported, options)
    finally:
        wrapper.train(was_training)
    metadata = metadata_of_model(exported, options)
    _add_function(graph, metadata)
    if options.input == UINT8_NHWC:
        _cast_first(graph.graph)
    make_readable(graph, exported.config, {IMAGES: "batch", THRESHOLD: "thresholds"})
    if options.log_size_in_keys:
        graph = with_log_size_in_keys(graph)
    write_metadata(graph, metadata)
    if options.opt_tokens and exported.config.layers:
        set_size_hints(graph, options.opt_tokens)
    graph = with_precision(graph, metadata.precision)
    graph.producer_name = "simprune-deploy"
    graph.producer_version = __version__
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _check_exportable(model: PrunedViT) -> None:
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    if size > MAX_ONNX_BYTES:
        raise UnsupportedModelError(
            f"the weights take {size / 1e9:.1f} GB and an ONNX file holds at most "
            f"{MAX_ONNX_BYTES / 1e9:.0f} GB: use a smaller architecture"
        )
    if kinds := {str(p.dtype) for p in parameters if p.dtype != torch.float32}:
        raise UnsupportedModelError(
            f"the model is {', '.join(kinds)}: export it as float32 (model.float())"
        )
    if devices := {p.device.type for p in parameters if p.device.type != "cpu"}:
        raise UnsupportedModelError(f"the model is on {', '.join(devices)}: export it from the CPU")


@contextlib.contextmanager
def _unfused_attention(model: nn.Module) -> Iterator[None]:
    """Use timm's written-out attention: its fused path does not trace with a data-dependent K."""
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress and advice away from the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    others = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [(each, each.level) for each in (logger, *others)]
    try:
        for each, _ in levels:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in levels:
            each.setLevel(level)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Pause the garbage collector, which takes a tenth of the time that tracing takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _trace(wrapper: _ExportedModel, model: PrunedViT, options: ExportOptions) -> onnx.ModelProto:
    low, high = options.batch
    dynamic = high > low
    size = 2 if dynamic else low
    layers = () if model.config.capacities else model.config.layers
    images = torch.zeros(size, model.channels, *model.image_size)
    if options.input == UINT8_NHWC:
        images = images.permute(0, 2, 3, 1).contiguous().to(torch.uint8)
    # with a curve the images' token counts meet the thresholds: traced as one for each image
    one_each = model.config.curve is not None and bool(layers)
    thresholds = torch.full((size if one_each else 3,), model.config.threshold)
    threshold = thresholds if options.runtime_threshold else None
    slots = torch.zeros(TRACED_SLOTS) if layers else None
    batch = {0: torch.export.Dim("batch")} if dynamic else None
    any_number = batch if one_each else {0: torch.export.Dim("thresholds")}
    shapes = {
        "images": batch,
        "threshold": any_number if threshold is not None else None,
        "slots": {0: torch.export.Dim("tokens", min=2)} if slots is not None else None,
    }
    names = [IMAGES, *([THRESHOLD] if threshold is not None else [])]
    names += [SLOTS] if slots is not None else []
    program = torch.onnx.export(
        wrapper,
        (images, threshold, slots),
        dynamo=True,
        opset_version=options.opset,
        dynamic_shapes=shapes,
        input_names=names,
        output_names=output_names(model, options),
        custom_translation_table={
            torch.ops.simprune.similarity_prune.default: _onnx_operator(traced=False),
            torch.ops.simprune.traced_prune.default: _onnx_operator(traced=True),
        },
        external_data=False,
        verbose=False,
    )
    assert program is not None
    if slots is not None:
        separate_token_counts(program.model, layers)
    graph = program.model_proto
    if threshold is not None and one_each:
        _allow_one_threshold(graph.graph)
    return graph


def _allow_one_threshold(graph: onnx.GraphProto) -> None:
    """Let one threshold do for all images where it was traced as one for each.

    What is made of thresholds alone then has another size than was traced, and loses it.
    """
    source = next(value for value in graph.input if value.name == THRESHOLD)
    source.type.tensor_type.shape.dim[0].dim_param = "thresholds"
    weights = {each.name for each in graph.initializer}
    made = {THRESHOLD}
    for node in graph.node:
        read = [name for name in node.input if name not in weights]
        if read and all(name in made for name in read):
            made.update(node.output)
    kept = [info for info in graph.value_info if info.name not in made]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _schema() -> onnx.defs.OpSchema:
    formal = onnx.defs.OpSchema.FormalParameter
    attribute = onnx.defs.OpSchema.Attribute
    kinds = onnx.defs.OpSchema.AttrType
    strings = ("reduction", "selection")
    return onnx.defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[
            formal(INPUTS[0], "T"),
            formal(INPUTS[1], "T"),
            formal(INPUTS[2], "tensor(float)"),
            formal(INPUTS[3], "tensor(float)"),
        ],
        outputs=[
            formal(OUTPUTS[0], "T"),
            formal(OUTPUTS[1], "tensor(float)"),
            formal(OUTPUTS[2], "tensor(int64)"),
            formal(OUTPUTS[3], "tensor(int64)"),
        ],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "type of the tokens")
        ],
        attributes=[
            attribute(name, kinds.STRING if name in strings else kinds.INT) for name in ATTRIBUTES
        ],
    )


def _onnx_operator(traced: bool) -> Any:
    """Return the onnxscript operator that becomes our node, its attributes in schema order."""
    import onnxscript

    domain = onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION)
    operator = onnxscript.values.Op(domain, OP_TYPE, op_schema=_schema())

    def translate(
        tokens: Any,
        features: Any,
        log_size: Any,
        threshold: Any,
        num_prefix_tokens: int,
        selection: str,
        reduction: str,
        capacity: int,
        multiple_of: int,
        opt_tokens: int,
        max_tokens: int,
    ) -> Any:
        return operator(
            tokens,
            features,
            log_size,
            threshold,
            capacity=capacity,
            max_tokens=max_tokens,
            multiple_of=multiple_of,
            num_prefix_tokens=num_prefix_tokens,
            opt_tokens=opt_tokens,
            reduction=reduction,
            selection=selection,
        )

    def translate_traced(
        tokens: Any, features: Any, log_size: Any, threshold: Any, slots: Any, *rest: Any
    ) -> Any:
        return translate(tokens, features, log_size, threshold, *rest)

    return translate_traced if traced else translate


def _cast_first(graph: onnx.GraphProto) -> None:
    """Let the Cast alone read the images: TensorRT wants uint8 converted before any other layer."""
    cast = next(node for node in graph.node if IMAGES in node.input and node.op_type == "Cast")
    first = onnx.NodeProto()
    first.CopyFrom(cast)
    graph.node.remove(cast)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == IMAGES:
                node.input[index] = first.output[0]
    graph.node.insert(0, first)


def _add_function(graph: onnx.ModelProto, metadata: ModelMetadata) -> None:
    del graph.functions[:]
    if not metadata.pruning.layers:
        return
    for node in prune_nodes(graph):
        del node.output[num_outputs(metadata) :]
        for name, value in NAMING_ATTRIBUTES.items():
            node.attribute.append(onnx.helper.make_attribute(name, value))
    graph.functions.append(function_of(metadata))
    if DOMAIN not in {entry.domain for entry in graph.opset_import}:
        graph.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def metadata_of_model(model: PrunedViT, options: ExportOptions) -> ModelMetadata:
    """Return what an exported file will say of itself."""
    vit, options = model.vit, options.decided()
    return ModelMetadata(
        **_described(model),
        pruning=model.config,
        export={
            **{k: v for k, v in dataclasses.asdict(options).items() if k not in COMPANION_FIELDS},
            "batch": list(options.batch),
            "opt_tokens": list(options.opt_tokens),
        },
        output=output_names(model, options)[0],
        num_classes=int(vit.num_classes),
        num_prefix_tokens=model.num_prefix_tokens,
        num_patches=model.num_patches,
        depth=len(vit.blocks),
        channels=model.channels,
        image_size=model.image_size,
        embed_dim=model.block_shape.embed_dim,
        mlp_dim=model.block_shape.mlp_dim,
        parameters=sum(p.numel() for p in vit.parameters()),
    )


def _described(model: PrunedViT) -> dict[str, Any]:
    """Return :func:`describe_vit`'s facts, with a mean and a deviation for every channel."""
    facts = describe_vit(model.vit)
    preprocessing = facts["preprocessing"]
    for name in {"mean", "std"} & set(preprocessing):
        values = fit_to_channels(name, preprocessing[name], model.channels)
        preprocessing[name] = list(values)
    return facts
