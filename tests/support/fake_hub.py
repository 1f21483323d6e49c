"""A fake model hub: answers huggingface_hub's few requests from one local folder."""

import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import MappingProxyType

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    repo: str
    folder: Path
    refusals: Mapping[str, int]

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
            self._send(json.dumps([self._entry(file) for file in files]).encode())
        elif path.startswith(files_at):
            self._send((self.folder / path.removeprefix(files_at)).read_bytes())
        else:
            self.send_error(404)

    def _entry(self, file: Path) -> dict[str, object]:
        return {
            "type": "file",
            "path": file.relative_to(self.folder).as_posix(),
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def handler(
    repo: str, folder: Path, refusals: Mapping[str, int] = MappingProxyType({})
) -> type[BaseHTTPRequestHandler]:
    """A request handler that serves `folder` as the repository `repo`, and answers 404 for any other. `refusals` maps
    beginnings of paths to the status that they get."""
    return type("Hub", (_Hub,), {"repo": repo, "folder": folder, "refusals": refusals})
