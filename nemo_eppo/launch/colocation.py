"""Critic and reward jobs of a launch file moved into the processes of the actor that needs them: `colocate: true`."""

import copy
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.command import CRITIC, HELD_OUT, REWARDS, with_models_of_jobs
from nemo_eppo.launch.job import job_settings
from nemo_eppo.launch.launch_file import LaunchConfig


def colocated(launch: LaunchConfig) -> LaunchConfig:
    """Return the launch without the servers of actors with `colocate: true`; these actors run their models.

    A server's model, and a critic's optimizer and value clip, become settings of the actor; layout, precision and
    micro-batches are the actor's. The actor's own settings of them are kept (`critic.fresh`, a reward's weight, mean
    and std), except `server`.

    Raises:
        ConfigError: a job with `colocate` is no actor, another job needs one of its servers, or such a server has no
            checkpoint to start from.
    """
    jobs = dict(launch.jobs)
    for name, actor in launch.jobs.items():
        if not actor.colocate:
            continue
        if not actor.kind.samples:
            raise ConfigError(f"jobs.{name}.colocate = true: {actor.script} asks no servers, expected an actor")
        settings, needs = copy.deepcopy(actor.settings), dict[str, None]()
        rewards = dict[str, dict[str, Any]]()
        for need in actor.needs:
            job = launch.jobs[need]
            if not job.serves:
                needs[need] = None
                continue
            if others := [other for other in jobs if other != name and need in launch.jobs[other].needs]:
                raise ConfigError(f"jobs.{name}.colocate = true: the job {others[0]} needs {need}, too")
            critic, reward = _models(launch, need)
            if critic is not None:
                settings[CRITIC] = _without_server(settings.get(CRITIC)) | {"colocated": critic}
            if reward is not None and need == actor.held_out:
                settings[HELD_OUT] = _without_server(settings.get(HELD_OUT)) | reward
            elif reward is not None:
                rewards[need] = reward
            needs |= dict.fromkeys(job.needs)
            del jobs[need]
        settings[REWARDS] = with_models_of_jobs(settings.get(REWARDS, []), rewards)
        update = {"settings": settings, "needs": tuple(needs), "held_out": None}
        jobs[name] = actor.model_copy(update=update)
    return launch.model_copy(update={"jobs": jobs})


def _without_server(own: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (own or {}).items() if key != "server"}


def _models(launch: LaunchConfig, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return a server's critic as the actor's `critic.colocated`, and its reward model as one of `rewards`."""
    config = job_settings(launch, name)
    source = config.model.restore_from_path
    if source is None:
        raise ConfigError(f"jobs.{name}: a colocated model needs model.restore_from_path")
    if launch.jobs[name].kind.serves == "reward":
        return None, {"colocated": {"restore_from_path": str(source)}}
    critic = {
        "restore_from_path": str(source),
        "value_clip": config.value_clip,
        "optimizer": config.optimizer.model_dump(mode="json", exclude_unset=True),  # the devices choose the rest
        "lora": config.model.lora and config.model.lora.model_dump(mode="json"),
    }
    reward = config.reward_model
    return critic, {"colocated": {"restore_from_path": str(reward)}} if reward is not None else None
