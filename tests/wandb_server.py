"""A stand-in for the W&B server on loopback: the requests that wandb 0.31 makes of it, and faults to choose.

It keeps what it is sent as the real server does: history rows by their offset (a row sent again replaces
the earlier one), config and summary by the last that came, files by name. It is no test by itself.
"""

import base64
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "local-" + "5ec7e7" * 6 + "abcd"
HANG_SECONDS = 120


@dataclass
class Run:
    """What the server knows of one run."""

    name: str
    history: dict = field(default_factory=dict)  # offset -> row
    files: dict = field(default_factory=dict)  # name -> size
    facts: dict = field(default_factory=dict)  # displayName, groupName, jobType, tags, state
    config: str = "{}"
    summary: dict = field(default_factory=dict)
    exit_code: int | None = None
    rows_received: int = 0  # repeated ones counted again

    @property
    def rows(self):
        """Returns the rows in order, without W&B's own columns."""
        return [
            {key: value for key, value in self.history[offset].items() if not key.startswith("_")}
            for offset in sorted(self.history)
        ]

    def node(self):
        """Returns the run as GraphQL shows it."""
        tail = [json.dumps(self.history[max(self.history)])] if self.history else []
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.facts.get("displayName"),
            "description": None,
            "notes": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-11-24T00:00:00Z",
            "heartbeatAt": "2026-11-24T00:00:00Z",
            "user": {"name": "me", "username": "me"},
            "projectId": "1",
            "sweepName": None,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}},
            "state": "running" if self.exit_code is None else "finished",
            "config": self.config,
            "group": self.facts.get("groupName"),
            "jobType": self.facts.get("jobType"),
            "tags": self.facts.get("tags") or [],
            "summaryMetrics": json.dumps(self.summary),
            "systemMetrics": "{}",
            "historyLineCount": len(self.history),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
            "historyKeys": {"lastStep": len(self.history) - 1},
        }


class WandbServer(ThreadingHTTPServer):
    """Answers until ``close``, unless it is set to fail.

    ``fault`` is ok, 401, 403, 404, 429, 500, portal (a network's own page), hang or dead (connections are
    cut); after ``fail_after`` history rows it is ``late_fault``.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # W&B uploads all images at once; a full queue drops them for seconds

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault = "ok"
        self.fail_after, self.late_fault = None, "dead"
        self.seconds = 0.0  # before each answer
        self.runs, self.sweeps, self.requests = {}, [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        """Closes the port: connections are refused from now on."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Says nothing of connections that the client gave up."""

    @property
    def fault_now(self):
        """Returns the fault to answer with."""
        total = sum(run.rows_received for run in self.runs.values())
        return self.late_fault if self.fail_after is not None and total >= self.fail_after else self.fault

    def graphql(self, query, variables):
        """Returns the data of one operation."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query).group(1)
        self.requests.append(operation)
        run = self.runs.get(variables.get("name") or variables.get("run"))
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}"}}
        if operation == "GetDefaultEntity":
            return {"viewer": {"id": "v", "entity": "me"}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"},
                              "bucket": run.node() if run else None}}  # fmt: skip
        if operation == "UpsertBucket":
            inserted = run is None
            run = self.runs.setdefault(variables["name"], Run(variables["name"]))
            run.facts |= {key: value for key, value in variables.items() if value is not None}
            run.config = variables.get("config") or run.config
            if variables.get("summaryMetrics"):
                run.summary |= json.loads(variables["summaryMetrics"])
            return {"upsertBucket": {"bucket": run.node(), "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload/{run.name}/{urllib.parse.quote(name)}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": f"id-{run.name}", "uploadHeaders": [], "files": files}}
        if operation == "Runs" and not self.runs:
            return {"project": None}
        if operation == "Runs":
            wanted = set(json.loads(variables["filters"])["name"]["$in"])
            edges = [
                {"node": r.node(), "cursor": r.name} for r in list(self.runs.values()) if r.name in wanted
            ]
            page = {"endCursor": None, "hasNextPage": False}
            return {"project": {"internalId": "1", "runCount": len(edges), "readOnly": False,
                                "runs": {"edges": edges, "pageInfo": page}}}  # fmt: skip
        if operation == "RunFiles":
            pattern = re.compile((variables.get("pattern") or "%").replace("%", ".*"))
            edges = [
                {"cursor": name, "node": {"id": name, "name": name, "url": "", "sizeBytes": size}}
                for name, size in run.files.items()
                if pattern.fullmatch(name)
            ]
            page = {"endCursor": None, "hasNextPage": False}
            files = {"edges": edges, "pageInfo": page}
            return {"project": {"internalId": "1", "run": {"fileCount": len(edges), "files": files}}}
        if operation == "UpsertSweep":
            self.sweeps.append(variables)
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
            return {"upsertSweep": {"sweep": {"name": f"sweep{len(self.sweeps)}", "project": project},
                                    "configValidationWarnings": []}}  # fmt: skip
        raise KeyError(operation)

    def file_stream(self, run_id, body):
        """Records rows, summary and the exit code."""
        run = self.runs[run_id]
        for name, chunk in (body.get("files") or {}).items():
            for number, line in enumerate(chunk["content"]):
                if name == "wandb-history.jsonl":
                    run.history[chunk["offset"] + number] = json.loads(line)
                    run.rows_received += 1
                elif name == "wandb-summary.json":
                    run.summary |= json.loads(line)
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


class Handler(BaseHTTPRequestHandler):
    """Speaks for the server; one instance per connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Is silent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.faulty():
            with self.server.lock:
                self.send(200, self.answer(json.loads(body)))

    def do_PUT(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.faulty():
            _, _, run_id, name = urllib.parse.unquote(self.path).split("/", 3)
            self.server.runs[run_id].files[name] = len(content)
            self.send(200, {})

    def answer(self, body):
        """Returns the answer to one POST."""
        if self.path.endswith("/file_stream"):
            self.server.file_stream(self.path.split("/")[-2], body)
            return {}
        try:
            return {"data": self.server.graphql(body["query"], body.get("variables") or {})}
        except KeyError as error:
            return {"errors": [{"message": f"unknown to the stand-in: {error}"}]}

    def faulty(self):
        """Answers with the chosen fault; returns whether there was one."""
        server = self.server
        time.sleep(server.seconds)
        expected = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
        fault = server.fault_now
        if fault == "dead":
            self.close_connection = True
            self.connection.close()
            return True
        if fault == "hang":
            time.sleep(HANG_SECONDS)
            return True
        if fault in ("401", "403", "404", "429", "500"):
            self.send(int(fault), {"errors": [{"message": "chosen"}]})
            return True
        if fault == "portal":  # a network that answers everything with its own page
            self.send_page()
            return True
        if self.command == "POST" and self.headers.get("Authorization") != expected:
            self.send(401, {"errors": [{"message": "user is not logged in"}]})
            return True
        return False

    def send_page(self):
        """Sends the page of a captive portal."""
        self.send_data(200, b"<html><body>Log in to the network</body></html>", "text/html")

    def send(self, code, content):
        """Sends JSON."""
        self.send_data(code, json.dumps(content).encode(), "application/json")

    def send_data(self, code, data, kind):
        """Sends an answer."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
