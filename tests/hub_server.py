"""A loopback server of files, which also answers as the Hugging Face hub does.

Its paths are /api/models/<repository>, .../revision/<revision>, .../tree/<revision> and
/<repository>/resolve/<revision>/<file>; the client reads ETag, X-Repo-Commit and Content-Length.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves in a thread until it is left: `with HubServer() as server: ... server.url ...`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}  # path -> content
        self.requests: list[str] = []  # paths
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def add_repository(self, repository: str, files: dict[str, bytes]) -> None:
        """Serve a repository of the hub: its files by their names."""
        api, listed = f"/api/models/{repository}", []
        for name, content in files.items():
            same = {"blobId": (digest := hashlib.sha1(content).hexdigest()), "oid": digest, "size": len(content)}
            listed.append({"rfilename": name, "path": name, "type": "file"} | same)
            self.files[f"/{repository}/resolve/{COMMIT}/{name}"] = content
        info = {"id": repository, "sha": COMMIT, "siblings": listed, "tags": [], "private": False}
        self.files[api] = self.files[f"{api}/revision/{COMMIT}"] = json.dumps(info).encode()
        self.files[f"{api}/tree/{COMMIT}"] = json.dumps(listed).encode()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        content = self.server.files.get(path, b"")
        self.send_response(200 if path in self.server.files else 404)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        for key, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, "ETag": etag}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    do_HEAD = do_GET

    log_message = lambda *_: None  # noqa: E731
