"""A real MLflow server on loopback, which can be killed and started again at the same address."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request


class Server:
    def __init__(self, folder, database):
        self._folder, self._database, self._process = folder, database, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        store, files = f"sqlite:///{self._database}", self._folder / "artifacts"
        program = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        program += ["--artifacts-destination", str(files), "--host", "127.0.0.1", "--port", str(self.port)]
        quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [*program, "--workers", "1"],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                env=os.environ | quick,
                start_new_session=True,
            )
        until = time.monotonic() + 180
        while not self._healthy():
            assert self._process.poll() is None and time.monotonic() < until, self._log()
            time.sleep(0.2)

    def _healthy(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _log(self):
        return (self._folder / "server.log").read_text()[-2000:]

    def kill(self):
        """SIGKILL to the server and its worker, which are a group of their own."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
