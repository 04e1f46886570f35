"""Targets of FeatUp's implicit kind: a small network fitted to many jittered views of one image (arXiv 2403.10516 §3.2,
arXiv 2508.21529 §3.1).

    position (sines), grey, blurred grey ─▶ network ─▶ features of every pixel ─▶ cut and turn as the view
                                                          ─▶ learned blur, one patch wide, at the tokens ─▶ the view's tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from phaseline.export.training.views import View, draw_views, turn_map
from phaseline.runtime.contract import F32

VIEWS = 32
ITERATIONS = 300
_FREQUENCIES = 8
_HIDDEN = 96
_BATCH = 4


@dataclass(frozen=True)
class ImplicitTarget:
    """What an upsampler is to give for one crop.

    Attributes
    ----------
    crop
        float32 array of shape (side, side), 0–1.
    features
        float32 array of shape (k, side, side).
    """

    crop: F32
    features: F32


def fit_targets(scenes: Sequence[F32], crop_px: int, features: Callable[[torch.Tensor], torch.Tensor], *, patch_px: int,
                stride_px: int, device: torch.device, seed: int, done: Callable[[int], None] = lambda count: None,
                ) -> list[ImplicitTarget]:
    """Fit one network to each scene.

    Parameters
    ----------
    scenes
        float32 arrays of shape (side, side), 0–1, larger than the crops by a margin.
    crop_px
        Side of the crops.
    features
        From crops (n, 1, crop, crop) to token features (n, k, h, w).
    patch_px, stride_px
        P, s of these features.
    device
        Where to compute.
    seed
        Decides views and initial weights.
    done
        Called with the number of scenes done.
    """
    targets = []
    for index, scene in enumerate(scenes):
        random = np.random.default_rng([seed, 4, index])
        views = draw_views(VIEWS, scene.shape[0] - crop_px, random)
        torch.manual_seed(seed + index)
        fitted = _fit(torch.from_numpy(scene).to(device), views, crop_px, features, patch_px, stride_px, random)
        half = (scene.shape[0] - crop_px) // 2
        middle = np.s_[half : half + crop_px, half : half + crop_px]
        targets.append(ImplicitTarget(np.ascontiguousarray(scene[middle]), np.ascontiguousarray(fitted[:, *middle])))
        done(index + 1)
    return targets


def _fit(scene: torch.Tensor, views: Sequence[View], crop_px: int, features: Callable[[torch.Tensor], torch.Tensor],
         patch_px: int, stride_px: int, random: np.random.Generator) -> F32:
    crops = torch.stack([_cut(scene[None], view, crop_px) for view in views])
    with torch.no_grad():
        wanted = features(crops)
    scale = wanted.std().clamp(min=1e-6)
    wanted = wanted / scale
    inputs = _inputs(scene)
    network = nn.Sequential(nn.Conv2d(inputs.shape[1], _HIDDEN, 1), nn.ReLU(), nn.Conv2d(_HIDDEN, _HIDDEN, 1), nn.ReLU(),
                            nn.Conv2d(_HIDDEN, wanted.shape[1], 1)).to(scene.device)
    # One kernel for all channels: where within a patch a token looks.
    logits = nn.Parameter(torch.zeros(patch_px, patch_px, device=scene.device))
    optimiser = torch.optim.Adam([*network.parameters(), logits], lr=3e-3)
    for _ in range(ITERATIONS):
        maps = network(inputs)[0]
        chosen = random.integers(0, len(views), _BATCH)
        seen = torch.stack([_cut(maps, views[i], crop_px) for i in chosen])
        kernel = torch.softmax(logits.flatten(), 0).view(1, 1, patch_px, patch_px)
        tokens = nn.functional.conv2d(seen.flatten(0, 1)[:, None], kernel, stride=stride_px)[:, 0]
        tokens = tokens.reshape(*seen.shape[:2], *tokens.shape[1:])
        loss = nn.functional.smooth_l1_loss(tokens, wanted[torch.from_numpy(chosen)])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        fitted: F32 = (network(inputs)[0] * scale).cpu().numpy()
    return fitted


def _cut(maps: torch.Tensor, view: View, crop_px: int) -> torch.Tensor:
    return turn_map(maps[..., view.row : view.row + crop_px, view.col : view.col + crop_px], view.turn)


def _inputs(scene: torch.Tensor) -> torch.Tensor:
    """Position as sines of several wavelengths, and grey sharp and blurred: float tensor of shape (1, inputs, side, side)."""
    side = scene.shape[0]
    axis = torch.linspace(-1, 1, side, device=scene.device)
    waves = [wave(axis * torch.pi * 2.0**power) for power in range(_FREQUENCIES) for wave in (torch.sin, torch.cos)]
    rows = [wave[:, None].expand(side, side) for wave in waves]
    cols = [wave[None].expand(side, side) for wave in waves]
    grey = 2 * scene - 1
    blurred = nn.functional.avg_pool2d(nn.functional.pad(grey[None, None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)[0, 0]
    return torch.stack([*rows, *cols, grey, blurred])[None]
