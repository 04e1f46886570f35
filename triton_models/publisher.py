"""What the model `recipes` does: recipes come as data, are stored, rendered and loaded; a broken one changes nothing.

    publish   store a new version ─▶ try ─▶ render ─▶ load ─▶ serve it       a step fails: the former version goes on serving
    rollback  try an earlier version ─▶ render ─▶ load ─▶ serve it
    withdraw  unload; the versions stay stored
    list      names, versions, hashes
    load      load a stored recipe at the start                       \\ for the server's keeper only, who has the own key
    reload    load a model again whose process died                   /
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaseline.clients.recipe import read_settings
from phaseline.runtime.errors import RecipeError, ServerRefusedError, UsageError
from phaseline.runtime.protocol import SEGMENT_PREFIX, segment_model
from phaseline.triton_models.repository import CONFIG, Deployment, remove_segment, render_segment
from phaseline.triton_models.store import RecipeStore


@dataclass(frozen=True)
class Publisher:
    """Keeps what is stored, rendered and loaded in step.

    Attributes
    ----------
    deployment
        How models are rendered.
    repository
        The running server's model repository.
    store
        Where recipes are kept.
    trial
        Try a recipe's folder; raises `RecipeError` if it cannot segment.
    load, unload
        Have the server load or unload a model, by name; raise any error when it fails.
    publish_key
        What a request must know to change something; None: nothing.
    own_key
        What the server's keeper knows.
    """

    deployment: Deployment
    repository: Path
    store: RecipeStore
    trial: Callable[[Path], None]
    load: Callable[[str], None]
    unload: Callable[[str], None]
    publish_key: str | None
    own_key: str

    def answer(self, request: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
        """Do what one request asks.

        Parameters
        ----------
        request
            ``action``, and with it ``name``, ``version``, ``model``, ``key``.
        files
            For ``publish``: a recipe's files.

        Returns
        -------
        What came of it, for JSON.

        Raises
        ------
        ServerRefusedError
            The key is missing or wrong.
        UsageError
            An unknown action, a name or version that does not exist, files that are no recipe.
        RecipeError
            The recipe cannot be served; what was served before still is.
        """
        action = request.get("action")
        match action:
            case "list":
                return {"recipes": [self._describe(name) for name in self.store.names()]}
            case "publish" | "rollback" | "withdraw":
                self._check_key(request, self.publish_key, "publishing")
                name = self._name(request)
                if action == "publish":
                    return self._publish(name, files)
                return self._rollback(name, request.get("version")) if action == "rollback" else self._withdraw(name)
            case "load":
                self._check_key(request, self.own_key, action)
                return self._load(self._name(request))
            case "reload":
                self._check_key(request, self.own_key, action)
                return self._reload(str(request.get("model")))
            case _:
                raise UsageError(f"action {str(action)[:40]!r} came, expected publish, rollback, withdraw or list")

    def _publish(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        before = self.store.current(name)
        if before is not None and self.store.find(name, files) == before:
            return {**self._describe(name), "changed": False}
        version = self.store.add(name, files)
        try:
            self._serve(name, version, before)
        except Exception:
            self.store.discard(name, version)
            raise
        return {**self._describe(name), "changed": True}

    def _rollback(self, name: str, version: int | None) -> dict[str, Any]:
        before = self.store.current(name)
        if version is None:
            earlier = [v for v in self.store.versions(name) if before is None or v < before]
            if not earlier:
                raise UsageError(f"recipe {name!r} has no version before {before}; publish one")
            version = earlier[-1]
        self.store.settings(name, version)
        if version != before:
            self._serve(name, version, before)
        return {**self._describe(name), "changed": version != before}

    def _withdraw(self, name: str) -> dict[str, Any]:
        if self.store.current(name) is None:
            raise UsageError(f"recipe {name!r} is not served; served: {', '.join(self._served()) or 'none'}")
        self.unload(segment_model(name))
        self.store.serve(name, None)
        remove_segment(self.repository, name)
        return {**self._describe(name), "changed": True}

    def _serve(self, name: str, version: int, before: int | None) -> None:
        """Render and load a version; on a failure, bring back what was rendered before."""
        try:
            self._try(name, version)
            render_segment(self.deployment, self.repository, self.store, name, version)
            self.load(segment_model(name))
        except Exception as error:
            remove_segment(self.repository, name)
            if before is not None:
                render_segment(self.deployment, self.repository, self.store, name, before)
            reason = " ".join(str(error).split())
            now = "nothing is served under this name" if before is None else f"version {before} goes on serving"
            raise RecipeError(f"recipe {name!r} cannot be served ({reason}); {now}") from error
        self.store.serve(name, version)

    def _load(self, name: str) -> dict[str, Any]:
        version = self.store.current(name)
        if version is None:
            raise UsageError(f"recipe {name!r} is not served; served: {', '.join(self._served()) or 'none'}")
        self._serve(name, version, None)
        return self._describe(name)

    def _reload(self, model: str) -> dict[str, Any]:
        name = model.removeprefix(SEGMENT_PREFIX)
        config = self.repository / model / CONFIG
        if "/" in model or not config.is_file():
            raise UsageError(f"model {model!r} is not in this server's repository")
        if name != model and (version := self.store.current(name)) is not None:
            # Tried anew: what was right when it was loaded may have been damaged since.
            self.trial(self.store.path(name, version))
        # Not the configuration: Triton takes a model whose configuration alone was touched for loaded, and starts no process.
        for file in config.parent.glob("*/model.*"):
            file.touch()
        self.load(model)
        return {"model": model}

    def _try(self, name: str, version: int) -> None:
        if not self.store.is_tried(name, version):
            self.trial(self.store.path(name, version))
            self.store.mark_tried(name, version)

    def _served(self) -> list[str]:
        return [name for name in self.store.names() if self.store.current(name) is not None]

    def _describe(self, name: str) -> dict[str, Any]:
        version = self.store.current(name)
        described = {"name": name, "model": SEGMENT_PREFIX + name, "version": version, "versions": self.store.versions(name)}
        return described if version is None else {**described, "hash": read_settings(self.store.path(name, version)).hash}

    @staticmethod
    def _name(request: Mapping[str, Any]) -> str:
        name = request.get("name")
        if not isinstance(name, str):
            raise UsageError(f"the recipe's name is {name!r}, expected a text")
        segment_model(name)
        return name

    @staticmethod
    def _check_key(request: Mapping[str, Any], key: str | None, purpose: str) -> None:
        if key is not None and not hmac.compare_digest(str(request.get("key", "")).encode(), key.encode()):
            came = "a wrong one" if request.get("key") else "none"
            raise ServerRefusedError(f"{purpose} needs this server's key, and {came} came; give the right file with --key")
