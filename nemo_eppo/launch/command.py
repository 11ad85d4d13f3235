"""A job's command line and environment: the same on one machine, under Slurm and in Kubernetes."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.launch_file import JobConfig, LaunchConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = PurePath("examples/nlp/gpt")
TOKEN = "NEMO_EPPO_TOKEN"
"""Environment variable that carries the servers' shared secret, which never stands on a command line."""
LOCAL_HOST = "127.0.0.1"
CRITIC, REWARDS, HELD_OUT = "critic", "rewards", "held_out_reward"
"""Settings in which an actor finds its servers."""
FIRST_PORT = 5555
MASTER_PORT = 29500
THREADS = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # the second: Megatron's overlaps rely on it


@dataclass(frozen=True)
class Address:
    """Where a server listens, and where others find it."""

    url: str
    host: str = LOCAL_HOST
    port: int = 0

    @property
    def open_to_network(self) -> bool:
        return not self.host.startswith("127.")


def own_address(job: JobConfig) -> Address:
    """Where its settings say that a server listens; port 0 for any."""
    return Address("", str(job.setting("server.host") or LOCAL_HOST), int(job.setting("server.port") or 0))


def served_at(launch: LaunchConfig, hosts: Mapping[str, str]) -> dict[str, Address]:
    """Addresses of the servers on a cluster, where ports have to be known before: as set, else from FIRST_PORT on."""
    ports = {name: own_address(launch.jobs[name]).port or FIRST_PORT + i for i, name in enumerate(launch.servers)}
    return {name: Address(f"http://{hosts[name]}:{port}", "0.0.0.0", port) for name, port in ports.items()}


def overrides(launch: LaunchConfig, name: str, addresses: Mapping[str, Address]) -> list[str]:
    """The `key=value` arguments of a job: its settings, and what only the launcher knows.

    Args:
        addresses: of the job itself if it is a server, and of the servers it needs.

    Raises:
        ConfigError: the settings have a value that the launcher fills in, or `null` for a server that the job needs.
    """
    job = launch.jobs[name]
    settings = dict(_flat(job.settings))
    filled: dict[str, Any] = {"exp_manager.explicit_log_dir": str(launch.output / name)}
    if job.serves:
        own = addresses[name]
        filled |= {"server.host": own.host, "server.port": own.port} | _token("server.token", own)
    if job.kind.samples:
        for critic in launch.critics(name):
            filled[f"{CRITIC}.server.url"] = addresses[critic].url
            filled |= _token(f"{CRITIC}.server.token", addresses[critic])
        if rewards := [_reward(launch, need, addresses) for need in launch.rewards(name)]:
            own_rewards = settings.get(REWARDS)  # functions, and models on the actor's ranks, stand beside servers
            if isinstance(own_rewards, list) and all("server" not in reward for reward in own_rewards):
                rewards = settings.pop(REWARDS) + rewards
            filled[REWARDS] = rewards
        if job.held_out is not None:
            filled[HELD_OUT] = _reward(launch, job.held_out, addresses)
    for key in settings:
        asked_for = key in ("server.host", "server.port")
        if not asked_for and any(f"{other}.".startswith(f"{key}.") for other in filled):
            raise ConfigError(f"{key} = {settings[key]!r}: expected no value here, the launcher sets it")
    settings |= filled
    return [f"{key}={_hydra(value)}" for key, value in settings.items()]


def _reward(launch: LaunchConfig, name: str, addresses: Mapping[str, Address]) -> dict[str, Any]:
    kind = {"job": "critic"} if launch.jobs[name].kind.serves == "critic" else {}
    return {"server": {"url": addresses[name].url, **kind, **_token("token", addresses[name])}}


def _token(key: str, address: Address) -> dict[str, str]:
    return {key: f"${{oc.env:{TOKEN}}}"} if address.open_to_network else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, which reads it back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    text = str(value)
    return text if _reads_as_itself(text) else "'" + re.sub(r"(\\*)('|$)", _escaped, text) + "'"


def _reads_as_itself(text: str) -> bool:
    try:
        found = OverridesParser.create().parse_override(f"key=[{text}]").value()
    except HydraException:
        return False
    return bool(found == [text])


def _escaped(match: re.Match[str]) -> str:
    backslashes, quote = match.groups()  # backslashes count double in front of a quote only
    return backslashes * 2 + ("\\'" if quote else "")


def script(job: JobConfig, code: PurePath = REPOSITORY) -> str:
    """The script's file, `code` being where the repository lies."""
    return str(code / SCRIPTS / f"{job.script}.py")


def torchrun(job: JobConfig, rendezvous: Sequence[str] = ("--standalone",), python: str = sys.executable) -> list[str]:
    """What starts a script's ranks on one machine."""
    if job.ranks == 1:
        return [python, "-u"]
    return [python, "-u", "-m", "torch.distributed.run", "--nproc_per_node", str(job.ranks_per_node), *rendezvous]


def trainer(launch: LaunchConfig) -> str:
    """The one job of a cluster's launch that is no server: its end is the end of all.

    Raises:
        ConfigError: there are several, or a job waits for it; a cluster starts all jobs of a launch at once.
    """
    trainers = [name for name in launch.jobs if name not in launch.servers]
    if len(trainers) != 1 or any(trainers[0] in job.needs for job in launch.jobs.values()):
        raise ConfigError(
            f"jobs: a cluster starts all at once; expected servers and one job that needs them, found besides servers "
            f"{', '.join(trainers) or 'none'}. A training that has to end first is a launch of its own"
        )
    return trainers[0]


def environment(launch: LaunchConfig, name: str) -> dict[str, str]:
    """Environment variables of a job, the token not among them."""
    return THREADS | launch.environment | launch.jobs[name].environment
