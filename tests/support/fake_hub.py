"""A fake model hub: answers huggingface_hub's few requests from one local folder.

`hub_here` runs one for this process, with a cache of its own, and can make it fail in the ways of networks.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"


@dataclass
class Behaviour:
    """What a hub has sent, and how it fails.

    `sent`: the files that were asked for, in order, each with its range where one was asked for. `cuts`: bytes of a
    file after which the connection ends, once. `wrong`: files of which the last byte is another one. `unhashed`: no
    file has a SHA-256 in the list. `listed`: further names in the list, each with a SHA-256 that no file has.
    """

    sent: list[str] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    unhashed: bool = False
    listed: list[str] = field(default_factory=list)


class _Hub(BaseHTTPRequestHandler):
    repo: str
    folder: Path
    refusals: Mapping[str, int]
    behaviour: Behaviour

    def do_HEAD(self) -> None:  # noqa: N802 - http.server calls this name
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802
        path = self.path.partition("?")[0]
        refusal = next((status for begin, status in self.refusals.items() if path.startswith(begin)), None)
        if refusal is None:
            self._answer(path)
        else:
            self.send_error(refusal)

    def log_message(self, *args: object) -> None:
        """Log nothing."""

    def _answer(self, path: str) -> None:
        api, files_at = f"/api/models/{self.repo}", f"/{self.repo}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main"):
            self._send(json.dumps({"id": self.repo, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}/tree/"):
            files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
            others = [{"type": "file", "path": name, **self._large(b"")} for name in self.behaviour.listed]
            self._send(json.dumps([*(self._entry(file) for file in files), *others]).encode())
        elif path.startswith(files_at):
            self._send_file(path.removeprefix(files_at))
        else:
            self.send_error(404)

    def _entry(self, file: Path) -> dict[str, object]:
        data = file.read_bytes()
        large = file.name.endswith(LARGE) and not self.behaviour.unhashed
        known = self._large(data) if large else self._small(data)
        return {"type": "file", "path": file.relative_to(self.folder).as_posix(), **known}

    def _small(self, data: bytes) -> dict[str, object]:
        return {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _large(self, data: bytes) -> dict[str, object]:
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {**self._small(data), "lfs": lfs}

    def _send_file(self, name: str) -> None:
        body, asked = (self.folder / name).read_bytes(), self.headers.get("Range")
        if name in self.behaviour.wrong:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.command == "GET":
            self.behaviour.sent.append(f"{name} {asked}" if asked else name)
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self._send(body, start, self.behaviour.cuts.pop(name, None) if self.command == "GET" else None)

    def _send(self, body: bytes, start: int = 0, most: int | None = None) -> None:
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:] if most is None else body[start : start + most])
        self.close_connection = most is not None


def handler(
    repo: str,
    folder: Path,
    refusals: Mapping[str, int] = MappingProxyType({}),
    behaviour: Behaviour | None = None,
) -> type[BaseHTTPRequestHandler]:
    """A request handler that serves `folder` as the repository `repo`, and answers 404 for any other. `refusals` maps
    beginnings of paths to the status that they get."""
    own = {"repo": repo, "folder": folder, "refusals": refusals, "behaviour": behaviour or Behaviour()}
    return type("Hub", (_Hub,), own)


@dataclass(frozen=True)
class HubHere:
    """A hub that this process asks: what it refuses, the folder that it serves, and how it behaves."""

    repo: str
    served: Path
    refusals: dict[str, int]
    behaviour: Behaviour

    def refuse(self, status: int, begin: str = "/") -> None:
        """Answer so from now on."""
        self.refusals.clear()
        self.refusals[begin] = status

    def file(self, name: str) -> str:
        """The path of a file, for `refuse`."""
        return f"/{self.repo}/resolve/{COMMIT}/{name}"


@contextmanager
def hub_here(repo: str, folder: Path, cache: Path) -> Iterator[HubHere]:
    """Serve `folder` as `repo`, to huggingface_hub in this process, which keeps what it fetches in `cache`."""
    refusals, behaviour = dict[str, int](), Behaviour()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(repo, folder, refusals, behaviour))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", there)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", there + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield HubHere(repo, folder, refusals, behaviour)
    server.shutdown()
    server.server_close()
