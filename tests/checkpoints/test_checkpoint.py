"""Every shape of ``model.pt`` that loads, and every one that is refused with one line."""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from simprune_deploy.checkpoints import architecture as checkpoint_fit
from simprune_deploy.checkpoints.loading import Checkpoint, load, load_checkpoint, save
from simprune_deploy.common.errors import CheckpointError, SimpruneError, UnsupportedModelError
from simprune_deploy.pruning.model import PrunedViT, describe_vit, prune

ARCH = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "img_size": 32, "embed_dim": 24, "num_heads": 3, "patch_size": 8}


def small_vit(arch: str = ARCH, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(arch, **{"num_classes": 10, **SMALL, **changes}).eval()


def arguments(model: str = ARCH, **changes: Any) -> argparse.Namespace:
    """What timm's train.py writes beside the weights."""
    values: dict[str, Any] = {
        **{"model": model, "num_classes": None, "img_size": None, "input_size": None},
        **{"in_chans": None, "gp": None, "mean": None, "std": None, "interpolation": ""},
        **{"crop_pct": None, "drop": 0.1, "drop_path": 0.2, "model_kwargs": dict(SMALL)},
    }
    return argparse.Namespace(**{**values, **changes})


def training_checkpoint(model: nn.Module, **changes: Any) -> dict[str, Any]:
    weights = list(model.parameters())
    return {
        **{"epoch": 3, "arch": ARCH, "version": 2, "metric": np.float64(81.5)},
        "state_dict": model.state_dict(),
        "optimizer": torch.optim.AdamW(weights).state_dict(),
        "args": arguments(),
        **changes,
    }


def saved(folder: Path, value: Any, name: str = "model.pt") -> Path:
    path = folder / name
    torch.save(value, path)
    return path


def same(found: Any, expected: nn.Module) -> None:
    """Both models answer alike, and the found one can be built again from what it records."""
    torch.manual_seed(1)
    images = torch.randn(2, expected.in_chans, *expected.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(found(images), expected(images))
    assert not found.training
    facts = describe_vit(found)
    again = timm.create_model(facts["architecture"], **facts["model_args"])
    again.load_state_dict(found.state_dict())
    assert again.global_pool == found.global_pool


def refusal(path: Path | str, error: type[SimpruneError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Training checkpoints


def test_timm_training_checkpoint_needs_no_further_words(tmp_path: Path) -> None:
    model = small_vit()
    args = arguments(mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2], crop_pct=1.0)
    found = load_checkpoint(saved(tmp_path, training_checkpoint(model, args=args)))
    same(found.model, model)
    assert found.kind == "timm training checkpoint"
    assert "10 classes, from head.weight" in found.notes
    cfg = found.model.pretrained_cfg
    assert cfg["architecture"] == ARCH
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"]) == ((0.5,) * 3, (0.2,) * 3, 1.0)
    assert all(tensor.dtype == torch.float32 for tensor in found.model.parameters())
    assert isinstance(found, Checkpoint)


def test_ema_weights_are_preferred(tmp_path: Path) -> None:
    ema = small_vit(init_values=None)
    with torch.no_grad():
        ema.head.weight.add_(1.0)
    value = training_checkpoint(small_vit(), state_dict_ema=ema.state_dict())
    found = load_checkpoint(saved(tmp_path, value))
    same(found.model, ema)
    assert any("EMA" in note for note in found.notes)


def test_an_empty_ema_is_no_ema(tmp_path: Path) -> None:
    model = small_vit()
    same(load(saved(tmp_path, training_checkpoint(model, state_dict_ema=None))), model)
    same(load(saved(tmp_path, training_checkpoint(model, state_dict_ema={}))), model)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_allowed_objects_beside_the_weights(tmp_path: Path, old: bool) -> None:
    args = arguments(data_dir=pathlib.PosixPath("/data"), other=pathlib.PurePosixPath("x"))
    extra = {"metric": np.float32(1.5), "best": np.int64(3), "done": np.bool_(True), "args": args}
    path = tmp_path / "model.pth"
    value = training_checkpoint(small_vit(), **extra)
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    same(load(path), small_vit())


def test_numpy_and_torch_numbers_in_the_arguments(tmp_path: Path) -> None:
    mean = [np.float32(0.5)] * 3
    args = arguments(num_classes=np.int64(10), mean=mean, std=torch.ones(3))
    found = load(saved(tmp_path, training_checkpoint(small_vit(), args=args)))
    assert json.dumps(describe_vit(found)["preprocessing"])


def test_deit_checkpoint(tmp_path: Path) -> None:
    model = small_vit()
    args = arguments(input_size=32, nb_classes=10)
    found = load_checkpoint(saved(tmp_path, {"model": model.state_dict(), "args": args}))
    same(found.model, model)
    value = {"model": small_vit().state_dict(), "model_ema": model.state_dict()}
    assert load_checkpoint(saved(tmp_path, {**value, "args": args})).notes[0].startswith("EMA")


def test_pooling_channels_and_size_of_the_arguments(tmp_path: Path) -> None:
    model = small_vit(global_pool="avg", in_chans=1, img_size=(16, 64))
    kwargs = {key: value for key, value in SMALL.items() if key != "img_size"}
    args = arguments(gp="avg", input_size=[1, 16, 64], mean=[0.2, 0.4, 0.6], model_kwargs=kwargs)
    found = load(saved(tmp_path, training_checkpoint(model, args=args)))
    same(found, model)
    assert found.patch_embed.grid_size == (2, 8)
    assert found.pretrained_cfg["mean"] == pytest.approx((0.4,))


def test_training_only_arguments_are_not_applied(tmp_path: Path) -> None:
    kwargs = {**SMALL, "patch_drop_rate": 0.5, "drop_path_rate": 0.3, "pos_drop_rate": 0.1}
    args = arguments(model_kwargs={**kwargs, "checkpoint_path": "/nonexistent"})
    args.interpolation = "random"
    found = load_checkpoint(saved(tmp_path, training_checkpoint(small_vit(), args=args)))
    same(found.model, small_vit())
    assert isinstance(found.model.patch_drop, nn.Identity)
    assert found.model.pretrained_cfg["interpolation"] == "bicubic"


@pytest.mark.parametrize("arch", [f"hf-hub:timm/{ARCH}.augreg_in21k", f"{ARCH}.augreg_in21k"])
def test_architecture_with_a_tag(tmp_path: Path, arch: str) -> None:
    value = training_checkpoint(small_vit(), arch=arch)
    assert load(saved(tmp_path, value)).pretrained_cfg["architecture"] == ARCH


def test_a_class_name_is_no_architecture(tmp_path: Path) -> None:
    value = training_checkpoint(small_vit(), arch="visiontransformer", args=None)
    assert "'visiontransformer'" in refusal(saved(tmp_path, value))


# Bare state dicts


def bare_tiny(**changes: Any) -> nn.Module:
    """A model that the name alone builds, small in pixels only."""
    options: dict[str, Any] = {"img_size": 32, "num_classes": 5, **changes}
    return timm.create_model("test_vit", dynamic_img_size=False, **options).eval()


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.vit."])
def test_state_dict_with_prefixes(tmp_path: Path, prefix: str) -> None:
    model = bare_tiny()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    found = load_checkpoint(saved(tmp_path, state), arch="test_vit")
    same(found.model, model)
    assert found.kind == "state dict"
    assert any("prefix" in note for note in found.notes) == bool(prefix)
    assert any("32x32" in note for note in found.notes)


def test_averaged_model(tmp_path: Path) -> None:
    state = torch.optim.swa_utils.AveragedModel(bare_tiny()).state_dict()
    assert "n_averaged" in state
    load(saved(tmp_path, state), arch="test_vit")


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": 0}, {"in_chans": 1}, {"global_pool": "map"}],
    ids=str,
)
def test_arguments_are_read_off_the_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = bare_tiny(**changes)
    found = load(saved(tmp_path, model.state_dict()), arch="test_vit")
    same(found, model)
    assert all(getattr(found, key) == value for key, value in changes.items())


@pytest.mark.parametrize(
    "arch",
    ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"],
)
def test_prefix_tokens_of_all_kinds(tmp_path: Path, arch: str) -> None:
    model = small_vit(arch)
    args = arguments(model_kwargs={**SMALL, "patch_size": 8})
    found = load(saved(tmp_path, training_checkpoint(model, arch=arch, args=args)), img_size=48)
    assert found.patch_embed.num_patches == 36
    model.set_input_size(img_size=(48, 48))
    same(found, model)


def test_positions_that_are_no_square_grid(tmp_path: Path) -> None:
    model = bare_tiny(img_size=(32, 64))
    path = saved(tmp_path, model.state_dict())
    assert "img_size" in refusal(path, arch="test_vit")
    same(load(path, arch="test_vit", img_size=(32, 64)), model)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        state = bare_tiny().to(kind).state_dict()
        found = load_checkpoint(saved(tmp_path, state), arch="test_vit")
        assert next(found.model.parameters()).dtype == torch.float32
        assert any("converted to float32" in note for note in found.notes)


def test_dynamic_image_size_becomes_fixed(tmp_path: Path) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())
    assert timm.create_model("test_vit").dynamic_img_size
    assert not load(path, arch="test_vit").dynamic_img_size


def test_without_an_architecture_some_are_named(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, bare_tiny().state_dict()))
    assert "arch='NAME'" in message
    assert "test_vit" in message


def test_unknown_architecture(tmp_path: Path) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())
    assert "vit_tiny_patch16_224" in refusal(path, arch="vit_tiny_patch16_244")


def test_wrong_architecture_names_keys_shapes_and_others(tmp_path: Path) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())
    message = refusal(path, arch=ARCH)
    assert "cls_token is 1x1x64 in the file and 1x1x192 in the model" in message
    assert "test_vit" in message
    assert "more" in message


def test_distilled_weights_in_a_model_without(tmp_path: Path) -> None:
    """Their positions are no square grid there, which is not the trouble to name."""
    args = arguments("deit_tiny_patch16_224")
    model = small_vit("deit_tiny_distilled_patch16_224")
    message = refusal(saved(tmp_path, training_checkpoint(model, arch=args.model, args=args)))
    assert "dist_token 1x1x24 is not in the model" in message


def test_missing_and_unknown_keys_are_named(tmp_path: Path) -> None:
    state = bare_tiny().state_dict()
    state["extra"] = state.pop("norm.weight")
    message = refusal(saved(tmp_path, state), arch="test_vit")
    assert "norm.weight 64 is not in the file" in message
    assert "extra 64 is not in the model" in message


def test_an_architecture_outside_the_family(tmp_path: Path) -> None:
    path = saved(tmp_path, {"patch_embed.proj.weight": torch.zeros(1)})
    message = refusal(path, UnsupportedModelError, arch="swin_tiny_patch4_window7_224")
    assert "windowed" in message
    value = training_checkpoint(small_vit(), arch="resnet18")
    assert "resnet18" in refusal(saved(tmp_path, value), UnsupportedModelError)
    value = training_checkpoint(small_vit(), args=arguments(gp="prr"))
    assert "prr" in refusal(saved(tmp_path, value), UnsupportedModelError)


def test_another_architecture_than_the_file_says(tmp_path: Path) -> None:
    path = saved(tmp_path, training_checkpoint(small_vit()))
    found = load_checkpoint(path, arch="vit_small_patch16_224")
    assert found.model.pretrained_cfg["architecture"] == "vit_small_patch16_224"
    assert any("the file says" in note for note in found.notes)


def test_number_of_classes_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())
    load(path, arch="test_vit", num_classes=5)
    assert load(path, arch="test_vit", num_classes=0).num_classes == 0
    assert "5 classes, not 7" in refusal(path, arch="test_vit", num_classes=7)
    assert "-1" in refusal(path, arch="test_vit", num_classes=-1)


# Image sizes and other numbers


def test_image_size_resamples_the_positions(tmp_path: Path) -> None:
    model = bare_tiny()
    found = load_checkpoint(saved(tmp_path, model.state_dict()), arch="test_vit", img_size=(48, 64))
    assert found.model.patch_embed.grid_size == (3, 4)
    assert any("resampled" in note for note in found.notes)
    model.set_input_size(img_size=(48, 64))
    same(found.model, model)


@pytest.mark.parametrize("size", [8, 1 << 19, 4096, 0, (1, 2, 3), (16.5, 16)])
def test_image_sizes_out_of_bounds(tmp_path: Path, size: Any) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())
    assert "img_size" in refusal(path, arch="test_vit", img_size=size)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 10**9},
        {"embed_dim": 10**12},
        {"img_size": 16000},
        {"img_size": 4},
        {"num_heads": "many"},
        {"reg_tokens": -1},
        {"nonsense": 1},
    ],
    ids=str,
)
def test_absurd_arguments_in_the_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    args = arguments(model_kwargs={**SMALL, **changes})
    state = {key: v for key, v in small_vit().state_dict().items() if key != "pos_embed"}
    message = refusal(
        saved(tmp_path, training_checkpoint(small_vit(), args=args, state_dict=state))
    )
    assert next(iter(changes)) in message or "image size" in message


def test_too_many_positions(tmp_path: Path) -> None:
    state = {**bare_tiny().state_dict(), "pos_embed": torch.zeros(1, 200**2 + 1, 64)}
    assert str(checkpoint_fit.MAX_PATCHES) in refusal(saved(tmp_path, state), arch="test_vit")


# safetensors and hub folders


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=str)
def test_safetensors_under_any_name(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    model = bare_tiny()
    path = tmp_path / "model.pt"
    save_file(model.state_dict(), path, metadata=metadata)
    found = load_checkpoint(path, arch="test_vit")
    same(found.model, model)
    assert found.kind == "safetensors"


@pytest.mark.parametrize("safe", [True, False])
def test_hub_folder(tmp_path: Path, safe: bool) -> None:
    model = small_vit(num_classes=2, global_pool="avg")
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    labels = {"label_names": ["cat", "dog"]}
    save_for_hf(model, tmp_path, model_config=labels, safe_serialization=safe)
    found = load_checkpoint(tmp_path)
    same(found.model, model)
    assert found.kind == "timm hub folder"
    cfg = found.model.pretrained_cfg
    assert (list(cfg["label_names"]), cfg["mean"]) == (["cat", "dog"], (0.1, 0.2, 0.3))
    assert "file" not in cfg


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    assert "transformers" in refusal(tmp_path)
    config.write_text("{")
    assert "JSON" in refusal(tmp_path)
    config.write_text("[1]")
    assert "damaged" in refusal(tmp_path)
    config.write_text(json.dumps({"architecture": ARCH, "pretrained_cfg": {"mean": 1}}))
    assert "no weights" in refusal(tmp_path)
    save_file({"head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    config.write_text(json.dumps({"architecture": "nosuch", "pretrained_cfg": {}}))
    assert "nosuch" in refusal(tmp_path)
    config.write_text(json.dumps({"architecture": 3, "pretrained_cfg": {}}))
    assert "'3'" in refusal(tmp_path)
    config.write_text(json.dumps({"architecture": ARCH, "model_args": 3, "pretrained_cfg": {}}))
    assert "damaged" in refusal(tmp_path)


def test_damaged_preprocessing(tmp_path: Path) -> None:
    save_for_hf(small_vit(), tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    for key, value in {"mean": "grey", "crop_pct": "all", "std": []}.items():
        changed = {**values, "pretrained_cfg": {**values["pretrained_cfg"], key: value}}
        config.write_text(json.dumps(changed))
        assert key in refusal(tmp_path)


# Saved pruned models


@pytest.mark.parametrize("name", ["pruned.pt", "pruned.safetensors"])
def test_pruned_model_round_trip(tmp_path: Path, name: str) -> None:
    vit = small_vit(global_pool="avg")
    vit.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), label_names=[str(i) for i in range(10)])
    model = prune(vit, threshold=0.7, layers=(1,), place="inside", features="mean-keys")
    save(model, tmp_path / name)
    found = load_checkpoint(tmp_path / name)
    assert found.kind == "pruned model"
    assert isinstance(found.model, PrunedViT)
    assert found.model.config == model.config
    assert found.model.vit.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert len(found.model.vit.pretrained_cfg["label_names"]) == 10
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.model(images), model.eval()(images))
    save(found.model, tmp_path / name, force=True)
    assert torch.equal(load(tmp_path / name).get_extra_state(), found.model.get_extra_state())


def test_pruned_model_within_a_training_checkpoint(tmp_path: Path) -> None:
    model = prune(small_vit(), layers=(1,))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    found = load_checkpoint(saved(tmp_path, training_checkpoint(model, state_dict=state)))
    assert found.kind == "pruned model"
    assert isinstance(found.model, PrunedViT)


def test_pruned_model_with_other_wishes(tmp_path: Path) -> None:
    path = tmp_path / "pruned.pt"
    save(prune(small_vit(), layers=(1,)), path)
    assert load(path, img_size=64).num_patches == 64
    assert load(path, arch=ARCH).num_patches == 16
    assert "leave arch out" in refusal(path, arch="vit_small_patch16_224")
    save(prune(small_vit(), layers=(1,), tokens=16), tmp_path / "fixed.pt")
    assert "16" in refusal(tmp_path / "fixed.pt", SimpruneError, img_size=16)


def test_damaged_pruning_configuration(tmp_path: Path) -> None:
    state = prune(small_vit(), layers=(1,)).state_dict()
    text = bytes(state["_extra_state"].numpy())
    for broken in (text[:-3], b"[]", b'{"simprune_format": 9}', b'{"simprune_format": 1}'):
        state["_extra_state"] = torch.tensor(list(broken), dtype=torch.uint8)
        refusal(saved(tmp_path, state))
    state["other._extra_state"] = state.pop("_extra_state")
    assert "beside other weights" in refusal(saved(tmp_path, state))


def test_save_refuses_what_it_must(tmp_path: Path) -> None:
    model = prune(small_vit(), layers=(1,))
    path = saved(tmp_path, {"precious": torch.ones(1)})
    with pytest.raises(SimpruneError, match="force=True"):
        save(model, path)
    assert "precious" in torch.load(path)
    with pytest.raises(SimpruneError, match="folder"):
        save(model, tmp_path, force=True)
    with pytest.raises(SimpruneError, match="cannot write"):
        save(model, tmp_path / "nowhere" / "model.pt")
    model.vit.pretrained_cfg = {}
    with pytest.raises(SimpruneError, match="architecture"):
        save(model, tmp_path / "nameless.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


# timm's own weights


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """timm without a network: asked for weights, it gives random ones, or fails for 'hf-hub:no'."""
    create, asked = timm.create_model, []

    def fake(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if not pretrained:
            return create(name, **kwargs)
        asked.append(name)
        if name.startswith("hf-hub:no"):
            raise ConnectionError("no route to host\n(a second line)")
        return create(name.replace("hf-hub:org/name", ARCH), **SMALL)

    monkeypatch.setattr(timm, "create_model", fake)
    return asked


def test_pretrained(hub: list[str]) -> None:
    for name in (ARCH, "hf-hub:org/name"):
        found = load_checkpoint(name, pretrained=True, img_size=64)
        assert found.kind == "timm pretrained"
        assert found.model.patch_embed.num_patches == 64
    assert hub == [ARCH, "hf-hub:org/name"]


def test_pretrained_refusals(hub: list[str], tmp_path: Path) -> None:
    assert "no route to host" in refusal("hf-hub:no/where", pretrained=True)
    assert "did you mean" in refusal("vit_tiny_patch16_225", pretrained=True)
    path = saved(tmp_path, {})
    assert "leave pretrained=True out" in refusal(path, pretrained=True)
    assert "1000 classes" in refusal(ARCH, pretrained=True, num_classes=3)
    assert "leave arch out" in refusal(ARCH, pretrained=True, arch="vit_small_patch16_224")
    refusal("swin_tiny_patch4_window7_224", UnsupportedModelError, pretrained=True)
    assert "swin_tiny_patch4_window7_224" not in hub


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    message = refusal(tmp_path / "model.pt")
    assert "does not exist" in message
    assert "own weights" not in message
    assert "for timm's own weights add pretrained=True" in refusal(ARCH)
    assert "pretrained=True" in refusal("hf-hub:org/name")
    refusal("x" * 5000)
    refusal("x" * 5000, pretrained=True)
    refusal("null\0character")


# Pickles


class Executor:
    """Unpickling this calls a function: what must not happen without --trust-pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_module_needs_trust(tmp_path: Path) -> None:
    path = saved(tmp_path, small_vit())
    message = refusal(path)
    assert "trust_pickle=True" in message
    assert "runs code" in message
    assert "VisionTransformer" in message
    found = load_checkpoint(path, trust_pickle=True)
    same(found.model, small_vit())
    assert found.kind == "pickled module"


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_nothing_runs_without_trust(tmp_path: Path, old: bool) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "model.pt"
    value = training_checkpoint(small_vit(), extra=Executor(mark))
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    assert "trust_pickle=True" in refusal(path)
    assert not mark.exists()
    load(path, trust_pickle=True)
    assert mark.exists()


def test_pickled_modules_of_other_kinds(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(small_vit())
    same(load(saved(tmp_path, {"model": wrapped}), trust_pickle=True), small_vit())
    pruned = load_checkpoint(saved(tmp_path, prune(small_vit(), layers=(1,))), trust_pickle=True)
    assert isinstance(pruned.model, PrunedViT)
    assert pruned.kind == "pickled module"
    path = saved(tmp_path, nn.Linear(2, 2))
    assert "Linear" in refusal(path, UnsupportedModelError, trust_pickle=True)
    nameless = small_vit()
    nameless.pretrained_cfg = {}
    path = saved(tmp_path, nameless)
    assert "arch='NAME'" in refusal(path, trust_pickle=True)
    same(load(path, trust_pickle=True, arch=ARCH), small_vit())


# Files of another kind


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, its files are not gone
def test_torch_archives_that_cannot_be_pruned(tmp_path: Path) -> None:
    layer, example = nn.Linear(2, 2), torch.ones(1, 2)
    script = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(layer, example), script)
    assert "TorchScript" in refusal(script)
    exported = tmp_path / "b.pt"
    torch.export.save(torch.export.export(layer, (example,)), str(tmp_path / "b.pt2"))
    (tmp_path / "b.pt2").rename(exported)
    message = refusal(exported)
    assert "torch.export" in message
    assert "give the checkpoint it was made from" in message


def test_export_results(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x052.0.1")
    assert "ONNX" in refusal(model)
    (tmp_path / "manifest.json").write_text("{}")
    assert "export result" in refusal(tmp_path)


def test_files_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        np.savez(file, weight=np.ones(2))
    assert "NumPy" in refusal(path)
    contents = {
        "Keras": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "text file": b"epoch: 3\n",
        "unpack": gzip.compress(b"x"),
        "not a checkpoint": b"\x00\x01\x02" * 100,
        "empty": b"",
        "damaged": b"\x80\x04\x95nonsense",
    }
    for expected, data in contents.items():
        path.write_bytes(data)
        assert expected in refusal(path)
    path.unlink()
    (tmp_path / "saved_model.pb").touch()
    assert "TensorFlow" in refusal(tmp_path)


def test_torch_files_without_weights(tmp_path: Path) -> None:
    assert "holds a list" in refusal(saved(tmp_path, [1, 2]))
    assert "no weights" in refusal(saved(tmp_path, {"epoch": 3}))
    assert "no weights" in refusal(saved(tmp_path, {}))
    assert "not a tensor" in refusal(saved(tmp_path, {"a": torch.ones(1), "b": 3}))
    loop: dict[str, Any] = {"a": torch.ones(1)}
    loop["model"] = loop
    refusal(saved(tmp_path, loop))


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(path)


# Damage


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    path, state = tmp_path / "model.pt", bare_tiny().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "damaged" in refusal(path, arch="test_vit")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, bare_tiny().state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "checksum" in refusal(path, arch="test_vit")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_random_damage_never_escapes(tmp_path: Path, kind: str) -> None:
    path, state = tmp_path / "model.pt", {"a": torch.ones(8), "b": torch.ones(3, 3)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for place in generator.integers(0, len(data), 4):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        refusal(path, arch="test_vit")


def test_archives_written_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, bare_tiny().state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    load(path, arch="test_vit")


def test_safetensors_header_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b'{"a":')
    assert "header" in refusal(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("int64", lambda ones: ones.long()),
        ("complex64", lambda ones: ones.to(torch.complex64)),
        ("float8_e4m3fn", lambda ones: ones.to(torch.float8_e4m3fn)),
        ("sparse", lambda ones: ones.to_sparse()),
        ("quantized", lambda ones: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8)),
        ("meta", lambda ones: ones.to("meta")),
        ("view", lambda ones: torch.ones(1).expand(64)),
    ],
)
@pytest.mark.filterwarnings("ignore")  # quantized tensors are deprecated
def test_tensors_of_the_wrong_kind(tmp_path: Path, name: str, change: Any) -> None:
    tensor = change(torch.ones(64))
    path = saved(tmp_path, {**bare_tiny().state_dict(), "norm.weight": tensor})
    message = refusal(path, arch="test_vit")
    assert name in message
    assert "norm.weight" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    model = bare_tiny()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[3, 3] = value
    message = refusal(saved(tmp_path, model.state_dict()), arch="test_vit")
    assert "blocks.1.attn.qkv.weight" in message
