"""A W&B server in miniature, for runs that are online: it takes what `wandb` sends and keeps it as the real one would.

Answers what wandb-core asks for: the account, runs and their resuming, the stream of history and summary, files and
artifacts. History lines are kept by their place in the stream, so that a line that is sent to the same place again
replaces the one before, as at the real server.
"""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass
class StoredRun:
    """What the server has of a run."""

    name: str
    entity: str
    project: str
    attributes: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the history, by place
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    num_starts: int = 0
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows in the order of the stream."""
        return [self.lines[place] for place in sorted(self.lines)]

    @property
    def config(self) -> dict[str, Any]:
        """The config as it was last sent, top level by key."""
        return {key: entry["value"] for key, entry in json.loads(self.attributes["config"]).items() if "value" in entry}


class WandbServer:
    """Use it as a context; `variables` make a process talk to it.

    Args:
        silent: take connections and never answer.
        dies: stop as soon as history has come.
    """

    def __init__(self, silent: bool = False, dies: bool = False) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.silent = silent
        self.dies = dies
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.05), daemon=True)

    @property
    def stopped(self) -> bool:
        """Whether it is gone."""
        return self._released.is_set()

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of a process that is to use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40}

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Dies: connections are refused from now on."""
        if self._released.is_set():
            return
        self._released.set()
        self.silent = False
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Holds a request until the server goes."""
        self._released.wait(600)


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        if self.owner.silent:
            self.owner.wait()
            self.close_connection = True
            return
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.owner.requests.append(f"GET {self.path}")
        self._answer({})

    def do_PUT(self) -> None:
        self.owner.requests.append(f"PUT {self.path}")
        _, kind, *rest = self.path.split("/", 3)
        body = self._body()
        if kind == "store":
            run, name = rest[0], rest[1]
            self.owner.runs[run].files[name] = body
        self._answer({})

    def do_POST(self) -> None:
        raw = self._body()
        if self.path.startswith("/graphql"):
            body = json.loads(raw)
            found = re.search(r"(query|mutation)\s+(\w+)", body["query"])
            name = found[2] if found else body["query"].split("{")[1].strip()
            self.owner.requests.append(name)
            answer = getattr(self, f"_graphql_{name}", None)
            if answer is None:
                self._answer({"errors": [{"message": f"unknown {name}"}]})
            else:
                self._answer({"data": answer(body.get("variables") or {}, body["query"])})
            return
        stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", self.path)
        self.owner.requests.append(f"POST {self.path}")
        if stream:
            if self.owner.dies and b"wandb-history" in raw:
                threading.Thread(target=self.owner.stop).start()
                self.close_connection = True
                return
            self._take(self.owner.runs[stream[3]], json.loads(raw))
        self._answer({})

    def _take(self, run: StoredRun, body: dict[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for i, line in enumerate(chunk["content"]):
                    run.lines[chunk["offset"] + i] = json.loads(line)
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        if body.get("complete"):
            run.exit_code = body.get("exitcode")

    # ---- GraphQL ------------------------------------------------------------------------------------------

    def _graphql_Viewer(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "u",
                "entity": "somebody",
                "username": "somebody",
                "flags": "{}",
                "email": "a@b.c",
                "admin": False,
                "teams": {"edges": []},
            },
            "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.0.0"}, "latestLocalVersionInfo": None},
        }

    _graphql_viewer = _graphql_Viewer

    def _graphql_UpsertBucket(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        name = variables.get("name") or variables["id"]
        run = self.owner.runs.get(name)
        is_new = run is None
        if run is None:
            run = StoredRun(name, variables.get("entity") or "somebody", variables.get("project") or "lockstep")
            self.owner.runs[name] = run
        if variables.get("host"):
            run.num_starts += 1
        run.attributes.update({key: value for key, value in variables.items() if value is not None})
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.attributes.get("displayName"),
            "description": None,
            "config": run.attributes.get("config"),
            "sweepName": None,
            "historyLineCount": len(run.lines),
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _graphql_RunResumeStatus(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        run = self.owner.runs.get(variables["name"])
        if run is None:
            return {"model": None}
        tail = [json.dumps(row) for row in run.history[-1:]]
        bucket = {
            "id": run.name,
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": None,
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": run.attributes.get("config") or "{}",
            "tags": run.attributes.get("tags") or [],
            "notes": run.attributes.get("notes"),
            "wandbConfig": '{"t": 1}',
        }
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}, "bucket": bucket}
        return {"model": project}

    def _graphql_CreateRunFiles(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.owner.url}/store/{variables['run']}/{name}"}
            for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _graphql_CreateArtifact(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        given = variables["input"]
        self.owner.artifacts.append(given)
        version = {"id": "v", "versionIndex": len(self.owner.artifacts) - 1}
        artifact = {
            "id": f"artifact-{len(self.owner.artifacts)}",
            "state": "COMMITTED",  # so that its files need not come
            "artifactSequence": {"id": "s", "latestArtifact": version},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _graphql_ArtifactByID(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        given = self.owner.artifacts[int(variables["id"].removeprefix("artifact-")) - 1]
        entity = {"name": given["entityName"]}
        project = {"id": "p", "internalId": "cA==", "name": given["projectName"], "entity": entity}
        artifact = {
            "__typename": "Artifact",
            "id": variables["id"],
            "artifactSequence": {"id": "s", "name": given["artifactCollectionName"], "project": project},
            "versionIndex": 0,
            "artifactType": {"name": given["artifactTypeName"]},
            "description": None,
            "metadata": given.get("metadata"),
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": given["digest"],
            "commitHash": None,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
        }
        return {"artifact": artifact}

    def _graphql_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        return {"entity": None}

    def _graphql_ServerFeaturesQuery(self, variables: dict[str, Any], query: str) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}
