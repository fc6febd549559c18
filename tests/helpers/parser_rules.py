"""What NVIDIA's ONNX parsers do with a node that has a plugin, a local function, or both.

The rules were read in the parser's sources (onnx/onnx-tensorrt on GitHub, at the commits that
NVIDIA/TensorRT's release tags name as ``parsers/onnx``): 10.0, 10.1, 10.14, 10.15, 10.16, 11.0. Its
10.3, 10.7 and 10.10 were compiled and run. For 11.4 stands TensorRT-RTX 1.7.1's real parser, which
carries the newest code and chooses by the same rules (tests/engine/test_parser_rules.py).
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
    """Return what becomes of a node, as :func:`chosen` does; refuse one with the wrong outputs.

    Raises:
        ParseError: it is neither, or names other outputs than its layer has.
    """
    found = chosen(node, functions, version, creators, override)
    # the plugin's size tensor counts as an output of its layer
    plugin_outputs = 5 if is_dynamic(node) else 4
    check_outputs(node, plugin_outputs if found == PLUGIN else functions[node.op_type], version)
    return found


def chosen(
    node: onnx.NodeProto,
    functions: Mapping[str, int],
    version: tuple[int, ...],
    creators: Collection[Creator],
    override: bool = False,
) -> str:
    """Return as what a parser imports a node: "plugin" or "function".

    Args:
        node: A prune node.
        functions: By name, the number of outputs of the file's local functions. The parser knows
            them by name alone, whatever their domain (importLocalFunctions in ModelImporter.cpp).
        version: TensorRT's, such as (10, 3).
        creators: What is registered.
        override: The parser flag ENABLE_PLUGIN_OVERRIDE, which there is since 10.15.

    Raises:
        ParseError: there is neither.
    """
    attributes = {each.name: each.s.decode() for each in node.attribute}
    # 10.0 on, FallbackPluginImporter in onnxOpImporters.cpp and onnxOpCheckers.cpp, and since 10.7
    # isNodeInPluginRegistry in ModelImporter.cpp: by operator type, plugin_version and
    # plugin_namespace. (Later ones also try the node's domain as a namespace: ours has none there.)
    version_and_space = (
        attributes.get("plugin_version", "1"),
        attributes.get("plugin_namespace", ""),
    )
    registered = (node.op_type, *version_and_space) in creators
    function = functions.get(node.op_type)
    if function is None:
        plugin = registered
    elif version >= (10, 15):
        # 10.15, parseNode; 10.16 and 11.0, shouldImportAsPlugin, in ModelImporter.cpp: "local
        # function will be preferred over plugin if the flag is unset", and if the node has no
        # attribute plugin_namespace, be it empty
        plugin = registered and (override or "plugin_namespace" in attributes)
    elif version >= (10, 7):
        # 10.7 to 10.14, parseNode in ModelImporter.cpp: "Let plugin take precedence over local
        # function"
        plugin = registered
    else:
        # 10.0 to 10.6, parseNode in ModelImporter.cpp: a local function is looked for first
        plugin = False
    if not plugin and function is None:
        # FallbackPluginImporter's checker, in onnxOpCheckers.cpp
        raise ParseError(
            "(checkFallbackPluginImporter): INVALID_NODE: creator && "
            '"Plugin not found, are the plugin name, version, and namespace correct?"'
        )
    return PLUGIN if plugin else FUNCTION


def check_outputs(node: onnx.NodeProto, outputs: int, version: tuple[int, ...]) -> None:
    """Refuse a node that names other outputs than its layer or function has.

    Raises:
        ParseError: it does.
    """
    if version >= (10, 6):
        # 10.7 on, parseNode in ModelImporter.cpp: as many as there are, empty names apart.
        # The source of 10.6 was not at hand; it is taken to be as strict.
        named = sum(map(bool, node.output))
        wrong = named != outputs
    else:
        # 10.0 to 10.5, parseNode in ModelImporter.cpp: no more than there are
        named = len(node.output)
        wrong = named > outputs
    if wrong:
        raise ParseError(
            "(parseNode): INVALID_GRAPH: Node has more output tensors than TRT expected, expected "
            f"output size is {outputs}, actual output size is {named}."
        )
