"""Arrays over HTTP to a Triton server: the KServe v2 protocol with binary tensors, on Python's own HTTP client.

For 32 MB it takes half the time of tritonclient, because only the socket copies, and it can check the server's health
while it waits for an answer.
"""

import http.client
import json
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from nemo_eppo.config import RunError
from nemo_eppo.servers.protocol import Arrays

_DTYPES = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "UINT8": np.uint8, "BYTES": np.object_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

# A socket's timeout covers one `sendall`, so large arrays are sent in pieces.
_PIECE = 1 << 22


class ServerError(RunError):
    """A server refused a request or failed on it. If a field was wrong, `field`, `value` and `expected` are set."""

    def __init__(self, message: str, field: str = "", value: str = "", expected: str = "") -> None:
        super().__init__(message)
        self.field, self.value, self.expected = field, value, expected


class Transport:
    """Sends requests to the server at `url` (http://host:port), from any thread.

    Each request opens a connection: an idle one would delay Triton's end and be useless after a restart of the server.

    Args:
        timeout: seconds without progress in connecting, sending or receiving, but not in waiting for an answer.
    """

    def __init__(self, url: str, token: str, timeout: float) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port
        self._token, self._timeout = np.array([token.encode()], dtype=np.object_), timeout

    def request(
        self, endpoint: str, arrays: Arrays, *, interval: float, while_waiting: Callable[[], None]
    ) -> dict[str, Any]:
        """Return the outputs of `endpoint`: arrays by name, or the JSON value of its reply.

        `while_waiting` is called every `interval` seconds until the answer comes; an exception from it ends the wait.

        Raises:
            ServerError: the server answered with an error.
            ConnectionError: there is no server, or the connection broke before the answer was complete.
        """
        head, pieces = _encode({**arrays, "token": self._token})
        size = len(head) + sum(map(len, pieces))
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Length": str(size)}
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("POST", f"/v2/models/{endpoint}/infer", iter([memoryview(head), *pieces]), headers)
            while not wait([connection.sock], interval):
                while_waiting()
            response = connection.getresponse()
            body = bytearray(response.length or 0)  # writable, so that arrays on it need no copy
            view = memoryview(body)
            while view and (count := response.readinto(view)):
                view = view[count:]
            if view:
                raise http.client.IncompleteRead(bytes(body[: -len(view)]), len(view))
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if response.status in (404, 503):
            raise ConnectionError(f"not ready: {_first_line(body)}")
        if response.status != 200:
            raise ServerError(_first_line(body))
        return _decode(body, int(response.headers["Inference-Header-Content-Length"]))


def _encode(arrays: Arrays) -> tuple[bytes, list[memoryview]]:
    """Return the JSON head and the binary pieces of a request."""
    pieces, inputs = [], []
    for name, array in arrays.items():
        if array.dtype == np.object_:
            raw = memoryview(b"".join(len(x).to_bytes(4, "little") + x for x in array))
        else:
            raw = np.ascontiguousarray(array).data.cast("B")
        pieces += [raw[start : start + _PIECE] for start in range(0, len(raw), _PIECE)]
        parameters = {"binary_data_size": len(raw)}
        datatype = _NAMES[array.dtype]
        inputs.append({"name": name, "shape": array.shape, "datatype": datatype, "parameters": parameters})
    return json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode(), pieces


def _decode(body: bytearray, head_size: int) -> dict[str, Any]:
    """Return the outputs by name. A bytes output is the JSON of the endpoint's reply or of `error`, which is raised."""
    outputs: dict[str, Any] = {}
    start = head_size
    for output in json.loads(body[:head_size])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        if output["datatype"] == "BYTES":
            value = json.loads(body[start + 4 : start + size])  # 4 bytes of length come first
            if output["name"] == "error":
                raise ServerError(value["message"], value["field"], value["value"], value["expected"])
        else:
            dtype = np.dtype(_DTYPES[output["datatype"]])
            value = np.frombuffer(body, dtype, size // dtype.itemsize, start).reshape(output["shape"])
        outputs[output["name"]] = value
        start += size
    return outputs


def _first_line(body: bytearray) -> str:
    """Return the first line of Triton's message; the rest can be a traceback."""
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")
    return message.partition("Traceback")[0].strip().partition("\n")[0][:300]
