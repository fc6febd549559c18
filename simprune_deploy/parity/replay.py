"""PyTorch's float32 answer to decisions that another runtime took.

In 16 bits the tokens are a little off, so some decisions fall otherwise, rightly, and an image
with another decision has another output. To see what rounding alone does, the reference runs once
more and merges what the other runtime merged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from simprune_deploy.onnx.metadata import ModelMetadata
from simprune_deploy.parity.runs import Inputs, Run
from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.predict.torch_predictor import TorchPredictor
from simprune_deploy.pruning.model import PrunedViT


class _ReplayingViT(PrunedViT):
    """The model for one image; `decisions` say what to merge, and are used up in order."""

    decisions: list[PruneRecord]

    def _operator(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
        **values: Any,
    ) -> tuple[torch.Tensor, ...]:
        record = self.decisions.pop(0)
        heads = torch.from_numpy(np.asarray(record.heads(), np.int64))
        assignment = torch.from_numpy(np.asarray(record.valid_assignment(), np.int64))
        if assignment.numel() != tokens.shape[1]:
            raise ValueError(
                f"{assignment.numel()} decisions do not fit {tokens.shape[1]} tokens of an image"
            )
        belongs = torch.nn.functional.one_hot(assignment, len(heads)).to(tokens.dtype).T
        weights = belongs * log_size[0].exp()
        total = weights.sum(1)
        if values["reduction"] == "merge":
            kept = weights @ tokens[0] / total[:, None]
        else:
            kept = tokens[0, heads]
        return kept[None], total.log()[None], heads[None], assignment[None]


def replay(
    model: PrunedViT, metadata: ModelMetadata, decided: Run, inputs: Inputs, name: str
) -> Run:
    """Run every image alone in PyTorch, with the decisions of `decided`.

    The records of the result hold those decisions and PyTorch's own tokens, without padding.

    Args:
        model: The reference.
        metadata: Of the graph: how images come, and what its output is.
        decided: Another runtime's run.
        inputs: The images of both.
        name: Of the result.
    """
    config = model.config
    if not decided.records:  # the graph of a threshold above 1 has no prune nodes
        config = dataclasses.replace(config, layers=(), capacities=())
    replaying = _ReplayingViT(model.vit, config)
    predictor = TorchPredictor(replaying, metadata)
    outputs = []
    records: dict[int, list[PruneRecord]] = {layer: [] for layer in decided.records}
    for image in range(len(inputs.images)):
        replaying.decisions = [found[image] for found in decided.records.values()]
        one = slice(image, image + 1)
        result = predictor.answer(
            inputs.images[one], threshold=inputs.thresholds[one], decisions=True
        )
        outputs.append(result.outputs[0])
        for layer, found in records.items():
            found += (result.records or {})[layer]
    return Run(name, np.stack(outputs), records)
