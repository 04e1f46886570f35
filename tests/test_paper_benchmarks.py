"""The benchmarks of the papers' tables, run once, tiny: that they work and measure the product; figures are not looked at."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
pytest.importorskip("tqdm", reason="needs tqdm: pip install '.[bench]'")

from benchmarks import (
    channels,
    classifiers,
    labelled_images,
    landscape,
    ni,
    tcell,
    uninformative,
    upsampling,
)
from benchmarks.evaluation import Case, Evaluation, beside, deep_part, masked_cases, sets_of
from benchmarks.pixel_table import CLASSICAL
from benchmarks.scores import sample_pixels, score
from phaseline.clients.features import DeepFeatures
from phaseline.clients.fit import fit
from phaseline.clients.images import write_labels
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.source import LocalSource

SIDE = 72
SCORE = Path(__file__).parents[2] / "shared" / "tools" / "score.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three micrographs of three classes, masks, and two draws of scribbles on two of them each."""
    root = tmp_path_factory.mktemp("micrographs")
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "scribbles/draw0", "scribbles/draw1"):
        (root / name).mkdir(parents=True)
    for i in range(3):
        mask = np.ones((SIDE, SIDE), np.uint8)
        mask[:, SIDE // 2 + i:] = 3
        mask[20:26, 10:16] = mask[50:54, 40 + i:46] = 2
        image = np.clip(60 * mask + rng.normal(0, 12, mask.shape), 0, 255).astype(np.uint8)
        write_labels(root / "images" / f"grain{i}.png", image)
        write_labels(root / "masks" / f"grain{i}.png", mask)
        for draw in ("draw0", "draw1"):
            if i != int(draw[-1]):
                strokes = np.where(rng.random(mask.shape) < 0.2, mask, 0).astype(np.uint8)
                write_labels(root / "scribbles" / draw / f"grain{i}.png", strokes)
    return root


@pytest.fixture(scope="module")
def evaluation(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return Evaluation(masked_cases(folder, sample=400), tmp_path_factory.mktemp("cache"), threads=1)


def command(folder: Path, bundle: Bundle, cache: Path, out: Path) -> list[str]:
    return ["--data", str(folder), "--bundle", str(bundle.path), "--cache", str(cache), "--sample", "400", "--threads", "1",
            "--draws", "draw0", "--out", str(out)]


def check_page(out: Path, lines: int) -> str:
    """The page has a table of so many lines and shows its picture."""
    text = out.read_text(encoding="utf-8")
    assert sum(line.startswith("| ") for line in text.splitlines()) == lines + 1
    shown = re.search(r"!\[\w+\]\((\w+\.png)\)", text)
    assert shown is not None
    assert (out.parent / shown[1]).stat().st_size > 5000
    return text


# Scores.


def test_score_of_known_labels() -> None:
    truth = np.array([[1, 1, 1, 2], [3, 3, 2, 0]], np.uint8)
    predicted = np.array([[1, 1, 2, 2], [3, 1, 2, 3]], np.uint8)
    scores = score([(predicted, truth, None), (np.ones((1, 2), np.uint8), np.array([[1, 2]], np.uint8), None)])
    # Class 1: two of three found, one false. Class 2: both found, one false. Class 3: one of two found, one false at a 0.
    assert scores.ious == ({1: 2 / 4, 2: 2 / 3, 3: 1 / 3}, {1: 1 / 2, 2: 0.0})
    assert scores.miou == pytest.approx(((2 / 4 + 2 / 3 + 1 / 3) / 3 + (1 / 2 + 0) / 2) / 2)
    assert scores.accuracies == (5 / 7, 1 / 2)
    assert scores.class_iou(2) == pytest.approx((2 / 3 + 0) / 2)
    assert np.isnan(scores.class_iou(4))
    assert scores.classes == (1, 2, 3)


def test_sample_holds_rare_classes_and_weights_what_it_stands_for() -> None:
    truth = np.ones((100, 100), np.uint8)
    truth[0, :30] = 2
    pixels, weights = sample_pixels(truth, 1000, [0])
    assert (np.diff(pixels) > 0).all()
    found = truth.reshape(-1)[pixels]
    assert np.bincount(found).tolist() == [0, 997, 30]
    assert [weights[found == value].sum() for value in (1, 2)] == pytest.approx([9970, 30])
    again, _ = sample_pixels(truth, 1000, [0])
    other, _ = sample_pixels(truth, 1000, [1])
    np.testing.assert_array_equal(pixels, again)
    assert not np.array_equal(pixels, other)


def test_sampled_score_estimates_the_full_one() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([1, 2, 3], np.uint8), (300, 300), p=[0.5, 0.02, 0.48])
    predicted = np.where(rng.random(truth.shape) < 0.3, rng.integers(1, 4, truth.shape, np.uint8), truth)
    full = score([(predicted, truth, None)])
    pixels, weights = sample_pixels(truth, 20_000, [0])
    sampled = score([(predicted.reshape(-1)[pixels], truth.reshape(-1)[pixels], weights)])
    assert sampled.miou == pytest.approx(full.miou, abs=0.01)
    everything, weights = sample_pixels(truth, truth.size, [0])
    assert (weights == 1).all()
    assert score([(predicted.reshape(-1)[everything], truth.reshape(-1)[everything], weights)]) == full


def test_score_is_that_of_the_script(tmp_path: Path) -> None:
    if not SCORE.is_file():
        pytest.skip(f"needs the score script {SCORE}, which is not part of the repository")
    rng = np.random.default_rng(0)
    images = []
    for i in range(4):
        truth = rng.integers(i % 2, 4 - i // 2, (40, 50), np.uint8)
        predicted = np.where(rng.random(truth.shape) < 0.4, rng.integers(1, 4, truth.shape, np.uint8), truth)
        for name, labels in (("masks", truth), ("labels", predicted)):
            (tmp_path / name).mkdir(exist_ok=True)
            write_labels(tmp_path / name / f"{i}.png", labels)
        images.append((predicted, truth, None))
    printed = subprocess.run([sys.executable, str(SCORE), str(tmp_path / "labels"), str(tmp_path / "masks")], check=True,
                             capture_output=True, text=True).stdout.splitlines()
    assert printed[-1].startswith(f"mIoU {score(images).miou:.4f} ")
    assert printed[:4] == [f"{i} {score([image]).miou:.4f}" for i, image in enumerate(images)]


# The evaluation.


@pytest.mark.parametrize("name", ["classical", "deep", "classical + deep"])
def test_evaluation_gives_the_products_labels(name: str, folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    cases = masked_cases(folder, sample=SIDE * SIDE)
    evaluation = Evaluation(cases, tmp_path, threads=1)
    deep = deep_part(str(tiny_bundle.path))
    task = evaluation.task("draw0")
    sampled = evaluation.run(task, evaluation.features(sets_of(deep)[name], task))

    trained = [cases[i] for i in task.trained]
    with LocalSource(tiny_bundle, "cpu", 1) as opened:
        source = None if name == "classical" else opened
        recipe = fit([case.image for case in trained], [case.labels["draw0"] for case in trained], source=source,
                     classical=None if name == "deep" else CLASSICAL.settings(1).classical,
                     deep=None if source is None else DeepFeatures.for_bundle(opened.spec), threads=1)
        segmenter = Segmenter(recipe, source, 1)
        product = score([(segmenter.segment(case.image).labels, case.truth, None) for case in cases])
    assert sampled.classes == product.classes == (1, 2, 3)
    assert sampled.miou == pytest.approx(product.miou, abs=1e-6)
    assert 0.3 < product.miou <= 1


def test_features_are_computed_once(folder: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = deep_part(str(tiny_bundle.path))

    def columns() -> Sequence[np.ndarray]:
        evaluation = Evaluation(masked_cases(folder, sample=400), tmp_path, threads=1)
        return evaluation.columns(deep, evaluation.task("draw1"))

    first = columns()
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    # A run that was stopped goes on: only what is missing is computed.
    kept[1].unlink()
    written = {file: file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())}
    second = columns()
    assert sorted(tmp_path.iterdir()) == kept
    assert all(file.stat().st_mtime_ns == when for file, when in written.items())
    monkeypatch.setattr("benchmarks.pixel_table.PixelFeatures", None)
    for a, b, c in zip(first, second, columns(), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_other_pixels_or_images_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    def case(image: np.ndarray, chosen: Sequence[int]) -> Case:
        labels = np.zeros(image.shape, np.uint16)
        labels[0, :2] = [1, 2]
        return Case("same", image, {"draw0": labels}, labels, np.array(chosen), np.ones(len(chosen)))

    image = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    for given in (case(image, [0, 5]), case(image, [0, 7]), case(255 - image, [0, 5])):
        evaluation = Evaluation([given], tmp_path, threads=1)
        evaluation.columns(CLASSICAL, evaluation.task("draw0"))
    assert len(list(tmp_path.iterdir())) == 3


# The tables.


def test_labelled_images(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    labelled_images.main([*command(folder, tiny_bundle, tmp_path / "cache", tmp_path / "out.md"), "--subsets", "1"])
    text = check_page(tmp_path / "out.md", lines=2)
    assert "| labelled images | classical | deep | classical + deep | gain by deep |" in text


def test_channels(evaluation: Evaluation, folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    deep = deep_part(str(tiny_bundle.path))
    found = channels.run(evaluation, deep, channels=[8, 16])
    assert list(found) == [8]
    task = evaluation.task("draw0")
    assert found[8][0] == evaluation.run(task, evaluation.features([CLASSICAL, deep], task))
    channels.main(command(folder, tiny_bundle, tmp_path / "cache", tmp_path / "out.md"))
    check_page(tmp_path / "out.md", lines=5)


def test_classifiers(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install '.[sklearn]'")
    classifiers.main(command(folder, tiny_bundle, tmp_path / "cache", tmp_path / "out.md"))
    text = check_page(tmp_path / "out.md", lines=10)
    assert "| mlp | classical + deep |" in text


def test_uninformative(evaluation: Evaluation, folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    deep = deep_part(str(tiny_bundle.path))
    task = evaluation.task("draw0")
    real = evaluation.columns(deep, task)
    added = uninformative.additions(evaluation, deep, task)
    for name, columns in added.items():
        assert [c.shape for c in columns] == [(len(f), 0 if name == uninformative.NONE else 8) for f in real]
    for shuffled, features in zip(added[uninformative.SHUFFLED], real, strict=True):
        assert not np.array_equal(shuffled, features)
        np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(features, axis=0))
    again = uninformative.additions(evaluation, deep, task)
    np.testing.assert_array_equal(beside(*added.values())[0], beside(*again.values())[0])
    uninformative.main(command(folder, tiny_bundle, tmp_path / "cache", tmp_path / "out.md"))
    check_page(tmp_path / "out.md", lines=5)


def test_upsampling(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = command(folder, tiny_bundle, tmp_path / "cache", tmp_path / "out.md")
    upsampling.main([*options, "--bundle-strided", str(tiny_bundle.path)])
    text = check_page(tmp_path / "out.md", lines=1 + 2 * (4 + tiny_bundle.spec.has_upsampler))
    assert "| strided (stride 7) | deep |" in text


def test_tcell(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    (cells / "images").symlink_to(folder / "images")
    (cells / "scribbles").symlink_to(folder / "scribbles" / "draw0")
    tcell.main([*command(cells, tiny_bundle, tmp_path / "cache", tmp_path / "out.md")])
    text = check_page(tmp_path / "out.md", lines=6)
    assert "| measure | features | grain1 | grain2 | mean |" in text


def test_landscape(tiny_bundle: Bundle, tmp_path: Path) -> None:
    landscape.main(["--bundle", str(tiny_bundle.path), "--sizes", "64", "96", "--repeats", "1", "--threads", "1", "--out",
                    str(tmp_path / "out.md")])
    text = check_page(tmp_path / "out.md", lines=2 * (2 + tiny_bundle.spec.has_upsampler))
    assert "| 64 | classical |" in text


def test_ni(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    if not SCORE.is_file():
        pytest.skip(f"needs the score script {SCORE}, which is not part of the repository")
    ni.main(["--data", str(folder), "--score", str(SCORE), "--draws", "draw0", "--bundle", f"tiny={tiny_bundle.path}",
             "--variants", "deep only", "--out", str(tmp_path / "out.md")])
    lines = (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == [
        "features", "classical only", "classical + tiny", "tiny, deep only"]
    assert "IoU class 2" in next(line for line in lines if line.startswith("| features"))


def test_ni_refuses_bundles_without_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ni.main(["--data", "x", "--score", "y", "--bundle", "folder"])
    assert "expected NAME=PATH" in capsys.readouterr().err
