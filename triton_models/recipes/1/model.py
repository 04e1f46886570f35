"""`recipes`: publish, roll back and withdraw recipes of a running server. What comes in is stored and validated, not run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.errors import UsageError
from phaseline.runtime.protocol import ANSWER, FILE_CONTENTS, FILE_NAMES, REQUEST
from phaseline.triton_models.adapter import RequestLog, parameters, text_input
from phaseline.triton_models.publisher import Publisher
from phaseline.triton_models.repository import PLANS, Deployment
from phaseline.triton_models.store import RecipeStore
from phaseline.triton_models.trial import try_recipe


class TritonPythonModel:
    """Unpacks requests for a `Publisher`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read where things are."""
        settings = parameters(args)
        self._log = RequestLog(args)
        deployment = json.loads(settings["deployment"])
        deployment["bundle"] = open_bundle(deployment["bundle"])
        deployment |= {name: Path(deployment[name]) if deployment[name] else None for name in PLANS}
        key = settings["publish_key"]
        self._publisher = Publisher(
            deployment=Deployment(**deployment),
            repository=Path(settings["repository"]),
            store=RecipeStore(Path(settings["store"])),
            trial=lambda folder: try_recipe(folder, deployment["bundle"].spec, settings["python"]),
            load=lambda model: pb_utils.load_model(model_name=model),
            unload=lambda model: pb_utils.unload_model(model_name=model),
            publish_key=Path(key).read_text(encoding="utf-8").strip() if key else None,
            own_key=Path(settings["own_key"]).read_text(encoding="utf-8").strip(),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One after another: two changes at once would be two truths."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        started = time.perf_counter()
        try:
            asked = _asked(request)
            names = [name.decode() for name in text_input(request, FILE_NAMES)]
            contents = text_input(request, FILE_CONTENTS)
            if len(names) != len(contents) or len(set(names)) != len(names):
                raise UsageError(f"{len(set(names))} different file names and {len(contents)} contents came, expected as many of "
                                 "each")
            if names and asked.get("action") != "publish":
                raise UsageError(f"files came with action {asked.get('action')!r}, expected them with publish only")
            answer = self._publisher.answer(asked, dict(zip(names, contents, strict=True)))
        except Exception as error:  # noqa: BLE001  One request's failure is its own answer.
            return self._log.failure(request, error)
        what = f"{asked.get('action')} {asked.get('name', asked.get('model', ''))}".strip()
        self._log.done(request, what, time.perf_counter() - started)
        return pb_utils.InferenceResponse([pb_utils.Tensor(ANSWER, np.array([json.dumps(answer).encode()], np.object_))])


def _asked(request: Any) -> dict[str, Any]:
    texts = text_input(request, REQUEST)
    try:
        asked = json.loads(texts[0])
    except (ValueError, IndexError, RecursionError) as error:
        raise UsageError(f"the request cannot be understood ({error}); expected JSON with an action") from error
    if not isinstance(asked, dict):
        raise UsageError(f"the request is {type(asked).__name__}, expected a JSON object with an action")
    return asked
