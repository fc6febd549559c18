"""The texts of a bundle: its README, what pip installs, and the script that compiles the plugin."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import RequirementError
from simprune_deploy.common.versions import __version__
from simprune_deploy.deploy.bundle.own_wheel import EXTRAS
from simprune_deploy.engine.build import STRIPPED
from simprune_deploy.engine.libraries import LIBRARY, PLUGIN_FOLDER
from simprune_deploy.onnx.exported_folder import MODEL

if TYPE_CHECKING:
    import onnx

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
    from simprune_deploy.onnx.metadata import read_metadata

    metadata = read_metadata(graph)
    releases = [release for target in about["targets"] for release in target["releases"]]
    architectures = {target["sm"] for target in about["targets"]}
    stripped = (folder / STRIPPED).exists()
    values = {
        **about,
        "name": name,
        "quoted": shlex.quote(name),
        "cuda_12": any((each["cuda"] or "").startswith("12") for each in releases),
        "version": __version__,
        "architecture": metadata.architecture or "A Vision Transformer",
        "precision": metadata.precision,
        "titles": [target["title"] for target in about["targets"]],
        "stripped": stripped,
        # one that is unknown is among all that nvcc knows
        "architectures": "" if None in architectures else ",".join(sorted(architectures, key=int)),
        "model": STRIPPED if stripped else MODEL,
        "trtexec": _trtexec(graph, STRIPPED if stripped else MODEL, stripped),
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
        raise RequirementError(
            "jinja2, which writes the README, is missing: pip install 'simprune-deploy[bundle]'"
        ) from None
    text = resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["ljust36"] = lambda each: each.ljust(36)
    return environment.from_string(text).render(values)


def _trtexec(graph: onnx.ModelProto, model: str, plugin: bool) -> str:
    """Return the ``trtexec`` line of a bundle; one does for TensorRT 10 and 11."""
    from simprune_deploy.engine.profile import free_inputs, optimization_profile
    from simprune_deploy.engine.trtexec import trtexec_line
    from simprune_deploy.onnx.metadata import read_metadata

    return trtexec_line(
        None,
        Path(model),
        Path("model.plan"),
        optimization_profile(graph, read_metadata(graph).batch),
        free_inputs(graph),
        plugin=Path(PLUGIN_FOLDER, LIBRARY) if plugin else None,
    )
