"""The upsampler: the published network and its weights, and the fused graphs that are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from phaseline.export import graphs
from phaseline.export.bundle_writer import ExportOptions, write_bundle
from phaseline.export.forms import Parts
from phaseline.export.pixel import cell_matrix, nearest, nearest_indices
from phaseline.export.trt_plan import unsupported
from phaseline.export.upsampler import Upsampler, UpsamplerConfig, standardised
from phaseline.export.upsampler_weights import create_upsampler, first_channels, load_upsampler, random_upsampler, save_upsampler
from phaseline.export.weights import load_backbone
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.compare import deviation
from phaseline.runtime.contract import PATCH_FEATURES, PIXEL_FEATURES
from phaseline.runtime.errors import MissingInputError, PhaselineError, UsageError, WeightsError
from phaseline.runtime.ort import OrtEngine

VIT = "vit-32-1-2-p14"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def published(channels: int) -> dict[str, Any]:
    """A checkpoint as the authors write it: every published key, random weights."""
    config = UpsamplerConfig("upsampler", n_ch_in=channels, n_ch_out=channels, n_ch_downsampler=32)
    weights = {name: tensor for name, tensor in Upsampler(config).state_dict().items() if "num_batches" not in name}
    entries = dataclasses.asdict(config)
    del entries["feature_scale"], entries["guidance"]
    return {"weights": weights, "config": entries}


def run(graph: Path, tiles: Any, name: str = PIXEL_FEATURES) -> Any:
    with OrtEngine(graph, "cpu", 1) as engine:
        return engine.run(tiles, [name])[0]


def random_tiles(n: int, channels: int, side: int) -> Any:
    return np.random.default_rng(5).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


# --- the network --------------------------------------------------------------------------------------------------------

@pytest.mark.data
def test_it_is_the_published_network(data: Path) -> None:
    golden = np.load(data / "golden" / "upsampler32.npz")
    weights = {name.removeprefix("weights/"): torch.from_numpy(golden[name]) for name in golden if name.startswith("weights/")}
    upsampler = Upsampler(UpsamplerConfig("golden", n_ch_in=32, n_ch_out=32, n_ch_downsampler=32)).eval()
    assert set(weights) == {name for name in upsampler.state_dict() if "num_batches_tracked" not in name}
    upsampler.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        made = upsampler(torch.from_numpy(golden["image_0_255"]).float(), torch.from_numpy(golden["low_res_l1"]))
    assert deviation(made.numpy(), golden["high_res"]).max_abs <= 1e-4


@pytest.mark.parametrize("size", [(64, 64), (45, 70), (33, 131)])
@pytest.mark.parametrize("patch", [2, 7, 14, 16])
def test_any_image_size(size: tuple[int, int], patch: int) -> None:
    upsampler = random_upsampler(0, channels=4, patch_px=patch, hidden=4)
    assert len(upsampler.upsampler.upsamples) == {2: 1, 7: 3, 14: 4, 16: 4}[patch]
    image, features = torch.rand(1, 1, *size) * 255, torch.rand(1, 4, size[0] // patch, size[1] // patch)
    with torch.inference_mode():
        assert upsampler(image, features).shape == (1, 4, *size)


def test_it_can_be_trained() -> None:
    upsampler = random_upsampler(0, channels=4, patch_px=7, hidden=4).train()
    before = upsampler.downsampler.downsample_layers[0].maxpool_conv[1].double_conv[1].running_mean.clone()  # type: ignore
    upsampler(torch.rand(2, 3, 28, 28) * 255, torch.rand(2, 4, 4, 4)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in upsampler.parameters())
    assert not torch.equal(before, upsampler.downsampler.downsample_layers[0].maxpool_conv[1].double_conv[1]  # type: ignore
                           .running_mean)


@pytest.mark.parametrize(("changes", "widths"), [
    ({}, [32] * 5), ({"n_ch_hidden": 8}, [8] * 5), ({"n_ch_out": 8}, [32, 32, 24, 16, 8]),
    ({"n_ch_in": 384, "n_ch_hidden": 96, "n_ch_out": 64}, [96, 96, 85, 74, 64]),
])
def test_widths(changes: dict[str, int], widths: list[int]) -> None:
    config = UpsamplerConfig(**{"name": "u", "n_ch_in": 32, "n_ch_out": 32, **changes})  # type: ignore[arg-type]
    assert config.widths == widths
    assert Upsampler(config).upsampler.inp_conv.double_conv[0].out_channels == widths[0]


@pytest.mark.parametrize("changes", [{"n_ch_in": 0}, {"k": 4}, {"n_ch_guidance": 1}, {"patch_size": 1}, {"padding_mode": "edge"},
                                     {"feat_weight": 0.3}, {"feature_scale": 0.0}, {"n_ch_hidden": 0}, {"guidance": "raw"}])
def test_impossible_configurations_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        UpsamplerConfig(**{"name": "u", **changes})


def test_feature_scale_keeps_the_patch_features_scale() -> None:
    plain = random_upsampler(0, channels=4, patch_px=7, hidden=4)
    scaled = Upsampler(dataclasses.replace(plain.config, feature_scale=0.25)).eval()
    scaled.load_state_dict(plain.state_dict())
    image, features = torch.rand(1, 3, 28, 28) * 255, torch.rand(1, 4, 4, 4)
    with torch.inference_mode():
        assert torch.equal(scaled.pixel_features(image, features), plain(image, features * 0.25) * 4)
        assert torch.equal(plain.pixel_features(image, features), plain(image, features / features.sum(dim=1, keepdim=True)))


@pytest.mark.parametrize("channels", [1, 3])
def test_standardised_pixels(channels: int) -> None:
    image = torch.from_numpy(random_tiles(2, channels, 40)).float()
    wanted = np.stack([(x - x.mean()) / x.std() for x in image.double().numpy()])
    np.testing.assert_allclose(standardised(image).numpy(), wanted, atol=1e-5)
    outlier = torch.full((1, 1, 40, 40), 7.0)
    assert standardised(outlier).abs().max() < 1e-4, "a constant tile has nothing to tell"
    outlier[0, 0, 3, 3] = 255
    assert standardised(outlier).max() == 5, "a hot pixel is clipped"


def standardising(*, padding: str = "replicate", hidden: int = 8) -> Upsampler:
    """A random network with standardised guidance, which is about 1 rather than in the hundreds."""
    plain = random_upsampler(0, channels=16, patch_px=7, hidden=hidden)
    upsampler = Upsampler(dataclasses.replace(plain.config, guidance="standardised", feature_scale=0.5,
                                              padding_mode=padding)).eval()  # type: ignore[arg-type]
    upsampler.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for name, parameter in upsampler.named_parameters():
            if name.endswith("double_conv.0.weight") and "inp_conv" not in name:
                parameter[:, -3:] *= 500
    return upsampler


def test_standardised_guidance_sees_neither_brightness_nor_contrast() -> None:
    upsampler, features = standardising(), torch.rand(1, 16, 8, 8)
    image = torch.from_numpy(random_tiles(1, 1, 56)).float() / 4 + 50
    with torch.inference_mode():
        first, second = upsampler.pixel_features(image, features), upsampler.pixel_features(image * 1.7 - 30, features)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("padding", "channels", "precision"), [("replicate", 1, "fp32"), ("zeros", 3, "fp32"),
                                                                ("replicate", 1, "fp16"), ("replicate", 3, "int8")])
def test_standardised_guidance_is_exported(tmp_path: Path, padding: str, channels: int, precision: str) -> None:
    upsampler = standardising(padding=padding)
    save_upsampler(upsampler, upsampler.config, tmp_path / "u.safetensors")
    options = ExportOptions(VIT, "random:0", stride_px=7, tile_px=56, channels=16, precision=precision,  # type: ignore[arg-type]
                            upsampler=str(tmp_path / "u.safetensors"), in_channels=channels, max_batch=2)
    bundle = write_bundle(options, tmp_path / "b")
    assert bundle.spec.parity["pixel_cosine"] >= (0.98 if precision == "int8" else 0.9999)
    if precision != "int8":
        tiles = random_tiles(2, channels, 56)
        together = run(bundle.pixel_graph("cpu"), tiles)
        alone = [run(bundle.pixel_graph("cpu"), tiles[i : i + 1]) for i in range(2)]
        np.testing.assert_array_equal(together, np.concatenate(alone))


# --- its weights --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [32, 128])
@pytest.mark.parametrize("counted", [False, True])
def test_published_checkpoints_load(channels: int, counted: bool, tmp_path: Path) -> None:
    content = published(channels)
    wanted = dict(content["weights"])
    if counted:
        content["weights"]["upsampler.inp_conv.double_conv.1.num_batches_tracked"] = torch.tensor(7)
    torch.save(content, tmp_path / "u.pth")
    upsampler = load_upsampler(tmp_path / "u.pth")
    assert not upsampler.training and upsampler.config.n_ch_out == channels
    assert all(torch.equal(upsampler.state_dict()[name], tensor) for name, tensor in wanted.items())


def test_own_files_are_halved_and_come_back(tmp_path: Path) -> None:
    upsampler = random_upsampler(1, channels=16, patch_px=7)
    config = dataclasses.replace(upsampler.config, feature_scale=0.03)
    save_upsampler(upsampler, config, tmp_path / "u.safetensors")
    loaded = load_upsampler(tmp_path / "u.safetensors")
    assert loaded.config == config
    for name, tensor in loaded.state_dict().items():
        original = upsampler.state_dict()[name]
        assert torch.equal(tensor, original.half().float() if tensor.numel() >= 4096 else original) or "tracked" in name
    values = sum(p.numel() for p in upsampler.parameters())
    assert (tmp_path / "u.safetensors").stat().st_size < 2.6 * values


def _without(content: dict[str, Any]) -> None:
    del content["weights"]["upsampler.mlp.bias"]


def _extra(content: dict[str, Any]) -> None:
    content["weights"]["upsampler.mlp2.bias"] = torch.zeros(3)


def _wrong_shape(content: dict[str, Any]) -> None:
    content["weights"]["upsampler.mlp.bias"] = torch.zeros(3)


def _nan(content: dict[str, Any]) -> None:
    content["weights"]["upsampler.mlp.bias"][4] = torch.nan


def _other_sizes(content: dict[str, Any]) -> None:
    content["config"]["n_ch_hidden"] = 8


def _unknown_key(content: dict[str, Any]) -> None:
    content["config"]["depth"] = 8


def _no_tensor(content: dict[str, Any]) -> None:
    content["weights"]["upsampler.mlp.bias"] = [1.0]


def _no_config(content: dict[str, Any]) -> None:
    del content["config"]


@pytest.mark.parametrize(("damage", "part"), [
    (_without, r"no tensor upsampler\.mlp\.bias of shape \(32,\)"), (_extra, r"upsampler\.mlp2\.bias of shape \(3,\)"),
    (_wrong_shape, r"upsampler\.mlp\.bias has shape \(3,\).*\(32,\)"), (_nan, r"mlp\.bias holds NaN"),
    (_other_sizes, "configuration asks for"), (_unknown_key, "depth"), (_no_tensor, "shape list"), (_no_config, "config"),
])
def test_damaged_checkpoints_are_refused(damage: Any, part: str, tmp_path: Path) -> None:
    content = published(32)
    damage(content)
    torch.save(content, tmp_path / "u.pth")
    with pytest.raises(WeightsError, match=part) as caught:
        load_upsampler(tmp_path / "u.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["u.pth", "u.safetensors"])
def test_garbage_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"certainly no weights")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_upsampler(tmp_path / name)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weights": Malicious(), "config": {}}, tmp_path / "u.pth")
    with pytest.raises(WeightsError):
        load_upsampler(tmp_path / "u.pth")
    assert not (tmp_path / "ran").exists()


def test_sources() -> None:
    assert create_upsampler("random:3", channels=4, patch_px=7)[1:] == ("random:3", False)
    with pytest.raises(UsageError, match="random:SEED"):
        create_upsampler("random:x", channels=4, patch_px=7)
    with pytest.raises(MissingInputError, match="nowhere"):
        create_upsampler("nowhere.pth", channels=4, patch_px=7)


def test_first_channels_are_those_of_the_whole() -> None:
    whole = random_upsampler(0, channels=8, patch_px=7, hidden=8)
    image, features = torch.rand(1, 3, 28, 28) * 255, torch.rand(1, 8, 4, 4)
    with torch.inference_mode():
        torch.testing.assert_close(first_channels(whole, 3)(image, features), whole(image, features)[:, :3])
    with pytest.raises(UsageError, match="1…8"):
        first_channels(whole, 9)


# --- the module that is traced ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("before", "after"), [(64, 64), (64, 65), (258, 259), (518, 129), (74, 64), (32, 37), (5, 14)])
def test_nearest_is_torchs(before: int, after: int) -> None:
    x = torch.rand(1, 2, before, before)
    wanted = functional.interpolate(x, after)
    assert torch.equal(nearest(x, after), wanted)
    assert torch.equal(x[:, :, nearest_indices(before, after)][:, :, :, nearest_indices(before, after)], wanted)


def test_cells_take_from_the_tokens_around_them() -> None:
    assert cell_matrix(518, 37, 14, 14) is None
    matrix = cell_matrix(42, 5, 14, 7)
    assert matrix is not None and matrix.shape == (6, 5)
    # Tokens are centred at 7, 14 … 35 px, cells at 3.5, 10.5 … 38.5 px.
    torch.testing.assert_close(matrix @ torch.tensor([7.0, 14, 21, 28, 35]), torch.tensor([7, 10.5, 17.5, 24.5, 31.5, 35]))


@pytest.mark.parametrize(("stride", "tile", "in_channels", "padding", "scale"), [
    (14, 70, 1, "replicate", None), (7, 77, 1, "replicate", 0.05), (7, 70, 3, "replicate", None), (6, 62, 3, "reflect", None),
    (7, 77, 1, "zeros", None), (14, 84, 3, "zeros", 2.0),
])
def test_graph_is_the_published_network(
    stride: int, tile: int, in_channels: int, padding: Any, scale: float | None, tmp_path: Path
) -> None:
    random = random_upsampler(0, channels=32, patch_px=stride, hidden=10)
    upsampler = Upsampler(dataclasses.replace(random.config, padding_mode=padding, feature_scale=scale)).eval()
    upsampler.load_state_dict(random.state_dict())
    parts = Parts(load_backbone(VIT, "random:0")[0], None, upsampler, stride, tile, in_channels)
    tiles = torch.from_numpy(random_tiles(2, in_channels, tile))
    module = parts.pixel_module()
    with torch.inference_mode():
        wanted = parts.pixel_reference()(tiles)
        assert deviation(module.float_map(tiles).numpy(), wanted.numpy()).max_abs <= 1e-4
    module = parts.pixel_module("portable")
    module.forward = module.float_map  # type: ignore[method-assign]
    model = graphs.trace(module, (in_channels, tile, tile), [PIXEL_FEATURES], max_batch=2)
    ir.save(model, tmp_path / "g.onnx")
    assert deviation(run(tmp_path / "g.onnx", tiles.numpy()), wanted.numpy()).max_abs <= 1e-4
    assert unsupported(model) == []


# --- bundles ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("pixels")
    (folder / "card.md").write_text("# A card\n\nFrom somewhere.\n")
    options = ExportOptions(VIT, "random:0", stride_px=7, tile_px=56, channels=16, precision=request.param, max_batch=3,
                            upsampler="random:0", pixel_channels=12, card=folder / "card.md",
                            in_channels=3 if request.param == "fp32" else 1)
    return write_bundle(options, folder / "b")


def test_bundle_holds_fused_graphs_and_card(bundle: Bundle) -> None:
    spec = open_bundle(bundle.path).spec
    assert spec.has_upsampler and set(spec.pixel_graphs) == set(spec.graphs) and spec.pixel_channels == 12
    assert spec.upsampler == {"name": "random-32", "weights": "random:0", "trained": False, "hidden": 32}
    assert (bundle.path / spec.card).read_text() == "# A card\n\nFrom somewhere.\n"
    assert spec.parity["pixel_cosine"] >= {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.98}[spec.precision]
    assert spec.parity["pixel_max_abs"] > 0
    assert {f.name for f in bundle.path.iterdir()} == {"bundle.json", *spec.files}


def test_pixel_features_keep_the_contract(bundle: Bundle) -> None:
    spec = bundle.spec
    for form in spec.graphs:
        tiles = random_tiles(spec.max_batch, spec.in_channels, 56)
        features = run(bundle.pixel_graph(form), tiles)  # type: ignore[arg-type]
        assert features.dtype == np.float16 and features.shape == (spec.max_batch, 12, 56, 56)
        if form == "portable":
            assert unsupported(ir.load(bundle.pixel_graph("portable"))) == []


def test_a_tile_does_not_depend_on_its_batch(bundle: Bundle) -> None:
    if bundle.spec.precision == "int8":
        pytest.skip("int8 bundles take one tile a call")
    tiles = random_tiles(3, bundle.spec.in_channels, 56)
    together = run(bundle.pixel_graph("cpu"), tiles)
    alone = [run(bundle.pixel_graph("cpu"), tiles[i:i + 1]) for i in range(3)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_pixel_features_are_the_upsampled_patch_features(bundle: Bundle) -> None:
    if bundle.spec.precision == "int8":
        pytest.skip("8-bit convolutions deviate; parity is part of the export")
    tiles = random_tiles(2, bundle.spec.in_channels, 56)
    patches = torch.from_numpy(run(bundle.graph("cpu"), tiles, PATCH_FEATURES)).float()
    matrix = cell_matrix(56, 7, 14, 7)
    assert matrix is not None
    upsampler = first_channels(random_upsampler(0, channels=16, patch_px=7), 12)
    with torch.inference_mode():
        wanted = upsampler.pixel_features(torch.from_numpy(tiles).float(), matrix @ patches @ matrix.T).numpy()
    assert deviation(run(bundle.pixel_graph("cpu"), tiles), wanted).max_rel < (6e-4 if bundle.spec.precision == "fp32" else 3e-3)


def test_graphs_share_their_weights(bundle: Bundle) -> None:
    values = sum(p.numel() for module in (load_backbone(VIT, "random:0")[0].vit, random_upsampler(0, channels=16, patch_px=7))
                 for name, p in module.named_parameters() if "pos_embed" not in name)
    # Tensors of fewer than 4096 values are never halved.
    size = {"fp32": 4, "fp16": 2.6, "int8": 2.0}[bundle.spec.precision]
    assert bundle.spec.files["weights.bin"].size_bytes < 1.3 * size * values


@pytest.mark.parametrize(("changes", "part"), [
    ({"stride_px": 14}, "stride is 14.*every 7 px.*--stride 7"), ({"channels": 8}, "channels is 8.*--channels 16"),
    ({"upsampler": "random:"}, "random:SEED"), ({"upsampler": "no.pth"}, r"no\.pth"), ({"pixel_channels": 17}, "1…16"),
    ({"upsampler": None, "pixel_channels": 4}, "an upsampler"), ({"card": Path("/no/card.md")}, "/no/card.md"),
    ({"tile_px": 21, "stride_px": 7}, None),
])
def test_wrong_choices_are_refused(changes: dict[str, Any], part: str | None, tmp_path: Path) -> None:
    file = tmp_path / "u.safetensors"
    upsampler = random_upsampler(0, channels=16, patch_px=7, hidden=4)
    save_upsampler(upsampler, upsampler.config, file)
    options: dict[str, Any] = {"backbone": VIT, "weights": "random:0", "stride_px": 7, "tile_px": 56, "channels": 16,
                               "upsampler": str(file), "precision": "int8", **changes}
    if part is None:
        assert write_bundle(ExportOptions(**options), tmp_path / "b").spec.upsampler["trained"] is True
        return
    with pytest.raises(UsageError, match=part):
        write_bundle(ExportOptions(**options), tmp_path / "b")
    assert [f.name for f in tmp_path.iterdir()] == ["u.safetensors"]


def test_cards_must_be_text(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe\x00"):
        (tmp_path / "card.md").write_bytes(content)
        with pytest.raises(UsageError, match="Markdown"):
            write_bundle(ExportOptions(VIT, "random:0", card=tmp_path / "card.md"), tmp_path / "b")


def test_a_bundle_without_upsampler_says_so(tmp_path: Path) -> None:
    options = ExportOptions(VIT, "random:0", stride_px=14, tile_px=42, channels=8, precision="int8")
    bundle = write_bundle(options, tmp_path / "b")
    assert (bundle.spec.has_upsampler, bundle.spec.card, bundle.spec.pixel_channels) == (False, "", 0)
    with pytest.raises(PhaselineError, match="--upsampler"):
        bundle.pixel_graph("cpu")


def test_benchmark_runs() -> None:
    from benchmarks.pixel import REFERENCE
    from benchmarks.pixel import run as benchmark

    rows, ways = benchmark(repeats=1, tile_px=70, threads=1, backbone="vit-64-2-2-p14", passes=1)
    assert [row["engine"] for row in rows] == [REFERENCE, "ONNX Runtime fp32", "ONNX Runtime int8"]
    assert all(row["cosine"] > 0.98 for row in rows) and all(row["peak_mb"] > 0 for row in rows[1:])
    assert [way["passes"] for way in ways] == [1, 51]
