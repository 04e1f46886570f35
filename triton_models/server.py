"""Running Triton: started, kept alive, stopped with nothing left behind.

    start ─▶ render ─▶ tritonserver ─▶ ready ─▶ restore recipes ─▶ serve ──stop──▶ SIGTERM, wait, remove run folder and /dev/shm
                           ▲                                        │
                           └── it died: start it again ◀────────────┤
                               a back-end process died: reload its model

One keeper thread does all of that. The server ends when the keeper's process ends, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.client import OK, HTTPException
from pathlib import Path
from typing import IO, Any, Self

from phaseline.clients.recipe import recipe_files
from phaseline.runtime.errors import EngineError, RecipeError, ServerFailedError
from phaseline.runtime.ownership import SHARED_MEMORY, owned_name, sweep
from phaseline.runtime.protocol import ANSWER, RECIPES, REQUEST, SEGMENT_PREFIX, network_models, segment_model
from phaseline.triton_models.installation import find_server, prepare_backends, server_environment
from phaseline.triton_models.listening import HTTP_ADDRESS, Listening, claim_ports
from phaseline.triton_models.processes import EXEC, has_client_shm_switch, stub_models
from phaseline.triton_models.repository import Deployment, render_networks, render_recipes
from phaseline.triton_models.store import RecipeStore
from phaseline.triton_models.trial import try_recipe

KIND = "serve"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
LOAD_TIMEOUT_S = 240.0
"""For one recipe: its trial, and its instances' start."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0
"""After how long a model that could not be loaded is tried again; doubled each time."""
STEADY_S = 60.0
"""A model whose process dies again so soon is loaded again after a pause only."""
SILENCE_S = 60.0
"""A server that lives and does not say so for longer is started again."""
MAX_RESTARTS = 5
"""Restarts within `RESTART_WINDOW_S` after which the keeper gives up."""
RESTART_WINDOW_S = 300.0
_POLL_S = 0.5
_HTTP_ERRORS = (urllib.error.URLError, OSError, HTTPException)
log = logging.getLogger(__name__)


class TritonServer:
    """A Triton server with a bundle and recipes; runs inside ``with``.

    Parameters
    ----------
    deployment
        What is served, and how.
    listening
        Where.
    store
        Folder where published recipes are kept; None: they last as long as the server.
    recipes
        Recipe folders to publish at the start, by name. One that is served already is not published again.
    log_file
        Where Triton's log goes; None: to standard error.
    verbose
        Triton's verbosity.

    Raises
    ------
    EngineUnavailableError
        There is no server, or it has not the back end.
    ServerFailedError
        It does not come up.
    """

    def __init__(
        self,
        deployment: Deployment,
        listening: Listening | None = None,
        *,
        store: Path | None = None,
        recipes: dict[str, Path] | None = None,
        log_file: Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.deployment = deployment
        self._networks = network_models(deployment.bundle.spec)
        self.listening = listening or Listening()
        self.failed_recipes: dict[str, str] = {}
        self.restarts: list[float] = []
        self._store = store
        self._recipes = dict(recipes or {})
        self._log_file = log_file
        self._verbose = verbose
        self._installation = find_server()
        self._installation.check(deployment.backend)
        self._own_key = secrets.token_hex(32)
        self._http_token = secrets.token_hex(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._run: Path | None = None
        self._recipe_store: RecipeStore | None = None
        self._shm_prefix = ""
        self._ready, self._stopping, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._held = contextlib.ExitStack()
        self._lock = -1
        self._complete: set[str] = set()
        self._missing: set[str] = set()
        self._due: dict[str, float] = {}
        self._reloaded: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._heard_at = 0.0
        self.ports: dict[str, int] = {}

    @property
    def description(self) -> str:
        """Which server it is."""
        return self._installation.description

    @property
    def address(self) -> str:
        """Where gRPC listens, HOST:PORT."""
        return f"{self.listening.bind}:{self.ports['grpc']}"

    @property
    def pid(self) -> int:
        """Of tritonserver."""
        if self._process is None:
            raise EngineError("the server is not running; use it inside `with`")
        return self._process.pid

    def served(self) -> dict[str, int]:
        """The models of recipes that are served, with their versions."""
        assert self._recipe_store is not None
        current = {name: self._recipe_store.current(name) for name in self._recipe_store.names()}
        return {segment_model(name): version for name, version in current.items()
                if version is not None and name not in self.failed_recipes}

    @property
    def failure(self) -> Exception | None:
        """Why the keeper gave up, if it did."""
        return self._failure

    def __enter__(self) -> Self:
        keeper = threading.Thread(target=self._keep, name="triton keeper")
        try:
            keeper.start()
            while not self._ready.wait(_POLL_S):
                if self._ended.is_set():
                    break
        except BaseException:
            if keeper.ident is None:
                self._ended.set()
            self.__exit__()
            raise
        if self._failure is not None:
            self.__exit__()
            raise self._failure
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        # Not join(): Python 3.11's takes a thread for ended when Ctrl-C interrupts it.
        self._ended.wait()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the keeper ends; False if it still runs after `timeout_s`.

        Raises
        ------
        ServerFailedError
            It gave up.
        """
        ended = self._ended.wait(timeout_s)
        if self._failure is not None:
            raise self._failure
        return ended

    def _keep(self) -> None:
        try:
            self._prepare()
            self._start()
            self._ready.set()
            while not self._stopping.wait(_POLL_S):
                self._look_after()
        except Exception as error:  # noqa: BLE001  It is raised by `__enter__` or `wait`, in the caller's thread.
            self._failure = error
        finally:
            try:
                self._stop()
                self._clean()
            finally:
                self._ended.set()

    def _prepare(self) -> None:
        """Render what is served, and remove what earlier keepers that were killed left behind."""
        temporary = Path(tempfile.gettempdir())
        swept = [folder / name for folder in (temporary, SHARED_MEMORY) for name in sweep(folder, KIND)]
        for path in swept:
            log.info("removed %s, left behind by a killed server", path)
        self._shm_prefix = owned_name(KIND)
        run = self._run = temporary / self._shm_prefix
        run.mkdir(mode=0o700)
        keys = run / "own.key"
        keys.touch(mode=0o600)
        keys.write_text(self._own_key, encoding="utf-8")
        store = self._recipe_store = RecipeStore(self._store or run / "store")
        self._lock = self._held.enter_context(store.locked())
        for name, path in self._recipes.items():
            self._publish_at_start(store, name, path)
        publish_key = self.listening.publish_key
        if publish_key is None and not self.listening.all_may_publish:
            # Nobody knows this one: whoever reaches the port must not be able to replace what others use.
            publish_key = run / "nobody.key"
            publish_key.write_text(secrets.token_hex(32), encoding="utf-8")
        render_networks(self.deployment, run / "repository")
        render_recipes(self.deployment, run / "repository", store.folder, publish_key, keys)
        self._backends = prepare_backends(self._installation, run / "backends")
        self._log = None if self._log_file is None else self._held.enter_context(self._log_file.open("ab"))
        asked = self.listening
        self.ports = {"grpc": asked.grpc_port, "http": asked.http_port, "metrics": asked.metrics_port}
        # A server whose keeper was killed ends by itself, and frees its ports then.
        claim_ports(asked.bind, self.ports, STOP_TIMEOUT_S if swept else 0.0)

    def _publish_at_start(self, store: RecipeStore, name: str, path: Path) -> None:
        """Store and serve a recipe, unless the store has it already: what was published since goes on being served."""
        files = recipe_files(path)
        stored, current = store.find(name, files), store.current(name)
        if stored is not None and current is not None:
            if stored != current:
                log.warning("recipe %s: version %d, published since, is served; %s is version %d, which phaseline publish "
                            "--rollback brings back", name, current, path, stored)
            return
        version = stored or store.add(name, files)
        try:
            try_recipe(store.path(name, version), self.deployment.bundle.spec, sys.executable)
        except RecipeError as error:
            if stored is None:
                store.discard(name, version)
            raise RecipeError(f"{path} cannot be served as {name!r}: {error}") from error
        store.mark_tried(name, version)
        store.serve(name, version)

    def _start(self) -> None:
        """Start the server, wait until it serves, and load the recipes."""
        assert self._run is not None
        command = [sys.executable, "-c", EXEC, str(os.getpid()), str(self._installation.binary), *self._options(self._run)]
        position = None if self._log_file is None else self._log_file.stat().st_size
        self._process = subprocess.Popen(
            command, env=server_environment(self._installation), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True, pass_fds=[self._lock],
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None:
                raise ServerFailedError(f"tritonserver ended with status {self._process.returncode} before it was ready"
                                        f"{self._reason(position)}")
            if time.monotonic() > deadline:
                raise ServerFailedError(f"tritonserver was not ready within {START_TIMEOUT_S:.0f} s{self._reason(position)}")
            if self._stopping.wait(0.1):
                return
        assert self._recipe_store is not None
        self._heard_at = time.monotonic()
        self._complete |= {*self._networks, RECIPES}
        self.failed_recipes = {}
        for name in self._recipe_store.names():
            if self._recipe_store.current(name) is not None and not self._stopping.is_set():
                self._load(name)
        self._close_regions()

    def _load(self, name: str) -> None:
        """Have a stored recipe loaded. One that cannot be served must not keep the others from it; it is tried again later."""
        try:
            self._ask({"action": "load", "name": name}, LOAD_TIMEOUT_S)
        except ServerFailedError as error:
            self.failed_recipes[name] = str(error)
            log.error("recipe %s is not served: %s", name, error)
            self._put_off(segment_model(name))
        else:
            self.failed_recipes.pop(name, None)
            self._complete.add(segment_model(name))

    def _put_off(self, model: str) -> None:
        """Note that a model is not served, and when to try again."""
        pause_s = min(2 * self._pauses.get(model, FIRST_PAUSE_S / 2), LONGEST_PAUSE_S)
        self._pauses[model], self._due[model] = pause_s, time.monotonic() + pause_s

    def _options(self, run: Path) -> list[str]:
        options = {
            "model-repository": run / "repository",
            "backend-directory": self._backends,
            "backend-config": f"python,shm-region-prefix-name={self._shm_prefix}-",
            "model-control-mode": "explicit",
            # Python models that start side by side have been seen to abort the server (boost::interprocess::lock_exception).
            "model-load-thread-count": "1",
            "exit-timeout-secs": 20,
            "allow-gpu-metrics": str(self._installation.stub is None).lower(),
            "log-format": "ISO8601",
            "log-verbose": self._verbose,
        }
        if has_client_shm_switch(self._installation.binary, tuple(server_environment(self._installation).items())):
            options["allow-client-shm"] = str(self.listening.shared_memory).lower()
        return [
            *(f"--{name}={value}" for name, value in options.items()),
            *self.listening.options(self.ports, self._http_token),
            *(f"--load-model={model}" for model in (*self._networks, RECIPES)),
        ]

    def _look_after(self) -> None:
        """Start again what died."""
        assert self._process is not None
        self._close_regions()
        if self._process.poll() is not None:
            self._restart(f"tritonserver died (status {self._process.returncode})")
            return
        if self._is_silent():
            self._restart(f"tritonserver did not answer for {SILENCE_S:.0f} s")
            return
        for model in self._dead_models():
            if model == RECIPES:
                self._restart(f"the process of model {RECIPES} died")
                return
            if model in self._due:
                continue
            if time.monotonic() - self._reloaded.get(model, -STEADY_S) < STEADY_S:
                # Perhaps a frame that its client sends again and again: others shall not wait for this model all the time.
                self._put_off(model)
                log.warning("a process of model %s died again; loading the model in %.0f s", model, self._pauses[model])
            else:
                self._pauses.pop(model, None)
                self._due[model] = 0.0
                log.warning("a process of model %s died; loading the model again", model)
        for model in [model for model, due in self._due.items() if due <= time.monotonic()]:
            del self._due[model]
            name = model.removeprefix(SEGMENT_PREFIX)
            if name in self.failed_recipes:
                self._load(name)
            elif not self._reload(model):
                return

    def _reload(self, model: str) -> bool:
        """Have a model loaded again whose process died; False if the server was started again instead."""
        try:
            self._ask({"action": "reload", "model": model}, LOAD_TIMEOUT_S)
            if model not in stub_models(self.pid):
                self._restart(f"model {model} was loaded again and has no process still")
                return False
        except ServerFailedError as error:
            if model in self._networks:
                self._restart(f"model {model} could not be loaded again ({error})")
                return False
            log.error("%s", error)
            self._put_off(model)
        else:
            self._reloaded[model] = time.monotonic()
        return True

    def _close_regions(self) -> None:
        """Close to other users the shared memory that frames and labels pass through: Triton makes it readable for all."""
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}-*"):
            with contextlib.suppress(FileNotFoundError):
                if region.stat().st_mode & 0o077:
                    region.chmod(0o600)

    def _is_silent(self) -> bool:
        """Whether the server lives and does not answer, for too long."""
        now = time.monotonic()
        if now - self._heard_at < SILENCE_S / 4:
            return False
        try:
            with self._http("v2/health/live", timeout_s=SILENCE_S / 4):
                self._heard_at = time.monotonic()
        except _HTTP_ERRORS:
            return now - self._heard_at > SILENCE_S
        return False

    def _restart(self, reason: str) -> None:
        """Start the server again until it runs, a bounded number of times."""
        while not self._stopping.is_set():
            now = time.monotonic()
            self.restarts = [*(then for then in self.restarts if now - then < RESTART_WINDOW_S), now]
            if len(self.restarts) > MAX_RESTARTS:
                raise ServerFailedError(f"{reason}, for the {len(self.restarts)}th time within {RESTART_WINDOW_S:.0f} s; see the "
                                        "log")
            log.error("%s; starting it again", reason)
            self._stop()
            try:
                self._start()
                return
            except ServerFailedError as error:
                reason = str(error)

    def _dead_models(self) -> list[str]:
        """Models that had all their processes once, and lack one in two looks on end.

        A model that is loaded for the first time never had them; one that is replaced keeps the old until the new are up.
        """
        assert self._run is not None
        counts = Counter(stub_models(self.pid))
        missing = set()
        for model in {*counts, *self._complete}:
            expected = self.deployment.instances
            if model in (*self._networks, RECIPES):
                expected = int(model == RECIPES or self.deployment.backend == "python")
            if counts[model] >= expected:
                self._complete.add(model)
            elif not (self._run / "repository" / model).is_dir():
                self._complete.discard(model)  # withdrawn
                self._due.pop(model, None)
            elif model in self._complete:
                missing.add(model)
        dead = sorted(missing & self._missing)
        self._missing = missing - set(dead)
        return dead

    def _is_ready(self) -> bool:
        try:
            return all(self._http(path).status == OK for path in ("v2/health/ready", f"v2/models/{RECIPES}/ready"))
        except _HTTP_ERRORS:
            return False

    def _ask(self, request: dict[str, str], timeout_s: float) -> dict[str, Any]:
        """Ask the model `recipes`, with the keeper's own key."""
        text = json.dumps({**request, "key": self._own_key})
        body = {"inputs": [{"name": REQUEST, "datatype": "BYTES", "shape": [1], "data": [text]}], "outputs": [{"name": ANSWER}]}
        try:
            with self._http(f"v2/models/{RECIPES}/infer", json.dumps(body).encode(), timeout_s) as response:
                answer: dict[str, Any] = json.loads(json.load(response)["outputs"][0]["data"][0])
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]
            raise ServerFailedError(text) from error
        except (*_HTTP_ERRORS, ValueError, KeyError) as error:
            raise ServerFailedError(f"{request['action']} failed: {error!r}") from error
        return answer

    def _http(self, path: str, body: bytes | None = None, timeout_s: float = 5.0) -> Any:
        request = urllib.request.Request(f"http://{HTTP_ADDRESS}:{self.ports['http']}/{path}", data=body,
                                         headers={"keeper": self._http_token, "content-type": "application/json"})
        # A facility's HTTP proxy has no business between a server and its keeper.
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)

    def _reason(self, position: int | None) -> str:
        if self._log_file is None or position is None:
            return "; its log says why"
        with self._log_file.open("rb") as stream:
            stream.seek(position)
            lines = stream.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if " E " in line or line.startswith(("E", "error"))]
        return f": {(errors or lines or ['no word'])[-1].strip()} (log: {self._log_file})"

    def _stop(self) -> None:
        """End the server's process and those that it started."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.error("tritonserver did not stop within %.0f s; killing it", STOP_TIMEOUT_S)
        # Its session's process group: back-end processes that outlived it, and itself if it hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None
        self._complete, self._missing = set(), set()
        self._due.clear()
        self._reloaded.clear()
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}-*"):
            region.unlink(missing_ok=True)

    def _clean(self) -> None:
        self._held.close()
        if self._run is not None:
            shutil.rmtree(self._run, ignore_errors=True)
