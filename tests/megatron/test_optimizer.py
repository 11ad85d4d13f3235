"""Updates against torch's AdamW and clip_grad_norm_ on the same network in transformers; updates that must fail."""

import itertools
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from distributed import run_ranks
from features import GEMMA2, PHI3
from tiny import MODEL, PP2, VPP2, Layout, build_runner, close, exported, random_batch, random_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.megatron import checkpoint
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.optimizer import allocate_state
from nemo_eppo.megatron.optimizer_shards import _blocks
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.models.hf_config import causal_architecture, hf_config
from nemo_eppo.settings.model import ModelConfig, Precision
from nemo_eppo.settings.training import OptimizerConfig

QWEN2 = MODEL.model_copy(update={"qkv_bias": True})  # it has biases, which like norms are not decayed
QWEN3 = MODEL.model_copy(update={"qk_norm": True})
MODELS = {
    "Qwen2": QWEN2,
    "Qwen3": QWEN3,
    "Gemma2": MODEL.model_copy(update=GEMMA2),
    "Phi3": MODEL.model_copy(update=PHI3),
}
LAYOUTS: dict[str, tuple[Layout, int]] = {"TP1": ({}, 1), "PP2": (PP2, 2), "DP2": ({}, 2)}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
FAULTS = ("loss", "gradient")
STEPS, CLIP_GRADS = 3, (0.5, 0.0)
OPTIMIZER = OptimizerConfig(lr=0.01, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.5, clip_grad=0.5)

Training = tuple[list[dict[str, float]], dict[str, Tensor]]
"""Reports of each update, and the parameters after the last."""


def likelihood(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the sum of log-probs, over 50; and a tenth of the entropy against it."""
    logprobs, entropy = output.unbind(-1)
    return -logprobs.sum() / 50 - 0.1 * entropy.sum() / 50, {"rows": torch.tensor(float(len(output)))}


def train(layout: Layout, model: ModelConfig, optimizer: OptimizerConfig) -> Training:
    runner = build_runner(layout, model, optimizer=optimizer)
    reports = [runner.train_step(random_batch(), likelihood) for _ in range(STEPS)]
    return reports, exported(runner, model)


def train_all(layout: Layout) -> dict[tuple[str, float], Training]:
    """Every model, with gradients clipped and not, in one process group."""
    return {
        (name, clip_grad): train(layout, model, OPTIMIZER.model_copy(update={"clip_grad": clip_grad}))
        for name, model in MODELS.items()
        for clip_grad in CLIP_GRADS
    }


@cache
def trained(layout: str) -> list[dict[tuple[str, float], Training]]:
    parallel, ranks = LAYOUTS[layout]
    return run_ranks(train_all, ranks, parallel)


def train_with_moments_from_the_start(precision: Precision, allocate: bool) -> tuple[Training, int]:
    """The same of two updates; and the bytes of Adam's moments before them."""
    runner = build_runner({}, precision=precision, optimizer=OPTIMIZER)
    if allocate:
        allocate_state(runner.optimizer)
    [part] = runner.optimizer.chained_optimizers
    moments = sum(value.nbytes for state in part.optimizer.state.values() for value in state.values() if value.dim())
    reports = [runner.train_step(random_batch(), likelihood) for _ in range(2)]
    return (reports, exported(runner)), moments


@pytest.mark.parametrize("precision", PRECISIONS)
def test_moments_that_are_allocated_before_training_change_no_update(precision: Precision) -> None:
    (reports, weights), moments = run_ranks(train_with_moments_from_the_start, 1, precision, True)[0]
    (expected_reports, expected), none = run_ranks(train_with_moments_from_the_start, 1, precision, False)[0]
    assert none == 0
    assert moments >= 2 * 4 * sum(tensor.numel() for tensor in weights.values())
    assert reports == expected_reports
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@cache
def train_in_plain_torch(name: str, clip_grad: float) -> Training:
    model = MODELS[name]
    settings = hf_config(model, causal_architecture(model)) | {"pad_token_id": None}
    config = AutoConfig.for_model(**settings)
    network: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {n: w for n, w in random_weights(model).items() if "score" not in n}
    network.load_state_dict(weights, strict=not model.tie_embeddings)
    network.tie_weights()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if p.dim() > 1]},
        {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    batch, reports = random_batch(), []
    wanted = batch["targets"] != IGNORE
    for _ in range(STEPS):
        logp = network(batch["tokens"]).logits.log_softmax(-1)
        chosen = logp.gather(-1, batch["targets"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        loss = -chosen[wanted].sum() / 50 - 0.1 * entropy[wanted].sum() / 50
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_grad or float("inf"))
        adamw.step()
        reports.append({"loss": float(loss), "grad_norm": float(norm)})
    return reports, {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize("clip_grad", CLIP_GRADS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_are_those_of_torch_adamw(layout: str, model: str, clip_grad: float) -> None:
    expected_reports, expected = train_in_plain_torch(model, clip_grad)
    for rank in trained(layout):
        reports, parameters = rank[model, clip_grad]
        close(f"AdamW, {model}, {layout}, clip {clip_grad}, parameters", parameters, expected)
        for got, want in zip(reports, expected_reports, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
            assert got["grad_norm"] > 1, "or nothing was clipped"
            assert got["rows"] == 6


@pytest.mark.parametrize("layout", [{}, VPP2], ids=["DP2", "DP2 VPP2"])
def test_updates_of_a_distributed_optimizer_during_whose_backward_passes_gradients_are_summed(layout: Layout) -> None:
    optimizer = OPTIMIZER.model_copy(update={"distributed": True, "overlap_grad_reduce": True})
    expected_reports, expected = train_in_plain_torch("Qwen2", optimizer.clip_grad)
    for reports, parameters in run_ranks(train, 4 if layout else 2, layout, QWEN2, optimizer):
        close(f"distributed AdamW, {layout}, parameters", parameters, expected)
        assert [report["loss"] for report in reports] == pytest.approx([r["loss"] for r in expected_reports], rel=1e-6)


def preparations(distributed: bool) -> list[int]:
    """How often the gradients of each part of the optimizer were prepared, in two updates."""
    runner = build_runner({}, precision="bf16", optimizer=OPTIMIZER.model_copy(update={"distributed": distributed}))
    parts = runner.optimizer.chained_optimizers
    for part in parts:
        part.prepare_grads = Mock(wraps=part.prepare_grads)
    for _ in range(2):
        runner.train_step(random_batch(), likelihood)
    return [part.prepare_grads.call_count for part in parts]


@pytest.mark.parametrize("distributed", [False, True])
def test_an_update_prepares_gradients_once(distributed: bool) -> None:
    """Megatron's own `step` would once more: all gradients would be copied to fp32 and clipped twice."""
    assert run_ranks(preparations, 1, distributed) == [[2]]


@cache
def broken(layout: str) -> list[dict[tuple[str, str], tuple[str, bool, bool]]]:
    parallel, ranks = LAYOUTS[layout]
    return run_ranks(break_all, ranks, parallel)


def break_all(layout: Layout) -> dict[tuple[str, str], tuple[str, bool, bool]]:
    return {(precision, where): break_one(layout, precision, where) for precision in PRECISIONS for where in FAULTS}


def break_one(layout: Layout, precision: Precision, where: str) -> tuple[str, bool, bool]:
    """What is said about a broken update; whether it left every bit alone; whether training then goes on as without."""
    runner = build_runner(layout, QWEN2, precision=precision, optimizer=OPTIMIZER)
    runner.train_step(random_batch(), likelihood)
    before = exported(runner, QWEN2)

    def loss(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        value, report = likelihood(output, rows)
        last = rows["lengths"].min() == random_batch()["lengths"].min()  # only one micro-batch, and so one replica
        if where == "loss" and last:
            value = value * torch.nan
        if where == "gradient" and last:  # sqrt is 0 at 0, and its gradient infinite
            value = value + (output.sum() * 0).sqrt()
        return value, report

    try:
        runner.train_step(random_batch(), loss)
        said = ""
    except FloatingPointError as error:
        said = str(error)
    unchanged = same_bits(exported(runner, QWEN2), before)
    runner.train_step(random_batch(), likelihood)
    undisturbed = build_runner(layout, QWEN2, precision=precision, optimizer=OPTIMIZER)
    for _ in range(2):
        undisturbed.train_step(random_batch(), likelihood)
    return said, unchanged, same_bits(exported(runner, QWEN2), exported(undisturbed, QWEN2))


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", FAULTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["PP2", "DP2"])
def test_update_that_is_not_finite_is_refused_on_every_rank(layout: str, precision: str, where: str) -> None:
    for rank in broken(layout):
        said, unchanged, goes_on = rank[precision, where]
        assert "a loss or gradient is not finite, nothing was updated" in said
        assert unchanged
        assert goes_on


def learning_rates(config: OptimizerConfig) -> list[float]:
    runner = build_runner({}, optimizer=config)  # reaches min_lr in 10 updates
    return [runner.train_step(random_batch(), likelihood)["lr"] for _ in range(12)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]),
    ],
)
def test_learning_rate_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=2e-4, warmup_steps=2, schedule=schedule)
    assert run_ranks(learning_rates, 1, config)[0] == pytest.approx([1e-3 * share for share in expected])


def test_constant_steps_end_a_cosine_at_min_lr_as_in_torch() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=2e-4, warmup_steps=2, schedule="cosine", constant_steps=4)
    [found] = run_ranks(learning_rates, 1, config)  # of 10 updates and two more: 2 + 4 + 4
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        sgd,
        [
            torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: step / 2),
            torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=4, eta_min=config.min_lr),
            torch.optim.lr_scheduler.ConstantLR(sgd, factor=config.min_lr / config.lr, total_iters=100),
        ],
        milestones=[2, 6],
    )
    expected = []
    for _ in found:
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert found == pytest.approx(expected)
    assert found[6:] == pytest.approx([config.min_lr] * 6)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="constant_steps = 1 needs a schedule that decays"):
        load_config(OptimizerConfig, {"lr": 0.01, "constant_steps": 1})
    decaying = {"lr": 0.01, "schedule": "cosine", "warmup_steps": 2, "constant_steps": 8}
    with pytest.raises(ConfigError, match="warmup_steps = 2 and constant_steps = 8 leave no update to decay in"):
        load_config(OptimizerConfig, decaying | {"decay_steps": 10})
    with pytest.raises(ConfigError, match="expected less than 9 together"):
        load_config(OptimizerConfig, decaying).arrival(9)
    with pytest.raises(ConfigError, match=r"min_lr = 0.1 is above lr = 0.01"):
        load_config(OptimizerConfig, {"lr": 0.01, "min_lr": 0.1})


def train_bf16_critic(layout: Layout) -> Training:
    optimizer = OPTIMIZER.model_copy(update={"distributed": True})
    runner = build_runner(layout, head="scalar", precision="bf16", optimizer=optimizer)
    rows = random_batch(rows=8)
    del rows["targets"]
    reports = [runner.train_step(rows, lambda output, rows: (output[:, 0].square().sum() / 50, {})) for _ in range(2)]
    return reports, exported(runner)


def test_sharded_updates_of_a_bf16_model_with_a_head_are_the_same_in_an_interleaved_pipeline() -> None:
    (expected, _), (reports, _) = (run_ranks(train_bf16_critic, 2, layout)[0] for layout in (PP2, VPP2))
    for report, other in zip(reports, expected, strict=True):
        assert report["loss"] == pytest.approx(other["loss"], rel=1e-3)


def described_states(layout: Layout) -> tuple[int, int, bool]:
    """Numbers of states that this rank would save, and that it has; and whether both are the same memory."""
    runner = build_runner(layout, QWEN2, optimizer=OPTIMIZER.model_copy(update={"distributed": True}))
    runner.train_step(random_batch(rows=8), likelihood)
    blocks = checkpoint._sharded_state(runner, optimizer=True, is_loading=False)["optimizer"]["param_state"]
    [part] = runner.optimizer.chained_optimizers
    own = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    own += [value for state in part.optimizer.state.values() for name, value in state.items() if name != "step"]
    memory = {tensor.untyped_storage().data_ptr() for tensor in own}
    shared = all(block.data.untyped_storage().data_ptr() in memory for block in blocks)
    return sum(block.data.numel() for block in blocks), sum(tensor.numel() for tensor in own), shared


@pytest.mark.parametrize(("layout", "ranks"), [({}, 3), (VPP2, 4)], ids=["DP3", "DP2 VPP2"])
def test_each_replica_saves_the_states_that_it_has_and_copies_none(layout: Layout, ranks: int) -> None:
    for saved, has, shared in run_ranks(described_states, ranks, layout):
        assert (saved, shared) == (has, True)


@pytest.mark.parametrize("width", [1, 2, 5, 12])
def test_a_range_of_a_matrix_is_divided_into_at_most_three_blocks(width: int) -> None:
    matrix = torch.arange(4 * width).view(4, width)
    for start, end in itertools.combinations_with_replacement(range(4 * width + 1), 2):
        blocks = [*_blocks(start, end, width)]
        parts = [matrix[b.row : b.row + b.rows, b.column : b.column + b.columns].flatten() for b in blocks]
        assert [int(part[0]) for part in parts] == [block.begins for block in blocks]
        assert torch.equal(torch.cat([*parts, matrix.new_zeros(0)]), matrix.flatten()[start:end])
        assert len(blocks) <= 3
