"""What the page's server refuses before Gradio sees it: uploads that are too large, and fetching for others."""

import shutil
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

FORM_BYTES = 1 << 16  # of a request around the file in it
REMOTE = ("/file=http", "/proxy=")  # Gradio would fetch the rest of these paths from other servers


class Guard:
    """An ASGI layer around Gradio.

    Gradio limits each file of an upload, but takes a thousand files in a request, and keeps what has arrived of an
    upload that is cancelled. It deletes it on a `MultiPartException`, so both end in one here.

    Args:
        folder: where uploads are written; with less free space than two of the largest uploads, none is taken.
        max_bytes: size of the largest upload.
    """

    def __init__(self, app: App, *, folder: Path, max_bytes: int) -> None:
        self.app, self.folder, self.max_bytes = app, folder, max_bytes

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, answer = scope["path"], None
        if any(part in path for part in REMOTE):
            answer = PlainTextResponse("This server fetches nothing from others.", 403)
        elif not path.rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        elif shutil.disk_usage(self.folder).free < 2 * self.max_bytes:
            answer = PlainTextResponse("The server's disk is nearly full, try again later.", 507)
        await (answer(scope, receive, send) if answer else self.app(scope, self._limited(receive), send))

    def _limited(self, receive: Callable[[], Awaitable[Message]]) -> Callable[[], Awaitable[Message]]:
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes + FORM_BYTES:
                raise MultiPartException(f"The upload exceeded the maximum allowed size of {self.max_bytes} bytes.")
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload was cancelled.")
            return message

        return receive_limited
