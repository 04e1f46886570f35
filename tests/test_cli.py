"""The command line as a user meets it: what it writes, its exit codes, and one line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import skimage.data
from PIL import Image

from phaseline.clients.__main__ import run
from phaseline.clients.fit import fit
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import DEFAULT_BUNDLE, MANIFEST, Bundle, open_bundle
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.source import LocalSource
from tests.serving import without_upsampler

U8 = npt.NDArray[np.uint8]


def save(path: Path, array: npt.NDArray[np.generic]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="module")
def picture() -> U8:
    """A real micrograph, small enough to be quick."""
    return np.ascontiguousarray(skimage.data.cell()[250:500, 300:520])


@pytest.fixture(scope="module")
def strokes(picture: U8) -> U8:
    """Brush labels with the user's own values, 2 and 7."""
    labels = np.zeros(picture.shape, np.uint8)
    labels[100:130, 110:140] = 7
    labels[10:20, 10:200] = 2
    return labels


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, picture: U8, strokes: U8) -> Path:
    """Images, labels, and recipes without and with deep features."""
    folder = tmp_path_factory.mktemp("workplace")
    save(folder / "images" / "a.png", picture)
    save(folder / "images" / "b.png", picture[::-1])
    save(folder / "labels" / "a.png", strokes)
    arguments = ["fit", str(folder / "images"), "--labels", str(folder / "labels"), "--quiet", "--device", "cpu"]
    assert run([*arguments, "--out", str(folder / "classical"), "--bundle", "none"]) == 0
    assert run([*arguments, "--out", str(folder / "deep"), "--class-names", "paper,cell"]) == 0
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error's only line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("phaseline: ")
    return lines[0]


def read(path: Path) -> npt.NDArray[np.generic]:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("recipe", ["classical", "deep"])
def test_same_labels_from_file_folder_and_python(workplace: Path, tmp_path: Path, picture: U8, recipe: str) -> None:
    common = ["--recipe", str(workplace / recipe), "--quiet", "--confidence", "--device", "cpu"]
    assert run(["segment", str(workplace / "images" / "a.png"), "--out", str(tmp_path / "one.png"), *common]) == 0
    assert run(["segment", str(workplace / "images"), "--out", str(tmp_path / "all"), *common]) == 0
    with Segmenter.open(workplace / recipe, device="cpu") as segmenter:
        result = segmenter.segment(picture, probabilities=True)
    for labels, confidence in ((tmp_path / "one.png", tmp_path / "one_confidence.png"),
                               (tmp_path / "all" / "a.png", tmp_path / "all" / "a_confidence.png")):
        assert np.array_equal(read(labels), result.labels)
        assert np.array_equal(read(confidence), result.confidence)
    assert set(np.unique(result.labels)) == {2, 7}
    assert result.probabilities is not None
    assert np.allclose(result.probabilities.sum(axis=0), 1, atol=1e-5)
    assert np.array_equal(np.array([2, 7])[result.probabilities.argmax(axis=0)], result.labels)
    # It finds the cell, and not only where it was painted.
    assert (result.labels[80:160, 90:170] == 7).mean() > 0.75
    assert (result.labels[:60] == 2).mean() > 0.95


def test_the_engines_batch_decides_no_label(workplace: Path, picture: U8) -> None:
    with Segmenter.open(workplace / "deep", device="cpu") as segmenter:
        one = segmenter.segment(picture)
    with LocalSource(open_bundle("default"), "cpu", batch=8) as source:
        eight = Segmenter(segmenter.recipe, source).segment(picture)
    assert np.array_equal(one.labels, eight.labels)
    assert np.array_equal(one.confidence, eight.confidence)


def test_a_fitted_recipe_and_a_saved_one_give_the_same(tmp_path: Path, picture: U8, strokes: U8) -> None:
    recipe = fit([picture], [strokes])
    recipe.save(tmp_path / "recipe")
    with Segmenter.open(tmp_path / "recipe") as loaded:
        assert np.array_equal(loaded.segment(picture).labels, Segmenter(recipe).segment(picture).labels)


def test_a_crop_agrees_with_the_larger_image_away_from_its_borders(workplace: Path) -> None:
    """Bound: 99 % of the labels, 72 px (the widest filter) and more from the crop's border."""
    whole = skimage.data.cell()
    with Segmenter.open(workplace / "deep", device="cpu") as segmenter:
        size = segmenter.source.spec.tile_px if segmenter.source else 0
        inside, alone = segmenter.segment(whole).labels, segmenter.segment(whole[40 : 40 + size, 60 : 60 + size]).labels
    inside = inside[40 : 40 + size, 60 : 60 + size]
    assert (inside[72:-72, 72:-72] == alone[72:-72, 72:-72]).mean() > 0.99


def test_report_says_what_decided(workplace: Path, tmp_path: Path) -> None:
    assert run(["segment", str(workplace / "images"), "--out", str(tmp_path / "o"), "--recipe", str(workplace / "classical"),
                "--quiet"]) == 0
    header, *lines = [json.loads(line) for line in (tmp_path / "o" / "report.jsonl").read_text().splitlines()]
    assert header["recipe"] == json.loads((workplace / "classical" / "recipe.json").read_text())["hash"]
    assert [line["image"] for line in lines] == ["a.png", "b.png"]
    assert sum(lines[0]["fractions"].values()) == pytest.approx(1)


def test_resume_does_what_is_left(workplace: Path, tmp_path: Path) -> None:
    images, out = Path(shutil.copytree(workplace / "images", tmp_path / "in")), tmp_path / "out"
    command = ["segment", str(images), "--out", str(out), "--recipe", str(workplace / "classical"), "--quiet"]
    assert run(command) == 0
    (out / "b.png").unlink()
    with (out / "report.jsonl").open("a") as stream:
        stream.write('{"image": "b.png", "fing')
    kept = (out / "a.png").stat().st_mtime_ns
    assert run([*command, "--resume"]) == 0
    assert (out / "a.png").stat().st_mtime_ns == kept
    assert (out / "b.png").is_file()
    save(images / "a.png", read(images / "a.png")[::-1])
    before = read(out / "a.png")
    assert run([*command, "--resume"]) == 0
    assert not np.array_equal(read(out / "a.png"), before)


def test_resume_with_another_recipe_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", str(workplace / "images"), "--out", str(tmp_path / "o"), "--quiet"]
    assert run([*command, "--recipe", str(workplace / "classical")]) == 0
    assert run([*command, "--recipe", str(workplace / "deep"), "--resume"]) == 2
    assert "was begun with another" in one_line(capsys)


def test_a_killed_run_leaves_whole_files_and_goes_on(workplace: Path, tmp_path: Path, picture: U8) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    for i in range(30):
        save(images / f"{i}.png", np.roll(picture, i, axis=1))
    command = [sys.executable, "-m", "phaseline.clients", "segment", str(images), "--out", str(out), "--recipe",
               str(workplace / "classical"), "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(out.glob("[0-9]*.png"))) < 30
    subprocess.run([*command, "--resume"], cwd=tmp_path, check=True)
    with Segmenter.open(workplace / "classical") as segmenter:
        for i in range(30):
            assert np.array_equal(read(out / f"{i}.png"), segmenter.segment(np.roll(picture, i, axis=1)).labels)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(workplace: Path, tmp_path: Path, picture: U8, stop: signal.Signals) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    for i in range(30):
        save(images / f"{i}.png", picture)
    command = [sys.executable, "-m", "phaseline.clients", "segment", str(images), "--out", str(out), "--recipe",
               str(workplace / "classical"), "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert len(said.splitlines()) == 1
    assert "of 30 images done, each whole; go on with --resume" in said
    assert len(list(out.glob("*.png"))) < 30


def test_one_bad_image_does_not_stop_the_others(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(workplace / "images", tmp_path / "in"))
    (images / "aa.png").write_bytes((images / "a.png").read_bytes()[:2000])
    command = ["segment", str(images), "--out", str(tmp_path / "o"), "--recipe", str(workplace / "classical"), "--quiet"]
    assert run(command) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "aa.png" in first
    assert "1 of 3 images failed" in second
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == ["a.png", "b.png"]


@pytest.mark.parametrize("shape", [(1, 1), (13, 13), (7000, 50)])
@pytest.mark.parametrize("recipe", ["classical", "deep"])
def test_odd_sizes(workplace: Path, shape: tuple[int, int], recipe: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Segmenter.open(workplace / recipe, device="cpu") as segmenter:
        result = segmenter.segment(image)
    assert result.labels.shape == result.confidence.shape == shape
    assert set(np.unique(result.labels)) <= {2, 7}


def test_a_constant_image_gets_labels(workplace: Path) -> None:
    with Segmenter.open(workplace / "classical") as segmenter:
        assert len(np.unique(segmenter.segment(np.full((30, 40), 9, np.uint8)).labels)) == 1


def test_features_command(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    assert run(["features", str(workplace / "images" / "a.png"), "--out", str(out), "--quiet", "--device", "cpu"]) == 0
    features = np.load(out)
    assert features.dtype == np.float16
    assert features.shape == (open_bundle("default").spec.pixel_channels, 250, 220)
    colours = read(out.with_suffix(".png"))
    assert colours.shape == (250, 220, 3)
    assert colours.std(axis=(0, 1)).min() > 10


def test_info(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (([], "engine cpu"),
                            ([str(workplace / "deep")], "transforms none, learned interpolation, boundary"),
                            ([str(workplace / "classical")], "7 class 7")):
        assert run(["info", *words]) == 0
        assert expected in capsys.readouterr().out


def test_info_of_the_default_bundle_shows_card_provenance_and_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "default"]) == 0
    said, bundle = capsys.readouterr().out, open_bundle("default")
    assert bundle.hash in said and f"weights {bundle.spec.weights}" in said
    assert "source trained with the backbone" in said
    assert f"{bundle.spec.upsampler['name']}, weights {bundle.spec.upsampler['weights']}" in said
    assert f"{bundle.spec.upsampler['hidden']} hidden channels, {bundle.spec.pixel_channels} pixel channels" in said
    for name, file in bundle.spec.files.items():
        assert f"{name}, {file.size_bytes} bytes, sha256 {file.sha256}" in said
    card = (bundle.path / bundle.spec.card).read_text(encoding="utf-8")
    assert all(line in said for line in card.splitlines())


def test_untrained_weights_are_said(
    workplace: Path, tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["features", str(workplace / "images" / "a.png"), "--out", str(tmp_path / "a.npy"), "--bundle",
                str(tiny_bundle.path)]) == 0
    assert "weights are untrained (random:0)" in capsys.readouterr().err
    assert run(["info", str(tiny_bundle.path)]) == 0
    said, spec = capsys.readouterr().out, tiny_bundle.spec
    assert "weights are untrained (random:0)" in said
    assert f"{spec.upsampler['name']}, weights {spec.upsampler['weights']}" in said
    assert f"{spec.upsampler['hidden']} hidden channels, {spec.pixel_channels} pixel channels" in said


def test_interpolation_is_chosen(
    workplace: Path, tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_bundle.spec
    bare = without_upsampler(tiny_bundle, tmp_path / "bare")
    image, out = str(workplace / "images" / "a.png"), tmp_path / "f.npy"
    common = ["features", image, "--out", str(out), "--quiet", "--overwrite", "--device", "cpu", "--bundle"]
    shapes = {}
    for bundle, interpolation in ((tiny_bundle, "auto"), (tiny_bundle, "learned"), (tiny_bundle, "bilinear"), (bare, "auto"),
                                  (bare, "bilinear")):
        assert run([*common, str(bundle.path), "--interpolation", interpolation]) == 0
        shapes[bundle.hash, interpolation] = np.load(out).shape[0]
    assert list(shapes.values()) == [spec.pixel_channels, spec.pixel_channels, spec.channels, spec.channels, spec.channels]
    fit_ = ["fit", image, "--labels", str(workplace / "labels" / "a.png"), "--out", str(tmp_path / "r"), "--quiet", "--bundle"]
    for wrong, expected in (
        ([str(bare.path), "--interpolation", "learned"], "has no upsampler; export one with phaseline export --upsampler"),
        ([str(tiny_bundle.path), "--alignment", "paper"], "learned pixel features have no tokens to align"),
        ([str(tiny_bundle.path), "--interpolation", "cubic"], "expected one of learned, nearest, bilinear"),
        (["none", "--interpolation", "learned"], "--interpolation, --boundary and --overlap are for deep features"),
    ):
        capsys.readouterr()
        assert run([*fit_, *wrong]) == 2
        assert expected in one_line(capsys)
        assert not (tmp_path / "r").exists()
    assert run([*fit_, str(tiny_bundle.path), "--interpolation", "nearest", "--alignment", "paper"]) == 0
    assert run(["info", str(tmp_path / "r")]) == 0
    assert "nearest interpolation, alignment paper" in capsys.readouterr().out


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "d"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in ("cell", "immunohistochemistry"):
        assert name in said
        labels = read(tmp_path / "d" / f"{name}.png")
        assert set(np.unique(labels)) == {1, 2, 3}
        assert read(tmp_path / "d" / f"{name}_overlay.png").shape[1] > 3 * labels.shape[1]
    # The cell is a disc of about 64 px radius.
    assert 0.8 < (read(tmp_path / "d" / "cell.png") == 1).sum() / (np.pi * 64**2) < 1.25
    assert run(["demo", "--out", str(tmp_path / "d")]) == 2


def test_help_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in ("demo", "export", "fit", "segment", "features", "info"):
        assert command in listed
        assert run([command, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    ([], "Missing command"),
    (["nonsense"], "No such command 'nonsense'"),
    (["segment", "x.png"], "Missing option '--out'"),
    (["fit", "nowhere.png", "--labels", "l.png", "--out", "r"], "nowhere.png"),
    (["segment", "nowhere.png", "--recipe", "nowhere", "--out", "o.png"], "nowhere"),
    (["info", "nowhere"], "nothing at nowhere"),
    (["demo", "--device", "tpu"], "device is 'tpu', expected one of auto, cpu, cuda, tensorrt"),
    (["demo", "--threads", "0"], "--threads"),
])
def test_asked_for_wrongly(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    assert expected in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("empty.png", b"", "empty"),
    ("text.png", b"not an image at all", "text.png"),
    ("nan.npy", np.array([[0, np.nan], [1, 2]], np.float32), "NaN"),
    ("inf.npy", np.array([[0, np.inf], [1, 2]], np.float32), "infinite"),
    ("constant.npy", np.full((250, 220), 3.5, np.float32), "constant"),
    ("shape.png", np.zeros((20, 20), np.uint8), "shape"),
])
def test_images_that_cannot_be_used(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: object, expected: str
) -> None:
    image = tmp_path / name
    if isinstance(content, bytes):
        image.write_bytes(content)
    elif image.suffix == ".npy":
        np.save(image, np.asarray(content))
    else:
        save(image, np.asarray(content))
    command = ["fit", str(image), "--labels", str(workplace / "labels" / "a.png"), "--out", str(tmp_path / "r"), "--bundle",
               "none", "--quiet"]
    assert run(command) == 1
    line = one_line(capsys)
    assert expected.lower() in line.lower()
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("labels", "expected"), [
    (np.zeros((250, 220), np.uint8), "no pixel is labelled"),
    (np.full((250, 220), 3, np.uint8), "3"),
    (np.ones((10, 10), np.uint8), "shape"),
])
def test_labels_that_cannot_be_trained_on(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: U8, expected: str
) -> None:
    path = save(tmp_path / "l.png", labels)
    command = ["fit", str(workplace / "images" / "a.png"), "--labels", str(path), "--out", str(tmp_path / "r"), "--bundle",
               "none", "--quiet"]
    assert run(command) == 1
    assert expected in one_line(capsys)
    assert not (tmp_path / "r").exists()


def test_existing_outputs_are_refused_and_replaced_when_told(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = save(tmp_path / "o.png", np.zeros((2, 2), np.uint8))
    command = ["segment", str(workplace / "images" / "a.png"), "--out", str(out), "--recipe", str(workplace / "classical"),
               "--quiet"]
    assert run(command) == 2
    assert "--overwrite" in one_line(capsys)
    assert read(out).shape == (2, 2)
    assert run([*command, "--overwrite"]) == 0
    assert read(out).shape == (250, 220)
    refit = ["fit", str(workplace / "images"), "--labels", str(workplace / "labels"), "--out", str(tmp_path), "--bundle", "none",
             "--quiet", "--overwrite"]
    assert run(refit) == 2
    assert "holds no recipe.json" in one_line(capsys)
    assert out.exists()


def test_outputs_that_cannot_be_written(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    image = str(workplace / "images" / "a.png")
    assert run(["segment", image, "--out", str(tmp_path / "file" / "o.png"), "--recipe", str(workplace / "classical"),
                "--quiet"]) == 1
    assert "file" in one_line(capsys)
    assert run(["fit", image, "--labels", str(workplace / "labels" / "a.png"), "--out", str(tmp_path / "file" / "r"),
                "--bundle", "none", "--quiet"]) == 1
    assert "file" in one_line(capsys)


def test_input_is_never_overwritten(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = Path(shutil.copytree(workplace / "images", tmp_path / "in"))
    command = ["segment", str(images), "--out", str(images), "--recipe", str(workplace / "classical"), "--overwrite", "--quiet"]
    assert run(command) == 2
    assert "is the images' own" in one_line(capsys)
    image = images / "a.png"
    for command in (["segment", str(image), "--out", str(image), "--recipe", str(workplace / "classical")],
                    ["features", str(image), "--out", str(image.with_suffix(".npy"))]):
        assert run([*command, "--overwrite", "--quiet"]) == 2
        assert "would replace the input" in one_line(capsys)
    assert np.array_equal(read(image), read(workplace / "images" / "a.png"))


def test_recipe_of_another_bundle(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(DEFAULT_BUNDLE, tmp_path / "other"))
    text = (other / MANIFEST).read_text()
    content = json.loads(text)
    spec = BundleSpec.from_json(text)
    changed = type(spec)(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, "weights": "random:1"})
    (other / MANIFEST).write_text(changed.to_json())
    assert changed.digest() != content["hash"]
    base = ["segment", str(workplace / "images" / "a.png"), "--out", str(tmp_path / "o.png"), "--quiet", "--device", "cpu"]
    assert run([*base, "--recipe", str(workplace / "deep"), "--bundle", str(other)]) == 1
    assert "fitted with bundle" in one_line(capsys)
    assert run([*base, "--recipe", str(workplace / "classical"), "--bundle", str(other)]) == 1
    assert "classical features only" in one_line(capsys)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("spoil", ["byte", "edit", "format", "missing", "garbage"])
def test_damaged_recipes(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str) -> None:
    recipe = Path(shutil.copytree(workplace / "classical", tmp_path / "r"))
    manifest = recipe / "recipe.json"
    classifier = recipe / "classifier.ubj"
    match spoil:
        case "byte":
            content = bytearray(classifier.read_bytes())
            content[len(content) // 2] ^= 1
            classifier.write_bytes(content)
        case "edit":
            manifest.write_text(manifest.read_text().replace('"low": 0', '"low": 1'))
        case "format":
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
        case "missing":
            classifier.unlink()
        case "garbage":
            manifest.write_bytes(os.urandom(100))
    command = ["segment", str(workplace / "images" / "a.png"), "--out", str(tmp_path / "o.png"), "--recipe", str(recipe),
               "--quiet"]
    assert run(command) == 1
    one_line(capsys)
    assert not (tmp_path / "o.png").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "phaseline.clients", "info", "nowhere", "--debug"], capture_output=True,
                           text=True, cwd=tmp_path, check=False)
    assert "Traceback" in found.stderr
