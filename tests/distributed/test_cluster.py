"""Clusters that cannot be joined, and a Ray that does not come up: one sentence, with the fix."""

import re
import socket
import subprocess
import sys

import pytest
import ray

from scviaduct.distributed import cluster
from scviaduct.errors import ConfigError


@pytest.fixture
def port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]  # bound, but it does not listen


def mismatch():
    """What Ray raises on a cluster of other versions."""
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.9.1"}, "10.0.0.9", raise_on_mismatch=True)
    return raised.value


def invalid(address):
    """What Ray raises at once."""
    with pytest.raises(ValueError) as raised:
        ray._private.services.canonicalize_bootstrap_address(address)
    return raised.value


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("10.0.0.1:6379", mismatch, r"runs Ray 2\.9\.0 on Python 3\.9\.1, this process Ray .* both must have the same"),
        ("nonsense", lambda: invalid("nonsense"), r"nonsense is no address .*: give auto .*, or HOST:6379"),
        ("http://h:8265", lambda: invalid("http://h:8265"), "is a dashboard, which `scviaduct submit --address http://h:8265"),
        ("auto", lambda: ConnectionError("Could not find any running Ray instance. Please specify"), "No Ray runs on this"),
        (
            "10.0.0.1:6379",
            lambda: ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"),
            r"did not let this process in \(Failed to connect .*RAY_AUTH_MODE=token \(now disabled\).*looked for in /t/token",
        ),
        (
            "ray://h:10001",
            lambda: ray.exceptions.AuthenticationError("RAY_AUTH_TOKEN_PATH is set but file cannot be opened"),
            r"file cannot be opened.*RAY_AUTH_TOKEN_PATH as on its nodes",
        ),
    ],
)  # fmt: skip
def test_why_a_cluster_was_not_joined(address, error, told, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/t/token")
    message = cluster.refusal_of(address, error())
    assert re.search(told, message) and "\n" not in message


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_listens(scheme, port):
    with pytest.raises(ConfigError, match=rf"Nobody listens at {scheme}127\.0\.0\.1:{port} .*`ray start`"):
        cluster._require_listener(f"{scheme}127.0.0.1:{port}")
    cluster._require_listener("auto")


def test_a_ray_that_does_not_come_up_says_what_it_lacks(tmp_path, monkeypatch):
    def timed_out(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", timed_out)
    with pytest.raises(ConfigError, match=r"did not come up .*\(The current node timed out .*try again"):
        cluster._start(tmp_path, 1)
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(ConfigError, match=rf"{tmp_path} has 5 MB free, and Ray wants 419: make room\. TMPDIR"):
        cluster._start(tmp_path, 1)


class Usage:
    free = 5e6


def test_the_command_ends_with_2_and_leaves_nothing(atlas, port, tmp_path):
    line = [sys.executable, "-m", "scviaduct.jobs", "train", str(atlas), "--address", f"127.0.0.1:{port}"]
    line += ["--out", str(tmp_path / "run"), "--tracking-uri", "none"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, "Nobody listens" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    assert not list(tmp_path.iterdir())
