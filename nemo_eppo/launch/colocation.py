"""Critic and reward jobs of a launch file moved into the processes of the actor that needs them: `colocate: true`."""

import copy
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.command import CRITIC, HELD_OUT, REWARDS
from nemo_eppo.launch.job import job_settings
from nemo_eppo.launch.launch_file import LaunchConfig


def colocated(launch: LaunchConfig) -> LaunchConfig:
    """The launch without the servers of actors that say `colocate: true`, whose models these actors run themselves.

    A server's model, and how its critic learns, become settings of the actor. Its layout, precision and micro-batches
    are then the actor's.

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
        rewards = list(settings.get(REWARDS, ()))
        for need in actor.needs:
            job = launch.jobs[need]
            if not job.serves:
                needs[need] = None
                continue
            if others := [other for other in jobs if other != name and need in launch.jobs[other].needs]:
                raise ConfigError(f"jobs.{name}.colocate = true: the job {others[0]} needs {need}, too")
            critic, models = _models(launch, need)
            if critic is not None:
                settings[CRITIC] = {"colocated": critic}
            if need == actor.held_out:
                settings[HELD_OUT] = models[0]
            else:
                rewards += models
            needs |= dict.fromkeys(job.needs)
            del jobs[need]
        update = {"settings": settings | {REWARDS: rewards}, "needs": tuple(needs), "held_out": None}
        jobs[name] = actor.model_copy(update=update)
    return launch.model_copy(update={"jobs": jobs})


def _models(launch: LaunchConfig, name: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The critic of a server's settings, as the actor's `critic.colocated`, and its reward models, as `rewards`."""
    config = job_settings(launch, name)
    source = config.model.restore_from_path
    if source is None:
        raise ConfigError(f"jobs.{name}: a colocated model needs model.restore_from_path")
    if launch.jobs[name].kind.serves == "reward":
        return None, [{"colocated": {"restore_from_path": str(source)}}]
    critic = {
        "restore_from_path": str(source),
        "value_clip": config.value_clip,
        "optimizer": config.optimizer.model_dump(mode="json"),
        "lora": config.model.lora and config.model.lora.model_dump(mode="json"),
    }
    reward = config.reward_model
    return critic, [{"colocated": {"restore_from_path": str(reward)}}] if reward is not None else []
