"""The interface that workers talk on, also between two hosts whose names resolve to 127.0.0.1."""

import os
import shutil
import subprocess
import sys

import pytest

from scviaduct.distributed.network import interface_of

MEET = """
import os, sys, torch
from datetime import timedelta
from torch import distributed as dist
from scviaduct.distributed.network import interface_of
os.environ["GLOO_SOCKET_IFNAME"] = interface_of(sys.argv[2])
dist.init_process_group("gloo", "tcp://10.98.7.1:29400", timedelta(seconds=60), 2, int(sys.argv[1]))
total = torch.ones(1)
dist.all_reduce(total)
print(int(total))
dist.destroy_process_group()
"""


def test_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # nobody's: kept for documents (RFC 5737)


@pytest.fixture
def hosts():
    """Two network namespaces that see each other as 10.98.7.1 and 10.98.7.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"scv{os.getpid()}{side}" for side in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"]
    for i, name in enumerate(names):
        commands += [f"-n {name} addr add 10.98.7.{i + 1}/24 dev eth0"]
        commands += [f"-n {name} link set {link} up" for link in ("eth0", "lo")]
    try:
        for command in commands:
            if subprocess.run(["ip", *command.split()], capture_output=True, check=False).returncode:
                pytest.skip(f"this machine does not allow ip {command}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_meet(hosts):
    command = [sys.executable, "-W", "ignore", "-c", MEET]
    pairs = [(host, str(rank), f"10.98.7.{rank + 1}") for rank, host in enumerate(hosts)]
    started = [
        subprocess.Popen(["ip", "netns", "exec", host, *command, rank, address], stdout=subprocess.PIPE, text=True)
        for host, rank, address in pairs
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["2", "2"]
