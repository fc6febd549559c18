"""What NVIDIA's ONNX parsers do with a node that has a plugin, a local function, or both.

The rules were read in the parser's sources (github.com/onnx/onnx-tensorrt, at the commits that
NVIDIA/TensorRT's release tags name as ``parsers/onnx``); its 10.3, 10.7 and 10.10 were also compiled
and run. 11.4 is not public: 11.1 is the newest that was read, and TensorRT-RTX 1.7.1's real parser,
which carries that code, chooses likewise (tests/engine/test_rtx_parser.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from operator_forms import is_dynamic

Creator = tuple[str, str, str]
"""A plugin in a registry: name, version, namespace."""

PLUGIN, FUNCTION = "plugin", "function"


class ParseError(Exception):
    """The parser does not take the node, in the parser's own words."""


def taken(
    node: onnx.NodeProto,
    functions: Mapping[str, int],
    version: tuple[int, ...],
    creators: Collection[Creator],
    override: bool = False,
) -> str:
    """Return what a parser makes of a node: "plugin" or "function".

    Args:
        node: A prune node.
        functions: By name, the number of outputs of the file's local functions. The parser knows
            them by name alone, whatever their domain (importLocalFunctions in ModelImporter.cpp).
        version: TensorRT's, such as (10, 3).
        creators: What is registered.
        override: The parser flag ENABLE_PLUGIN_OVERRIDE, which there is since 10.15.

    Raises:
        ParseError: it is neither, or names other outputs than its layer has.
    """
    attributes = {each.name: each.s.decode() for each in node.attribute}
    # 10.0 to 11.1, isNodeInPluginRegistry in ModelImporter.cpp (since 10.7) and FallbackPluginImporter in
    # onnxOpImporters.cpp and onnxOpCheckers.cpp: by operator type, plugin_version, plugin_namespace
    name = (node.op_type, attributes.get("plugin_version", "1"))
    registered = (*name, attributes.get("plugin_namespace", "")) in creators
    function = functions.get(node.op_type)
    if function is None:
        # FallbackPluginImporter alone also looks into the namespace that is the node's domain
        plugin = registered or (*name, node.domain) in creators
    elif version >= (10, 15):
        # 10.15, parseNode; 10.16 to 11.1, shouldImportAsPlugin, in ModelImporter.cpp: "local function will be
        # preferred over plugin if the flag is unset", and if the node has no attribute plugin_namespace
        plugin = registered and (override or "plugin_namespace" in attributes)
    elif version >= (10, 7):
        # 10.7 to 10.14, parseNode in ModelImporter.cpp: "Let plugin take precedence over local function"
        plugin = registered
    else:
        # 10.0 to 10.6, parseNode in ModelImporter.cpp: a local function is looked for first
        plugin = False
    if not plugin and function is None:
        # onnxOpCheckers.cpp, FallbackPluginImporter (in 10.3 builtin_op_static_checkers.cpp)
        raise ParseError("Plugin not found, are the plugin name, version, and namespace correct?")
    # the plugin's size tensor counts as an output of its layer
    outputs = (5 if is_dynamic(node) else 4) if plugin else function
    named = len(node.output)
    # 10.0 to 10.5, parseNode in ModelImporter.cpp: no more than the layer has
    wrong = named > int(outputs or 0)
    if version >= (10, 6):
        # 10.7 to 11.1, parseNode in ModelImporter.cpp, nonEmptyOutputs: as many, empty names apart. (10.6's
        # source was not at hand: taken to be as strict.)
        named = sum(map(bool, node.output))
        wrong = named != outputs
    if wrong:
        raise ParseError(
            "Node has more output tensors than TRT expected, expected output size is "
            f"{outputs}, actual output size is {named}."
        )
    return PLUGIN if plugin else FUNCTION
