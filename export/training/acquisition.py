"""How an instrument would have recorded a scene: contrast, sharpness, noise, uneven illumination, 8 bits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from phaseline.runtime.contract import F32


@dataclass(frozen=True)
class Acquisition:
    """Settings of an instrument.

    Attributes
    ----------
    gamma, contrast, brightness
        level → (level^gamma − 0.5) · contrast + 0.5 + brightness.
    inverted
        Bright is dark.
    blur_px
        Deviation of the Gaussian that the optics blur with.
    sharpen
        Share of a blurred copy that is taken off.
    noise, noise_px
        Deviation, and correlation length.
    shading
        Amplitude of uneven illumination.
    """

    gamma: float
    contrast: float
    brightness: float
    inverted: bool
    blur_px: float
    sharpen: float
    noise: float
    noise_px: float
    shading: float


def draw_acquisition(random: np.random.Generator) -> Acquisition:
    """Settings of some instrument."""
    return Acquisition(
        gamma=float(np.exp(random.uniform(-0.5, 0.5))), contrast=float(np.exp(random.uniform(-0.7, 0.4))),
        brightness=float(random.uniform(-0.15, 0.15)), inverted=bool(random.random() < 0.3),
        blur_px=float(random.choice([0.0, random.uniform(0.3, 1.5)])),
        sharpen=float(random.choice([0.0, random.uniform(0, 0.8)])),
        noise=float(random.choice([random.uniform(0, 0.02), random.uniform(0.01, 0.1), np.exp(random.uniform(-3, -1))],
                                  p=[0.45, 0.45, 0.1])),
        noise_px=float(random.choice([0.0, random.uniform(0.3, 1.0)])),
        shading=float(random.choice([0.0, random.uniform(0, 0.2)])))


def vary(settings: Acquisition, random: np.random.Generator) -> Acquisition:
    """The same instrument on another day."""
    return dataclasses.replace(
        settings, gamma=settings.gamma * float(np.exp(random.normal(0, 0.15))),
        contrast=settings.contrast * float(np.exp(random.normal(0, 0.3))),
        brightness=settings.brightness + float(random.normal(0, 0.12)),
        blur_px=settings.blur_px * float(random.uniform(0.6, 1.4)), noise=settings.noise * float(random.uniform(0.6, 1.6)),
        shading=settings.shading * float(random.uniform(0, 1.5)))


def without_noise(settings: Acquisition) -> Acquisition:
    """The same contrast, with sharp optics, even light and no noise."""
    return dataclasses.replace(settings, blur_px=0.0, sharpen=0.0, noise=0.0, shading=0.0)


def record(scene: F32, settings: Acquisition, random: np.random.Generator) -> F32:
    """Record a scene.

    Parameters
    ----------
    scene
        float32 array of shape (rows, cols), about 0–1.

    Returns
    -------
    float32 array of the same shape, multiples of 1/255 within 0–1.
    """
    image: npt.NDArray[Any] = np.clip(scene, 0, 1) ** settings.gamma
    image = (image - 0.5) * settings.contrast + 0.5 + settings.brightness
    if settings.inverted:
        image = 1 - image
    if settings.blur_px > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), settings.blur_px)
    if settings.sharpen:
        image = image + settings.sharpen * (image - cv2.GaussianBlur(image, (0, 0), 2))
    if settings.shading:
        rows, cols = (np.linspace(-1, 1, length, dtype=np.float32) for length in image.shape)
        slope = random.uniform(-1, 1, 3).astype(np.float32)
        image = image + settings.shading * (slope[0] * rows[:, None] + slope[1] * cols + slope[2] * np.outer(rows, cols))
    noise: npt.NDArray[Any] = random.standard_normal(image.shape, dtype=np.float32)
    if settings.noise_px > 0.3:
        noise = cv2.GaussianBlur(noise, (0, 0), settings.noise_px)
        noise = noise * (1 / max(float(noise.std()), 1e-6))
    image = image + settings.noise * noise
    recorded: F32 = (np.round(np.clip(image, 0, 1) * 255) / 255).astype(np.float32)
    return recorded
