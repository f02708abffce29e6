"""What may reach the playground: its own page's requests, from this machine. Knows no torch."""

from __future__ import annotations

import re
from typing import Any

HOSTS = ("127.0.0.1", "localhost")
MOST_BYTES = 1 << 20  # of a request
_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.*"
    r"|/gradio_api/((queue/(join|data|status)|run/predict|cancel|reset)/?"
    r"|(startup-events|info|app_id)/?|heartbeat/\w+)"
)
_HEADERS = [  # gradio's own page has inline scripts, and compiles the templates of its components
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware that lets through what this page itself asks for.

    Another site's name may resolve to this machine, its page may post here, and gradio serves
    files, uploads and streams that this page has none of.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # no header of it was looked at, and the page opens none
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = self.refusal(scope)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        if status is None:
            return await self.app(scope, receive, answer)
        await answer({"type": "http.response.start", "status": status})
        await send({"type": "http.response.body", "body": b"refused"})

    def refusal(self, scope: Any) -> int | None:
        """The status with which a request is refused, None for one of the page's own."""
        sent = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
        host, length = sent.get("host", ""), sent.get("content-length", "")
        if host.partition(":")[0] not in HOSTS:
            return 400
        if sent.get("origin", f"http://{host}") != f"http://{host}":
            return 403
        if not _PATHS.fullmatch(scope["path"]):
            return 404
        short = length.isascii() and length.isdigit() and int(length) <= MOST_BYTES
        return None if scope["method"] in ("GET", "HEAD") or short else 413
