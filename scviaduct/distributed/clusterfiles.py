"""The files that start a cluster, run one command on it and take it down: a RayJob for KubeRay, a script for Slurm."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from scviaduct.distributed.submission import Request, SubmitConfig

_PORT = 6379


def kuberay(request: Request, config: SubmitConfig, ray_version: str) -> str:
    """A RayJob (ray.io/v1): a head without work, `nodes` workers, gone ten minutes after the job.

    The image brings the package, since a manifest cannot upload code; tokens are on (KubeRay 1.5.1 or newer).
    """
    name = f"scviaduct-{request.command[0]}"
    resources = {"cpu": str(config.cpus), "memory": config.memory}
    if config.gpus:
        resources["nvidia.com/gpu"] = str(config.gpus)
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"generateName": f"{name}-"},
        "spec": {
            "entrypoint": request.entrypoint,
            "entrypointNumCpus": 0,
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": request.env}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod("ray-head", config, {"cpu": "2", "memory": "8Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": config.nodes,
                        "minReplicas": config.nodes,
                        "maxReplicas": config.nodes,
                        "rayStartParams": {},
                        "template": _pod("ray-worker", config, resources),
                    }
                ],
            },
        },
    }
    return yaml.safe_dump(job, sort_keys=False)


def _pod(name: str, config: SubmitConfig, resources: dict[str, str]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": config.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
    }
    spec: dict[str, Any] = {"containers": [container]}
    if config.mount:
        claims = [entry.partition(":/") for entry in config.mount]
        container["volumeMounts"] = [{"name": f"data-{i}", "mountPath": f"/{c[2]}"} for i, c in enumerate(claims)]
        spec["volumes"] = [
            {"name": f"data-{i}", "persistentVolumeClaim": {"claimName": c[0]}} for i, c in enumerate(claims)
        ]
    return {"spec": spec}


def slurm(request: Request, config: SubmitConfig) -> str:
    """A script for sbatch: a Ray cluster over the job's nodes, with a token of its own, for one command.

    The environment that scviaduct is installed in must be active when the script is handed to sbatch.
    """
    gpus = f"#SBATCH --gpus-per-node={config.gpus}\n" if config.gpus else ""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in request.env.items())
    start = f"--num-cpus={config.cpus} --num-gpus={config.gpus} --block"
    return f"""#!/bin/bash
#SBATCH --job-name=scviaduct-{request.command[0]}
#SBATCH --nodes={config.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={config.cpus}
{gpus}#SBATCH --mem={config.memory.removesuffix("i")}
#SBATCH --time={config.time}
set -euo pipefail
umask 077

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
{exports}
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{nodes[0]}}
ip=$(srun --nodes=1 --ntasks=1 -w "$head" hostname -I | awk '{{print $1}}')
export RAY_ADDRESS="$ip:{_PORT}"

srun --nodes=1 --ntasks=1 -w "$head" env -u RAY_ADDRESS \\
    ray start --head --node-ip-address="$ip" --port={_PORT} --include-dashboard=false {start} &
for node in "${{nodes[@]:1}}"; do
    srun --nodes=1 --ntasks=1 -w "$node" ray start --address="$RAY_ADDRESS" {start} &
done

up() {{ ray status --address "$RAY_ADDRESS" 2>/dev/null | grep -c '^ 1 node_' || true; }}
for _ in $(seq 60); do [ "$(up)" -ge {config.nodes} ] && break; sleep 5; done
[ "$(up)" -ge {config.nodes} ] || {{ echo "Ray came up on $(up) of {config.nodes} nodes" >&2; exit 1; }}

{request.entrypoint}
"""
