"""Finding NVIDIA Triton Inference Server: on PATH (NVIDIA's container), else in the nvidia-pytriton wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from phaseline.runtime.errors import EngineUnavailableError
from phaseline.triton_models.repository import Backend

STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A server that can be started.

    Attributes
    ----------
    binary
        `tritonserver`.
    backends
        Folder of its back ends.
    stub
        The Python back end's process for this Python, where it does not lie in `backends`.
    libraries
        Folders for the dynamic linker.
    description
        Which one it is.
    """

    binary: Path
    backends: Path
    stub: Path | None
    libraries: tuple[Path, ...] = ()
    description: str = ""

    def check(self, backend: Backend) -> None:
        """Refuse a back end that this server has not.

        Raises
        ------
        EngineUnavailableError
            The back end is missing.
        """
        found = sorted(path.name for path in self.backends.iterdir()) if self.backends.is_dir() else []
        for needed in {backend, "python"}:
            if needed not in found:
                raise EngineUnavailableError(f"{self.description} has the back ends {', '.join(found) or 'none'}, and {needed} "
                                             "is needed; use --backend python, or NVIDIA's container, which has all of them")


def find_server() -> Installation:
    """The server to start.

    Raises
    ------
    EngineUnavailableError
        There is none, or the one found cannot work with this Python or numpy.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        binary = Path(on_path).resolve()
        return Installation(binary, binary.parents[1] / "backends", None, description=f"{on_path} (on PATH)")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise EngineUnavailableError("no Triton Inference Server found: no tritonserver on PATH, and nvidia-pytriton is not "
                                     "installed; use NVIDIA's container, or pip install '.[server]' (in phaseline's checkout)")
    root = Path(next(iter(spec.submodule_search_locations)))
    stubs = root / "tritonserver" / "python_backend_stubs"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (stubs / here / STUB).is_file():
        known = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise EngineUnavailableError(f"nvidia-pytriton's server runs Python {known}, and this is {here}; use one of those, or "
                                     "NVIDIA's container")
    if int(version("numpy").partition(".")[0]) >= 2:
        raise EngineUnavailableError(f"numpy {version('numpy')} is installed, and under numpy 2 nvidia-pytriton's server gives "
                                     "empty outputs without an error; pip install 'numpy<2'")
    return Installation(
        binary=root / "tritonserver" / "bin" / "tritonserver",
        backends=root / "tritonserver" / "backends",
        stub=stubs / here / STUB,
        libraries=(root.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))),
        description=f"nvidia-pytriton {version('nvidia-pytriton')}",
    )


def prepare_backends(installation: Installation, folder: Path) -> Path:
    """A back-end folder with the Python process in its place: links in `folder`, or the installation's own."""
    if installation.stub is None:
        return installation.backends
    for backend in installation.backends.iterdir():
        target = folder / backend.name
        target.mkdir(parents=True)
        for file in backend.iterdir():
            (target / file.name).symlink_to(file)
    (folder / "python" / STUB).symlink_to(installation.stub)
    return folder


def server_environment(installation: Installation) -> dict[str, str]:
    """The server's environment variables: this one's, with this Python first, from which back ends take their packages."""
    environment = dict(os.environ)
    # Triton tells a changed model by its folders' times, which caches beside the adapters would change.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if installation.libraries:
        given = [environment["LD_LIBRARY_PATH"]] if environment.get("LD_LIBRARY_PATH") else []
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, installation.libraries), *given])
    return environment
