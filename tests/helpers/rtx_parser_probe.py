"""Says what TensorRT-RTX's real parser makes of ONNX files where a plugin is registered.

    python rtx_parser_probe.py WHAT FILE...

A program of its own, because what is registered stays so for as long as the process, and because
TensorRT-RTX has no plugin layers: given a real plugin, its parser ends the process. WHAT is the
version of a creator in Python, which gives no plugin and says that it was asked for one, or "none",
or the path of a library to register.

Prints a line for each file, once without and once with the parser flag ENABLE_PLUGIN_OVERRIDE
("plain", "override"): "plugin", "function" or "refused", and the flag and the file behind it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


def main(what: str, *files: str) -> None:
    """Register what there is to register, and parse the files."""
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    registry = trt.get_plugin_registry()
    asked: list[str] = []
    creator = new_creator(what, asked)
    if "/" in what:
        assert registry.load_library(what) is not None
    elif what != "none":
        assert registry.register_creator(creator, "")
    for file in files:
        for flag in ("plain", "override"):
            asked.clear()
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
            if flag == "override":
                parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
            parsed = parser.parse(Path(file).read_bytes())
            found = "plugin" if asked else "function" if parsed else "refused"
            print(found, flag, file, flush=True)


def new_creator(version: str, asked: list[str]) -> Any:
    """Return a creator of that version that notes the layers it is asked for."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.name, self.plugin_namespace, self.plugin_version = "SimilarityPrune", "", version
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
            asked.append(name)

    return Creator()


if __name__ == "__main__":
    main(*sys.argv[1:])
