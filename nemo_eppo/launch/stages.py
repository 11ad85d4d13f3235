"""The stages of a launch on a cluster: which jobs run together, and which stages come before."""

from dataclasses import dataclass

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.launch_file import LaunchConfig

_LONGEST_NAME = 52  # characters: Kubernetes takes 63 for the name of a pod, which ends with its number


@dataclass(frozen=True)
class Stage:
    """A job that ends by itself and the servers that it needs; all of them start together and end with it."""

    launch: LaunchConfig
    """The launch of these jobs alone."""
    trainer: str
    """The job that is no server."""
    after: tuple[str, ...]
    """Trainers of the stages that have to succeed before."""


def stages(launch: LaunchConfig) -> list[Stage]:
    """Return the stages of a launch, each after those that it needs.

    Raises:
        ConfigError: no job ends by itself, a server does not belong to one stage, or a name is too long.
    """
    trainers = [name for name in launch.order() if not launch.jobs[name].serves]
    if not trainers:
        raise ConfigError(
            "jobs: all are servers; on a cluster they end with a job that needs them, expected such a job"
        )
    if len(trainers) == 1 and not any(trainers[0] in job.needs for job in launch.jobs.values()):
        return [Stage(launch, trainers[0], ())]
    for server in launch.servers:
        owners = [name for name in trainers if server in launch.jobs[name].needs]
        if len(owners) != 1:
            raise ConfigError(
                f"jobs.{server}: on a cluster a server runs together with one job that needs it, found "
                f"{', '.join(owners) or 'none'}"
            )
    return [_stage(launch, name, trainers) for name in trainers]


def _stage(launch: LaunchConfig, trainer: str, trainers: list[str]) -> Stage:
    members = {trainer} | {need for need in launch.jobs[trainer].needs if launch.jobs[need].serves}
    name = f"{launch.name}-{trainer.replace('_', '-').rstrip('-')}"
    if len(name) > _LONGEST_NAME:
        raise ConfigError(f"name = {launch.name}: the stage {name} has more than {_LONGEST_NAME} characters")
    jobs = {
        job: config.model_copy(update={"needs": tuple(need for need in config.needs if need in members)})
        for job, config in launch.jobs.items()
        if job in members
    }
    before = launch.before(trainer)
    after = tuple(other for other in trainers if other in before)
    return Stage(launch.model_copy(update={"name": name, "jobs": jobs}), trainer, after)
