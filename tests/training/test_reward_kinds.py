"""ODIN and InfoRM under every layout: the losses are the documented ones, and nothing about the layout changes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from jobs import LATENTS, Models
from jobs import reward_training as settings

from nemo_eppo.algorithms.odin import length_loss
from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import SFTDataset, collate
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.model import ModelSetup, ParallelConfig
from nemo_eppo.settings.reward_model import RewardLossConfig
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.training.reward_losses import LOSSES
from nemo_eppo.training.reward_model import RewardTask
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import build, plan

KINDS = ("odin", "inform")
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, int]]] = {
    "micro_batches_of_1": (1, {}, {"micro_batch_size": 1}),
    "dp2": (2, {}, {"micro_batch_size": 2}),
    "tp2_sp_packed": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"micro_batch_tokens": 131}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {"micro_batch_size": 2}),
}


def update(
    models: Models, source: Path, kind: str, layout: dict[str, Any], micro_batches: dict[str, int]
) -> dict[str, Any]:
    """One update of a trained model: what it reported, and the gradient of the head."""
    setup = ModelSetup(restore_from_path=source, parallel=ParallelConfig(**layout), **micro_batches)
    config, planned = settings(models, kind), plan(setup, head="scalar")
    task = RewardTask(config.data, config.reward, planned, seed=5)
    runtime.initialize(setup.parallel, 1)
    optimizer = OptimizerConfig(lr=1e-9, clip_grad=0.0)
    runner = build(planned, task.head, latent_size=task.latent_size, optimizer=optimizer)
    rows = task.prepare(task.rows(list(range(8))), runner, 3)
    outputs = {"odin": 3, "inform": 1 + 2 * task.latent_size}[kind]  # per token
    out, _ = runner.infer(rows["tokens"], rows["lengths"], outputs=outputs)
    report: dict[str, Any] = runner.train_step(rows, task.loss_function(rows), group=2)
    decoder = unwrap(runner.chunks[-1])
    gradients = {n: p.main_grad.clone() for n, p in decoder.named_parameters() if n.startswith("head.")}
    return {"report": report, "out": out, "rows": rows, "gradients": gradients}


@pytest.fixture(scope="module")
def whole_updates(models: Models, trained: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Of each kind, on one rank in one micro-batch."""
    return {kind: run_ranks(update, 1, models, trained[kind], kind, {}, {"micro_batch_size": 8})[0] for kind in KINDS}


@pytest.mark.parametrize(
    ("layout", "kind"), [(layout, kind) for layout in LAYOUTS for kind in KINDS if (layout, kind) != ("pp2", "inform")]
)
def test_no_layout_or_micro_batch_changes_an_update(
    layout: str, kind: str, models: Models, trained: dict[str, Path], whole_updates: dict[str, dict[str, Any]]
) -> None:
    whole = whole_updates[kind]
    ranks, parallel, micro_batches = LAYOUTS[layout]
    for found in run_ranks(update, ranks, models, trained[kind], kind, parallel, micro_batches):
        assert found["report"].keys() == whole["report"].keys()
        for name, value in whole["report"].items():
            assert found["report"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        for name, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, whole["gradients"][name], rtol=1e-3, atol=1e-5, msg=name)


def odin_loss(out: torch.Tensor, rows: dict[str, torch.Tensor]) -> float:
    last = out[torch.arange(len(out)), rows["lengths"] - 1].double().numpy()
    quality, length, cosine = last[:, 0], last[:, 1], last[0, 2]
    lengths = (rows["lengths"] - rows["prompt_lengths"]).numpy()
    lead = (quality + length)[0::2] - (quality + length)[1::2]
    correlations = [np.corrcoef(x, lengths)[0, 1] for x in (quality, length)]
    return float(np.log1p(np.exp(-lead)).mean() + abs(correlations[0]) - correlations[1] + abs(cosine))


def odin_differences(models: Models, source: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Along random directions of the head's weights: slopes of the documented loss, and those of the update."""
    setup = ModelSetup(restore_from_path=source, micro_batch_size=3)
    config, planned = settings(models, "odin"), plan(setup, head="scalar")
    task = RewardTask(config.data, config.reward, planned, seed=5)
    runtime.initialize(setup.parallel, 1)
    runner = build(planned, task.head, optimizer=OptimizerConfig(lr=1e-12, clip_grad=0.0))
    rows = task.prepare(task.rows(list(range(8))), runner, 3)
    runner.train_step(rows, task.loss_function(rows), group=2)
    weight = unwrap(runner.chunks[0]).head.rows
    gradient, here = weight.main_grad.clone(), weight.detach().clone()
    measured, expected = [], []
    for seed in range(4):
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        values = []
        for step in (-0.01, 0.01):
            weight.data.copy_(here + step * direction)
            values.append(odin_loss(runner.infer(rows["tokens"], rows["lengths"], outputs=3)[0], rows))
        measured.append((values[1] - values[0]) / 0.02)
        expected.append(float((gradient * direction).sum()))
    return torch.tensor(measured), torch.tensor(expected)


def test_odins_update_follows_the_gradient_of_the_documented_loss(models: Models, trained: dict[str, Path]) -> None:
    measured, expected = run_ranks(odin_differences, 1, models, trained["odin"])[0]
    assert measured.abs().min() > 1e-3
    torch.testing.assert_close(expected, measured, rtol=0.02, atol=2e-3)


def test_odins_reported_loss_is_the_documented_formula(
    models: Models, trained: dict[str, Path], whole_updates: dict[str, dict[str, Any]]
) -> None:
    halves = run_ranks(update, 1, models, trained["odin"], "odin", {}, {"micro_batch_size": 4})[0]
    for made in (whole_updates["odin"], halves):
        report, lengths = made["report"], made["rows"]["lengths"] - made["rows"]["prompt_lengths"]
        assert report["loss"] == pytest.approx(odin_loss(made["out"], made["rows"]), rel=1e-4)
        last = made["out"][torch.arange(16), made["rows"]["lengths"] - 1].double()
        assert report["length_loss"] == pytest.approx(float(length_loss(last[:, 0], last[:, 1], lengths)), rel=1e-4)
        assert abs(report["length_loss"]) > 1e-2


@pytest.mark.parametrize("kind", ["bradley_terry", "odin"])
def test_a_tie_counts_half_in_the_training_accuracy_as_in_validation(kind: str) -> None:
    rows = {"prompt_lengths": torch.ones(4, dtype=torch.int64), "lengths": torch.full((4,), 3)}
    rows |= {name: torch.zeros(4) for name in ("quality_slopes", "length_slopes", "length_loss")}
    loss = LOSSES[kind](RewardLossConfig(kind=kind), 0)
    output = torch.zeros(4, 3, 3)
    assert float(loss(output, rows, 2)[1]["accuracy"]) == 0.5
    output[0, 2, 0] = 1
    assert float(loss(output, rows, 2)[1]["accuracy"]) == 0.75


def test_informs_loss_is_the_documented_formula(whole_updates: dict[str, dict[str, Any]]) -> None:
    made = whole_updates["inform"]
    rows, out = made["rows"], made["out"]
    last = out[torch.arange(16), rows["lengths"] - 1].double()
    mean, logvar = last[:, 1 : 1 + LATENTS], last[:, 1 + LATENTS :]
    kl = 0.5 * (logvar.exp() + mean**2 - 1 - logvar).sum() / 8
    assert made["report"]["latent_kl"] == pytest.approx(float(kl), rel=1e-4)
    lead = last[0::2, 0] - last[1::2, 0]  # of the means: what is sampled has another Bradley-Terry loss
    without_noise = torch.nn.functional.softplus(-lead).mean() + 0.1 * kl
    assert made["report"]["loss"] == pytest.approx(float(without_noise), rel=0.5)
    assert made["report"]["loss"] != pytest.approx(float(without_noise), rel=1e-3)


def built(source: Path, data: Path, layout: dict[str, Any]) -> tuple[RewardModel, dict[str, torch.Tensor]]:
    """A served reward model and a request with all rows of `data`."""
    model = RewardModel(ModelSetup(restore_from_path=source, parallel=ParallelConfig(**layout)))
    runtime.initialize(ParallelConfig(**layout), 1)
    model.build()
    items = SFTDataset(data, model.plan.tokenizer, max_sequence_length=48).items
    tokens, prompts, lengths = collate([(item.prompt_ids, item.response_ids) for item in items], 0)
    return model, {"tokens": tokens, "prompt_lengths": prompts, "lengths": lengths}


def served(source: Path, data: Path, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, request = built(source, data, layout)
    return model.infer(request)


def served_and_read_later(source: Path, data: Path, layout: dict[str, Any]) -> list[torch.Tensor]:
    """Rewards and latents as served, and as read from what the model gives for every token."""
    model, request = built(source, data, layout)
    runner, gaussian = model.runner, model._gaussian
    assert gaussian is not None
    result = model.infer(request)
    everything, _ = runner.infer(request["tokens"], request["lengths"], outputs=1 + 2 * LATENTS)
    last = everything[torch.arange(len(everything)), request["lengths"] - 1]
    latents = (last[:, 1 : 1 + LATENTS].double() - gaussian.mean) @ torch.linalg.inv(gaussian.factor).T
    return [result["rewards"][:, 0], last[:, 0], result["latents"], latents.float()]


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["dp2", "pp2"])
def test_what_is_served_is_what_the_model_gives_at_the_last_token(
    layout: dict[str, Any], models: Models, trained: dict[str, Path]
) -> None:
    data = models.data / "sft.train.jsonl"
    for rewards, scores, latents, whitened in run_ranks(served_and_read_later, 2, trained["inform"], data, layout):
        assert torch.equal(rewards, scores)
        torch.testing.assert_close(latents, whitened, rtol=1e-5, atol=1e-5)
        assert latents.abs().max() > 0.5


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["one", "pp2"])
def test_served_latents_are_standard_on_sft_responses(
    layout: dict[str, Any], models: Models, trained: dict[str, Path]
) -> None:
    ranks = layout.get("pipeline_model_parallel_size", 1)
    for result in run_ranks(served, ranks, trained["inform"], models.data / "sft.train.jsonl", layout):
        latents = result["latents"].double()
        assert latents.shape == (16, LATENTS)
        torch.testing.assert_close(latents.mean(0), torch.zeros(LATENTS, dtype=torch.float64), rtol=0, atol=1e-4)
        # the covariance was shrunk towards a multiple of I; its trace was not
        covariance = latents.T @ latents / 16
        assert 0.3 < float(covariance.trace() / LATENTS) < 3
        assert result["rewards"].shape == (16, 1)


def test_an_odin_server_gives_the_quality_alone(models: Models, trained: dict[str, Path]) -> None:
    result = run_ranks(served, 1, trained["odin"], models.data / "sft.train.jsonl", {})[0]
    assert set(result) == {"rewards"}
    assert result["rewards"].shape == (16, 1)
    manifest = checkpoint_files.read_manifest(checkpoint_files.find(trained["odin"], "model"))
    assert (manifest.head, manifest.state["kind"]) == ("odin", "odin")


def critic_head(source: Path) -> tuple[str, ...]:
    setup = ModelSetup(restore_from_path=source)
    planned = plan(setup)
    runtime.initialize(setup.parallel, 1)
    decoder = unwrap(build(planned, "scalar").chunks[0])
    return tuple(name for name, _ in decoder.named_parameters() if name.startswith("head."))


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_may_start_from_any_kind_of_reward_model(kind: str, trained: dict[str, Path]) -> None:
    assert run_ranks(critic_head, 1, trained[kind]) == [("head.weight", "head.bias")]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "inform"}, "needs inform.sft_responses"),
        ({"kind": "inform", "score": "mean", "inform": {"sft_responses": "x"}}, "with score 'mean': expected 'last'"),
        ({"kind": "odin", "odin": {"length_weight": -1}}, r"reward\.odin\.length_weight = -1"),
        ({"inform": {"beta": -0.1}}, r"reward\.inform\.beta = -0\.1"),
        ({"kind": "infrm"}, r"reward\.kind = 'infrm'"),
    ],
)
def test_bad_settings_are_named(reward: dict[str, Any], message: str, models: Models) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(models, "odin", reward=reward)
