"""Training: data, objectives, checkpoints, the command, and what it refuses. Tiny sizes, real parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from phaseline.clients.__main__ import run
from phaseline.export.training.acquisition import draw_acquisition, record
from phaseline.export.training.backbone import BackboneTask, BackboneTraining
from phaseline.export.training.checkpoint import CHECKPOINT
from phaseline.export.training.loop import LOG, Schedule, train
from phaseline.export.training.maps import LAYOUT_MAPS, grey_maps, layout_maps
from phaseline.export.training.objectives import _ridge, episode_loss, invariance_loss, sample_pixels
from phaseline.export.training.phantoms import MAX_PHASES, draw_material, render
from phaseline.export.training.samples import Pool, draw_episode, draw_pair, draw_pixels, make_pool, turned
from phaseline.export.training.upsampler import UpsamplerTask, UpsamplerTraining, turn_onto_axes
from phaseline.export.training.views import View, averaged_pixels, turn_map, turned_back
from phaseline.export.upsampler_weights import load_upsampler, random_upsampler, save_upsampler
from phaseline.export.weights import trained_projection
from phaseline.runtime.bundle import describe_file
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import OutputExistsError, TrainingError, UsageError

TINY = BackboneTraining(architecture="vit-24-2-2-p14", channels=4, crop_px=42, tile_px=84, materials=4, episodes=2, pairs=1)


def micrographs(count: int = 2) -> list[U8]:
    return [np.random.default_rng(i).integers(0, 256, (96, 120), np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(4, 42, 0, micrographs())


def task(pool: Pool, training: BackboneTraining = TINY) -> BackboneTask:
    torch.set_num_threads(1)
    return BackboneTask(training, lambda: pool, micrographs(), torch.device("cpu"))


def test_materials_are_functions_of_the_seed_and_know_their_phases() -> None:
    for seed in range(12):
        random = np.random.default_rng(seed)
        material = draw_material(random, 2)
        grey, phases = render(material, 80, random, micrographs())
        assert grey.dtype == np.float32 and grey.shape == phases.shape == (80, 80)
        assert np.isfinite(grey).all()
        assert 2 <= len(material.phases) <= MAX_PHASES and phases.max() < len(material.phases)
        again = np.random.default_rng(seed)
        repeated = render(draw_material(again, 2), 80, again, micrographs())
        np.testing.assert_array_equal(grey, repeated[0])
        np.testing.assert_array_equal(phases, repeated[1])


def test_most_materials_show_more_than_one_phase() -> None:
    shown = [len(np.unique(phases)) for phases in make_pool(16, 60, 3, micrographs()).phases]
    assert np.mean(np.array(shown) > 1) > 0.9


def test_pool_does_not_depend_on_the_number_of_processes(pool: Pool) -> None:
    two = make_pool(4, 42, 0, micrographs(), workers=2)
    np.testing.assert_array_equal(pool.scenes, two.scenes)
    np.testing.assert_array_equal(pool.phases, two.phases)


def test_layout_maps_tell_thickness_borders_and_particles() -> None:
    phases = np.zeros((80, 80), np.uint8)
    phases[10:16, 10:70] = 1  # 6 px thick
    phases[30:70, 30:70] = 2  # 40 px thick
    maps = layout_maps(phases) / 255
    thick = maps[:4]
    assert maps.shape == (LAYOUT_MAPS, 80, 80)
    assert thick[0, 13, 40] == 1 and thick[1, 13, 40] == 0, "as thick as 2 px, not as 4"
    assert (thick[:, 50, 50] == 1).all(), "as thick as 16 px"
    near, far = maps[4:6, 50, 31], maps[4:6, 50, 50]
    assert (near > 2 * far).all() and near[0] < near[1]
    np.testing.assert_array_equal(maps[6], phases > 0)


def test_grey_maps_are_relative_to_the_field() -> None:
    phases = np.repeat(np.array([0, 1, 1, 2], np.uint8), 10)[None].repeat(8, axis=0)
    clean = np.random.default_rng(0).random((8, 40), dtype=np.float32) + phases
    grey, mean = grey_maps(clean, phases)
    assert abs(float(grey.mean())) < 1e-5 and float(grey.std()) == pytest.approx(1, abs=1e-4)
    for value in range(3):
        assert np.ptp(mean[phases == value]) < 1e-6
    assert mean[0, 0] < mean[0, 15] < mean[0, 35]
    np.testing.assert_allclose(grey_maps(3 * clean + 5, phases), grey_maps(clean, phases), atol=1e-4)


def test_channels_are_turned_onto_their_axes() -> None:
    upsampler = random_upsampler(0, channels=6, patch_px=7, hidden=4)
    image, features = torch.rand(2, 1, 42, 42) * 255, torch.rand(2, 6, 6, 6)
    with torch.inference_mode():
        before = upsampler(image, features).permute(0, 2, 3, 1).flatten(0, 2).double()
    turn_onto_axes(upsampler, before)
    with torch.inference_mode():
        after = upsampler(image, features).permute(0, 2, 3, 1).flatten(0, 2).double()
    covariance = torch.cov(after.T)
    spread = torch.diagonal(covariance)
    assert (spread[:-1] >= spread[1:] - 1e-9).all(), "the most varying first"
    assert (covariance - torch.diag(spread)).abs().max() < 1e-3 * spread[0], "uncorrelated"
    distances = [torch.pdist(x[::97]) for x in (before, after)]
    torch.testing.assert_close(*distances, rtol=1e-3, atol=1e-6)


def test_recordings_are_eight_bit_levels() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        image = record(random.random((40, 50), dtype=np.float32), draw_acquisition(random), random)
        assert image.dtype == np.float32 and 0 <= image.min() <= image.max() <= 1
        np.testing.assert_allclose(image * 255, np.round(image * 255), atol=1e-3)


def test_drawn_pixels_hold_every_phase_and_keep_off_the_border() -> None:
    phases = np.zeros((40, 40), np.uint8)
    phases[20, 20:22] = 2
    found = draw_pixels(phases, 64, 4, np.random.default_rng(0))
    assert found.shape == (64,) and set(phases.ravel()[found]) == {0, 2}
    assert (found // 40).min() >= 4 and (found % 40).max() < 36


def test_views_and_turns_are_undone() -> None:
    image = np.random.default_rng(0).random((2, 9, 9))
    for turn in range(8):
        maps = torch.from_numpy(image)
        np.testing.assert_array_equal(turned(image, turn), turn_map(maps, turn).numpy())
        np.testing.assert_array_equal(turned_back(turn_map(maps, turn), turn).numpy(), image)


def test_averaged_pixels_lie_where_they_were_seen() -> None:
    """With patches and strides of one pixel and the grey level as feature, the mean of all views is the image itself."""
    scenes = torch.from_numpy(np.random.default_rng(0).random((2, 1, 20, 20), dtype=np.float32))
    views = [View(row, col, turn) for row, col, turn in ((0, 4, 0), (4, 0, 3), (1, 2, 5), (3, 3, 6), (2, 2, 7))]
    found = averaged_pixels(scenes, views, 16, lambda crops: crops, patch_px=1, stride_px=1)
    seen = torch.isfinite(found)
    torch.testing.assert_close(found[seen], scenes[:, :, 2:18, 2:18][seen])
    assert seen.all(), "the view in the middle covers all"


def test_sampled_pixels_are_the_tokens_at_their_centres() -> None:
    maps = torch.arange(9.0).view(1, 1, 3, 3)
    # Patches of 3 px at stride 2: token (1, 2) is centred at pixel (3, 5).
    found = sample_pixels(maps, torch.tensor([[3, 2]]), torch.tensor([[5, 5]]), 3, 2)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([5.0, 3.5]))


def test_episodes_are_solved_by_features_that_tell_the_phases() -> None:
    labels = torch.tensor([[0, 1, 2] * 8])
    good = torch.nn.functional.one_hot(labels, 3).float()
    noise = torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(0))
    low, right = episode_loss(good, labels, good, labels, 5, torch.tensor(10.0))
    high, _ = episode_loss(noise, labels, noise.flip(1), labels, 5, torch.tensor(10.0))
    assert right == 1 and low < 0.05 < high


def test_queries_of_phases_without_support_are_left_out() -> None:
    support = torch.randn(1, 10, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1] * 5])
    loss, _ = episode_loss(support, labels, support, torch.full((1, 10), 0).index_fill(1, torch.tensor([9]), 4), 5,
                           torch.tensor(1.0))
    assert torch.isfinite(loss) and loss < 100


def test_invariance_is_least_for_equal_and_spread_views() -> None:
    random = torch.Generator().manual_seed(0)
    spread = torch.randn(400, 4, generator=random)
    collapsed = torch.zeros(400, 4)
    other = torch.randn(400, 4, generator=random)
    assert invariance_loss(spread, spread) < invariance_loss(collapsed, collapsed)
    assert invariance_loss(spread, spread) < invariance_loss(spread, other)


def test_ridge_is_the_same_from_either_side() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 12), generator=random)
    wide = torch.randn(2, 12, 30, generator=random)
    many = wide.repeat(1, 5, 1)
    query = torch.randn(2, 7, 30, generator=random)
    found = [episode_loss(points, labels.repeat(1, count), query, labels[:, :7], 5, torch.tensor(3.0))
             for points, count in ((wide, 1), (many, 5))]
    assert found[0][1] == pytest.approx(float(found[1][1]), abs=0.2)
    assert torch.isfinite(found[0][0]) and torch.isfinite(found[1][0])
    penalty = torch.full((2, 1, 1), 0.4)
    targets = torch.randn(2, 30, 3, generator=random)
    tall = torch.randn(2, 30, 8, generator=random)
    gram = tall @ tall.transpose(1, 2) + 0.4 * torch.eye(30)
    torch.testing.assert_close(_ridge(tall, targets, penalty), tall.transpose(1, 2) @ torch.linalg.solve(gram, targets),
                               rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tune_backbone", [False, True])
def test_upsampler_learns_from_generated_materials_alone(trained: Path, tmp_path: Path, tune_backbone: bool) -> None:
    """Without a target: episodes and maps; resumed, it is the training that was not stopped."""
    training = UpsamplerTraining(backbone=str(trained / "backbone.safetensors"), target="none", hidden=8, crop_px=56, tile_px=84,
                                 episodes=2, tune_backbone=tune_backbone)
    mapped = make_pool(3, 56, 0, micrographs(), maps=True)

    def begin() -> UpsamplerTask:
        torch.set_num_threads(1)
        return UpsamplerTask(training, lambda: mapped, micrographs(), torch.device("cpu"))

    schedule = Schedule(16, 3e-3, warmup=2, checkpoint_every=4)
    whole, halved = begin(), tmp_path / "halved"
    (tmp_path / "whole").mkdir()
    halved.mkdir()
    train(whole, schedule, tmp_path / "whole", seed=0, settings=whole.settings)
    log = [json.loads(line) for line in (tmp_path / "whole" / LOG).read_text().splitlines()]
    assert log[-1]["maps"] < log[0]["maps"] and {"episodes", "right"} < set(log[0]) and "target" not in log[0]

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(begin(), schedule, halved, seed=0, settings=whole.settings, progress=stop)
    resumed = begin()
    train(resumed, schedule, halved, seed=0, settings=whole.settings, resume=True)
    whole.finish()
    resumed.finish()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    first = begin().backbone_state()
    changed = [name for name, tensor in whole.backbone_state().items() if not torch.equal(tensor, first[name])]
    assert bool(changed) == tune_backbone and "projection.weight" not in changed
    for name, tensor in whole.backbone_state().items():
        assert torch.equal(tensor, resumed.backbone_state()[name]), name


def test_training_needs_something_to_learn(trained: Path) -> None:
    with pytest.raises(UsageError, match="nothing is left to learn"):
        UpsamplerTraining(backbone=str(trained), target="none", episode_weight=0, map_weight=0)


def test_training_lowers_the_loss(pool: Pool, tmp_path: Path) -> None:
    class OneBatch(BackboneTask):
        def loss(self, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            return super().loss(np.random.default_rng(0))

    train(OneBatch(TINY, lambda: pool, micrographs(), torch.device("cpu")), Schedule(90, 3e-3, warmup=5, checkpoint_every=30),
          tmp_path, seed=0, settings={})
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in log] == [30, 60, 90]
    assert log[2]["episodes"] < log[0]["episodes"] and log[2]["invariance"] < log[0]["invariance"]


def test_a_stopped_training_goes_on_as_if_it_had_not_been(pool: Pool, tmp_path: Path) -> None:
    schedule = Schedule(8, 1e-3, warmup=2, checkpoint_every=4)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for folder in (whole, halved):
        folder.mkdir()
    straight = task(pool)
    train(straight, schedule, whole, seed=5, settings={"a": 1})

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task(pool), schedule, halved, seed=5, settings={"a": 1}, progress=stop)
    resumed = task(pool)
    train(resumed, schedule, halved, seed=5, settings={"a": 1}, resume=True)
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    logs = [[{**json.loads(line), "seconds_a_step": 0} for line in (folder / LOG).read_text().splitlines()]
            for folder in (whole, halved)]
    assert logs[0] == logs[1]
    with pytest.raises(TrainingError, match="a was 1 and is 2"):
        train(task(pool), schedule, halved, seed=5, settings={"a": 2}, resume=True)


def test_a_damaged_checkpoint_is_told(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="cannot be read"):
        train(task(pool), Schedule(2, 1e-3), tmp_path, seed=0, settings={}, resume=True)


@pytest.mark.parametrize(("change", "words"), [
    ({"crop_px": 43}, "crop is 43"), ({"architecture": "vit_small_patch14_dinov2"}, "no compact ViT"),
    ({"materials": 0}, "materials is 0"), ({"crop_px": 98}, "at most 84"),
])
def test_impossible_backbones_are_refused(pool: Pool, change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        task(pool, BackboneTraining(**{**TINY.__dict__, **change}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for index, pixels in enumerate(micrographs()):
        Image.fromarray(np.tile(pixels, (2, 2))).save(folder / "sub" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `phaseline train backbone`."""
    out = tmp_path_factory.mktemp("training") / "backbone"
    provenance = images / "provenance.md"
    provenance.write_text("Noise, of nobody's.")
    assert run(["train", "backbone", "--images", str(images), "--no-bundled", "--out", str(out), "--architecture",
                "vit-24-2-2-p14", "--channels", "4", "--steps", "2", "--materials", "2", "--threads", "1", "--quiet",
                "--provenance", str(provenance)]) == 0
    return out


def test_backbone_command_writes_weights_and_card(trained: Path) -> None:
    state = load_file(trained / "backbone.safetensors")
    projection = trained_projection(str(trained / "backbone.safetensors"))
    assert projection is not None and projection.shape == (4, 24)
    assert state["pos_embed"].dtype == torch.float16 and state["blocks.0.norm1.weight"].dtype == torch.float32
    card = (trained / "MODEL_CARD.md").read_text()
    for words in ("vit-24-2-2-p14", "Noise, of nobody's.", "| sub | 2 |", "SHA-256", "| seed | 0 |"):
        assert words in card


@pytest.mark.parametrize("target", ["averaged", "implicit"])
def test_upsampler_learns_its_target(trained: Path, tmp_path: Path, target: str) -> None:
    training = UpsamplerTraining(backbone=str(trained / "backbone.safetensors"), target=target,  # type: ignore[arg-type]
                                 episode_weight=0, map_weight=0, hidden=8, crop_px=56, tile_px=84, scenes=2, views=2,
                                 implicit_images=2)
    def no_pool() -> Pool:
        raise AssertionError("without episodes no material is needed")

    upsampler = UpsamplerTask(training, no_pool, micrographs(), torch.device("cpu"))
    train(upsampler, Schedule(12, 3e-3, warmup=2, checkpoint_every=4), tmp_path, seed=0, settings=upsampler.settings)
    losses = [json.loads(line)["target"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_upsampler_command_makes_what_export_takes(trained: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "upsampler"
    assert run(["train", "upsampler", "--backbone", str(trained / "backbone.safetensors"), "--images", str(images), "--out",
                str(out), "--no-bundled", "--steps", "2", "--materials", "2", "--hidden", "8", "--threads", "1", "--quiet"]) == 0
    bundle = tmp_path / "bundle"
    assert run(["export", "vit-24-2-2-p14", "--weights", str(trained / "backbone.safetensors"), "--channels", "4", "--stride",
                "14", "--tile", "56", "--upsampler", str(out / "upsampler.safetensors"), "--card", str(out / "MODEL_CARD.md"),
                "--out", str(bundle), "--quiet"]) == 0
    spec = json.loads((bundle / "bundle.json").read_text())
    assert spec["trained"] and spec["projection"]["source"] == "trained with the backbone"
    assert spec["pixel_channels"] == 4 and spec["card"] == "MODEL_CARD.md"


def test_upsampler_goes_on_from_another_and_tunes_its_backbone(trained: Path, images: Path, tmp_path: Path) -> None:
    common = ["train", "upsampler", "--images", str(images), "--no-bundled", "--materials", "2", "--threads", "1", "--quiet",
              "--target", "none"]
    first, out = tmp_path / "first", tmp_path / "out"
    backbone = trained / "backbone.safetensors"
    assert run([*common, "--steps", "1", "--hidden", "8", "--backbone", str(backbone), "--out", str(first)]) == 0
    assert not (first / "backbone.safetensors").exists()
    start = first / "upsampler.safetensors"
    words = [*common, "--backbone", str(backbone), "--start", str(start), "--tune-backbone", "--learning-rate", "1e-6"]
    assert run([*words, "--steps", "2", "--out", str(out)]) == 0
    before, after = load_file(backbone), load_file(out / "backbone.safetensors")
    assert before.keys() == after.keys()
    torch.testing.assert_close(before["projection.weight"], after["projection.weight"], rtol=0, atol=0)
    moved = {name: float((after[name].float() - before[name].float()).abs().max()) for name in before}
    assert 0 < max(moved.values()) < 1e-3
    # Rotated onto other axes at the end, but still the network that it started from, not a random one of another width.
    one, other = load_upsampler(start), load_upsampler(out / "upsampler.safetensors")
    assert one.config == other.config
    kernel = "upsampler.inp_conv.double_conv.0.weight"
    torch.testing.assert_close(one.state_dict()[kernel], other.state_dict()[kernel], rtol=0, atol=1e-3)
    card = (out / "MODEL_CARD.md").read_text()
    assert f"| start | {describe_file(start).sha256} |" in card
    assert "| tune_backbone | True |" in card and "| hidden | 8 |" in card


@pytest.mark.parametrize("change", [{"channels": 6}, {"patch_px": 7}])
def test_an_upsampler_of_other_sizes_is_no_start(trained: Path, tmp_path: Path, change: dict[str, int]) -> None:
    other = random_upsampler(0, **{"channels": 4, "patch_px": 14, **change}, hidden=8)
    save_upsampler(other, other.config, tmp_path / "other.safetensors")
    training = UpsamplerTraining(backbone=str(trained / "backbone.safetensors"), start=str(tmp_path / "other.safetensors"),
                                 crop_px=56, tile_px=84)
    with pytest.raises(UsageError, match="expected 4 and 14, as"):
        UpsamplerTask(training, lambda: pytest.fail("no material is needed"), micrographs(), torch.device("cpu"))


@pytest.mark.parametrize(("words", "message"), [
    (["backbone", "--images", "{none}"], "no folder of micrographs"),
    (["backbone", "--images", "{images}", "--architecture", "vit_small_patch14_dinov2"], "no compact ViT"),
    (["backbone", "--images", "{images}", "--device", "tpu"], "device is 'tpu'"),
    (["backbone", "--images", "{images}", "--provenance", "{none}"], "no provenance"),
    (["upsampler", "--backbone", "{none}", "--images", "{images}"], "no backbone at"),
    (["upsampler", "--backbone", "{none}", "--images", "{images}", "--target", "nearest"], "target is 'nearest'"),
    (["upsampler", "--backbone", "{none}", "--images", "{images}", "--tune-backbone"], "use --target none"),
])
def test_wrong_calls_get_one_line(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
                                  ) -> None:
    asked = [word.format(none=tmp_path / "none", images=images) for word in words]
    assert run(["train", *asked, "--no-bundled", "--out", str(tmp_path / "out"), "--materials", "1", "--quiet"]) == 2
    assert message in capfd.readouterr().err


def test_nothing_is_overwritten_unasked(trained: Path, images: Path, tmp_path: Path) -> None:
    words = ["train", "backbone", "--images", str(images), "--no-bundled", "--steps", "1", "--materials", "1", "--quiet"]
    before = (trained / "backbone.safetensors").read_bytes()
    assert run([*words, "--out", str(trained)]) == 2
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert run([*words, "--out", str(foreign), "--overwrite"]) == 2
    assert (trained / "backbone.safetensors").read_bytes() == before and (foreign / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputExistsError):
        from phaseline.export.training.loop import prepare_folder

        prepare_folder(foreign, resume=False, overwrite=False)
    assert run([*words, "--out", str(tmp_path / "new"), "--resume"]) == 1


def test_a_pair_shows_one_place_twice() -> None:
    views, turns = draw_pair(micrographs(), 42, np.random.default_rng(0))
    assert views.shape == (2, 42, 42) and len(turns) == 2


def test_an_episode_shows_two_fields(pool: Pool) -> None:
    episode = draw_episode(pool, 42, np.random.default_rng(0))
    assert episode.images.shape == episode.phases.shape == (2, 42, 42) and episode.maps is None
