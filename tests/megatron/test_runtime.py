"""Where the ranks of a job can be reached, if they find each other without torchrun."""

import os
import resource
import socket

import psutil
import pytest
from distributed import free_port, run_ranks

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import runtime
from nemo_eppo.settings.model import ParallelConfig


def _listening(ranks: int, of_machine: int) -> set[str]:
    os.environ["LOCAL_WORLD_SIZE"] = str(of_machine)
    runtime.initialize(ParallelConfig(tensor_model_parallel_size=ranks), seed=1)
    connections = psutil.Process().net_connections("inet")
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_ranks_of_one_machine_listen_on_its_loopback_interface_only() -> None:
    assert run_ranks(_listening, 2, 2, 2) == [{"127.0.0.1"}] * 2
    assert run_ranks(_listening, 1, 1, 1) == [{"127.0.0.1"}]  # gloo; it needs no store


def _listening_to_others(interface: str | None) -> set[str] | str:
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    socket.gethostname = lambda: "localhost"
    try:
        return _listening(2, 1)
    except ConfigError as error:
        return str(error)


def test_a_name_that_is_loopback_on_its_own_machine_is_still_reached_by_others() -> None:
    assert "::" in run_ranks(_listening_to_others, 2, "lo")[0]


def test_gloo_does_not_tell_others_an_address_that_is_their_own() -> None:
    for said in run_ranks(_listening_to_others, 2, None):
        assert said.startswith("this machine knows its own name localhost as 127.0.0.1")
        assert "set GLOO_SOCKET_IFNAME" in said


def _most_open_files(of_login: int) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (of_login, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    runtime.initialize(ParallelConfig(), seed=1)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_a_rank_may_have_a_connection_to_each_of_thousands() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert run_ranks(_most_open_files, 1, 256) == [65_536 if most == resource.RLIM_INFINITY else min(most, 65_536)]


def test_an_address_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    said = f"MASTER_ADDR = 192.0.2.1, MASTER_PORT = {port}: expected a free port of the machine of rank 0"
    with pytest.raises(ConfigError, match=said):
        runtime.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
