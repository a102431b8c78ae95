"""Gate: what is checked before a request is read: the key, and the size of the body. It counts the answers, too."""

from __future__ import annotations

import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.serve.metrics import Metrics
from specdec.serve.protocol import ApiError, error_body

__all__ = ["Gate"]

OPEN = {"/health"}  # for probes, which have no key


class Gate:
    """ASGI middleware.

    Args:
        app: behind the gate.
        api_key: that `Authorization: Bearer` must carry; None: no key.
        most: bytes of a body.
        metrics: count the answers.

    Raises:
        ValueError: a key that is empty or not ASCII.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most: int, metrics: Metrics) -> None:
        if api_key is not None and not (api_key and api_key.isascii()):
            raise ValueError("api_key must be non-empty ASCII text, which headers can carry")
        self._app, self._most, self._metrics = app, most, metrics
        self._expected = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope, message["status"])
            await send(message)

        headers: dict[bytes, bytes] = dict(scope["headers"])
        if not self._may_enter(scope["path"], headers.get(b"authorization", b"")):
            await _refuse(401, "missing or wrong API key; fix: Authorization: Bearer KEY")(scope, receive, counting)
            return
        if self._claims_too_much(headers.get(b"content-length")):
            await _refuse(413, self._too_large)(scope, receive, counting)
            return
        await self._app(scope, self._limited(receive), counting)

    def _may_enter(self, path: str, authorization: bytes) -> bool:
        if self._expected is None or path in OPEN:
            return True
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._expected)

    @property
    def _too_large(self) -> str:
        return f"the request body may have at most {self._most} bytes"

    def _claims_too_much(self, length: bytes | None) -> bool:
        return length is not None and (not length.isdigit() or len(length) > 18 or int(length) > self._most)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that stops a body without a Content-Length, too."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise ApiError(413, self._too_large)
            return message

        return limited


def _refuse(status: int, message: str) -> JSONResponse:
    headers = {"Connection": "close", **({"WWW-Authenticate": "Bearer"} if status == 401 else {})}
    return JSONResponse(error_body(status, message), status, headers)
