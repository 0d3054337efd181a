"""A local Hub: the part of its protocol that pushing and pulling need, over real HTTP, with faults on demand.

with serve_hub(tokens={"hf_me"}) as hub:
    environ["HF_ENDPOINT"] = hub.url            # and HF_HUB_DISABLE_XET=1, both before huggingface_hub is imported
    hub.faults.append(Fault("PUT", "/lfs/", status=503, times=1))
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub

LFS_SUFFIXES = (".safetensors", ".parquet")


class Stored(NamedTuple):
    """One file of one commit."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Its name by content: sha256 of a large file, git's sha1 of another."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Every commit with its files and message, and the branches and tags that point to them."""

    private: bool
    gated: bool = False
    variables: dict[str, str] = field(default_factory=dict)  # of a Space
    commits: dict[str, dict[str, Stored]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch, tag or commit."""
        return {name: file.content for name, file in self.commits[self.refs.get(revision, revision)].items()}


@dataclass
class Fault:
    """A failure of the next `times` requests of a method whose path contains `part`.

    Without a status or a kind, the connection is cut after half of the content.

    Args:
        method: "" for any.
        part: of the path; with `exact`, all of it.
        status: answer this, and repeat the token.
        kind: one of `KINDS`.
        headers: more of the answer.
        skip: such requests that are answered before.
    """

    method: str
    part: str
    times: int = 1
    status: int | None = None
    kind: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    skip: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Tell whether a request fails, and count it."""
        if self.method not in ("", method) or not (path == self.part if self.exact else self.part in path):
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times <= 0:
            return False
        self.times -= 1
        return True


KINDS = (
    "cut first",  # the connection, before anything happens
    "cut answer",  # the connection, after half of the answer; what was asked for has happened
    "silent",  # no answer, and nothing happens
    "slow",  # the answer in small pieces
    "other JSON",  # another answer, which repeats the token
    "web page",  # of a proxy
    "too short",  # the answer ends before its Content-Length
    "flipped bit",  # in the answer, which keeps its length
    "elsewhere",  # a redirect to another host, which has the same answer to a GET
)


@dataclass
class Hub:
    """State of the server, which a test may read and change."""

    tokens: set[str]
    url: str = ""
    role: str = "write"  # of every token
    repositories: dict[str, Repository] = field(default_factory=dict)  # "models/me/x", "datasets/me/y", "spaces/me/z"
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "METHOD path"
    elsewhere: str = ""  # address of another host
    elsewhere_answers: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)  # by path
    elsewhere_headers: list[str] = field(default_factory=list)  # of every request that it got
    before_answer: Callable[[int], None] | None = None  # gets the number of the request, from 1
    closed: Event = field(default_factory=Event)

    def head(self, name: str, kind: str = "models") -> str:
        """Return the commit of a repository's main branch."""
        return self.repositories[f"{kind}/{name}"].refs["main"]


class HubError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, **more: str) -> None:
        super().__init__(code)
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the standard library's names)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.before_answer is not None:
            self.hub.before_answer(len(self.hub.requests))
        fault = next((each for each in self.hub.faults if each.meets(self.command, path)), None)
        length = int(self.headers.get("Content-Length", 0))
        kind = fault.kind if fault is not None else ""
        if fault is not None and not fault.status and not kind and self.command != "GET":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        if kind in ("cut first", "silent"):
            self.close_connection = True
            if kind == "silent":
                self.hub.closed.wait(60)
            return
        try:
            if fault is not None and fault.status is not None:
                # the answer repeats the token
                raise HubError(fault.status, "Fault", error=f"refused {self.headers.get('Authorization')}")
            content, headers = self._route(path)
            status = 200
        except HubError as error:
            content, headers = json.dumps({"error": error.code} | error.more).encode(), {"X-Error-Code": error.code}
            status = error.status
            if fault is not None:
                headers |= {"X-Error-Message": f"refused {self.headers.get('Authorization')}", **fault.headers}
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and status == 200:
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        if kind == "elsewhere":
            return self._send_elsewhere(path, content, headers)
        content = self._spoil(kind, content)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if kind in ("cut answer", "too short") or (fault is not None and not fault.status and not kind):
            content, self.close_connection = content[: len(content) // 2], True  # an answer that ends too early
        if self.command == "HEAD":
            return
        piece = max(len(content) // 10, 1) if kind == "slow" else max(len(content), 1)
        for start in range(0, len(content), piece):
            self.wfile.write(content[start : start + piece])
            if kind == "slow":
                self.hub.closed.wait(0.05)

    def _spoil(self, kind: str, content: bytes) -> bytes:
        if kind == "other JSON":
            return json.dumps({"unexpected": self.headers.get("Authorization")}).encode()
        if kind == "web page":
            return f"<html><h1>Log in</h1>{self.headers.get('Authorization')}</html>".encode()
        if kind == "flipped bit" and content:
            middle = len(content) // 2
            return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        return content

    def _send_elsewhere(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        """Redirect as the Hub does to its storage, with what a client needs to know of the file."""
        self.hub.elsewhere_answers[path] = content, headers
        self.send_response(302 if self.command in ("GET", "HEAD") else 307)
        linked = {"X-Linked-Etag": headers.get("ETag", ""), "X-Linked-Size": str(len(content))}
        where = {"Location": self.hub.elsewhere + path, "Content-Length": "0"}
        for name, value in ({key: headers[key] for key in headers if key.startswith("X-")} | linked | where).items():
            self.send_header(name, value)
        self.end_headers()

    def _route(self, path: str) -> tuple[bytes, dict[str, str]]:
        if path == "/api/whoami-v2":
            self._require_token()
            access = {"displayName": "test", "role": self.hub.role}
            return _json(type="user", name="me", orgs=[{"name": "org"}], auth={"accessToken": access})
        if path == "/api/validate-yaml":
            return _json(errors=[], warnings=[])
        if path == "/api/repos/create":
            return self._create()
        if path.startswith("/lfs/"):
            return self._store(path.removeprefix("/lfs/"))
        if found := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._offer_uploads(self._open((found[1] or "models/") + found[2]))
        if found := re.fullmatch(r"/api/(spaces/[^/]+/[^/]+)/variables", path):
            return self._set_variable(self._open(found[1]))
        if found := re.fullmatch(
            r"/api/((?:models|datasets|spaces)/[^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.*))?)?)?", path
        ):
            name, action, revision, rest = found.groups()
            return self._call(self._open(name), name, action or "revision", revision or "main", rest or "")
        if found := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            return self._resolve(self._open((found[1] or "models/") + found[2]), found[3], found[4])
        raise HubError(404, "UnknownPath")

    def _require_token(self) -> None:
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.tokens:
            raise HubError(401, "InvalidToken")

    def _open(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or repository.private:
            try:
                self._require_token()  # without it, a private repository looks like one that does not exist
            except HubError:
                raise HubError(401, "RepoNotFound") from None
        if repository is None:
            raise HubError(404, "RepoNotFound")
        if repository.gated:
            raise HubError(403, "GatedRepo")
        return repository

    def _create(self) -> tuple[bytes, dict[str, str]]:
        self._require_token()
        wanted = json.loads(self.body)
        name = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.repositories:
            raise HubError(409, "RepoExists", url=url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # the client's version 2, or 1
        self.hub.repositories[name] = Repository(private)
        return _json(url=url)

    def _set_variable(self, repository: Repository) -> tuple[bytes, dict[str, str]]:
        self._require_token()
        wanted = json.loads(self.body)
        repository.variables[wanted["key"]] = wanted["value"]
        return _json(**{key: {"value": value} for key, value in repository.variables.items()})

    def _offer_uploads(self, _: Repository) -> tuple[bytes, dict[str, str]]:
        self._require_token()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else {"actions": upload}))
        return _json(transfer="basic", objects=objects)

    def _store(self, oid: str) -> tuple[bytes, dict[str, str]]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadChecksum")
        self.hub.objects[oid] = self.body
        return b"", {}

    def _call(
        self, repository: Repository, name: str, action: str, revision: str, rest: str
    ) -> tuple[bytes, dict[str, str]]:
        if action == "branch":
            return self._name_commit(repository, revision, json.loads(self.body or b"{}").get("startingPoint", "main"))
        if action == "tag":
            return self._name_commit(repository, json.loads(self.body)["tag"], revision)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise HubError(404, "RevisionNotFound")
        if action == "preupload":
            return self._plan_upload(repository.commits[commit])
        if action == "commit":
            return self._commit(repository, name, revision)
        if action == "tree":
            return _tree(repository.commits[commit], rest, parse_qs(urlsplit(self.path).query))
        siblings = [{"rfilename": file} for file in repository.commits[commit]]
        about = {"id": name.partition("/")[2], "sha": commit, "private": repository.private, "tags": [], "downloads": 0}
        return _json(**about, likes=0, gated=False, disabled=False, siblings=siblings)

    def _name_commit(self, repository: Repository, ref: str, start: str) -> tuple[bytes, dict[str, str]]:
        self._require_token()
        if ref in repository.refs:
            raise HubError(409, "RefExists")
        repository.refs[ref] = repository.refs.get(start, start)
        return _json()

    def _plan_upload(self, files: dict[str, Stored]) -> tuple[bytes, dict[str, str]]:
        self._require_token()
        planned: list[dict[str, Any]] = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": files[path].oid} if path in files else {}
            planned.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return _json(files=planned)

    def _commit(self, repository: Repository, name: str, branch: str) -> tuple[bytes, dict[str, str]]:
        self._require_token()
        files = dict(repository.commits[repository.refs[branch]])
        message = ""
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())):
            if key == "header":
                if value.get("parentCommit", repository.refs[branch]) != repository.refs[branch]:
                    raise HubError(
                        412, "CommitMoved", error="A commit has happened since. Please refresh and try again."
                    )
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = Stored(self.hub.objects[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit], repository.refs[branch] = files, commit
        repository.messages.append(message)
        return _json(commitUrl=f"{self.hub.url}/{name.removeprefix('models/')}/commit/{commit}", commitOid=commit)

    def _resolve(self, repository: Repository, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise HubError(404, "RevisionNotFound")
        file = repository.commits[commit].get(path)
        if file is None:
            raise HubError(404, "EntryNotFound")
        return file.content, {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}


class _ElsewhereHandler(_Handler):
    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.elsewhere_headers.append(str(self.headers))
        content, headers = self.hub.elsewhere_answers.get(path, (b"", {}))
        self.send_response(200 if self.command in ("GET", "HEAD") and headers else 404)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _json(**answer: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(answer).encode(), {"Content-Type": "application/json"}


def _tree(files: dict[str, Stored], folder: str, query: dict[str, list[str]]) -> tuple[bytes, dict[str, str]]:
    prefix = f"{folder}/" if folder else ""
    inside = {path: file for path, file in files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise HubError(404, "EntryNotFound")
    listed: dict[str, dict[str, Any]] = {}
    for path, file in inside.items():
        name, _, deeper = path.removeprefix(prefix).partition("/")
        if deeper:
            listed[prefix + name] = {"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0}
        if not deeper or query.get("recursive", ["false"])[0].lower() == "true":
            listed[path] = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
            if file.is_lfs:
                listed[path]["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
    return json.dumps(list(listed.values())).encode(), {"Content-Type": "application/json"}


@contextmanager
def serve_hub(tokens: set[str]) -> Iterator[Hub]:
    """Serve a Hub on a free port of this machine for as long as the context lasts."""
    hub = Hub(tokens)
    servers = []
    for handler in (_Handler, _ElsewhereHandler):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub})))
        servers[-1].daemon_threads = True
        Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
    hub.url, hub.elsewhere = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        hub.closed.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def go_online(url: str, token: str | None) -> None:
    """Point this process's Hub client to the test server."""
    constants = huggingface_hub.constants
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = url, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants.HF_HUB_DISABLE_XET = True  # it talks to hosts of its own
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
