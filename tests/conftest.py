"""What several test files share."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from phaseline.runtime.bundle import Bundle

if TYPE_CHECKING:
    from phaseline.triton_models.server import TritonServer

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The real labelled micrographs that lie beside the repository on developers' machines."""
    if not DATA.is_dir():
        pytest.skip(f"needs the labelled micrographs in {DATA}, which are not part of the repository")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """The suite ends with no process and no shared memory of its own."""
    from tests.serving import left_behind

    before = left_behind()
    yield
    deadline = time.monotonic() + 10
    # A server whose keeper was killed ends within seconds by itself.
    while not left_behind() <= before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_behind() <= before
    children = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    # Python's own helper of spawned processes ends with the process it belongs to.
    commands = [command for child in children if "multiprocessing.resource_tracker" not in " ".join(command := child.cmdline())]
    assert commands == []


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that runs in milliseconds: 56 px tiles, 8 channels, batches of up to 8; pixel features from a random upsampler."""
    from phaseline.export.bundle_writer import ExportOptions, write_bundle

    options = ExportOptions(backbone="vit-32-2-2-p14", weights="random:0", stride_px=7, tile_px=56, channels=8, precision="fp32",
                            upsampler="random:0")
    return write_bundle(options, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def needs_triton() -> None:
    """Skip where no Triton server is installed."""
    import shutil

    if shutil.which("tritonserver") is None and importlib.util.find_spec("pytriton") is None:
        pytest.skip("needs a Triton server: tritonserver on PATH, or pip install '.[server]'")


@pytest.fixture(scope="session")
def recipes(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved recipes for the frames of `tests.serving`, by name: deep and classical, averaged over 17 views, classical only."""
    from tests.serving import fit_recipe

    folder = tmp_path_factory.mktemp("recipes")
    made = {"deep": fit_recipe(tiny_bundle), "averaged": fit_recipe(tiny_bundle, "moore:2"), "classical": fit_recipe(None)}
    for name, recipe in made.items():
        recipe.save(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture(scope="session")
def server(
    needs_triton: None, tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A running server that tests share: they must not kill it, publish to it, or leave anything in it."""
    from phaseline.triton_models.listening import Listening
    from phaseline.triton_models.repository import Deployment
    from phaseline.triton_models.server import TritonServer

    listening = Listening(grpc_port=0, http_port=0, metrics_port=0, shared_memory=True)
    log = tmp_path_factory.mktemp("server") / "triton.log"
    with TritonServer(Deployment(tiny_bundle, threads=2), listening, recipes=recipes, log_file=log) as running:
        yield running
