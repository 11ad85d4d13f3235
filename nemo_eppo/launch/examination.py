"""Examines a launch file: finds errors of its jobs before anything starts.

`nemo-eppo launch` refuses a file with an error; `nemo-eppo doctor` prints all findings, and looks closer at jobs with
valid settings (job_checks.py).
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_eppo.config import ConfigError
from nemo_eppo.entry.settings import read_settings
from nemo_eppo.launch.command import CRITIC, REPOSITORY, REWARDS, Address, overrides, own_address, script
from nemo_eppo.launch.findings import Finding, error, guarded, ok
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.training.kinds import JobKind

if TYPE_CHECKING:
    from nemo_eppo.training.setup import Plan

# Settings that name the files and models that a job reads.
DATA = ("data.train", "data.validation")
MODELS = ("model.restore_from_path", "model.tokenizer", "reward_model")


@dataclass(frozen=True)
class Job:
    """A job of the launch with valid settings."""

    name: str
    kind: JobKind
    ranks: int
    settings: Any
    plan: "Plan | None" = None
    """Its model; None if that is wrong, was not examined, or will be made by an earlier job."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the job works on; 0 if unknown."""
        if self.kind.samples:
            return int(self.settings.longest)
        chosen = self.setting("data.max_sequence_length")
        return int(chosen or (self.plan.model.max_sequence_length if self.plan else 0))

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key; None if this kind of job has no such setting."""
        value = self.settings
        for part in key.split("."):
            value = getattr(value, part, None)
        return value


def check_launch(launch: LaunchConfig, *, here: bool) -> None:
    """Refuse a launch in which a setting, a layout or a file is wrong.

    Args:
        here: the jobs run on this machine: files have to exist, ports have to be free.

    Raises:
        ConfigError: one paragraph for each error of each job.
    """
    findings, _ = examine(launch, here=here, files=here)
    faults = [finding.fault for finding in findings if finding.status == "error"]
    if faults:
        raise ConfigError("\n".join(faults))


def examine(launch: LaunchConfig, *, here: bool, files: bool) -> tuple[list[Finding], list[Job]]:
    """Examine settings, layouts, files and models; return the findings, and the jobs with valid settings.

    Args:
        here: the jobs run on this machine, so that each has one node, and ports have to be free.
        files: also check the files and models that jobs read (but no data rows): they are on this machine, or will be
            made by an earlier job.
    """
    if not Path(script(next(iter(launch.jobs.values())))).exists():
        found = f"{REPOSITORY} has no examples/: launching needs the repository, installed with pip install -e"
        return [error("repository", found, "see the message")], []
    findings, jobs = list[Finding](), list[Job]()
    for name in launch.jobs:
        findings += guarded(f"{name}: settings and model", _job)(launch, name, here, files, jobs)
    if here:
        findings += guarded("ports", _ports)(launch)
    return findings, jobs


def _job(launch: LaunchConfig, name: str, here: bool, files: bool, jobs: list[Job]) -> Iterator[Finding]:
    """Examine settings, servers, data files, layout, then checkpoint and tokenizer.

    A job with valid settings is added to `jobs`, and replaced there when its model is known.
    """
    config, kind = launch.jobs[name], launch.jobs[name].kind
    nowhere = dict.fromkeys(launch.servers, Address("grpc://127.0.0.1:1"))
    settings: Any = read_settings(kind.schema, REPOSITORY / "conf", kind.config_name, overrides(launch, name, nowhere))
    job = Job(name, kind, config.ranks, settings)
    jobs.append(job)
    yield ok(f"{name}: settings", f"every key of {config.script} is known, every value allowed")
    if kind.samples:
        yield from missing_servers(launch, job)
    if here and config.nodes > 1:
        yield error(f"{name}: nodes", f"nodes = {config.nodes}: expected 1 on this machine", "use --backend")
    if files and kind.samples:
        yield from guarded(f"{name}: own functions and terms", _own_code)(settings)
    if files:
        for key in DATA:
            yield from guarded(f"{name}: {key}", _input)(launch, job, key)
    parallel = settings.model.parallel
    replicas = parallel.data_parallel_size(config.ranks)
    if not files:
        return
    for key in MODELS:
        yield from _input(launch, job, key)
    if any(_maker(launch, job.setting(key)) for key in ("model.restore_from_path", "model.tokenizer")):
        return
    from nemo_eppo.training.setup import plan

    planned = plan(settings.model, head=kind.starts_from, ranks=config.ranks)
    jobs[-1] = replace(job, plan=planned)
    yield ok(
        f"{name}: layout",
        f"{config.ranks} ranks = TP {parallel.tensor_model_parallel_size} x "
        f"PP {parallel.pipeline_model_parallel_size} x DP {replicas} for {planned.model.num_layers} layers "
        f"of width {planned.model.hidden_size}",
    )
    if kind.samples:
        settings.check_model(planned.model, config.ranks)
    elif kind.rows_per_step:
        parallel.check_update(kind.rows_per_step, job.setting(kind.rows_per_step), config.ranks)


def _own_code(settings: Any) -> Iterator[Finding]:
    """The functions and terms that the settings name can be loaded here."""
    settings.check_own_code()
    yield ok("own functions and terms", "all that the settings name can be loaded")


def missing_servers(launch: LaunchConfig, actor: Job) -> Iterator[Finding]:
    """Check that an actor has the servers it needs: a critic and a reward model, where its settings ask for an address.

    It needs none for a critic it does not have, for functions as rewards, and for models on its own ranks.
    """

    def served(setting: object) -> bool:
        return getattr(setting, "server", None) is not None

    critics, expected, mend = launch.critics(actor.name), f"jobs.{actor.name}.needs: expected", "add such a job"
    if len(critics) > 1 or (not critics and served(actor.setting(CRITIC))):
        yield error("servers", f"{expected} one serve_ppo_critic, found {', '.join(critics) or 'none'}", mend)
    if not launch.rewards(actor.name) and any(map(served, actor.setting(REWARDS) or ())):
        found = f"{expected} a serve_reward_model, or reward_model among the settings of its critic"
        yield error("servers", found, mend)


def _input(launch: LaunchConfig, job: Job, key: str) -> Iterator[Finding]:
    """Check that a file or model that the job reads exists, or is made by an earlier job."""
    path: Path | None = job.setting(key)
    if path is None:
        return
    by = _maker(launch, path)
    if by is None and not path.exists():
        raise ConfigError(f"{key} = {path} does not exist")
    if by is not None and by not in launch.before(job.name):
        raise ConfigError(f"{key} = {path} is made by the job {by}, which is not among its needs")
    if by is not None:
        yield ok(f"{job.name}: {key}", f"{path} will be made by the job {by}; examine again when it is there")


def _maker(launch: LaunchConfig, path: Path | None) -> str | None:
    """Return the job in whose run directory a path lies; None if there is none."""
    folders = {name: (launch.output / name).absolute() for name in launch.jobs}
    return next((name for name, folder in folders.items() if path and path.absolute().is_relative_to(folder)), None)


def _ports(launch: LaunchConfig) -> Iterator[Finding]:
    """Check that the ports set in the launch file are different and free."""
    owners = dict[int, str]()
    for name in launch.servers:
        own = own_address(launch, name)
        where, mend = f"jobs.{name}.settings.server.port = {own.port}", "choose another, or 0 for any"
        if own.port in owners:
            yield error("ports", f"{where}: the job {owners[own.port]} has it already", mend)
        if own.port:
            owners[own.port] = name
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((own.host, own.port))
            except OSError as fault:
                yield error("ports", f"{where}: cannot listen there, {fault.strerror}", mend)
