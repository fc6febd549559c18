"""The pruned model: blocks in halves, prune layers before and inside them, sizes in attention."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import timm
import torch
from architectures import ARCHITECTURES, Architecture, build, photographs, with_args
from timm.layers import Attention
from torch import nn
from torch.nn import functional

from simprune_deploy.common.errors import SimpruneError, UnsupportedModelError
from simprune_deploy.pruning import attention, model
from simprune_deploy.pruning.attention import (
    MANY_TOKENS,
    Sizes,
    attend,
    attention_half,
    features_of,
    has_keys,
    has_two_halves,
    key_channels,
    mlp_half,
    run_block,
    sizes_of,
    takes_channels,
)
from simprune_deploy.pruning.config import FEATURES, PAD_LOG_SIZE, PruneConfig
from simprune_deploy.pruning.model import PrunedViT, PruneTrace, prune
from simprune_deploy.pruning.operator import similarity_prune

NORMED_KEYS = Architecture("norm of keys", "vit_tiny_patch16_224", with_args(qk_norm=True))
KINDS = {each.what: each for each in (*ARCHITECTURES, NORMED_KEYS)}
WITHOUT_HALVES = {"parallel branches", "norm of queries and keys"}
WITHOUT_KEYS = {*WITHOUT_HALVES, "differential attention"}

every_architecture = pytest.mark.parametrize(
    "architecture", KINDS.values(), ids=lambda architecture: architecture.what.replace(" ", "-")
)


def some_sizes(batch: int, tokens: int, padding: int = 2) -> torch.Tensor:
    """Return float32[B, N] log-sizes of 1 to 40 patches, with padding at the end."""
    sizes = torch.randint(1, 40, (batch, tokens), generator=torch.Generator().manual_seed(0))
    log_size = sizes.float().log()
    log_size[:, tokens - padding :] = PAD_LOG_SIZE
    return log_size


def some_tokens(batch: int, tokens: int, width: int) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


def traced(pruned: PrunedViT, images: torch.Tensor, **values: Any) -> list[PruneTrace]:
    traces: list[PruneTrace] = []
    with torch.inference_mode():
        pruned(images, traces=traces, **values)
    return traces


# --- attention ------------------------------------------------------------------------------------

ATTENTIONS = {
    "plain": {"qkv_bias": True},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "norms of queries and keys": {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm},
    "norm of what was read": {"qkv_bias": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gate": {"qkv_bias": True, "gated": True},
    "narrow heads": {"qkv_bias": True, "attn_head_dim": 8},
    "dropout": {"qkv_bias": True, "attn_drop": 0.3, "proj_drop": 0.2},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_is_timms_bit_for_bit(kind: str, fused: bool, masked: bool) -> None:
    torch.manual_seed(0)
    attn = Attention(48, num_heads=4, **ATTENTIONS[kind]).train(kind == "dropout")
    attn.fused_attn = fused
    tokens = some_tokens(3, 20, 48)
    sizes = sizes_of(some_sizes(3, 20), tokens) if masked else None
    keys: list[torch.Tensor] = []
    hook = attn.k_norm.register_forward_hook(lambda _, __, output: keys.append(output))
    torch.manual_seed(1)
    expected = attn(tokens, attn_mask=None if sizes is None else sizes.mask)
    hook.remove()
    torch.manual_seed(1)
    found, found_keys = attend(attn, tokens, sizes)
    assert torch.equal(found, expected)
    assert torch.equal(found_keys, keys[0])
    assert found_keys.shape == (3, 4, 20, attn.head_dim)


def test_keys_side_by_side_and_their_mean() -> None:
    keys, tokens = torch.randn(2, 3, 5, 4), torch.randn(2, 5, 12)
    assert features_of("tokens", tokens, keys) is tokens
    by_head = [keys[:, head] for head in range(3)]
    assert torch.equal(features_of("keys", tokens, keys), torch.cat(by_head, 2))
    mean = sum(by_head) / 3
    torch.testing.assert_close(features_of("mean-keys", tokens, keys), mean)
    both = features_of("tokens+keys", tokens, keys)
    assert both.shape == (2, 5, 12 + 4)
    cosines = [functional.cosine_similarity(each[:, 0], each[:, 1], -1) for each in (tokens, mean)]
    torch.testing.assert_close(
        functional.cosine_similarity(both[:, 0], both[:, 1], -1), (cosines[0] + cosines[1]) / 2
    )
    assert features_of("tokens+keys", tokens.half(), keys.half()).dtype == torch.float16


@every_architecture
@torch.inference_mode()
def test_halves_of_a_block_are_the_block(architecture: Architecture) -> None:
    block: Any = build(architecture).blocks[0]
    assert has_two_halves(block) == (architecture.what not in WITHOUT_HALVES)
    assert has_keys(block) == (architecture.what not in WITHOUT_KEYS)
    tokens = some_tokens(2, 20, 48)
    for sizes in (None, sizes_of(some_sizes(2, 20), tokens)):
        expected = block(tokens, attn_mask=None if sizes is None else sizes.mask)
        assert torch.equal(run_block(block, tokens, sizes), expected)
        if has_two_halves(block):
            half, keys = attention_half(block, tokens, sizes)
            assert torch.equal(mlp_half(block, half), expected)
            assert (keys is None) == (not has_keys(block))


def test_a_block_that_somebody_changed_is_run_as_it_is() -> None:
    vit = build(KINDS["class token"])
    vit.blocks[1].forward = lambda tokens, attn_mask=None: 2 * tokens
    vit.blocks[0].attn.forward = lambda tokens, attn_mask=None: tokens
    tokens = some_tokens(2, 65, 48)
    assert torch.equal(run_block(vit.blocks[1], tokens, None), 2 * tokens)
    assert has_two_halves(vit.blocks[0])
    assert not has_keys(vit.blocks[0])
    assert not has_two_halves(vit.blocks[1])
    prune(vit, layers=(1,))
    with pytest.raises(UnsupportedModelError, match="inside block 1"):
        prune(vit, layers=(1,), place="inside")


def test_hooks_of_blocks_run() -> None:
    pruned = prune(build(KINDS["class token"]), layers=(1,))
    seen: list[int] = []
    for number, block in enumerate(pruned.vit.blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    traced(pruned, torch.from_numpy(photographs(pruned, 2).pixels))
    assert seen == [0, 1]


class _Attending(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn = Attention(48, num_heads=4, **ATTENTIONS[kind]).eval()
        self.attn.fused_attn = False
        self.eval()

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(self.attn, tokens, Sizes(mask))[0]


def test_attention_exports_to_one_split_at_any_batch_and_token_count() -> None:
    batch, count = torch.export.Dim("batch"), torch.export.Dim("count")
    program = torch.onnx.export(
        _Attending("plain"),
        (torch.randn(2, 5, 48), torch.zeros(2, 1, 1, 5)),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: batch, 1: count}, {0: batch, 3: count}),
        verbose=False,
    )
    assert program is not None
    kinds = collections.Counter(node.op_type for node in program.model_proto.graph.node)
    assert kinds["Split"] == 1
    assert not kinds.keys() & {"Slice", "Squeeze", "Gather"}
    assert sum(kinds.values()) <= 19


# --- sizes ----------------------------------------------------------------------------------------


def wide_attention(head_width: int) -> Attention:
    """Return an attention whose scores are far from even."""
    torch.manual_seed(0)
    attn = Attention(2 * head_width, num_heads=2, qkv_bias=True).eval()
    nn.init.normal_(attn.qkv.weight, std=0.15)
    nn.init.normal_(attn.qkv.bias)
    return attn


@pytest.mark.parametrize("head_width", [16, 64, 72])
@torch.inference_mode()
def test_sizes_in_the_keys_are_the_mask_to_float_noise(head_width: int) -> None:
    attn = wide_attention(head_width)
    before = {name: each.clone() for name, each in attn.state_dict().items()}
    tokens, log_size = some_tokens(3, 50, 2 * head_width), some_sizes(3, 50, padding=5)
    by_mask, keys = attend(attn, tokens, sizes_of(log_size, tokens))
    channels = Sizes(sizes_of(log_size, tokens).mask, key_channels(log_size, tokens.dtype))
    found, found_keys = attend(attn, tokens, channels)
    torch.testing.assert_close(found, by_mask, rtol=0, atol=2e-5)
    torch.testing.assert_close(found_keys, keys)
    padded = tokens.clone()
    padded[:, 45:] = 5.0
    again = attend(attn, padded, channels)[0]
    assert torch.equal(again[:, :45], found[:, :45]), "padding is not read"
    assert attn.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in attn.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_width", [64, 72])
@torch.inference_mode()
def test_in_16_bits_sizes_in_the_keys_are_no_worse_than_a_mask(
    head_width: int, dtype: torch.dtype
) -> None:
    attn = wide_attention(head_width).to(dtype)
    tokens, log_size = some_tokens(8, 200, 2 * head_width).to(dtype), some_sizes(8, 200)
    exact_attn, exact_mask = copy.deepcopy(attn).double(), log_size[:, None, None].double()
    exact = exact_attn(tokens.double(), attn_mask=exact_mask)
    mask = sizes_of(log_size, tokens).mask
    off_by_mask, off_by_channels = (
        (attend(attn, tokens, sizes)[0].double() - exact).square().mean().sqrt().item()
        for sizes in (Sizes(mask), Sizes(mask, key_channels(log_size, dtype)))
    )
    assert off_by_channels < 1.02 * off_by_mask
    assert off_by_channels < 0.01 * exact.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_hold_log_sizes_exactly(dtype: torch.dtype) -> None:
    log_size = some_sizes(2, 40)
    channels = key_channels(log_size, dtype)
    assert channels.shape == (2, 40, 1, 8)
    assert torch.equal(channels[:, :, 0, :3], channels[:, :, 0, 3:6])
    assert not channels[:, :, 0, 6:].any()
    # three numbers of 8 or 11 bits make 24, but for what float16 cannot count any more
    room = 2.0**-24 if dtype == torch.float16 else 0.0
    total = channels[:, :, 0, :3].double().sum(2)
    torch.testing.assert_close(total, log_size.double(), rtol=0, atol=room)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("place", "features"), [("before", "tokens"), ("inside", "keys")])
@pytest.mark.parametrize("kind", ["class token", "registers and LayerScale", "packed SwiGLU"])
@torch.inference_mode()
def test_a_model_with_sizes_in_the_keys_is_the_one_with_masks(
    kind: str, place: str, features: str, proportional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = prune(
        build(KINDS[kind]),
        threshold=0.8,
        layers=(0, 1),
        place=place,
        features=features,
        proportional_attention=proportional,
    )
    images = torch.from_numpy(photographs(pruned, 4).pixels)
    expected = pruned(images)
    used: list[bool] = []

    def in_keys(log_size: torch.Tensor, tokens: torch.Tensor) -> Sizes:
        return Sizes(sizes_of(log_size, tokens).mask, key_channels(log_size, tokens.dtype))

    def noted(*arguments: Any) -> Any:
        used.append(True)
        return by_channels(*arguments)

    by_channels = attention._attend_by_channels
    monkeypatch.setattr(model, "sizes_of", in_keys)
    monkeypatch.setattr(attention, "_attend_by_channels", noted)
    torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-5)
    assert len(used) == (2 if place == "before" else 1)


@every_architecture
def test_sizes_ride_only_where_nothing_is_in_the_way(architecture: Architecture) -> None:
    without = {"norm of keys", "norm inside attention and MLP", *WITHOUT_KEYS}
    block = build(architecture).blocks[0]
    assert takes_channels(block) == (architecture.what not in without)


def test_whoever_listens_to_a_block_gets_the_mask() -> None:
    block: Any = build(KINDS["class token"]).blocks[0]
    assert takes_channels(block)
    hook = block.attn.qkv.register_forward_hook(lambda *_: None)
    assert not takes_channels(block)
    hook.remove()
    assert takes_channels(block)
    block.attn.fused_attn = False
    assert not takes_channels(block)


class _OnGpu:
    """Stands in for tokens on a GPU, as far as the rule looks at them."""

    is_cuda, dtype, device = True, torch.float16, torch.device("cpu")


def test_sizes_ride_on_a_gpu_without_gradients_from_many_tokens_on() -> None:
    many, few = torch.zeros(8, MANY_TOKENS // 8), torch.zeros(8, MANY_TOKENS // 8 - 1)
    gpu: Any = _OnGpu()
    with torch.no_grad():
        assert sizes_of(many, gpu).in_keys is not None
        assert sizes_of(few, gpu).in_keys is None
        assert sizes_of(many, torch.zeros(1)).in_keys is None
        with torch.autocast("cpu", torch.bfloat16):
            found = sizes_of(many, gpu)
        assert found.in_keys is not None
        assert (found.mask.dtype, found.in_keys.dtype) == (torch.float16, torch.bfloat16)
    assert sizes_of(many, gpu).in_keys is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_on_a_gpu_both_ways_are_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = timm.create_model("vit_small_patch16_224", num_classes=7).eval()
    pruned = prune(vit, threshold=0.8, tokens=[180, 150, 120]).to("cuda", dtype)
    images = torch.randn(64, 3, 224, 224, device="cuda", dtype=dtype)
    found = pruned(images)
    monkeypatch.setattr(attention, "MANY_TOKENS", 1 << 60)
    expected = pruned(images)
    # another kernel rounds otherwise, and in 16 bits some decisions fall otherwise
    apart = (found - expected).abs().amax(1) / expected.abs().amax(1)
    assert apart.median() < {torch.float32: 1e-3}.get(dtype, 0.05)


# --- layers ---------------------------------------------------------------------------------------


def scaled_to(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    mine, wanted = (each.square().sum(-1, keepdim=True).sqrt() for each in (rows, others))
    return rows * (wanted / mine.clamp_min(1e-12))


def by_hand(pruned: PrunedViT, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output and what each layer compared, of layers inside blocks, by timm's parts."""
    vit, config = pruned.vit, pruned.config
    limit = torch.tensor([config.threshold])
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    log_size, mask, compared = torch.zeros(x.shape[:2]), None, []
    for index, block in enumerate(vit.blocks):
        post = type(block).__name__ == "ResPostBlock"
        keys: list[torch.Tensor] = []
        handle = (
            block.attn.k_norm.register_forward_hook(lambda _, __, out, keys=keys: keys.append(out))
            if hasattr(block.attn, "k_norm")
            else None
        )
        read = block.attn(x if post else block.norm1(x), attn_mask=mask)
        if handle:
            handle.remove()
        x = x + (block.norm1(read) if post else block.ls1(read))
        if index in config.layers:
            features = {
                "tokens": lambda: x,  # noqa: B023
                "keys": lambda: keys[0].permute(0, 2, 1, 3).reshape(*x.shape[:2], -1),  # noqa: B023
                "mean-keys": lambda: keys[0].mean(1),  # noqa: B023
                "tokens+keys": lambda: torch.cat(
                    [x, scaled_to(keys[0].mean(1), x)],  # noqa: B023
                    2,
                ),
            }[config.features]()
            compared.append(features)
            choices = (config.selection, config.reduction)
            capacity = config.capacity_of(config.layers.index(index))
            x, log_size, _, _ = similarity_prune(
                x, features, log_size, limit, pruned.num_prefix_tokens, *choices, capacity
            )
            mask = log_size[:, None, None]
        fed = block.mlp(x if post else block.norm2(x))
        x = x + (block.norm2(fed) if post else block.ls2(fed))
    return pruned.forward_head(vit.norm(x), log_size), compared


@pytest.mark.parametrize("features", FEATURES)
@every_architecture
@torch.inference_mode()
def test_layers_inside_blocks_are_what_is_written(
    architecture: Architecture, features: str
) -> None:
    vit = build(architecture)
    without = WITHOUT_HALVES if features == "tokens" else WITHOUT_KEYS
    if architecture.what in without:
        with pytest.raises(UnsupportedModelError) as raised:
            prune(vit, layers=(1,), place="inside", features=features)
        assert "inside block 1" in str(raised.value)
        assert type(vit.blocks[1]).__name__ in str(raised.value)
        halves = architecture.what not in WITHOUT_HALVES
        assert ("place='before'" in str(raised.value)) == (not halves)
        assert ("features='tokens'" in str(raised.value)) == (features != "tokens")
        assert "\n" not in str(raised.value)
        return
    pruned = prune(vit, threshold=0.8, layers=(0, 1), place="inside", features=features)
    images = torch.from_numpy(photographs(pruned, 3).pixels)
    traces = traced(pruned, images)
    expected, compared = by_hand(pruned, images)
    assert torch.equal(pruned(images), expected)
    assert [trace.layer for trace in traces] == [0, 1]
    for trace, features_read in zip(traces, compared, strict=True):
        assert torch.equal(trace.features, features_read)
    assert traces[0].features.shape[:2] == (3, pruned.num_tokens)
    assert (traces[0].assignment >= 0).all()


@every_architecture
@torch.inference_mode()
def test_a_threshold_of_two_inside_is_the_dense_model(architecture: Architecture) -> None:
    if architecture.what in WITHOUT_HALVES:
        pytest.skip("its blocks have no inside")
    vit = build(architecture)
    pruned = prune(vit, threshold=2.0, layers=(0, 1), place="inside")
    images = torch.from_numpy(photographs(vit, 2).pixels)
    room = 1e-6 if vit.global_pool in ("avg", "avgmax") else 0.0
    torch.testing.assert_close(pruned(images), vit(images), rtol=0, atol=room)


def test_a_layer_inside_the_last_block_spares_its_mlp_alone() -> None:
    pruned = prune(build(KINDS["class token"]), threshold=0.0, layers=(1,), place="inside")
    seen: dict[str, int] = {}
    for name in ("attn.qkv", "mlp.fc1"):
        pruned.vit.blocks[1].get_submodule(name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[1]})
        )
    traced(pruned, torch.from_numpy(photographs(pruned, 1).pixels))
    assert seen["attn.qkv"] == pruned.num_tokens
    assert seen["mlp.fc1"] == 1 + pruned.num_patches // 2


def test_tokens_and_features_go_to_the_operator_in_its_order() -> None:
    class Watched(PrunedViT):
        calls: list[Any]

        def _operator(self, *tensors: torch.Tensor, **values: Any) -> tuple[torch.Tensor, ...]:
            self.calls.append((tensors, values))
            return super()._operator(*tensors, **values)

    vit = build(KINDS["class token"])
    pruned = Watched(vit, PruneConfig(layers=(0,), place="inside", features="mean-keys"))
    pruned.calls = []
    traced(pruned, torch.from_numpy(photographs(vit, 2).pixels))
    ((tokens, features, log_size, threshold), values) = pruned.calls[0]
    assert tokens.shape == (2, 65, 48)
    assert features.shape == (2, 65, 12)
    assert log_size.shape == (2, 65)
    assert threshold.shape == (1,)
    assert values == {
        "num_prefix_tokens": 1,
        "selection": "pairs",
        "reduction": "merge",
        "capacity": 0,
        "multiple_of": 1,
        "opt_tokens": 49,
        "max_tokens": 65,
    }


# --- training, saving, compiling ------------------------------------------------------------------


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_inside_blocks(features: str, checkpointing: bool) -> None:
    vit = build(KINDS["registers and LayerScale"]).train()
    pruned = prune(vit, threshold=0.8, layers=(0, 1), place="inside", features=features)
    images = torch.from_numpy(photographs(vit, 3).pixels)
    pruned(images).square().sum().backward()
    expected = {name: each.grad.clone() for name, each in vit.named_parameters()}
    assert all(torch.isfinite(each).all() for each in expected.values())
    assert all(each.any() for name, each in expected.items() if "mask_token" not in name)
    vit.zero_grad()
    vit.set_grad_checkpointing(checkpointing)
    pruned(images).square().sum().backward()
    for name, each in vit.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_a_state_dict_brings_place_and_features() -> None:
    vit, other = (build(KINDS["class token"], seed) for seed in (0, 1))
    pruned = prune(vit, layers=(1,), place="inside", features="mean-keys", tokens=40)
    plain = prune(other, layers=(0,))
    plain.load_state_dict(pruned.state_dict())
    assert plain.config == pruned.config
    images = torch.from_numpy(photographs(vit, 2).pixels)
    with torch.inference_mode():
        assert torch.equal(plain(images), pruned(images))


def test_what_is_left_out_keeps_its_place_and_its_features() -> None:
    vit = build(KINDS["class token"])
    pruned = prune(vit, layers=(1,), place="inside", features="keys")
    again = prune(pruned, threshold=0.5)
    assert (again.config.place, again.config.features) == ("inside", "keys")
    assert prune(pruned, features="tokens").config.features == "tokens"
    assert prune(vit).config == prune(vit, place="before", features="tokens").config
    with pytest.raises(SimpruneError, match=r"features='keys'.*place='inside'"):
        prune(pruned, place="before")


def test_counts_that_pairs_cannot_leave_are_refused_by_the_model() -> None:
    vit = build(KINDS["class token"])
    with pytest.raises(SimpruneError, match=r"31 of the 64.*32 to 64, or more layers"):
        prune(vit, layers=(1,), tokens=[31])
    assert prune(vit, layers=(1,), tokens=[31], selection="redundancy").config.capacities == (31,)
    with pytest.raises(SimpruneError, match="31 of the 64"):
        prune(prune(vit, layers=(1,), tokens=[31], selection="redundancy"), selection="pairs")


@pytest.mark.parametrize(("place", "features"), [("before", "tokens"), ("inside", "mean-keys")])
def test_a_model_with_fixed_counts_compiles_to_one_graph(place: str, features: str) -> None:
    vit = build(KINDS["class token"])
    pruned = prune(vit, layers=(0, 1), tokens=[48, 30], place=place, features=features)
    images = torch.from_numpy(photographs(vit, 2).pixels)
    torch._dynamo.reset()
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images), pruned(images), rtol=0, atol=1e-5)
    torch._dynamo.reset()
