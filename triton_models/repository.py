"""Rendering a Triton model repository: templates of this folder + bundle, recipes and machine → folders that Triton loads.

    REPOSITORY/backbone/config.pbtxt, 1/model.py            or 1/model.onnx, 1/model.plan
    REPOSITORY/features/…                                   the same, if the bundle has an upsampler
    REPOSITORY/recipes/config.pbtxt, 1/model.py
    REPOSITORY/segment_NAME/config.pbtxt, VERSION/model.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, assert_never, get_args

from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import ATTENTION, PATCH_FEATURES, PIXEL_FEATURES, TILES, BundleSpec
from phaseline.runtime.engine import DEVICES, Device
from phaseline.runtime.errors import BundleError, MissingExtraError, MissingInputError, RecipeError, UsageError
from phaseline.runtime.protocol import (
    BACKBONE,
    BUNDLE_PARAMETER,
    FEATURES,
    IMAGE_INPUTS,
    LABELS,
    MAX_PIXELS_PARAMETER,
    MAX_PLANES,
    RECIPE_PARAMETER,
    RECIPES,
    network_models,
    segment_model,
)
from phaseline.runtime.source import pixel_batch
from phaseline.triton_models.store import RecipeStore

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

Backend = Literal["python", "onnxruntime", "tensorrt"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
TEMPLATES = Path(__file__).parent
CONFIG = "config.pbtxt"
PLANS = ("plan", "features_plan")


@dataclass(frozen=True)
class Deployment:
    """How a machine serves a bundle.

    Attributes
    ----------
    bundle
        The bundle of `backbone` and `features`.
    backend
        What runs its graphs: ``python`` (ONNX Runtime inside Triton's Python back end; anywhere), or Triton's own ``onnxruntime``
        or ``tensorrt`` (NVIDIA's container).
    device
        ``auto``, ``cpu``, ``cuda`` or ``tensorrt``: of the Python back end's engine, of the native ONNX Runtime's instances
        (``auto`` is the CPU there), and of the classifiers.
    threads
        CPU threads of `backbone`, and as many of `features`; the instances of a `segment_NAME` share as many.
    instances
        Processes of each `segment_NAME`, which work on frames side by side.
    max_pixels
        The most pixels in one request to `segment_NAME`.
    plan
        For ``tensorrt``: the plan that `phaseline export --engine tensorrt` built on this kind of GPU, of the backbone.
    features_plan
        Likewise the one of pixel features, if the bundle has an upsampler.
    """

    bundle: Bundle
    backend: Backend = "python"
    device: Device = "auto"
    threads: int = 1
    instances: int = 1
    max_pixels: int = 1 << 26
    plan: Path | None = None
    features_plan: Path | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"back end is {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        if self.device not in DEVICES:
            raise UsageError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        for name in ("threads", "instances", "max_pixels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if (self.backend == "tensorrt") != (self.plan is not None):
            raise UsageError("--backend tensorrt needs --plan, and no other back end takes one; build it on this kind of GPU "
                             "with phaseline export --engine tensorrt")
        if (self.backend == "tensorrt" and self.bundle.spec.has_upsampler) != (self.features_plan is not None):
            raise UsageError("--backend tensorrt needs --features-plan too if the bundle has an upsampler, and nothing else "
                             "takes one; build it on this kind of GPU with phaseline export --engine tensorrt")
        for plan in (self.plan, self.features_plan):
            if plan is not None and not plan.is_file():
                raise MissingInputError(f"no plan at {plan}; build it with phaseline export --engine tensorrt")


def default_instances(cores: int) -> int:
    """Instances of each recipe: one for every four cores, four at most, since each holds the classifier in memory."""
    return max(1, min(4, cores // 4))


def render_networks(deployment: Deployment, repository: Path) -> None:
    """Write the models that run the bundle's graphs: `backbone`, and `features` if there is an upsampler.

    Raises
    ------
    BundleError
        The bundle has no graph that the back end can run.
    """
    for model in network_models(deployment.bundle.spec):
        _render_network(deployment, repository, model)


def _render_network(deployment: Deployment, repository: Path, model: str) -> None:
    bundle, spec = deployment.bundle, deployment.bundle.spec
    config = _template(BACKBONE)
    config.name = model
    config.max_batch_size = pixel_batch(spec) if model == FEATURES else spec.max_batch
    tiles = [spec.in_channels, spec.tile_px, spec.tile_px]
    config.input[0].dims.extend(tiles)
    for name, dims in _outputs(spec, model).items():
        config.output.add(name=name, data_type=data_type("FP16"), dims=dims)
    _set(config, BUNDLE_PARAMETER, spec.to_json())
    warm_up = config.model_warmup.add(name="a full batch", batch_size=config.max_batch_size)
    warm_up.inputs[TILES].data_type = config.input[0].data_type
    warm_up.inputs[TILES].dims.extend(tiles)
    warm_up.inputs[TILES].zero_data = True
    folder = _new_model(repository, model)
    version = folder / "1"
    version.mkdir()
    match deployment.backend:
        case "python":
            config.backend = "python"
            _instances(config, 1)
            for name, value in (("path", str(bundle.path.resolve())), ("device", deployment.device),
                                ("threads", str(deployment.threads))):
                _set(config, name, value)
            shutil.copyfile(TEMPLATES / BACKBONE / "1" / "model.py", version / "model.py")
        case "onnxruntime":
            config.backend = "onnxruntime"
            on_gpu = deployment.device in ("cuda", "tensorrt")
            _instances(config, 1, gpu=on_gpu)
            _set(config, "intra_op_thread_count", str(deployment.threads))
            if deployment.device == "tensorrt":
                config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
            # Native ONNX Runtime may be older than the contrib operators of the form `cpu`; the portable one is standard ONNX.
            graph = bundle.pixel_graph("portable") if model == FEATURES else bundle.graph("portable")
            shutil.copyfile(graph, version / "model.onnx")
            for name in spec.files.keys() - {*spec.graphs.values(), *spec.pixel_graphs.values(), spec.card}:
                shutil.copyfile(bundle.path / name, version / name)
        case "tensorrt":
            plan = deployment.features_plan if model == FEATURES else deployment.plan
            if plan is None:
                raise BundleError("a TensorRT back end needs a plan")
            config.backend = "tensorrt"
            _instances(config, 1, gpu=True)
            shutil.copyfile(plan, version / "model.plan")
        case _:
            assert_never(deployment.backend)
    _write(config, folder)


def _outputs(spec: BundleSpec, model: str) -> dict[str, list[int]]:
    """Names and shapes, without the batch, of what a model gives."""
    if model == FEATURES:
        return {PIXEL_FEATURES: [spec.pixel_channels, spec.tile_px, spec.tile_px]}
    channels = [(PATCH_FEATURES, spec.channels), (ATTENTION, spec.heads), *((facet, spec.embed_dim) for facet in spec.facets)]
    return {name: [count, spec.grid, spec.grid] for name, count in channels}


def render_recipes(deployment: Deployment, repository: Path, store: Path, publish_key: Path | None, own_key: Path) -> None:
    """Write the model `recipes`.

    Parameters
    ----------
    deployment, repository
        What to render, and where.
    store
        Folder of the `RecipeStore`.
    publish_key
        File with the key that publishing needs; None: none.
    own_key
        File with the key by which the server's keeper loads models.
    """
    config = _template(RECIPES)
    settings = {field.name: getattr(deployment, field.name) for field in dataclasses.fields(deployment)}
    settings |= {"bundle": str(deployment.bundle.path.resolve()),
                 **{name: str(getattr(deployment, name) or "") for name in PLANS}}
    for name, value in (("deployment", json.dumps(settings)), ("repository", str(repository)), ("store", str(store)),
                        ("publish_key", str(publish_key or "")), ("own_key", str(own_key)), ("python", sys.executable)):
        _set(config, name, value)
    folder = _new_model(repository, RECIPES)
    (folder / "1").mkdir()
    shutil.copyfile(TEMPLATES / RECIPES / "1" / "model.py", folder / "1" / "model.py")
    _write(config, folder)


def render_segment(
    deployment: Deployment, repository: Path, store: RecipeStore, name: str, version: int, at: Path | None = None
) -> None:
    """Write the model that serves one version of a stored recipe; replaces the rendering of another version.

    Parameters
    ----------
    deployment, repository
        What to render, and where.
    store, name, version
        The recipe.
    at
        Where the recipe's folder will lie when the model is loaded; None: where it lies now.

    Raises
    ------
    RecipeError
        The recipe was fitted with another bundle, or on images of a type that cannot be sent.
    """
    settings = store.settings(name, version)
    bundle = deployment.bundle
    if settings.bundle is not None and settings.bundle.hash != bundle.hash:
        raise RecipeError(f"recipe {name!r} was fitted with bundle {settings.bundle.hash[:12]} ({settings.bundle.path}), but "
                          f"this server serves bundle {bundle.hash[:12]}; serve that bundle, or fit again")
    kind = settings.window.kind
    if kind is not None and kind not in (*IMAGE_INPUTS, "float"):
        raise RecipeError(f"recipe {name!r} was fitted on {kind} images, but frames are sent as {', '.join(IMAGE_INPUTS)}; "
                          "convert the images and fit again")
    config = _template("segment")
    config.name = segment_model(name)
    config.max_batch_size = MAX_PLANES
    channels = [] if settings.features.image_channels == 1 else [3]
    for image in config.input:
        image.dims.extend([-1, -1, *channels])
    for output in config.output:
        output.dims.extend([-1, -1])
        if output.name == LABELS:
            output.data_type = data_type("UINT8" if settings.classes.values[-1] <= 255 else "UINT16")
    _instances(config, deployment.instances)
    config.version_policy.specific.versions.append(version)
    described = {"hash": settings.hash, "bundle": None if settings.bundle is None else settings.bundle.hash, "version": version,
                 "classes": dataclasses.asdict(settings.classes), "image_channels": settings.features.image_channels,
                 "window_kind": kind}
    # TensorRT is a backbone's matter; classifiers know CUDA.
    device = "cuda" if deployment.device == "tensorrt" else deployment.device
    for parameter, value in ((RECIPE_PARAMETER, json.dumps(described)), (MAX_PIXELS_PARAMETER, str(deployment.max_pixels)),
                             ("path", str(at or store.path(name))), ("device", device),
                             ("threads", str(max(1, deployment.threads // deployment.instances))),
                             (BUNDLE_PARAMETER, bundle.spec.to_json())):
        _set(config, parameter, value)
    folder = repository / config.name
    target = folder / str(version)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TEMPLATES / "segment" / "1" / "model.py", target / "model.py")
    _write(config, folder)


def remove_segment(repository: Path, name: str) -> None:
    """Remove the rendering of a recipe."""
    shutil.rmtree(repository / segment_model(name), ignore_errors=True)


def data_type(name: str) -> int:
    """Triton's number of a tensor's type."""
    from tritonclient.grpc import model_config_pb2 as pb

    return int(pb.DataType.Value(f"TYPE_{name}"))


def _template(name: str) -> ModelConfig:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise MissingExtraError("tritonclient", "server", "rendering a model repository") from error
    config: ModelConfig = text_format.Parse((TEMPLATES / name / CONFIG).read_text(encoding="utf-8"), ModelConfig())
    return config


def _instances(config: ModelConfig, count: int, *, gpu: bool = False) -> None:
    group = config.instance_group.add(count=count)
    group.kind = group.KIND_GPU if gpu else group.KIND_CPU


def _set(config: ModelConfig, name: str, value: str) -> None:
    config.parameters[name].string_value = value


def _new_model(repository: Path, name: str) -> Path:
    folder = repository / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write(config: ModelConfig, folder: Path) -> None:
    from google.protobuf import text_format

    scratch = folder / f".{CONFIG}"
    scratch.write_text(text_format.MessageToString(config), encoding="utf-8")
    # Triton tells a changed model by its files' times: a rendering is always newer than the one before.
    os.utime(scratch)
    scratch.rename(folder / CONFIG)
