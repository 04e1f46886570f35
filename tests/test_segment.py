"""Recipes and segmenters from Python: what decides labels, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import skimage.data

from phaseline.clients import images as image_files
from phaseline.clients.__main__ import run
from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.crf import CRFParameters, refine
from phaseline.clients.fit import fit
from phaseline.clients.images import read_image, write_labels
from phaseline.clients.recipe import Recipe, load_recipe
from phaseline.clients.segmenter import Segmenter, margin
from phaseline.runtime.errors import ImageError, LabelError, OutputError, RecipeError, UsageError
from tests.fakes import FakeSource

U8 = npt.NDArray[np.uint8]
QUICK = ClassicalFeatures(sigmas=(0, 1, 2))


@pytest.fixture(scope="module")
def picture() -> U8:
    return np.ascontiguousarray(skimage.data.cell()[290:420, 340:480])


@pytest.fixture(scope="module")
def strokes(picture: U8) -> U8:
    labels = np.zeros(picture.shape, np.uint8)
    labels[70:90, 70:100] = 9
    labels[2:8, 5:120] = 4
    return labels


@pytest.fixture(scope="module")
def recipe(picture: U8, strokes: U8) -> Recipe:
    return fit([picture], [strokes], classical=QUICK)


def reseal(folder: Path, **changes: Any) -> None:
    """Change a recipe's settings as somebody would who also repairs its hash."""
    manifest = folder / "recipe.json"
    content = json.loads(manifest.read_text()) | changes
    del content["hash"]
    content["hash"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(content))


def test_confidence_is_the_margin_between_the_two_likeliest() -> None:
    p = np.array([[0.5, 0.5, 0], [0.7, 0.1, 0.2], [0, 1, 0], [1 / 3] * 3, [0.4, 0.35, 0.25]], np.float32)
    assert margin(p).tolist() == [0, round(255 * 0.5), 255, 0, round(255 * 0.05)]


def test_labels_confidence_and_probabilities_agree(recipe: Recipe, picture: U8) -> None:
    result = Segmenter(recipe).segment(picture, probabilities=True)
    assert result.probabilities is not None
    assert result.labels.dtype == np.uint8
    assert np.array_equal(np.array([4, 9])[result.probabilities.argmax(axis=0)], result.labels)
    assert np.array_equal(margin(result.probabilities.reshape(2, -1).T).reshape(picture.shape), result.confidence)


def test_large_label_values_come_out_as_they_went_in(picture: U8, strokes: U8) -> None:
    labels = strokes.astype(np.uint16) * 100
    result = Segmenter(fit([picture], [labels], classical=QUICK)).segment(picture)
    assert result.labels.dtype == np.uint16
    assert set(np.unique(result.labels)) == {400, 900}


def test_one_window_over_all_images_it_is_fitted_on(picture: U8, strokes: U8) -> None:
    dark = picture.astype(np.uint16) * 10
    bright = dark + 20_000
    window = fit([dark, bright], [strokes, strokes], classical=QUICK).window
    assert window.low < 3000
    assert window.high > 20_000
    assert window == fit([bright, dark], [strokes, strokes], classical=QUICK).window


def test_sixteen_bits_through_the_command_line(tmp_path: Path, picture: U8, strokes: U8) -> None:
    (tmp_path / "in").mkdir()
    write_labels(tmp_path / "in" / "a.tif", picture.astype(np.uint16) * 200 + 1000)
    write_labels(tmp_path / "l.tif", strokes)
    common = ["--bundle", "none", "--quiet", "--threads", "1", "--seed", "3", "--sigma-factor", "0.4"]
    assert run(["fit", str(tmp_path / "in" / "a.tif"), "--labels", str(tmp_path / "l.tif"), "--out", str(tmp_path / "r"),
                *common]) == 0
    assert run(["segment", str(tmp_path / "in"), "--recipe", str(tmp_path / "r"), "--out", str(tmp_path / "o"),
                "--probabilities", "--quiet"]) == 0
    labels, probabilities = read_image(tmp_path / "o" / "a.png"), np.load(tmp_path / "o" / "a_probabilities.npy")
    assert probabilities.shape == (2, *picture.shape)
    assert np.array_equal(np.array([4, 9])[probabilities.argmax(axis=0)], labels)
    assert (labels[70:90, 70:100] == 9).mean() > 0.95
    write_labels(tmp_path / "eight.png", picture)
    assert run(["segment", str(tmp_path / "eight.png"), "--recipe", str(tmp_path / "r"), "--out", str(tmp_path / "e.png"),
                "--quiet"]) == 1
    assert not (tmp_path / "e.png").exists()
    assert not list(tmp_path.glob("*.jsonl"))


def test_threads_decide_nothing(tmp_path: Path, picture: U8, strokes: U8) -> None:
    one, two = (fit([picture], [strokes], threads=threads) for threads in (1, 2))
    for name, fitted in (("one", one), ("two", two)):
        fitted.save(tmp_path / name)
    assert (tmp_path / "one" / "classifier.ubj").read_bytes() == (tmp_path / "two" / "classifier.ubj").read_bytes()
    assert np.array_equal(Segmenter(one, threads=1).segment(picture).labels, Segmenter(two, threads=2).segment(picture).labels)


def test_grey_saved_as_rgb_is_grey_and_colour_is_refused(recipe: Recipe, picture: U8, strokes: U8) -> None:
    as_rgb = np.repeat(picture[..., None], 3, axis=2)
    plain = Segmenter(recipe).segment(picture).labels
    assert np.array_equal(Segmenter(recipe).segment(as_rgb).labels, plain)
    assert fit([as_rgb], [strokes], classical=QUICK).features.image_channels == 1
    coloured = as_rgb.copy()
    coloured[0, 0, 0] ^= 1
    with pytest.raises(ImageError, match="fitted on grey images"):
        Segmenter(recipe).segment(coloured)
    of_colour = fit([coloured], [strokes], classical=QUICK)
    assert of_colour.features.image_channels == 3
    assert np.array_equal(Segmenter(of_colour).segment(picture).labels, Segmenter(of_colour).segment(as_rgb).labels)


@pytest.mark.parametrize(("image", "labels", "error"), [
    (np.zeros((4, 4), bool), None, ImageError),
    (np.zeros((4, 4), complex), None, ImageError),
    (np.full((4, 4), np.inf), None, ImageError),
    (None, np.ones((130, 140)), LabelError),
    (None, np.ones((3, 3), int), LabelError),
])
def test_arrays_that_cannot_be_trained_on(
    picture: U8, strokes: U8, image: npt.NDArray[Any] | None, labels: npt.NDArray[Any] | None, error: type[Exception]
) -> None:
    given = picture if image is None else image
    brushed = labels if labels is not None else strokes[:4, :4] if image is not None else strokes
    with pytest.raises(error):
        fit([given], [brushed], classical=QUICK)


def test_sources_and_recipes_must_belong_together(recipe: Recipe, picture: U8, strokes: U8) -> None:
    source = FakeSource()
    deep = fit([picture], [strokes], classical=QUICK, source=source)
    assert Segmenter(deep, source).segment(picture).labels.shape == picture.shape
    with pytest.raises(RecipeError, match="classical features only"):
        Segmenter(recipe, source)
    with pytest.raises(RecipeError, match="open it and give its source"):
        Segmenter(deep)
    with pytest.raises(RecipeError, match="was fitted with bundle"):
        Segmenter(deep, FakeSource(weights="random:1"))
    with pytest.raises(UsageError, match="without a source"):
        fit([picture], [strokes], deep=deep.features.deep)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"features_version": 99}, "version 99 of the features"),
    ({"versions": {"xgboost": "99.0.0"}}, "xgboost 99.0.0"),
    ({"format": 2}, "format 2, expected 1"),
    ({"window": {"low": 0}}, "cannot be understood"),
    ({"classifier": {"kind": "xgboost", "n_features": 7}}, "takes"),
])
def test_recipes_of_other_versions_are_refused(
    tmp_path: Path, recipe: Recipe, changes: dict[str, Any], expected: str
) -> None:
    recipe.save(tmp_path / "r")
    reseal(tmp_path / "r")
    load_recipe(tmp_path / "r")
    reseal(tmp_path / "r", **changes)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(tmp_path / "r")


@pytest.mark.skipif(importlib.util.find_spec("skops") is None, reason="needs the extra 'sklearn'")
def test_scikit_learns_minor_version_must_be_the_same(tmp_path: Path, picture: U8, strokes: U8) -> None:
    fit([picture], [strokes], classical=QUICK, classifier="linear").save(tmp_path / "r")
    load_recipe(tmp_path / "r")
    reseal(tmp_path / "r", versions={"scikit-learn": "0.1.0"})
    with pytest.raises(RecipeError, match=r"scikit-learn 0\.1\.0"):
        load_recipe(tmp_path / "r")


@pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="needs the extra 'crf'")
def test_crf_refines_the_classifiers_labels(tmp_path: Path, recipe: Recipe, picture: U8) -> None:
    noisy = np.clip(picture + np.random.default_rng(0).normal(0, 25, picture.shape), 0, 255).astype(np.uint8)
    plain, refined = Segmenter(recipe).segment(noisy), Segmenter(recipe).segment(noisy, crf=CRFParameters())
    index = np.searchsorted([4, 9], plain.labels).astype(np.int16)
    assert np.array_equal(refined.labels, np.array([4, 9])[refine(index, noisy, CRFParameters(), n_classes=2)])
    assert not np.array_equal(refined.labels, plain.labels)
    assert np.array_equal(refined.confidence, plain.confidence)
    recipe.save(tmp_path / "r")
    write_labels(tmp_path / "a.png", noisy)
    assert run(["segment", str(tmp_path / "a.png"), "--recipe", str(tmp_path / "r"), "--out", str(tmp_path / "o.png"), "--crf",
                "--quiet"]) == 0
    assert np.array_equal(read_image(tmp_path / "o.png"), refined.labels)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: Any, suffix: str, array: npt.NDArray[Any]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "o.png"
    write_labels(out, np.full((4, 4), 7, np.uint8))
    monkeypatch.setattr(image_files, "_encode", half)
    with pytest.raises(OutputError, match="No space left"):
        write_labels(out, np.zeros((4, 4), np.uint8))
    assert (read_image(out) == 7).all()
    assert list(tmp_path.iterdir()) == [out]


class TestRuns:
    """Folders, reports and what resuming may touch."""

    @pytest.fixture
    def command(self, tmp_path: Path, recipe: Recipe, picture: U8) -> list[str]:
        recipe.save(tmp_path / "r")
        (tmp_path / "in").mkdir()
        for name in ("a", "b"):
            write_labels(tmp_path / "in" / f"{name}.png", picture)
        return ["segment", str(tmp_path / "in"), "--recipe", str(tmp_path / "r"), "--out", str(tmp_path / "o"), "--quiet"]

    def test_resume_with_other_options_is_refused(self, command: list[str]) -> None:
        assert run(command) == 0
        for option in ("--confidence", "--probabilities"):
            assert run([*command, option, "--resume"]) == 2
        assert run([*command, "--resume"]) == 0

    def test_resume_does_a_damaged_output_again(self, command: list[str], tmp_path: Path) -> None:
        assert run(command) == 0
        whole = (tmp_path / "o" / "a.png").read_bytes()
        (tmp_path / "o" / "a.png").write_bytes(b"")
        with (tmp_path / "o" / "report.jsonl").open("a") as report:
            report.write('{}\n{"image": "a.p')
        assert run([*command, "--resume"]) == 0
        assert (tmp_path / "o" / "a.png").read_bytes() == whole

    def test_resume_never_touches_foreign_files(self, command: list[str], tmp_path: Path) -> None:
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "a.png").write_text("precious")
        assert run([*command, "--resume"]) == 2
        assert (tmp_path / "o" / "a.png").read_text() == "precious"

    def test_overwriting_leaves_nothing_of_the_earlier_run(self, command: list[str], tmp_path: Path) -> None:
        assert run([*command, "--confidence"]) == 0
        (tmp_path / "in" / "b.png").write_bytes(b"broken")
        assert run([*command, "--overwrite"]) == 1
        assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["a.png", "report.jsonl"]

    def test_two_images_for_one_output_are_refused(
        self, command: list[str], tmp_path: Path, picture: U8, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_labels(tmp_path / "in" / "a_confidence.png", picture)
        assert run([*command, "--confidence"]) == 2
        assert "two images would be written to one file" in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
