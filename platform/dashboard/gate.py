"""The door of the dashboard: who may look, under which name it may be reached, and what a browser may do with it."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Returns whether a listening address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """Lets a request through to `app` if host name, method and token are right, and guards every answer.

    The token comes once in the page's address, which sets a cookie that no script can read and leads to the address
    without it; programs send it as a bearer token.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, port: int, hosts: Iterable[str] = LOOPBACK_NAMES) -> None:
        """Wraps an application.

        Args:
          app: what is behind the door.
          token: None lets in everybody who can connect.
          port: part of the cookie's name, since browsers share cookies among the ports of a host.
          hosts: names under which it may be asked for; any other is a foreign page that had its own name point here.
        """
        self._app = app
        self._token = token
        self._cookie = f"openmoe-{port}"
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an ASGI request."""
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (refusal or self._app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if _host_name(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("this host name is not served; use the address that was printed\n", 400)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("only GET is answered\n", 405, {"Allow": "GET, HEAD"})
        if self._token is None:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if given := query.pop("token", None):
            return self._enter(scope["path"], query) if self._is_token(given[-1]) else _denied()
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(bearer.strip()):
            return None
        return None if self._is_token(self._from_cookie(headers)) else _denied()

    def _enter(self, path: str, query: dict[str, list[str]]) -> Response:
        rest = f"?{urlencode(query, doseq=True)}" if query else ""
        response = RedirectResponse("/" + path.lstrip("/\\") + rest, 303)
        response.set_cookie(self._cookie, self._token or "", httponly=True, samesite="strict", path="/")
        return response

    def _from_cookie(self, headers: Headers) -> str:
        try:
            cookies = SimpleCookie("; ".join(headers.getlist("cookie")))
        except CookieError:
            return ""
        return cookies[self._cookie].value if self._cookie in cookies else ""

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def _denied() -> Response:
    return PlainTextResponse(
        "401: open the address with ?token=... that `openmoe dashboard` printed\n",
        401,
        {"WWW-Authenticate": 'Bearer realm="openmoe dashboard"'},
    )


def _host_name(host: str) -> str:
    """Returns the name in a Host header, lower case, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
