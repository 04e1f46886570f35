"""Where and how a server listens: addresses, ports, certificates, and what nobody may call."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaseline.runtime.errors import MissingInputError, UsageError

HTTP_ADDRESS = "127.0.0.1"
LOOPBACK = (HTTP_ADDRESS, "localhost")
# No client can send this header: ':' ends a header's name. What is restricted by it is off.
_NEVER = "off:off"


@dataclass(frozen=True)
class Listening:
    """Where and how the server listens.

    Attributes
    ----------
    bind
        Address of gRPC and metrics, IPv4 or a name. HTTP, for health checks, listens on this host only.
    grpc_port, http_port, metrics_port
        0: a free one.
    shared_memory
        Whether clients on this host may pass tensors through system shared memory.
    certificate, key
        PEM files: gRPC over TLS.
    client_ca
        PEM file: clients must show a certificate signed by it (mutual TLS).
    publish_key
        File with the key that publishing needs. Needed to publish at all with TLS, or when `bind` is not the loopback.
    """

    bind: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    shared_memory: bool = False
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    publish_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise UsageError("TLS needs both --tls-cert and --tls-key; only one came")
        if self.client_ca is not None and self.certificate is None:
            raise UsageError("--tls-client-ca came without --tls-cert and --tls-key; mutual TLS needs all three")
        if ":" in self.bind:
            raise UsageError(f"{self.bind} is no IPv4 address or name, which Triton listens on; give one with --bind")
        if self.shared_memory and not self.is_loopback and self.client_ca is None:
            raise UsageError(f"--shared-memory came with --bind {self.bind}, where everybody could name regions of this host's "
                             "/dev/shm; bind to the loopback, or ask for certificates with --tls-client-ca")
        for path in (self.certificate, self.key, self.client_ca, self.publish_key):
            if path is not None and not path.is_file():
                raise MissingInputError(f"no file at {path}; expected a PEM file or a key")
        if self.publish_key is not None and not self.publish_key.read_text(encoding="utf-8").strip():
            raise UsageError(f"the key file {self.publish_key} is empty; write a long random text into it")

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the server."""
        return self.bind in LOOPBACK

    @property
    def all_may_publish(self) -> bool:
        """Whether recipes may be published without a key: on the loopback without TLS, where no other is given."""
        return self.publish_key is None and self.is_loopback and self.certificate is None

    def options(self, ports: Mapping[str, int], http_token: str) -> list[str]:
        """Triton's options.

        Parameters
        ----------
        ports
            ``grpc``, ``http`` and ``metrics``.
        http_token
            What the keeper shows to use more than health checks over HTTP, in the header ``keeper``. Users of this host can see
            it; a page in their browser cannot.
        """
        off = ",".join(["model-repository", "trace", "logging", *([] if self.shared_memory else ["shared-memory"])])
        options: dict[str, object] = {
            **{f"{name}-address": HTTP_ADDRESS if name == "http" else self.bind for name in ports},
            **{f"{name}-port": port for name, port in ports.items()},
            "grpc-restricted-protocol": f"{off}:{_NEVER}={secrets.token_hex(32)}",
            # A client that is gone without a word is noticed.
            "grpc-keepalive-time": 30_000,
            "grpc-keepalive-timeout": 10_000,
        }
        http = [f"{off}:{_NEVER}={secrets.token_hex(32)}", f"inference,metadata,model-config,statistics:keeper={http_token}"]
        if self.certificate is not None and self.key is not None:
            options |= {"grpc-use-ssl": "true", "grpc-server-cert": self.certificate, "grpc-server-key": self.key}
            if self.client_ca is not None:
                options |= {"grpc-use-ssl-mutual": "true", "grpc-root-cert": self.client_ca}
        return [*(f"--{name}={value}" for name, value in options.items()), *(f"--http-restricted-api={api}" for api in http)]


def claim_ports(bind: str, ports: dict[str, int], patience_s: float = 0.0) -> None:
    """Replace zeros by free ports, and refuse ports that are taken, and still are after `patience_s`.

    Raises
    ------
    UsageError
        An address or port that cannot be listened on.
    """
    if len({port for port in ports.values() if port}) < sum(1 for port in ports.values() if port):
        raise UsageError(f"the ports are {', '.join(f'{name} {port}' for name, port in ports.items())}, expected different ones")
    deadline = time.monotonic() + patience_s
    with contextlib.ExitStack() as stack:
        for name, port in ports.items():
            address = HTTP_ADDRESS if name == "http" else bind
            try:
                family, kind, _, _, where = socket.getaddrinfo(address, port, socket.AF_INET, socket.SOCK_STREAM)[0]
                listener = stack.enter_context(socket.socket(family, kind))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                while not _bind(listener, where, deadline):
                    time.sleep(0.2)
            except (OSError, OverflowError) as error:
                raise UsageError(f"{name} cannot listen on {address}:{port} ({error}); choose another with --{name}-port or "
                                 "--bind, or stop what listens there") from error
            ports[name] = listener.getsockname()[1]


def _bind(listener: socket.socket, where: Any, deadline: float) -> bool:
    """Bind to an address; False if it is taken, and the deadline is not over."""
    try:
        listener.bind(where)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
            raise
        return False
    return True
