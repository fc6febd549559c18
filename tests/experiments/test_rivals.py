"""The published rivals do what their papers say, and their files what the models do."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from places import ROOT

import simprune_deploy as sd

SCRIPTS = ROOT / "experiments"
NAMES = ("tracks", "rival_models", "rivals")
PATCHES, DEPTH = 36, 2


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; few resamples are enough to see that they work."""
    sys.path.insert(0, str(SCRIPTS))
    threads = torch.get_num_threads()
    try:
        modules = {name: importlib.import_module(name) for name in NAMES}
        modules["tracks"].RESAMPLES = 50  # type: ignore[attr-defined]
        yield modules
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in NAMES:
            sys.modules.pop(name, None)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["rival_models"]


def tiny(class_token: bool = True) -> Any:
    """A ViT of 36 patches and 2 blocks, whose tokens differ."""
    torch.manual_seed(0)
    kinds = {} if class_token else {"class_token": False, "global_pool": "avg"}
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "num_heads": 3}
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=DEPTH, num_classes=5, init_values=0.5, **sizes, **kinds
    )
    for weights in (each for each in vit.parameters() if each.ndim > 1):
        torch.nn.init.normal_(weights, std=0.3)  # so that what is lost shows in the output
    return vit.eval()


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def made(models: ModuleType, vit: Any) -> dict[str, Any]:
    """Every rival that reduces, by name."""
    return {
        "tome": models.ToMe(vit, [5] * DEPTH),
        "pitome": models.PiToMe(vit, 0.8, matching_blocks=1),
        "atc": models.ATC(vit, [30, 20], "average"),
        "atm": models.ATM(vit, models.atm_thresholds(0.6, 0.1, DEPTH), split=1),
        "saint": models.Saint(vit, 0.35, neighbors=3),
        "random": models.RandomDrop(vit, [5] * DEPTH),
    }


@pytest.mark.parametrize("class_token", [True, False])
@torch.inference_mode()
def test_without_reduction_it_is_the_dense_model(models: ModuleType, class_token: bool) -> None:
    vit = tiny(class_token)
    nothing = [
        models.Rival(vit),
        models.ToMe(vit, [0] * DEPTH),
        models.PiToMe(vit, 1.0),
        models.ATC(vit, [PATCHES] * DEPTH),
        models.ATM(vit, [1.5] * DEPTH),
        models.Saint(vit, 1.5),
        models.RandomDrop(vit, [0] * DEPTH),
    ]
    (image,) = pictures(1)
    for model in nothing:
        torch.testing.assert_close(model.eval()(image), vit(image), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_counts_are_the_schedules(models: ModuleType) -> None:
    (image,) = pictures(1)
    expected = {
        "tome": [32, 27],
        "pitome": [30, 25],
        "atc": [31, 21],
        "random": [32, 27],
    }
    for class_token in (True, False):
        vit = tiny(class_token)
        for name, wanted in expected.items():
            counts: list[int] = []
            made(models, vit)[name].eval()(image, counts)
            assert counts == [each - (not class_token) for each in wanted], name
    assert models.tome_schedule(3, 4) == [3, 3, 3, 3]
    assert models.tome_schedule(3, 4, decreasing=True) == [6, 4, 2, 0]
    assert models.atc_stages(0.5, 100, 12) == [100] * 3 + [50] * 3 + [25] * 3 + [12] * 3
    assert models.atm_thresholds(0.9, 0.1, 3, least=0.7) == [0.9, 0.794829, 0.7]


def similarity(metric: np.ndarray, one: int, two: int) -> float:
    pair = metric[[one, two]]
    return float(pair[0] @ pair[1] / np.prod(np.linalg.norm(pair, axis=1)))


def averaged(
    tokens: np.ndarray, size: np.ndarray, groups: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and sizes of groups of tokens."""
    total = np.array([size[group].sum() for group in groups])
    sums = [(tokens[group] * size[group][:, None]).sum(0) for group in groups]
    return np.stack(sums) / total[:, None], total


def literal_tome(
    tokens: np.ndarray, size: np.ndarray, metric: np.ndarray, removed: int, has_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Section 3's five steps of bipartite soft matching, pair by pair."""
    first, second = range(0, len(tokens), 2), range(1, len(tokens), 2)
    edges = []
    for one in first[has_class:]:
        best = max(second, key=lambda two: similarity(metric, one, two))
        edges.append((similarity(metric, one, best), one, best))
    edges.sort(reverse=True)
    groups = {two: [two] for two in second}
    for _, one, two in edges[:removed]:
        groups[two].append(one)
    alone = [one for _, one, _ in edges[removed:]]
    stay = [0, *sorted(alone)] if has_class else alone
    return averaged(tokens, size, [[one] for one in stay] + [groups[two] for two in second])


def literal_pitome(
    tokens: np.ndarray, size: np.ndarray, metric: np.ndarray, removed: int, margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's algorithm behind a class token, pair by pair."""
    patches = range(1, len(tokens))
    energy = {}
    for one in patches:
        over = [similarity(metric, one, two) - margin for two in patches]
        energy[one] = np.mean([x if x > 0 else np.exp(x) - 1 for x in over])
    order = sorted(patches, key=lambda one: -energy[one])
    first, second = order[: 2 * removed : 2], order[1 : 2 * removed : 2]
    groups = {two: [two] for two in second}
    for one in first:
        groups[max(second, key=lambda two: similarity(metric, one, two))].append(one)
    groups_of_all = [[0], *([one] for one in order[2 * removed :])]
    return averaged(tokens, size, groups_of_all + [groups[two] for two in second])


def random_tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 9, (1, count, 1), generator=generator).float()
    tokens = torch.randn(1, count, 24, generator=generator)
    return tokens, size, torch.randn(count, 8, generator=generator)


def same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found[0][0], wanted[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[1][0, :, 0], wanted[1])


@pytest.mark.parametrize("seed", range(5))
def test_tome_and_pitome_are_the_papers_loops(models: ModuleType, seed: int) -> None:
    vit, bare = tiny(), tiny(class_token=False)
    for count in (36, 37):
        tokens, size, metric = random_tokens(count, seed)
        arrays = (tokens[0].numpy(), size[0, :, 0].numpy(), metric.double().numpy())
        for removed in (1, 7, 17):
            for model, has_class in ((vit, True), (bare, False)):
                tome = models.ToMe(model, [removed] * DEPTH)
                wanted = literal_tome(*arrays, removed, has_class)
                same(tome.reduce(0, tokens, size, metric), wanted)
            pitome = models.PiToMe(vit, 1 - (removed + 0.5) / (count - 1))
            found = pitome.reduce(1, tokens, size, metric)
            same(found, literal_pitome(*arrays, removed, 0.9 - 0.9 / DEPTH))


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_clusters_join_the_two_nearest_each_time(models: ModuleType, linkage: str) -> None:
    kind = {"average": np.mean, "complete": np.max, "single": np.min}[linkage]
    for seed in range(3):
        points = np.random.default_rng(seed).random((15, 3))
        distance = np.linalg.norm(points[:, None] - points[None], axis=2)
        groups = [[point] for point in range(15)]
        while len(groups) > 4:
            pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
            far = [kind(distance[np.ix_(groups[i], groups[j])]) for i, j in pairs]
            i, j = pairs[int(np.argmin(far))]
            groups[j] += groups.pop(i)
        labels = models.clusters(distance.copy(), 4, linkage)
        found = {frozenset(np.flatnonzero(labels == label)) for label in range(4)}
        assert found == {frozenset(group) for group in groups}


@pytest.mark.parametrize("seed", range(3))
def test_atm_merges_all_pairs_at_the_threshold_and_no_two_large_ones(
    models: ModuleType, seed: int
) -> None:
    tokens, size, metric = random_tokens(37, seed)
    atm = models.ATM(tiny(), [0.6, 0.6], split=1, compared="keys")
    array = metric.double().numpy()
    best = [max(similarity(array, i, j) for j in range(1, 37, 2)) for i in range(2, 37, 2)]
    reaching = sum(each >= 0.6 for each in best)
    found, sizes = atm.reduce(0, tokens, size, metric)
    assert 0 < reaching < 18
    assert found.shape[1] == 37 - reaching
    torch.testing.assert_close(sizes.sum(), size.sum())
    torch.testing.assert_close((found * sizes).sum(1), (tokens * size).sum(1))
    # the larger half by size never goes: each of it heads a slot behind the small that stay
    _, sizes = atm.reduce(1, tokens, size, metric)
    large = size[0, 1:, 0].sort(stable=True).values[18:]
    assert bool((sizes[0, -18:, 0] >= large).all())


def test_saint_drops_the_most_redundant_of_every_other_patch(models: ModuleType) -> None:
    tokens, _, metric = random_tokens(37, 0)
    array, theta = metric.double().numpy(), 0.2
    score, many = {}, 0
    for one in range(1, 37, 2):
        alike = [similarity(array, one, two) for two in range(2, 37, 2)]
        near = [each for each in alike if each >= theta]
        many += len(near) >= 5
        found = len(near) * np.exp(10 * (np.mean(near) - theta)) if near else np.mean(alike)
        score[one] = found
    order = sorted(score, key=lambda one: -score[one])
    assert 0 < many < 18
    kept, size = models.Saint(tiny(), theta).reduce(0, tokens, None, metric)
    assert size is None
    places = [0, *order[many:], *range(2, 37, 2)]
    torch.testing.assert_close(kept, tokens[:, places], rtol=0, atol=0)
    later, _ = models.Saint(tiny(), theta).reduce(1, tokens, None, metric)
    assert later is tokens  # only the first half of the blocks drops


@pytest.mark.parametrize("name", ["tome", "pitome", "atm", "saint", "random"])
def test_the_file_is_the_model(scripts: dict[str, ModuleType], name: str) -> None:
    from simprune_deploy.predict.onnx_predictor import open_session

    vit = tiny()
    model = made(scripts["rival_models"], vit)[name].eval()
    images = pictures(3)
    session = open_session(scripts["rivals"].export(model, images[0]))
    seen = set()
    with torch.inference_mode():
        for image in images:
            counts: list[int] = []
            wanted = model(image, counts)
            (found,) = session.run(None, {"images": image.numpy()})
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
            seen.add(tuple(counts))
    assert (len(seen) > 1) == model.counts_depend_on_image
    again = type(model)(vit, **json.loads(json.dumps(model.settings()))).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images[0]), model(images[0]), rtol=0, atol=0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_script_sets_times_and_goes_on(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals, vit = scripts["rivals"], tiny()
    pruned = sd.prune(vit, threshold=0.3, layers=[0, 1], place="inside")
    sd.export(pruned, tmp_path / "out", sd.ExportOptions(batch=(1, 1)), verify=False)
    halves = [track_of(scripts["tracks"], vit, images) for images in pictures(12).split(6)]
    monkeypatch.setattr(rivals, "load_halves", lambda *args: halves)
    output = tmp_path / "rivals.csv"
    options = ["photographs", "--calibrate", "3", "-o", str(output)]
    options += ["--shares", "0.8", "--rivals", "tome", "atc", "--timed", "2"]

    def run(*more: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["rivals", *options, *more])
        rivals.main()
        return read(output)

    rows = run("--rounds", "0")
    assert [row["method"] for row in rows] == ["tome", "atc"]
    assert all(abs(float(row["flops"]) - 0.8) < 0.03 and not row["speedup"] for row in rows)
    assert all(0 < float(row["loss"]) < 20 and len(row["losses"].split()) == 6 for row in rows)
    timed = run("--rounds", "8", "--ours", f"ours={tmp_path / 'out'}")
    assert [row["method"] for row in timed] == ["tome", "atc", "ours"]
    assert [bool(row["speedup low"]) for row in timed] == [True, False, True]
    assert timed[0]["setting"] == rows[0]["setting"]
    monkeypatch.setattr(rivals, "choose", None)  # nothing is set anew
    assert run("--rounds", "8") == timed
    ours = torch.cat([pruned(image[None]) for image in halves[1].images])
    loss = rivals.losses_of(ours.detach(), halves[1]).mean()
    assert float(timed[2]["loss"]) == pytest.approx(loss, abs=1e-3)


def track_of(tracks: ModuleType, vit: Any, images: torch.Tensor) -> Any:
    pixels = images.flatten(0, 1)
    with torch.inference_mode():
        return tracks.Track("photographs", vit, pixels, None, vit(pixels), 1)


def test_ours_must_be_a_folder_with_a_name_of_its_own(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for text, said in (("tome=out", "a name that no rival has"), ("new=out", "manifest.json")):
        options = ["fashion", "--images", "4", "-o", str(tmp_path / "a.csv"), "--ours", text]
        monkeypatch.setattr(sys, "argv", ["rivals", *options])
        with pytest.raises(sd.SimpruneError, match=said):
            scripts["rivals"].main()
