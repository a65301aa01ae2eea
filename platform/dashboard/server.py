"""Listens for the dashboard: the address, the token, and the end on Ctrl-C."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from openmoe.platform.dashboard import app, gate
from openmoe.platform.dashboard.watch import Watch

TOKEN_VARIABLE = "OPENMOE_DASHBOARD_TOKEN"  # for those who start it and must know the token beforehand


class DashboardError(ValueError):
    """The dashboard cannot be started as asked; one line with the remedy."""


def serve(
    folders: Sequence[str],
    *,
    home: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    with_token: bool = True,
    say: Callable[[str], None],
) -> None:
    """Serves the dashboard until it is told to stop.

    Args:
      folders: run directories, or folders of them; local or gs://.
      home: where the controller's database and the local clusters are, if there are any.
      host: address to listen on.
      port: to listen on; 0 for any free one.
      with_token: ask visitors for a token: a random one, or $OPENMOE_DASHBOARD_TOKEN.
      say: gets the address, with the token, and what is shown.

    Raises:
      DashboardError: the port is taken, or an open door to other machines was asked for.
    """
    if not with_token and not gate.is_loopback(host):
        raise DashboardError(f"--no-token: only on this machine, and --host is {host}; leave one of them out")
    listening = listen(host, port)
    port = listening.getsockname()[1]
    token = (os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)) if with_token else None
    watch = Watch(folders, home)
    served = app.create(watch, token=token, port=port, hosts=host_names(host))
    shown = f"[{host}]" if ":" in host else host
    say(f"dashboard  http://{shown}:{port}/{f'?token={token}' if token else ''}")
    say(f"runs of    {', '.join(map(_named, watch.folders)) or 'the jobs of this machine'}")
    config = uvicorn.Config(
        served,
        log_level="warning",
        access_log=False,  # it would hold the token
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _named(folder: str) -> str:
    return folder if "://" in folder or Path(folder).is_dir() else f"{folder} (there is no such folder yet)"


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
      DashboardError: the port is taken or may not be used, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise DashboardError(f"--host: {host} is no address of this machine ({reason})") from error
        remedy = "choose another port, or 0 for any free one"
        raise DashboardError(f"--port: cannot listen on {host}:{port} ({reason}); {remedy}") from error
    return listening


def host_names(host: str) -> set[str]:
    """Returns the names by which an address may be asked for; a tunnel to this machine comes as localhost."""
    names = {*gate.LOOPBACK_NAMES, host.lower()}
    if not gate.is_loopback(host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        if host in ("0.0.0.0", "::"):
            names |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    return names
