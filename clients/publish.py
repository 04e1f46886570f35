"""Publishing recipes to running servers, as data.

    RECIPE/ ──▶ model `recipes` ──▶ stored, validated, loaded ──▶ segment_NAME, next version
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from phaseline.clients.kserve import (
    Tls,
    import_grpc,
    infer_request,
    model_parameters,
    open_channel,
    open_stub,
    output_arrays,
    server_error,
)
from phaseline.clients.recipe import recipe_files
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.errors import MissingInputError, ServerRefusedError, UnknownModelError
from phaseline.runtime.protocol import (
    ANSWER,
    BACKBONE,
    BUNDLE_PARAMETER,
    FILE_CONTENTS,
    FILE_NAMES,
    RECIPES,
    REQUEST,
    segment_model,
)

PUBLISH_TIMEOUT_S = 120.0
"""A new version is loaded and tried before it is served; on a busy machine that takes a while."""
LIST_TIMEOUT_S = 20.0


def publish(server: str, recipe: Path, name: str, *, key: str | None = None, tls: Tls | None = None) -> dict[str, Any]:
    """Publish a recipe; clients of ``segment_NAME`` get the new version from then on.

    Parameters
    ----------
    server
        HOST:PORT.
    recipe
        Folder that `phaseline fit` wrote.
    name
        What it is called there.
    key
        The server's publish key, if it has one.
    tls
        Certificates.

    Returns
    -------
    ``name``, ``model``, ``version``, ``versions``, ``hash`` as served now, and ``changed``: False if the server had it already.

    Raises
    ------
    ServerRefusedError
        The key is wrong, or the recipe cannot be served there; what was served before still is.
    ServerError
        As `kserve.server_error`.
    """
    segment_model(name)
    return _ask(server, {"action": "publish", "name": name, "key": key}, tls, recipe_files(recipe))


def rollback(
    server: str, name: str, version: int | None = None, *, key: str | None = None, tls: Tls | None = None
) -> dict[str, Any]:
    """Serve an earlier version again; None: the one before. Returns and raises as `publish`."""
    return _ask(server, {"action": "rollback", "name": name, "version": version, "key": key}, tls)


def withdraw(server: str, name: str, *, key: str | None = None, tls: Tls | None = None) -> dict[str, Any]:
    """Serve a recipe no longer; its versions stay stored. Returns and raises as `publish`."""
    return _ask(server, {"action": "withdraw", "name": name, "key": key}, tls)


def list_recipes(server: str, *, tls: Tls | None = None) -> list[dict[str, Any]]:
    """Recipes of a server: ``name``, ``model``, ``version`` (None: withdrawn), ``versions``, and ``hash`` if served."""
    found: list[dict[str, Any]] = _ask(server, {"action": "list"}, tls)["recipes"]
    return found


def served_bundle(server: str, tls: Tls | None = None) -> BundleSpec:
    """What a server's `backbone` computes.

    Raises
    ------
    ServerError
        As `kserve.server_error`.
    BundleError
        Its description is not whole.
    """
    grpc = import_grpc()
    from tritonclient.grpc import service_pb2 as pb

    with open_channel(server, tls) as channel:
        try:
            answer = open_stub(channel).ModelConfig(pb.ModelConfigRequest(name=BACKBONE), timeout=LIST_TIMEOUT_S)
        except grpc.RpcError as error:
            raise server_error(error, server, BACKBONE) from error
    return BundleSpec.from_json(model_parameters(answer).get(BUNDLE_PARAMETER, ""))


def describe(answer: dict[str, Any]) -> str:
    """One line on a recipe of a server."""
    if answer["version"] is None:
        return f"{answer['name']} is not served; stored versions: {', '.join(map(str, answer['versions']))}"
    others = [str(version) for version in answer["versions"] if version != answer["version"]]
    stored = f"; stored too: {', '.join(others)}" if others else ""
    return f"{answer['model']} is version {answer['version']}, recipe {answer['hash'][:12]}{stored}"


def read_key(path: Path | None) -> str | None:
    """The key in a file.

    Raises
    ------
    MissingInputError
        It cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MissingInputError(f"the key {path} cannot be read ({error}); give the file that the server has") from error
    if not key:
        raise MissingInputError(f"the key file {path} is empty; give the file that the server has")
    return key


def _ask(server: str, request: dict[str, Any], tls: Tls | None, files: dict[str, bytes] | None = None) -> dict[str, Any]:
    grpc = import_grpc()
    timeout_s = LIST_TIMEOUT_S if request["action"] == "list" else PUBLISH_TIMEOUT_S
    text = json.dumps({name: value for name, value in request.items() if value is not None}).encode()
    inputs = {REQUEST: np.array([text], np.object_)}
    if files:
        inputs |= {FILE_NAMES: np.array([name.encode() for name in files], np.object_),
                   FILE_CONTENTS: np.array(list(files.values()), np.object_)}
    message = infer_request(RECIPES, inputs, [ANSWER], request_id=f"{request['action']} {request.get('name', '')}".strip())
    with open_channel(server, tls) as channel:
        try:
            response = open_stub(channel).ModelInfer(message, timeout=timeout_s)
        except grpc.RpcError as error:
            problem = server_error(error, server, RECIPES)
            if isinstance(problem, UnknownModelError):
                raise ServerRefusedError(f"{server} has no model {RECIPES}: it is not run by `phaseline serve`, which takes "
                                         "published recipes") from error
            raise problem from error
    answer: dict[str, Any] = json.loads(output_arrays(response)[ANSWER][0])
    return answer
