"""The metadata of a made-up engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from simprune_deploy.engine.compatibility import Here
from simprune_deploy.engine.engine_metadata import EngineMetadata, FileStamp

ORIN = Here("tensorrt", "10.3.0", (8, 7), "12.6", "b" * 64)


def metadata_of(path: Path, **changes: Any) -> EngineMetadata:
    metadata = EngineMetadata(
        flavour="tensorrt",
        version="10.3.0",
        compute_capabilities=("8.7",),
        targets=(),
        gpu="Orin",
        cuda="12.6",
        plugin=FileStamp("libsimprune_plugin.so", 1000, "b" * 64),
        onnx=FileStamp("model.onnx", 1000, "a" * 64),
        of="pruned",
        precision="fp16",
        profile={"images": {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [8, 3, 8, 8]}},
        workspace_mib=512,
        prune_layers=3,
        plugin_layers=3,
        engine=FileStamp.of(path),
        status="built, not run",
        checked="nothing",
        not_checked="everything",
        versions={"simprune-deploy": "0"},
        seconds=1.5,
        created="2026-11-24T00:00:00+00:00",
    )
    return dataclasses.replace(metadata, **changes)
