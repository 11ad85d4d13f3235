"""One actor with several values of a setting: `--sweep KEY=V1,V2`, on reward servers and trainings that run once."""

import json
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.colocation import colocated
from nemo_eppo.launch.job import job_settings
from nemo_eppo.launch.launch_file import LaunchConfig, read_launch


def variants(file: Path, changes: Sequence[str], sweep: str) -> dict[str, LaunchConfig]:
    """Read a launch file once for each value of `sweep`.

    Args:
        changes: `key=value` arguments for all of them.
        sweep: KEY=V1,V2,... where KEY is a setting of the only actor, or one of the launch file that changes this
            actor and its critic alone.

    Returns:
        launches by the name of their value, "KEY=VALUE" without characters that are awkward in paths.

    Raises:
        ConfigError: no list of values, the values have not a name each, or a launch is faulty.
    """
    key, equals, text = sweep.partition("=")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(f"[{text}]"))
    except (yaml.YAMLError, OmegaConfBaseException):
        values = []
    if not equals or not values:
        raise ConfigError(f"--sweep {sweep}: expected KEY=VALUE,VALUE,...")
    prefix = ""
    if key.partition(".")[0] not in LaunchConfig.model_fields:
        prefix = f"jobs.{_actor(read_launch(file, changes))}.settings."
    short = re.sub(r"^jobs\.(\w+)\.settings\.", r"\1.", key)
    launches = {}
    for value in values:
        shown = value if isinstance(value, str) else json.dumps(value)
        name = re.sub(r"[^\w.=+-]+", "_", f"{short}={shown}")
        if name in launches:
            raise ConfigError(f"--sweep {sweep}: two values have the name {name}")
        launches[name] = colocated(read_launch(file, [*changes, f"{prefix}{key}={json.dumps(value)}"]))
    return launches


def swept(launches: Mapping[str, LaunchConfig]) -> tuple[LaunchConfig, dict[str, Path]]:
    """Return one launch with an actor, and a fresh critic, for each value, one after another; all else runs once.

    Args:
        launches: what `variants` returns.

    Returns:
        the launch, whose jobs of a value are called NAME/JOB, without the values whose actor has made all its steps;
        and the run directories of all actors.

    Raises:
        ConfigError: the values change something that they share.
    """
    base = next(iter(launches.values()))
    actor = _actor(base)
    own = {actor, *base.critics(actor)}
    shared = _shared(base, own)
    for launch in launches.values():
        other = _shared(launch, own)
        if changed := [what for what in shared | other if shared.get(what) != other.get(what)]:
            raise ConfigError(
                f"--sweep changes {changed[0]}, of which there is one for all values; expected a setting of "
                f"{', '.join(sorted(own))}"
            )
    jobs = {name: job for name, job in base.jobs.items() if name not in own}
    previous: tuple[str, ...] = ()
    for value, launch in launches.items():
        renamed = {name: f"{value}/{name}" for name in own}
        if _is_complete(launch, actor, base.output / renamed[actor]):
            continue
        for name in launch.order():
            if name in own:
                job = launch.jobs[name]
                needs, held_out = tuple(renamed.get(need, need) for need in job.needs), job.held_out
                update: dict[str, Any] = {"needs": needs + previous}
                update["held_out"] = held_out and renamed.get(held_out, held_out)
                if job.rewards_of_jobs:
                    rewards = [
                        reward | {"job": renamed.get(reward["job"], reward["job"])} if "job" in reward else reward
                        for reward in job.settings["rewards"]
                    ]
                    update["settings"] = job.settings | {"rewards": rewards}
                jobs[renamed[name]] = job.model_copy(update=update)
        previous = (renamed[actor],)
    directories = {value: base.output / value / actor for value in launches}
    return base.model_copy(update={"jobs": jobs}), directories


def _shared(launch: LaunchConfig, own: Set[str]) -> dict[str, Any]:
    """Return what all values share, by its name in messages: jobs except `own`, and all fields except `variables`."""
    fields = LaunchConfig.model_fields.keys() - {"jobs", "variables"}
    jobs = {f"the job {name}": job for name, job in launch.jobs.items() if name not in own}
    return jobs | {name: getattr(launch, name) for name in sorted(fields)}


def _actor(launch: LaunchConfig) -> str:
    actors = [name for name, job in launch.jobs.items() if job.kind.samples]
    if len(actors) != 1:
        raise ConfigError(f"--sweep: expected one train_gpt_ppo_actor in the file, found {', '.join(actors) or 'none'}")
    return actors[0]


def _is_complete(launch: LaunchConfig, actor: str, directory: Path) -> bool:
    """Tell whether the newest checkpoint in a run directory is that of the last step."""
    from nemo_eppo.megatron.saving import CHECKPOINTS
    from nemo_eppo.models import checkpoint_files

    newest = checkpoint_files.latest(directory / CHECKPOINTS)
    if newest is None:
        return False
    return checkpoint_files.read_manifest(newest).step >= int(job_settings(launch, actor).ppo.max_steps)
