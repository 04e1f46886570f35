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
from phaseline.export.training.objectives import episode_loss, invariance_loss, sample_pixels
from phaseline.export.training.phantoms import MAX_PHASES, draw_material, render
from phaseline.export.training.samples import Pool, draw_episode, draw_pair, draw_pixels, make_pool, turned
from phaseline.export.training.upsampler import UpsamplerTask, UpsamplerTraining
from phaseline.export.training.views import View, averaged_pixels, turn_map, turned_back
from phaseline.export.weights import trained_projection
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


@pytest.mark.parametrize(("words", "message"), [
    (["backbone", "--images", "{none}"], "no folder of micrographs"),
    (["backbone", "--images", "{images}", "--architecture", "vit_small_patch14_dinov2"], "no compact ViT"),
    (["backbone", "--images", "{images}", "--device", "tpu"], "device is 'tpu'"),
    (["backbone", "--images", "{images}", "--provenance", "{none}"], "no provenance"),
    (["upsampler", "--backbone", "{none}", "--images", "{images}"], "no backbone at"),
    (["upsampler", "--backbone", "{none}", "--images", "{images}", "--target", "nearest"], "target is 'nearest'"),
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
