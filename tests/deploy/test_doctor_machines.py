"""The doctor on machines that are not at hand, from what their owners have published of them.

Texts of files and programs are copies of published ones; where one is from stands beside it.
Machines are put together from several sources where no single one has all of it. Composed, in the
form that published ones have: the JetPack package's version, the line of ldconfig, and the answer
of nvidia-smi for the RTX 4090.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made_up_library
import pytest
from made_up_engine import metadata_of
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.deploy.doctor import Finding, Machine, all_needed_present
from simprune_deploy.deploy.doctor.libraries import (
    examine_folder,
    examine_library,
    examine_named_library,
    examine_tools,
)
from simprune_deploy.deploy.doctor.machine import Facts, examine_machine, gather, run_command
from simprune_deploy.engine.engine_metadata import FileStamp, metadata_path
from simprune_deploy.engine.gpu import Gpu, NoGpuError

QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv")
DPKG = ("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack")
NVPMODEL = ("nvpmodel", "-q")
LDCONFIG = ("ldconfig", "-p")
HEAD = "name, compute_cap, driver_version\n"


@dataclasses.dataclass(frozen=True)
class Captured:
    """A machine in texts: files below the root, what programs print, what the driver says."""

    processor: str
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    programs: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    gpu: Gpu | None = None

    def unfold(self, root: Path) -> Machine:
        for name, text in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")

        def run(command: Sequence[str]) -> str | None:
            return self.programs.get(tuple(command))

        def find_gpu() -> Gpu:
            if self.gpu is None:
                raise NoGpuError("no GPU was found: NVIDIA's driver is not installed here")
            return self.gpu

        return Machine(root, run, find_gpu, self.processor)


ORIN = Captured(
    processor="aarch64",
    files={
        # an Orin NX with L4T 36.4.3, as a camera vendor's guide "Verify your L4T Version" prints it
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, "
        "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
        "TARGET_USERSPACE_LIB_DIR=nvidia\n"
        "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n",
        # a test of a system monitor, with its NUL
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    },
    programs={
        # an Orin NX, L4T 36.4.3, in a report of a TensorRT bug: compute_cap 8.7, driver 540.4.0
        QUERY: HEAD + "Orin (nvgpu), 8.7, 540.4.0\n",
        DPKG: "6.2+b77",
        # NVIDIA's format: the name, then the number
        NVPMODEL: "NV Power Mode: MAXN\n0\n",
        LDCONFIG: "\tlibnvinfer.so.10 (libc6,AArch64) => /usr/lib/aarch64-linux-gnu/"
        "libnvinfer.so.10.3.0\n",
    },
    gpu=Gpu("Orin", (8, 7), "12.6", 65_000_000_000),
)
THOR = Captured(
    processor="aarch64",
    files={
        # the first line "captured on a Jetson Thor devkit", in a robotics project's tests
        "etc/nv_tegra_release": "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, "
        "EABI: aarch64, DATE: Thu Sep 25 22:47:11 UTC 2025\n# KERNEL_VARIANT: oot\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,tegra264\0",
    },
    # a Thor with L4T 38.2.2: "NVIDIA Thor, 11.0, 580.00, 13.0"
    programs={QUERY: HEAD + "NVIDIA Thor, 11.0, 580.00\n", NVPMODEL: "NV Power Mode: 120W\n1\n"},
    gpu=Gpu("NVIDIA Thor", (11, 0), "13.0", 131_000_000_000),
)
WORKSTATION = Captured(
    processor="x86_64",
    # a reproduction of Hugging Face candle's issue 2583 prints the command and this answer
    programs={
        QUERY: HEAD + "NVIDIA GeForce RTX 4090, 8.9, 550.107.02\n",
        ("nvidia-smi",): "| NVIDIA-SMI 550.107.02    Driver Version: 550.107.02    "
        "CUDA Version: 12.4     |\n",
    },
    gpu=Gpu("NVIDIA GeForce RTX 4090", (8, 9), "12.4", 25_000_000_000),
)
WITHOUT_GPU = Captured(processor="x86_64")


def found(captured: Captured, root: Path) -> dict[str, Finding]:
    machine = captured.unfold(root)
    findings = [*examine_machine(machine, gather(machine)), *examine_tools(machine)]
    assert all_needed_present(findings)
    assert all("\n" not in each.version + each.detail + each.remedy for each in findings)
    return {each.name: each for each in findings}


class TestMachines:
    def test_orin_on_jetpack_6(self, tmp_path: Path) -> None:
        findings = found(ORIN, tmp_path)
        assert findings["CUDA GPU"].version == "Orin (compute capability 8.7)"
        assert findings["NVIDIA driver"].version == "540.4.0 (CUDA up to 12.6)"
        assert findings["Jetson"].version == (
            "NVIDIA Jetson AGX Orin Developer Kit, L4T 36.4.3, JetPack 6.2+b77, power mode MAXN"
        )
        assert findings["TensorRT library"].version == "10.3.0"
        assert findings["TensorRT library"].state == "ok"

    def test_thor(self, tmp_path: Path) -> None:
        findings = found(THOR, tmp_path)
        assert findings["CUDA GPU"].version == "NVIDIA Thor (compute capability 11.0)"
        assert findings["NVIDIA driver"].version == "580.00 (CUDA up to 13.0)"
        assert findings["Jetson"].version == (
            "NVIDIA Jetson AGX Thor Developer Kit, L4T 38.2.2, nvidia-jetpack not installed, "
            "power mode 120W"
        )

    def test_workstation(self, tmp_path: Path) -> None:
        findings = found(WORKSTATION, tmp_path)
        assert findings["CUDA GPU"].version == "NVIDIA GeForce RTX 4090 (compute capability 8.9)"
        assert findings["NVIDIA driver"].version == "550.107.02 (CUDA up to 12.4)"
        assert "Jetson" not in findings

    def test_without_a_gpu(self, tmp_path: Path) -> None:
        findings = found(WITHOUT_GPU, tmp_path)
        assert findings["CUDA GPU"].state == "optional"
        assert findings["CUDA GPU"].detail.startswith("no GPU was found")
        assert "driver" in findings["CUDA GPU"].remedy
        assert not {"NVIDIA driver", "Jetson", "CUDA toolkit"} & set(findings)

    def test_jetson_whose_nvidia_smi_knows_nothing(self, tmp_path: Path) -> None:
        programs = {QUERY: HEAD + "Orin (nvgpu), [N/A], 540.5.0\n"}
        facts = gather(dataclasses.replace(ORIN, programs=programs).unfold(tmp_path))
        assert facts.gpus == ("Orin (compute capability 8.7)",)
        assert (facts.capability, facts.driver) == ((8, 7), "540.5.0")

    def test_what_nobody_knows_is_said_to_be_unknown(self, tmp_path: Path) -> None:
        programs = {QUERY: HEAD + "Orin (nvgpu), [N/A], [N/A]\n"}
        captured = dataclasses.replace(ORIN, files={}, programs=programs, gpu=None)
        findings = found(captured, tmp_path)
        assert findings["CUDA GPU"].version == "Orin (nvgpu) (compute capability unknown)"
        assert findings["NVIDIA driver"].version == "unknown (CUDA up to unknown)"

    def test_driver_without_its_library(self, tmp_path: Path) -> None:
        facts = gather(dataclasses.replace(WORKSTATION, gpu=None).unfold(tmp_path))
        assert (facts.capability, facts.cuda) == ((8, 9), "12.4")

    def test_two_gpus(self, tmp_path: Path) -> None:
        programs = {QUERY: WORKSTATION.programs[QUERY] + "NVIDIA H100 PCIe, 9.0, 550.107.02\n"}
        facts = gather(dataclasses.replace(WORKSTATION, programs=programs).unfold(tmp_path))
        assert facts.gpus[1] == "NVIDIA H100 PCIe (compute capability 9.0)"

    def test_jetpack_5_is_too_old(self, tmp_path: Path) -> None:
        files = {**ORIN.files, "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, ...\n"}
        machine = dataclasses.replace(ORIN, files=files).unfold(tmp_path)
        jetson = examine_machine(machine, gather(machine))[-1]
        assert (jetson.name, jetson.state) == ("Jetson", "too old")
        assert "JetPack 6.1" in jetson.remedy
        assert all_needed_present([jetson])

    def test_toolkit(self, tmp_path: Path) -> None:
        text = json.dumps({"cuda": {"name": "CUDA SDK", "version": "12.6.11"}})
        for damaged, files in ((False, text), (True, text[:-3]), (True, "[]")):
            captured = Captured("x86_64", {"usr/local/cuda/version.json": files})
            findings = found(captured, tmp_path)
            assert ("CUDA toolkit" in findings) is not damaged

    def test_old_tensorrt_library(self, tmp_path: Path) -> None:
        (tmp_path / "usr/lib").mkdir(parents=True)
        (tmp_path / "usr/lib/libnvinfer.so.8.6.1").touch()
        (tmp_path / "usr/lib/libnvinfer.so.8").symlink_to("libnvinfer.so.8.6.1")
        line = "\tlibnvinfer.so.8 (libc6,x86-64) => /usr/lib/libnvinfer.so.8\n"
        library = found(Captured("x86_64", programs={LDCONFIG: line}), tmp_path)["TensorRT library"]
        assert (library.state, library.version) == ("too old", "8.6.1")


class TestCommands:
    def test_programs_are_asked_with_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("simprune_deploy.deploy.doctor.machine.TIMEOUT", 0.2)
        assert run_command(["sleep", "60"]) is None

    def test_no_answer_is_none(self) -> None:
        assert run_command(["no-such-program-here"]) is None
        assert run_command(["false"]) is None
        assert run_command([sys.executable, "-c", "print('8.9')"]) == "8.9\n"


def library(folder: Path, *sms: int, ptx: int | None = None, **facts: Any) -> Path:
    """Write a library with code for some architectures."""
    entries = [(2, sm, 0) for sm in sms] + ([(1, ptx, 0)] if ptx else [])
    said = {**made_up_library.FACTS, **facts}
    path = folder / "libsimprune_plugin.so"
    path.write_bytes(made_up_library.elf(62, said, made_up_library.fatbin(*entries)))
    return path


def here(captured: Captured, root: Path) -> Facts:
    return dataclasses.replace(gather(captured.unfold(root)), processor="x86_64")


class TestLibraries:
    @pytest.mark.parametrize(
        ("captured", "sms", "ptx", "fits"),
        [
            (WORKSTATION, (89,), None, True),
            (WORKSTATION, (86,), None, True),  # the same generation, earlier
            (WORKSTATION, (75, 90), None, False),
            (WORKSTATION, (87,), None, False),  # Orin's
            (WORKSTATION, (75,), 80, True),
            (ORIN, (87,), None, True),
            (ORIN, (86,), None, False),
            (THOR, (110,), None, True),
            (THOR, (101,), None, False),  # its name in CUDA 12, which no Thor has
            (THOR, (87,), 90, True),  # a driver compiles PTX
            (THOR, (100,), None, False),
            (WITHOUT_GPU, (75,), None, True),
        ],
    )
    def test_code_for_this_gpu(
        self, tmp_path: Path, captured: Captured, sms: tuple[int, ...], ptx: int | None, fits: bool
    ) -> None:
        facts = here(captured, tmp_path)
        path = library(tmp_path, *sms, ptx=ptx, cuda="12.4.0")
        finding = examine_library("plugin", path, facts, "", "")
        assert finding.state == ("ok" if fits else "broken")
        if not fits:
            sm = {"89": "89", "87": "87", "110": "110"}["".join(map(str, facts.capability or ()))]
            assert f"this GPU is SM {sm}" in finding.detail
            assert finding.remedy == f"simprune-deploy plugin build --arch {sm}"
            assert not all_needed_present([finding])

    @pytest.mark.parametrize(("cuda", "fits"), [("13.0.88", False), ("12.6.85", True)])
    def test_driver_too_old_for_its_cuda(self, tmp_path: Path, cuda: str, fits: bool) -> None:
        path = library(tmp_path, 89, cuda=cuda)
        finding = examine_library("plugin", path, here(WORKSTATION, tmp_path), "", "")
        assert finding.state == ("ok" if fits else "broken")
        if not fits:
            assert "this driver knows CUDA 12.4" in finding.detail
            assert "update NVIDIA's driver" in finding.remedy

    def test_headers_of_another_tensorrt(self, tmp_path: Path) -> None:
        path = library(tmp_path, 89, cuda="12.4.0")
        facts = here(WORKSTATION, tmp_path)
        same = examine_library("plugin", path, facts, "10.3.0", "")
        other = examine_library("plugin", path, facts, "11.4.1", "")
        assert same.state == other.state == "ok"
        assert "SIMPRUNE_REGISTER" not in same.detail
        assert "does not register itself" in other.detail

    def test_another_processor(self, tmp_path: Path) -> None:
        path = library(tmp_path, 87)
        facts = gather(ORIN.unfold(tmp_path))
        finding = examine_library("plugin", path, facts, "", "")
        assert finding.state == "broken"
        assert "is for x86_64, and this machine is aarch64" in finding.detail


class TestFolder:
    def engine(self, folder: Path, name: str = "model.engine", **changes: Any) -> Path:
        (folder / "engines").mkdir(exist_ok=True)
        path = folder / "engines" / name
        path.write_bytes(b"an engine")
        facts = metadata_of(path, **{"engine": FileStamp.of(path), "plugin": None, **changes})
        metadata_path(path).write_text(json.dumps(facts.to_dict()))
        return path

    def look(self, folder: Path, facts: Facts, **versions: str) -> list[Finding]:
        found = list(examine_folder(folder, facts, versions))
        assert all("\n" not in each.detail for each in found)
        return found

    def test_an_engine_that_fits(self, tmp_path: Path) -> None:
        self.engine(tmp_path)
        (finding,) = self.look(tmp_path, here(ORIN, tmp_path), tensorrt="10.3.0")
        assert (finding.name, finding.state) == ("model.engine", "ok")
        assert finding.version == "TensorRT 10.3.0 for SM 8.7"

    @pytest.mark.parametrize(
        ("captured", "version", "says"),
        [
            (ORIN, "10.16.1", "this is SM 8.7 with 10.16.1"),
            (THOR, "10.3.0", "this is SM 11.0 with 10.3.0"),
            (ORIN, None, "TensorRT is not installed here"),
        ],
    )
    def test_an_engine_that_does_not(
        self, tmp_path: Path, captured: Captured, version: str | None, says: str
    ) -> None:
        self.engine(tmp_path)
        versions = {"tensorrt": version} if version else {}
        (finding,) = self.look(tmp_path, here(captured, tmp_path), **versions)
        assert finding.state == "broken"
        assert says in finding.detail
        wanted = f"simprune-deploy build {tmp_path}" if version else "pip install tensorrt"
        assert finding.remedy == wanted
        assert not all_needed_present([finding])

    def test_an_engine_that_was_built_ahead_is_not_broken_without_a_gpu(
        self, tmp_path: Path
    ) -> None:
        self.engine(tmp_path, flavour="tensorrt-rtx", version="1.7.1")
        (finding,) = self.look(tmp_path, here(WITHOUT_GPU, tmp_path))
        assert finding.state == "ok"
        assert finding.detail == "not compared: no GPU was found here"

    def test_a_damaged_engine(self, tmp_path: Path) -> None:
        self.engine(tmp_path).write_bytes(b"another")
        (finding,) = self.look(tmp_path, here(ORIN, tmp_path), tensorrt="10.3.0")
        assert finding.state == "broken"
        assert "SHA-256 differs" in finding.detail

    def test_the_plugin_of_an_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "plugin").mkdir()
        path = library(tmp_path / "plugin", 87, cuda="12.6.85")
        self.engine(tmp_path, "a.engine", plugin=FileStamp.of(path))
        self.engine(tmp_path, "b.engine", plugin=FileStamp("libsimprune_plugin.so", 1, "0" * 64))
        facts = here(ORIN, tmp_path)
        plugin, good, bad = self.look(tmp_path, facts, tensorrt="10.3.0")
        assert (plugin.name, plugin.state) == ("plugin/libsimprune_plugin.so", "ok")
        assert (good.state, bad.state) == ("ok", "broken")
        assert "another libsimprune_plugin.so" in bad.detail
        # the one that came along, and the one that the environment names
        (tmp_path / "plugin" / "prebuilt").mkdir()
        path = path.rename(tmp_path / "plugin" / "prebuilt" / path.name)
        assert self.look(tmp_path, facts, tensorrt="10.3.0")[0].name.startswith("plugin/prebuilt/")
        moved = path.rename(tmp_path / "elsewhere.so")
        monkeypatch.setenv("SIMPRUNE_LIBRARY", str(moved))
        good, bad = self.look(tmp_path, facts, tensorrt="10.3.0")
        assert (good.state, bad.state) == ("ok", "broken")
        (named,) = examine_named_library(facts, "10.3.0")
        assert (named.name, named.state) == ("SIMPRUNE_LIBRARY", "ok")

    def test_a_changed_export(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text("{}")
        (finding,) = self.look(tmp_path, here(WITHOUT_GPU, tmp_path))
        assert (finding.name, finding.state) == ("export", "broken")

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SimpruneError, match="is not a folder"):
            self.look(tmp_path / "nowhere", here(WITHOUT_GPU, tmp_path))


class TestCommandLine:
    def test_a_folder_in_json(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text("{}")
        answer = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
        assert answer.exit_code == 1
        result = json.loads(answer.stdout)
        assert result["healthy"] is False
        assert result["findings"][-1]["name"] == "export"

    def test_no_folder_is_one_line(self, tmp_path: Path) -> None:
        answer = CliRunner().invoke(app, ["doctor", str(tmp_path / "nowhere")])
        assert answer.exit_code == 2
        assert "is not a folder" in answer.output

    def test_it_needs_no_torch_to_see_a_gpu(self) -> None:
        code = "import sys, simprune_deploy.deploy.doctor; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "False"
