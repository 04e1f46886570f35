"""The certificate of a job: its numbers against naive ones, its page, and what it must bear."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.features import DeepFeatures
from phaseline.clients.fit import fit
from phaseline.clients.jobs import certificate, pictures, seams
from phaseline.clients.jobs.certificate import FailedSlices, JobFacts, Slices, format_json, make_certificate
from phaseline.clients.jobs.page import percent, tag
from phaseline.clients.jobs.seams import SeamDisagreement, SeamSample, seam_disagreement
from phaseline.clients.jobs.statistics import (
    BlockStatistics,
    block_statistics,
    evenly_spaced,
    fill_boundaries,
    lowest,
    merge_blocks,
    outliers,
)
from phaseline.clients.labels import ClassTable
from phaseline.clients.remote_segmenter import RemoteSegmenter
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.volumes.volume import AXES, Axis, Box, VolumeInfo, VoxelSize
from phaseline.runtime.errors import OutputError, UsageError
from phaseline.runtime.tiles import TileAxis
from tests.fakes import FakeSource

U8 = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.unsignedinteger[Any]]
CLASSES = ClassTable((1, 2, 7), ("pore", "matrix", "inclusion & <b>"), ("#e69f00", "#56b4e9", "#009e73"))
UNMEASURED = SeamDisagreement("not asked for")


def volume(shape: tuple[int, int, int], seed: int = 0, dtype: type = np.uint8) -> tuple[npt.NDArray[np.uint16], Labels, U8]:
    """A seeded image with labels and confidence that have nothing to do with it."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 65_536, shape).astype(np.uint16)
    labels = random.choice([1, 1, 1, 2, 2, 7], shape).astype(dtype)
    return image, labels, random.integers(0, 256, shape).astype(np.uint8)


def cut(shape: tuple[int, int, int], along: int, at: list[int]) -> list[Box]:
    """Blocks of a volume, cut along an axis."""
    edges = [0, *sorted({a for a in at if 0 < a < shape[along]}), shape[along]]
    boxes = []
    for a, b in itertools.pairwise(edges):
        start, stop = [0, 0, 0], list(shape)
        start[along], stop[along] = a, b
        boxes.append(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    return boxes


def count(labels: Labels, confidence: U8 | None, axis: Axis = "plane", at: tuple[int, ...] = ()) -> list[BlockStatistics]:
    """Statistics of all blocks of a volume, as they come back from a ledger."""
    boxes = cut(cast(tuple[int, int, int], labels.shape), AXES.index(axis), list(at))
    blocks = [block_statistics(labels[b.slices], None if confidence is None else confidence[b.slices], b, axis) for b in boxes]
    return [BlockStatistics.from_dict(json.loads(json.dumps(block.to_dict()))) for block in blocks]


def job(shape: tuple[int, int, int], **changes: Any) -> JobFacts:
    """Facts of a job over all of a volume."""
    info = VolumeInfo("/data/tomo_<script>alert(1)</script>.h5:/entry/data", "hdf5", shape, np.dtype("uint16"), (1, 64, 64),
                      VoxelSize((2.0, 0.5, 0.5), "micrometer"), "f" * 32)
    facts = JobFacts(
        input=info, start=(0, 0, 0), step=(1, 1, 1), shape=shape, axes="plane", classes=CLASSES, window=(0.0, 65_535.0),
        recipe="/recipes/a & b", recipe_hash="0123" * 16, bundle_hash="89ab" * 16, bundle_trained=True, engine="fake",
        workers="1 process", outputs=("/out/labels.ome.zarr",), command="phaseline segment '<in>' --out \"out\"",
        started="2025-03-01T21:04:11+01:00", finished="2025-03-02T05:41:37+01:00",
        seconds={"wall": 100.0, "read": 1.25, "compute": 90.0, "write": 3.5}, versions={"phaseline": "0.1.0", "numpy": "2.0"},
    )
    return dataclasses.replace(facts, **changes)


def readers(image: npt.NDArray[Any], labels: Labels, confidence: U8 | None, axis: Axis = "plane") -> Slices:
    along = AXES.index(axis)
    kept = None if confidence is None else (lambda i: confidence.take(i, along))
    return Slices(lambda i: image.take(i, along), lambda i: labels.take(i, along), kept)


class Checker(html.parser.HTMLParser):
    """Finds elements that are not closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check_page(path: Path) -> Checker:
    """A page that holds all it needs, and nothing that runs."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert not checker.seen & {"script", "link", "iframe", "object", "base", "b"}
    prose = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", prose)
    assert all(value.startswith("data:image/") for name, value in checker.attributes if name in {"src", "href"})
    assert not any(name.startswith("on") for name, _ in checker.attributes)
    assert not re.search(r"\b(nan|inf)\b", checker.text)
    for uri in re.findall(r'"data:image/svg\+xml;base64,([^"]+)"', text):
        svg = base64.b64decode(uri).decode()
        assert "<script" not in svg
        assert not re.findall(r'(?:xlink:)?href="(?!#)', svg)
    for uri in re.findall(r'"data:image/jpeg;base64,([^"]+)"', text):
        with Image.open(io.BytesIO(base64.b64decode(uri))) as picture:
            assert max(picture.size) <= pictures.MAX_PX
    return checker


def make(folder: Path, facts: JobFacts, blocks: list[BlockStatistics], slices: Slices, seen: SeamDisagreement = UNMEASURED
         ) -> tuple[dict[str, Any], Checker]:
    """A certificate whose files are as they should be."""
    content = make_certificate(folder, facts, blocks, seen, slices)
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html"}
    text = (folder / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert list(json.loads(text)) == list(content)
    assert max(map(len, text.splitlines())) < 200_000
    return content, check_page(folder / "report.html")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 150), st.integers(1, 150)), axis=st.sampled_from(AXES),
    at=st.lists(st.integers(0, 150), max_size=4), seed=st.integers(0, 99), dtype=st.sampled_from([np.uint8, np.uint16]),
    unlabelled=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_blocks_together_are_one_block_and_numbers_are_the_naive_ones(
    shape: tuple[int, int, int], axis: Axis, at: list[int], seed: int, dtype: type, unlabelled: float
) -> None:
    _, labels, confidence = volume(shape, seed, dtype)
    random = np.random.default_rng(seed)
    labels[random.random(shape) < unlabelled] = 0
    along = AXES.index(axis)
    blocks = count(labels, confidence, axis, tuple(at))
    random.shuffle(cast(Any, blocks))
    merged = fill_boundaries(merge_blocks(blocks), lambda i: labels.take(i, along))
    (whole,) = count(labels, confidence, axis)
    assert merged == whole
    assert [one.index for one in whole.slices] == list(range(shape[along]))
    for one in whole.slices:
        here, sure = labels.take(one.index, along), confidence.take(one.index, along)
        assert one.voxels == {int(v): int((here == v).sum()) for v in np.unique(here)}
        assert one.confidence_sum == int(sure[here > 0].sum())
        assert one.mean_confidence == (pytest.approx(sure[here > 0].mean() / 255) if (here > 0).any() else None)
        if one.index == 0:
            assert one.changed is None and one.flicker is None
        else:
            before = labels.take(one.index - 1, along)
            both = (here > 0) & (before > 0)
            assert (one.changed, one.compared) == (int((here != before)[both].sum()), int(both.sum()))
        if one.weakest is None:
            assert unlabelled > 0
        else:
            window = one.weakest
            part = (slice(window.row, window.row + window.rows), slice(window.col, window.col + window.cols))
            assert here[part].shape == (window.rows, window.cols)
            assert window.mean == pytest.approx(sure[part][here[part] > 0].mean())
            assert all(min(64, n) <= side <= 127 for side, n in zip((window.rows, window.cols), here.shape, strict=True))
    assert whole.histogram is not None
    assert list(whole.histogram) == np.histogram(confidence[labels > 0], 64, (0, 256))[0].tolist()


def test_the_weakest_window_is_the_one_that_was_made_weak() -> None:
    labels, confidence = np.ones((1, 200, 330), np.uint8), np.full((1, 200, 330), 200, np.uint8)
    confidence[0, 66:133, 132:198] = 40
    (block,) = count(labels, confidence)
    window = block.slices[0].weakest
    assert window is not None
    assert (window.row, window.col, window.rows, window.cols, window.mean) == (66, 132, 67, 66, 40.0)


def test_parts_of_slices_add_up() -> None:
    _, labels, confidence = volume((4, 90, 140), 3)
    labels[1, :30] = 0
    boxes = [Box((z, y, x), (z + 2, y + 45, x + 70)) for z in (0, 2) for y in (0, 45) for x in (0, 70)]
    merged = merge_blocks(block_statistics(labels[b.slices], confidence[b.slices], b) for b in boxes)
    merged = fill_boundaries(merged, labels.__getitem__)
    (whole,) = count(labels, confidence)
    for part, one in zip(merged.slices, whole.slices, strict=True):
        assert dataclasses.replace(part, weakest=None) == dataclasses.replace(one, weakest=None)
    assert merged.histogram == whole.histogram
    assert {(one.weakest.row, one.weakest.col) for one in merged.slices if one.weakest} <= {(0, 0), (0, 70), (45, 0), (45, 70)}


def test_without_confidence_there_is_none() -> None:
    _, labels, _ = volume((3, 10, 10))
    blocks = count(labels, None, at=(1,))
    assert all(block.histogram is None for block in blocks)
    assert all(one.weakest is None and one.mean_confidence is None for block in blocks for one in block.slices)


def test_arrays_of_another_shape_than_the_block_are_refused() -> None:
    with pytest.raises(UsageError, match=r"labels of shape \(1, 2, 2\)"):
        block_statistics(np.zeros((1, 2, 2), np.uint8), None, Box((0, 0, 0), (1, 2, 3)))


def test_choosing_slices() -> None:
    values = {i: float(v) for i, v in enumerate([5, 1, 1.5, 9, 0, 8, 7])}
    assert lowest(values, 3) == [4, 1, 2]
    assert lowest(values, 3, distance=3) == [4, 1]
    assert evenly_spaced(range(100), 4) == [12, 37, 62, 87]
    assert evenly_spaced([7], 4) == [7]
    assert evenly_spaced([], 4) == []
    calm = {i: 0.5 + 0.001 * (i % 3) for i in range(50)}
    assert outliers(calm, high=True) == outliers({}, high=False) == []
    assert outliers({**calm, 7: 0.9, 30: 0.1, 31: 0.7}, high=True) == [7, 31]
    assert outliers({**calm, 7: 0.9, 30: 0.1}, high=False) == [30]


def test_a_job_in_numbers(tmp_path: Path) -> None:
    image, labels, confidence = volume((12, 70, 80), 5)
    labels[3], confidence[3] = 0, 0
    labels[8, :, 40:] = 2
    failed = (FailedSlices("plane", 3, 4, "page 13 is truncated <i>", 2),)
    facts = job((12, 70, 80), start=(10, 100, 200), step=(2, 1, 3), failed=failed, peak_memory_bytes=1 << 30, resumed=2)
    content, checker = make(tmp_path, facts, count(labels, confidence, at=(4, 9)), readers(image, labels, confidence))
    seen = labels > 0
    for phase, value in zip(content["phases"], CLASSES.values, strict=True):
        assert phase["voxels"] == (labels == value).sum()
        assert phase["fraction"] == pytest.approx((labels == value).sum() / seen.sum(), rel=1e-5)
        assert phase["volume"] == pytest.approx((labels == value).sum() * 4.0 * 0.5 * 1.5, rel=1e-5)
        naive = [None if i == 3 else pytest.approx((labels[i] == value).mean(), rel=1e-5) for i in range(12)]
        assert content["slices"]["fractions"][str(value)] == naive
    assert content["slices"]["positions"] == list(range(10, 34, 2))
    assert content["slices"]["mean_confidence"] == [
        None if i == 3 else pytest.approx(confidence[i].mean() / 255, rel=1e-5) for i in range(12)]
    flicker = [None if i in (0, 3, 4) else pytest.approx((labels[i] != labels[i - 1]).mean(), rel=1e-5) for i in range(12)]
    assert content["slices"]["flicker"] == flicker
    assert content["confidence"]["mean"] == pytest.approx(confidence[seen].mean() / 255, rel=1e-5)
    means = {i: confidence[i].mean() for i in range(12) if i != 3}
    assert [one["slice"] for one in content["confidence"]["lowest"]] == sorted(means, key=lambda i: means[i])[:10]
    assert content["unlabelled_voxels"] == 70 * 80
    assert content["region"] == {"start": [10, 100, 200], "stop": [33, 170, 438], "step": [2, 1, 3]}
    assert content["failed"] == [{"axis": "plane", "first": 16, "last": 16, "error": "page 13 is truncated <i>", "attempts": 2}]
    assert content["performance"]["voxels_per_s"] == 12 * 70 * 80 / 100
    assert not content["complete"]
    assert content["verdict"][0].startswith("1 of 12 planes have no labels: 16.")
    for text in ("page 13 is truncated <i>", "/recipes/a & b", "inclusion & <b>", "<script>alert(1)</script>", "1.0 GiB", "µm³",
                 "phaseline segment '<in>' --out \"out\"", "resumed 2 times"):
        assert text in checker.text
    assert "Not measured: not asked for." in checker.text


@pytest.mark.parametrize("axis", AXES)
def test_suggestions_are_in_the_coordinates_of_the_input(tmp_path: Path, axis: Axis) -> None:
    shape = (130, 140, 150)
    image, labels = np.zeros(shape, np.uint16), np.ones(shape, np.uint8)
    confidence = np.full(shape, 180, np.uint8)
    spot = Box((66, 71, 75), (130, 140, 150))  # one of four windows of about 64 px, whatever the axis
    along = AXES.index(axis)
    inside = list(spot.slices)
    inside[along] = slice(90, 91)
    confidence[tuple(inside)] = 20
    facts = job(shape, axes=axis, start=(5, 6, 7), step=(1, 2, 3))
    content, checker = make(tmp_path, facts, count(labels, confidence, axis, (50,)), readers(image, labels, confidence, axis))
    first = content["suggestions"][0]
    assert (first["slice"], first["fractions"]) == (90, {"1": 1.0})
    position = facts.position(90, axis)
    assert first["position"] == first["start"][along] == first["stop"][along] - 1 == position
    for i in {0, 1, 2} - {along}:
        edge = shape[i] // 2
        assert first["start"][i] == facts.start[i] + edge * facts.step[i]
        assert first["stop"][i] == facts.start[i] + (shape[i] - 1) * facts.step[i] + 1
    assert 0.07 < first["mean_confidence"] < 0.3
    assert content["confidence"]["unusual"] == [position]
    assert f"unusually low in {'columns' if axis == 'col' else f'{axis}s'} {position}" in checker.text


def test_one_slice(tmp_path: Path) -> None:
    image, labels, confidence = volume((1, 60, 50))
    content, checker = make(tmp_path, job((1, 60, 50)), count(labels, confidence), readers(image, labels, confidence))
    assert content["flicker"] is None
    assert content["complete"]
    assert "The plane was segmented." in checker.text
    assert "Flicker" not in checker.text


def test_confidence_that_was_counted_but_not_kept_and_none_at_all(tmp_path: Path) -> None:
    image, labels, confidence = volume((5, 40, 50))
    for name, counted, panels in (("counted", confidence, 2), ("none", None, 2), ("kept", confidence, 3)):
        (tmp_path / name).mkdir()
        slices = readers(image, labels, confidence if name == "kept" else None)
        content, _ = make(tmp_path / name, job((5, 40, 50), input=dataclasses.replace(job((5, 40, 50)).input, voxel=None)),
                          count(labels, counted), slices)
        assert (content["confidence"] is None) == (content["suggestions"] == []) == (counted is None)
        text = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert text.count('class="panels"') * panels == text.count("data:image/jpeg")
        assert 'class="bar"' not in text


def test_a_job_of_which_nothing_is_left(tmp_path: Path) -> None:
    image, labels, confidence = volume((4, 20, 30))
    facts = job((4, 20, 30), failed=tuple(FailedSlices("plane", i, i + 2, f"engine failed {i}", 3) for i in (0, 2)))
    for name, blocks in (("missing", []), ("unlabelled", count(np.zeros_like(labels), np.zeros_like(confidence)))):
        (tmp_path / name).mkdir()
        content, checker = make(tmp_path / name, facts, blocks, readers(image, labels, None))
        assert content["verdict"][0].startswith("4 of 4 planes have no labels: 0–3.")
        assert [phase["fraction"] for phase in content["phases"]] == [None] * 3
        assert content["unlabelled_voxels"] == labels.size
        assert "engine failed 2" in checker.text


def test_planes_that_fail_in_a_job_along_rows_leave_the_rest_of_each_slice(tmp_path: Path) -> None:
    image, labels, confidence = volume((6, 20, 30))
    labels[2], confidence[2] = 0, 0
    facts = job((6, 20, 30), axes="row", failed=(FailedSlices("plane", 2, 3, "NaN", 1),))
    content, _ = make(tmp_path, facts, count(labels, confidence, "row", (8,)), readers(image, labels, confidence, "row"))
    assert not content["complete"]
    assert content["slices"]["labelled"] == [5 * 30] * 20
    assert content["verdict"][0].startswith("1 failure was recorded, it at plane 2: NaN.")


def test_thousands_of_slices_stay_small(tmp_path: Path) -> None:
    image, labels, confidence = volume((4000, 4, 5))
    labels[100:103], confidence[100:103] = 0, 0
    content, checker = make(tmp_path, job((4000, 4, 5)), count(labels, confidence, at=tuple(range(64, 4000, 64))),
                            readers(image, labels, confidence))
    assert content["verdict"][0].startswith("3 of 4000 planes have no labels: 100–102.")
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "4,000 × 4 × 5" in checker.text


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    image, labels, confidence = volume((7, 30, 40))
    blocks = count(labels, confidence, at=(2, 5))
    for name, order in (("a", blocks), ("b", blocks[::-1])):
        (tmp_path / name).mkdir()
        make(tmp_path / name, job((7, 30, 40)), order, readers(image, labels, confidence))
    for file in ("report.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_names_that_are_no_text_and_glyphs_that_no_font_has(tmp_path: Path) -> None:
    image, labels, confidence = volume((3, 20, 20))
    classes = ClassTable((1, 2, 7), ("$x_1$ 相", "pore\udc80", "\N{SNOWMAN}" * 90), CLASSES.colours)
    facts = job((3, 20, 20), classes=classes, command="phaseline segment b\udcff.h5")
    _, checker = make(tmp_path, facts, count(labels, confidence), readers(image, labels, confidence))
    assert "$x_1$ 相" in checker.text


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels, confidence = volume((3, 20, 20))
    arguments = (job((3, 20, 20)), count(labels, confidence), UNMEASURED, readers(image, labels, confidence))
    make_certificate(tmp_path, *arguments)
    earlier = (tmp_path / "report.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certificate.os, "fsync", full)
    with pytest.raises(OutputError, match=r"report\.json cannot be written \(No space left"):
        make_certificate(tmp_path, dataclasses.replace(arguments[0], command="other"), *arguments[1:])
    assert (tmp_path / "report.json").read_bytes() == earlier
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_json_is_readable_and_the_same_content() -> None:
    content = {"a": [1, 2.5, None], "b": {"c": [{"d": 1}, {"d": [2]}], "e": {}}, "f": "ü", "g": [], "h": True}
    text = format_json(content)
    assert json.loads(text) == content
    assert text.splitlines()[1] == ' "a": [1, 2.5, null],'
    with pytest.raises(ValueError, match="not JSON compliant"):
        format_json({"a": float("nan")})


def test_elements_escape_what_is_not_html() -> None:
    assert tag("p", "a < b", tag("i", "&"), class_='"') == '<p class="&quot;">a &lt; b<i>&amp;</i></p>'
    assert [percent(x) for x in (None, 0.0, 1e-7, 0.123456, 0.29, 1.0)] == ["–", "0 %", "< 0.001 %", "12.3 %", "29.0 %", "100 %"]


def test_pictures_of_slices() -> None:
    image = np.linspace(-3, 5, 1500 * 700).reshape(1500, 700)
    image[0, :5] = np.nan, np.inf, -np.inf, 1e300, -1e300
    labels = np.ones((1500, 700), np.uint16) * 400
    classes = ClassTable((400, 65_000), ("a", "b"), ("#ff0000", "#00ff00"))
    sure = np.zeros((1500, 700), np.uint8)
    uris = pictures.slice_panels(image, labels, sure, classes, aspect=0.5, frames=[(1400, 600, 100, 100)])
    assert len(uris) == 3
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert picture.size == (478, 512)
    with Image.open(io.BytesIO(base64.b64decode(uris[1].partition(",")[2]))) as picture:
        red, green, _ = np.asarray(picture).reshape(-1, 3).mean(axis=0)
    assert red > green + 50
    constant = pictures.slice_panels(np.full((3, 4), 7, np.int32), np.zeros((3, 4), np.uint8), None, classes)
    assert len(constant) == 2


class PlantedSeams:
    """Segments a slice tile by tile, and is wrong within 6 px of a tile's edge that lies inside the slice."""

    def __init__(self, tile_px: int, overlap_px: int, halo_px: int = 0) -> None:
        self.source = SimpleNamespace(spec=SimpleNamespace(tile_px=tile_px))
        classical = SimpleNamespace(halo_px=halo_px) if halo_px else None
        features = SimpleNamespace(deep=SimpleNamespace(overlap_px=overlap_px), classical=classical)
        self.recipe = SimpleNamespace(features=features)
        self.tile_px, self.overlap_px = tile_px, overlap_px
        self.crops: list[tuple[int, ...]] = []

    def wrong(self, length: int) -> npt.NDArray[np.bool_]:
        axis, wrong = TileAxis(length, self.tile_px, self.overlap_px), np.zeros(length, np.bool_)
        for left, right in itertools.pairwise(axis.starts):
            middle = (left + self.tile_px + right) // 2
            wrong[middle - 6 : middle + 6] = True
        return wrong

    def segment(self, image: npt.NDArray[Any]) -> Any:
        self.crops.append(image.shape)
        rows, cols = (self.wrong(length) for length in image.shape)
        return SimpleNamespace(labels=np.where(rows[:, None] | cols, 2, 1).astype(np.uint8))


@pytest.mark.parametrize("overlap_px", [0, 12, 30])
def test_planted_seams_are_found_and_controls_are_clean(overlap_px: int) -> None:
    segmenter = PlantedSeams(100, overlap_px)
    image = np.zeros((330, 290), np.uint16)
    labels = segmenter.segment(image).labels
    read: list[int] = []

    def read_image(index: int) -> npt.NDArray[Any]:
        read.append(index)
        return image

    found = seam_disagreement(cast(Segmenter, segmenter), read_image, lambda i: labels, [3, 8], seed=1, places=10)
    assert set(segmenter.crops[1:]) == {(100, 100)}
    assert found.reason == "" and len(found.samples) == 20
    assert set(read) == {3, 8}
    assert found.share("control") == 0.0
    for sample in found.samples:
        part = labels[sample.row : sample.row + sample.rows, sample.col : sample.col + sample.cols]
        assert sample.compared == part.size == sample.rows * sample.cols
        assert sample.differing == (part == 2).sum()
        if sample.kind == "seam":
            assert sample.differing >= 12 * min(sample.rows, sample.cols) * 0.99
    assert found == seam_disagreement(cast(Segmenter, segmenter), lambda i: image, lambda i: labels, [3, 8], seed=1, places=10)
    summary = json.loads(json.dumps(found.to_dict()))
    assert summary["seam"]["places"] == 10 and summary["seam"]["share"] == pytest.approx(found.share("seam"), rel=1e-5)
    assert [SeamSample(**one) for one in summary["samples"]] == list(found.samples)


def test_unlabelled_pixels_are_not_compared() -> None:
    nothing = np.zeros((200, 200), np.uint8)
    found = seam_disagreement(cast(Segmenter, PlantedSeams(100, 12)), lambda i: nothing, lambda i: nothing, [0])
    assert found.samples and found.share("seam") is None and found.share("control") is None


@settings(max_examples=150, deadline=None)
@given(
    tile_px=st.integers(8, 90), part=st.floats(0, 0.5), length=st.integers(1, 400), halo_px=st.integers(0, 60),
    seed=st.integers(0, 9),
)
def test_places_lie_where_they_should(tile_px: int, part: float, length: int, halo_px: int, seed: int) -> None:
    axis = TileAxis(length, tile_px, int(part * tile_px))
    weights, random = axis.weights(), np.random.default_rng(seed)
    seams_, controls = seams._seams(axis, random), seams._controls(axis, random)
    assert len(seams_) == len(axis.starts) - 1
    for span in (*seams_, *controls):
        assert 0 <= span.crop <= length - tile_px
        assert span.crop <= span.start < span.stop <= span.crop + tile_px
        assert abs((span.start + span.stop) / 2 - (span.crop + tile_px / 2)) <= 1
    for span, (left, right) in zip(seams_, itertools.pairwise(axis.starts), strict=True):
        assert span.start <= (left + tile_px + right) // 2 < span.stop
        assert span.crop not in axis.starts or right - left < 3
    for span in controls:
        alone = [first for first, weight in zip(axis.starts, weights, strict=True)
                 if first <= span.start and span.stop <= first + tile_px
                 and (weight[span.start - first : span.stop - first] == 1).all()]
        assert alone and span.crop not in alone
    for span in seams._along(axis, halo_px):
        assert span.crop in axis.starts and 0 <= span.crop <= span.start < span.stop <= min(span.crop + tile_px, length)


def test_recipes_and_slices_without_seams_say_so() -> None:
    image = np.random.default_rng(0).integers(0, 255, (80, 90)).astype(np.uint8)
    strokes = np.zeros((80, 90), np.uint8)
    strokes[10:20, 10:60], strokes[40:50, 10:60] = 1, 2
    quick = ClassicalFeatures(sigmas=(0, 1))
    classical = Segmenter(fit([image], [strokes], classical=quick))
    assert "classical features only" in seam_disagreement(classical, lambda i: image, lambda i: strokes, [0]).reason
    source = FakeSource()
    deep = Segmenter(fit([image], [strokes], classical=quick, deep=DeepFeatures(overlap_px=8), source=source), source)

    def read(index: int) -> Labels:
        return deep.segment(image).labels

    found = seam_disagreement(deep, lambda i: image, read, [0], places=3)
    assert found.reason == "" and found.tile_px == 64 and {sample.kind for sample in found.samples} >= {"seam"}
    assert "fits into one tile" in seam_disagreement(deep, lambda i: image[:60, :60], read, [0]).reason
    assert seam_disagreement(deep, lambda i: image, read, []).reason == "no slice was segmented"
    remote = RemoteSegmenter("127.0.0.1:1", "cells")
    assert "servers" in seam_disagreement(remote, lambda i: image, read, [0]).reason


def test_what_the_verdict_says_of_seams_and_untrained_weights(tmp_path: Path) -> None:
    image, labels, confidence = volume((2, 20, 20))
    samples = tuple(SeamSample(kind, 0, "row", 0, 0, 10, 10, 1000, differing)
                    for kind, differing in (("seam", 40), ("control", 9)))  # type: ignore[arg-type]
    facts = job((2, 20, 20), bundle_trained=False)
    _, checker = make(tmp_path, facts, count(labels, confidence), readers(image, labels, confidence),
                      SeamDisagreement("", 518, 64, samples))
    assert "4.00 % of the labels differ" in checker.text
    assert "a larger overlap would help" in checker.text
    assert "random, not trained" in checker.text
