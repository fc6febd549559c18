"""The demo's model and its companion files in several versions of ONNX Runtime, beside PyTorch.

    python benchmarks/onnxruntime_versions.py [VERSION ...]

Each version is installed into a temporary folder of its own (`pip install --target`), and runs
there in a process of its own, on the CPU: model.onnx, model-inlined.onnx and model-fused.onnx, with
dynamic and with fixed token counts, in float32. Prints the largest difference of the logits from
PyTorch's over images of Fashion-MNIST. Exit code 1 if a file does not run, or differs by more than
the parity check allows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import simprune_deploy as sd
from simprune_deploy.onnx.exported_folder import COMPANIONS, MODEL
from simprune_deploy.parity.tolerance import Tolerance

DEMO = Path(__file__).parents[1] / "examples" / "fashion_mnist"
FILES = (MODEL, *COMPANIONS)
COUNTS: dict[str, dict[str, Any]] = {
    "dynamic": {"threshold": 0.9, "layers": [1, 3, 4]},
    "fixed": {"layers": [1, 3], "tokens": 60},
}
VERSIONS = ("1.21.1", "1.23.2", "1.28.0", "1.32.0")
IMAGES = 8

CHILD = """
import json, sys
import numpy, onnxruntime
images, *files = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
answers = {"version": onnxruntime.__version__}
for file in files:
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        answers[file] = session.run(None, {"images": numpy.load(images)})[0].tolist()
    except Exception as error:
        answers[file] = " ".join(str(error).split())[:120]
print(json.dumps(answers))
"""


def export_all(folder: Path) -> dict[str, np.ndarray]:
    """Export the demo's model into a folder for each kind of counts; return PyTorch's logits."""
    pixels = np.load(DEMO / "test_slice.npz")["images"][:IMAGES, None].astype(np.float32) / 255
    vit = sd.load(DEMO / "vit")
    mean, std = (np.float32(vit.pretrained_cfg[name][0]) for name in ("mean", "std"))
    images = (pixels - mean) / std
    np.save(folder / "images.npy", images)
    expected = {}
    for counts, pruning in COUNTS.items():
        pruned = sd.prune(vit, **pruning)
        options = sd.ExportOptions(inline=True, fused_attention=True)
        result = sd.export(pruned, folder / counts, options)
        if not result.accepted:
            sys.exit(f"the export with {counts} counts did not pass: {result.verdict}")
        with torch.inference_mode():
            expected[counts] = pruned(torch.from_numpy(images)).numpy()
    return expected


def run_in(version: str, folder: Path) -> dict[str, Any]:
    """Install a version beside the files, and return what it answers for each of them."""
    place = folder / version
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--only-binary", ":all:", "--target", str(place)]
    subprocess.run([*install, f"onnxruntime=={version}"], check=True)
    files = [str(folder / counts / name) for counts in COUNTS for name in FILES]
    command = [sys.executable, "-c", CHILD, str(folder / "images.npy"), *files]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ONNX Runtime {version} does not load:\n{done.stderr}")
    answers: dict[str, Any] = json.loads(done.stdout)
    if answers["version"] != version:
        sys.exit(f"ONNX Runtime {answers['version']} ran in place of {version}")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    versions = parser.parse_args().versions
    table = Table("ONNX Runtime", *(f"{name}, {c}" for c in COUNTS for name in FILES), box=None)
    wrong = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        expected = export_all(folder)
        for version in versions:
            answers, cells = run_in(version, folder), []
            for counts in COUNTS:
                limit = Tolerance().largest(expected[counts])
                for name in FILES:
                    found = answers[str(folder / counts / name)]
                    if isinstance(found, str):
                        wrong = True
                        cells.append(found)
                        continue
                    apart = float(np.abs(np.array(found) - expected[counts]).max())
                    wrong |= not apart <= limit
                    cells.append(f"{apart:.1e}")
            table.add_row(version, *cells)
    Console().print(table)
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
