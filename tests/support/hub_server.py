"""A server on this machine that speaks what huggingface_hub asks of the Hub for a model: create,
check a card, upload over LFS, list and download. It fails when told to."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

POINTER = b"pointer: %s\n"
TOKEN = "hf_" + "a" * 34


@dataclass
class Fault:
    """What happens to the next `times` requests that a pattern ("PUT /lfs/") is found in.

    Attributes:
        what: a status, "drop" (the connection ends in the middle of the body), or "hang".
    """

    pattern: str
    what: int | str
    times: int


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}".encode()).hexdigest()


class Hub:
    """The server's state, which a test looks at.

    Attributes:
        repos: {name: what it holds}.
        objects: {sha256: large file}, as LFS stores them.
        requests: each as "METHOD /path", in order.
        xet: where hf_xet puts large files in place of LFS; the server never sees their content.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.xet: Path | None = None
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def fail(self, pattern: str, what: int | str, times: int = 1) -> None:
        self.faults.append(Fault(pattern, what, times))

    def fault(self, request: str) -> int | str | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.what
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def download(self, repo: str, folder: Path) -> Path:
        """What the server holds, as a folder."""
        for name, content in self.repos[repo].files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.serve()

    do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815

    def serve(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.hub.fault(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        if fault == "hang":
            self.hub.closing.wait(60)
        if fault in ("drop", "hang"):
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        own = path.startswith("/lfs/") or path == "/api/validate-yaml"
        if isinstance(fault, int):
            self.answer({"error": "on purpose"}, fault)
        elif not own and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        else:
            with self.hub.lock:
                self.route(f"{self.command} {path}", body)

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def route(self, request: str, body: bytes) -> None:
        routes = {
            r"POST /api/validate-yaml": self.validate,
            r"POST /api/repos/create": self.create,
            r"PUT /lfs/(\w+)": self.store,
            r"POST /([\w-]+/[\w-]+)\.git/info/lfs/objects/batch": self.batch,
            r"POST /api/models/([\w-]+/[\w-]+)/preupload/main": self.preupload,
            r"POST /api/models/([\w-]+/[\w-]+)/commit/main": self.commit,
            r"GET /api/(?:models|datasets)/([\w-]+/[\w-]+)/tree/\w+": self.tree,
            r"GET /api/datasets/([\w-]+/[\w-]+)/tree/\w+/.+": self.no_entry,
            r"GET /api/models/([\w-]+/[\w-]+)/xet-write-token/main": self.xet_token,
            r"GET /api/(?:models|datasets)/([\w-]+/[\w-]+)(?:/revision/\w+)?": self.info,
            r"(?:GET|HEAD) (?:/datasets)?/([\w-]+/[\w-]+)/resolve/\w+/(.+)": self.resolve,
        }
        for pattern, serve in routes.items():
            if found := re.fullmatch(pattern, request):
                names = found.groups()
                if names and "/" in names[0] and names[0] not in self.hub.repos:
                    lost = {"error": "Repository not found"}
                    return self.answer(lost, 404, X_Error_Code="RepoNotFound")
                return serve(body, *names)
        return self.answer({"error": f"no such place: {request}"}, 404)

    def validate(self, body: bytes) -> None:
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        wrong = ["license must be one of them"] * (metadata.get("license") == "none-of-these")
        status = 400 if wrong else 200
        if self.headers.get("Accept") == "text/plain":
            return self.answer("".join(wrong).encode(), status)
        errors = [{"message": message} for message in wrong]
        return self.answer({"errors": errors, "warnings": []}, status)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo(wanted.get("visibility") == "private")
        self.answer({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)

    def preupload(self, body: bytes, repo: str) -> None:
        held = self.hub.repos[repo].files
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            content = held.get(file["path"])
            oid = None if content is None else (sha256 if large else git_hash)(content)
            if large and content and content.startswith(POINTER[:8]):
                oid = content.split()[1].decode()
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False,
                          "oid": oid})  # fmt: skip
        self.answer({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}}
            objects.append(wanted)
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            return self.answer({"error": "the content has another hash"}, 400)
        self.hub.objects[oid] = body
        return self.answer({})

    def commit(self, body: bytes, name: str) -> None:
        repo, files = self.hub.repos[name], {}
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if self.hub.xet:
                    self.hub.objects[value["oid"]] = POINTER % value["oid"].encode()
                if value["oid"] not in self.hub.objects:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.files |= files
        repo.commits += 1
        url = f"{self.hub.url}/{name}/commit/{repo.sha}"
        return self.answer({"commitUrl": url, "commitOid": repo.sha, "success": True})

    def xet_token(self, body: bytes, name: str) -> None:
        until = int(time.time()) + 3600
        store = f"local://{self.hub.xet}"
        self.answer({"casUrl": store, "exp": until, "accessToken": "any"})

    def info(self, body: bytes, name: str) -> None:
        repo = self.hub.repos[name]
        siblings = [{"rfilename": path} for path in repo.files]
        self.answer({"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def tree(self, body: bytes, name: str) -> None:
        files = self.hub.repos[name].files.items()
        self.answer([{"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                     for path, content in files])  # fmt: skip

    def no_entry(self, body: bytes, name: str) -> None:
        """The data sets here have no folders."""
        self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repo = self.hub.repos[name]
        if path not in repo.files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        content = repo.files[path]
        return self.answer(content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=repo.sha)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at `hub.url`."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


@contextmanager
def in_place(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the Hub, with a user logged in."""
    with running() as hub:
        constants = huggingface_hub.constants
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        own = template.replace("https://huggingface.co", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", own)
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub
    huggingface_hub.close_session()
