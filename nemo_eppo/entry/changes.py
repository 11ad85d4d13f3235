"""The settings of a run between its starts: which of them may change, and which would make another run out of it."""

from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from nemo_eppo.config import Config, ConfigError, flat, read_yaml
from nemo_eppo.entry.settings import as_yaml
from nemo_eppo.settings.run import ExpManagerConfig

_FREE = (
    # how long it trains, and what it saves, shows and warns of
    "exp_manager.*",
    "checkpoint.*",
    "fit.epochs",
    "fit.max_steps",
    "fit.validation_interval",
    "ppo.max_steps",
    "validation.interval",
    "monitor.*",
    "gold_reward",
    "held_out_reward.*",
    "record_rollouts",
    # what is turned while a run goes on; the moments are kept
    "optimizer.*",
    "critic.colocated.optimizer.*",
    # where and how it computes: the results are the same but for rounding
    "model.parallel.*",
    "model.micro_batch_*",
    "model.recompute",
    "model.allow_other_tokenizer",
    "engine.*",
    "energy.cache",
    "reward_functions.*",
    "server.*",
    "servers.*",
    "critic.server.*",
    "critic.fresh",
    "rewards.*.server.*",
)
"""Patterns of keys that may change when a run is resumed; a change of any other key is refused. Precision is one of
those others, because a checkpoint holds its weights in the run's precision."""


def check_changes(config: Config, settings: ExpManagerConfig, prefix: str = "") -> list[str]:
    """Check, and describe, what has changed since the last start of the run that a job with these settings resumes;
    nothing if its directory holds no checkpoint, from which anything could be resumed.

    Args:
        prefix: stands before the job's settings where they are given, "jobs.NAME.settings." in a launch file.

    Raises:
        ConfigError: a change would make another run out of it, and exp_manager.may_change does not name it.
    """
    directory = settings.directory
    file = directory / "config.yaml"
    if not file.exists() or not _has_checkpoint(directory):
        return []
    was = dict(flat(read_yaml(file), lists=True))
    now = dict(flat(yaml.safe_load(as_yaml(config)), lists=True))
    # a key that the file lacks is new in this version, and its default is what the run was started with
    chosen = dict(flat(config.model_dump(mode="json", exclude_defaults=True), lists=True))
    told, refused = [], []
    for key in dict.fromkeys([*was, *now]):
        old, new = was.get(key), now.get(key)
        if old == new or not (key in was or key in chosen):
            continue
        text = f"{key} was {old!r}, now {new!r}"
        told.append(text)
        if not any(fnmatchcase(key, pattern) for pattern in (*_FREE, *settings.may_change)):
            refused.append((key, text))
    if refused:
        manager = f"{prefix}exp_manager"
        lines = "".join(f"\n  - {text}" for _, text in refused)
        keys = ",".join(key for key, _ in refused)
        raise ConfigError(
            f"{directory} holds a run that was started with other settings:{lines}\n"
            "They would make another run out of it: set them back, choose another run directory (output of a launch, "
            f"or {manager}.explicit_log_dir, name or version), or accept them with '{manager}.may_change=[{keys}]'"
        )
    return told


def _has_checkpoint(directory: Path) -> bool:
    """Whether a job or a part of it, such as a member of an ensemble, has saved what a start would resume from."""
    return any(any(directory.glob(f"{part}checkpoints/step_*")) for part in ("", "*/"))
