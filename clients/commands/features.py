"""`phaseline features`: deep features of an image as an array, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from phaseline.clients import options
from phaseline.clients.features import DeepFeatures, FeatureSettings, PixelFeatures, image_channels
from phaseline.clients.images import check_output, read_image, write_array, write_rgb
from phaseline.clients.pictures import pca_picture
from phaseline.clients.window import IntensityWindow
from phaseline.runtime.average import PixelSampling
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.engine import check_device
from phaseline.runtime.errors import UsageError
from phaseline.runtime.source import LocalSource


def features_command(
    image: Annotated[Path, typer.Argument(metavar="INPUT", help="An image.")],
    out: Annotated[Path, typer.Option("--out", help="An .npy file; the picture is put beside it as .png.")],
    bundle: Annotated[str | None, typer.Option("--bundle", help="'default' (if not given), or a bundle's folder.")] = None,
    transforms: options.Transforms = "none",
    alignment: options.Alignment = "centred",
    interpolation: options.Interpolation = "auto",
    boundary: options.Boundary = "reflect",
    window: Annotated[str, typer.Option(help="Intensities that become 0 and 255, as in `phaseline fit`.")] = "auto",
    server: options.Server = None,
    transport: options.TransportChoice = "auto",
    timeout: options.Timeout = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write an image's deep pixel features, float16 of shape (channels, rows, cols), and their 3-component PCA picture."""
    del debug
    screen = options.Screen(quiet)
    picture = out.with_suffix(".png")
    if out.suffix != ".npy":
        raise UsageError(f"features go into an .npy file, but {out} was asked for; name it {out.with_suffix('.npy')}")
    if image.resolve() in (out.resolve(), picture.resolve()):
        raise UsageError(f"the output would replace the input {image}; choose another output")
    for path in (out, picture):
        check_output(path, overwrite)
    known_device = check_device(device)
    tls = options.client_tls(tls_ca, tls_cert, tls_key)
    remote = options.remote_source(server, transport, timeout, tls, bundle_given=bundle is not None, device=device)
    if image.is_dir():
        raise UsageError(f"{image} is a folder, expected one image; give one of its files")
    pixels = read_image(image)
    seen = IntensityWindow.fit([pixels], window).apply(pixels)
    with remote or LocalSource(open_bundle(bundle or "default"), known_device, threads) as source:
        screen.warn_untrained(source.spec)
        screen.say(f"engine: {source.engine_choice}")
        sampling = PixelSampling.for_bundle(source.spec, alignment, interpolation, boundary)
        settings = FeatureSettings(image_channels([pixels]), None, DeepFeatures.for_bundle(source.spec, transforms, sampling))
        road = PixelFeatures(settings, source)
        features = np.empty((len(road.names), *pixels.shape[:2]), np.float16)
        for rows, band in road.bands(seen):
            features[:, rows] = band
    write_array(out, features)
    write_rgb(picture, pca_picture(features))
    screen.say(f"{out}: float16 {features.shape}; {picture}: their first three principal components")
