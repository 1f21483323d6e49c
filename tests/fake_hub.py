"""A stand-in for the model hub: the few answers that huggingface_hub asks for, out of one local folder."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(repo: str, folder: Path) -> type[BaseHTTPRequestHandler]:
    """A request handler that serves `folder` as the repository `repo`, and 404 for any other."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server calls
            self.do_GET()

        def do_GET(self) -> None:  # noqa: N802
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                self._send(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith(f"/api/models/{repo}/tree/"):
                self._send(json.dumps([self._entry(file) for file in sorted(folder.iterdir())]).encode())
            elif path.startswith(f"/{repo}/resolve/{COMMIT}/"):
                self._send((folder / path.rpartition("/")[2]).read_bytes())
            else:
                self.send_error(404)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def _entry(self, file: Path) -> dict[str, object]:
            return {
                "type": "file",
                "path": file.name,
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

    return Hub
