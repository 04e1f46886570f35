"""The module that is traced, against timm's own forward pass; weights under timm's and Meta's names."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from phaseline.export.attention import plain_attention
from phaseline.export.backbone import Backbone, create_backbone, randomise
from phaseline.export.projection import Covariance, fit_projection
from phaseline.export.strided import StridedViT, fold_normalisation
from phaseline.export.weights import load_backbone, load_state, read_state
from phaseline.runtime.compare import deviation
from phaseline.runtime.errors import ExportError, MissingInputError, UsageError, WeightsError

TINY = "vit-64-3-2-p14"
REGISTERS = "vit_small_patch14_reg4_dinov2"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_backbone(name: str, seed: int = 0) -> Backbone:
    backbone = create_backbone(name)
    randomise(backbone, seed)
    return backbone


def tiles(n: int, channels: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n, channels, side, side), dtype=np.uint8))


def normalised(raw: torch.Tensor, backbone: Backbone) -> torch.Tensor:
    """What timm's models take: RGB, normalised."""
    rgb = raw.float().div(255).expand(-1, 3, -1, -1)
    return (rgb - torch.tensor(backbone.mean).view(1, 3, 1, 1)) / torch.tensor(backbone.std).view(1, 3, 1, 1)


def maps(backbone: Backbone, raw: torch.Tensor, stride: int, **options: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return StridedViT(backbone, stride_px=stride, tile_px=raw.shape[2], in_channels=raw.shape[1],
                          **options).eval().float_maps(raw)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", REGISTERS,
                                  "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "deit3_small_patch16_224"])
def test_at_stride_p_it_is_timms_forward_pass(name: str, channels: int) -> None:
    backbone = random_backbone(name)
    plain: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(backbone.vit.state_dict())
    raw = tiles(2, channels, 6 * backbone.patch_px)
    with torch.inference_mode():
        wanted = plain.forward_features(normalised(raw, backbone))[:, plain.num_prefix_tokens:]
    given = maps(backbone, raw, backbone.patch_px)[0].flatten(2).transpose(1, 2)
    assert (given - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_cls_attention_and_facets_are_those_of_the_last_block() -> None:
    backbone = random_backbone(REGISTERS)
    plain: Any = timm.create_model(REGISTERS, num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(backbone.vit.state_dict())
    caught: list[torch.Tensor] = []
    handle = plain.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, output: caught.append(output))
    raw = tiles(2, 3, 84)
    with torch.inference_mode():
        plain.forward_features(normalised(raw, backbone))
    handle.remove()
    query, key, value = caught[0].reshape(2, 5 + 36, 3, 6, 64).permute(2, 0, 3, 1, 4)
    wanted = torch.softmax(query @ key.transpose(2, 3) / 8, dim=-1)[:, :, 0, 5:].reshape(2, 6, 6, 6)

    _, attention, *facets = maps(backbone, raw, 14, facets=("query", "key", "value"))
    torch.testing.assert_close(attention, wanted, rtol=1e-4, atol=1e-7)
    assert (attention.sum(dim=(2, 3)) < 1).all()  # registers and [CLS] have the rest
    for facet, expected in zip(facets, (query, key, value), strict=True):
        flat = expected[:, :, 5:].permute(0, 1, 3, 2).reshape(2, 384, 6, 6)
        torch.testing.assert_close(facet, flat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [14, 7, 4, 2])
def test_grid_and_dtypes_follow_the_contract(stride: int) -> None:
    side = 14 + 5 * stride
    module = StridedViT(random_backbone(TINY), stride_px=stride, tile_px=side, in_channels=1).eval()
    features, attention = module(tiles(3, 1, side))
    assert features.shape == (3, 64, 6, 6) and attention.shape == (3, 2, 6, 6)
    assert features.dtype == attention.dtype == torch.float16


def test_position_embedding_keeps_its_own_grid_and_its_mean() -> None:
    backbone = random_backbone(TINY)
    own = StridedViT(backbone, stride_px=14, tile_px=518, in_channels=1)
    assert torch.equal(own.position[0, 1:], backbone.vit.pos_embed[0, 1:])
    with torch.no_grad():
        backbone.vit.pos_embed.fill_(0.25)
    dense = StridedViT(backbone, stride_px=7, tile_px=518, in_channels=1)
    assert dense.position.shape == (1, 1 + 73 * 73, 64)
    torch.testing.assert_close(dense.position[0, 1:], torch.full((73 * 73, 64), 0.25))


def test_without_blocks_and_positions_a_stride_samples_the_same_patches() -> None:
    backbone = random_backbone(TINY)
    backbone.vit.norm_pre = torch.nn.Identity()  # the mean of more patches is another
    with torch.no_grad():
        backbone.vit.pos_embed.zero_()
        for block in backbone.vit.blocks:
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
    raw = tiles(1, 1, 14 * 6)
    coarse, fine = maps(backbone, raw, 14)[0], maps(backbone, raw, 7)[0]
    torch.testing.assert_close(fine[:, :, ::2, ::2], coarse)


def test_folding_the_normalisation_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 3, 14, 14, generator=generator), torch.randn(8, generator=generator)
    grey = torch.rand(2, 1, 42, 42, generator=generator)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    rgb = (grey.expand(-1, 3, -1, -1) - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    wanted = torch.nn.functional.conv2d(rgb.double(), weight.double(), bias.double(), stride=7)
    folded = torch.nn.functional.conv2d(grey, *fold_normalisation(weight, bias, mean, std, 1), stride=7)
    assert (folded - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_attention_in_standard_operators_is_torchs() -> None:
    query, key, value = (torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    torch.testing.assert_close(plain_attention(query, key, value),
                               torch.nn.functional.scaled_dot_product_attention(query, key, value))


def test_exporting_leaves_the_backbone_alone() -> None:
    backbone = random_backbone(TINY)
    before = {name: tensor.clone() for name, tensor in backbone.vit.state_dict().items()}
    maps(backbone, tiles(1, 1, 42), 7, half=False)
    StridedViT(backbone, stride_px=7, tile_px=42, in_channels=1, half=True)
    after = backbone.vit.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())


def test_random_weights_are_reproducible_and_no_identity() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (load_backbone(TINY, f"random:{seed}") for seed in (3, 3, 4))
    assert first[1:] == ("random:3", False)
    raw = tiles(1, 1, 42)
    assert torch.equal(maps(first[0], raw, 7)[0], maps(again[0], raw, 7)[0])
    assert not torch.allclose(maps(first[0], raw, 7)[0], maps(other[0], raw, 7)[0], atol=0.1)
    gammas = [tensor for name, tensor in first[0].vit.named_parameters() if "gamma" in name]
    assert min(g.min() for g in gammas) >= 0.1
    assert state.shape == torch.random.get_rng_state().shape


@pytest.mark.parametrize(("name", "error", "part"), [
    ("vit_smal_patch14_dinov2", UsageError, "vit_small_patch14_dinov2"),
    ("vit_small_patch14_dinov2.nonsense", UsageError, "nonsense"),
    ("vit-65-2-2-p14", UsageError, "DIM a multiple of HEADS"),
    ("resnet18", ExportError, "not a plain Vision Transformer"),
])
def test_impossible_backbones_are_refused(name: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        create_backbone(name)


@pytest.mark.parametrize(("name", "part"), [
    ("vit_base_patch16_siglip_224", r"no \[CLS\] token"), ("vit_small_patch16_rope_mixed_224", "rotary|position")])
def test_backbones_without_the_parts_of_the_contract_are_refused(name: str, part: str) -> None:
    with pytest.raises(ExportError, match=part):
        StridedViT(create_backbone(name), stride_px=16, tile_px=48, in_channels=1)


# --- weights ----------------------------------------------------------------------------------------------------------

def metas_dinov2(backbone: Backbone, *, chunked: bool) -> dict[str, torch.Tensor]:
    """The backbone's weights as Meta releases DINOv2's: names, shapes, and [CLS]'s position kept apart."""
    generator = torch.Generator().manual_seed(9)
    vit = backbone.vit
    state = {"mask_token": torch.zeros(1, vit.embed_dim)}
    for name, tensor in vit.state_dict().items():
        renamed = name
        if chunked and name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            renamed = f"blocks.{int(index) // 2}.{index}.{rest}"
        state["register_tokens" if name == "reg_token" else renamed] = tensor.clone()
    if vit.reg_token is not None:
        position = torch.randn(1, 1, vit.embed_dim, generator=generator)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return state


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", REGISTERS])
def test_metas_dinov2_names_give_the_same_features(name: str, chunked: bool, tmp_path: Any) -> None:
    backbone = random_backbone(name)
    state = metas_dinov2(backbone, chunked=chunked)
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    file = tmp_path / "meta.pth"
    torch.save(state, file)
    loaded, origin, trained = load_backbone(name, str(file))
    assert (origin, trained) == ("file:meta.pth", True)
    raw = tiles(1, 3, 70)
    torch.testing.assert_close(maps(loaded, raw, 7)[0], maps(backbone, raw, 7)[0], rtol=1e-4, atol=1e-4)


def test_metas_dinov3_names_give_the_same_features() -> None:
    name = "vit_small_patch16_dinov3_qkvb"
    backbone = random_backbone(name, seed=2)
    state: dict[str, torch.Tensor] = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    with torch.no_grad():
        for block in backbone.vit.blocks:
            block.attn.q_bias.normal_(generator=torch.Generator().manual_seed(1))
    for key, tensor in backbone.vit.state_dict().items():
        if key.endswith("q_bias"):
            stem = key.removesuffix("q_bias")
            state[stem + "qkv.bias"] = torch.cat([tensor, torch.ones(384), backbone.vit.state_dict()[stem + "v_bias"]])
            state[stem + "qkv.bias_mask"] = torch.full((1152,), float("nan"))
        elif not key.endswith("v_bias"):
            state[key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
                  .replace("gamma_2", "ls2.gamma")] = tensor
    other = random_backbone(name, seed=5)
    load_state(other, state, "meta.pth")
    raw = tiles(1, 3, 64)
    torch.testing.assert_close(maps(other, raw, 8)[0], maps(backbone, raw, 8)[0])


def test_wrappers_prefixes_heads_and_other_grids_are_understood(tmp_path: Any) -> None:
    backbone = random_backbone("vit_tiny_patch16_224")
    state = {f"module.backbone.{k}": v for k, v in backbone.vit.state_dict().items()}
    state["module.head.last_layer.weight_v"] = torch.zeros(10, 4)
    torch.save({"teacher": state, "epoch": 7}, tmp_path / "dino.pth")
    loaded, _, _ = load_backbone("vit_tiny_patch16_224", str(tmp_path / "dino.pth"))
    assert torch.equal(loaded.vit.pos_embed, backbone.vit.pos_embed)

    larger = dict(backbone.vit.state_dict())
    larger["pos_embed"] = torch.full((1, 1 + 20 * 20, 192), 0.5)
    save_file(larger, tmp_path / "larger.safetensors")
    loaded, _, _ = load_backbone("vit_tiny_patch16_224", str(tmp_path / "larger.safetensors"))
    torch.testing.assert_close(loaded.vit.pos_embed, torch.full((1, 197, 192), 0.5))


def test_every_misfit_names_the_tensor_and_both_shapes() -> None:
    backbone = random_backbone(TINY)
    good = backbone.vit.state_dict()

    def refused(change: dict[str, torch.Tensor | None]) -> str:
        state = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(WeightsError) as caught:
            load_state(create_backbone(TINY), state, "w.pth")
        return str(caught.value)

    wrong = refused({"blocks.1.mlp.fc1.weight": torch.zeros(256, 32)})
    assert "blocks.1.mlp.fc1.weight" in wrong and "(256, 32)" in wrong and "(256, 64)" in wrong
    missing = refused({"blocks.2.attn.proj.bias": None})
    assert "blocks.2.attn.proj.bias" in missing and "(64,)" in missing
    unexpected = refused({"blocks.3.norm1.weight": torch.zeros(64)})
    assert "blocks.3.norm1.weight" in unexpected and "(64,)" in unexpected
    position = refused({"pos_embed": torch.zeros(1, 100, 64)})
    assert "pos_embed" in position and "(1, 100, 64)" in position and "(1, 1370, 64)" in position
    assert "NaN" in refused({"blocks.0.norm1.weight": torch.full((64,), float("nan"))})


def test_files_that_are_no_weights_are_refused(tmp_path: Any) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with (tmp_path / "evil.pth").open("wb") as stream:
        pickle.dump(print, stream)
    for name in ("text.pth", "text.safetensors", "empty.pth", "evil.pth"):
        with pytest.raises(WeightsError, match=name):
            read_state(tmp_path / name)
    with pytest.raises(MissingInputError, match="random:SEED"):
        load_backbone(TINY, str(tmp_path / "absent.pth"))
    with pytest.raises(UsageError, match="random:0"):
        load_backbone(TINY, "random:x")
    with pytest.raises(UsageError, match="--weights FILE"):
        load_backbone(TINY, "hub")


def test_a_failed_download_recommends_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub\nand much more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match="--weights FILE") as caught:
        load_backbone("vit_small_patch14_dinov2", "hub")
    assert "\n" not in str(caught.value)


# --- projection -------------------------------------------------------------------------------------------------------

def test_projection_is_principal_components_whatever_the_batches() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(500, 12)) * np.linspace(3, 0.1, 12) + 1000).astype(np.float32)
    whole = fit_projection([vectors], 12, 4)
    parts = fit_projection(np.array_split(vectors, 7), 12, 4)
    np.testing.assert_allclose(parts.components, whole.components, atol=1e-6)
    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(directions[:4].T * whole.components, axis=0)), 1, atol=1e-8)
    assert whole.explained_variance == pytest.approx((singular[:4] ** 2).sum() / (singular ** 2).sum())
    assert (whole.components[np.abs(whole.components).argmax(axis=0), range(4)] > 0).all()
    given = whole.as_linear()(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(given, centred @ whole.components, atol=2e-3)


def test_projection_needs_enough_varying_tokens() -> None:
    with pytest.raises(ExportError, match="cannot fix 4 channels"):
        fit_projection([np.ones((3, 8), np.float32)], 8, 4)
    flat = Covariance(8)
    flat.add(np.ones((100, 8), np.float32))
    with pytest.raises(ExportError, match="same features everywhere"):
        flat.principal(4)


def test_compact_features_do_not_change_with_brightness() -> None:
    backbone = create_backbone(TINY)
    randomise(backbone, 0)
    module = StridedViT(backbone, stride_px=7, tile_px=56, in_channels=1).eval()
    tile = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (1, 1, 56, 56), dtype=np.uint8))
    with torch.inference_mode():
        dark, bright = module.float_maps(tile)[0], module.float_maps(tile + 50)[0]
        harder = module.float_maps((tile.float() * 0.5).to(torch.uint8))[0]
    assert deviation(bright.numpy(), dark.numpy()).max_rel < 1e-4
    assert deviation(harder.numpy(), dark.numpy()).max_rel > 1e-2
