"""Everything about a launch that can be wrong is found here, before anything starts."""

import socket
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.entry.settings import read_settings
from nemo_eppo.launch.command import LOCAL_HOST, REPOSITORY, Address, fixed_port, overrides, script
from nemo_eppo.launch.schema import LaunchConfig

if TYPE_CHECKING:
    from nemo_eppo.models.model_config import ModelConfig

# Settings that name what a job reads.
INPUTS = ("model.restore_from_path", "model.tokenizer", "reward_model", "data.train", "data.validation")
HEADS = {"train_gpt_ppo_actor": "lm", "serve_reward_model": "scalar"}
UPDATES = {"train_gpt_sft": "fit.global_batch_size", "train_reward_model": "fit.global_batch_size"}


def check_launch(launch: LaunchConfig, *, here: bool) -> None:
    """Check every job's settings against its schema, its layout against its ranks, and that what it reads is there.

    Args:
        here: the jobs run on this machine: files have to exist, ports have to be free.

    Raises:
        ConfigError: one paragraph for each job with a fault.
    """
    if not Path(script(next(iter(launch.jobs.values())))).exists():
        raise ConfigError(
            f"{REPOSITORY} has no examples/: launching needs the repository, installed with pip install -e"
        )
    known = schemas()
    nowhere = {name: Address("http://127.0.0.1:1") for name, job in launch.jobs.items() if job.serves}
    faults = []
    for name, job in launch.jobs.items():
        schema, config_name = known[job.script]
        try:
            settings: Any = read_settings(schema, REPOSITORY / "conf", config_name, overrides(launch, name, nowhere))
            settings.model.parallel.data_parallel_size(job.ranks)
            if here:
                if job.nodes > 1:
                    raise ConfigError(f"nodes = {job.nodes}: expected 1 on this machine")
                _check_inputs(launch, name, settings)
        except ConfigError as error:
            faults.append(f"jobs.{name}: {error}")
    if here:
        faults += taken_ports(launch)
    if faults:
        raise ConfigError("\n".join(faults))


def schemas() -> dict[str, tuple[type[Config], str]]:
    """Schema and YAML file of every script; they bring torch, so they are imported late."""
    from nemo_eppo.training.critic import CriticConfig
    from nemo_eppo.training.ppo_config import PPOConfig
    from nemo_eppo.training.reward_model import RewardTrainingConfig
    from nemo_eppo.training.reward_service import RewardModelConfig
    from nemo_eppo.training.sft import SFTConfig

    return {
        "train_gpt_sft": (SFTConfig, "gpt_sft"),
        "train_reward_model": (RewardTrainingConfig, "gpt_reward_model"),
        "serve_reward_model": (RewardModelConfig, "serve_reward_model"),
        "serve_ppo_critic": (CriticConfig, "gpt_ppo_critic"),
        "train_gpt_ppo_actor": (PPOConfig, "gpt_ppo_actor"),
    }


def _check_inputs(launch: LaunchConfig, name: str, settings: Any) -> None:
    from nemo_eppo.training.setup import plan

    made_here = {}
    for key in INPUTS:
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part, None)
        if value is None:
            continue
        made_here[key] = maker(launch, value)
        if made_here[key] and made_here[key] not in launch.before(name):
            raise ConfigError(f"{key} = {value} is made by the job {made_here[key]}, which is not among its needs")
        if not made_here[key] and not value.exists():
            raise ConfigError(f"{key} = {value} does not exist")
    if not any(made_here.get(key) for key in ("model.restore_from_path", "model.tokenizer")):
        job = launch.jobs[name]
        planned = plan(settings.model, head=HEADS.get(job.script), ranks=job.ranks)  # type: ignore[arg-type]
        check_job(job.script, settings, planned.model, job.ranks)


def check_job(script: str, settings: Any, model: "ModelConfig", ranks: int) -> None:
    """ConfigError if a job would refuse its settings when it knows its model and its ranks."""
    if script == "train_gpt_ppo_actor":
        settings.check_model(model, ranks)
    elif script in UPDATES:
        settings.model.parallel.check_update(UPDATES[script], attrgetter(UPDATES[script])(settings), ranks)


def maker(launch: LaunchConfig, path: Path) -> str | None:
    """The job in whose run directory a path lies."""
    return next(
        (name for name in launch.jobs if path.absolute().is_relative_to((launch.output / name).absolute())), None
    )


def taken_ports(launch: LaunchConfig) -> list[str]:
    """What is wrong with the ports that the launch file itself chooses."""
    faults, owners = [], dict[int, str]()
    for name, job in launch.jobs.items():
        port = fixed_port(job) if job.serves else 0
        if not port:
            continue
        where = f"jobs.{name}.settings.server.port = {port}"
        if port in owners:
            faults.append(f"{where}: the job {owners[port]} has it already")
        owners[port] = name
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((str(job.setting("server.host") or LOCAL_HOST), port))
            except OSError as error:
                faults.append(f"{where}: cannot listen there, {error.strerror}")
    return faults
