"""Where the ranks of a job can be reached, if they find each other without torchrun."""

import os

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


def test_a_name_that_is_loopback_on_its_own_machine_is_still_reached_by_others() -> None:
    assert "::" in run_ranks(_listening, 2, 2, 1)[0]


def test_an_address_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    said = f"MASTER_ADDR = 192.0.2.1, MASTER_PORT = {port}: expected a free port of the machine of rank 0"
    with pytest.raises(ConfigError, match=said):
        runtime.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
