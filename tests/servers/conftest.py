"""A tiny server for each file of tests, and a client that is connected to it."""

from collections.abc import Iterator

import pytest
from server_process import Server, running_server
from tiny_server import EXPECT

from nemo_eppo.servers.client import CriticClient


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def critic(server: Server) -> Iterator[CriticClient]:
    with CriticClient(server.client_config) as client:
        client.connect(EXPECT)
        yield client
