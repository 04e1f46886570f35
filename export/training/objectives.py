"""What the compact backbone is trained for.

    episodes   from a few labelled pixels of one generated image, label the pixels of another image of the same material: the head
               is ridge regression, solved in closed form, so that all learning goes into the features
    invariance two recordings of one micrograph give the same token features, whose variance stays up and whose channels stay
               uncorrelated (VICReg, arXiv 2105.04906, on tokens)
"""

from __future__ import annotations

import torch
from torch.nn import functional

RIDGE = 0.3
"""Regularisation in units of the support features' mean square."""
_LARGEST_SCORE = 15.0


def sample_pixels(maps: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, patch_px: int, stride_px: int) -> torch.Tensor:
    """Features of pixels, bilinear between the tokens' centres.

    Parameters
    ----------
    maps
        float tensor of shape (n, k, h, w).
    rows, cols
        Integer tensors of shape (n, points): pixels.

    Returns
    -------
    float tensor of shape (n, points, k).
    """
    height, width = maps.shape[2:]
    y = (rows + 0.5 - patch_px / 2) / stride_px
    x = (cols + 0.5 - patch_px / 2) / stride_px
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    found = functional.grid_sample(maps, grid[:, None].to(maps.dtype), align_corners=True, padding_mode="border")
    return found[:, :, 0].transpose(1, 2)


def episode_loss(support: torch.Tensor, support_labels: torch.Tensor, query: torch.Tensor, query_labels: torch.Tensor,
                 classes: int, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of queries under the ridge regression of the support.

    Parameters
    ----------
    support, query
        float tensors of shape (episodes, pixels, k).
    support_labels, query_labels
        int64 tensors of shape (episodes, pixels), 0…classes − 1. A query of a class without support is left out.
    classes
        The most that an episode has.
    temperature
        Scalar that multiplies the scores.

    Returns
    -------
    Loss; share of right queries.
    """
    present = functional.one_hot(support_labels, classes).sum(dim=1) > 0
    known = present.gather(1, query_labels)
    mean = support.mean(dim=1, keepdim=True)
    a, b = support - mean, query - mean
    # Balanced classes: a stroke through a rare phase counts as much as one through the matrix.
    counts = functional.one_hot(support_labels, classes).sum(dim=1).clamp(min=1)
    weight = (1 / counts.gather(1, support_labels)).sqrt()[..., None]
    weight = weight / weight.mean(dim=1, keepdim=True)
    targets = functional.one_hot(support_labels, classes).float()
    targets = targets - targets.mean(dim=1, keepdim=True)
    scale = a.square().sum(dim=2).mean(dim=1).clamp(min=1e-6)[:, None, None]
    solution = _ridge(a * weight, targets * weight, RIDGE * scale)
    # A wrong answer that is certain must not outweigh a batch.
    scores = _LARGEST_SCORE * torch.tanh((b @ solution) * temperature / _LARGEST_SCORE)
    scores = scores.masked_fill(~present[:, None], -1e4)
    loss = functional.cross_entropy(scores[known], query_labels[known])
    right = (scores[known].argmax(dim=1) == query_labels[known]).float().mean()
    return loss, right


def _ridge(points: torch.Tensor, targets: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Solution (episodes, k, classes) of ridge regression, by whichever of the two normal equations is smaller."""
    count, channels = points.shape[1:]
    if count < channels:
        gram = points @ points.transpose(1, 2) + penalty * torch.eye(count, device=points.device)
        solution: torch.Tensor = points.transpose(1, 2) @ torch.linalg.solve(gram, targets)
    else:
        gram = points.transpose(1, 2) @ points + penalty * torch.eye(channels, device=points.device)
        solution = torch.linalg.solve(gram, points.transpose(1, 2) @ targets)
    return solution


def invariance_loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """VICReg of matched tokens.

    Parameters
    ----------
    first, second
        float tensors of shape (tokens, channels): token i shows the same place in both.
    """
    alike = functional.mse_loss(first, second)
    total = 25 * alike
    for view in (first, second):
        centred = view - view.mean(dim=0)
        spread = (centred.var(dim=0) + 1e-4).sqrt()
        covariance = centred.T @ centred / (len(centred) - 1)
        off_diagonal = covariance - torch.diag(torch.diagonal(covariance))
        total = total + 12.5 * functional.relu(1 - spread).mean() + 0.5 * off_diagonal.square().sum() / view.shape[1]
    return total
