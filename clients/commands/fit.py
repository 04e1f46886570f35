"""`phaseline fit`: brush labels on images → a recipe."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from phaseline.clients import options
from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.features import DeepFeatures
from phaseline.clients.fit import fit
from phaseline.clients.images import list_images, read_image
from phaseline.clients.labels import pair_labels, read_labels
from phaseline.clients.recipe import MANIFEST
from phaseline.runtime.average import PixelSampling
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.contract import FeatureSource
from phaseline.runtime.engine import check_device
from phaseline.runtime.errors import UsageError
from phaseline.runtime.output import check_folder
from phaseline.runtime.source import LocalSource


def fit_command(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")],
    labels: Annotated[Path, typer.Option(
        "--labels", help="A label image (grey or palette; 0: unlabelled, other values: classes), or a folder of them with the "
                         "images' stems.")],
    out: Annotated[Path, typer.Option("--out", help="The recipe's folder.")],
    bundle: options.OptionalBundle = None,
    classical: Annotated[bool, typer.Option("--classical/--no-classical", help="Use the classical filter bank.")] = True,
    sigma_factor: Annotated[float, typer.Option(help="Scales the classical σ; 0.4 is what Weka does.")] = 1.0,
    transforms: options.Transforms = "none",
    alignment: options.Alignment = "centred",
    interpolation: options.Interpolation = "auto",
    boundary: options.Boundary = "reflect",
    overlap: Annotated[int | None, typer.Option(min=0, help="Pixels that tiles share; by default an eighth of a tile.")] = None,
    classifier: Annotated[str, typer.Option(
        help="xgboost, random_forest, logistic_regression, linear or mlp.")] = "xgboost",
    window: Annotated[str, typer.Option(
        help="Intensities that become 0 and 255: auto (8 bits: all; others: the 0.5th and 99.5th percentile of the images), "
             "full, LOW:HIGH, or percentile:LOW,HIGH.")] = "auto",
    class_names: Annotated[str | None, typer.Option(help="Names of the classes by ascending value, separated by commas.")] = None,
    server: options.Server = None,
    transport: options.TransportChoice = "auto",
    timeout: options.Timeout = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a classifier on brush labels and write a recipe."""
    del debug
    screen = options.Screen(quiet)
    started = time.perf_counter()
    check_folder(out, overwrite, MANIFEST)
    known_device = check_device(device)
    tls = options.client_tls(tls_ca, tls_cert, tls_key)
    remote = options.remote_source(server, transport, timeout, tls, bundle_given=bundle is not None, device=device)
    bundle = bundle or "default"
    pairs = pair_labels(list_images(images), labels)
    given = (transforms, alignment, interpolation, boundary, overlap)
    if bundle == "none" and given != ("none", "centred", "auto", "reflect", None):
        raise UsageError("--transforms, --alignment, --interpolation, --boundary and --overlap are for deep features, which "
                         "--bundle none leaves out; drop them")
    if not classical and sigma_factor != 1:
        raise UsageError("--sigma-factor is for classical features, which --no-classical leaves out; drop it")
    with contextlib.ExitStack() as stack:
        source: FeatureSource | None = None
        deep = None
        if bundle != "none":
            chosen: FeatureSource = remote or LocalSource(open_bundle(bundle), known_device, threads)
            source = stack.enter_context(chosen)
            screen.warn_untrained(source.spec)
            sampling = PixelSampling.for_bundle(source.spec, alignment, interpolation, boundary)
            deep = DeepFeatures.for_bundle(source.spec, transforms, sampling, overlap)
        elif not classical:
            raise UsageError("--bundle none with --no-classical leaves no features; drop one of the two")
        pictures = [read_image(image) for image, _ in pairs]
        brushed = [
            read_labels(label, shape=(picture.shape[0], picture.shape[1]))
            for picture, (_, label) in zip(pictures, pairs, strict=True)
        ]
        recipe = fit(
            pictures,
            brushed,
            source=source,
            classical=ClassicalFeatures(sigma_factor=sigma_factor) if classical else None,
            deep=deep,
            window=window,
            classifier=classifier,
            class_names=None if class_names is None else [name.strip() for name in class_names.split(",")],
            image_names=[image.name for image, _ in pairs],
            bundle_path=bundle if bundle == "default" else str(Path(bundle).resolve()),
            seed=seed,
            threads=threads,
            device="cuda" if known_device == "tensorrt" else known_device,
            progress=screen.say,
        )
    recipe.save(out, overwrite=overwrite)
    pixels = ", ".join(f"{name} {n}" for name, n in zip(recipe.classes.names, recipe.training["pixels"].values(), strict=True))
    screen.say(f"{out}: {len(pairs)} image(s), labelled pixels: {pixels}; {time.perf_counter() - started:.1f} s")
