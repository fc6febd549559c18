"""What a parser makes of each form of the file: by NVIDIA's rules, and by TensorRT-RTX's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import operator_forms
import parser_rules
import pytest
import tensorrt_double
from made_up_library import FACTS, elf
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.engine import flavours
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.variants import prune_nodes, without_function
from simprune_deploy.pruning.kernel_library import read_info

pytest.importorskip("tensorrt_rtx")

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
PROBE = ROOT / "tests" / "helpers" / "rtx_parser_probe.py"
VERSIONS = ("10.3.0", "10.7.0", "10.14.1", "10.16.2", "11.4.1")
COUNTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dynamic": ({}, {}),
    "fixed": ({"tokens": 60}, {}),
    "run-time threshold": ({}, {"runtime_threshold": True}),
}
FUNCTION, PLUGIN, REFUSED = "function", "plugin", "refused"
Form = Callable[[onnx.ModelProto], onnx.ModelProto]
FORMS: dict[str, Form] = {
    "marked": lambda graph: graph,
    "unmarked": operator_forms.unmarked,
    "unversioned": operator_forms.unversioned,
    "uncounted": operator_forms.uncounted,
    "an empty name": lambda graph: operator_forms.uncounted(graph, empty=True),
}
every_count = pytest.mark.parametrize("counts", COUNTS)


@pytest.fixture(scope="session")
def graphs() -> dict[str, onnx.ModelProto]:
    """Return the demo model with each kind of counts. They are not to be changed."""
    made = {}
    for name, (pruning, options) in COUNTS.items():
        pruned = sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=[1, 3], **pruning)
        made[name] = export_onnx(pruned, ExportOptions(**options))
    return made


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that is a description and nothing more: the stand-in loads none."""
    path = tmp_path_factory.mktemp("library") / "libsimprune_plugin.so"
    path.write_bytes(elf(62, {**FACTS, "operator_version": flavours.CREATOR[1]}))
    return path


def parsed(version: str, graph: onnx.ModelProto, library: Path | None) -> str:
    """Return what the stand-in for a TensorRT makes of a graph's prune nodes."""
    trt: Any = tensorrt_double.double(version)
    if library is not None:
        trt.get_plugin_registry().load_library(str(library))
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    if not parser.parse(graph.SerializeToString()):
        assert parser.num_errors == 1
        return f"{REFUSED}: {parser.get_error(0)}"
    counted = flavours.count_plugin_layers(trt, network)
    assert counted in (0, len(prune_nodes(graph)))
    return PLUGIN if counted else FUNCTION


class TestByVersion:
    @every_count
    @pytest.mark.parametrize(
        ("form", "expected"),
        [
            ("marked", (FUNCTION, PLUGIN, PLUGIN, PLUGIN, PLUGIN)),
            ("unmarked", (FUNCTION, PLUGIN, PLUGIN, FUNCTION, FUNCTION)),
            ("unversioned", (FUNCTION,) * 5),
        ],
    )
    def test_with_the_function(
        self,
        graphs: dict[str, onnx.ModelProto],
        library: Path,
        counts: str,
        form: str,
        expected: tuple[str, ...],
    ) -> None:
        graph = FORMS[form](operator_forms.counted(graphs[counts]))
        assert tuple(parsed(each, graph, library) for each in VERSIONS) == expected
        assert {parsed(each, graph, None) for each in VERSIONS} == {FUNCTION}

    @every_count
    def test_as_exported_it_is_the_function_or_refused(
        self, graphs: dict[str, onnx.ModelProto], library: Path, counts: str
    ) -> None:
        """The file names the outputs that the model reads: fewer than the plugin has."""
        graph = graphs[counts]
        assert {parsed(each, graph, None) for each in VERSIONS} == {FUNCTION}
        first, *later = (parsed(each, graph, library) for each in VERSIONS)
        assert first == FUNCTION
        assert all(each.endswith("actual output size is 2.") for each in later)

    @every_count
    @pytest.mark.parametrize("form", ["marked", "unmarked"])
    def test_without_it_nothing_but_the_plugin_can_happen(
        self, graphs: dict[str, onnx.ModelProto], library: Path, counts: str, form: str
    ) -> None:
        graph = FORMS[form](without_function(graphs[counts]))
        assert [parsed(each, graph, library) for each in VERSIONS] == [PLUGIN] * 5
        for version in VERSIONS:
            assert "Plugin not found" in parsed(version, graph, None)
        unversioned = operator_forms.unversioned(graph)
        for version in VERSIONS:
            assert "Plugin not found" in parsed(version, unversioned, library)

    @pytest.mark.parametrize("form", ["uncounted", "an empty name"])
    def test_a_node_names_every_output_of_its_layer(
        self, graphs: dict[str, onnx.ModelProto], library: Path, form: str
    ) -> None:
        graph = FORMS[form](without_function(graphs["dynamic"]))
        first, *later = (parsed(each, graph, library) for each in VERSIONS)
        assert first == PLUGIN
        for answer in later:
            assert answer.endswith("expected output size is 5, actual output size is 4.")
        fixed = FORMS[form](without_function(graphs["fixed"]))
        assert [parsed(each, fixed, library) for each in VERSIONS] == [PLUGIN] * 5

    def test_a_node_names_no_more_outputs_than_its_layer_has(
        self, graphs: dict[str, onnx.ModelProto], library: Path
    ) -> None:
        graph = without_function(graphs["fixed"])
        for node in prune_nodes(graph):
            node.output.append(f"{node.name}/one_more")
        for version in VERSIONS:
            assert "expected output size is 4, actual output size is 5" in parsed(
                version, graph, library
            )


class TestTensorRTRTX:
    """NVIDIA's real parser, which carries the newer rules."""

    @pytest.mark.parametrize("registered", [flavours.CREATOR[1], "1", "none"])
    def test_chooses_by_the_rules(
        self, graphs: dict[str, onnx.ModelProto], tmp_path: Path, registered: str
    ) -> None:
        creators = {("SimilarityPrune", registered, "")} if registered != "none" else set()
        expected = {}
        for counts, original in graphs.items():
            for form, change in FORMS.items():
                for stripped in (False, True):
                    base = without_function if stripped else operator_forms.counted
                    graph = change(base(original))
                    path = tmp_path / f"{counts} {form} {stripped}.onnx"
                    path.write_bytes(graph.SerializeToString())
                    for flag in ("plain", "override"):
                        expected[f"{flag} {path}"] = by_the_rules(graph, creators, flag)
        files = list(dict.fromkeys(each.split(" ", 1)[1] for each in expected))
        done = probe(registered, *files)
        assert done.returncode == 0, done.stderr
        found = {}
        for line in done.stdout.splitlines():
            what, _, where = line.partition(" ")
            if where in expected:
                found[where] = what
        assert found == expected
        assert set(found.values()) >= {FUNCTION, REFUSED}

    @pytest.mark.parametrize("counts", ["dynamic", "fixed"])
    def test_a_real_library(
        self,
        graphs: dict[str, onnx.ModelProto],
        host_library: Path,
        tmp_path: Path,
        counts: str,
    ) -> None:
        """Where its parser takes our plugin, it ends the process."""
        version = read_info(host_library).operator_version
        files = {}
        for form in ("marked", "unmarked"):
            for base, name in (
                (operator_forms.counted, form),
                (without_function, f"{form}, stripped"),
            ):
                graph = versioned(FORMS[form](base(graphs[counts])), version)
                files[name] = tmp_path / f"{name}.onnx"
                files[name].write_bytes(graph.SerializeToString())
        for form in ("marked", "marked, stripped", "unmarked, stripped"):
            done = probe(str(host_library), str(files[form]))
            assert done.returncode < 0, form
            assert FUNCTION not in done.stdout
        done = probe(str(host_library), str(files["unmarked"]))
        assert done.stdout.startswith(f"{FUNCTION} plain ")


def by_the_rules(graph: onnx.ModelProto, creators: set[parser_rules.Creator], flag: str) -> str:
    """Return what the newest rules say; where they say plugin the creator is asked at once."""
    functions = {each.name: len(each.output) for each in graph.functions}
    node, version = prune_nodes(graph)[0], (11, 4)
    try:
        found = parser_rules.chosen(node, functions, version, creators, flag == "override")
        if found == FUNCTION:
            parser_rules.check_outputs(node, functions[node.op_type], version)
    except parser_rules.ParseError:
        return REFUSED
    return found


def versioned(graph: onnx.ModelProto, version: str) -> onnx.ModelProto:
    """Return a copy whose prune nodes name another version of the plugin."""
    copy = operator_forms.unversioned(graph)
    for node in prune_nodes(copy):
        node.attribute.append(onnx.helper.make_attribute("plugin_version", version))
    return copy


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROBE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
