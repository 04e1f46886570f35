"""Rendering model repositories, the store of recipes, and publishing, without a server."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from phaseline.clients.__main__ import run
from phaseline.clients.recipe import recipe_files
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.errors import (
    EngineUnavailableError,
    MissingInputError,
    RecipeError,
    ServerRefusedError,
    UsageError,
)
from phaseline.runtime.source import pixel_batch
from phaseline.triton_models import installation
from phaseline.triton_models.installation import Installation, find_server
from phaseline.triton_models.publisher import Publisher
from phaseline.triton_models.repository import Deployment, render_networks, render_segment
from phaseline.triton_models.store import RecipeStore
from tests.serving import fit_recipe, frame, without_upsampler


def read(folder: Path) -> pb.ModelConfig:
    """A rendered configuration, by the protobuf definition: an unknown field or a wrong type fails."""
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), pb.ModelConfig())


MODELS = ("backbone", "features")


def check_network(repository: Path, model: str, spec: BundleSpec) -> pb.ModelConfig:
    """What the configuration of either model promises, whatever the back end."""
    config = read(repository / model)
    most = {"backbone": spec.max_batch, "features": pixel_batch(spec)}[model]
    assert (config.name, config.max_batch_size) == (model, most)
    (tiles,) = config.input
    assert (tiles.name, tiles.data_type, list(tiles.dims)) == (
        "tiles", pb.TYPE_UINT8, [spec.in_channels, spec.tile_px, spec.tile_px])
    assert {output.name: (output.data_type, list(output.dims)) for output in config.output} == {
        "backbone": {"patch_features": (pb.TYPE_FP16, [spec.channels, spec.grid, spec.grid]),
                     "attention": (pb.TYPE_FP16, [spec.heads, spec.grid, spec.grid])},
        "features": {"pixel_features": (pb.TYPE_FP16, [spec.pixel_channels, spec.tile_px, spec.tile_px])}}[model]
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds > 0
    assert (batching.priority_levels, batching.default_priority_level) == (2, 1)
    policy = batching.default_queue_policy
    assert policy.timeout_action == policy.REJECT
    assert policy.max_queue_size > 0 and policy.default_timeout_microseconds > 0 and policy.allow_timeout_override
    (warm_up,) = config.model_warmup
    assert warm_up.batch_size == most and list(warm_up.inputs["tiles"].dims) == list(tiles.dims)
    assert BundleSpec.from_json(config.parameters["bundle"].string_value) == spec
    return config


@pytest.mark.parametrize("model", MODELS)
def test_networks_for_the_python_back_end(tiny_bundle: Bundle, tmp_path: Path, model: str) -> None:
    render_networks(Deployment(tiny_bundle, threads=3), tmp_path)
    config = check_network(tmp_path, model, tiny_bundle.spec)
    assert config.backend == "python" and config.parameters["threads"].string_value == "3"
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert (tmp_path / model / "1" / "model.py").is_file()


def test_without_upsampler_there_is_one_network(tiny_bundle: Bundle, tmp_path: Path) -> None:
    render_networks(Deployment(without_upsampler(tiny_bundle, tmp_path / "bare")), tmp_path / "repository")
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["backbone"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("device", "kind", "accelerators"), [
    ("auto", pb.ModelInstanceGroup.KIND_CPU, []),
    ("cuda", pb.ModelInstanceGroup.KIND_GPU, []),
    ("tensorrt", pb.ModelInstanceGroup.KIND_GPU, ["tensorrt"]),
])
def test_networks_for_native_onnxruntime(
    tiny_bundle: Bundle, tmp_path: Path, device: Any, kind: int, accelerators: list[str], model: str
) -> None:
    render_networks(Deployment(tiny_bundle, "onnxruntime", device), tmp_path)
    config = check_network(tmp_path, model, tiny_bundle.spec)
    assert config.backend == "onnxruntime" and config.instance_group[0].kind == kind
    chosen = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in chosen] == accelerators
    # What Triton would load works, with the names and types that the configuration promises.
    session = onnxruntime.InferenceSession(tmp_path / model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in config.output]
    assert {tensor.name for tensor in session.get_outputs()} == set(names)
    tile = np.zeros((2, *config.input[0].dims), np.uint8)
    for output, found in zip(config.output, session.run(names, {"tiles": tile}), strict=True):
        assert found.dtype == np.float16
        assert list(found.shape) == [2, *output.dims]


def test_networks_for_native_tensorrt(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plans = {model: tmp_path / f"{model}.plan" for model in MODELS}
    for model, plan in plans.items():
        plan.write_text(f"of {model}")
    deployment = Deployment(tiny_bundle, "tensorrt", plan=plans["backbone"], features_plan=plans["features"])
    render_networks(deployment, tmp_path / "repository")
    for model in MODELS:
        config = check_network(tmp_path / "repository", model, tiny_bundle.spec)
        assert config.backend == "tensorrt" and config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
        assert (tmp_path / "repository" / model / "1" / "model.plan").read_text() == f"of {model}"


@pytest.mark.parametrize(("changes", "words"), [
    ({"backend": "openvino"}, "expected one of python, onnxruntime, tensorrt"),
    ({"device": "tpu"}, "expected one of auto"),
    ({"threads": 0}, "at least 1"),
    ({"backend": "tensorrt"}, "needs --plan"),
    ({"plan": Path("a.plan")}, "no other back end takes one"),
    ({"backend": "tensorrt", "plan": Path("missing.plan")}, "needs --features-plan too if the bundle has an upsampler"),
    ({"features_plan": Path("a.plan")}, "nothing else takes one"),
    ({"backend": "tensorrt", "plan": Path("missing.plan"), "features_plan": Path("b.plan")}, "no plan at missing.plan"),
])
def test_impossible_deployments(tiny_bundle: Bundle, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Deployment(tiny_bundle, **changes)


@pytest.fixture
def store(tmp_path: Path) -> RecipeStore:
    return RecipeStore(tmp_path / "store")


def test_a_recipe_becomes_a_model(tiny_bundle: Bundle, recipes: dict[str, Path], store: RecipeStore, tmp_path: Path) -> None:
    version = store.add("cells", recipe_files(recipes["deep"]))
    render_segment(Deployment(tiny_bundle, threads=4, instances=2), tmp_path / "repository", store, "cells", version)
    config = read(tmp_path / "repository" / "segment_cells")
    assert [(i.name, i.data_type, list(i.dims), i.optional) for i in config.input] == [
        ("image_uint8", pb.TYPE_UINT8, [-1, -1], True), ("image_uint16", pb.TYPE_UINT16, [-1, -1], True),
        ("image_float32", pb.TYPE_FP32, [-1, -1], True)]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("labels", pb.TYPE_UINT8, [-1, -1]), ("confidence", pb.TYPE_UINT8, [-1, -1])]
    assert list(config.version_policy.specific.versions) == [1]
    assert config.instance_group[0].count == 2 and config.parameters["threads"].string_value == "2"
    recipe = json.loads(config.parameters["recipe"].string_value)
    assert recipe["bundle"] == tiny_bundle.hash and recipe["window_kind"] == "uint16" and recipe["image_channels"] == 1
    assert config.dynamic_batching.priority_levels == 2


def test_label_values_above_255_are_sent_as_uint16(tiny_bundle: Bundle, store: RecipeStore, tmp_path: Path) -> None:
    fit_recipe(None, values=(7, 300)).save(tmp_path / "wide")
    version = store.add("wide", recipe_files(tmp_path / "wide"))
    render_segment(Deployment(tiny_bundle), tmp_path / "repository", store, "wide", version)
    assert read(tmp_path / "repository" / "segment_wide").output[0].data_type == pb.TYPE_UINT16


def test_recipes_that_cannot_be_served(tiny_bundle: Bundle, recipes: dict[str, Path], store: RecipeStore, tmp_path: Path) -> None:
    version = store.add("cells", recipe_files(recipes["deep"]))
    other = dataclasses.replace(tiny_bundle, hash="f" * 64)
    with pytest.raises(RecipeError, match="this server serves bundle ffffffffffff"):
        render_segment(Deployment(other), tmp_path / "repository", store, "cells", version)
    assert not (tmp_path / "repository").exists()
    signed = fit_recipe(None)
    signed = dataclasses.replace(signed, window=dataclasses.replace(signed.window, kind="int32"))
    signed.save(tmp_path / "signed")
    version = store.add("signed", recipe_files(tmp_path / "signed"))
    with pytest.raises(RecipeError, match="fitted on int32 images, but frames are sent as uint8, uint16, float32"):
        render_segment(Deployment(tiny_bundle), tmp_path / "repository", store, "signed", version)


def test_versions_are_numbered_and_never_again(recipes: dict[str, Path], store: RecipeStore) -> None:
    files = recipe_files(recipes["classical"])
    assert [store.add("a", files), store.add("a", files), store.add("b", files)] == [1, 2, 1]
    assert store.find("a", files) == 2 and store.find("c", files) is None and store.find("a", {}) is None
    assert store.current("a") is None
    store.serve("a", 2)
    store.discard("a", 2)
    assert store.add("a", files) == 3
    again = RecipeStore(store.folder)
    assert again.names() == ["a", "b"] and again.versions("a") == [1, 3] and again.current("a") == 2
    assert again.settings("a", 3).hash == again.settings("b", 1).hash
    with pytest.raises(MissingInputError, match="no version 2, only 1, 3"):
        again.settings("a", 2)


@pytest.mark.parametrize(("change", "words"), [
    (lambda files: files.pop("recipe.json"), "with recipe.json"),
    (lambda files: files.update({"../evil": b""}), "expected plain names"),
    (lambda files: files.update({"extra": b""}), "expected those that recipe.json lists"),
    (lambda files: files.pop("classifier.ubj"), "expected those that recipe.json lists"),
    (lambda files: files.update({"recipe.json": b"{}"}), "is this a recipe"),
    (lambda files: files.update({"recipe.json": files["recipe.json"].replace(b"uint16", b"uint8 ")}), "its own hash"),
])
def test_the_store_refuses(recipes: dict[str, Path], store: RecipeStore, change: Any, words: str) -> None:
    files = recipe_files(recipes["classical"])
    change(files)
    with pytest.raises((UsageError, RecipeError), match=words):
        store.add("a", files)
    assert store.names() == [] and list(store.folder.glob("a/*")) == list(store.folder.glob("a/.new*")) == []


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a" * 64, "a b"])
def test_names_that_cannot_be_served(name: str, recipes: dict[str, Path], store: RecipeStore) -> None:
    with pytest.raises(UsageError, match="cannot be served; expected 1 to 63"):
        store.add(name, recipe_files(recipes["classical"]))


class Loader:
    """Triton's part in publishing: notes what is loaded, and fails when told."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.fails, self.tried = repository, False, 0
        self.loaded: dict[str, int] = {}

    def trial(self, folder: Path) -> None:
        assert (folder / "recipe.json").is_file()
        self.tried += 1

    def load(self, model: str) -> None:
        if self.fails:
            raise RuntimeError("load failed\nfor some reason")
        (version,) = read(self.repository / model).version_policy.specific.versions
        self.loaded[model] = version

    def unload(self, model: str) -> None:
        del self.loaded[model]


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path / "repository")


@pytest.fixture
def publisher(tiny_bundle: Bundle, store: RecipeStore, loader: Loader) -> Publisher:
    return Publisher(Deployment(tiny_bundle), loader.repository, store, loader.trial, loader.load, loader.unload, "secret", "own")


def ask(publisher: Publisher, action: str, name: str = "cells", **more: Any) -> dict[str, Any]:
    files = more.pop("files", {})
    return publisher.answer({"action": action, "name": name, "key": "secret", **more}, files)


def test_publish_roll_back_withdraw(publisher: Publisher, loader: Loader, recipes: dict[str, Path]) -> None:
    first = ask(publisher, "publish", files=recipe_files(recipes["deep"]))
    assert first["version"] == 1 and first["changed"] and loader.loaded == {"segment_cells": 1}
    same = ask(publisher, "publish", files=recipe_files(recipes["deep"]))
    assert (same["version"], same["changed"], same["versions"]) == (1, False, [1])
    second = ask(publisher, "publish", files=recipe_files(recipes["classical"]))
    assert second["version"] == 2 and loader.loaded == {"segment_cells": 2}
    assert ask(publisher, "rollback")["version"] == 1 and loader.loaded == {"segment_cells": 1}
    assert ask(publisher, "rollback", version=2)["version"] == 2
    with pytest.raises(MissingInputError, match="no version 3"):
        ask(publisher, "rollback", version=3)
    ask(publisher, "rollback")
    with pytest.raises(UsageError, match="no version before 1"):
        ask(publisher, "rollback")
    gone = ask(publisher, "withdraw")
    assert gone["version"] is None and gone["versions"] == [1, 2] and loader.loaded == {}
    assert not (loader.repository / "segment_cells").exists()
    assert publisher.answer({"action": "list"}, {})["recipes"] == [{k: v for k, v in gone.items() if k != "changed"}]


def test_a_version_that_does_not_load_changes_nothing(publisher: Publisher, loader: Loader, recipes: dict[str, Path]) -> None:
    ask(publisher, "publish", files=recipe_files(recipes["deep"]))
    loader.fails = True
    with pytest.raises(RecipeError, match=r"load failed for some reason\); version 1 goes on serving"):
        ask(publisher, "publish", files=recipe_files(recipes["classical"]))
    assert list(read(loader.repository / "segment_cells").version_policy.specific.versions) == [1]
    assert publisher.store.versions("cells") == [1] and publisher.store.current("cells") == 1
    with pytest.raises(RecipeError, match="nothing is served under this name"):
        ask(publisher, "publish", "other", files=recipe_files(recipes["classical"]))
    assert not (loader.repository / "segment_other").exists()


def test_a_stored_recipe_of_another_bundle_is_not_loaded(
    publisher: Publisher, loader: Loader, recipes: dict[str, Path], tiny_bundle: Bundle
) -> None:
    ask(publisher, "publish", files=recipe_files(recipes["classical"]))
    ask(publisher, "publish", "deep", files=recipe_files(recipes["deep"]))
    other = dataclasses.replace(publisher, deployment=Deployment(dataclasses.replace(tiny_bundle, hash="f" * 64)))
    loader.loaded.clear()
    with pytest.raises(RecipeError, match="this server serves bundle ffffffffffff"):
        other.answer({"action": "load", "name": "deep", "key": "own"}, {})
    assert other.answer({"action": "load", "name": "cells", "key": "own"}, {})["version"] == 1
    assert loader.loaded == {"segment_cells": 1}
    with pytest.raises(UsageError, match="'nothing' is not served; served: cells, deep"):
        other.answer({"action": "load", "name": "nothing", "key": "own"}, {})


def test_a_version_is_tried_once_and_again_before_it_is_reloaded(
    publisher: Publisher, loader: Loader, recipes: dict[str, Path]
) -> None:
    ask(publisher, "publish", files=recipe_files(recipes["classical"]))
    publisher.answer({"action": "load", "name": "cells", "key": "own"}, {})
    assert loader.tried == 1
    publisher.answer({"action": "reload", "model": "segment_cells", "key": "own"}, {})
    assert loader.tried == 2
    (publisher.store.path("cells") / ".tried.1").write_text("with other packages")
    publisher.answer({"action": "load", "name": "cells", "key": "own"}, {})
    assert loader.tried == 3


def test_the_store_passes_over_what_is_no_recipe(recipes: dict[str, Path], store: RecipeStore) -> None:
    for name in ("lost+found", "A", ".hidden"):
        (store.folder / name / "1").mkdir(parents=True)
    (store.folder / "file").touch()
    store.add("a", recipe_files(recipes["classical"]))
    assert store.names() == ["a"]


def test_the_store_is_locked_and_swept(
    recipes: dict[str, Path], store: RecipeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phaseline.triton_models.store.LOCK_TIMEOUT_S", 0.3)
    (store.folder / "a" / ".new.cut").mkdir(parents=True)
    with store.locked():
        assert not list(store.folder.glob("*/.new.*"))
        with pytest.raises(UsageError, match="belongs to another running server"), store.locked():
            pass
    with store.locked():
        pass


@pytest.mark.parametrize(("request_", "error", "words"), [
    ({"action": "publish", "name": "a"}, ServerRefusedError, "needs this server's key, and none came"),
    ({"action": "publish", "name": "a", "key": "wrong"}, ServerRefusedError, "a wrong one came"),
    ({"action": "load", "name": "a", "key": "secret"}, ServerRefusedError, "load needs"),
    ({"action": "reload", "model": "backbone"}, ServerRefusedError, "reload needs"),
    ({"action": "reload", "model": "../x", "key": "own"}, UsageError, "not in this server's repository"),
    ({"action": "reload", "model": "nothing", "key": "own"}, UsageError, "not in this server's repository"),
    ({"action": "explode"}, UsageError, "expected publish, rollback"),
    ({}, UsageError, r"action .None. came"),
    ({"action": "publish", "key": "secret"}, UsageError, "name is None"),
    ({"action": "withdraw", "name": "a", "key": "secret"}, UsageError, "is not served; served: none"),
    ({"action": "rollback", "name": "a", "key": "secret"}, UsageError, "no version before"),
])
def test_requests_that_are_refused(publisher: Publisher, request_: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        publisher.answer(request_, {})


def test_no_server_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailableError, match=r"no tritonserver on PATH, and nvidia-pytriton is not .*\[server\]"):
        find_server()


def test_numpy_2_is_refused_for_the_wheel(monkeypatch: pytest.MonkeyPatch, needs_triton: None) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(installation, "version", lambda name: "2.1.0")
    with pytest.raises(EngineUnavailableError, match="gives empty outputs without an error; pip install 'numpy<2'"):
        find_server()


def test_the_one_on_path_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    for backend in ("python", "onnxruntime"):
        (tmp_path / "backends" / backend).mkdir(parents=True)
    monkeypatch.setattr(shutil, "which", lambda name: str(binary))
    found = find_server()
    assert found.binary == binary.resolve() and found.stub is None
    found.check("onnxruntime")
    with pytest.raises(EngineUnavailableError, match="has the back ends onnxruntime, python, and tensorrt is needed"):
        found.check("tensorrt")


def test_the_wheel_has_no_native_back_ends(needs_triton: None) -> None:
    found = find_server()
    if found.stub is None:
        pytest.skip("a tritonserver of another origin is on PATH")
    assert found.description == f"nvidia-pytriton {importlib.metadata.version('nvidia-pytriton')}"
    with pytest.raises(EngineUnavailableError, match="use --backend python, or NVIDIA's container"):
        found.check("onnxruntime")


def test_an_empty_installation_has_no_back_end(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="the back ends none"):
        Installation(tmp_path, tmp_path / "none", None).check("python")


def test_rendering_only(
    tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", str(tiny_bundle.path), "--recipe", f"cells={recipes['deep']}", "--render", str(tmp_path / "out")]
    assert run(arguments) == 0
    assert "tritonserver --model-repository=" in capsys.readouterr().err
    config = read(tmp_path / "out" / "repository" / "segment_cells")
    assert (Path(config.parameters["path"].string_value) / "1" / "recipe.json").is_file()
    assert sorted(path.name for path in (tmp_path / "out" / "repository").iterdir()) == ["backbone", "features", "segment_cells"]
    assert run(arguments) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["--recipe", "A=x"], "recipe name 'A' cannot be served"),
    (["--recipe", "a=x", "--recipe", "a=y"], "two recipes are named 'a'"),
    (["--tls-cert", "x.pem"], "TLS needs both"),
    (["--tls-client-ca", "x.pem"], "mutual TLS needs all three"),
    (["--publish-key", "missing"], "no file at missing"),
    (["--backend", "magic"], "back end is 'magic'"),
    (["--device", "tpu"], "device is 'tpu'"),
    (["--bind", "not an address"], "grpc cannot listen on not an address"),
    (["--grpc-port", "7", "--http-port", "7"], "expected different ones"),
    (["--bind", "::1"], "is no IPv4 address or name"),
    (["--bind", "0.0.0.0", "--shared-memory"], "everybody could name regions"),
])
def test_mistakes_on_the_command_line(
    tiny_bundle: Bundle, needs_triton: None, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = [] if "--grpc-port" in arguments else ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    assert run(["serve", str(tiny_bundle.path), *arguments, *ports]) == 2
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("phaseline: "))
    assert words in message


def test_frames_are_reproducible() -> None:
    assert np.array_equal(frame(1), frame(1)) and not np.array_equal(frame(1), frame(2))
