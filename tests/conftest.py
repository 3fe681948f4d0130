import contextlib
import os
import threading
import time
from pathlib import Path

# Ray must listen on loopback only, ask nobody for a token, and fail fast; set before anything imports it.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

import pytest
from hypothesis import settings

# the same examples on every machine of a continuous integration, new ones at home
settings.register_profile("scviaduct", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("scviaduct")


class S3Server:
    """An S3 server on loopback: the environment that points at it, its requests, and a delay before each answer."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_):
                pass

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Silent)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._lock, self._under_way = threading.Lock(), 0
        self.delay, self.requests, self.most_at_once = 0.0, [], 0
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _answer(self, environ, start_response):
        with self._lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        try:
            time.sleep(self.delay)
            return self._app(environ, start_response)
        finally:
            with self._lock:
                self._under_way -= 1

    def start(self):
        self._thread.start()

    def stop(self):
        from s3fs import S3FileSystem

        S3FileSystem.clear_instance_cache()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextlib.contextmanager
    def recorded(self, delay=0.0):
        """The requests made inside, each delayed by some seconds."""
        with self._lock:
            self.delay, self.requests, self.most_at_once = delay, [], 0
        yield self
        self.delay = 0.0

    def client(self):
        import boto3

        return boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"])

    def upload(self, folder, bucket, prefix):
        """Copy a folder; gives its address."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            client.upload_file(str(file), bucket, f"{prefix}/{file.relative_to(folder).as_posix()}")
        client.close()
        return f"s3://{bucket}/{prefix}"


@pytest.fixture(scope="session")
def s3():
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        yield server
        server.stop()
