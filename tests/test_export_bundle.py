"""Exporting whole bundles: parity with torch, what lies on disk, what TensorRT would take, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from phaseline.export import calibration, trt_plan
from phaseline.export.bundle_writer import ExportOptions, nearest_tiles, write_bundle
from phaseline.export.int8 import quantise_columns
from phaseline.export.strided import StridedViT
from phaseline.export.trt_plan import unsupported
from phaseline.export.weights import load_backbone
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.compare import deviation
from phaseline.runtime.contract import ATTENTION, PATCH_FEATURES, TILES, BundleFile
from phaseline.runtime.errors import (
    BundleError,
    EngineUnavailableError,
    ImageError,
    MissingInputError,
    OutputExistsError,
    ParityError,
    PhaselineError,
    UsageError,
)
from tests.fakes import make_spec

TINY: dict[str, Any] = {"backbone": "vit-64-2-2-p14", "weights": "random:0", "stride_px": 7, "tile_px": 56, "channels": 16}
SMALL = "vit_small_patch14_dinov2"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes: Any) -> ExportOptions:
    return ExportOptions(**{**TINY, **changes})


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two calibration images: enough for 32 channels, and quick."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("camera", "gravel"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    return folder


def random_tiles(bundle: Bundle, n: int) -> Any:
    shape = (n, bundle.spec.in_channels, bundle.spec.tile_px, bundle.spec.tile_px)
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = tiny(precision=request.param, facets=("key", "value"), in_channels=3 if request.param == "fp32" else 1)
    return write_bundle(options, tmp_path_factory.mktemp("bundles") / request.param)


def test_bundle_says_what_it_is(bundle: Bundle) -> None:
    spec = open_bundle(bundle.path).spec
    assert spec == bundle.spec
    assert (spec.trained, spec.weights, spec.heads, spec.embed_dim, spec.grid) == (False, "random:0", 2, 64, 7)
    assert set(spec.graphs) == ({"cpu"} if spec.precision == "int8" else {"cpu", "portable"})
    assert {f.name for f in bundle.path.iterdir()} == {"bundle.json", *spec.files}
    assert spec.projection["images"] == len(calibration.BUNDLED) and spec.projection["views"] == 4
    assert spec.projection["tokens"] == len(calibration.BUNDLED) * 4 * 49
    assert 0.3 < float(spec.projection["explained_variance"]) <= 1
    assert spec.max_batch == (1 if spec.precision == "int8" else 8)
    assert "torch" in spec.versions
    assert spec.parity["cosine"] >= {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.98}[spec.precision]


def test_graphs_keep_the_contract(bundle: Bundle) -> None:
    spec = bundle.spec
    for form in spec.graphs:
        graph = session(bundle.graph(form))  # type: ignore[arg-type]
        assert [i.name for i in graph.get_inputs()] == [TILES]
        assert graph.get_inputs()[0].shape[1:] == [spec.in_channels, 56, 56]
        assert [o.name for o in graph.get_outputs()] == [PATCH_FEATURES, ATTENTION, "key", "value"]
        for n in (1, 2, 5) if spec.precision != "int8" else (1,):
            features, attention, key, value = graph.run(None, {TILES: random_tiles(bundle, n)})
            assert features.shape == (n, 16, 7, 7) and attention.shape == (n, 2, 7, 7)
            assert key.shape == value.shape == (n, 64, 7, 7)
            assert {a.dtype for a in (features, attention, key, value)} == {np.dtype(np.float16)}
            assert (attention >= 0).all() and (attention.astype(np.float32).sum(axis=(2, 3)) <= 1 + 1e-3).all()


def test_forms_agree_and_share_their_weights(bundle: Bundle) -> None:
    spec = bundle.spec
    if spec.precision == "int8":
        pytest.skip("int8 bundles have one form only")
    tiles = random_tiles(bundle, 2)
    cpu, portable = (session(bundle.graph(form)).run(None, {TILES: tiles}) for form in ("cpu", "portable"))
    for one, other in zip(cpu, portable, strict=True):
        assert deviation(one, other).max_rel < (2e-3 if spec.precision == "fp32" else 1e-2)
    backbone, _, _ = load_backbone("vit-64-2-2-p14", "random:0")
    weights = sum(p.numel() for name, p in backbone.vit.named_parameters() if "pos_embed" not in name)
    assert spec.files["weights.bin"].size_bytes < 1.25 * weights * (4 if spec.precision == "fp32" else 2)


def test_portable_graphs_suit_tensorrt(bundle: Bundle) -> None:
    if bundle.spec.precision == "int8":
        with pytest.raises(BundleError, match="portable"):
            bundle.graph("portable")
        return
    assert unsupported(ir.load(bundle.graph("portable"))) == []
    assert any("MultiHeadAttention" in line for line in unsupported(ir.load(bundle.graph("cpu"))))


def test_graphs_hold_no_paths_of_this_machine(bundle: Bundle) -> None:
    for form in bundle.spec.graphs.values():
        content = (bundle.path / form).read_bytes()
        assert b"site-packages" not in content and str(Path(__file__).parents[1]).encode() not in content


def test_same_command_same_bundle(tmp_path: Path) -> None:
    first, second = (write_bundle(tiny(precision="int8"), tmp_path / name) for name in ("a", "b"))
    assert first.hash == second.hash


def test_no_projection_when_all_channels_are_asked_for(tmp_path: Path) -> None:
    spec = write_bundle(tiny(channels=64, precision="int8"), tmp_path / "b").spec
    assert (spec.channels, dict(spec.projection)) == (64, {})


# --- acceptance: ViT-S/14 -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize(("stride", "tile"), [(14, 266), (7, 140), (4, 98)])
def test_vit_small_parity(stride: int, tile: int, few_images: Path, tmp_path: Path) -> None:
    options = ExportOptions(SMALL, "random:0", stride_px=stride, tile_px=tile, facets=("key",), calibration=few_images)
    bundle = write_bundle(options, tmp_path / "b")
    print(dict(bundle.spec.parity))
    assert bundle.spec.parity["max_rel"] <= 1e-3
    assert bundle.spec.parity["cosine"] >= 0.99999
    assert unsupported(ir.load(bundle.graph("portable"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_other_families_export(name: str, few_images: Path, tmp_path: Path) -> None:
    patch = 16 if "16" in name else 14
    options = ExportOptions(name, "random:1", stride_px=patch // 2, tile_px=4 * patch, precision="fp16", in_channels=3,
                            calibration=few_images)
    bundle = write_bundle(options, tmp_path / "b")
    assert unsupported(ir.load(bundle.graph("portable"))) == []


def test_default_kind_of_bundle_is_small(tmp_path: Path) -> None:
    options = ExportOptions("vit-192-8-3-p14", "random:0", stride_px=7, tile_px=56, precision="fp16")
    bundle = write_bundle(options, tmp_path / "b")
    assert sum(f.stat().st_size for f in bundle.path.iterdir()) <= 12e6


@pytest.fixture(scope="module")
def int8_cosines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], list[float]]:
    """Cosines of ViT-S/14's int8 features to torch's, for each image's middle; the mean feature is taken off first."""
    options = ExportOptions(SMALL, "random:0", stride_px=14, tile_px=266, channels=384, precision="int8")
    bundle = write_bundle(options, tmp_path_factory.mktemp("int8") / "b")
    coarse = session(bundle.graph("cpu"))
    fine = StridedViT(load_backbone(SMALL, "random:0")[0], stride_px=14, tile_px=266, in_channels=1).eval()

    def cosines(images: list[Any]) -> list[float]:
        found = []
        for image in images:
            tile = next(calibration.views_of(image, 266))
            with torch.inference_mode():
                wanted = fine.float_maps(torch.from_numpy(tile))[0].numpy()
            mean = wanted.mean(axis=(2, 3), keepdims=True)
            given = coarse.run([PATCH_FEATURES], {TILES: tile})[0].astype(np.float32)
            found.append(deviation(given - mean, wanted - mean).cosine)
        return found

    return cosines


@pytest.mark.slow
def test_int8_on_bundled_images(int8_cosines: Callable[[list[Any]], list[float]]) -> None:
    cosines = int8_cosines(calibration.load_images(None, 1))
    print(f"int8 cosine {min(cosines):.5f}…{max(cosines):.5f}")
    assert min(cosines) >= 0.98


@pytest.mark.slow
@pytest.mark.data
def test_int8_on_real_micrographs(data: Path, int8_cosines: Callable[[list[Any]], list[float]]) -> None:
    cosines = int8_cosines(calibration.load_images(data / "ni" / "images", 1))
    print(f"int8 cosine {min(cosines):.5f}…{max(cosines):.5f} on {len(cosines)} micrographs")
    assert min(cosines) >= 0.98


def test_quantised_columns_are_within_half_a_step() -> None:
    matrix = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    matrix[:, 2] = 0
    quantised, scale = quantise_columns(matrix)
    assert quantised.dtype == np.int8 and scale.shape == (6,)
    assert (np.abs(quantised * scale - matrix) <= 0.5001 * scale).all()


# --- nothing half-written -----------------------------------------------------------------------------------------------

def test_a_failed_verification_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="nothing was written"):
        write_bundle(tiny(tolerance=0.0, precision="int8"), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "b"
    before = write_bundle(tiny(precision="int8"), out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_bundle(tiny(), out)
    with pytest.raises(ParityError):
        write_bundle(tiny(precision="int8", tolerance=0.0), out, overwrite=True)
    assert open_bundle(out).hash == before.hash
    after = write_bundle(tiny(precision="int8", stride_px=14), out, overwrite=True)
    assert open_bundle(out).hash == after.hash != before.hash
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


def test_overwriting_takes_only_bundles(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="no bundle"):
        write_bundle(tiny(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# --- asked for wrongly --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "part"), [
    ({"tile_px": 60}, "56 and 63"), ({"tile_px": 10}, "14 and 21"), ({"stride_px": 15}, "at most 14"),
    ({"stride_px": 0}, "stride"), ({"channels": 65}, "64"), ({"in_channels": 2}, "RGB"), ({"precision": "fp8"}, "fp32"),
    ({"facets": ("keys",)}, "query, key, value"), ({"max_batch": 0}, "max_batch"), ({"tolerance": -1.0}, "tolerance"),
    ({"weights": "random"}, "random:SEED"), ({"calibration": Path("/nowhere")}, "/nowhere"),
])
def test_wrong_choices_are_refused(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=part):
        write_bundle(tiny(**changes), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_nearest_tiles() -> None:
    assert nearest_tiles(518, 14, 7) == (518, 525) and nearest_tiles(512, 14, 4) == (510, 514)


def test_command_line(tmp_path: Path) -> None:
    import typer

    from phaseline.export.command import export_command

    app = typer.Typer()
    app.command()(export_command)
    asked = ["vit-64-2-2-p14", "--weights", "random:0", "--stride", "14", "--tile", "42", "--channels", "8",
             "--facets", "query", "--precision", "int8"]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "cosine" in result.output and "untrained" in result.output
    assert open_bundle(tmp_path / "b").spec.facets == ("query",)
    refused = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "b")])
    assert isinstance(refused.exception, OutputExistsError)
    engine = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "c"), "--engine", "tflite"])
    assert isinstance(engine.exception, UsageError) and "tensorrt" in str(engine.exception)


# --- TensorRT -----------------------------------------------------------------------------------------------------------

def test_without_tensorrt_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineUnavailableError, match="--engine onnx") as caught:
        trt_plan.require_tensorrt("fp16")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="int8"):
        trt_plan.require_tensorrt("int8")


@pytest.mark.tensorrt
@pytest.mark.gpu
def test_plan_is_built(tmp_path: Path) -> None:
    try:
        trt_plan.require_tensorrt("fp16")
    except PhaselineError as error:
        pytest.skip(str(error))
    bundle = write_bundle(tiny(precision="fp16"), tmp_path / "b")
    plan = trt_plan.build_plan(bundle)
    assert plan.stat().st_size > 0 and open_bundle(bundle.path).hash == bundle.hash


def test_plan_name_tells_graph_version_and_gpu_apart(tmp_path: Path) -> None:
    def bundle(digit: str, card: str = "c") -> Bundle:
        hashes = {"a.onnx": digit, "p.onnx": digit, "a_pixels.onnx": "a", "p_pixels.onnx": "b", "weights.bin": digit,
                  "card.md": card}
        spec = make_spec(graphs={"cpu": "a.onnx", "portable": "p.onnx"}, pixel_channels=2, card="card.md",
                         pixel_graphs={"cpu": "a_pixels.onnx", "portable": "p_pixels.onnx"},
                         files={name: BundleFile(kind * 64, 1) for name, kind in hashes.items()})
        return Bundle(tmp_path, spec, spec.digest())

    assert trt_plan.plan_path(bundle("1"), "10.3.0", "H200") == trt_plan.plan_path(bundle("1", "d"), "10.3.0", "H200")
    names = {trt_plan.plan_path(b, version, gpu, pixels=pixels).name for b in (bundle("1"), bundle("2"))
             for version in ("10.3.0", "10.9.0") for gpu in ("NVIDIA H200", "NVIDIA A100/SXM") for pixels in (False, True)}
    assert len(names) == 16 and all("/" not in name for name in names)


def node_graph(op: str, dtype: ir.DataType, domain: str = "", opset: int = 20, side: int | str = 4) -> ir.Model:
    left, right = (ir.Value(name=name, shape=ir.Shape(["n", side]), type=ir.TensorType(dtype)) for name in "ab")
    node = ir.node(op, [left, right], domain=domain)
    node.outputs[0].name, node.outputs[0].shape = "c", ir.Shape(["n", side])
    node.outputs[0].type = ir.TensorType(dtype)
    graph = ir.Graph([left, right], [node.outputs[0]], nodes=[node], opset_imports={"": opset}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("model", "part"), [
    (node_graph("Add", ir.DataType.INT64), "INT64"), (node_graph("Mul", ir.DataType.DOUBLE), "DOUBLE"),
    (node_graph("MatMulInteger", ir.DataType.INT8), "MatMulInteger"),
    (node_graph("Add", ir.DataType.FLOAT, domain="com.microsoft"), "com.microsoft"),
    (node_graph("Add", ir.DataType.FLOAT, opset=25), "operator set 25"),
    (node_graph("Add", ir.DataType.FLOAT, side="w"), "dynamic axis 1"),
])
def test_bad_graphs_are_found(model: ir.Model, part: str) -> None:
    assert any(part in line for line in unsupported(model))


def test_good_graph_is_not() -> None:
    assert unsupported(node_graph("Add", ir.DataType.FLOAT16)) == []


# --- calibration images -------------------------------------------------------------------------------------------------

def test_calibration_images_of_any_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "b.png")
    tifffile.imwrite(tmp_path / "c.tif", rng.integers(0, 4000, (30, 40), dtype=np.uint16))
    for channels in (1, 3):
        images = calibration.load_images(tmp_path, channels)
        assert [i.shape for i in images] == [(channels, 30, 40)] * 3 and {i.dtype.name for i in images} == {"uint8"}
    assert images[2].max() == 255 and images[2].min() == 0
    (tmp_path / "d.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ImageError, match=r"d\.png"):
        calibration.load_images(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="no image"):
        calibration.load_images(tmp_path / "empty", 1)


def test_views_are_flips_shifts_and_contrasts_of_the_middle() -> None:
    image = np.random.default_rng(0).integers(100, 156, (1, 31, 40), dtype=np.uint8)
    plain, flipped, *_ = calibration.views_of(image, 20)
    np.testing.assert_array_equal(plain[0], image[:, 5:25, 10:30])
    np.testing.assert_array_equal(flipped[0], image[:, ::-1][:, 8:28, 11:31])
    assert [v.shape for v in calibration.views_of(image[:, :1, :3], 20)] == [(1, 1, 20, 20)] * 4


# --- benchmark ----------------------------------------------------------------------------------------------------------

def test_benchmark_runs() -> None:
    from benchmarks.backbone import REFERENCE, run

    rows = run(repeats=1, tile_px=56, threads=1, backbone="vit-64-2-2-p14")
    assert rows[0]["engine"] == REFERENCE and len(rows) == 3
    assert all(row["cosine"] > 0.98 for row in rows) and [row["engine"].split()[-1] for row in rows] == ["fp32", "fp32", "int8"]


def test_reference_is_what_is_exported(tmp_path: Path) -> None:
    bundle = write_bundle(tiny(channels=64), tmp_path / "b")
    backbone, _, _ = load_backbone("vit-64-2-2-p14", "random:0")
    tiles = random_tiles(bundle, 2)
    with torch.inference_mode():
        wanted = StridedViT(backbone, stride_px=7, tile_px=56, in_channels=1).eval()(torch.from_numpy(tiles))
    given = session(bundle.graph("cpu")).run(None, {TILES: tiles})
    for one, other in zip(given, wanted, strict=True):
        assert deviation(one, other.numpy()).max_rel < 2e-3
