"""Builds a job's command line and environment, for one machine, Slurm and Kubernetes alike."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_eppo.config import ConfigError, flat
from nemo_eppo.launch.launch_file import JobConfig, LaunchConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = PurePath("examples/nlp/gpt")
LOCAL_HOST = "127.0.0.1"
CRITIC, REWARDS, HELD_OUT = "critic", "rewards", "held_out_reward"
"""Settings of an actor that hold the addresses of its servers."""
FIRST_PORT = 5555
MASTER_PORT = 29500
# Jobs wait for each other, and their threads would fight for cores; Megatron's overlaps need the second.
THREADS = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@dataclass(frozen=True)
class Address:
    """Where a server listens (host, port; 0 for any) and where clients find it (url)."""

    url: str
    host: str = LOCAL_HOST
    port: int = 0
    certificates: PurePath | None = None
    """Folder with the run's certificates, where the jobs run."""


def own_address(launch: LaunchConfig, name: str) -> Address:
    """Return the address at which a server listens by its settings, on this machine; it has no url yet."""
    job = launch.jobs[name]
    host, port = str(job.setting("server.host") or LOCAL_HOST), int(job.setting("server.port") or 0)
    return Address("", host, port, launch.certificates_folder.absolute())


def served_at(launch: LaunchConfig, hosts: Mapping[str, str], certificates: PurePath) -> dict[str, Address]:
    """Return the servers' addresses on a cluster; ports that are not set are counted from FIRST_PORT."""
    ports = {name: own_address(launch, name).port or FIRST_PORT + i for i, name in enumerate(launch.servers)}
    return {
        name: Address(f"grpc://{hosts[name]}:{port}", "0.0.0.0", port, certificates) for name, port in ports.items()
    }


def overrides(launch: LaunchConfig, name: str, addresses: Mapping[str, Address]) -> list[str]:
    """Return the `key=value` arguments of a job: its settings, and those that the launcher fills in.

    Args:
        addresses: address of the job itself if it is a server, and of the servers that it needs.

    Raises:
        ConfigError: the settings have a value, or null, where the launcher fills one in.
    """
    job = launch.jobs[name]
    settings = dict(flat(job.settings))
    filled: dict[str, Any] = {"exp_manager.explicit_log_dir": str(launch.output / name)}
    if job.serves:
        own = addresses[name]
        filled |= {"server.host": own.host, "server.port": own.port} | _certificates("server.certificates", own)
    if job.kind.samples:
        for critic in launch.critics(name):
            filled[f"{CRITIC}.server.url"] = addresses[critic].url
            filled |= _certificates(f"{CRITIC}.server.certificates", addresses[critic])
        if served := {need: _reward(launch, need, addresses) for need in launch.rewards(name)}:
            own = settings.get(REWARDS, [])
            if isinstance(own, list) and all("job" in reward or "server" not in reward for reward in own):
                settings.pop(REWARDS, None)
                filled[REWARDS] = with_models_of_jobs(own, served)
            else:
                raise ConfigError(
                    f"{REWARDS} = {own!r}: expected no value here, the launcher sets it; {{job: NAME, weight: 0.5}} "
                    "gives weight, mean or std of a reward model that a job serves"
                )
        if job.held_out is not None:
            filled[HELD_OUT] = _reward(launch, job.held_out, addresses)
    for key in settings:
        asked_for = key in ("server.host", "server.port")
        if not asked_for and any(f"{other}.".startswith(f"{key}.") for other in filled):
            raise ConfigError(f"{key} = {settings[key]!r}: expected no value here, the launcher sets it")
    settings |= filled
    return [override(key, value) for key, value in settings.items()]


def with_models_of_jobs(rewards: Sequence[Any], models: Mapping[str, dict[str, Any]]) -> list[Any]:
    """Return an actor's `rewards`, in which {job: NAME, ...} became a source of reward.

    Args:
        rewards: the actor's own: functions, models on its ranks, and jobs.
        models: settings that locate each job's reward model, by job; those that `rewards` do not name come last.
    """
    sources, unnamed = list[Any](), dict(models)
    for reward in rewards:
        if "job" not in reward:
            sources.append(reward)
            continue
        model = unnamed.pop(reward["job"])
        own = {key: value for key, value in reward.items() if key not in ("job", "server")}
        if "server" in model:
            model = {"server": reward.get("server", {}) | model["server"]}
        sources.append(own | model)
    return sources + list(unnamed.values())


def override(key: str, value: Any) -> str:
    """Return the argument that gives a script's setting this value."""
    return f"{key}={_hydra(value)}"


def _reward(launch: LaunchConfig, name: str, addresses: Mapping[str, Address]) -> dict[str, Any]:
    kind = {"job": "critic"} if launch.jobs[name].kind.serves == "critic" else {}
    return {"server": {"url": addresses[name].url, **kind, **_certificates("certificates", addresses[name])}}


def _certificates(key: str, address: Address) -> dict[str, str]:
    return {key: str(address.certificates)} if address.certificates else {}


def _hydra(value: Any) -> str:
    """Write a value in the grammar of Hydra's overrides, which reads it back as the same value."""
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
    try:
        if OverridesParser.create().parse_override(f"key=[{text}]").value() == [text]:
            return text
    except HydraException:
        pass
    # in quotes; backslashes count double in front of a quote only
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def script(job: JobConfig, code: PurePath = REPOSITORY) -> str:
    """Return the path of the job's script; `code` is the path of the repository."""
    return str(code / SCRIPTS / f"{job.script}.py")


def torchrun(job: JobConfig, rendezvous: Sequence[str] = (), python: str = sys.executable) -> list[str]:
    """Return the command, before the script, that starts its ranks on one machine."""
    if job.ranks == 1:
        return [python, "-u"]
    module = "torch.distributed.run" if job.nodes > 1 else "nemo_eppo.entry.torchrun"
    return [python, "-u", "-m", module, "--nproc_per_node", str(job.ranks_per_node), *rendezvous]


def environment(launch: LaunchConfig, name: str) -> dict[str, str]:
    """Return the environment variables of a job."""
    return THREADS | launch.environment | launch.jobs[name].environment
