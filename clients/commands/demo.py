"""`phaseline demo`: fit, segment and look, with nothing to download."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from phaseline.clients import options
from phaseline.clients.batch import fractions
from phaseline.clients.demo import Example, examples
from phaseline.clients.features import DeepFeatures, FeatureSettings, PixelFeatures, image_channels
from phaseline.clients.fit import fit
from phaseline.clients.images import check_output, write_labels, write_rgb
from phaseline.clients.pictures import overlay, pca_picture, side_by_side
from phaseline.clients.recipe import MANIFEST
from phaseline.clients.segmenter import Segmentation, Segmenter
from phaseline.clients.window import to_channels
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.engine import check_device
from phaseline.runtime.output import check_folder
from phaseline.runtime.source import LocalSource


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the demo's files.")] = Path("demo-output"),
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Segment two real micrographs from a few brush strokes: labels, overlays, features as pictures."""
    del debug
    screen = options.Screen(quiet)
    known_device = check_device(device)
    found = examples()
    for example in found:
        for ending in ("", "_confidence", "_overlay"):
            check_output(out / f"{example.name}{ending}.png", overwrite)
        check_folder(out / f"{example.name}_recipe", overwrite, MANIFEST)
    with LocalSource(open_bundle("default"), known_device, threads) as source:
        screen.warn_untrained(source.spec)
        screen.say(f"engine: {source.engine_choice}")
        for example in found:
            started = time.perf_counter()
            recipe = fit(
                [example.image], [example.labels], source=source, class_names=example.class_names,
                image_names=[example.name], seed=seed, threads=threads,
                device="cuda" if known_device == "tensorrt" else known_device, progress=screen.say,
            )
            fitted = time.perf_counter()
            segmenter = Segmenter(recipe, source)
            result = segmenter.segment(example.image)
            segmented = time.perf_counter()
            recipe.save(out / f"{example.name}_recipe", overwrite=overwrite)
            _write(out, example, segmenter, result, source)
            shares = ", ".join(
                f"{name} {100 * share:.1f} %" for name, share in
                zip(recipe.classes.names, fractions(result.labels, recipe.classes).values(), strict=True)
            )
            if not quiet:
                print(f"{example.name}: {shares} ({100 * np.mean(example.labels > 0):.1f} % of the pixels labelled; fitted in "
                      f"{fitted - started:.1f} s, segmented in {segmented - fitted:.1f} s; mean confidence "
                      f"{result.confidence.mean() / 255:.2f})")
    screen.say(f"look at {out}/NAME_overlay.png: strokes, labels, deep features. Also there: NAME.png, the labels (values 1, 2, "
               "3: looks black), NAME_confidence.png, NAME_recipe")


def _write(
    out: Path, example: Example, segmenter: Segmenter, result: Segmentation, source: LocalSource
) -> None:
    settings = FeatureSettings(image_channels([example.image]), None, DeepFeatures.for_bundle(source.spec))
    seen = segmenter.recipe.window.apply(example.image)
    features = np.concatenate([band for _, band in PixelFeatures(settings, source).bands(seen)], axis=1)
    classes = segmenter.recipe.classes
    strokes = overlay(example.image, example.labels.astype(np.uint8), classes, opacity=1)
    pictures = [strokes, overlay(example.image, result.labels, classes), pca_picture(features)]
    write_labels(out / f"{example.name}.png", result.labels)
    write_labels(out / f"{example.name}_confidence.png", result.confidence)
    write_rgb(out / f"{example.name}_overlay.png", side_by_side([to_channels(p, 3) for p in pictures]))
