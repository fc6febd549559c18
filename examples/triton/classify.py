"""Classify pictures with a model that a Triton server has: preprocess here, ask over HTTP, print.

    pip install 'tritonclient[http]'
    python examples/triton/classify.py photos --export exported --model exported_onnx

Pictures go through the preprocessing that the export recorded, so the server sees what PyTorch saw
in the parity check.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.images import ImageSet, Preprocessing, load_as_taken
from simprune_deploy.onnx.exported_folder import read_manifest


def load_pictures(folder: Path, model: dict[str, Any]) -> ImageSet:
    """Load a folder's pictures as the model takes them.

    Args:
        folder: Where they are.
        model: What the export's manifest says of the model.
    """
    known = {field.name for field in dataclasses.fields(Preprocessing)}
    recorded = {k: v for k, v in model["preprocessing"].items() if k in known}
    height, width = model["image_size"]
    wanted = {**recorded, "channels": model["channels"], "height": height, "width": width}
    preprocessing = Preprocessing.from_dict(wanted)
    return load_as_taken(
        folder,
        preprocessing,
        graph_normalizes=model["export"]["normalize"],
        uint8=model["export"].get("input") == "uint8-nhwc",
    )


def batches(count: int, config: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the pictures' positions, a request at a time; a fixed batch is filled up with repeats.

    Args:
        count: How many pictures there are.
        config: The model's configuration, from the server.
    """
    most = config["max_batch_size"]
    size = most or int(config["input"][0]["dims"][0])
    for start in range(0, count, size):
        chosen = np.arange(start, start + size)
        yield np.minimum(chosen, count - 1) if not most else chosen[chosen < count]


def request(pixels: np.ndarray, threshold: float | None, config: dict[str, Any]) -> list[Any]:
    """Return the inputs of one request: the images, and a threshold for each where it takes one."""
    arrays = {"images": pixels}
    if len(config["input"]) > 1:
        if threshold is None:
            raise SimpruneError("this model takes a threshold with every request: give --threshold")
        # [B, 1] where Triton forms batches, [B] for a fixed batch
        shape = (len(pixels), 1) if config["max_batch_size"] else (len(pixels),)
        arrays["threshold"] = np.full(shape, threshold, np.float32)
    elif threshold is not None:
        raise SimpruneError("this model's threshold is fixed: leave --threshold out")
    inputs = []
    for each in config["input"]:
        array = arrays[each["name"]]
        data_type = each["data_type"].removeprefix("TYPE_")
        if array.dtype != triton_to_np_dtype(data_type):
            raise SimpruneError(f"{each['name']} must be {data_type}, and is {array.dtype}")
        value = triton.InferInput(each["name"], array.shape, data_type)
        value.set_data_from_numpy(array)
        inputs.append(value)
    return inputs


def ask(
    client: triton.InferenceServerClient, model: str, pixels: np.ndarray, threshold: float | None
) -> Iterator[np.ndarray]:
    """Yield the main output of every picture, in order."""
    config = client.get_model_config(model)
    output = config["output"][0]["name"]
    for chosen in batches(len(pixels), config):
        answer = client.infer(
            model,
            request(pixels[chosen], threshold, config),
            outputs=[triton.InferRequestedOutput(output)],
        )
        rows = answer.as_numpy(output)
        yield from rows[: len(set(chosen.tolist()))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="pictures")
    parser.add_argument("--export", type=Path, required=True, help="the exported folder")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--threshold", type=float, help="for exports with --runtime-threshold")
    parser.add_argument("--top", type=int, default=1, help="how many classes to print")
    arguments = parser.parse_args()
    try:
        model = read_manifest(arguments.export)["model"]
        pictures = load_pictures(arguments.folder, model)
        client = triton.InferenceServerClient(arguments.url)
        labels = model["preprocessing"].get("label_names") or range(model["num_classes"])
        rows = ask(client, arguments.model, pictures.pixels, arguments.threshold)
        for name, row in zip(pictures.names, rows, strict=True):
            best = np.argsort(-row)[: arguments.top]
            print(name, *(f"{labels[index]} {row[index]:.3f}" for index in best), sep="\t")
    except (SimpruneError, InferenceServerException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
