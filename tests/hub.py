"""A stand-in for the Hub on this machine: one repository, as the Hub's client asks for it.

with Hub(folder, "Salesforce/blip2-opt-2.7b") as hub:  hub.url, hub.log
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
LARGE = 1000  # bytes; larger files count as big ones


class Hub:
    """Serves a folder.

    Attributes:
        pace: seconds that each kilobyte of a big file takes.
        log: (method, file or "", Range header) of every request.
        spoiled: big files arrive with another last byte.
    """

    def __init__(self, folder: Path, repo_id: str, pace: float = 0.0):
        self.folder, self.repo_id, self.pace = folder, repo_id, pace
        self.log: list[tuple[str, str, str | None]] = []
        self.spoiled = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self, "HEAD")

            def do_GET(self):
                hub.answer(self, "GET")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *reason) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> list[dict]:
        found = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            file = {"rfilename": path.name, "path": path.name, "type": "file", "size": len(data)}
            file |= {"blobId": blob, "oid": blob}
            if len(data) > LARGE:
                sha = hashlib.sha256(data).hexdigest()
                file["lfs"] = {"size": len(data), "sha256": sha, "oid": sha, "pointerSize": 130}
            found.append(file)
        return found

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        path, start = request.path.partition("?")[0], 0
        name, extra = "", {}
        if path.startswith(f"/api/models/{self.repo_id}"):
            files = self.files()
            listing = "/tree/" in path
            body = json.dumps(files if listing else {"id": self.repo_id, "sha": COMMIT, "siblings": files})
            data, code = body.encode(), 200
            extra["Content-Type"] = "application/json"
        elif path.startswith(f"/{self.repo_id}/resolve/") and (self.folder / Path(path).name).is_file():
            name = Path(path).name
            data, code = (self.folder / name).read_bytes(), 200
            [file] = [file for file in self.files() if file["rfilename"] == name]
            etag = file["lfs"]["sha256"] if "lfs" in file else file["oid"]
            extra |= {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if "lfs" in file:
                extra |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"'}
            wanted = request.headers.get("Range")
            if wanted and method == "GET":
                start, code = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
                extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if self.spoiled and "lfs" in file:
                data = data[:-1] + bytes([data[-1] ^ 1])
        else:
            data, code = b"{}", 404
            extra["X-Error-Code"] = "RepoNotFound"
        self.log.append((method, name, request.headers.get("Range")))
        request.send_response(code)
        for header, value in extra.items():
            request.send_header(header, value)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        if method == "HEAD":
            return
        slow = self.pace if name and len(data) > LARGE else 0
        try:
            for begin in range(start, len(data), 1024):
                request.wfile.write(data[begin : begin + 1024])
                time.sleep(slow)
        except (BrokenPipeError, ConnectionResetError):  # it was cancelled
            request.close_connection = True


def point_to(hub: str, cache: Path, patch) -> None:
    """Let the Hub's client of this process use a stand-in, and take a tiny checkpoint for a big one.

    Args:
        hub: its address.
        cache: the folder to download to.
        patch: pytest's monkeypatch.
    """
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download

    import blip2.download

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub)
    patch.setattr(constants, "ENDPOINT", hub)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    patch.setattr(blip2.download, "BIG", LARGE)
