"""Serves a folder to the hub's client, as a hub with one data set."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

COMMIT = "0" * 39 + "1"


class Answers(BaseHTTPRequestHandler):
    name = ""
    folder = Path()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/datasets/{self.name}/tree/"):
            self.answer([_entry(file, self.folder) for file in sorted(self.folder.iterdir())])
        elif path == f"/api/datasets/{self.name}" or path.startswith(
            f"/api/datasets/{self.name}/rev"
        ):
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            self.answer({"id": self.name, "sha": COMMIT, "siblings": files, "tags": []})
        else:
            self.file(path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body).get("paths", [])
        files = [self.folder / path for path in paths]
        self.answer([_entry(file, self.folder) for file in files if file.is_file()])

    def file(self, path: str) -> None:
        file = self.folder / path.rpartition("/")[2]
        if f"/{self.name}/resolve/" not in path or not file.is_file():
            headers = {"X-Error-Code": "RepositoryNotFound"} if self.name not in path else {}
            headers |= {"X-Error-Code": "EntryNotFound"} if self.name in path else {}
            self.answer({"error": "not found"}, 404, headers)
            return
        self.send(file.read_bytes(), 200, {"ETag": f'"{_oid(file)}"'})

    def answer(self, value: Any, status: int = 200, headers: Any = ()) -> None:
        self.send(json.dumps(value).encode(), status, {**dict(headers)})

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def small_hub(name: str, folder: Path) -> Iterator[str]:
    """Serve the folder's files as data set `name`; yield the URL for HF_ENDPOINT."""
    answers = type("Answers", (Answers,), {"name": name, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
