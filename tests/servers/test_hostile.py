"""Who may not speak to a server is refused before anything is parsed; who may, can end Triton, but not the server,
and thousands of wrong requests change nothing."""

import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import grpc
import psutil
import pytest
import torch
from server_process import Server
from tiny_server import VOCAB
from tritonclient.grpc import service_pb2, service_pb2_grpc
from wrong_requests import ENDPOINTS, FAULTS, LENGTHS, TOKENS, right

from nemo_eppo.config import ConfigError
from nemo_eppo.servers.certificates import NAME, Certificates, create
from nemo_eppo.servers.client import CriticClient, ServerUnavailable
from nemo_eppo.servers.transport import Transport
from nemo_eppo.settings.servers import ClientConfig


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("grpc://").rpartition(":")
    return host, int(port)


def deadly() -> service_pb2.ModelInferRequest:
    """A request that ends Triton when it comes over HTTP: it asks for the classes of an output that holds bytes."""
    request = service_pb2.ModelInferRequest(model_name="status")
    request.outputs.add(name="error").parameters["classification"].int64_param = 1
    return request


def plain_bytes(content: bytes) -> Callable[[Server], None]:
    def send(server: Server) -> None:
        with socket.create_connection(address(server), 5) as connection:
            connection.sendall(content)
            while connection.recv(4096):  # until the server closes it
                pass

    return send


def plain_grpc(server: Server) -> None:
    with grpc.insecure_channel("{}:{}".format(*address(server))) as channel:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(deadly(), timeout=5)


def tls(server: Server, certificates: Path | None) -> None:
    context = ssl.create_default_context(cafile=str(server.certificates / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    if certificates:
        files = Certificates.of(certificates)
        context.load_cert_chain(files.cert, files.key)
    with (
        socket.create_connection(address(server), 5) as connection,
        context.wrap_socket(connection, server_hostname=NAME) as encrypted,
    ):
        encrypted.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        if encrypted.recv(1) == b"":
            raise ConnectionError("closed")


OUTSIDERS: dict[str, Callable[[Server, Path], None]] = {
    "HTTP": lambda server, _: plain_bytes(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")(server),
    "noise": lambda server, _: plain_bytes(os.urandom(4096))(server),
    "gRPC without TLS": lambda server, _: plain_grpc(server),
    "TLS without a certificate": lambda server, _: tls(server, None),
    "another run's certificate": lambda server, stranger: tls(server, stranger),
}


@pytest.mark.parametrize("name", OUTSIDERS)
def test_who_has_no_certificate_is_not_heard(server: Server, critic: CriticClient, name: str, tmp_path: Path) -> None:
    create(tmp_path / "stranger")
    before, processes = critic.status(), {process.pid for process in server.processes()}
    for _ in range(5):
        try:
            OUTSIDERS[name](server, tmp_path / "stranger")
        except (OSError, grpc.RpcError):
            continue
        assert name in ("HTTP", "noise")  # bytes can always be sent; the connection was closed
    assert critic.status() == before
    assert {process.pid for process in server.processes()} == processes


def test_a_client_refuses_a_server_of_another_run(server: Server, tmp_path: Path) -> None:
    create(tmp_path / "stranger")
    config = ClientConfig(url=server.url, certificates=tmp_path / "stranger")
    with CriticClient(config) as client, pytest.raises(ServerUnavailable, match=r"CERTIFICATE|certificate|handshake"):
        client.status()


def test_no_secret_stands_in_a_command_line(server: Server) -> None:
    key = Certificates.of(server.certificates).key.read_text().split("\n")[1]
    lines = [" ".join(process.cmdline()) for process in server.processes()]
    assert any("tritonserver" in line for line in lines)
    assert not [line for line in lines if key in line or "access-token" in line or "explicit" in line]


def test_nobody_can_load_a_model(server: Server) -> None:
    transport = Transport(server.url, server.certificates)
    request = service_pb2.RepositoryModelLoadRequest(model_name="x")
    request.parameters["file:1/model.py"].bytes_param = b"open('/tmp/marker', 'w')"
    with pytest.raises(grpc.RpcError, match="explicit model load"):
        transport._stub.RepositoryModelLoad(request, timeout=5)
    transport.close()


def test_a_request_for_classes_ends_nothing(server: Server, critic: CriticClient) -> None:
    transport = Transport(server.url, server.certificates)
    processes = {process.pid for process in server.processes()}
    for _ in range(4):
        with suppress(grpc.RpcError):
            transport._stub.ModelInfer(deadly(), timeout=20)
    transport.close()
    assert critic.infer(TOKENS, LENGTHS).result().shape == (2, 3)
    assert {process.pid for process in server.processes()} == processes


def memory(server: Server) -> int:
    return sum(process.memory_info().rss for process in server.processes())


@pytest.mark.parametrize("count", [200, pytest.param(12_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_wrong_requests_change_nothing(server: Server, critic: CriticClient, count: int) -> None:
    random, transport = Random(0), Transport(server.url, server.certificates)
    before, values = critic.status(), critic.infer(TOKENS, LENGTHS).result()
    processes, early = {process.pid for process in server.processes()}, 0
    raw = transport._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")  # sends bytes as they are
    for number in range(count):
        fault = random.choice(FAULTS)
        request = right(random.choice(ENDPOINTS))
        fault(request, random)
        sent = request.SerializeToString()
        if random.random() < 0.1:  # no message at all, or one that breaks off
            sent = random.choice([random.randbytes(200), sent[: random.randrange(1, 20)]])
        call = raw.future(sent, timeout=60)
        if call.code() is grpc.StatusCode.OK:
            answer = service_pb2.ModelInferResponse.FromString(call.result())
            assert [output.name for output in answer.outputs] == ["error"], (number, fault.__name__, request)
        assert call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, (number, fault.__name__)
        if number % 4 == 0:
            assert torch.equal(critic.infer(TOKENS, LENGTHS).result(), values)
        if number == count // 5:
            early = memory(server)
    transport.close()
    after = critic.status()
    assert {name: after[name] for name in ("step", "bias", "instance")} == {
        name: before[name] for name in ("step", "bias", "instance")
    }
    assert {process.pid for process in server.processes()} == processes
    assert memory(server) < 1.1 * early


def triton_killed(server: Server) -> None:
    next(p for p in server.processes() if p.name() == "tritonserver").kill()


def helper_killed(server: Server) -> None:
    helpers = [p for p in server.processes() if "python_backend_stub" in p.name() and "critic_infer" in p.cmdline()[1]]
    os.kill(helpers[0].pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [triton_killed, helper_killed])
def test_a_triton_that_ends_is_started_anew(
    server: Server, end: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_eppo.servers.server_client.RETRY_S", 120.0)  # for a busy machine
    with CriticClient(server.client_config) as client:
        before = client.connect({"vocab_size": VOCAB})
        values = client.infer(TOKENS, LENGTHS).result()
        old = [p for p in server.processes() if "triton" in p.name()]
        end(server)
        assert torch.equal(client.infer(TOKENS, LENGTHS).result(timeout=150), values)
        after = client.status()
        assert {name: after[name] for name in ("instance", "step", "bias", "healthy")} == {
            name: before[name] for name in ("instance", "step", "bias", "healthy")
        }
        assert not psutil.wait_procs(old, timeout=10)[1]
    assert "starting it anew" in server.output.read_text()


@pytest.mark.slow
def test_connections_that_say_nothing_are_closed(server: Server, critic: CriticClient) -> None:
    idle = [socket.create_connection(address(server), 5) for _ in range(300)]
    try:
        started = time.monotonic()
        assert critic.infer(TOKENS, LENGTHS).result(timeout=30).shape == (2, 3)
        for connection in idle:
            connection.settimeout(180)
            assert connection.recv(4096) == b""
        assert time.monotonic() - started < 180
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "key.pem").chmod(0o640), "key.pem has mode 640, expected 600"),
        (lambda folder: (folder / "ca.pem").unlink(), "no ca.pem; expected ca.pem, cert.pem and key.pem"),
        (lambda folder: (folder / "cert.pem").write_text("x"), "expected ca.pem, cert.pem and key.pem"),
    ],
)
def test_certificates_that_cannot_be_used_are_named(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    files = create(tmp_path / "certificates")
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 3
    spoil(tmp_path / "certificates")
    with pytest.raises(ConfigError, match=message):
        Transport("grpc://127.0.0.1:1", tmp_path / "certificates")
