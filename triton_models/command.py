"""`phaseline serve`: a bundle and recipes → a running Triton server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.logging import RichHandler

from phaseline.clients import options
from phaseline.clients.classify_common import available_cores
from phaseline.clients.recipe import recipe_files
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.engine import check_device
from phaseline.runtime.errors import UsageError
from phaseline.runtime.output import new_folder
from phaseline.runtime.protocol import network_models, segment_model
from phaseline.triton_models.listening import HTTP_ADDRESS, Listening
from phaseline.triton_models.repository import Backend, Deployment, default_instances, render_networks, render_segment
from phaseline.triton_models.server import TritonServer
from phaseline.triton_models.store import RecipeStore

RENDERED = "deployment.txt"
"""Marks a folder that ``--render`` wrote."""


def serve_command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="'default', or a bundle's folder.")],
    recipe: Annotated[list[str] | None, typer.Option(
        "--recipe", metavar="[NAME=]PATH",
        help="A recipe's folder, served as segment_NAME; the folder's name if none is given. Can be repeated.")] = None,
    store: Annotated[Path | None, typer.Option(
        "--store", help="Where published recipes are kept; without it they last as long as the server.")] = None,
    backend: Annotated[str, typer.Option(
        "--backend", help="python (anywhere), or Triton's own onnxruntime or tensorrt (NVIDIA's container).")] = "python",
    plan: Annotated[Path | None, typer.Option(
        "--plan", help="For --backend tensorrt: what `phaseline export --engine tensorrt` wrote.")] = None,
    features_plan: Annotated[Path | None, typer.Option(
        "--features-plan", help="Likewise, of pixel features, for a bundle with an upsampler.")] = None,
    instances: Annotated[int | None, typer.Option(
        "--instances", min=1, help="Processes a recipe; by default one for every four cores, at most four.")] = None,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=1, help="The most pixels in one request.")] = 1 << 26,
    bind: Annotated[str, typer.Option("--bind", help="Address of gRPC and metrics; HTTP (health) stays local.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option("--grpc-port", min=0, max=65535, help="0: a free one.")] = 8001,
    http_port: Annotated[int, typer.Option("--http-port", min=0, max=65535, help="0: a free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option("--metrics-port", min=0, max=65535, help="0: a free one.")] = 8002,
    shared_memory: Annotated[bool, typer.Option(
        "--shared-memory", help="Let clients on this host pass tensors through system shared memory.")] = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM: gRPC over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM: the certificate's key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(
        "--tls-client-ca", help="PEM: clients must show a certificate signed by this authority.")] = None,
    publish_key: Annotated[Path | None, typer.Option(
        "--publish-key", help="File with the key that publishing needs; beyond loopback or with TLS, none can without.")] = None,
    log: Annotated[Path | None, typer.Option("--log", help="File for Triton's log; by default standard error.")] = None,
    verbose: Annotated[int, typer.Option("--verbose", min=0, max=9, help="Triton's verbosity.")] = 0,
    render: Annotated[Path | None, typer.Option(
        "--render", help="Write the model repository to this folder and stop, for servers that others start.")] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve a bundle and recipes with NVIDIA Triton Inference Server, until Ctrl-C or SIGTERM."""
    del debug
    screen = options.Screen(quiet)
    cores = threads or available_cores()
    deployment = Deployment(open_bundle(bundle), cast(Backend, backend), check_device(device), cores,
                            instances or default_instances(cores), max_pixels, plan, features_plan)
    recipes = _named(recipe or [])
    if render is not None:
        _render(deployment, recipes, render, overwrite)
        screen.say(f"{render}: start it with tritonserver --model-repository={render.resolve() / 'repository'}")
        return
    listening = Listening(bind, grpc_port, http_port, metrics_port, shared_memory, tls_cert, tls_key, tls_client_ca, publish_key)
    keeper_log = logging.getLogger("phaseline")
    handler = RichHandler(console=screen.console, show_path=False, markup=False)
    keeper_log.addHandler(handler)
    keeper_log.setLevel(logging.INFO)
    try:
        starting = TritonServer(deployment, listening, store=store, recipes=recipes, log_file=log, verbose=verbose)
        screen.say(f"starting {starting.description}; a large bundle takes a while")
        with starting as server:
            screen.warn_untrained(deployment.bundle.spec)
            for line in _greeting(server, store):
                screen.say(line)
            try:
                server.wait()
            except KeyboardInterrupt:
                screen.say("stopping")
    finally:
        keeper_log.removeHandler(handler)
    screen.say("stopped")


def _greeting(server: TritonServer, store: Path | None) -> list[str]:
    listening, ports = server.listening, server.ports
    networks = network_models(server.deployment.bundle.spec)
    served = server.served()
    tls = "" if listening.certificate is None else " (mutual TLS)" if listening.client_ca else " (TLS)"
    http, metrics = f"{HTTP_ADDRESS}:{ports['http']}", f"{listening.bind}:{ports['metrics']}"
    lines = [f"{server.description}: bundle {server.deployment.bundle.hash[:12]}",
             f"models: {', '.join([*networks, *(f'{model} version {version}' for model, version in served.items())])}",
             f"ready: gRPC {server.address}{tls}, health {http}, metrics {metrics}; stop with Ctrl-C"]
    if listening.publish_key is None and not listening.all_may_publish:
        lines.append("note: nobody can publish recipes; allow those who know a key to with --publish-key FILE")
    elif store is None:
        lines.append("note: recipes that are published last as long as this server; keep them with --store DIR")
    if not listening.is_loopback and listening.certificate is None:
        lines.append("note: traffic is not encrypted, and whoever reaches the port can use the server; see --tls-cert and "
                     "--tls-client-ca")
    return lines


def _named(recipes: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in recipes:
        name, equals, path = text.partition("=")
        folder = Path(path if equals else text)
        name = name if equals else folder.resolve().name
        segment_model(name)
        if name in named:
            raise UsageError(f"two recipes are named {name!r}: {named[name]} and {folder}; name them with NAME=PATH")
        named[name] = folder
    return named


def _render(deployment: Deployment, recipes: dict[str, Path], folder: Path, overwrite: bool) -> None:
    """Write repository and recipes; the configurations name the folder's final place."""
    with new_folder(folder, overwrite, RENDERED) as scratch:
        store = RecipeStore(scratch / "store")
        render_networks(deployment, scratch / "repository")
        for name, path in recipes.items():
            version = store.add(name, recipe_files(path))
            store.serve(name, version)
            render_segment(deployment, scratch / "repository", store, name, version, folder.resolve() / "store" / name)
        (scratch / RENDERED).write_text(f"{deployment}\n", encoding="utf-8")
