"""Jobs with adapters: PPO whose actor and critic keep their base weights, and a reward model that is served merged."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port, run_ranks
from jobs import WARM, Job, Models, reward_training
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import Head, LoRAConfig, ModelSetup, ParallelConfig
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.tools.convert import MegatronToHf
from nemo_eppo.training.reward_model import train_reward_model
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import build, plan

STEPS, SAVED = 3, 2
ADAPTERS: dict[str, Any] = {"rank": 4, "alpha": 8.0}
TP2 = {"tensor_model_parallel_size": 2}


def ppo(models: Models, reward_url: str, work: Path) -> list[dict[str, float]]:
    """Run critic and actor, each from the checkpoint in its run directory if there is one; the actor's metrics."""
    port = free_port()
    optimizer = {"lr": 1e-2}
    critic_settings = {
        "model": {"restore_from_path": models.rm, "lora": ADAPTERS},
        "server": {"port": port},
        "optimizer": optimizer,
    }
    actor_settings = {
        "model": {"restore_from_path": models.sft, "parallel": TP2, "lora": ADAPTERS},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 12},
        "ppo": {"max_steps": STEPS, "rollout_batch_size": 8, "mini_batch_size": 4},
        "shaping": {"kl": {"coefficient": 0.1}, "energy_penalty": {"eta": 2.0}},
        "checkpoint": {"interval": SAVED},
        "optimizer": optimizer,
        "critic": {"server": {"url": f"grpc://127.0.0.1:{port}"}},
        "rewards": [{"server": {"url": reward_url}}],
    }
    critic = Job("critic", 1, critic_settings, work / "critic_job", work / "critic")
    try:
        actor = Job("actor", 2, actor_settings, work / "actor_job", work / "actor")
        assert actor.wait(200) == 0, actor.log.read_text()[-4000:]
    finally:
        critic.stop()
    lines = (work / "actor" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k and k != "time"} for line in lines]


def base_and_merged(source: Path, resume: Path, head: Head) -> list[dict[str, Tensor]]:
    """Weights of a start, of a job that went on from it without its adapters, and with them."""
    runtime.initialize(ParallelConfig(), 1)
    setup = ModelSetup(restore_from_path=source, lora=LoRAConfig(**ADAPTERS))
    model = plan(setup)
    start = build(plan(ModelSetup(restore_from_path=source)), head)
    trained = build(model, head, optimizer=OptimizerConfig(lr=1e-6), resume=resume)
    with AdaptersOff(trained.chunks).active():
        base = dict(export_tensors(trained.chunks, model.model))
    return [
        dict(export_tensors(start.chunks, model.model)),
        base,
        dict(export_tensors(trained.chunks, model.model)),
    ]


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted."""

    root: Path
    rows: list[dict[str, float]]


@pytest.fixture(scope="module")
def whole(models: Models, reward_url: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    return Whole(root, ppo(models, reward_url, root))


def test_ppo_with_adapters_keeps_both_base_models(models: Models, whole: Whole) -> None:
    rows = whole.rows
    assert rows[0]["kl/policy_reference"] == 0
    assert rows[-1]["kl/policy_reference"] != 0
    for job, head, source in (("actor", "lm", models.sft), ("critic", "scalar", models.rm)):
        newest = checkpoint_files.latest(whole.root / job / "checkpoints")
        start, base, merged = run_ranks(base_and_merged, 1, source, newest, head)[0]
        for name, weight in start.items():
            assert torch.equal(base[name], weight) != name.startswith("score."), name  # the critic's head has learnt
            adapted = name.endswith("_proj.weight") or name.startswith("score.")
            assert torch.equal(merged[name], weight) != adapted, name


@pytest.mark.slow  # tests/megatron/test_lora.py shows it of one model, test_interrupted.py of jobs without adapters
def test_ppo_with_adapters_resumes(models: Models, reward_url: str, whole: Whole, tmp_path: Path) -> None:
    # as after a crash between the two checkpoints
    for job, step in (("actor", SAVED), ("critic", SAVED * 2)):
        place = Path(job) / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(whole.root / place, tmp_path / place)
    shutil.copy(whole.root / "actor" / "run_id", tmp_path / "actor")
    assert ppo(models, reward_url, tmp_path) == whole.rows[SAVED:]


def settings(models: Models, layout: dict[str, int], **changes: Any) -> RewardTrainingConfig:
    setup = {"restore_from_path": models.sft, "parallel": layout, "lora": ADAPTERS}
    return reward_training(models, "bradley_terry", model=setup, optimizer={"lr": 1e-2}, **changes)


def train(config: RewardTrainingConfig, root: Path) -> None:
    root.mkdir(exist_ok=True)
    files = ExpManagerConfig(create_tensorboard_logger=False)
    train_reward_model(config, Run(root, int(os.environ["RANK"]), logging.getLogger(), files))


def serve(models: Models, config: RewardTrainingConfig, root: Path) -> dict[str, Any]:
    """Scores of a served checkpoint of adapters, and of the job that saved it."""
    parallel = config.model.parallel
    source = checkpoint_files.find(root / "checkpoints", "trained")
    runtime.initialize(parallel, 1)
    served = RewardModel(ModelSetup(restore_from_path=source, parallel=parallel))
    served.build()
    tokens, lengths = torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(1)), torch.full((4,), 9)
    request = {"tokens": tokens, "lengths": lengths, "prompt_lengths": torch.ones(4, dtype=torch.long)}
    scores = served.infer(request)["rewards"][:, 0]
    resumed = build(plan(config.model), "scalar", optimizer=config.optimizer, resume=source)
    trained = resumed.infer(tokens, lengths, outputs=1)[0][:, -1, 0]
    bias = float(dict(export_tensors(served.runner.chunks, models.config))["score.bias"])
    return {"tokens": tokens, "served": scores, "trained": trained, "bias": bias}


def test_a_reward_model_of_adapters_is_served_and_exported_merged(models: Models, tmp_path: Path) -> None:
    config = settings(models, TP2)
    run_ranks(train, 2, config, tmp_path / "rm")
    result = run_ranks(serve, 2, models, config, tmp_path / "rm")[0]
    torch.testing.assert_close(result["served"], result["trained"], rtol=0, atol=1e-5)
    MegatronToHf(tmp_path / "rm" / "checkpoints", tmp_path / "rm" / "hf").run()
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "hf").eval()
    with torch.no_grad():
        scores = network(result["tokens"]).logits[:, 0] + result["bias"]
    torch.testing.assert_close(scores, result["served"], rtol=0, atol=1e-5)


def averaged(models: Models, root: Path) -> list[dict[str, Tensor]]:
    """The weights of WARM's two best members, and their average."""
    average = checkpoint_files.read_manifest(root / "average")
    assert average.lora is None
    weights = []
    for source in [Path(path) for path in average.state["average_of"]] + [root / "average"]:
        runtime.initialize(ParallelConfig(), 1)
        runner = build(plan(ModelSetup(restore_from_path=source)), "scalar")
        weights.append(dict(export_tensors(runner.chunks, models.config)))
    return weights


def test_members_of_warm_may_be_adapters(models: Models, tmp_path: Path) -> None:
    run_ranks(train, 1, settings(models, {}, ensemble=WARM), tmp_path / "warm")
    one, other, average = run_ranks(averaged, 1, models, tmp_path / "warm")[0]
    for name, weight in average.items():
        torch.testing.assert_close(weight, (one[name] + other[name]) / 2, rtol=0, atol=1e-7)
        adapted = name.endswith("_proj.weight") or name == "score.weight"  # a pair's two biases cancel out
        assert torch.equal(one[name], other[name]) != adapted, name
