"""Pictures of what was pruned: the composition of layers, the drawing, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.onnx.variants import without_function
from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.reports.clusters import Clusters, check_sizes, compose, grid_of
from simprune_deploy.reports.pictures import (
    TINT,
    color_of,
    draw_clusters,
    draw_sheet,
    panel_size,
    to_picture,
)

DEMO = ROOT / "examples" / "fashion_mnist"
SAMPLES = ROOT / "simprune_deploy" / "sample_images"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "160"})


def refusal(*arguments: object) -> str:
    result = call("visualize", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return str(line)


@st.composite
def chains(draw: Any) -> tuple[dict[int, PruneRecord], int, int, list[dict[int, set[int]]]]:
    """Prune layers as the operator gives them, with padding, and what they mean, followed by hand.

    The last value is, for each layer, the patches of every cluster by the patch that heads it.
    """
    prefix, patches = draw(st.integers(0, 3)), draw(st.integers(1, 24))
    records: dict[int, PruneRecord] = {}
    clusters = {patch: {patch} for patch in range(patches)}
    expected = []
    padding = 0
    for layer in draw(
        st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True).map(sorted)
    ):
        heads = sorted(clusters)  # tokens stand in the order of the patches that head them
        flags = draw(st.lists(st.booleans(), min_size=len(heads), max_size=len(heads)))
        kept = [head for head, flag in zip(heads, flags, strict=True) if flag] or heads[:1]
        target = [head if head in kept else draw(st.sampled_from(kept)) for head in heads]
        slots = [prefix + kept.index(each) for each in target]
        more = draw(st.integers(0, 2))
        valid = prefix + len(heads)
        records[layer] = PruneRecord(
            features=None,
            log_size=np.concatenate(
                [
                    np.zeros(prefix),
                    np.log([len(clusters[h]) for h in heads]),
                    -1e4 * np.ones(padding),
                ]
            ),
            threshold=0.9,
            kept_index=np.array(
                [*range(prefix), *(prefix + heads.index(h) for h in kept), *[0] * more]
            ),
            assignment=np.array([*range(prefix), *slots, *[-1] * padding]),
        )
        assert len(records[layer].assignment) == valid + padding
        merged: dict[int, set[int]] = {head: set() for head in kept}
        for head, to in zip(heads, target, strict=True):
            merged[to] |= clusters[head]
        clusters, padding = merged, more
        expected.append({head: set(members) for head, members in clusters.items()})
    return records, prefix, patches, expected


@settings(max_examples=150)
@given(chains())
def test_every_patch_ends_in_exactly_one_cluster(chain: Any) -> None:
    records, prefix, patches, expected = chain
    found = compose(records, prefix, patches)
    assert [each.layer for each in found] == sorted(records)
    for each, clusters in zip(found, expected, strict=True):
        members = {head: set(np.flatnonzero(each.member == head)) for head in each.heads.tolist()}
        assert members == clusters
        assert each.sizes.sum() == patches
        assert each.sizes.tolist() == [len(clusters[head]) for head in each.heads.tolist()]
    check_sizes(records, found, prefix)


def test_records_that_do_not_fit_are_refused() -> None:
    record = PruneRecord(None, np.zeros(4), 0.9, np.array([0, 1]), np.array([0, 1, 1, 1]))
    (only,) = compose({2: record}, 1, 3)
    assert only.member.tolist() == [0, 0, 0]
    with pytest.raises(SimpruneError, match="before block 2"):
        compose({2: record}, 1, 9)
    lost = dataclasses.replace(record, assignment=np.array([0, 1, -1, 1]))
    with pytest.raises(SimpruneError, match="inside block 2"):
        compose({2: lost}, 1, 3, "inside")
    second = PruneRecord(None, np.log([1, 2]), 0.9, np.array([0, 1]), np.array([0, 1]))
    with pytest.raises(SimpruneError, match="before block 2 are not those of the model"):
        check_sizes({2: record, 3: second}, compose({2: record, 3: second}, 1, 3), 1)


@pytest.mark.parametrize(("place", "features"), [("before", "tokens"), ("inside", "mean-keys")])
def test_the_model_counts_the_same_sizes_in_every_batch(place: str, features: str) -> None:
    """PyTorch's final log-sizes are those of the composed clusters, padding between or not."""
    where = {"layers": [1, 3, 4], "place": place, "features": features}
    model = sd.prune(sd.load(DEMO / "vit"), threshold=0.9, **where).eval()
    with np.load(DEMO / "test_slice.npz") as data:
        pixels = (data["images"][:4, None].astype(np.float32) / 255 - 0.286) / 0.353
    traces: list[Any] = []
    with torch.inference_mode():
        _, log_size = model.forward_features(torch.from_numpy(pixels), traces=traces)
    for image in range(4):
        records = {
            trace.layer: PruneRecord(
                None,
                trace.log_size[image].numpy(),
                0.9,
                trace.kept_index[image].numpy(),
                trace.assignment[image].numpy(),
            )
            for trace in traces
        }
        found = compose(records, 1, 196)
        check_sizes(records, found, 1)
        sizes = log_size[image, 1:].exp().numpy()
        assert np.allclose(sizes[: len(found[-1].heads)], found[-1].sizes, rtol=1e-4)
        assert np.allclose(sizes[len(found[-1].heads) :], 0)


def test_a_grid_is_found_again() -> None:
    assert grid_of(196, 224, 224) == (14, 14)
    assert grid_of(24, 64, 96) == (4, 6)
    with pytest.raises(SimpruneError, match="no grid"):
        grid_of(7, 100, 110)


def test_panels_show_kept_patches_and_tint_the_others() -> None:
    rng = np.random.default_rng(0)
    grid = (4, 6)
    size = panel_size(grid)
    picture = to_picture(rng.random((1, 32, 48), np.float32), size)
    assert picture.size == (size[1], size[0])
    member = np.arange(24)
    member[[1, 7, 8]] = 0  # the first patch stands for four
    panel = np.asarray(draw_clusters(picture, Clusters(3, member), grid))
    plain, cell = np.asarray(picture), size[0] // 4

    def inner(pixels: np.ndarray, position: int) -> np.ndarray:
        y, x = position // 6 * cell, position % 6 * cell
        return pixels[y + 4 : y + cell - 4, x + 4 : x + cell - 4].astype(float)

    for alone in (10, 23):
        assert (inner(panel, alone) == inner(plain, alone)).all()
    tinted = inner(plain, 8) + TINT * (np.array(color_of(0)) - inner(plain, 8))
    assert np.abs(inner(panel, 8) - tinted).max() <= 1
    frame = panel[2 : cell - 2, 2]  # the left edge of the kept patch
    assert (np.abs(frame.astype(int) - color_of(0)).sum(1) < 3).mean() > 0.9
    # two untouched patches have no line between them
    assert (panel[cell * 2 :, cell * 3 :] == plain[cell * 2 :, cell * 3 :]).all()


def test_colors_are_stable_and_neighbours_differ() -> None:
    for columns in (14, 16, 24, 37):
        for head in range(columns * 4):
            for other in (head + 1, head + columns):
                apart = np.abs(np.subtract(color_of(head), color_of(other))).sum()
                assert apart > 60, (columns, head, other)


def test_names_from_outside_fit_on_the_page() -> None:
    picture = to_picture(np.zeros((3, 8, 8), np.float32), panel_size((2, 2)))
    clusters = [Clusters(1, np.zeros(4, np.int64))]
    page = draw_sheet(picture, clusters, (2, 2), "x\n\x1b\u0000" + "long " * 500, "class: 3")
    assert page.width < 1000


@pytest.fixture(scope="module")
def from_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("visualize") / "torch"
    result = call("visualize", DEMO / "vit", DEMO / "test_slice.npz", "--limit", 5, "--threshold",
                  0.9, "--layers", "1,3,4", "-o", folder, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_a_folder_of_pictures_is_written_whole(from_torch: Any) -> None:
    folder, numbers = from_torch
    assert {path.name for path in folder.iterdir()} == {
        "pictures.json",
        "contact-sheet.png",
        *(each["file"] for each in numbers["pictures"]),
    }
    assert json.loads((folder / "pictures.json").read_text()) == {
        name: value for name, value in numbers.items() if name != "output"
    }
    assert len(numbers["pictures"]) == 5
    for each in numbers["pictures"]:
        assert each["says"].startswith("class: ")
        assert [layer["layer"] for layer in each["layers"]] == [1, 3, 4]
        kept = [layer["kept"] for layer in each["layers"]]
        assert 196 > kept[0] >= kept[1] >= kept[2] > 1
        for layer in each["layers"]:
            assert sum(layer["sizes"]) == len(layer["member"]) == 196
        with Image.open(folder / each["file"]) as page:
            assert page.width > 4 * 400


def test_an_export_shows_what_pytorch_shows(from_torch: Any, tmp_path: Path) -> None:
    """Also one that takes images as a camera gives them, and its file without the function."""
    _, numbers = from_torch
    pruned = sd.prune(sd.load(DEMO / "vit"), threshold=0.9, layers=[1, 3, 4])
    sd.export(
        pruned,
        tmp_path / "export",
        sd.ExportOptions(batch=(1, 4), input="uint8-nhwc"),
        verify=False,
    )
    common = (tmp_path / "export", DEMO / "test_slice.npz", "--limit", 5)
    shown = call("visualize", *common, "-o", tmp_path / "pictures", "--json")
    assert shown.exit_code == 0, shown.output
    pairs = zip(json.loads(shown.stdout)["pictures"], numbers["pictures"], strict=True)
    same = [mine["layers"] == theirs["layers"] for mine, theirs in pairs]
    assert sum(same) >= 4  # a decision may turn on float noise, rarely
    file = tmp_path / "export" / "model-plugin.onnx"
    onnx.save(without_function(onnx.load(tmp_path / "export" / "model.onnx")), file)
    again = call("visualize", file, *common[1:], "-o", tmp_path / "of-the-file", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["pictures"] == json.loads(shown.stdout)["pictures"]
    assert "is fixed at 0.9" in refusal(*common, "--threshold", 0.8, "-o", tmp_path / "x")
    for option, value in (("--layers", "1"), ("--place", "inside"), ("--features", "tokens")):
        line = refusal(*common, option, value, "-o", tmp_path / "x")
        assert f"are fixed in the graph: leave {option} out" in line


def test_layers_inside_blocks_are_drawn_and_named(tmp_path: Path) -> None:
    common = (DEMO / "test_slice.npz", "--limit", 2, "--threshold", 0.9)
    where = ("--layers", "1,4", "--place", "inside", "--features", "mean-keys")
    found = call("visualize", DEMO / "vit", *common, *where, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "kept inside block 1" in found.stdout
    numbers = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert (numbers["place"], numbers["features"]) == ("inside", "mean-keys")
    for each in numbers["pictures"]:
        assert [layer["layer"] for layer in each["layers"]] == [1, 4]
        assert 196 > each["layers"][0]["kept"] > each["layers"][1]["kept"]
    line = refusal(DEMO / "vit", *common, "--features", "keys", "-o", tmp_path / "x")
    assert "add --place inside, or take --features tokens" in line


def test_what_cannot_be_shown_is_refused_and_bad_files_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad, evil = tmp_path / "bad.png", tmp_path / ".. $(x) ünï.png"
    bad.write_bytes(b"no picture")
    Image.open(SAMPLES / "cat.jpg").save(evil)
    model = DEMO / "vit"
    assert "none of the 1 pictures" in refusal(model, bad, "-o", out)
    assert "does not exist" in refusal(model, tmp_path / "none.png", "-o", out)
    assert "--limit 0" in refusal(model, SAMPLES, "--limit", 0, "-o", out)
    assert "'a' is not understood" in refusal(model, evil, "--layers", "a", "-o", out)
    assert "outside [-1, 2]" in refusal(model, evil, "--threshold", 3, "-o", out)
    assert not out.exists()
    shown = call("visualize", model, evil, bad, "-o", out)
    assert shown.exit_code == 0, shown.output
    assert "skipped bad.png: not a picture" in shown.stdout
    assert {path.name for path in out.iterdir()} == {"001-x_n.png", "pictures.json"}
    assert "already exists" in refusal(model, evil, "-o", out)
    assert call("visualize", model, evil, "-o", out, "--force").exit_code == 0
