"""Files whose facts are of another version of the operator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.onnx.function_body import DOMAIN, DOMAIN_VERSION
from simprune_deploy.onnx.metadata import METADATA_KEY, ModelMetadata, read_metadata, write_metadata
from simprune_deploy.pruning.config import PruneConfig


@pytest.fixture
def graph() -> onnx.ModelProto:
    """Return a graph with facts of ours; nothing in it prunes."""
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    identity = helper.make_node("Identity", ["images"], ["logits"])
    main = helper.make_graph([identity], "g", [value], [])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    made = helper.make_model(main, opset_imports=opsets)
    metadata = ModelMetadata(
        architecture="vit",
        model_args={},
        preprocessing={},
        pruning=PruneConfig(),
        export={
            "opset": 20,
            "batch": [1, 1],
            "runtime_threshold": False,
            "normalize": False,
            "softmax": False,
        },
        output="logits",
        num_classes=10,
        num_prefix_tokens=1,
        num_patches=4,
        depth=1,
        channels=1,
        image_size=(8, 8),
        embed_dim=8,
        mlp_dim=8,
        parameters=1,
    )
    write_metadata(made, metadata)
    return made


def refused(graph: onnx.ModelProto, says: str) -> None:
    with pytest.raises(ArtifactError, match=says) as raised:
        read_metadata(graph)
    assert "\n" not in str(raised.value)


def test_what_was_written_is_read_again(graph: onnx.ModelProto) -> None:
    assert read_metadata(graph).architecture == "vit"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (
            DOMAIN_VERSION - 1,
            f"exported before version {DOMAIN_VERSION} of the operator: export the model again",
        ),
        (DOMAIN_VERSION + 1, f"has version {DOMAIN_VERSION + 1} .* update simprune-deploy"),
    ],
)
def test_another_version_of_the_operator(graph: onnx.ModelProto, version: int, says: str) -> None:
    graph.opset_import[1].version = version
    refused(graph, says)


def test_a_selection_that_there_is_no_more(graph: onnx.ModelProto) -> None:
    """As a file without prune layers has it, which imports no operator of ours."""
    del graph.opset_import[1]
    values: dict[str, Any] = json.loads(graph.metadata_props[0].value)
    values["pruning"]["selection"] = "no longer known"
    assert graph.metadata_props[0].key == METADATA_KEY
    graph.metadata_props[0].value = json.dumps(values)
    refused(
        graph,
        f"pruning is not of version {DOMAIN_VERSION} of the operator .*: export the model again",
    )


def test_the_command_line_says_so_too(graph: onnx.ModelProto, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from simprune_deploy.cli import app

    graph.opset_import[1].version = DOMAIN_VERSION - 1
    path = tmp_path / "old.onnx"
    path.write_bytes(graph.SerializeToString())
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0].endswith("export the model again")
