"""The gRPC side of a server: one Triton process on rank 0 whose endpoints call Python handlers through PyTriton."""

import fcntl
import logging
import os
import shutil
import signal
import socket
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonLifecyclePolicy, TritonSecurityConfig

from nemo_eppo.processes import environment
from nemo_eppo.servers.certificates import Certificates
from nemo_eppo.servers.ports import free_port
from nemo_eppo.servers.protocol import Array, Endpoint
from nemo_eppo.servers.transport import Transport

Handler = Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]]

# Seconds that Triton waits for requests in flight when it is told to end, or when rank 0 has died.
EXIT_TIMEOUT_S = 5
START_TIMEOUT_S = 120.0
# Seconds that the last answer has for its way from the handler to the client, before Triton is ended.
LEAVE_S = 1.0
# A Triton that ends this often within this time is not started again.
MOST_RESTARTS, RESTART_PERIOD_S = 3, 600.0
_PREFIX = "nemo_eppo_triton_"

logger = logging.getLogger(__name__)
logging.getLogger("pytriton.server.triton_server").setLevel(logging.ERROR)  # this module logs Triton's end itself


class _Triton(Triton):
    """PyTriton, whose Triton loads the endpoints from files when it starts and can be told nothing afterwards.

    `ready` tells whether the server at our address is up; PyTriton's own clients know no certificates.
    """

    def __init__(self, config: TritonConfig, workspace: Path, ready: Callable[[], bool]) -> None:
        self._ready = ready
        super().__init__(
            config=config,
            workspace=workspace,
            triton_lifecycle_policy=TritonLifecyclePolicy(local_model_store=True),
            security_config=TritonSecurityConfig(restricted_endpoints=[]),  # a token would stand in Triton's argv
        )

    def _prepare_triton_config(self, workspace: Any) -> None:
        super()._prepare_triton_config(workspace)
        config = self._triton_server_config
        # "explicit" lets whoever reaches Triton load a model, which is code
        config["model_control_mode"] = "none"
        config["load-model"] = None
        # Our model configurations are complete; letting Triton complete them costs 1.3 s an endpoint.
        config["strict-model-config"] = "true"

    def _initialize_server(self) -> None:
        super()._initialize_server()
        server = self._triton_server
        server._verbose = False  # its log goes to a file, see `Frontend.failures`
        # In a session of its own: torchrun signals whole process groups, and would end Triton's helpers before the last
        # answers have left. Triton still ends with this process (PyTriton sets its parent-death signal).
        server._server_path = Path(f"{shutil.which('setsid')} {server._server_path}")
        server._gpus = [""]  # none: it would take memory of each one that it sees

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            if not self._triton_server.is_alive():
                raise RuntimeError("it ended while it started")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)

    def _wait_for_models(self) -> None:
        """Nothing is left to wait for: the server is ready when all its models are."""

    @property
    def shared_memory_prefix(self) -> str:
        return str(self._python_backend_config["shm-region-prefix-name"])

    def close_handlers(self) -> None:
        """Tell all endpoints' threads to end: each looks once a second, and `stop` waits for one after another."""
        for model in self._model_manager.models:
            for connector in model._requests_respones_connectors:
                connector.close()

    def processes(self) -> list[psutil.Process]:
        """Return Triton and its helpers, one or more for each endpoint."""
        triton = psutil.Process(self._triton_server._tritonserver_running_cmd.pid)
        return [triton, *triton.children(recursive=True)]


class Frontend:
    """Serves endpoints over gRPC: every request becomes one call of `handler(name, arrays)`.

    Calls for different endpoints come from different threads; those for one endpoint come one after the other.
    PyTriton fails on an array without elements and answers with a traceback, so the clients refuse to send one.

    Args:
        port: where to listen on `host`; 0 for any free port.
        certificates: folder of the run's certificates: only clients that have them are heard; None to hear everybody.
    """

    def __init__(
        self, endpoints: Mapping[str, Endpoint], handler: Handler, host: str, port: int, certificates: Path | None
    ) -> None:
        self._endpoints, self._handler = endpoints, handler
        self.host, self.port = host, port
        self._certificates = certificates
        self._running = ExitStack()
        self._restarts: list[float] = []  # times
        self._answering: set[str] = set()  # endpoints whose handler runs
        self._answered = 0.0  # time at which the last handler ended
        self._processes: list[psutil.Process] = []
        self._blocks: set[Path] = set()  # shared memory of a Triton that was killed, which nobody else removes

    @contextmanager
    def running(self) -> Iterator[str]:
        """Start Triton, give its URL, stop it at the end.

        Raises:
            ConfigError: the port is taken, the host is not an address of this machine, or certificates are unusable.
            RuntimeError: Triton did not start; the message has the last lines of its log.
            TimeoutError: Triton hung twice.
        """
        remove_leftovers()
        self.port = free_port(self.host, self.port, patience=2 * EXIT_TIMEOUT_S)
        # The stubs that Triton starts load libpython by name, which only the interpreter's own folder is sure to have.
        libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
        os.environ["LD_LIBRARY_PATH"] = ":".join(path for path in libraries if path)
        _quiet_tracker()
        self.start()
        with self._running:
            shown = socket.gethostname() if self.host == "0.0.0.0" else self.host
            try:
                yield f"grpc://{shown}:{self.port}"
            finally:
                self._let_answers_leave()
                self.kill()  # it would take 6 to 12 s to end by itself

    def start(self) -> None:
        """Start Triton, at the same address as before; raises as `running` does.

        On a busy machine Triton's Python backend sometimes waits for ever for the process of its first endpoint, so a
        start that takes too long is tried once more, with a warning."""
        try:
            self._running.enter_context(self._process())
        except TimeoutError as error:
            logger.warning("%s\nstarting it once more", error)
            self._running.enter_context(self._process())
        self._processes = self._triton.processes()

    def end(self) -> None:
        """Kill a Triton that is not `alive` any more, so that it gives no answers, not even errors.

        Raises:
            RuntimeError: this happened too often; the message has the last lines of Triton's log.
        """
        why = f"Triton or a helper of it has ended:\n{self.failures()}"
        self.kill()
        now = time.monotonic()
        self._restarts = [*(then for then in self._restarts if now - then < RESTART_PERIOD_S), now]
        if len(self._restarts) > MOST_RESTARTS:
            raise RuntimeError(f"{why}\nthe {len(self._restarts)}th time within {RESTART_PERIOD_S:.0f} s")
        logger.warning("%s\nstarting it anew", why)

    def stop(self) -> None:
        """Clean up after a Triton that was ended. All requests must have been answered, or be within a moment."""
        self._running.close()

    def _let_answers_leave(self) -> None:
        """Wait until all handlers have ended, for EXIT_TIMEOUT_S at most, and a moment for the last answer's way."""
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while self._answering and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(max(0.0, self._answered + LEAVE_S - time.monotonic()))

    @contextmanager
    def _process(self) -> Iterator[None]:
        """Run Triton with all endpoints loaded, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._log = folder / "triton.log"
        with open(folder / "owner", "w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)  # held until this process ends, however it ends
            client = Transport(f"grpc://{self.host}:{self.port}", self._certificates)
            self._triton = self._create(folder, lambda: client.server_ready(timeout=1.0))
            owner.write(self._triton.shared_memory_prefix)
            owner.flush()
            try:
                try:
                    self._triton.run()
                except Exception as error:
                    kind = TimeoutError if isinstance(error, TimeoutError) else RuntimeError
                    message = f"Triton did not start on {self.host}:{self.port}: {error}\n{self.failures()}"
                    self.kill()
                    raise kind(message) from error
                finally:
                    client.close()
                yield
            finally:
                self._triton.stop()
                _remove(folder, self._triton.shared_memory_prefix)
                for block in self._blocks:
                    block.unlink(missing_ok=True)
                self._blocks.clear()

    def _create(self, folder: Path, ready: Callable[[], bool]) -> _Triton:
        tls: dict[str, Any] = {}
        if self._certificates is not None:
            # copies, because PyTriton splits Triton's command line at blanks, which the original path may have
            files = Certificates(*(Path(shutil.copy(file, folder)) for file in Certificates.of(self._certificates)))
            tls = {"grpc_use_ssl_mutual": True, "grpc_root_cert": files.ca}
            tls |= {"grpc_server_cert": files.cert, "grpc_server_key": files.key}
        config = TritonConfig(
            allow_http=False,
            grpc_address=self.host,
            grpc_port=self.port,
            allow_metrics=False,
            exit_timeout_secs=EXIT_TIMEOUT_S,
            log_file=self._log,
            **tls,
        )
        triton = _Triton(config, folder / "workspace", ready)
        for name, endpoint in self._endpoints.items():
            reply = {endpoint.reply: Array(np.object_, ("1",))} if endpoint.reply else {}
            error = {"error": Array(np.object_, ("1",))}
            triton.bind(
                model_name=name,
                infer_func=self._infer(name),
                inputs=_tensors(endpoint.inputs),
                outputs=_tensors(endpoint.outputs | reply | error),
                config=ModelConfig(batching=False),  # Triton neither joins nor delays requests, and B is checked by us
            )
        return triton

    def _infer(self, name: str) -> Callable[[list[Any]], list[dict[str, np.ndarray]]]:
        def infer(requests: list[Any]) -> list[dict[str, np.ndarray]]:
            self._answering.add(name)
            try:
                return [self._handler(name, dict(request.data)) for request in requests]
            finally:
                self._answered = time.monotonic()
                self._answering.discard(name)

        return infer

    def kill(self) -> None:
        """Kill Triton and its helpers; ending by itself, it would wait for those that hang."""
        server = self._triton._triton_server
        if server is not None and server.is_alive():
            self._triton.close_handlers()
            self._blocks |= _mapped_blocks([psutil.Process(), *self._triton.processes()])
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(server._tritonserver_running_cmd.pid, signal.SIGKILL)
            while server.is_alive():  # else `stop` may signal a process that ends meanwhile, and fail
                time.sleep(0.01)

    def alive(self) -> bool:
        """Return whether Triton and all its helpers are alive; without one of these, an endpoint fails for ever."""
        alive = all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in self._processes)
        return bool(alive and self._triton.is_alive())

    def failures(self) -> str:
        """Return the last error lines of Triton's log and output, for a person who has to find out why it ended."""
        log = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        errors = [line for line in log if line.startswith("E")]
        output = self._triton._triton_server.logs().splitlines() if self._triton._triton_server else []
        return "\n".join((errors + output)[-15:]) or "it left no message"


def _quiet_tracker() -> None:
    """Start multiprocessing's process that removes leaked shared memory, without its warnings in the job's log."""
    with environment({"PYTHONWARNINGS": "ignore"}):
        resource_tracker.ensure_running()


def _mapped_blocks(processes: Iterable[psutil.Process]) -> set[Path]:
    """Return the files of Python's shared memory that processes have mapped."""
    blocks: set[Path] = set()
    for process in processes:
        with suppress(OSError):  # it has just ended
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            blocks |= {Path(line.split()[5]) for line in maps if "/dev/shm/psm_" in line}
    return blocks


def _tensors(arrays: dict[str, Array]) -> list[Tensor]:
    return [
        Tensor(name=name, dtype=array.dtype, shape=tuple(1 if symbol == "1" else -1 for symbol in array.shape))
        for name, array in arrays.items()
    ]


def remove_leftovers() -> None:
    """Remove what killed servers left: folders with an `owner` file whose lock nobody holds."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/owner"):
        try:
            with open(owner, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                prefix = file.read()
        except OSError:  # its owner is alive, it is another user's, or it has just been removed
            continue
        if prefix:  # else its owner is about to take the lock
            _kill_orphans(owner.parent)
            _remove(owner.parent, prefix)


def _kill_orphans(folder: Path) -> None:
    """Kill the Triton of this folder: it lost its server, whose answer it, and clients, may await for ever."""
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(f"{folder}/"):
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(os.getpgid(process.pid), signal.SIGKILL)


def _remove(folder: Path, prefix: str) -> None:
    for block in Path("/dev/shm").glob(f"{prefix}*"):
        block.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
