"""An S3 stand-in on loopback for tests: moto's server, the variables that lead clients to it, and faults."""

import logging
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from tunefleet import store as store_module

BUCKET = "studies"
HANG_SECONDS = 120
REFUSAL = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>%b</Code><Message>%b</Message><RequestId>0</RequestId></Error>"
)


class Store:
    """A store with one empty bucket.

    ``fault`` is empty, refused (its port is closed), 403 (of writes and reads), read-only (403 of writes),
    503 or hang.
    """

    def __init__(self) -> None:
        self.url = f"s3://{BUCKET}"
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.port = 0
        self.requests = 0
        self._fault = ""
        self.open()

    @property
    def fault(self) -> str:
        return self._fault

    @fault.setter
    def fault(self, fault: str) -> None:
        if "refused" in (fault, self._fault) and fault != self._fault:
            self.close() if fault == "refused" else self.open()
        self._fault = fault

    def open(self) -> None:
        """Listens, on the port of before."""
        self.server = make_server(
            "127.0.0.1", self.port, self.answer, threaded=True, request_handler=MotoRequestHandler
        )
        self.server.daemon_threads = True
        self.port = self.server.port
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()

    def close(self) -> None:
        """Closes the port: connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, environ, start_response):
        """Is the WSGI application: moto's, or the fault."""
        self.requests += 1
        fault = self._fault
        if fault == "read-only" and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            fault = ""
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        if not fault:
            return self.moto(environ, start_response)
        status, code = (
            ("503 Slow Down", b"SlowDown") if fault == "503" else ("403 Forbidden", b"AccessDenied")
        )
        start_response(status, [("Content-Type", "application/xml")])
        return [REFUSAL % (code, b"Access Denied" if code == b"AccessDenied" else b"Please reduce your rate")]


@contextmanager
def faulty_store() -> Iterator[Store]:
    """Serves an empty bucket. Credentials and address are in the environment meanwhile."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    reset = urllib.request.Request(f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
    store_module._open.cache_clear()  # the same URL is another server's now
    with mock.patch.dict(os.environ, variables):
        urllib.request.urlopen(reset).close()  # moto keeps what an earlier store of this process held
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield store
    store.fault = ""
    store.close()


@contextmanager
def object_store() -> Iterator[str]:
    """Serves an empty bucket; yields its URL."""
    with faulty_store() as store:
        yield store.url
