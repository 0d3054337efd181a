"""The Hub's client: every request ends, files are compared with their checksums, and no message contains the token."""

import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, set_client_factory
from huggingface_hub.utils import _http, parse_ratelimit_headers

from hf_seg.errors import UserError, file_errors
from hf_seg.files import sha256_of

SECONDS_OF_SILENCE = 120.0  # of a server, between two parts of an answer; the client alone would wait for ever
LONGEST_WAIT = 300  # seconds that a server may ask for before the next attempt: the window of the Hub's own limits
_LIBRARIES = ("huggingface_hub", "transformers", "datasets", "httpx")  # they log what a server answers
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@functools.cache
def limit_waiting() -> None:
    """Make every request of this process end; to be called before the first one.

    A server that is silent for `SECONDS_OF_SILENCE` is an error of the client, as is one that asks for a longer wait
    than `LONGEST_WAIT`. What the libraries log has no token from then on. The environment variable
    HF_HUB_DOWNLOAD_TIMEOUT gives other seconds of silence. A client that the user has configured stays as it is.
    """
    if _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory:  # there is no public way to ask
        set_client_factory(_create_client)
    create = logging.getLogRecordFactory()

    def create_without_token(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = create(*args, **kwargs)
        if record.name.startswith(_LIBRARIES):
            record.msg, record.args = without_token(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(create_without_token)


def _create_client() -> Any:
    client = _http.default_client_factory()
    client.timeout = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or SECONDS_OF_SILENCE)
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _refuse_long_wait]}
    return client


def _refuse_long_wait(response: Any) -> None:
    """Stop where the client would sleep for as long as a server asks."""
    if response.status_code < 400:
        return
    asked = response.headers.get("Retry-After", "")
    limits = parse_ratelimit_headers(response.headers)
    seconds = int(asked) if asked.isascii() and asked.isdigit() else 0
    if limits is not None and limits.remaining == 0:
        seconds = max(seconds, limits.reset_in_seconds)
    if seconds > LONGEST_WAIT:
        raise UserError(
            f"{response.url.host} answers {response.status_code}, and asks to wait {seconds} seconds; run it again then"
        )


def one_line(error: BaseException, longest: int = 300) -> str:
    """Return what an error of the Hub's client says, in one line without a token."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError | TypeError | AttributeError | AssertionError):  # of an answer with other content
        text = f"an answer that is none of the Hub's, {type(error).__name__}: {text}"
    return without_token(text)[:longest]


def without_token(text: str) -> str:
    """Return a text without the token of this process, or any other: a server may repeat what it was sent."""
    return _TOKEN.sub("...", text.replace(get_token() or "\0", "..."))


def check_downloads(paths: Iterable[Path], name: str) -> None:
    """Compare files of the Hub's cache with the checksums that their entries are named by; delete those that differ.

    The client compares sizes only, so what a proxy or a bad disk changed would stay in the cache for good.

    Args:
        paths: links in a snapshot's folder; a file that is no link has no checksum, and is taken as it is.
        name: what errors call the repository.

    Raises:
        UserError: naming the first file that differs.
    """
    damaged = []
    for path in paths:
        if path.is_symlink() and not _is_intact(path):
            path.resolve().unlink(missing_ok=True)
            (path.parent / os.readlink(path)).unlink(missing_ok=True)  # may be a link itself
            path.unlink(missing_ok=True)
            damaged.append(path.name)
    if damaged:
        raise UserError(
            f"{name}: {damaged[0]} differs from its checksum on the Hub, and was deleted from the cache; run again to "
            "download it again"
        )


def _is_intact(link: Path) -> bool:
    checksum = Path(os.readlink(link)).name
    if _SHA256.fullmatch(checksum):
        return sha256_of(link) == checksum
    if not _GIT_SHA1.fullmatch(checksum):
        return True  # a server of another kind
    with file_errors(link, "cannot be read"):
        content = link.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == checksum
