"""A Hugging Face Hub on the loopback: the few endpoints that reading and pushing a model use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

LARGE = (".safetensors", ".bin", ".pt", ".pkl")
"""Endings of files that the Hub keeps outside of git."""
TOKEN = "hf_of_the_owner"


@dataclass
class Repo:
    """A repository: its commits, branches and who may read it.

    ``sizes`` are told in place of the true ones.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; return the commit."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        text = repr((len(self.commits), sorted(files)))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch or a commit's own name."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    broken: bool = False
    address: str = ""

    def asked(self, word: str) -> list[str]:
        """Return the requests that hold a word."""
        return [request for request in self.requests if word in request]


class Handler(BaseHTTPRequestHandler):
    """Answers for ``server.hub``."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *words: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self.chunks())
        else:
            body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken:
            return self.answer(503, {"error": "down"})
        if self.command in ("GET", "HEAD"):
            return self.read(path)
        return self.write(path, body)

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code)

    def reached(self, name: str) -> Repo | None:
        """Return a repository that the sender may read; else answer."""
        repo = self.hub.repos.get(name)
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not owner):
            self.refuse(401, "RepoNotFound")
            return None
        if repo.gated and not owner:
            self.refuse(403, "GatedRepo")
            return None
        return repo

    def read(self, path: str) -> None:
        if path.startswith("/api/models/"):
            user, name, *rest = path.removeprefix("/api/models/").split("/")
            return self.info(f"{user}/{name}", "/".join(rest[1:]) or "main")
        place, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        return self.file(place, revision, file)

    def info(self, name: str, revision: str) -> None:
        repo = self.reached(name)
        if repo is None:
            return
        sha = repo.find(revision)
        if sha is None and repo.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repo.commits.get(sha or "", {})
        listed = [self.entry(file, data, repo) for file, data in files.items()]
        front = files.get("README.md", b"").decode().split("---\n")
        about = {}
        # The real one lists a repository whose card it cannot read.
        with suppress(yaml.YAMLError):
            about = yaml.safe_load(front[1]) if len(front) > 2 else {}
        library = about.get("library_name")
        self.answer(
            200, {"id": name, "sha": sha, "siblings": listed, "library_name": library, "tags": []}
        )

    def entry(self, file: str, data: bytes, repo: Repo) -> dict[str, Any]:
        size = repo.sizes.get(file, len(data))
        found: dict[str, Any] = {"rfilename": file, "size": size, "blobId": "0" * 40}
        if file.endswith(LARGE):
            digest = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"sha256": digest, "size": size, "pointerSize": 130}
        return found

    def file(self, name: str, revision: str, file: str) -> None:
        repo = self.reached(name)
        if repo is None:
            return
        sha = repo.find(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        data = repo.commits[sha].get(file)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        kind = hashlib.sha256 if file.endswith(LARGE) else hashlib.sha1
        headers = {"X_Repo_Commit": sha, "ETag": f'"{kind(data).hexdigest()}"'}
        self.answer(200, data, **headers)

    def write(self, path: str, body: bytes) -> None:
        if path.startswith("/lfs/"):
            self.hub.blobs[path.rpartition("/")[2]] = body
            return self.answer(200, {})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        user, name, action, *rest = path.removeprefix("/api/models/").split("/")
        repo = self.hub.repos[f"{user}/{name}"]
        branch = "/".join(rest)
        if action == "branch":
            repo.branches.setdefault(branch, repo.branches.get("main", ""))
            return self.answer(200, {})
        if action == "preupload":
            files = [entry["path"] for entry in json.loads(body)["files"]]
            return self.answer(
                200,
                {
                    "files": [
                        {
                            "path": file,
                            "uploadMode": "lfs" if file.endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                },
            )
        return self.commit(f"{user}/{name}", repo, branch, body)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.address}/{name}"})
        if asked["organization"] != "owner":
            return self.answer(403, {"error": "not yours"}, X_Error_Message="not yours")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private))
        return self.answer(200, {"url": f"{self.hub.address}/{name}"})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": f"{self.hub.address}/lfs/{entry['oid']}"}},
            }
            for entry in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        files = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repo.commit(files, branch)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty Hub for the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(address=f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def cut_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub to a port on which nothing listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
