"""A loopback server of files, which also answers as the Hugging Face hub does.

It imitates what the hub's client relies on: /api/models/<repository>/revision/<revision> and .../tree/<revision>, which
list the files; HEAD and GET of /<repository>/resolve/<revision>/<file> with ETag, X-Repo-Commit and Content-Length; and
X-Error-Code beside a 404.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves in a thread while it is entered: `with HubServer() as server: ... server.url ...`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}  # repository -> file name -> content
        self.files: dict[str, bytes] = {}  # path -> content, of another host than the hub
        self.cut = False  # files end before their stated length
        self.requests: list[tuple[str, str | None]] = []  # path, token

    def handle_error(self, request, client_address) -> None:
        """Say nothing of a client that hangs up before it has its answer."""

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((path, self.headers.get("Authorization")))
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        files = self.server.repositories.get(f"{owner}/{name}", {})
        if path in self.server.files:
            self.answer(200, {}, self.server.files[path])
        elif not files:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] != ["resolve"]:
            digests = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
            listed = [
                {"rfilename": name, "path": name, "type": "file", "size": len(files[name]), "blobId": sha, "oid": sha}
                for name, sha in digests.items()
            ]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": listed, "tags": [], "private": False}
            self.answer(200, {}, json.dumps(listed if rest[:1] == ["tree"] else info).encode())
        elif rest[-1] in files:
            self.answer(200, {"ETag": f'"{hashlib.sha1(files[rest[-1]]).hexdigest()}"'}, files[rest[-1]])
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        """Send headers and, unless they alone are asked for, the content."""
        self.send_response(status)
        for key, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *_) -> None:
        """Say nothing on stderr."""
