"""A real Triton Inference Server for the tests: the one inside NVIDIA's pytriton wheel.

It has Triton's core and HTTP server and the Python backend, and not the onnxruntime and tensorrt
backends. So in a test's copy of a repository the Python backend stands in: it hands what Triton
sends it to ONNX Runtime, and writes down how Triton batched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from plugin_build import cached, download_pinned

PINS = Path(__file__).with_name("triton_server.txt")
STARTS_WITHIN = 120.0
"""Seconds, on a busy machine."""

BACKEND = """
import json, os
import numpy as np, onnxruntime
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        folder = args["model_repository"]
        model = os.path.join(folder, args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.log = open(os.path.join(folder, "batches.jsonl"), "a")

    def execute(self, requests):
        inputs = [each["name"] for each in self.config["input"]]
        outputs = [each["name"] for each in self.config["output"]]
        given = {
            name: [np.from_dlpack(pb.get_input_tensor_by_name(each, name)) for each in requests]
            for name in inputs
        }
        shapes = {name: [array.shape for array in arrays] for name, arrays in given.items()}
        print(json.dumps(shapes), file=self.log, flush=True)
        # as Triton's onnxruntime backend does: joined along the first dimension, run, cut again
        results = self.session.run(outputs, {n: np.concatenate(v) for n, v in given.items()})
        cuts = np.cumsum([len(each) for each in given["images"]])[:-1]
        parts = [[np.array(part) for part in np.split(each, cuts)] for each in results]
        # by DLPack both ways: this backend was compiled for NumPy 1, and misreads NumPy 2's arrays
        return [
            pb.InferenceResponse(
                [pb.Tensor.from_dlpack(n, p[i]) for n, p in zip(outputs, parts)]
            )
            for i in range(len(requests))
        ]
"""


def server_files() -> Path:
    """Return the unpacked server, downloaded once."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(download_pinned(folder, PINS)) as archive:
            for name in archive.namelist():
                if name.startswith(("nvidia_pytriton.libs/", "pytriton/tritonserver/")):
                    archive.extract(name, folder)
        for wheel in folder.glob("*.whl"):
            wheel.unlink()
        files = folder / "pytriton" / "tritonserver"
        stub = files / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, files / "backends" / "python")
        shutil.rmtree(files / "python_backend_stubs")
        for program in ("bin/tritonserver", "backends/python/triton_python_backend_stub"):
            (files / program).chmod(0o755)

    return cached("tritonserver", [PINS.read_bytes(), version.encode()], unpack)


def stand_in(model: Path, repository: Path) -> Path:
    """Copy a model into another repository, with the Python backend in its backend's place."""
    copy = Path(shutil.copytree(model, repository / model.name))
    text = (copy / "config.pbtxt").read_text(encoding="utf-8")
    assert text.count('backend: "onnxruntime"') == 1
    # a batch is sent when it is full, or else after two seconds: a test can fill one
    text = text.replace('backend: "onnxruntime"', 'backend: "python"')
    text = text.replace(
        "dynamic_batching {\n", "dynamic_batching {\n  max_queue_delay_microseconds: 2000000\n"
    )
    (copy / "config.pbtxt").write_text(text, encoding="utf-8")
    (copy / "1" / "model.py").write_text(BACKEND, encoding="utf-8")
    return copy


def batches_of(model: Path) -> list[dict[str, list[list[int]]]]:
    """Return how Triton batched: for every execution the shapes of each request's inputs."""
    lines = (model / "batches.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def serving(repository: Path, log: Path) -> Iterator[str]:
    """Run a server on a repository and yield its address; every setting must be in the files."""
    files = server_files() / "pytriton" / "tritonserver"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(server_files() / "nvidia_pytriton.libs"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(files / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={files / 'backends'}",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-timeout-secs=2",
    ]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not _answers(port):
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    import tritonclient.http as client

    with (
        contextlib.suppress(OSError),
        contextlib.closing(client.InferenceServerClient(f"127.0.0.1:{port}")) as server,
    ):
        return bool(server.is_server_ready())
    return False
