"""The binding of the kernels' C interface, and the PyTorch operator with a library.

What the kernels compute is asked of this binding in tests/plugins/test_gpu_kernels.py.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import Case, exact_case, random_case
from made_up_library import elf, written
from places import ROOT

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.pruning import cuda_kernels as kernels
from simprune_deploy.pruning.config import REDUCTIONS, SELECTIONS
from simprune_deploy.pruning.cuda_kernels import Kernels
from simprune_deploy.pruning.kernel_library import LIBRARY_VARIABLE
from simprune_deploy.pruning.operator import similarity_prune, similarity_prune_on_gpu


@pytest.fixture(scope="module")
def host(host_library: Path) -> Kernels:
    return Kernels(host_library)


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return (
        torch.from_numpy(case.tokens).to(dtype),
        torch.from_numpy(case.compared).to(dtype),
        torch.from_numpy(case.log_size),
        torch.from_numpy(case.threshold),
    )


def assert_alike(outputs: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Equal types, shapes and decisions; tokens and sizes up to a rounding of their type."""
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == reference.dtype
        assert output.shape == reference.shape
        assert output.is_contiguous()
    assert torch.equal(outputs[2], expected[2])
    assert torch.equal(outputs[3], expected[3])
    room = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[outputs[0].dtype]
    torch.testing.assert_close(outputs[0], expected[0], rtol=room, atol=room)
    torch.testing.assert_close(outputs[1], expected[1], rtol=0, atol=2e-6)


def test_the_results_are_the_packed_front_of_their_buffers(host: Kernels) -> None:
    case = random_case(1, patches=20, threshold=0.2)
    prepared = host.prepare(*tensors(case), **case.attributes)
    prepared.launch()
    kept, _, index, _ = prepared.outputs()
    assert kept.shape[1] < case.tokens.shape[1]
    assert kept.data_ptr() == prepared._kept_tokens.data_ptr()
    assert index.data_ptr() == prepared._kept_index.data_ptr()


def test_a_fixed_capacity_reads_nothing_back(host: Kernels) -> None:
    case = random_case(3, capacity=12)
    prepared = host.prepare(*tensors(case), **case.attributes)
    assert prepared.outputs()[0].shape[1] == case.prefix + 12


def test_compared_tokens_are_held_once(host: Kernels) -> None:
    tokens = torch.ones(2, 5, 3).transpose(1, 2)  # not contiguous, so a copy is read
    values = {**inputs_with(), "tokens": tokens, "features": tokens}
    values.update(log_size=torch.zeros(2, 3))
    prepared = host.prepare(**values)
    assert prepared.features is prepared.tokens is not tokens


@pytest.mark.parametrize(("order", "sm"), [(0, 80), (1, 80), (5, 80), (0, 75), (0, 0)])
def test_schedules_change_nothing(host: Kernels, order: int, sm: int) -> None:
    case = exact_case(4, padding="tail", capacity=8, feature_dim=24)
    try:
        host.schedule(order, sm, multiprocessors=3)
        for dtype in kernels.DTYPES:
            inputs = tensors(case, dtype)
            outputs = host.similarity_prune(*inputs, **case.attributes)
            assert_alike(outputs, similarity_prune(*inputs, **case.attributes))
    finally:
        host.schedule(0, 80)


def inputs_with(**changes: Any) -> dict[str, Any]:
    values = {
        "tokens": torch.zeros(2, 5, 3),
        "features": torch.zeros(2, 5, 6),
        "log_size": torch.zeros(2, 5),
        "threshold": torch.tensor([0.5]),
        "num_prefix_tokens": 1,
    }
    return {**values, **changes}


BIG = {
    "tokens": torch.zeros(1, 4098, 1),
    "features": torch.zeros(1, 4098, 1),
    "log_size": torch.zeros(1, 4098),
}
DOUBLE = {"tokens": torch.zeros(2, 5, 3).double(), "features": torch.zeros(2, 5, 6).double()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (DOUBLE, r"tokens are float64\[2, 5, 3\]"),
        ({"tokens": torch.zeros(2, 5, 3, dtype=torch.int64)}, "take float32, float16 and bfloat16"),
        ({"tokens": torch.zeros(5, 3)}, r"tokens must be \[B, N, D\], not float32\[5, 3\]"),
        ({"tokens": torch.zeros(2, 5, 3, device="meta")}, "tokens is on meta"),
        ({"features": torch.zeros(2, 5, 6, device="meta")}, "features is on meta: .* cpu tensors"),
        ({"features": torch.zeros(2, 4, 6)}, r"features must be float32\[2, 5, F\] as the tokens"),
        ({"features": torch.zeros(2, 5)}, r"as the tokens are, not float32\[2, 5\]"),
        ({"features": torch.zeros(2, 5, 6).half()}, r"not float16\[2, 5, 6\]"),
        ({"log_size": torch.zeros(2, 5, device="meta")}, "log_size is on meta: .* cpu tensors"),
        ({"log_size": torch.zeros(2, 4)}, r"log_size must be float32\[2, 5\]"),
        ({"log_size": torch.zeros(2, 5).half()}, r"not float16\[2, 5\]"),
        ({"threshold": torch.tensor(0.5)}, r"threshold must be float32\[1\] or \[2\]"),
        ({"threshold": torch.zeros(3)}, "threshold must be"),
        ({"threshold": torch.zeros(1).double()}, "threshold must be"),
        ({"num_prefix_tokens": 2**32 + 1}, "outside the range of a 32-bit number"),
        ({"capacity": 2**64 + 1}, "capacity 18446744073709551617 is outside"),
    ],
)
def test_what_the_binding_does_not_take_is_refused(
    host: Kernels, changes: dict[str, Any], message: str
) -> None:
    """What the kernels do not cover: tests/plugins/test_gpu_kernels.py."""
    with pytest.raises(SimpruneError, match=message) as error:
        host.similarity_prune(**inputs_with(**changes))
    assert "\n" not in str(error.value)


def test_the_binding_is_that_of_the_header() -> None:
    """Names, order and types of the structures, and the numbers of the choices."""
    text = (ROOT / "plugins" / "include" / "simprune.h").read_text()

    def members(name: str) -> list[tuple[str, str]]:
        body = text.split(f"typedef struct {name} {{")[1].split("}")[0]
        return re.findall(r"^\s*([^/;]*?)\s*(\w+);", body, re.M)

    types = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
    assert [(name, types[kind]) for kind, name in members("simprune_problem")] == list(
        kernels._Problem._fields_
    )
    buffers = members("simprune_buffers")
    assert all(kind.endswith("*") for kind, _ in buffers)
    assert [name for _, name in buffers] == [name for name, _ in kernels._Buffers._fields_]
    numbers = dict(re.findall(r"SIMPRUNE_(\w+) = (\d+)", text))
    for group in (SELECTIONS, REDUCTIONS):
        assert [int(numbers[name.upper()]) for name in group] == list(range(len(group)))
    for dtype, number in kernels.DTYPES.items():
        assert int(numbers[str(dtype).removeprefix("torch.").upper()]) == number
    assert f"#define SIMPRUNE_ABI_VERSION {kernels.ABI_VERSION}\n" in text


def test_libraries_that_do_not_fit_are_refused(host_library: Path, tmp_path: Path) -> None:
    data = host_library.read_bytes()
    other_abi = written(tmp_path / "abi.so", data.replace(b'"abi": 2', b'"abi": 9'))
    with pytest.raises(SimpruneError, match="C interface 9, and this version speaks 2"):
        Kernels(other_abi)
    other_machine = written(tmp_path / "machine.so", data[:18] + b"\xf3\x00" + data[20:])
    with pytest.raises(SimpruneError, match=f"is for ELF machine 243.*{platform.machine()}"):
        Kernels(other_machine)
    # of this machine, and no library after all
    number = {"x86_64": 62, "aarch64": 183}[platform.machine()]
    with pytest.raises(SimpruneError, match="cannot load"):
        Kernels(written(tmp_path / "empty.so", elf(number)))
    with pytest.raises(SimpruneError, match="does not exist"):
        Kernels(tmp_path / "none.so")


def test_a_library_for_gpus_takes_no_cpu_tensors(plugin_library: Path) -> None:
    library = Kernels(plugin_library)
    assert library.device_type == "cuda"
    with pytest.raises(SimpruneError, match=r"tokens is on cpu: libsimprune_plugin.so takes cuda"):
        library.similarity_prune(**inputs_with())
    with pytest.raises(SimpruneError, match=r"only libsimprune_host.so has a schedule"):
        library.schedule(0, 80)


# --- the PyTorch operator with a library ----------------------------------------------------------


@pytest.fixture
def named_library(host_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_library))
    yield host_library
    kernels.load_kernels.cache_clear()


def test_cuda_tensors_have_a_kernel_of_their_own() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("simprune::similarity_prune", "CUDA")
    assert not has("simprune::similarity_prune", "XPU")


def test_the_library_that_is_named_runs(
    named_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA tensors are given to, called with CPU tensors and the library for the CPU."""
    called = []
    run_kernels = Kernels.similarity_prune

    def spy(self: Kernels, *arguments: Any) -> Any:
        called.append(self.info.path)
        return run_kernels(self, *arguments)

    monkeypatch.setattr(Kernels, "similarity_prune", spy)
    case = exact_case(5, padding="tail", selection="redundancy", reduction="drop", capacity=3)
    inputs = tensors(case)
    expected = similarity_prune(*inputs, **case.attributes)
    assert called == []  # CPU tensors stay with PyTorch
    hints = {"opt_tokens": 3, "max_tokens": 9}
    assert_alike(similarity_prune_on_gpu(*inputs, **case.attributes, **hints), expected)
    assert called == [named_library]


def test_without_the_variable_pytorch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(5)
    inputs = tensors(case)
    for value in (None, ""):
        monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(LIBRARY_VARIABLE, value)
        outputs = similarity_prune_on_gpu(*inputs, **case.attributes)
        for one, other in zip(outputs, similarity_prune(*inputs, **case.attributes), strict=True):
            assert torch.equal(one, other)


def test_a_library_that_does_not_load_is_an_error(
    named_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs_with()
    for path, message in (
        (tmp_path / "none.so", "does not exist"),
        (Path(__file__), "not a shared library"),
        (written(tmp_path / "other.so", elf(243)), "is for ELF machine 243"),
    ):
        monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
        for _ in range(2):  # not only the first time
            with pytest.raises(SimpruneError, match=message):
                similarity_prune_on_gpu(**arguments)


def test_mistakes_are_the_same_errors_with_a_library(named_library: Path) -> None:
    """And what only the kernels do not cover is refused, not given to PyTorch."""
    for changes in ({"capacity": 5}, {"selection": "random"}, {"multiple_of": 0}):
        messages = []
        for operator in (similarity_prune, similarity_prune_on_gpu):
            with pytest.raises(ValueError, match=r".+") as error:
                operator(**inputs_with(**changes))
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    for changes in (DOUBLE, BIG):
        with pytest.raises(SimpruneError, match=r"kernels"):
            similarity_prune_on_gpu(**inputs_with(**changes))


def test_the_operator_needs_no_library_code_until_one_is_named() -> None:
    code = (
        "import sys, torch\nfrom simprune_deploy.pruning.operator import similarity_prune_on_gpu\n"
        "x = torch.ones(1, 3, 2)\n"
        "similarity_prune_on_gpu(x, x, torch.zeros(1, 3), torch.ones(1), 1)\n"
        "print([name for name in sys.modules if name.startswith('simprune_deploy.engine.plugin.')])"
    )
    environment = {name: value for name, value in os.environ.items() if name != LIBRARY_VARIABLE}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == "[]"
