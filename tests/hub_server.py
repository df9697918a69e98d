"""A loopback server that answers as the Hugging Face hub does, and serves plain files beside it.

It imitates what the hub's client relies on: /api/models/<repository>/revision/<revision> and .../tree/<revision>, which
list the files with their size, and the large ones with their SHA-256; HEAD and GET of
/<repository>/resolve/<revision>/<file> with ETag, X-Repo-Commit and Content-Length; a 302 with X-Linked-ETag and
X-Linked-Size to another host for large files; a relative 307 for a renamed repository; and X-Error-Code beside a 404.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves in a thread while it is entered: `with HubServer() as server: ... server.url ...`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}  # repository -> file name -> content
        self.renamed: dict[str, str] = {}  # old repository name -> new one
        self.refused: dict[str, int] = {}  # repository -> status of every answer
        self.plain: dict[str, bytes] = {}  # path, as "/data.zip" -> content
        self.cut = ""  # the file whose body breaks off in the middle, after which the server is down
        self.down = False  # every answer is 503
        self.answers = 10**6  # so many, then the server is down
        self.corrupt = ""  # the large file whose body is not what its ETag says
        self.answers_api = b""  # instead of what a repository holds
        self.redirect = ""  # where large files are said to lie
        self.content_length = ""  # instead of the true one
        self.silent = False  # close every connection without an answer
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers in lower case

    def handle_error(self, request, client_address) -> None:
        """Say nothing of a client that hangs up before it has its answer: what it was told was nonsense."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str) -> list[str]:
        """Return the paths that were asked for with `method`, in order."""
        return [path for was, path, _ in self.requests if was == method]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        server, headers = self.server, {name.lower(): value for name, value in self.headers.items()}
        server.requests.append((self.command, self.path, headers))
        server.down |= len(server.requests) > server.answers
        if server.silent:
            self.close_connection = True
        elif server.down:
            self.answer(503)
        elif self.path.startswith("/cdn/"):
            _, _, name, digest = self.path.split("/")
            contents = [files[name] for files in server.repositories.values() if name in files]
            content = next(content for content in contents if hashlib.sha256(content).hexdigest() == digest)
            self.answer(200, content[::-1] if name == server.corrupt else content, name=name)
        elif self.path in server.plain:
            self.answer(200, server.plain[self.path])
        elif self.path.startswith("/api/models/"):
            self.api(self.path.removeprefix("/api/models/").partition("?")[0])
        elif "/resolve/" in self.path:
            repository, rest = self.path[1:].split("/resolve/")
            self.resolve(repository, *rest.split("/", 1))
        else:
            self.answer(404)

    def api(self, path: str) -> None:
        """Answer what a repository holds."""
        repository, _, question = path.rpartition("/")[0].rpartition("/")
        server = self.server
        if server.answers_api:
            self.answer(200, server.answers_api)
        elif repository in server.refused:
            self.answer(server.refused[repository])
        elif repository in server.renamed:
            self.answer(307, location=f"/api/models/{server.renamed[repository]}{path.removeprefix(repository)}")
        elif repository not in server.repositories:
            self.answer(404, error="RepoNotFound")
        else:
            files = []
            for name, content in server.repositories[repository].items():
                file = {"rfilename": name, "path": name, "type": "file", "size": len(content)}
                file |= {"blobId": hashlib.sha1(content).hexdigest(), "oid": hashlib.sha1(content).hexdigest()}
                if name.endswith((".safetensors", ".bin")):
                    digest = hashlib.sha256(content).hexdigest()
                    file["lfs"] = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}
                files.append(file)
            info = {"id": repository, "sha": COMMIT, "siblings": files, "tags": [], "private": False, "downloads": 0}
            self.answer(200, json.dumps(files if question == "tree" else info).encode())

    def resolve(self, repository: str, revision: str, name: str) -> None:
        server = self.server
        if repository in server.refused:
            self.answer(server.refused[repository])
        elif repository in server.renamed:
            self.answer(307, location=f"/{server.renamed[repository]}/resolve/{revision}/{name}")
        elif repository not in server.repositories or revision not in ("main", COMMIT):
            self.answer(404, error="RepoNotFound" if repository not in server.repositories else "RevisionNotFound")
        elif name not in server.repositories[repository]:
            self.answer(404, error="EntryNotFound", commit=COMMIT)
        elif name.endswith((".safetensors", ".bin")):
            content = server.repositories[repository][name]
            digest = hashlib.sha256(content).hexdigest()
            # "localhost" is another host than "127.0.0.1" to the client, as the CDN is.
            location = server.redirect or f"http://localhost:{server.server_port}/cdn/{name}/{digest}"
            linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self.answer(302, location=location, commit=COMMIT, extra=linked)
        else:
            self.answer(200, server.repositories[repository][name], name=name, commit=COMMIT)

    def answer(
        self,
        status: int,
        content: bytes = b"",
        name: str = "",
        location: str = "",
        error: str = "",
        commit: str = "",
        extra: dict[str, str] | None = None,
    ) -> None:
        etag = hashlib.sha1(content).hexdigest() if content else ""
        headers = {"Location": location, "X-Error-Code": error, "X-Repo-Commit": commit, "ETag": etag and f'"{etag}"'}
        self.send_response(status)
        self.send_header("Content-Length", self.server.content_length or str(len(content)))
        for key, value in {**headers, **(extra or {})}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            if name and name == self.server.cut:
                self.server.down = True
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Say nothing on stderr."""
