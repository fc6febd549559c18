"""What a checkpoint does not say: asked for, or taken as timm has it and said so; never guessed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_checkpoint import ARCH, bare_tiny, refusal, same, saved, small_vit, training_checkpoint
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.checkpoints.loading import load, load_checkpoint
from simprune_deploy.cli import app
from simprune_deploy.common.errors import InvalidArgumentError

TEST_VIT = "test_vit"
SAMPLES = Path(sd.__file__).parent / "sample_images"


def answers(found: Any, expected: nn.Module) -> None:
    torch.manual_seed(1)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(images), expected(images))


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, " ".join(result.output.split())


class TestPooling:
    @pytest.mark.parametrize("pool", ["avg", "avgmax", "max"])
    def test_names_with_fc_norm_leave_three_and_the_user_is_asked(
        self, tmp_path: Path, pool: Any
    ) -> None:
        model = bare_tiny(global_pool=pool)
        path = saved(tmp_path, model.state_dict())
        message = refusal(path, arch=TEST_VIT)
        assert "avg, avgmax or max" in message
        assert "choose with global_pool" in message
        found = load_checkpoint(path, arch=TEST_VIT, global_pool=pool)
        answers(found.model, model)
        assert not any("pooled" in each for each in found.assumed)

    def test_no_fc_norm_can_be_two_and_the_default_is_said_to_be_assumed(
        self, tmp_path: Path
    ) -> None:
        average = bare_tiny(global_pool="avg", fc_norm=False)
        path = saved(tmp_path, average.state_dict())
        found = load_checkpoint(path, arch=TEST_VIT)
        assert found.model.global_pool == "token"
        (said,) = (each for each in found.assumed if "pooled" in each)
        assert "'token', timm's default for test_vit, assumed" in said
        assert not any("pool" in note for note in found.notes)
        # the names say that the norm comes first, whatever the pooling
        answers(load(path, arch=TEST_VIT, global_pool="avg"), average)

    def test_token_for_an_architecture_that_averages(self, tmp_path: Path) -> None:
        arch, sizes = "vit_base_patch16_siglip_gap_224", {"depth": 1, "embed_dim": 24}
        changes = {**sizes, "num_heads": 3, "img_size": 32, "num_classes": 4, "patch_size": 16}
        # this one has fc_norm=False of its own: nothing in its names tells avg from max
        model = timm.create_model(arch, **changes).eval()
        args = {"depth": 1, "embed_dim": 24, "num_heads": 3}
        found = load_checkpoint(saved(tmp_path, model.state_dict()), arch=arch, model_kwargs=args)
        same(found.model, model)
        assert any("'avg', timm's default" in each for each in found.assumed)

    def test_arguments_of_a_training_checkpoint_are_no_assumption(self, tmp_path: Path) -> None:
        found = load_checkpoint(saved(tmp_path, training_checkpoint(small_vit())))
        assert found.assumed == ()

    @pytest.mark.parametrize(("pool", "words"), [("map", "attn_pool.latent"), ("sum", "unknown")])
    def test_a_pooling_that_is_not_there(self, tmp_path: Path, pool: Any, words: str) -> None:
        path = saved(tmp_path, bare_tiny().state_dict())
        with pytest.raises(sd.SimpruneError, match=words):
            load(path, arch=TEST_VIT, global_pool=pool)

    def test_other_arguments_are_named_and_taken(self, tmp_path: Path) -> None:
        for changes, hint in (
            ({"reg_tokens": 4}, "reg_tokens=4"),
            ({"patch_size": 8}, "patch_size=8"),
            ({"qkv_bias": False}, "qkv_bias=False"),
            ({"init_values": 1e-5}, "init_values=1e-5"),
        ):
            model = bare_tiny(**changes)
            path = saved(tmp_path, model.state_dict())
            assert hint in refusal(path, arch=TEST_VIT)
            answers(load(path, arch=TEST_VIT, model_kwargs=changes), model)
        heads = bare_tiny(num_heads=4)
        path = saved(tmp_path, heads.state_dict())
        answers(load(path, arch=TEST_VIT, model_kwargs={"num_heads": 4}), heads)


class TestImageSize:
    def test_pixels_that_would_not_be_seen(self, tmp_path: Path) -> None:
        path = saved(tmp_path, bare_tiny().state_dict())
        message = refusal(path, arch=TEST_VIT, img_size=70)
        assert "no multiple of the patches of 16x16 pixels" in message
        assert "give 64 or 80" in message

    def test_a_file_that_contradicts_itself(self, tmp_path: Path) -> None:
        checkpoint = training_checkpoint(small_vit())
        checkpoint["args"].model_kwargs = {**checkpoint["args"].model_kwargs, "img_size": 48}
        path = saved(tmp_path, checkpoint)
        message = refusal(path)
        assert "48x48" in message
        assert "32x32" in message
        assert "choose with img_size" in message
        assert load(path, img_size=32).patch_embed.img_size == (32, 32)

    def test_a_model_trained_at_sizes_of_its_own(self, tmp_path: Path) -> None:
        """timm resamples the positions for each batch with dynamic_img_size."""
        checkpoint = training_checkpoint(small_vit())
        known = {**checkpoint["args"].model_kwargs, "img_size": 48, "dynamic_img_size": True}
        checkpoint["args"].model_kwargs = known
        found = load(saved(tmp_path, checkpoint))
        dynamic = small_vit(dynamic_img_size=True)
        images = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            torch.testing.assert_close(found(images), dynamic(images), atol=1e-5, rtol=1e-4)


class TestPreprocessing:
    def test_what_a_state_dict_leaves_out_is_assumed_and_named(self, tmp_path: Path) -> None:
        found = load_checkpoint(saved(tmp_path, bare_tiny().state_dict()), arch=TEST_VIT)
        (said,) = (each for each in found.assumed if "pictures" in each)
        own = resolve_model_data_config(timm.create_model(TEST_VIT))
        assert f"mean {'/'.join(f'{one:g}' for one in own['mean'])}" in said
        assert "if it was trained otherwise, give mean, std, interpolation, crop_pct" in said

    def test_what_is_said_is_taken_and_no_longer_assumed(self, tmp_path: Path) -> None:
        path = saved(tmp_path, bare_tiny().state_dict())
        found = load_checkpoint(
            path, arch=TEST_VIT, mean=(0.1, 0.2, 0.3), std=0.5, interpolation="bilinear", crop_pct=1
        )
        cfg: Any = found.model.pretrained_cfg
        assert (cfg["mean"], cfg["std"]) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
        assert (cfg["interpolation"], cfg["crop_pct"]) == ("bilinear", 1)
        assert cfg["assumed"].keys() == {"crop_mode", "global_pool"}

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"mean": (0.5, 0.5)}, "mean has 2 numbers, and the model 3 channels"),
            ({"std": (0.5, 0.5, 0.0)}, "must be numbers above 0"),
            ({"std": "0.5"}, "std '0.5' must be numbers above 0"),
            ({"mean": (0.5, float("nan"), 0.5)}, "must be numbers"),
            ({"interpolation": "random"}, "interpolation 'random' is unknown"),
            ({"mean": (123.675, 116.28, 103.53)}, "from 0 to 1.*divided by 255"),
            ({"std": 58.4}, "above 0, and at most 1"),
            ({"crop_mode": "middle"}, "crop_mode 'middle' is unknown"),
            ({"crop_pct": 0}, r"crop_pct 0 must be a share"),
            ({"model_kwargs": "depth=2"}, "model_kwargs 'depth=2' must be names and values"),
            ({"model_kwargs": {"num_classes": 7}}, "num_classes: the weights say it"),
            ({"model_kwargs": {"img_size": 64}}, "img_size: give img_size"),
        ],
    )
    def test_what_cannot_be(self, tmp_path: Path, fields: Any, words: str) -> None:
        path = saved(tmp_path, bare_tiny().state_dict())
        with pytest.raises(InvalidArgumentError, match=words):
            load(path, arch=TEST_VIT, **fields)

    def test_another_number_of_channels_is_no_knowledge_either(self, tmp_path: Path) -> None:
        checkpoint = training_checkpoint(small_vit(in_chans=4))
        checkpoint["args"].in_chans = 4
        checkpoint["args"].mean = (0.1, 0.2, 0.3)
        found = load_checkpoint(saved(tmp_path, checkpoint))
        (said,) = found.assumed
        assert "mean 0.2/0.2/0.2/0.2" in said
        assert "(the mean of those of 3 channels)" in said
        told = load_checkpoint(saved(tmp_path, checkpoint), mean=(0.1, 0.2, 0.3, 0.4), std=0.5)
        assert told.assumed == ()

    @pytest.mark.parametrize(
        "values", [{"mean": (float("nan"),) * 3}, {"std": (0.0,) * 3}, {"crop_pct": "0.9"}], ids=str
    )
    def test_what_a_file_says_wrongly_gives_way_to_the_user(
        self, tmp_path: Path, values: dict[str, Any]
    ) -> None:
        checkpoint = training_checkpoint(small_vit())
        vars(checkpoint["args"]).update(values)
        path = saved(tmp_path, checkpoint)
        (name,) = values
        assert f"give {name}" in refusal(path)
        told = load(path, **{name: 0.9})
        assert np.allclose(told.pretrained_cfg[name], 0.9)  # type: ignore[index]

    def test_the_tag_of_the_file_is_kept(self, tmp_path: Path) -> None:
        """vit_small_patch16_224.dino has another mean than vit_small_patch16_224."""
        arch = "vit_small_patch16_224.dino"
        checkpoint = training_checkpoint(small_vit("vit_small_patch16_224"), arch=arch)
        checkpoint["args"].model = arch
        path = saved(tmp_path, checkpoint)
        cfg: Any = load(path, arch="vit_small_patch16_224").pretrained_cfg
        stated: Any = load(path).pretrained_cfg
        assert cfg["mean"] == stated["mean"] == (0.485, 0.456, 0.406)

    def test_it_stays_assumed_through_saving_and_export(self, tmp_path: Path) -> None:
        path = saved(tmp_path, bare_tiny().state_dict())
        pruned = sd.prune(sd.load(path, arch=TEST_VIT, crop_pct=1.0), layers=[1])
        sd.save(pruned, tmp_path / "pruned.pt")
        again = load_checkpoint(tmp_path / "pruned.pt")
        assert any("mean" in each and "crop_pct" not in each for each in again.assumed)
        result = sd.export(tmp_path / "pruned.pt", tmp_path / "out", verify=False)
        assert result.assumed == again.assumed
        assert result.manifest["model"]["preprocessing"]["assumed"].keys() == {
            *("mean", "std", "interpolation", "crop_mode", "global_pool")
        }
        assert "how its pictures were prepared" in str(result)

    def test_a_hub_folder_and_transformers_wrapper_say_all(self, tmp_path: Path) -> None:
        model = bare_tiny()
        save_for_hf(model, tmp_path / "hub", model_args={"img_size": 32, "num_classes": 5})
        assert load_checkpoint(tmp_path / "hub").assumed == ()
        # config.json as TimmWrapperForImageClassification.save_pretrained writes it
        config = {
            "architecture": TEST_VIT,
            "architectures": ["TimmWrapperForImageClassification"],
            "do_pooling": True,
            "label_names": ["cat", "dog", "red panda", "owl", "bee"],
            "model_args": {"img_size": 32},
            "model_type": "timm_wrapper",
            "num_classes": 5,
            "pretrained_cfg": {
                "crop_pct": 1.0, "fixed_input_size": True, "input_size": [3, 32, 32],
                "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "num_classes": 5,
                "std": [0.9, 0.8, 0.7],
            },
        }  # fmt: skip
        (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
        from safetensors.torch import save_file

        state = {f"timm_model.{key}": value for key, value in model.state_dict().items()}
        save_file(state, tmp_path / "hub" / "model.safetensors")
        found = load_checkpoint(tmp_path / "hub")
        answers(found.model, model)
        cfg: Any = found.model.pretrained_cfg
        assert cfg["mean"] == (0.1, 0.2, 0.3)
        assert cfg["label_names"] == config["label_names"]
        assert found.assumed == ()

    def test_the_command_measures_with_what_was_said(self, tmp_path: Path) -> None:
        """A model that is right with ImageNet's mean and std, and wrong with timm's default."""
        path, data = _trained_with(tmp_path, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        common = ("sweep", path, "--arch", ARCH, "--data", data, "--thresholds", 1, "--layers", 1,
                  "--backend", "torch", "--timing", 0, "--json", "--force",
                  "-o", tmp_path / "s", "--model-kwargs", "depth=2")  # fmt: skip
        code, _ = run(*common, "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
        assert code == 0
        right = json.loads((tmp_path / "s" / "sweep.json").read_text())
        assert right["cells"][0]["top1"] == 1.0
        assert not any("mean" in note for note in right["data"]["notes"])
        code, _ = run(*common)
        wrong = json.loads((tmp_path / "s" / "sweep.json").read_text())
        assert wrong["cells"][0]["top1"] < 1.0
        assert any("mean 0.5/0.5/0.5" in note and "--mean" in note
                   for note in wrong["data"]["notes"])  # fmt: skip


def _trained_with(tmp_path: Path, mean: Any, std: Any) -> tuple[Path, Path]:
    """Return a state dict whose head is right on pictures prepared so, and the pictures."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH, img_size=32, num_classes=6, depth=2).eval()
    cfg = {**resolve_model_data_config(model), "mean": mean, "std": std, "input_size": (3, 32, 32)}
    transform = create_transform(**cfg, is_training=False)
    rng, inputs, labels = np.random.default_rng(0), [], []
    for label in range(6):
        (tmp_path / "val" / str(label)).mkdir(parents=True)
        # shades so close that another normalization moves them across the boundaries
        base = np.full((40, 40, 3), 120 + 6 * label, np.int64)
        for number in range(4):
            levels = (base + rng.integers(-2, 3, base.shape)).astype(np.uint8)
            picture = Image.fromarray(levels)
            picture.save(tmp_path / "val" / str(label) / f"{number}.png")
            inputs.append(transform(picture))
            labels.append(label)
    images, wanted = torch.stack(inputs), torch.tensor(labels)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        means = torch.stack([features[wanted == label].mean(0) for label in range(6)])
        model.head.weight.copy_(means)
        model.head.bias.copy_(-(means**2).sum(1) / 2)
        assert (model(images).argmax(1) == wanted).all()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth", tmp_path / "val"


class _Net(nn.Module):
    """A model within another, as people write them."""

    def __init__(self, name: str, inner: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        setattr(self, name, inner)
        for other, module in others.items():
            setattr(self, other, module)


class TestNames:
    @pytest.mark.parametrize(
        "prefix", ["timm_model.", "encoder.", "base_model.", "net.", "visual.trunk.", "a.b.c."]
    )
    def test_any_prefix(self, tmp_path: Path, prefix: str) -> None:
        model = bare_tiny()
        state = {prefix + key: value for key, value in model.state_dict().items()}
        found = load_checkpoint(saved(tmp_path, state), arch=TEST_VIT)
        answers(found.model, model)
        assert f"prefix {prefix!r} stripped" in found.notes

    @pytest.mark.parametrize("key", ["weights", "params", "network", "model_state"])
    def test_any_key_of_the_weights(self, tmp_path: Path, key: str) -> None:
        model = bare_tiny()
        answers(load(saved(tmp_path, {key: model.state_dict(), "epoch": 1}), arch=TEST_VIT), model)

    def test_dino(self, tmp_path: Path) -> None:
        student, teacher = bare_tiny(num_classes=0), bare_tiny(num_classes=0)
        with torch.no_grad():
            teacher.cls_token.add_(1)
        head = {"head.mlp.0.weight": torch.randn(8, 64), "head.last_layer.weight_g": torch.ones(8)}
        value = {
            "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
            "teacher": {
                **{f"backbone.{k}": v for k, v in teacher.state_dict().items()},
                **head,
            },
            "epoch": 3,
        }
        found = load_checkpoint(saved(tmp_path, value), arch=TEST_VIT)
        answers(found.model, teacher)
        assert any("left out beside 'backbone.'" in note and "head.mlp" in note
                   for note in found.notes)  # fmt: skip

    def test_dinov2_with_its_chunks_and_registers(self, tmp_path: Path) -> None:
        """timm's own reading of DINOv2's names is the reference."""
        from timm.models.vision_transformer import checkpoint_filter_fn

        changes = {"depth": 2, "img_size": 28, "embed_dim": 24, "num_heads": 3, "num_classes": 0}
        model = timm.create_model("vit_small_patch14_reg4_dinov2", **changes).eval()
        with torch.no_grad():
            for each in model.parameters():
                each.add_(torch.randn_like(each) * 0.1)
        state = dict(model.state_dict())
        theirs = {
            "mask_token": torch.zeros(1, 24),
            "register_tokens": state.pop("reg_token"),
            "cls_token": state.pop("cls_token"),
            "pos_embed": torch.cat([torch.zeros(1, 1, 24), state.pop("pos_embed")], 1),
            **state,
        }
        answer = checkpoint_filter_fn(dict(theirs), model)
        model.load_state_dict(answer)
        chunked = {
            re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", key): value
            for key, value in theirs.items()
        }
        value = {"teacher": {f"backbone.{key}": each for key, each in chunked.items()}}
        found = load(
            saved(tmp_path, value),
            arch="vit_small_patch14_reg4_dinov2",
            model_kwargs={"depth": 2, "embed_dim": 24, "num_heads": 3},
        )
        images = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(found(images), model(images))

    def test_the_teacher_of_two_in_one_dictionary(self, tmp_path: Path) -> None:
        student, teacher = bare_tiny(num_classes=0), bare_tiny(num_classes=0)
        with torch.no_grad():
            teacher.cls_token.add_(1)
        state = {
            **{f"student.{key}": value for key, value in student.state_dict().items()},
            **{f"teacher.{key}": value for key, value in teacher.state_dict().items()},
        }
        answers(load(saved(tmp_path, state), arch=TEST_VIT), teacher)
        other = {key.replace("teacher", "second"): value for key, value in state.items()}
        assert "several models (second., student.)" in refusal(
            saved(tmp_path, other), arch=TEST_VIT
        )

    def test_a_teacher_that_another_was_distilled_from_is_not_taken(self, tmp_path: Path) -> None:
        model, teacher = bare_tiny(), bare_tiny()
        with torch.no_grad():
            teacher.cls_token.add_(1)
        value = {"model": model.state_dict(), "teacher": teacher.state_dict()}
        answers(load(saved(tmp_path, value), arch=TEST_VIT), model)
        flat = {
            **{f"net.{key}": each for key, each in model.state_dict().items()},
            **{f"teacher.{key}": each for key, each in teacher.state_dict().items()},
        }
        assert "several models (net., teacher.)" in refusal(saved(tmp_path, flat), arch=TEST_VIT)

    def test_teachers_with_classifiers_are_asked_about(self, tmp_path: Path) -> None:
        """Of a distillation the student is meant, of a mean teacher the teacher."""
        state = bare_tiny().state_dict()
        value = {"student": state, "teacher": state}
        assert "does not say which" in refusal(saved(tmp_path, value), arch=TEST_VIT)

    @pytest.mark.parametrize(
        ("name", "layer"),
        [("bn", nn.BatchNorm1d(64)), ("fc1", nn.Linear(64, 64)), ("neck", nn.Linear(64, 64))],
    )
    def test_layers_that_would_change_its_answers_are_not_left_out(
        self, tmp_path: Path, name: str, layer: nn.Module
    ) -> None:
        others = {name: layer, "head": nn.Linear(64, 5)}
        wrapped = _Net("backbone", bare_tiny(num_classes=0), **others)
        message = refusal(saved(tmp_path, wrapped.state_dict()), arch=TEST_VIT)
        assert f"may change its answers ({name}." in message
        outer = _Net("backbone", bare_tiny(), classifier=nn.Linear(5, 3))
        message = refusal(saved(tmp_path, outer.state_dict()), arch=TEST_VIT)
        assert "may change its answers (classifier.weight" in message

    def test_a_head_in_a_dictionary_of_its_own(self, tmp_path: Path) -> None:
        value = {
            "model": bare_tiny(num_classes=0).state_dict(),
            "head": nn.Linear(64, 5).state_dict(),
        }
        assert "a 'head' beside 'model'" in refusal(saved(tmp_path, value), arch=TEST_VIT)

    def test_a_head_without_bias(self, tmp_path: Path) -> None:
        model = bare_tiny()
        model.head = nn.Linear(64, 5, bias=False)
        answers(load(saved(tmp_path, model.state_dict()), arch=TEST_VIT), model)

    @pytest.mark.parametrize("name", ["classifier", "fc"])
    @pytest.mark.parametrize("sequential", [False, True])
    def test_a_classifier_beside_a_backbone(
        self, tmp_path: Path, name: str, sequential: bool
    ) -> None:
        backbone, linear = bare_tiny(num_classes=0), nn.Linear(64, 5)
        head = nn.Sequential(nn.Dropout(0.1), linear) if sequential else linear
        model = _Net("backbone", backbone, **{name: head}).eval()
        found = load_checkpoint(saved(tmp_path, model.state_dict()), arch=TEST_VIT)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(found.model(images), linear(backbone(images)))
        assert any(f"head from {name}.*" in note for note in found.notes)

    def test_a_head_behind_dropout(self, tmp_path: Path) -> None:
        model = bare_tiny()
        model.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 5)).eval()
        answers(load(saved(tmp_path, model.state_dict()), arch=TEST_VIT), model)

    def test_a_head_of_several_layers(self, tmp_path: Path) -> None:
        model = bare_tiny()
        model.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
        path = saved(tmp_path, model.state_dict())
        assert "a head of several layers (head.0.weight" in refusal(path, arch=TEST_VIT)
        assert load(path, arch=TEST_VIT, num_classes=0).num_classes == 0
        wrapped = _Net("backbone", bare_tiny(num_classes=0), classifier=model.head)
        message = refusal(saved(tmp_path, wrapped.state_dict()), arch=TEST_VIT)
        assert "a head of several layers (classifier.0.weight" in message

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda key: key.replace("qkv.weight", "qkv.base_layer.weight"), "LoRA layers"),
            (
                lambda key: (
                    f"vit.encoder.layer.0.attention.attention.query.{key.replace('.', '_')}"
                ),
                "transformers",
            ),
            (lambda key: f"encoder.layers.encoder_layer_0.{key.replace('.', '_')}", "torchvision"),
            (lambda key: f"layer1.0.conv1.{key.replace('.', '_')}", "convolutional"),
            (lambda key: f"something.else.{key.replace('.', '_')}", "the file has something.else."),
        ],
    )
    def test_what_fits_nothing_is_told_by_its_looks(
        self, tmp_path: Path, change: Any, words: str
    ) -> None:
        state = {change(key): value for key, value in bare_tiny().state_dict().items()}
        assert words in refusal(saved(tmp_path, state), arch=TEST_VIT)

    def test_a_quantized_model(self, tmp_path: Path) -> None:
        state = {**bare_tiny().state_dict(), "blocks.0.attn.qkv._packed_params.dtype": torch.qint8}
        assert "a quantized model" in refusal(saved(tmp_path, state), arch=TEST_VIT)


class TestChanged:
    """Models that were changed after timm made them are built again the same, or refused."""

    def changed(self) -> dict[str, nn.Module]:
        models = {name: bare_tiny() for name in ("pool", "norm", "activation", "head", "eps")}
        models["pool"].global_pool = "avg"
        models["norm"].norm = nn.Identity()
        for block in models["activation"].blocks:
            block.mlp.act = nn.ReLU()
        models["head"].head = nn.Sequential(nn.Linear(64, 5), nn.Sigmoid())
        for block in models["eps"].blocks:
            block.norm1.eps = 0.5
        return models

    def test_saved_and_loaded_they_are_the_same_or_refused(self, tmp_path: Path) -> None:
        for name, model in self.changed().items():
            pruned = sd.prune(model, layers=[1])
            path = tmp_path / f"{name}.pt"
            if name == "pool":  # timm has an argument for it
                sd.save(pruned, path)
                answers(sd.load(path).vit, model)
                continue
            with pytest.raises(sd.CheckpointError, match="changed after timm made it"):
                sd.save(pruned, path)
            assert not path.exists()

    def test_a_classifier_that_timm_reset(self, tmp_path: Path) -> None:
        model = bare_tiny()
        model.reset_classifier(7, "avg")
        model.eval()
        sd.save(sd.prune(model, layers=[1]), tmp_path / "reset.pt")
        answers(sd.load(tmp_path / "reset.pt").vit, model)

    def test_pickled_they_are_the_same_or_refused(self, tmp_path: Path) -> None:
        for name, model in self.changed().items():
            path = saved(tmp_path, model, f"{name}.pt")
            if name == "pool":
                answers(load(path, trust_pickle=True), model)
            else:
                refusal(path, trust_pickle=True)

    def test_a_pickled_modules_untouched_preprocessing_is_assumed(self, tmp_path: Path) -> None:
        model: Any = bare_tiny()
        found = load_checkpoint(saved(tmp_path, model), trust_pickle=True)
        assert any("mean 0.5" in each for each in found.assumed)
        model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
        found = load_checkpoint(saved(tmp_path, model), trust_pickle=True)
        assert not any("mean" in each for each in found.assumed)

    def test_a_forward_of_its_own_is_not_bypassed(self) -> None:
        class Sigmoid(timm.models.VisionTransformer):
            def forward(self, x: Any, attn_mask: Any = None) -> Any:
                return super().forward(x).sigmoid()

        model = Sigmoid(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5)
        with pytest.raises(sd.UnsupportedModelError, match="has a forward of its own"):
            sd.prune(model)


class TestCommands:
    @pytest.fixture(scope="class")
    @staticmethod
    def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("plain")
        return saved(folder, bare_tiny(global_pool="avg").state_dict())

    @pytest.fixture(scope="class")
    @staticmethod
    def exported(plain: Path) -> Path:
        code, output = run("export", plain, "--arch", TEST_VIT, "--global-pool", "avg",
                           "--layers", 1, "--mean", "0.1,0.2,0.3", "--threshold", 0.9,
                           "-o", plain.parent / "out")  # fmt: skip
        assert code == 0, output
        assert "how its pictures were prepared, so this is assumed: std" in output
        assert "--std, --interpolation, --crop-pct" in output
        return plain.parent / "out"

    def test_the_question_is_asked_as_an_option(self, plain: Path) -> None:
        code, output = run("export", plain, "--arch", TEST_VIT, "-o", plain.parent / "never")
        assert code == 2
        assert "choose with --global-pool" in output

    def test_a_reference_is_loaded_as_the_manifest_says(self, exported: Path, plain: Path) -> None:
        """Without --arch, --global-pool or --mean."""
        code, output = run("verify", exported, "--reference", plain)
        assert code == 0, output
        code, output = run(
            "verify", exported, "--reference", plain, "--arch", "vit_tiny_patch16_224"
        )
        assert code == 2
        assert "does not fit" in output

    def test_accuracy_against_it_too(self, exported: Path, plain: Path, tmp_path: Path) -> None:
        data = tmp_path / "data.npz"
        images = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
        np.savez(data, images=images)
        code, output = run("verify", exported, "--data", data, "--reference", plain,
                           "--min-agreement", "50%")  # fmt: skip
        assert code == 0, output

    def test_they_are_refused_where_there_is_no_checkpoint(self, exported: Path) -> None:
        for command in (
            ("verify", exported, "--mean", "0.5"),
            ("visualize", exported, SAMPLES, "--crop-pct", "1"),
            ("sweep", exported, "--data", SAMPLES, "--global-pool", "avg"),
        ):
            code, output = run(*command)
            assert code == 2, output
            assert command[-2] in output

    def test_inspect_says_what_was_assumed(self, plain: Path) -> None:
        code, output = run("inspect", plain, "--arch", TEST_VIT, "--global-pool", "avg", "--json")
        assert code == 0
        described = json.loads(output)
        assert described["model_args"]["global_pool"] == "avg"
        assert "mean" in described["preprocessing"]["assumed"]
        assert any("--mean" in each for each in described["assumed"])

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            (("--mean", "a,b"), "--mean 'a,b' is not understood"),
            (("--model-kwargs", "depth"), "--model-kwargs 'depth' is not understood"),
            (("--model-kwargs", "nonsense=1"), "nonsense"),
        ],
    )
    def test_mistakes_are_one_line(self, plain: Path, option: Any, words: str) -> None:
        code, output = run("inspect", plain, "--arch", TEST_VIT, "--global-pool", "avg", *option)
        assert code == 2
        assert words in output
