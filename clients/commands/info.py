"""`phaseline info`: what is installed, which engines work, what an artefact holds."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from phaseline.clients import recipe as recipes
from phaseline.clients.kserve import Tls, parse_servers
from phaseline.clients.options import Debug, TlsCa, TlsCert, TlsKey, client_tls, untrained_note
from phaseline.clients.publish import describe, list_recipes, served_bundle
from phaseline.runtime import bundle as bundles
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.errors import MissingExtraError, MissingInputError, UsageError
from phaseline.runtime.ort import PROVIDER_NAMES, import_onnxruntime


def info_command(
    artefact: Annotated[str | None, typer.Argument(metavar="[BUNDLE|RECIPE]", help="A folder, or 'default'.")] = None,
    server: Annotated[str | None, typer.Option("--server", metavar="HOST:PORT", help="Say what a server serves.")] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    debug: Debug = False,
) -> None:
    """Say what is installed and which engines work, or what a bundle, a recipe or a server holds."""
    del debug
    console = Console(highlight=False, soft_wrap=True)
    if server is not None:
        if artefact is not None:
            raise UsageError("an artefact and --server came together; ask for one of them")
        lines = _server(server, client_tls(tls_ca, tls_cert, tls_key))
    elif artefact is None:
        lines = _installation()
    elif artefact == "default" or (Path(artefact) / bundles.MANIFEST).is_file():
        lines = _bundle(open_bundle(artefact))
    elif (Path(artefact) / recipes.MANIFEST).is_file():
        lines = _recipe(Path(artefact))
    elif Path(artefact).exists():
        raise UsageError(f"{artefact} holds neither {bundles.MANIFEST} nor {recipes.MANIFEST}; expected a bundle or a recipe")
    else:
        raise MissingInputError(f"nothing at {artefact}; expected the folder of a bundle or a recipe, or 'default'")
    for name, text in lines:
        console.print(f"{name:<24} {text}", markup=False)


def _installation() -> list[tuple[str, str]]:
    lines = [("python", platform.python_version()), *recipes.installed_versions().items()]
    try:
        available = import_onnxruntime().get_available_providers()
    except MissingExtraError as error:
        lines.append(("engines", str(error)))
    else:
        lines += [(f"engine {name}", "available" if provider in available else "not installed")
                  for name, provider in PROVIDER_NAMES.items()]
    return lines


def _server(server: str, tls: Tls | None) -> list[tuple[str, str]]:
    (server,) = parse_servers(server)
    spec = served_bundle(server, tls)
    lines = [
        ("server", server),
        ("bundle", f"{spec.digest()}, {_backbone(spec)}"),
        ("tile", f"{spec.tile_px} px, {spec.in_channels} channel(s), stride {spec.stride_px} px, {spec.channels} features"),
        ("upsampler", _upsampler(spec)),
    ]
    return lines + [("recipe", describe(recipe)) for recipe in list_recipes(server, tls=tls)]


def _backbone(spec: BundleSpec) -> str:
    return f"{spec.backbone}, weights {spec.weights}{'' if spec.trained else ' (untrained)'}"


def _upsampler(spec: BundleSpec) -> str:
    if not spec.has_upsampler:
        return "none"
    facts = dict(spec.upsampler)
    untrained = "" if facts["trained"] else " (untrained)"
    return (f"{facts['name']}, weights {facts['weights']}{untrained}; {facts['hidden']} hidden channels, {spec.pixel_channels} "
            "pixel channels")


def _bundle(bundle: Bundle) -> list[tuple[str, str]]:
    spec = bundle.spec
    lines = [
        ("bundle", str(bundle.path)),
        ("hash", bundle.hash),
        ("backbone", _backbone(spec)),
        ("upsampler", _upsampler(spec)),
        ("tile", f"{spec.tile_px} px, {spec.in_channels} channel(s); patch {spec.patch_px} px, stride {spec.stride_px} px, "
                 f"{spec.grid}×{spec.grid} tokens"),
        ("features", f"{spec.channels} of {spec.embed_dim} channels; {spec.heads} attention heads; facets: "
                     f"{', '.join(spec.facets) or 'none'}"),
        ("precision", f"{spec.precision}; at most {spec.max_batch} tiles in a batch"),
    ]
    lines += [(f"graph {form}", name) for form, name in spec.graphs.items()]
    lines += [(f"pixel graph {form}", name) for form, name in spec.pixel_graphs.items()]
    lines += [("file", f"{name}, {file.size_bytes} bytes, sha256 {file.sha256}") for name, file in spec.files.items()]
    lines += [("projection", f"{name} {value}") for name, value in spec.projection.items()]
    lines += [("parity", f"{name} {value:.3g}") for name, value in spec.parity.items()]
    lines += [("written by", f"{name} {version}") for name, version in spec.versions.items()]
    if note := untrained_note(spec):
        lines.append(("note", note))
    card = (bundle.path / spec.card).read_text(encoding="utf-8").splitlines() if spec.card else []
    return lines + [("card" if not i else "", line) for i, line in enumerate(card)]


def _recipe(path: Path) -> list[tuple[str, str]]:
    recipe = recipes.load_recipe(path, device="cpu")
    deep, classical = recipe.features.deep, recipe.features.classical
    lines = [
        ("recipe", str(path)),
        ("hash", recipes.recipe_hash(path)),
        ("images", "grey" if recipe.features.image_channels == 1 else "RGB"),
        ("window", f"{recipe.window.low:g}…{recipe.window.high:g}"),
        ("classical", "none" if classical is None else f"{classical.channels} features a channel, σ {classical.sigmas} px "
                                                       f"× {classical.sigma_factor:g}"),
        ("deep", "none" if deep is None else f"transforms {deep.transforms}, {deep.sampling.interpolation} interpolation, "
                                             f"{'' if deep.sampling.is_learned else f'alignment {deep.sampling.alignment}, '}"
                                             f"boundary {deep.sampling.boundary}, overlap {deep.overlap_px} px"),
        ("classifier", f"{recipe.classifier_kind}, {recipe.classifier.n_features} features"),
    ]
    if recipe.bundle is not None:
        lines.append(("bundle", f"{recipe.bundle.hash} ({recipe.bundle.path})"
                                f"{'' if recipe.bundle.trained else ', untrained weights'}"))
    for value, name, colour in zip(recipe.classes.values, recipe.classes.names, recipe.classes.colours, strict=True):
        lines.append(("class", f"{value} {name} {colour}, {recipe.training['pixels'][str(value)]} labelled pixels"))
    lines.append(("fitted on", ", ".join(recipe.training["images"])))
    return lines + [("written by", f"{name} {version}") for name, version in recipe.versions.items()]
