"""The texts of a bundle: its README, what pip installs, and the script that compiles the plugin."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import simprune_deploy
from simprune_deploy.bundle import MODEL
from simprune_deploy.device_bundle.own_wheel import EXTRAS
from simprune_deploy.engine.targets import load_targets, version_numbers
from simprune_deploy.errors import SimpruneError
from simprune_deploy.plugin.toolchain import OLDEST_TENSORRT

if TYPE_CHECKING:
    import onnx

STRIPPED = "model-plugin.onnx"
README, REQUIREMENTS, BUILD = "README.md", "requirements.txt", "plugin/build.sh"


def write_texts(folder: Path, name: str, graph: onnx.ModelProto, about: dict[str, Any]) -> None:
    """Write the texts.

    Args:
        folder: The bundle.
        name: What it is called.
        graph: The model.
        about: What the manifest says of the bundle.

    Raises:
        SimpruneError: the package ``jinja2`` is missing.
    """
    from simprune_deploy.onnx.metadata import read_facts

    facts = read_facts(graph)
    releases = [release for target in about["targets"] for release in target["releases"]]
    architectures = {target["sm"] for target in about["targets"]}
    stripped = (folder / STRIPPED).exists()
    values = {
        **about,
        "name": name,
        "quoted": shlex.quote(name),
        "cuda_12": any((each["cuda"] or "").startswith("12") for each in releases),
        "version": simprune_deploy.__version__,
        "architecture": facts.architecture or "A Vision Transformer",
        "precision": facts.precision,
        "titles": [target["title"] for target in about["targets"]],
        "stripped": stripped,
        "replaces_from": load_targets().plugin_replaces_function_from.value,
        # one that is unknown is among all that nvcc knows
        "architectures": "" if None in architectures else ",".join(sorted(architectures, key=int)),
        "trtexec": _trtexec_lines(graph, about["targets"], STRIPPED if stripped else MODEL),
    }
    (folder / README).write_text(_render("README.md.jinja", values), encoding="utf-8")
    (folder / BUILD).write_text(_render("build.sh.jinja", values), encoding="utf-8")
    (folder / BUILD).chmod(0o755)
    wheel = f"./{about['wheel']}[{','.join(EXTRAS)}]"
    text = f"# from this folder: pip install -r {REQUIREMENTS}\n{wheel}\n"
    (folder / REQUIREMENTS).write_text(text, encoding="utf-8")


def _render(template: str, values: dict[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise SimpruneError(
            "jinja2, which writes the README, is missing: pip install 'simprune-deploy[bundle]'"
        ) from None
    text = resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["ljust36"] = lambda each: each.ljust(36)
    return environment.from_string(text).render(values)


def _trtexec_lines(
    graph: onnx.ModelProto, targets: list[dict[str, Any]], early: str
) -> list[dict[str, str]]:
    """Return the ``trtexec`` lines for the TensorRT versions that the targets may have.

    `early` is the model for those that look at a file's functions before their plugins.
    """
    from simprune_deploy.engine.profile import optimization_profile
    from simprune_deploy.onnx.metadata import read_facts

    first = load_targets().plugin_replaces_function_from.value
    versions: set[tuple[int, ...] | None] = set()
    for target in targets:
        found = [release["tensorrt"] for release in target["releases"]] or [None]
        versions |= {version_numbers(each) if each else None for each in found}
    versions = {each for each in versions if each is None or each >= OLDEST_TENSORRT}
    profile = optimization_profile(graph, read_facts(graph).batch)
    free = {name: each for name, each in profile.items() if each["min"] != each["max"]}
    shapes = "".join(
        f" --{which}Shapes="
        + ",".join(f"{name}:{'x'.join(map(str, each[which]))}" for name, each in free.items())
        for which in ("min", "opt", "max")
        if free
    )
    plugin = " --dynamicPlugins=plugin/libsimprune_plugin.so"
    lines = []
    for title, model, typed, low, high in (
        (f"Before TensorRT {first}", early, True, (0,), version_numbers(first)),
        (f"TensorRT {first} and later 10", MODEL, True, version_numbers(first), (11,)),
        ("TensorRT 11", MODEL, False, (11,), (99,)),
    ):
        if any(each is None or low <= each < high for each in versions):
            strongly = " --stronglyTyped" if typed else ""
            line = f"trtexec --onnx={model} --saveEngine=model.plan{plugin}{strongly}{shapes}"
            lines.append({"title": title, "line": line})
    return lines
