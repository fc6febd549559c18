"""What is printed of a model in a Triton repository."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from simprune_deploy.reports.terminal import print_facts

if TYPE_CHECKING:
    from simprune_deploy.deploy.triton import TritonModel


def print_model(model: TritonModel) -> None:
    """Print where the model is, how it is batched, and how a server is started on it."""
    repository = shlex.quote(str(model.path.absolute().parent))
    batches = (
        f"1 to {model.max_batch_size} images, formed by Triton"
        if model.max_batch_size
        else "fixed: a request is a whole batch"
    )
    facts = {
        "Triton model": model.path,
        "batches": batches,
        "class names": "in labels.txt" if model.labels else "none",
        "warm-up": f"{model.warmup} requests of golden images" if model.warmup else "none",
        "status": "written, not served: no server was started",
        "serve": f"tritonserver --model-repository={repository}",
    }
    print_facts(Console(), facts)
    for note in model.notes:
        Console().print(note, style="yellow", highlight=False, markup=False)
