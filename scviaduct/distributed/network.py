"""Workers of a process group reach each other on the addresses by which Ray knows their nodes.

Left alone, gloo listens on the address that the host's own name resolves to. Debian and its like write that name into
/etc/hosts as 127.0.0.1 or 127.0.1.1, and workers on two such hosts then look for each other on their own loopback.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class NodeAddressConfig(TorchConfig):
    """TorchConfig whose process group talks on the interface of each node's address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets a worker group up."""
        return _NodeAddressBackend


class _NodeAddressBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: Any) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """In a worker: name the node's interface to gloo and NCCL, unless the cluster's administrator named one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None where none has it, as behind some container networks."""
    found = (name for name, own in psutil.net_if_addrs().items() if any(a.address == address for a in own))
    return next(found, None)
