"""Trains several reward models with one command: members of an ensemble, or of WARM, which averages their weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import Head, ModelSetup
from nemo_eppo.settings.reward_model import EnsembleConfig
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.training.fit import Fit
from nemo_eppo.training.setup import Plan, build, plan

AVERAGE = "average"
"""WARM's averaged checkpoint in the run directory, a single one, not a folder of checkpoints."""


def check_ensemble(config: EnsembleConfig, model: Plan, head: Head, optimizer: OptimizerConfig) -> None:
    """Raise ConfigError if the ensemble cannot be trained from this model, before anything is built."""
    has_head = model.manifest is not None and model.manifest.head == head
    if config.average and not has_head and config.linear_probe_steps == 0:
        raise ConfigError(
            "ensemble.average = true averages members that share one head: set ensemble.linear_probe_steps, or start "
            "from a reward model"
        )
    if lowest := [lr for lr in config.lrs if lr < optimizer.min_lr]:
        raise ConfigError(f"ensemble.lrs: {lowest[0]} is below optimizer.min_lr = {optimizer.min_lr}")


def train_members(config: EnsembleConfig, fit: Fit) -> list[Path]:
    """Train linear probe and members, except finished ones; return the last checkpoint of each member.

    Args:
        fit: the training run of a single reward model.
    """
    if config.linear_probe_steps:
        probe = replace(
            fit,
            settings=fit.settings.model_copy(update={"epochs": None, "max_steps": config.linear_probe_steps}),
            # constant steps are for the members' last updates; the head's optimizer states are too small to be sharded
            optimizer=fit.optimizer.model_copy(update={"constant_steps": 0, "distributed": False}),
            saving=fit.saving.model_copy(update={"interval": 0}),
            run=_part(fit.run, "linear_probe"),
            head_only=True,
        )
        fit = replace(fit, plan=_plan_from(probe.train(), fit.plan))
    members = []
    for index, folder in enumerate(config.folders):
        optimizer = fit.optimizer
        if config.lrs:
            optimizer = optimizer.model_copy(update={"lr": config.lrs[index % len(config.lrs)]})
        member = replace(
            fit,
            optimizer=optimizer,
            dropout=config.dropouts[index % len(config.dropouts)],
            seed=fit.seed + index,
            run=fit.run if folder == "." else _part(fit.run, folder),
        )
        members.append(member.train())
    return members


def average_members(config: EnsembleConfig, members: list[Path], fit: Fit) -> dict[str, float]:
    """Write the mean of the best members' weights to <run directory>/average; return its validation metrics."""
    task, model, run = fit.task, fit.plan, fit.run
    accuracies = {path: checkpoint_files.read_manifest(path).metrics["validation/accuracy"] for path in members}
    best = sorted(members, key=lambda path: -accuracies[path])[: config.keep_best]
    runtime.initialize(model.setup.parallel, fit.seed)
    runner = build(_plan_from(best[0], model, lora=None), task.head, latent_size=task.latent_size)
    parameters = [p for chunk in runner.chunks for p in unwrap(chunk).parameters()]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with torch.no_grad():
        for path in best:
            checkpoint.load(path, runner)
            for total, p in zip(sums, parameters, strict=True):
                total += p
        for total, p in zip(sums, parameters, strict=True):
            p.copy_(total / len(best))
    validation = task.validate(runner)
    state = averaged(task.state()) | {"average_of": [str(path) for path in best]}
    manifest = checkpoint_files.Manifest(head=task.head, step=0, model=model.model, metrics=validation, state=state)
    checkpoint.save(run.directory / AVERAGE, runner, manifest, model.tokenizer_path)
    run.logger.info(
        "averaged %d of %d members of validation accuracy %s; the average has %.4f, and its checkpoint is %s",
        len(best),
        len(members),
        ", ".join(f"{accuracies[path]:.4f}" for path in best),
        validation["validation/accuracy"],
        run.directory / AVERAGE,
    )
    return validation


def averaged(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in the averaged checkpoint's manifest, given that of a member."""
    return {**state, "kind": "warm" if state["kind"] == "bradley_terry" else state["kind"]}


def _part(run: Run, name: str) -> Run:
    """Return a run of its own in the subdirectory `name` of this run's directory."""
    directory = run.directory / name
    if run.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    return replace(run, directory=directory, wandb=None)


def _plan_from(source: Path, model: Plan, **changes: Any) -> Plan:
    """Return the plan of the same model with the weights of the checkpoint `source` and changed settings."""
    setup: ModelSetup = model.setup.model_copy(
        update={"restore_from_path": source, "architecture": None, "tokenizer": None, **changes}
    )
    return plan(setup)
