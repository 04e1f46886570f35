"""Figures of arXiv 2508.21529 that ours stand beside, read from the printed output of the notebooks that make its figures.

Source: github.com/tldr-group/vulture, folder paper_figures; the rounding in the paper's own text was not checked. Their backbone
is DINOv2 ViT-S/14, their upsampler has 128 channels, their labels on the 23 Ni micrographs are their own, on four images. So
levels don't compare; differences between rows do. Nothing is quoted for S3: the notebook prints three figures, but its calls
don't pass on which channels are added.
"""

from __future__ import annotations

SOURCE = "as printed in the authors' notebooks (github.com/tldr-group/vulture, paper_figures); other labels and weights than here"

CLASSICAL, CLASSICAL_AND_DEEP = 0.5587, 0.7275
"""mIoU on Ni, four labelled images, XGBoost: is_benchmark.ipynb."""

BY_LABELLED_IMAGES = {4: (0.5291, 0.7063), 5: (0.5742, 0.6952), 6: (0.5820, 0.7042)}
"""Labelled images → mIoU on Ni, classical and classical + deep: miou_vs_n_labels.ipynb. It starts at four."""

BY_CHANNELS = {1: 0.5905, 16: 0.7216, 32: 0.7273, 64: 0.7350, 128: 0.7424}
"""Deep channels → mIoU on Ni, classical + deep: supp_how_many_features.ipynb."""

BY_CLASSIFIER = {
    "linear": (0.4071, 0.6259),
    "logistic_regression": (0.3842, 0.5864),
    "random_forest": (0.5322, 0.6925),
    "xgboost": (0.5403, 0.6803),
    "mlp": (0.5238, 0.6341),
}
"""Classifier → mIoU on Ni, classical and classical + deep: supp_classsifier_choice.ipynb."""

LANDSCAPE = ((224, 0.0868, 131), (336, 0.1066, 290), (448, 0.1807, 514), (560, 0.2708, 802), (672, 0.4163, 1155),
             (784, 0.5765, 1569))
"""Side in px, seconds, MiB of GPU memory of backbone and upsampler: perf_landscape.ipynb."""
