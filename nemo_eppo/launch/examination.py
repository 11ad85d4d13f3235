"""Examines a launch file: finds errors of its jobs before anything starts.

`nemo-eppo launch` refuses a file with an error; `nemo-eppo doctor` prints all findings, and looks closer at jobs with
valid settings (job_checks.py).
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_eppo.config import ConfigError
from nemo_eppo.entry.changes import check_changes
from nemo_eppo.launch.command import CRITIC, REPOSITORY, REWARDS, own_address, script
from nemo_eppo.launch.findings import Finding, error, guarded, ok
from nemo_eppo.launch.job import DATA, Job, job_settings
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.products import maker, product, stand_in
from nemo_eppo.launch.together import examine_together
from nemo_eppo.servers.ports import obstacle

if TYPE_CHECKING:
    from nemo_eppo.settings.model import Head
    from nemo_eppo.training.setup import Plan

FILES = (*DATA, "reward.inform.sft_responses")
"""Settings that name files."""


def check_launch(launch: LaunchConfig, *, here: bool) -> None:
    """Refuse a launch in which a setting, a layout or a file is wrong.

    Args:
        here: the jobs run on this machine: files have to exist, ports have to be free.

    Raises:
        ConfigError: one paragraph for each error of each job.
    """
    findings, _ = examine(launch, here=here, files=here)
    faults = dict.fromkeys(finding.fault for finding in findings if finding.status == "error")
    if faults:
        raise ConfigError("\n".join(faults))


def examine(
    launch: LaunchConfig, *, here: bool, files: bool, gpus: bool | None = None
) -> tuple[list[Finding], list[Job]]:
    """Examine settings, layouts, files and models; return the findings, and the jobs with valid settings.

    Args:
        here: the jobs run on this machine, so that each has one node, and ports have to be free.
        files: also check the files and models that jobs read (but no data rows): they are on this machine, or will be
            made by an earlier job.
        gpus: whether jobs run on GPUs; None for yes on a cluster, and here if there are any.
    """
    if not Path(script(next(iter(launch.jobs.values())))).exists():
        found = f"{REPOSITORY} has no examples/: launching needs the repository, installed with pip install -e"
        return [error("repository", found, "see the message")], []
    gpus = True if gpus is None and not here else gpus
    findings, jobs = list[Finding](), dict[str, Job]()
    findings += guarded("output", _output)(launch)
    with tempfile.TemporaryDirectory() as root:
        for name in launch.order():  # a job that makes a model comes before those that start from it
            check = guarded(f"{name}: settings and model", _job)
            findings += check(launch, name, here, Path(root) if files else None, jobs, gpus)
        findings += guarded("jobs together", examine_together)(launch, [*jobs.values()], files=files)
    if here:
        findings += guarded("ports", _ports)(launch)
    shown = [finding.model_copy(update={"found": finding.found.replace(root, "")}) for finding in findings]
    return shown, [*jobs.values()]


def _output(launch: LaunchConfig) -> Iterator[Finding]:
    """Check that the directories of the run are, or can become, directories."""
    for directory in (launch.output, *(launch.output / name for name in (*launch.jobs, "logs"))):
        exists = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        if not exists.is_dir():
            raise ConfigError(f"output = {launch.output}: {exists} is a file, expected a directory or a free name")
    yield ok("output", f"{launch.output}")


def _job(
    launch: LaunchConfig, name: str, here: bool, root: Path | None, jobs: dict[str, Job], gpus: bool | None
) -> Iterator[Finding]:
    """Examine settings, servers, data files, then the models and their layout.

    With valid settings it is put into `jobs`, at the end with its models.

    Args:
        root: a directory for what stands in for checkpoints that earlier jobs will make; None if no file is looked at.
    """
    config, kind, settings = launch.jobs[name], launch.jobs[name].kind, job_settings(launch, name, gpus)
    job = Job(name, kind, config.ranks, settings)
    jobs[name] = job
    if root is not None:
        # as the job itself would, when its servers run
        check_changes(settings, settings.exp_manager, f"jobs.{name}.settings.")
    yield ok(f"{name}: settings", f"every key of {config.script} is known, every value allowed")
    if kind.samples:
        yield from missing_servers(launch, job)
    if here and config.nodes > 1:
        yield error(f"{name}: nodes", f"nodes = {config.nodes}: expected 1 on this machine", "use --backend")
    if job.setting("optimizer") is None and settings.model.lora is not None:
        raise ConfigError("model.lora is for models that are trained; adapters of a checkpoint are merged on load")
    if root is not None and kind.samples:
        yield from guarded(f"{name}: own functions and terms", _own_code)(settings)
    for key in FILES:
        yield from guarded(f"{name}: {key}", _file)(launch, job, key, look=root is not None)
    parallel = settings.model.parallel
    replicas = parallel.data_parallel_size(config.ranks)
    yield from _models(launch, job, root, jobs)
    if (planned := jobs[name].plan) is None:
        return
    yield ok(
        f"{name}: layout",
        f"{config.ranks} ranks = TP {parallel.tensor_model_parallel_size} x "
        f"PP {parallel.pipeline_model_parallel_size} x DP {replicas} for {planned.model.num_layers} layers "
        f"of width {planned.model.hidden_size}",
    )
    if hasattr(settings, "check_model"):
        settings.check_model(planned.model, config.ranks)
    elif kind.rows_per_step:
        parallel.check_update(kind.rows_per_step, job.setting(kind.rows_per_step), config.ranks)
    if (ensemble := job.setting("ensemble")) is not None:
        from nemo_eppo.training.reward_ensemble import check_ensemble
        from nemo_eppo.training.reward_losses import LOSSES

        check_ensemble(ensemble, planned, LOSSES[settings.reward.kind].head, settings.optimizer)


def _models(launch: LaunchConfig, job: Job, root: Path | None, jobs: dict[str, Job]) -> Iterator[Finding]:
    """Plan the models of a job, and put it with them into `jobs`, which has those before it; see `_job` for `root`."""
    from nemo_eppo.training.reward_service import read_statistics, statistics_of
    from nemo_eppo.training.setup import plan

    plans: dict[str, Plan] = {}
    rewards: dict[str, Mapping[str, Any]] = {}
    for key, setup in job.models.items():
        head: Head | None = {"model": job.kind.starts_from, "critic.colocated": None}.get(key, "scalar")
        source, name = setup.restore_from_path, key if key == "reward_model" else f"{key}.restore_from_path"
        for setting, path in ((name, source), (f"{key}.tokenizer", setup.tokenizer)):
            yield from _exists(launch, job, setting, path, look=root is not None)
        if source is not None and (made_by := maker(launch, source)):
            if (by := jobs.get(made_by)) is None:  # whose own fault is told
                continue
            try:
                made = product(launch, by, source, head)
            except ConfigError as fault:
                raise ConfigError(f"{name} = {fault}") from None
            if head == "scalar":
                rewards[key] = statistics_of(made.state)
            if by.plan is None or root is None:
                continue
            setup = setup.model_copy(update={"restore_from_path": stand_in(made, by.plan, source, root)})
        if root is None or (setup.tokenizer and maker(launch, setup.tokenizer)):
            continue
        plans[key] = plan(setup, key, head, job.ranks)
        if head == "scalar":
            rewards[key] = read_statistics(plans[key], key)
    jobs[job.name] = replace(job, plans=plans, rewards=rewards)


def _own_code(settings: Any) -> Iterator[Finding]:
    """The functions and terms that the settings name can be loaded here."""
    from nemo_eppo.training.ppo_job import check_own_code

    check_own_code(settings)
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


def _file(launch: LaunchConfig, job: Job, key: str, *, look: bool) -> Iterator[Finding]:
    """Check that a file which a job reads exists, or is made by an earlier job."""
    path: Path | None = job.setting(key)
    if look and path is not None and path.is_dir():
        raise ConfigError(f"{key} = {path} is a directory, expected a file")
    yield from _exists(launch, job, key, path, look=look)


def _exists(launch: LaunchConfig, job: Job, key: str, path: Path | None, *, look: bool) -> Iterator[Finding]:
    """Check that what a job reads is made by an earlier job or, with `look`, exists."""
    if path is None:
        return
    by = maker(launch, path)
    if by is None and look and not path.exists():
        raise ConfigError(f"{key} = {path} does not exist")
    if by is not None and by not in launch.before(job.name):
        raise ConfigError(f"{key} = {path} is made by the job {by}, which is not among its needs")
    if by is not None:
        yield ok(f"{job.name}: {key}", f"{path} will be made by the job {by}")


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
        if fault := obstacle(own.host, own.port):
            yield error("ports", f"{where}: cannot listen there, {fault}", mend)
