"""`phaseline load`: how much a server answers, and how fast."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from phaseline.clients import options
from phaseline.clients.load import Load, LoadReport, run_load
from phaseline.runtime.errors import ServerFailedError, UsageError
from phaseline.runtime.protocol import BACKBONE, PRIORITIES


def load_command(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The server to ask.")],
    published: Annotated[str | None, typer.Option(
        "--published", metavar="NAME", help="Send frames to segment_NAME; without it, tiles to --model.")] = None,
    model: Annotated[str | None, typer.Option(
        "--model", help="What gets tiles: backbone (if not given), or features of a bundle with an upsampler.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight.")] = 8,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure.")] = 10.0,
    warm_up: Annotated[float, typer.Option("--warm-up", min=0.0, help="Seconds before that.")] = 2.0,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Of a frame.")] = 1024,
    cols: Annotated[int, typer.Option("--cols", min=1, help="Of a frame.")] = 1024,
    dtype: Annotated[str | None, typer.Option("--dtype", help="uint8, uint16 or float32; by default the recipe's.")] = None,
    priority: Annotated[str, typer.Option("--priority", help="interactive or batch.")] = "interactive",
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for each request.")] = 60.0,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Send a server as much as it takes, and print throughput, latency and mean batch: for sizing. Frames are noise."""
    del debug
    if priority not in PRIORITIES:
        raise UsageError(f"priority is {priority!r}, expected one of {', '.join(PRIORITIES)}")
    if published is not None and model is not None:
        raise UsageError("--published and --model came together; frames go to the one, tiles to the other, drop one of the two")
    screen = options.Screen(quiet)
    load = Load(server, published, concurrency, seconds, warm_up, rows, cols, dtype, timeout, priority,
                options.client_tls(tls_ca, tls_cert, tls_key), model or BACKBONE)
    with Progress(console=screen.console, transient=True, disable=quiet or not screen.console.is_terminal) as bars:
        bar = bars.add_task(f"asking {server}", total=1.0)
        report = run_load(load, lambda part: bars.update(bar, completed=part))
    for name, text in lines(report):
        typer.echo(f"{name:<20} {text}")
    if not len(report.latencies_s):
        raise ServerFailedError(f"no request ended well: {dict(report.errors)}")


def lines(report: LoadReport) -> list[tuple[str, str]]:
    """What is printed: names and values."""
    latencies = ", ".join(f"p{percent} {1000 * report.latency_s(percent):.1f}" for percent in (50, 95, 99))
    failed = ", ".join(f"{name} {count}" for name, count in sorted(report.errors.items()))
    return [
        ("model", report.model),
        ("requests", f"{len(report.latencies_s)} in {report.seconds:.1f} s; errors: {failed or 'none'}"),
        ("throughput", f"{report.throughput:.2f} requests/s"),
        ("latency", f"{latencies} ms"),
        ("message", f"{report.request_bytes / 1e6:.3f} MB in, {report.answer_bytes / 1e6:.3f} MB out"),
        ("batches of tiles", f"{report.batches.executions}, of {report.batches.mean:.2f} tiles on average"),
    ]
