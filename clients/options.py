"""Options that mean the same in every command, and what commands print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from phaseline.clients.features import is_trained
from phaseline.clients.kserve import Tls, parse_servers
from phaseline.clients.remote import Transport, TritonSource
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.errors import UsageError

Bundle = Annotated[str, typer.Option("--bundle", help="'default', 'none' (classical features only), or a bundle's folder.")]
OptionalBundle = Annotated[str | None, typer.Option(
    "--bundle", help="'default' (if not given), 'none' (classical features only), or a bundle's folder.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or tensorrt.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; by default one for each core.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]

Transforms = Annotated[str, typer.Option(
    "--transforms",
    help="Views to average deep features over: none, flips, moore, von-neumann, moore:PIXELS, or a product such as "
         "moore*flips.",
)]
Alignment = Annotated[str, typer.Option("--alignment", help="Where tokens lie: centred, or paper (stretched).")]
Interpolation = Annotated[str, typer.Option(
    "--interpolation",
    help="From tokens to pixels: learned (the bundle's upsampler), bilinear or nearest; auto: learned if there is one, else "
         "bilinear.",
)]
Boundary = Annotated[str, typer.Option("--boundary", help="What a shift does at a tile's edge: reflect or wrap.")]

Server = Annotated[str | None, typer.Option(
    "--server", metavar="HOST:PORT[,…]", help="Phaseline servers that compute the deep features; several share the work.")]
TransportChoice = Annotated[str, typer.Option(
    "--transport", help="To servers: auto (shared memory on this host, if allowed), grpc, or shared-memory.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds for a server's tile (60) or image (120).")]
TlsCa = Annotated[Path | None, typer.Option("--tls-ca", help="PEM: the authority that signed the server's certificate.")]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", help="PEM: this client's certificate, for mutual TLS.")]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", help="PEM: its key.")]


def client_tls(ca: Path | None, certificate: Path | None, key: Path | None) -> Tls | None:
    """Certificates of a client; None, no encryption, if none came."""
    return None if ca is None and certificate is None and key is None else Tls(ca, certificate, key)


def remote_source(
    servers: str | None, transport: str, timeout_s: float | None, tls: Tls | None, *, bundle_given: bool, device: str
) -> TritonSource | None:
    """A source at servers, not yet open; None if ``--server`` did not come.

    Raises
    ------
    UsageError
        Options that exclude each other, or an unknown transport.
    """
    if servers is None:
        if transport != "auto" or timeout_s is not None or tls is not None:
            raise UsageError("--transport, --timeout and --tls-… are for servers, but --server did not come; drop them")
        return None
    if bundle_given or device != "auto":
        raise UsageError("--server came with --bundle or --device; servers have their own bundle and device, drop one of the two")
    return TritonSource(parse_servers(servers), transport=cast(Transport, transport),
                        timeout_s=60.0 if timeout_s is None else timeout_s, tls=tls)


class Screen:
    """Standard error for people: steps, progress, notes; silent with ``--quiet``."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, markup=False)

    def warn_untrained(self, spec: BundleSpec) -> None:
        """Say that a bundle holds random weights, wherever one is used."""
        if note := untrained_note(spec):
            self.say(f"note: {note}")


def untrained_note(spec: BundleSpec) -> str:
    """What is said at every use of untrained weights; empty if there are none."""
    if not spec.trained:
        return (f"the bundle's weights are untrained ({spec.weights}): its features add local texture, not learned "
                "structure")
    if not is_trained(spec):
        return (f"the bundle's upsampler is untrained ({spec.upsampler['weights']}): it blurs at random what the backbone sees; "
                "--interpolation bilinear leaves it out")
    return ""


def fail(line: str) -> None:
    """Print an error's one line to standard error."""
    print(f"phaseline: {' '.join(line.split())}", file=sys.stderr)
