"""Every kind of timm ViT that can be pruned: exported, verified, run, trained, saved and copied."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from architectures import (
    ARCHITECTURES,
    NUM_CLASSES,
    THRESHOLD,
    Architecture,
    build,
    build_pruned,
    photographs,
)
from timm.utils import ModelEmaV3

from simprune_deploy.common.errors import UnsupportedModelError
from simprune_deploy.onnx.exported_folder import COMPANIONS, FUSED_MODEL, INLINED_MODEL
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.fused_attention import count_fused, with_fused_attention
from simprune_deploy.onnx.variants import inlined
from simprune_deploy.parity.comparison import compare_with_torch
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.model import PrunedViT, PruneTrace, prune

every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=lambda architecture: architecture.what.replace(" ", "-")
)


def test_the_architectures_have_what_they_stand_for() -> None:
    models = {each.what: build(each) for each in ARCHITECTURES}
    prefixes = {what: model.num_prefix_tokens for what, model in models.items()}
    assert prefixes["class token"] == 1
    assert prefixes["no class token"] == 0
    assert prefixes["distillation token"] == 2
    assert prefixes["registers and LayerScale"] == 5
    assert models["mean and maximum"].global_pool == "avgmax"
    assert models["attention pool"].attn_pool is not None
    assert models["attention pool of the prefix too"].pool_include_prefix
    assert models["norm behind the mean"].fc_norm.weight.shape == (48,)
    blocks = {what: model.blocks[0] for what, model in models.items()}
    classes = {what: type(block).__name__ for what, block in blocks.items()}
    assert classes["norm behind attention and MLP"] == "ResPostBlock"
    assert classes["parallel branches"] == "ParallelThingsBlock"
    assert type(blocks["registers and LayerScale"].ls1).__name__ == "LayerScale"
    assert "GluMlp" in type(blocks["packed SwiGLU"].mlp).__name__
    assert type(blocks["differential attention"].attn).__name__ == "DiffAttention"
    assert not isinstance(models["norm before the blocks"].norm_pre, torch.nn.Identity)
    assert "QuickGELU" in type(blocks["quick GELU"].mlp.act).__name__
    assert not isinstance(blocks["norm of queries and keys"].q_norm, torch.nn.Identity)
    assert not isinstance(models["norm of the embedding"].patch_embed.norm, torch.nn.Identity)
    assert not isinstance(blocks["norm inside attention and MLP"].attn.norm, torch.nn.Identity)


@every_architecture
def test_the_export_is_proven_and_runs_at_every_batch(architecture: Architecture) -> None:
    model = build_pruned(architecture)
    images = photographs(model)
    graph = export_onnx(model, ExportOptions(batch=(1, 4)))
    forms = {INLINED_MODEL: inlined(graph)}
    if architecture.what == "differential attention":
        with pytest.raises(UnsupportedModelError, match="0 of the 2 attentions in the blocks"):
            with_fused_attention(graph)
    else:
        forms[FUSED_MODEL] = with_fused_attention(graph)
        blocks = 4 if architecture.what == "parallel branches" else 2
        assert count_fused(forms[FUSED_MODEL]) == blocks
    verdict, _ = compare_with_torch(graph, model, images, forms=forms)
    assert {COMPANIONS[name] for name in forms} < {check.name for check in verdict.checks}
    assert verdict.status == "passed", verdict.reason
    assert verdict.check("batch_invariance").passed
    assert verdict.check("pruning").numbers["pruned_patches"] > 0

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(images.pixels)).numpy()
    for batch in (1, 2, 3, 4):
        (logits,) = session.run(["logits"], {"images": images.pixels[:batch]})
        assert logits.shape == (batch, NUM_CLASSES)
        np.testing.assert_allclose(logits, expected[:batch], rtol=0, atol=1e-4)


@every_architecture
def test_a_threshold_of_two_is_the_dense_model(architecture: Architecture) -> None:
    dense = build(architecture)
    model = prune(dense, threshold=2.0, layers=architecture.layers)
    images = torch.from_numpy(photographs(dense, 3).pixels)
    traces: list[PruneTrace] = []
    with torch.inference_mode():
        expected, actual = dense(images), model(images, traces=traces)
    assert all(trace.kept_index.shape[1] == model.num_tokens for trace in traces)
    assert len(traces) == len(architecture.layers)
    # a mean is taken with the sizes as weights: the same number, rounded in another order
    room = 1e-6 if dense.global_pool in ("avg", "avgmax") else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=room)


@every_architecture
def test_training_gives_every_used_parameter_a_finite_gradient(architecture: Architecture) -> None:
    dense = build(architecture).train()
    images = torch.from_numpy(photographs(dense, 3).pixels)
    dense(images).square().sum().backward()
    used = {name for name, each in dense.named_parameters() if each.grad is not None}
    dense.zero_grad()

    model = prune(dense, threshold=THRESHOLD, layers=architecture.layers)
    traces: list[PruneTrace] = []
    output = model(images, traces=traces)
    output.square().sum().backward()
    assert all(trace.kept_index.shape[1] < model.num_tokens for trace in traces)
    gradients = {name: each.grad for name, each in dense.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == used
    for name in used:
        assert torch.isfinite(gradients[name]).all(), name
    loss = output.square().sum().item()
    steepness = sum(
        float(each.grad.square().sum()) for each in dense.parameters() if each.grad is not None
    )
    torch.optim.SGD(dense.parameters(), lr=0.01 * loss / steepness).step()
    with torch.no_grad():
        assert model(images).square().sum().item() < loss


@every_architecture
def test_a_state_dict_brings_its_weights_and_its_configuration(architecture: Architecture) -> None:
    model = build_pruned(architecture)
    images = torch.from_numpy(photographs(model, 2).pixels)
    other = PrunedViT(
        build(architecture, seed=1), PruneConfig(threshold=0.3, layers=(0,), reduction="drop")
    )
    assert other.config != model.config
    other.load_state_dict(model.state_dict())
    assert other.config == model.config
    with torch.inference_mode():
        assert torch.equal(other(images), model(images))


@every_architecture
def test_a_deep_copy_is_equal_and_independent(architecture: Architecture) -> None:
    model = build_pruned(architecture)
    images = torch.from_numpy(photographs(model, 2).pixels)
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        expected = model(images)
        assert torch.equal(twin(images), expected)
        for parameter in model.parameters():
            parameter.add_(0.1)
        assert torch.equal(twin(images), expected)
        assert not torch.equal(model(images), expected)
    assert twin.config == model.config


@every_architecture
def test_an_exponential_moving_average_follows_the_weights(architecture: Architecture) -> None:
    model = build_pruned(architecture)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    average = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model)
    assert isinstance(average.module, PrunedViT)
    assert average.module.config == model.config
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25)
    restored = prune(build(architecture), layers=())
    restored.load_state_dict(average.module.state_dict())
    assert restored.config == model.config
