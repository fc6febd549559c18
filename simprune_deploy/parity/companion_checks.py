"""Is a companion file the model in model.onnx? Both run in ONNX Runtime, on the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from simprune_deploy.common.progress import Progress
from simprune_deploy.onnx.exported_folder import COMPANIONS, FUSED_MODEL
from simprune_deploy.onnx.fused_attention import count_fused
from simprune_deploy.onnx.names import prune_output_name
from simprune_deploy.onnx.precision import emulated
from simprune_deploy.parity.checks import (
    Pruning,
    check_decisions,
    check_outputs,
    images_with_same_decisions,
)
from simprune_deploy.parity.runs import Inputs, Run, run
from simprune_deploy.parity.verdict import Check
from simprune_deploy.predict.onnx_predictor import OnnxPredictor, open_session
from simprune_deploy.predict.predictor import one_or_each
from simprune_deploy.predict.records import Array, PruneRecord

LOG_SIZE = "kept_log_size"


@dataclasses.dataclass(frozen=True)
class Companions:
    """What the companion files of one model are held against.

    Attributes:
        predictor: Of model.onnx.
        inputs: The images.
        shipped: Its run as it ships.
        shown: Its run with the decisions.
        pruning: What the checks need to know of it.
    """

    predictor: OnnxPredictor
    inputs: Inputs
    shipped: Run
    shown: Run
    pruning: Pruning

    def check(self, forms: Mapping[str, onnx.ModelProto], progress: Progress) -> tuple[Check, ...]:
        """Ask of each form whether it is model.onnx; `forms` has them by the name of their file."""
        found = []
        for name, form in forms.items():
            progress(f"ONNX Runtime, {name}")
            made = self._fused(form) if name == FUSED_MODEL else self._inlined(form)
            found.append(dataclasses.replace(made, name=COMPANIONS[name]))
        return tuple(found)

    def _open(self, form: onnx.ModelProto) -> OnnxPredictor:
        spec = dataclasses.replace(self.predictor.spec, graph=form.SerializeToString())
        return OnnxPredictor(spec)

    def _fused(self, form: onnx.ModelProto) -> Check:
        """Hold outputs and decisions against each other, as the parity check does with PyTorch's.

        Attention is summed in another order, so float noise may turn a decision.
        """
        predictor, batches = self._open(form), self.inputs.mixed()
        shipped = run(predictor, self.inputs, batches, decisions=False, name=FUSED_MODEL)
        shown = run(predictor, self.inputs, batches, name=FUSED_MODEL)
        same = images_with_same_decisions(self.shown, shown)
        outputs = check_outputs(
            self.shipped,
            dataclasses.replace(shipped, records=shown.records),
            same,
            self.pruning.tolerance,
        )
        decided = check_decisions(self.shown, shown, self.pruning)
        count = count_fused(form)
        numbers = {
            "attentions": count,
            "outputs": outputs.numbers,
            "decisions": decided.numbers,
        }
        text = f"{count} attentions in one node each, beside model.onnx: {outputs.summary}; "
        text += f"{int(same.sum())} of {len(same)} images decided alike"
        if not decided.passed:
            text = f"beside model.onnx: {decided.summary}"
        passed = bool(outputs.passed and decided.passed)
        return Check(COMPANIONS[FUSED_MODEL], passed, text, numbers)

    def _inlined(self, form: onnx.ModelProto) -> Check:
        """Hold outputs against each other, and the sizes of the tokens that each layer left.

        The file shows no decisions, but what they made: how many tokens stay, and how many patches
        each stands for. The operators are the same, so no noise excuses a difference.
        """
        every = np.ones(len(self.shipped.outputs), bool)
        batches = self.inputs.mixed()
        mine = run(self._open(form), self.inputs, batches, decisions=False, name="inlined")
        outputs = check_outputs(self.shipped, mine, every, self.pruning.tolerance)
        made = {name for node in form.graph.node for name in node.output}
        # the sizes behind the last layer may be read by nothing, and then are not computed
        layers = [each for each in self.shown.records if prune_output_name(each, LOG_SIZE) in made]
        alike = self._same_sizes(form, layers) if layers else every
        text = f"beside model.onnx: {outputs.summary}"
        if layers:
            text += f"; the tokens that layers {', '.join(map(str, layers))} left have the same "
            text += f"sizes in {int(alike.sum())} of {len(alike)} images"
        numbers = {
            "outputs": outputs.numbers,
            "layers_with_sizes": layers,
            "images_with_same_sizes": int(alike.sum()),
        }
        return Check("inlined", bool(outputs.passed and alike.all()), text, numbers)

    def _same_sizes(self, form: onnx.ModelProto, layers: list[int]) -> Array:
        """Return bool[n]: the images of which each layer left tokens of the same sizes."""
        names = [prune_output_name(layer, LOG_SIZE) for layer in layers]
        alike = np.ones(len(self.shipped.outputs), bool)
        graph = emulated(form, "bf16") if self.predictor.emulates else form
        shows = onnx.ModelProto()
        shows.CopyFrom(graph)
        shows.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
        )
        session = open_session(shows.SerializeToString(), self.predictor.spec)
        for batch in self.inputs.mixed():
            feed = {"images": self.inputs.images[batch]}
            if self.predictor.metadata.export["runtime_threshold"]:
                feed["threshold"] = one_or_each(self.inputs.thresholds[batch])
            for layer, found in zip(layers, session.run(names, feed), strict=True):
                for image, log_sizes in zip(batch, found, strict=True):
                    wanted = _sizes(self.shown.records[layer][image])
                    alike[image] &= np.array_equal(_trimmed(np.rint(np.exp(log_sizes))), wanted)
        return alike


def _sizes(record: PruneRecord) -> Array:
    """Return how many patches each token stands for that a layer left, without padding."""
    there = record.assignment >= 0
    sizes = np.exp(record.log_size[there].astype(np.float64))
    return _trimmed(np.rint(np.bincount(record.assignment[there], weights=sizes)))


def _trimmed(sizes: Array) -> Array:
    return np.trim_zeros(sizes, "b")
