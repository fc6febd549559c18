"""The library's kernels on torch tensors, through the C interface (``plugins/include/simprune.h``).

>>> kernels = Kernels("simprune-plugin/libsimprune_plugin.so")              # doctest: +SKIP
>>> kept, log_size, index, assignment = kernels.similarity_prune(            # doctest: +SKIP
...     tokens, features, log_size, threshold, num_prefix_tokens=1
... )
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from pathlib import Path

import torch

from simprune_deploy.common.errors import (
    ArtifactError,
    InvalidArgumentError,
    ToolFailedError,
)
from simprune_deploy.pruning.config import REDUCTIONS, SELECTIONS
from simprune_deploy.pruning.kernel_library import ABI_VERSION, LibraryInfo, read_info

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The types of tokens that the kernels take, and simprune.h's number for each."""

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_WORKSPACE_ALIGNMENT = 256


class _Problem(ctypes.Structure):
    """``simprune_problem``."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("feature_dim", ctypes.c_int64),
        ("num_thresholds", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("multiple_of", ctypes.c_int64),
        ("num_prefix_tokens", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("selection", ctypes.c_int32),
        ("reduction", ctypes.c_int32),
    )


class _Buffers(ctypes.Structure):
    """``simprune_buffers``."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("tokens", "features", "log_size", "threshold"),
            *("kept_tokens", "kept_log_size", "kept_index", "assignment", "num_kept"),
        )
    )


class Kernels:
    """A loaded library.

    Attributes:
        info: What the library says about itself.
        device_type: "cuda", or "cpu" for libsimprune_host.so: the tensors it takes.
    """

    def __init__(self, path: str | Path) -> None:
        """Load a library.

        Args:
            path: libsimprune_plugin.so, libsimprune_kernels.so, or libsimprune_host.so.

        Raises:
            SimpruneError: it is not a library of ours, or cannot be loaded here.
        """
        self.info: LibraryInfo = read_info(path)
        self.device_type = "cpu" if self.info.kind == "host" else "cuda"
        if self.info.abi != ABI_VERSION:
            raise ArtifactError(
                f"{path} has C interface {self.info.abi}, and this version speaks {ABI_VERSION}: "
                "build the library again with `simprune-deploy plugin build`"
            )
        if self.info.machine != platform.machine():
            raise ArtifactError(
                f"{path} is for {self.info.machine}, and this machine is {platform.machine()}: "
                "build the library here with `simprune-deploy plugin build`"
            )
        try:
            self._library = ctypes.CDLL(str(Path(path).absolute()))
            self._workspace_bytes = self._library.simprune_workspace_bytes
            self._enqueue = self._library.simprune_enqueue
            self._error = self._library.simprune_error
            check = self._library.simprune_check
        except (OSError, AttributeError) as error:
            raise ArtifactError(f"cannot load {path}: {error}") from None
        check.argtypes = self._workspace_bytes.argtypes = (ctypes.POINTER(_Problem),)
        self._check = check
        self._workspace_bytes.restype = ctypes.c_size_t
        self._enqueue.argtypes = (
            ctypes.POINTER(_Problem),
            ctypes.POINTER(_Buffers),
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
        )
        self._error.restype = ctypes.c_char_p

    def similarity_prune(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
        num_prefix_tokens: int,
        selection: str = "pairs",
        reduction: str = "merge",
        capacity: int = 0,
        multiple_of: int = 1,
    ) -> Outputs:
        """Run the operator on the current stream.

        Arguments and results are those of ``simprune_deploy.pruning.operator.similarity_prune``,
        without gradients. With capacity 0 this waits for the device, to learn how many slots there
        are.

        Raises:
            SimpruneError: the kernels do not cover the tensors or attributes, or CUDA failed.
        """
        prepared = self.prepare(
            tokens,
            features,
            log_size,
            threshold,
            num_prefix_tokens,
            selection,
            reduction,
            capacity,
            multiple_of,
        )
        prepared.launch()
        return prepared.outputs()

    def prepare(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
        num_prefix_tokens: int,
        selection: str = "pairs",
        reduction: str = "merge",
        capacity: int = 0,
        multiple_of: int = 1,
    ) -> Prepared:
        """Check a call and make its buffers, to launch it as often as wanted.

        Args and errors: as :meth:`similarity_prune`.
        """
        self._check_tensors(tokens, features, log_size, threshold)
        batch, num_tokens, dim = tokens.shape
        problem = _Problem(
            batch=batch,
            num_tokens=num_tokens,
            dim=dim,
            feature_dim=features.shape[2],
            num_thresholds=len(threshold),
            capacity=_int32("capacity", capacity),
            multiple_of=_int32("multiple_of", multiple_of),
            num_prefix_tokens=_int32("num_prefix_tokens", num_prefix_tokens),
            dtype=DTYPES[tokens.dtype],
            selection=_position("selection", selection, SELECTIONS),
            reduction=_position("reduction", reduction, REDUCTIONS),
        )
        self._raise_unless_ok(self._check(problem))
        return Prepared(self, problem, tokens, features, log_size, threshold)

    def schedule(self, order: int, sm: int, multiprocessors: int = 132) -> None:
        """Choose how libsimprune_host.so runs from now on, everywhere in this process.

        Args:
            order: Threads, warps and blocks forward (0), backward (1) or shuffled with a seed (2
                and more).
            sm: The GPU whose code it takes: 80, 75 or 0 (no tensor cores).
            multiprocessors: How many it has; the work is divided accordingly. Default 132.

        Raises:
            SimpruneError: this is a library for GPUs.
        """
        if self.device_type != "cpu":
            raise InvalidArgumentError(
                f"{self.info.path} runs on a GPU, which orders its threads itself: only "
                "libsimprune_host.so has a schedule"
            )
        self._library.simprune_host_schedule(order, sm, multiprocessors)

    def _check_tensors(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
    ) -> None:
        """Check what the C interface cannot see, since it is given numbers and pointers."""
        if tokens.dtype not in DTYPES:
            raise InvalidArgumentError(
                f"tokens are {_describe(tokens)}: the kernels take float32, float16 and bfloat16"
            )
        if tokens.ndim != 3:
            raise InvalidArgumentError(f"tokens must be [B, N, D], not {_describe(tokens)}")
        batch, num_tokens, _ = tokens.shape
        if features.dtype != tokens.dtype or tuple(features.shape[:-1]) != (batch, num_tokens):
            kind = _describe(tokens).split("[")[0]
            raise InvalidArgumentError(
                f"features must be {kind}[{batch}, {num_tokens}, F] as the tokens are, not "
                f"{_describe(features)}"
            )
        if log_size.dtype != torch.float32 or tuple(log_size.shape) != (batch, num_tokens):
            raise InvalidArgumentError(
                f"log_size must be float32[{batch}, {num_tokens}], not {_describe(log_size)}"
            )
        if threshold.dtype != torch.float32 or tuple(threshold.shape) not in ((1,), (batch,)):
            raise InvalidArgumentError(
                f"threshold must be float32[1] or [{batch}], not {_describe(threshold)}"
            )
        given = {
            "tokens": tokens,
            "features": features,
            "log_size": log_size,
            "threshold": threshold,
        }
        for name, tensor in given.items():
            if tensor.device.type != self.device_type:
                raise InvalidArgumentError(
                    f"{name} is on {tensor.device}: {self.info.path.name} takes "
                    f"{self.device_type} tensors"
                )
            if tensor.device != tokens.device:
                raise InvalidArgumentError(
                    f"{name} is on {tensor.device} and tokens on {tokens.device}: put them on one "
                    "device"
                )

    def _raise_unless_ok(self, status: int) -> None:
        if status != 0:
            text = self._error() or b""
            raise ToolFailedError(text.decode("utf-8", "replace") or f"the kernels gave {status}")


class Prepared:
    """One call of the kernels with buffers of its own.

    Attributes:
        tokens: The tensor that is read: the one given, or a copy if that was not contiguous. Write
            into it to launch with other values.
        features: Likewise; the very tensor `tokens` where that was given for both.
        log_size: Likewise.
        threshold: Likewise.
    """

    def __init__(
        self,
        kernels: Kernels,
        problem: _Problem,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
    ) -> None:
        """Make the buffers of a problem that was checked; :meth:`Kernels.prepare` calls this."""
        self._kernels, self._problem = kernels, problem
        self.tokens, self.log_size, self.threshold = (
            tensor.detach().contiguous() for tensor in (tokens, log_size, threshold)
        )
        self.features = self.tokens if features is tokens else features.detach().contiguous()
        batch, num_tokens, dim = tokens.shape
        slots = problem.num_prefix_tokens + problem.capacity if problem.capacity else num_tokens
        device = tokens.device
        self._kept_tokens = torch.empty(batch * slots * dim, dtype=tokens.dtype, device=device)
        self._kept_log_size = torch.empty(batch * slots, dtype=torch.float32, device=device)
        self._kept_index = torch.empty(batch * slots, dtype=torch.int64, device=device)
        self._assignment = torch.empty(batch, num_tokens, dtype=torch.int64, device=device)
        self._num_kept = torch.full((), -1, dtype=torch.int32, device=device)

        needed = kernels._workspace_bytes(problem)
        self._workspace = torch.empty(
            needed + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device
        )
        start = self._workspace.data_ptr()
        self._call = (
            problem,
            _Buffers(
                self.tokens.data_ptr(),
                self.features.data_ptr(),
                self.log_size.data_ptr(),
                self.threshold.data_ptr(),
                self._kept_tokens.data_ptr(),
                self._kept_log_size.data_ptr(),
                self._kept_index.data_ptr(),
                self._assignment.data_ptr(),
                self._num_kept.data_ptr(),
            ),
            start + -start % _WORKSPACE_ALIGNMENT,
            needed,
        )

    def launch(self) -> None:
        """Put the kernels on the current stream; no memory is made and nothing waited for.

        Raises:
            SimpruneError: the library has no code for this GPU, or CUDA failed.
        """
        enqueue = self._kernels._enqueue
        if self.tokens.is_cuda:
            with torch.cuda.device(self.tokens.device):
                status = enqueue(*self._call, torch.cuda.current_stream().cuda_stream)
        else:
            status = enqueue(*self._call, None)
        self._kernels._raise_unless_ok(status)

    def outputs(self) -> Outputs:
        """Return the results of the last launch; with capacity 0 this waits for the current stream.

        They are views of this object's buffers: the next launch writes over them.

        Raises:
            SimpruneError: nothing was launched yet.
        """
        batch, num_tokens, dim = self.tokens.shape
        if self._problem.capacity:
            slots = self._problem.num_prefix_tokens + self._problem.capacity
        else:
            slots = int(self._num_kept.item())
            if not 0 <= slots <= num_tokens:
                raise InvalidArgumentError(
                    f"there are {slots} slots: call launch() before outputs()"
                )
        return (
            self._kept_tokens[: batch * slots * dim].view(batch, slots, dim),
            self._kept_log_size[: batch * slots].view(batch, slots),
            self._kept_index[: batch * slots].view(batch, slots),
            self._assignment,
        )


@functools.lru_cache(maxsize=8)
def load_kernels(path: str) -> Kernels:
    """Load a library once, however often it is asked for."""
    return Kernels(path)


def _int32(name: str, value: int) -> int:
    # ctypes would cut the bits off
    if not -(2**31) <= value < 2**31:
        raise InvalidArgumentError(f"{name} {value} is outside the range of a 32-bit number")
    return value


def _position(name: str, value: str, choices: tuple[str, ...]) -> int:
    with contextlib.suppress(ValueError):
        return choices.index(value)
    raise InvalidArgumentError(f"{name} {value!r} is not one of {choices}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
