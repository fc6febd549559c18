"""The plugin called as TensorRT calls it, on PyTorch tensors (plugins/tests/enqueue_shim.cpp)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from places import ROOT

from simprune_deploy.engine.plugin.toolchain import CUDA_FOLDER, locate_nvcc

SOURCE = ROOT / "plugins" / "tests" / "enqueue_shim.cpp"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class ShimError(Exception):
    """The plugin or the shim refused."""


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("selection", ctypes.c_char_p),
        ("reduction", ctypes.c_char_p),
        ("num_prefix_tokens", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("multiple_of", ctypes.c_int32),
        ("opt_tokens", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("feature_dim", ctypes.c_int64),
        ("num_thresholds", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


def build_shim(output: Path, tensorrt_include: Path) -> Path:
    """Compile the shim into the file `output`, with the CUDA headers beside nvcc."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise ShimError("no C++ compiler: install g++")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    includes = ["-isystem", str(tensorrt_include), "-isystem", str(_cuda_include())]
    command = [compiler, *flags, *includes, str(SOURCE), "-o", str(output), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ShimError(f"{' '.join(command)}\n{result.stderr}")
    return output


def _cuda_include() -> Path:
    nvcc = locate_nvcc()
    places = [nvcc.parent.parent, nvcc.resolve().parent.parent, CUDA_FOLDER]
    for folder in (place / "include" for place in places):
        if (folder / "cuda_runtime_api.h").is_file():
            return folder
    raise ShimError(f"no cuda_runtime_api.h beside {nvcc}: install the CUDA runtime's headers")


def shape_of(tokens: torch.Tensor, features: torch.Tensor, threshold: torch.Tensor) -> _Shape:
    batch, num_tokens, dim = tokens.shape
    return _Shape(batch, num_tokens, dim, features.shape[2], len(threshold), DTYPES[tokens.dtype])


class Plugin:
    """One layer: built, serialized, restored and attached to a context.

    Args:
        shim: The compiled shim.
        library: The library with the plugin.
        attributes: The operator's attributes; those left out have their defaults.
    """

    def __init__(self, shim: Path, library: Path, **attributes: Any) -> None:
        self._shim = ctypes.CDLL(str(shim))
        self._shim.shim_error.restype = ctypes.c_char_p
        self._shim.shim_open.restype = ctypes.c_void_p
        self._shim.shim_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(_Attributes)]
        self._shim.shim_outputs.argtypes = [ctypes.c_void_p]
        self._shim.shim_close.argtypes = [ctypes.c_void_p]
        self._shim.shim_close.restype = None
        self._shim.shim_workspace.restype = ctypes.c_int64
        self._shim.shim_workspace.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Shape)]
        self._shim.shim_enqueue.argtypes = [
            ctypes.c_void_p,
            ctypes.POINTER(_Shape),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        given = _Attributes(
            attributes.get("selection", "pairs").encode(),
            attributes.get("reduction", "merge").encode(),
            attributes.get("num_prefix_tokens", 0),
            attributes.get("capacity", 0),
            attributes.get("multiple_of", 1),
            attributes.get("opt_tokens", 0),
            attributes.get("max_tokens", 0),
        )
        self._plugin = self._shim.shim_open(str(library).encode(), ctypes.byref(given))
        if not self._plugin:
            raise self._error()
        self.num_outputs = int(self._shim.shim_outputs(self._plugin))

    def workspace_bytes(
        self, tokens: torch.Tensor, features: torch.Tensor, threshold: torch.Tensor
    ) -> int:
        """Return what `getWorkspaceSize` asks for shapes up to these tensors'."""
        shape = shape_of(tokens, features, threshold)
        size = int(self._shim.shim_workspace(self._plugin, ctypes.byref(shape)))
        if size < 0:
            raise self._error()
        return size

    def enqueue(
        self,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        workspace: torch.Tensor,
        stream: int = 0,
    ) -> None:
        """Put the layer on the stream, reading and writing the tensors' memory.

        Args:
            inputs: Tokens, features, log-sizes and thresholds.
            outputs: Room for the node's outputs, the number of tokens kept behind them.
            workspace: Of the bytes that `workspace_bytes` says.
            stream: A CUDA stream.
        """
        assert len(outputs) == self.num_outputs
        tokens, features, _, threshold = inputs
        shape = shape_of(tokens, features, threshold)
        status = self._shim.shim_enqueue(
            self._plugin,
            ctypes.byref(shape),
            _pointers(inputs),
            _pointers(outputs),
            workspace.data_ptr(),
            stream,
        )
        if status:
            raise self._error()

    def close(self) -> None:
        """Destroy the plugin."""
        self._shim.shim_close(self._plugin)
        self._plugin = None

    def __enter__(self) -> Plugin:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _error(self) -> ShimError:
        return ShimError(self._shim.shim_error().decode())


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
