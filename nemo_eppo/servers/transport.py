"""Arrays over gRPC to a Triton server: the KServe v2 protocol with raw tensors, encrypted where there are certificates.

The messages are those of tritonclient; the calls are gRPC's own, because a waiting call has to check the server's
health meanwhile.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nemo_eppo.config import RunError
from nemo_eppo.servers.certificates import NAME, Certificates
from nemo_eppo.servers.protocol import Arrays

_DTYPES = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "UINT8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted server is found again at once
    ("grpc.use_local_subchannel_pool", 1),  # no connection is shared with another client, nor its backoff
    ("grpc.enable_http_proxy", 0),
)
# Nothing listens there, the connection broke, what listens speaks no gRPC or has no such endpoint, or Triton has lost
# the process that answers. Errors of a service are answers.
_LOST = {
    grpc.StatusCode[name] for name in ("UNAVAILABLE", "NOT_FOUND", "UNIMPLEMENTED", "INTERNAL", "UNKNOWN", "CANCELLED")
}


class ServerError(RunError):
    """A server refused a request or failed on it. If a field was wrong, `field`, `value` and `expected` are set."""

    def __init__(self, message: str, field: str = "", value: str = "", expected: str = "") -> None:
        super().__init__(message)
        self.field, self.value, self.expected = field, value, expected


class Transport:
    """Sends requests to the server at `url` (grpc://host:port), from any thread.

    Args:
        certificates: folder of the run's certificates, see `certificates.py`; None for a server without any.

    Raises:
        ConfigError: the certificates cannot be used.
    """

    def __init__(self, url: str, certificates: Path | None) -> None:
        self.url, target = url, url.removeprefix("grpc://")
        if certificates is None:
            self._channel = grpc.insecure_channel(target, _OPTIONS)
        else:
            ca, cert, key = (file.read_bytes() for file in Certificates.of(certificates))
            named = ("grpc.ssl_target_name_override", NAME)
            credentials = grpc.ssl_channel_credentials(ca, key, cert)
            self._channel = grpc.secure_channel(target, credentials, (*_OPTIONS, named))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection; requests that wait end with ConnectionError."""
        self._channel.close()

    def request(
        self,
        endpoint: str,
        arrays: Arrays,
        *,
        interval: float = 3600.0,
        while_waiting: Callable[[], None] = lambda: None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Return the outputs of `endpoint`: arrays by name, or the JSON value of its reply.

        `while_waiting` is called every `interval` seconds until the answer comes; an exception from it ends the wait.

        Raises:
            ServerError: the server answered with an error, or the answer cannot be read.
            ConnectionError: there is no server, the connection broke, or no answer came within `timeout` seconds.
        """
        try:
            call = self._stub.ModelInfer.future(_encode(endpoint, arrays), timeout=timeout)
        except ValueError as error:  # the channel is closed
            raise ConnectionError(str(error)) from None
        try:
            while True:
                try:
                    answer = call.result(interval)
                    break
                except grpc.FutureTimeoutError:
                    while_waiting()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ConnectionError(f"no answer within {timeout:g} s") from error
            message = _first_line(error.details())
            if error.code() in _LOST:
                raise ConnectionError(message) from error
            raise ServerError(message) from None
        except grpc.FutureCancelledError:
            raise ConnectionError("the client was closed") from None
        finally:
            call.cancel()  # no effect on a call that has ended
        return _decode(answer)

    def server_ready(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the server to be up with all its endpoints; return whether it is.

        gRPC advances a connection attempt while a call waits for it, else every 5 s: calls that fail at once would find
        a server up to 16 s (TLS) after it listens. A subscriber of the channel would do, too, but its thread makes gRPC
        crash in forked processes, such as the writers of checkpoints.
        """
        request = service_pb2.ServerReadyRequest()
        try:
            return bool(self._stub.ServerReady(request, timeout=timeout, wait_for_ready=True).ready)
        except grpc.RpcError:
            return False


def _encode(endpoint: str, arrays: Arrays) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=endpoint)
    for name, array in arrays.items():
        request.inputs.add(name=name, shape=array.shape, datatype=_NAMES[array.dtype])
        request.raw_input_contents.append(array.tobytes())
    return request


def _decode(answer: service_pb2.ModelInferResponse) -> dict[str, Any]:
    """Return the outputs by name. A bytes output is the JSON of the endpoint's reply or of `error`, which is raised.

    Raises:
        ServerError: also for anything but JSON, or arrays of sizes other than their own.
    """
    outputs: dict[str, Any] = {}
    try:
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            if output.datatype == "BYTES":
                value = json.loads(raw[4:])  # 4 bytes of length come first
                if output.name == "error":
                    raise ServerError(*(str(value[part]) for part in ("message", "field", "value", "expected")))
            else:
                value = np.frombuffer(bytearray(raw), _DTYPES[output.datatype]).reshape(output.shape)  # writable
            outputs[output.name] = value
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ServerError(f"the answer cannot be read: {type(error).__name__}: {_first_line(str(error))}") from None
    return outputs


def _first_line(message: str | None) -> str:
    """Return the first line of Triton's message; the rest can be a traceback."""
    return (message or "").partition("Traceback")[0].strip().partition("\n")[0][:300]
