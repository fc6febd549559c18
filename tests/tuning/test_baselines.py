"""The baselines do what their papers say, at exactly the token counts that they are given."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from definition import PAD, Array, exact_case, random_case, similarity_of
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.common.errors import SimpruneError, UnsupportedModelError
from simprune_deploy.pruning.model import PrunedViT, PruneTrace
from simprune_deploy.pruning.operator import similarity_prune
from simprune_deploy.tuning.baselines import (
    BASELINES,
    Baseline,
    kept_counts,
    lose_tokens,
    make_rule,
    saint_scores,
    tome_pairs,
)

EXAMPLES = ROOT / "examples"
REPRODUCIBLE = settings(deadline=None, derandomize=True, database=None)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prune point: a padded batch, and how many patches every image keeps."""

    tokens: torch.Tensor
    log_size: torch.Tensor
    kept: torch.Tensor
    prefix: int

    @property
    def valid(self) -> torch.Tensor:
        return self.log_size > PAD / 2

    def solve(self, name: str) -> tuple[torch.Tensor, ...]:
        seeds = [(7, int(1000 * image.abs().sum())) for image in self.tokens[:, : self.prefix + 1]]
        rule = make_rule(name, self.prefix, seeds=seeds)
        return lose_tokens(self.tokens, self.log_size, self.kept, self.prefix, rule)

    def in_one_round(self) -> Problem:
        """Keep at least half: what a second round compares is merged, and no longer exact."""
        patches = self.valid.sum(1) - self.prefix
        return dataclasses.replace(self, kept=self.kept.maximum(patches - patches // 2))

    def image(self, index: int) -> Problem:
        """The image alone, without its padding."""
        one, own = slice(index, index + 1), int(self.valid[index].sum())
        return Problem(
            self.tokens[one, :own], self.log_size[one, :own], self.kept[one], self.prefix
        )


def problem(seed: int, batch: int, patches: int, prefix: int, exact: bool, sizes: str) -> Problem:
    """Patches as an earlier layer leaves them; of the counts to keep some change nothing."""
    make = exact_case if exact else random_case
    case = make(seed, batch=batch, patches=patches, prefix=prefix, padding="none")
    rng = np.random.default_rng(seed)
    own = rng.integers(1, patches + 1, batch)
    log_size = case.log_size if sizes == "several" else np.zeros_like(case.log_size)
    log_size[np.arange(prefix + patches) >= prefix + own[:, None]] = PAD
    kept = [int(rng.integers(1, count + 1)) for count in own]
    return Problem(
        torch.from_numpy(case.tokens), torch.from_numpy(log_size), torch.tensor(kept), prefix
    )


PROBLEMS = st.builds(
    problem,
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    patches=st.integers(1, 20),
    prefix=st.integers(0, 3),
    exact=st.just(True),
    sizes=st.sampled_from(["ones", "several"]),
)
NAMES = st.sampled_from(BASELINES)


@settings(REPRODUCIBLE, max_examples=300)
@given(PROBLEMS, NAMES)
def test_every_image_keeps_its_count_and_its_prefix(given: Problem, name: str) -> None:
    tokens, log_size, index, assignment = given.solve(name)
    filled = log_size > PAD / 2
    assert torch.equal(filled.sum(1), given.kept + given.prefix)
    assert (filled.int().diff(dim=1) <= 0).all(), "padding comes last"
    assert torch.equal(tokens[:, : given.prefix], given.tokens[:, : given.prefix])
    assert torch.equal(log_size[:, : given.prefix], given.log_size[:, : given.prefix])
    assert not index[~filled].any()
    assert not (given.valid & (assignment >= 0)).logical_xor(assignment >= 0).any()
    for image in range(len(tokens)):
        own = index[image, filled[image]]
        assert own.tolist() == sorted(set(own.tolist()))
        assert assignment[image, own].tolist() == list(range(len(own)))
    assert tokens.shape[1] == given.prefix + int(given.kept.max())


@settings(REPRODUCIBLE, max_examples=200)
@given(PROBLEMS, NAMES)
def test_what_is_lost_is_merged_or_gone(given: Problem, name: str) -> None:
    tokens, log_size, index, assignment = given.solve(name)
    sizes, before = log_size.double().exp(), given.log_size.double().exp()
    if name == "tome":
        assert (assignment[given.valid] >= 0).all()
        torch.testing.assert_close(sizes.sum(1), before.sum(1), rtol=1e-5, atol=0)
        mass = (given.tokens.double() * before[:, :, None]).sum(1)
        torch.testing.assert_close((tokens * sizes[:, :, None]).sum(1), mass, rtol=0, atol=1e-4)
        return
    assert torch.equal((assignment >= 0).sum(1), given.kept + given.prefix)
    filled = log_size > PAD / 2
    wide = index.unsqueeze(2).expand(-1, -1, tokens.shape[2])
    assert torch.equal(tokens[filled], given.tokens.gather(1, wide)[filled])
    assert torch.equal(log_size[filled], given.log_size.gather(1, index)[filled])


@settings(REPRODUCIBLE, max_examples=200)
@given(PROBLEMS, NAMES)
def test_an_image_does_not_depend_on_its_batch(given: Problem, name: str) -> None:
    if name == "tome":
        given = given.in_one_round()
    together = given.solve(name)
    for image in range(len(given.tokens)):
        alone = given.image(image).solve(name)
        for one, all_of_them in zip(alone, together, strict=True):
            own = all_of_them[image, : one.shape[1]]
            torch.testing.assert_close(one[0], own, rtol=0, atol=1e-6)


# --- ToMe -----------------------------------------------------------------------------------------


def tome_round(
    tokens: Array, sizes: Array, gone: int, prefix: int
) -> tuple[Array, Array, list[int], list[int]]:
    """The paper's steps, in loops: sets in turn, best partner, r best pairs, weighted average."""
    if gone == 0:
        return tokens, sizes, list(range(len(tokens))), list(range(len(tokens)))
    first = [i for i in range(prefix, len(tokens)) if i % 2 == 0]
    second = [i for i in range(prefix, len(tokens)) if i % 2 == 1]
    similarity = similarity_of(tokens)
    partner = {i: max(second, key=lambda j: (similarity[i, j], -j)) for i in first}
    merged = sorted(first, key=lambda i: (-similarity[i, partner[i]], i))[:gone]
    stays = [i for i in range(len(tokens)) if i not in merged]
    members = {i: [i, *(j for j in merged if partner[j] == i)] for i in stays}
    means = [np.average(tokens[members[i]], 0, sizes[members[i]]) for i in stays]
    totals = [sizes[members[i]].sum() for i in stays]
    goes_to = [stays.index(partner[i] if i in merged else i) for i in range(len(tokens))]
    return np.stack(means), np.array(totals), stays, goes_to


@settings(REPRODUCIBLE, max_examples=200)
@given(PROBLEMS)
def test_tome_equals_its_paper_written_in_loops(given: Problem) -> None:
    one = given.in_one_round().image(0)
    tokens, log_size, index, assignment = one.solve("tome")
    x, sizes = one.tokens[0].double().numpy(), one.log_size[0].double().exp().numpy()
    gone = len(x) - one.prefix - int(one.kept)
    x, sizes, stays, goes_to = tome_round(x, sizes, gone, one.prefix)
    assert index[0].tolist() == stays
    assert assignment[0].tolist() == goes_to
    np.testing.assert_allclose(tokens[0].numpy(), x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(log_size[0].numpy(), np.log(sizes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_tome_in_rounds_equals_its_paper(seed: int) -> None:
    given = problem(seed, 1, 24, seed % 3, exact=False, sizes="several")
    own = int(given.valid.sum()) - given.prefix
    given = dataclasses.replace(given, kept=torch.tensor([max(1, own // 5)]))
    one = given.image(0)
    tokens, log_size, index, _ = one.solve("tome")
    x, sizes = one.tokens[0].double().numpy(), one.log_size[0].double().exp().numpy()
    first = list(range(len(x)))
    while (excess := len(x) - one.prefix - int(one.kept)) > 0:
        can_go = sum(i % 2 == 0 for i in range(one.prefix, len(x)))
        x, sizes, stays, _ = tome_round(x, sizes, min(excess, can_go), one.prefix)
        first = [first[i] for i in stays]
    assert index[0].tolist() == first
    np.testing.assert_allclose(tokens[0].numpy(), x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_size[0].numpy(), np.log(sizes), rtol=0, atol=1e-5)


def test_tome_on_a_case_by_hand() -> None:
    """A class token, then patches at 0, 10, 90, 20 and 85 degrees; set A is those at 10 and 20.

    Both are most like the one at 0 degrees (10 more than 20, which is 65 degrees from 85); with
    one to go it is 10, with both 0 is the mean of all three, weighted by 1, 2 and 3.
    """
    degrees = np.radians([0, 10, 90, 20, 85])
    patches = np.stack([np.cos(degrees), np.sin(degrees)], 1)
    tokens = torch.tensor(np.concatenate([[[5.0, 5.0]], patches])[None], dtype=torch.float32)
    log_size = torch.tensor([[1, 1, 2, 1, 3, 1]]).log()
    for kept, total in ((4, (1, 2)), (3, (1, 2, 3))):
        problem = Problem(tokens, log_size, torch.tensor([kept]), 1)
        result, sizes, index, assignment = problem.solve("tome")
        members = [0, 1, 3][: len(total)]
        mean = np.average(patches[members], 0, total)
        np.testing.assert_allclose(result[0, 1], mean, rtol=1e-6)
        assert math.isclose(float(sizes[0, 1].exp()), sum(total), rel_tol=1e-6)
        assert assignment[0, 1] == assignment[0, 2] == 1
        assert index[0].tolist() == ([0, 1, 3, 4, 5] if kept == 4 else [0, 1, 3, 5])


# --- SAINT and redundancy -------------------------------------------------------------------------


def test_saint_on_a_case_by_hand() -> None:
    """Set A is patches 0, 2, 4: of three, one and no neighbours in 1, 3, 5; 6 is padding."""
    degrees = np.radians([10, 0, 58, 20, 200, 30, 300])
    patches = np.stack([np.cos(degrees), np.sin(degrees)], 1).astype(np.float32)
    valid = torch.tensor([[True] * 6 + [False]])
    scores = saint_scores(torch.from_numpy(patches)[None], valid, theta=0.88, gamma=4.0)

    def cosine(i: int, j: int) -> float:
        return math.cos(degrees[i] - degrees[j])

    three, none = (sum(cosine(i, j) for j in (1, 3, 5)) / 3 for i in (0, 4))
    expected = [3 * math.exp(4 * (three - 0.88)), math.exp(4 * (cosine(2, 5) - 0.88)), none]
    np.testing.assert_allclose(scores[0, :6:2], expected, rtol=1e-5)
    assert torch.isinf(scores[0, [1, 3, 5, 6]]).all()

    def rule(patches: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, None]:
        return saint_scores(patches, valid, theta=0.88, gamma=4.0), None

    tokens = torch.cat([torch.ones(1, 1, 2), torch.from_numpy(patches)[None, :6]], 1)
    for kept, gone in ((5, [0]), (4, [0, 2]), (3, [0, 2, 4])):
        index = lose_tokens(tokens, torch.zeros(1, 7), torch.tensor([kept]), 1, rule)[2]
        assert index[0].tolist() == [0, *(i + 1 for i in range(6) if i not in gone)]


@pytest.mark.parametrize("seed", range(30))
def test_redundancy_keeps_what_the_operator_keeps(seed: int) -> None:
    case = random_case(seed, batch=3, patches=20, selection="redundancy", padding="tail")
    log_size = torch.from_numpy(case.log_size)
    log_size[:, 1] = 0.0  # no image is padding only
    tokens = torch.from_numpy(case.tokens)
    attributes = {**case.attributes, "reduction": "drop"}
    limit = torch.from_numpy(case.threshold)
    ours = similarity_prune(tokens, tokens, log_size, limit, **attributes)
    kept = ours[3].amax(1) + 1 - case.prefix
    found = Problem(tokens, log_size, kept, case.prefix).solve("redundancy")
    assert torch.equal(found[2], ours[2])
    assert torch.equal(found[0], ours[0])


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> PrunedViT:
    vit = sd.load(EXAMPLES / "fashion_mnist" / "vit")
    return sd.prune(vit, threshold=0.8, layers=[1, 3, 4]).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    with np.load(EXAMPLES / "fashion_mnist" / "test_slice.npz") as data:
        pixels = torch.from_numpy(data["images"][:6]).float() / 255
    return ((pixels - 0.286) / 0.353).unsqueeze(1)


@pytest.fixture(scope="module")
def ours(demo: PrunedViT, images: torch.Tensor) -> torch.Tensor:
    traces: list[PruneTrace] = []
    with torch.inference_mode():
        demo(images, traces=traces)
    return kept_counts(traces, demo.num_prefix_tokens)


@pytest.mark.parametrize("features", ["tokens", "keys"])
@pytest.mark.parametrize("name", BASELINES)
@torch.inference_mode()
def test_a_model_runs_at_our_counts_and_images_alone_give_the_same(
    demo: PrunedViT, images: torch.Tensor, ours: torch.Tensor, name: str, features: str
) -> None:
    assert len(set(ours[:, 0].tolist())) > 1, "images differ in what they keep"
    baseline = Baseline(name, features=features)
    together = baseline.run(demo, images, ours)
    assert torch.equal(together.kept, ours)
    left = [(trace.kept_index[:, 1:] > 0).sum(1) for trace in together.traces]
    assert torch.equal(torch.stack(left, 1), ours)
    assert [trace.layer for trace in together.traces] == list(demo.config.layers)
    for i, image in enumerate(images.split(1)):
        alone = baseline.run(demo, image, ours[i : i + 1])
        torch.testing.assert_close(alone.outputs[0], together.outputs[i], rtol=0, atol=1e-4)
    dense = demo.vit(images)
    assert not torch.allclose(together.outputs, dense, atol=1e-3)
    everything = [demo.num_patches] * len(demo.config.layers)
    unchanged = baseline.run(demo, images, everything).outputs
    torch.testing.assert_close(unchanged, dense, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_tome_inside_a_block_merges_by_its_mean_key_as_published(
    demo: PrunedViT, images: torch.Tensor
) -> None:
    inside = sd.prune(demo, layers=[2], place="inside", features="keys")
    found = Baseline("tome", features="keys").run(inside, images, [150])
    traces: list[PruneTrace] = []
    by_mean = sd.prune(inside, features="mean-keys", threshold=2.0)
    by_mean(images, traces=traces)
    (ours,), (theirs,) = traces, found.traces
    assert torch.equal(theirs.features, ours.features)
    keys = ours.features.float()
    scores, targets = tome_pairs(keys[:, 1:], torch.ones(len(keys), 196, dtype=torch.bool), 1)
    gone = scores.topk(46, dim=1).indices
    for image in range(len(images)):
        stays = sorted(set(range(196)) - set(gone[image].tolist()))
        assert theirs.kept_index[image, 1:].tolist() == [each + 1 for each in stays]
        for patch in gone[image].tolist():
            slot = 1 + stays.index(int(targets[image, patch]))
            assert theirs.assignment[image, patch + 1] == slot
    others = Baseline("tome").run(inside, images, [150])
    assert others.traces[0].features.shape[2] == demo.vit.embed_dim
    everything = Baseline("tome", features="keys").run(inside, images, [196]).outputs
    torch.testing.assert_close(everything, demo.vit(images), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_one_count_for_all_images_is_tomes_fixed_r(demo: PrunedViT, images: torch.Tensor) -> None:
    found = Baseline("tome").run(demo, images, [150, 100, 50])
    assert found.kept.tolist() == [[150, 100, 50]] * len(images)
    assert [trace.kept_index.shape[1] for trace in found.traces] == [151, 101, 51]


@torch.inference_mode()
def test_random_is_another_draw_with_another_seed(
    demo: PrunedViT, images: torch.Tensor, ours: torch.Tensor
) -> None:
    def draw(seed: int) -> torch.Tensor:
        return Baseline("random", seed=seed).run(demo, images, ours).traces[0].kept_index

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0)[0].tolist() != draw(0)[1].tolist()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([100, 50], r"\[6, 2\].*give whole numbers \[6, 3\]"),
        ([100.0, 50.0, 25.0], "give whole numbers"),
        ([100, 120, 25], "image 0 cannot keep 120 patches before block 3: between 1 and 100"),
        ([197, 120, 25], "cannot keep 197 patches before block 1: between 1 and 196"),
        ([100, 50, 0], "cannot keep 0 patches before block 4"),
    ],
)
def test_counts_that_cannot_be_met_are_refused(
    demo: PrunedViT, images: torch.Tensor, kept: list[int], message: str
) -> None:
    with pytest.raises(SimpruneError, match=message):
        Baseline("tome").run(demo, images, kept)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SimpruneError, match="'tom' is unknown: use one of random"):
        Baseline("tom")
    with pytest.raises(SimpruneError, match="'values' are unknown: use one of tokens, keys"):
        Baseline("tome", features="values")


def test_padding_among_the_patches_cannot_hang() -> None:
    log_size = torch.tensor([[0.0, PAD, 0.0, PAD, 0.0]])
    rule = make_rule("tome", prefix=0)
    with pytest.raises(ValueError, match="padding must follow the patches"):
        lose_tokens(torch.ones(1, 5, 4), log_size, torch.tensor([1]), 0, rule)


def test_blocks_without_keys_are_named() -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
    vit = timm.create_model("vit_small_patch16_18x2_224", num_classes=3, **size).eval()
    model = sd.prune(vit, layers=[1])
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(UnsupportedModelError, match=r"ParallelThingsBlock.* features 'tokens'"):
        Baseline("saint", features="keys").run(model, images, [4])
    with torch.inference_mode():
        assert Baseline("saint").run(model, images, [4]).outputs.shape == (2, 3)
