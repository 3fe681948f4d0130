"""`submit`: what is sent, what is refused, and one real cluster behind a token."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from scviaduct.distributed import nodes, submission
from scviaduct.distributed.clusterfiles import kuberay, slurm
from scviaduct.distributed.searchstatus import search_status
from scviaduct.distributed.submission import Request, SubmitConfig, spread
from scviaduct.errors import ConfigError
from scviaduct.jobs.__main__ import app

MAP = ["map", "/data/model", "/data/q.h5ad", "--out", "/data/mapped", "--workers", "2"]


def submit(*arguments):
    return app(["submit", *arguments], result_action="return_value")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which verb"),
        (["--", "submit", "--", "inspect", "/a"], "Which verb"),
        (["--dry-run", "--", "mapp", "/a"], "mapp"),
        (["--dry-run", "--", *MAP[:-2], "--worker", "2"], "Unknown option: --worker"),
        (["--dry-run", "--", "train", "atlas.zarr", "--out", "/data/run"], "atlas.zarr is relative"),
        (["--dry-run", "--", "train", "/atlas.zarr", "--out", "run"], "run is relative"),
        (["--dry-run", "--", *MAP[:-1], "0"], "workers must be above 0"),
        (["--format", "slurm", "--", *MAP], "add --dry-run"),
        (["--dry-run", "--env", "A", "--", *MAP], "NAME=VALUE"),
        (["--dry-run", "--format", "kuberay", "--mount", "data", "--", *MAP], "CLAIM:/PATH"),
        (["--dry-run", "--nodes", "0", "--", *MAP], "nodes must be at least 1"),
        (["--no-token", "--", *MAP], "Which cluster"),
        (["--no-token", "--address", "auto", "--", *MAP], "not the address of a dashboard"),
        (["--no-token", "--address", "http://127.0.0.1:9", "--", *MAP], "No Ray cluster answers"),
        (["--token-file", "/nowhere/token", "--address", "http://127.0.0.1:9", "--", *MAP], "no token in /nowhere"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_sent(arguments, message, monkeypatch, capsys):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises((ConfigError, SystemExit)) as refused:
        submit(*arguments)
    assert message in f"{refused.value}{capsys.readouterr()}"


def test_a_verb_that_spreads_is_told_its_cluster():
    assert spread(MAP) == (*MAP, "--address", "auto")
    assert spread([*MAP, "--address=x"]) == (*MAP, "--address=x")
    assert spread(["tune", "/a"]) == ("tune", "/a", "--address", "auto")
    assert spread(["inspect", "/a"]) == ("inspect", "/a")


def test_a_request_holds_code_and_no_data(tmp_path, capsys):
    (tmp_path / "genes.txt").write_text("A\n")
    (tmp_path / "cells.h5ad").write_bytes(b"x" * 100)
    code = submit("--dry-run", "--working-dir", str(tmp_path), "--env", "A=b c", "--", *MAP)
    request = json.loads(capsys.readouterr().out)
    assert code == 0
    assert request["entrypoint"] == "python -m scviaduct.jobs " + " ".join([*MAP, "--address", "auto"])
    env = request["runtime_env"]
    assert env["env_vars"] == {"A": "b c"}
    assert env["working_dir"] == str(tmp_path)
    assert Path(env["py_modules"][0], "schema.py").is_file()
    assert "*.h5ad" in env["excludes"]


def test_too_much_to_upload_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "MOST_BYTES", 2**20)
    (tmp_path / "data.zarr").mkdir()
    (tmp_path / "data.zarr" / "c").write_bytes(bytes(2**21))  # stays here
    Request.of(MAP, SubmitConfig(working_dir=tmp_path))
    (tmp_path / "weights.bin").write_bytes(bytes(2**21))
    with pytest.raises(ConfigError, match=r"2 MB to upload, more than 1: weights\.bin \(2 MB\)"):
        Request.of(MAP, SubmitConfig(working_dir=tmp_path))


def test_a_rayjob_asks_for_what_was_asked_for():
    config = SubmitConfig(
        dry_run=True, format="kuberay", nodes=3, gpus=1, cpus=8, memory="32Gi", image="me/x:1", mount=("claim:/data",)
    )
    job = yaml.safe_load(kuberay(Request.of(MAP, config), config, "2.60.0"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].endswith("--workers 2 --address auto")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["maxReplicas"] == 3
    pod = group["template"]["spec"]
    assert pod["containers"][0]["image"] == "me/x:1"
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}
    assert pod["containers"][0]["volumeMounts"] == [{"name": "data-0", "mountPath": "/data"}]
    assert pod["volumes"] == [{"name": "data-0", "persistentVolumeClaim": {"claimName": "claim"}}]


def test_a_slurm_script_is_a_script(tmp_path):
    config = SubmitConfig(dry_run=True, format="slurm", nodes=2, gpus=1, env=("A=it's",))
    text = slurm(Request.of(MAP, config), config)
    script = tmp_path / "job.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --gpus-per-node=1\n" in text
    assert text.endswith("python -m scviaduct.jobs " + " ".join([*MAP, "--address", "auto"]) + "\n")
    exported = subprocess.run(
        ["bash", "-c", f"{next(x for x in text.splitlines() if 'export A=' in x)}; echo $A"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert exported.stdout == "it's\n"


def test_what_the_cluster_lacks_is_refused_at_once(ray_cluster, tmp_path):
    nodes.require_resources(4, 0)
    with pytest.raises(ConfigError, match=r"5 workers need a core each, but the cluster has 4: use --workers 4"):
        nodes.require_resources(5, 0)
    with pytest.raises(ConfigError, match=r"2 workers with 0.5 GPUs each need 1, but the cluster has 0"):
        nodes.require_resources(2, 0.5)
    there = tmp_path / "atlas.json"
    there.touch()
    nodes.require_shared_files([str(there)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["atlas.json"]
    with pytest.raises(ConfigError, match=r"Node .* does not see .*gone\.json: all nodes need the same file system"):
        nodes.require_shared_files([str(tmp_path / "gone.json")], tmp_path)
    with pytest.raises(ConfigError, match=r"cannot write to .*nowhere \(No such file or directory\)"):
        nodes.require_shared_files([], tmp_path / "nowhere")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(dashboard, token file) of a cluster of one node on loopback that asks for a token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(stat.S_IRUSR)
    folder = tempfile.TemporaryDirectory(prefix="scv-", ignore_cleanup_errors=True)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": folder.name,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    dashboard = free_port()
    command = [
        *("ray", "start", "--head", "--block", f"--port={free_port()}", "--node-ip-address=127.0.0.1"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"),
        # another Ray on this machine has the agent's usual port, and an agent without one takes no jobs
        *(f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"),
    ]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        await_dashboard(address, head)
        yield address, token
    finally:
        stop(head)
        folder.cleanup()


def await_dashboard(address, head):
    for _ in range(120):
        assert head.poll() is None, "ray start ended"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
        except urllib.error.HTTPError as error:
            assert error.code == 401  # it asks for its token, so it is up
            return
        except OSError:
            time.sleep(1)
    pytest.fail("the dashboard did not come up")


def stop(head):
    """SIGTERM has Ray stop its processes; what is left of the session goes by force."""
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def run_submit(address, token, *verb):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "scviaduct.jobs", "submit", "--address", address, "--token-file", str(token)]
    return subprocess.run(
        [*command, "--", *map(str, verb)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_two_workers_train_behind_a_token(cluster, atlas, tmp_path):
    address, token = cluster
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    refused = run_submit(address, wrong, "inspect", atlas)
    assert (refused.returncode, "wants its token" in refused.stderr, "Traceback" in refused.stderr) == (2, True, False)

    out = tmp_path / "run"
    options = ["--batch-key", "study", "--max-epochs", "2", "--batch-size", "64", "--tracking-uri", "none"]
    too_much = run_submit(
        address, token, "train", atlas, "--out", out, *options, "--workers", "2", "--gpus-per-worker", "1"
    )
    assert too_much.returncode == 2
    assert "2 workers with 1 GPUs each need 2, but the cluster has 0" in too_much.stdout
    assert not out.exists()

    done = run_submit(address, token, "train", atlas, "--out", out, *options, "--workers", "2", "--set", "n_hidden=16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "bundle" / "model.json").is_file()
    assert "scvi of 900 cells after 2 epochs" in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_search_runs_on_the_cluster_and_is_told_to_mlflow(cluster, atlas, mlflow_database, tmp_path):
    address, token = cluster
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    (tmp_path / "recipe.toml").write_text("[search]\nn_latent = [4, 5]\n")
    out, store = tmp_path / "search", f"sqlite:///{tmp_path / 'mlflow.db'}"
    options = ["--batch-key", "study", "--max-epochs", "1", "--set", "n_hidden=16", "--tracking-uri", store]
    line = ["tune", atlas, "--search", tmp_path / "recipe.toml", "--n-trials", "2", "--out", out, *options]
    done = run_submit(address, token, *line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out}: 2 trials, 2 done." in done.stdout
    assert (search_status(out).state, search_status(out).counts) == ("finished", {"done": 2})
    client = MlflowClient(store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [r.data.tags.get("mlflow.parentRunId") for r in runs if r.info.run_id != parent] == [parent] * 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert client.get_model_version_by_alias("search", "current")
