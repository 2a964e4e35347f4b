"""A server on this machine answers requests by a name of this machine, and none of another site's page.

A page of another site can make its reader's browser send requests here. By DNS rebinding (the site's name resolves to
this machine) the page can even read the answers; the browser then sends that name as `Host`. Starlette's
TrustedHostMiddleware cannot allow every address, cuts `[::1]` at its colon, and does not check the origin.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class HostMiddleware:
    """ASGI middleware: 403 for a `Host` that is no name of this machine, and for requests of another site's page.

    `allowed` are further names ("*": any). `refuse(status, message)` makes the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed: Iterable[str] = (),
        refuse: Callable[[int, str], ASGIApp] = lambda status, message: PlainTextResponse(message + "\n", status),
    ) -> None:
        self.app, self.refuse = app, refuse
        self.allowed = {name.lower().rstrip(".") for name in allowed}
        self.own = {"localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (message := self._refusal(scope)):
            return await self.refuse(403, message)(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        host = hosts[0] if len(hosts) == 1 else ""
        name = _name(host)
        if not ({"*", name} & self.allowed or name in self.own or _is_address(name)):
            return f"the host {name[:200]!r} is not allowed here: its owner can allow it by --allowed-hosts"
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1").lower()
        site = origin.partition("://")[2]
        # Behind a proxy the browser may know another name than `Host`; that name must be allowed.
        if origin and site != host.lower() and not {"*", _name(site)} & self.allowed:
            return f"pages of {origin[:200]!r} may not ask here: its owner can allow them by --allowed-hosts"
        return None


def _is_address(name: str) -> bool:
    """An address needs no name server, so DNS rebinding cannot forge it."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """`name:port` or `[address]:port` without the port, in lower case."""
    bracket = host.rfind("]")
    name = host[: bracket + 1] if bracket >= 0 else host.partition(":")[0]
    return name.lower().rstrip(".")
