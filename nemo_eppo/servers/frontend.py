"""The HTTP side of a server: one Triton process on rank 0 whose endpoints call Python handlers through PyTriton."""

import fcntl
import logging
import os
import random
import shutil
import signal
import socket
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from nemo_eppo.config import ConfigError
from nemo_eppo.servers.protocol import Array, Endpoint

Handler = Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]]

# Seconds that Triton waits for requests in flight when it is told to end, or when rank 0 has died.
EXIT_TIMEOUT_S = 5
FREE_PORTS = (20000, 32000)
_PREFIX = "nemo_eppo_triton_"

logger = logging.getLogger(__name__)


class _Triton(Triton):
    """PyTriton with three settings that its public configuration lacks."""

    def _prepare_triton_config(self, workspace: Any) -> None:
        super()._prepare_triton_config(workspace)
        # Our model configurations are complete; letting Triton complete them costs 1.3 s an endpoint.
        self._triton_server_config["strict-model-config"] = "true"

    def _initialize_server(self) -> None:
        super()._initialize_server()
        server = self._triton_server
        server._verbose = False  # its log goes to a file, see `Frontend.failures`
        # In a session of its own: torchrun signals whole process groups, and would end Triton's helpers before the last
        # answers have left. Triton still ends with this process (PyTriton sets its parent-death signal).
        server._server_path = Path(f"{shutil.which('setsid')} {server._server_path}")

    @property
    def shared_memory_prefix(self) -> str:
        return str(self._python_backend_config["shm-region-prefix-name"])


class Frontend:
    """Serves endpoints over HTTP: every request becomes one call of `handler(name, arrays)`.

    Calls for different endpoints come from different threads; those for one endpoint come one after the other.
    PyTriton fails on an array without elements and answers with a traceback, so the clients refuse to send one.
    """

    def __init__(self, endpoints: Mapping[str, Endpoint], handler: Handler, host: str, port: int) -> None:
        self._endpoints, self._handler = endpoints, handler
        self.host, self.port = host, port

    @contextmanager
    def running(self) -> Iterator[str]:
        """Start Triton, give its URL, stop it at the end.

        On a busy machine Triton's Python backend sometimes waits for ever for the process of its first endpoint, so a
        start that takes too long is tried once more, with a warning.

        Raises:
            ConfigError: the port is taken or the host is not an address of this machine.
            RuntimeError: Triton did not start; the message has the last lines of its log.
            TimeoutError: Triton hung twice.
        """
        self.port = _free_port(self.host, self.port)
        # The stubs that Triton starts load libpython by name, which only the interpreter's own folder is sure to have.
        libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
        os.environ["LD_LIBRARY_PATH"] = ":".join(path for path in libraries if path)
        remove_leftovers()
        with ExitStack() as stack:
            try:
                stack.enter_context(self._process())
            except TimeoutError as error:
                logger.warning("%s\nstarting it once more", error)
                stack.enter_context(self._process())
            shown = socket.gethostname() if self.host == "0.0.0.0" else self.host
            yield f"http://{shown}:{self.port}"

    @contextmanager
    def _process(self) -> Iterator[None]:
        """Run Triton with all endpoints loaded, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._log = folder / "triton.log"
        with open(folder / "owner", "w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)  # held until this process ends, however it ends
            self._triton = self._create(folder)
            owner.write(self._triton.shared_memory_prefix)
            owner.flush()
            try:
                try:
                    self._triton.run()
                except Exception as error:
                    kind = TimeoutError if isinstance(error, TimeoutError) else RuntimeError
                    message = f"Triton did not start on {self.host}:{self.port}: {error}\n{self.failures()}"
                    self._kill()
                    raise kind(message) from error
                yield
            finally:
                self._triton.stop()
                _remove(folder, self._triton.shared_memory_prefix)

    def _create(self, folder: Path) -> _Triton:
        config = TritonConfig(
            http_address=self.host,
            http_port=self.port,
            allow_grpc=False,
            allow_metrics=False,
            exit_timeout_secs=EXIT_TIMEOUT_S,
            log_file=self._log,
        )
        triton = _Triton(config=config, workspace=folder / "workspace")
        for name, endpoint in self._endpoints.items():
            reply = {endpoint.reply: Array(np.object_, ("1",))} if endpoint.reply else {}
            secret, error = {"token": Array(np.object_, ("1",))}, {"error": Array(np.object_, ("1",))}
            triton.bind(
                model_name=name,
                infer_func=self._infer(name),
                inputs=_tensors(endpoint.inputs | secret),
                outputs=_tensors(endpoint.outputs | reply | error),
                config=ModelConfig(batching=False),  # Triton neither joins nor delays requests, and B is checked by us
            )
        return triton

    def _infer(self, name: str) -> Callable[[list[Any]], list[dict[str, np.ndarray]]]:
        def infer(requests: list[Any]) -> list[dict[str, np.ndarray]]:
            return [self._handler(name, dict(request.data)) for request in requests]

        return infer

    def _kill(self) -> None:
        """Kill a Triton that hangs, and its helpers; if it were only asked to end, it would wait for them."""
        server = self._triton._triton_server
        if server is not None and server.is_alive():
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(server._tritonserver_running_cmd.pid, signal.SIGKILL)
            while server.is_alive():  # else `stop` may signal a process that ends meanwhile, and fail
                time.sleep(0.01)

    def alive(self) -> bool:
        return bool(self._triton.is_alive())

    def failures(self) -> str:
        """Return the last error lines of Triton's log and output, for a person who has to find out why it ended."""
        log = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        errors = [line for line in log if line.startswith("E")]
        output = self._triton._triton_server.logs().splitlines() if self._triton._triton_server else []
        return "\n".join((errors + output)[-15:]) or "it left no message"


def _tensors(arrays: dict[str, Array]) -> list[Tensor]:
    return [
        Tensor(name=name, dtype=array.dtype, shape=tuple(1 if symbol == "1" else -1 for symbol in array.shape))
        for name, array in arrays.items()
    ]


def _free_port(host: str, port: int) -> int:
    """Return `port` or, if it is 0, a free one. Binding it here gives a clear error at once if it is taken.

    A free one lies below the range for outgoing connections, one of which could take it before Triton does.
    """
    candidates = [port] if port else random.SystemRandom().sample(range(*FREE_PORTS), 20)
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError as error:
                why = error.strerror
    raise ConfigError(f"port = {port}: cannot listen on {host}:{candidate}, {why}")


def remove_leftovers() -> None:
    """Remove folders and shared memory of servers that were killed: nobody holds the lock on their `owner` file."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/owner"):
        try:
            with open(owner, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                prefix = file.read()
        except OSError:  # its owner is alive, it is another user's, or it has just been removed
            continue
        if prefix:  # else its owner is about to take the lock
            _remove(owner.parent, prefix)


def _remove(folder: Path, prefix: str) -> None:
    for block in Path("/dev/shm").glob(f"{prefix}*"):
        block.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
