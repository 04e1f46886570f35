"""`phaseline publish`: a recipe → running servers; back to an earlier version; or no longer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phaseline.clients import options
from phaseline.clients.kserve import Tls, parse_servers
from phaseline.clients.publish import describe, publish, read_key, rollback, withdraw
from phaseline.runtime.errors import PhaselineError, UsageError


def publish_command(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT[,…]", help="Every server that shall have it.")],
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The folder that `phaseline fit` wrote.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Served as segment_NAME; by default the folder's name.")] = None,
    roll_back: Annotated[str | None, typer.Option(
        "--rollback", metavar="NAME", help="Serve the version before, or that of --version, again.")] = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="For --rollback.")] = None,
    withdrawn: Annotated[str | None, typer.Option("--withdraw", metavar="NAME", help="Serve this recipe no longer.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="File with the server's publish key.")] = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Publish a recipe to running servers, or take one back. What they serve is listed by phaseline info --server."""
    del debug
    screen = options.Screen(quiet)
    if sum(given is not None for given in (recipe, roll_back, withdrawn)) != 1:
        raise UsageError("expected one of: a RECIPE folder, --rollback NAME, --withdraw NAME")
    if name is not None and recipe is None:
        raise UsageError("--name came without a RECIPE; --rollback and --withdraw take the name themselves")
    if version is not None and roll_back is None:
        raise UsageError("--version came without --rollback NAME")
    tls, secret = options.client_tls(tls_ca, tls_cert, tls_key), read_key(key)
    failures = []
    servers = parse_servers(server)
    for one in servers:
        try:
            screen.say(f"{one}: {_change(one, recipe, name, roll_back, version, withdrawn, secret, tls)}")
        except PhaselineError as error:
            # The others shall have it all the same; which ones have not is said.
            if len(servers) == 1:
                raise
            options.fail(str(error))
            failures.append(one)
    if failures:
        raise PhaselineError(f"{len(failures)} of {len(servers)} servers did not take it: {', '.join(failures)}; publish again "
                             "later: those that have it stay as they are")


def _change(
    server: str, recipe: Path | None, name: str | None, roll_back: str | None, version: int | None, withdrawn: str | None,
    key: str | None, tls: Tls | None,
) -> str:
    if recipe is not None:
        answer = publish(server, recipe, name or recipe.resolve().name, key=key, tls=tls)
    elif roll_back is not None:
        answer = rollback(server, roll_back, version, key=key, tls=tls)
    else:
        assert withdrawn is not None
        answer = withdraw(server, withdrawn, key=key, tls=tls)
    return describe(answer) + ("" if answer["changed"] else " (it was before)")
