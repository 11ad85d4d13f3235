"""A client that asks before the server listens finds it soon after."""

import subprocess
import sys
import time
from pathlib import Path

from distributed import free_port

from nemo_eppo.servers.certificates import create
from nemo_eppo.servers.transport import Transport

LISTEN = """
import sys, time
from concurrent import futures
from pathlib import Path
import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from nemo_eppo.servers.certificates import Certificates

class Ready(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

ca, cert, key = (file.read_bytes() for file in Certificates.of(Path(sys.argv[2])))
server = grpc.server(futures.ThreadPoolExecutor(2))
service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Ready(), server)
server.add_secure_port(f"127.0.0.1:{sys.argv[1]}", grpc.ssl_server_credentials([(key, cert)], ca, True))
time.sleep(3)
server.start()
print(time.time(), flush=True)
server.wait_for_termination()
"""


def test_a_server_is_found_soon_after_it_listens(tmp_path: Path) -> None:
    """Not when gRPC happens to look, every 5 s for each part of TLS's handshake."""
    port, certificates = free_port(), tmp_path / "certificates"
    create(certificates)
    command = [sys.executable, "-c", LISTEN, str(port), str(certificates)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        transport = Transport(f"grpc://127.0.0.1:{port}", certificates)
        while not transport.server_ready(timeout=1.0):
            assert server.poll() is None
            time.sleep(0.05)
        found = time.time()
        transport.close()
        assert server.stdout is not None
        waited = found - float(server.stdout.readline())
        server.kill()
    assert waited < 5
