from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from phaseline.clients.crf import CRFParameters, refine, unary_energy
from phaseline.runtime.errors import ImageError, LabelError, UsageError

F64 = npt.NDArray[np.float64]


def two_halves() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]:
    """A 24 × 24 image with an edge at column 11 and noise, and labels whose border is 2 px off, with wrong specks."""
    rng = np.random.default_rng(0)
    truth = np.broadcast_to(np.arange(24) >= 11, (24, 24))
    image = (60 + 100 * truth + rng.normal(0, 4, truth.shape)).astype(np.uint8)
    labels = np.broadcast_to(np.arange(24) >= 13, (24, 24)).astype(np.int16)
    labels[rng.random(labels.shape) < 0.05] ^= 1
    return image, labels


def mean_field(unary: F64, image: npt.NDArray[np.uint8], p: CRFParameters) -> F64:
    """Krähenbühl and Koltun's algorithm 1 with the full n × n kernels, normalised symmetrically."""
    rows, cols = image.shape
    at = np.stack(np.mgrid[:rows, :cols], -1).reshape(-1, 2).astype(float)
    apart = ((at[:, None] - at) ** 2).sum(-1)
    colours = np.repeat(image.reshape(-1, 1), 3, 1).astype(float)
    differ = ((colours[:, None] - colours) ** 2).sum(-1)
    messages = np.zeros((len(at), len(at)))
    for weight, kernel in ((p.gaussian_weight, np.exp(-apart / 2 / p.gaussian_px**2)),
                           (p.bilateral_weight, np.exp(-apart / 2 / p.bilateral_px**2 - differ / 2 / p.bilateral_grey**2))):
        norm = 1 / np.sqrt(kernel.sum(1))
        messages += weight * norm[:, None] * kernel * norm
    q = np.exp(-unary)
    q /= q.sum(0)
    for _ in range(p.iterations):
        energy = -unary + q @ messages
        q = np.exp(energy - energy.max(0))
        q /= q.sum(0)
    return q


def test_unary_of_labels() -> None:
    energy = unary_energy(np.array([[0, 2, -1]]), 0.6)
    np.testing.assert_allclose(np.exp(-energy).T, [[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [1 / 3] * 3], rtol=1e-6)
    assert energy.dtype == np.float32
    assert energy.flags.c_contiguous
    assert unary_energy(np.array([[0, 1]]), 0.6, n_classes=5).shape == (5, 2)


def test_unary_of_probabilities() -> None:
    p = np.array([[[0.25, 0.75], [0.0, 1.0]]], np.float32)
    energy = unary_energy(p, 0.6)
    np.testing.assert_allclose(np.exp(-energy), [[0.25, 1e-5], [0.75, 1.0]], rtol=1e-4)


@pytest.mark.parametrize("change", [{"label_confidence": 1.0}, {"label_confidence": 0}, {"gaussian_px": 0}, {"iterations": 0},
                                    {"bilateral_grey": float("nan")}, {"gaussian_weight": -1}, {"iterations": 2.5}])
def test_parameters_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        dataclasses.replace(CRFParameters(), **change)


def test_evidence_and_image_are_checked() -> None:
    image, labels = two_halves()
    p = np.dstack([labels, 1 - labels]).astype(np.float32)
    for evidence in (labels[0], p[..., :1], p * 2, p - 0.1, labels - 2, labels > 0, labels[:0]):
        with pytest.raises(LabelError, match="the CRF got"):
            refine(evidence, image)
    with pytest.raises(LabelError, match="expected -1 to 1"):
        refine(labels + 1, image, n_classes=2)
    for wrong in (image.astype(float), image[:-1], np.dstack([image] * 2)):
        with pytest.raises(ImageError, match="the CRF got an image"):
            refine(labels, wrong)


def test_agrees_with_brute_force() -> None:
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, labels = two_halves()
    weak = CRFParameters(gaussian_weight=0, bilateral_weight=1)
    for p in (CRFParameters(), CRFParameters(bilateral_weight=0), CRFParameters(gaussian_weight=2, bilateral_weight=4), weak,
              dataclasses.replace(weak, bilateral_weight=3, bilateral_grey=200), dataclasses.replace(weak, iterations=1)):
        exact = mean_field(unary_energy(labels, 0.6).astype(float), image, p)
        sure = np.abs(exact[0] - exact[1]) > 0.1
        assert sure.mean() > 0.5
        refined = refine(labels, image, p).ravel()
        assert (refined == exact.argmax(0))[sure].mean() > 0.99


def test_snaps_to_the_edge() -> None:
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, labels = two_halves()
    truth = np.broadcast_to(np.arange(24) >= 11, (24, 24))
    refined = refine(labels, image)
    assert refined.dtype == np.int16
    assert (labels != truth).mean() > 0.1
    np.testing.assert_array_equal(refined, truth)
    rgb = np.dstack([image] * 3)
    np.testing.assert_array_equal(refine(labels, rgb), refined)


def test_without_pairs_the_likeliest_class_wins() -> None:
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    p = np.random.default_rng(0).dirichlet(np.ones(4), (10, 13)).astype(np.float32)
    alone = CRFParameters(gaussian_weight=0, bilateral_weight=0)
    image = np.zeros((10, 13), np.uint8)
    np.testing.assert_array_equal(refine(p, image, alone), p.argmax(2))


def test_unlabelled_pixels_are_filled() -> None:
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, _ = two_halves()
    sparse = np.full((24, 24), -1)
    sparse[5:20, 3:6], sparse[5:20, 17:20] = 0, 1
    np.testing.assert_array_equal(refine(sparse, image), np.broadcast_to(np.arange(24) >= 11, (24, 24)))
