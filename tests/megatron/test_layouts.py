"""Neither layout nor micro-batches nor padding nor the order of rows changes what a model infers or learns.

Every case runs the same three updates and is compared with one rank. Adam's epsilon is 1, so that an update is nearly
proportional to the gradient: a gradient of the wrong size cannot hide behind Adam's normalisation. In every case but
that of the one rank, later passes are rounded up as on GPUs, though not to multiples of 64.
"""

from functools import partial
from typing import Any

import pytest
import torch
from distributed import run_ranks
from features import GEMMA2
from tiny import (
    MODEL,
    PP2,
    PRESETS,
    SP2,
    TP2,
    VPP2,
    Layout,
    build_runner,
    close,
    exported,
    inputs,
    random_batch,
    random_weights,
)
from torch import Tensor

from nemo_eppo.algorithms.policy import aggregate, policy_loss, value_loss
from nemo_eppo.megatron import device
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import ModelConfig
from nemo_eppo.settings.training import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.3, betas=(0.9, 0.99), eps=1.0, weight_decay=0.1, clip_grad=1.0)
TIED_QWEN3 = MODEL.model_copy(update={"qk_norm": True, "tie_embeddings": True})
TIED_GEMMA2 = MODEL.model_copy(update=GEMMA2)
TP2_PP2 = SP2 | PP2
LAYOUTS = {
    "TP2": (TP2, 2),
    "TP2+SP": (SP2, 2),
    "PP2": (PP2, 2),
    "PP2+VPP2": (VPP2, 2),
    "DP2": ({}, 2),
    "TP2+SP x PP2": (TP2_PP2, 4),
}
# The policy is compared in every layout; other models in TP and PP without more only if asked for.
OTHERS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("TP2", "PP2")))
    for name in ("TP2", "TP2+SP", "PP2", "PP2+VPP2", "DP2")
]


def mini_batch() -> Rows:
    """A batch with old log-probs, advantages, values and returns of its response tokens, the last two thirds."""
    batch = random_batch()
    rows, longest = batch["tokens"].shape
    draw = torch.Generator().manual_seed(11)
    for name in ("old_logprobs", "advantages", "values", "returns"):
        batch[name] = torch.randn(rows, longest - 1, generator=draw)
    batch["old_logprobs"] -= 5
    positions = torch.arange(1, longest)
    batch["mask"] = (positions >= longest // 3) & (positions < batch["lengths"][:, None])
    return batch


def train_policy(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs, entropy = output[:, :-1].unbind(-1)
    mask, tokens = rows["mask"], float(mini_batch()["mask"].sum())
    settings: Any = {"clip_low": 3.0, "clip_high": 3.0, "denominator": tokens}
    loss, _ = policy_loss(logprobs, rows["old_logprobs"], rows["advantages"], mask, **settings)
    entropy_term = aggregate(entropy, mask, "token", tokens)
    return loss - 0.1 * entropy_term, {"tokens": mask.sum().float(), "entropy": entropy_term}


def train_values(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    mask, tokens = rows["mask"], float(mini_batch()["mask"].sum())
    loss, _ = value_loss(output[:, :-1, 0], rows["values"], rows["returns"], mask, None, tokens)
    return loss, {"tokens": mask.sum().float()}


def everything(
    layout: Layout, model: ModelConfig, scalar: bool, rows: Rows, settings: dict[str, Any]
) -> dict[str, Any]:
    """What a model infers, learns in three updates, and infers then.

    The tokens of a row or pack are rounded up in the second and third update, and afterwards.
    """
    group, rounded = settings.pop("group", 1), settings.pop("rounded", True)
    head: Any = "scalar" if scalar else "lm"
    outputs, loss = (1, train_values) if scalar else (2, train_policy)
    probe = EnergyProbeConfig(preset="mlp_linears", layers=(-1, 0))
    runner = build_runner(layout, model, head, probe=probe, optimizer=OPTIMIZER, **settings)
    inputs = (rows["tokens"], rows["lengths"], None if scalar else rows["targets"])
    before, energies = runner.infer(*inputs, outputs=outputs, energies=True)
    reports = []
    for multiple in (1, 5, 8):
        device.tokens_multiple = partial(int, multiple if rounded else 1)
        reports.append(runner.train_step(rows, loss, group=group))
    after = torch.cat(runner.infer(*inputs, outputs=outputs, energies=True), -1)  # type: ignore[arg-type]
    return {
        "before": before,
        "energies": energies,
        "after": after,
        "reports": {name: torch.tensor([r[name] for r in reports], dtype=torch.float64) for name in reports[0]},
        "parameters": exported(runner, model),
    }


def run(
    layout: Layout,
    ranks: int,
    model: ModelConfig = MODEL,
    scalar: bool = False,
    rows: Rows | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    return run_ranks(everything, ranks, layout, model, scalar, rows or mini_batch(), settings)


@pytest.fixture(scope="module")
def policy() -> dict[str, Any]:
    return run({}, 1, rounded=False)[0]


@pytest.fixture(scope="module")
def tied_policy() -> dict[str, Any]:
    return run({}, 1, TIED_QWEN3, rounded=False)[0]


@pytest.fixture(scope="module")
def gemma2() -> dict[str, Any]:
    return run({}, 1, TIED_GEMMA2, rounded=False)[0]


@pytest.fixture(scope="module")
def critic() -> dict[str, Any]:
    return run({}, 1, scalar=True, rounded=False)[0]


def same(case: str, got: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank, result in enumerate(got):
        for what in ("before", "energies", "after", "parameters"):
            close(f"{case}, rank {rank}, {what}", result[what], expected[what])
        scale = {name: value.abs().clamp(min=1) for name, value in expected["reports"].items()}
        relative = [{name: value / scale[name] for name, value in r["reports"].items()} for r in (result, expected)]
        close(f"{case}, rank {rank}, reports (relative)", relative[0], relative[1])


def test_three_updates_move_every_parameter(
    policy: dict[str, Any], critic: dict[str, Any], gemma2: dict[str, Any]
) -> None:
    """The comparisons of this file would be empty if training did nothing."""
    for result, model in ((policy, MODEL), (critic, MODEL), (gemma2, TIED_GEMMA2)):
        start = random_weights(model)
        for name, trained in result["parameters"].items():
            assert float((trained - start[name]).abs().max()) > 1e-4, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_policy(layout: str, policy: dict[str, Any]) -> None:
    same(f"policy {layout}", run(*LAYOUTS[layout]), policy)


@pytest.mark.parametrize("layout", OTHERS[:-1])
def test_layout_changes_no_policy_with_tied_embeddings_and_qk_norm(layout: str, tied_policy: dict[str, Any]) -> None:
    same(f"tied policy {layout}", run(*LAYOUTS[layout], model=TIED_QWEN3), tied_policy)


@pytest.mark.parametrize(("layout", "packed"), [("TP2+SP", None), ("PP2+VPP2", 21), ("DP2", 21)])
def test_layout_packing_and_recomputing_change_no_gemma2(
    layout: str, packed: int | None, gemma2: dict[str, Any]
) -> None:
    result = run(*LAYOUTS[layout], model=TIED_GEMMA2, micro_batch_tokens=packed, recompute=packed is not None)
    same(f"Gemma 2 {layout}", result, gemma2)


@pytest.mark.parametrize("layout", OTHERS)
def test_layout_changes_no_critic(layout: str, critic: dict[str, Any]) -> None:
    same(f"critic {layout}", run(*LAYOUTS[layout], scalar=True), critic)


def test_recomputing_activations_changes_nothing(policy: dict[str, Any]) -> None:
    """Of padded rows; on one rank and in pipelines the tests of packed models recompute."""
    same("recompute", run(SP2, 2, recompute=True), policy)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batch_size_changes_nothing(micro_batch_size: int, policy: dict[str, Any]) -> None:
    same(f"micro-batches of {micro_batch_size}", run({}, 1, micro_batch_size=micro_batch_size), policy)


def test_micro_batches_of_two_groups_and_of_one_change_nothing_in_a_pipeline(policy: dict[str, Any]) -> None:
    same("four rows and two", run(PP2, 2, micro_batch_size=2, group=2), policy)


PACKED = 21  # tokens: packs of one or two of the six rows


@pytest.mark.parametrize("layout", ["TP1", "TP2+SP", "PP2+VPP2", "TP2+SP x PP2"])
def test_packing_changes_no_policy(layout: str, policy: dict[str, Any]) -> None:
    packed = run(*LAYOUTS.get(layout, ({}, 1)), micro_batch_tokens=PACKED)
    same(f"packed policy {layout}", packed, policy)


@pytest.mark.parametrize("layout", ["TP1", "PP2+VPP2"])
def test_packing_changes_no_critic(layout: str, critic: dict[str, Any]) -> None:
    """The longest row has twelve tokens, one more than a pack may have."""
    packed = run(*LAYOUTS.get(layout, ({}, 1)), scalar=True, micro_batch_tokens=11, recompute=True)
    same(f"packed critic {layout}", packed, critic)


def test_further_padding_changes_nothing(policy: dict[str, Any]) -> None:
    rows = mini_batch()
    size, extra = rows["tokens"].size(1), 5
    for name, value in rows.items():
        if value.dim() == 2:
            filler = {"tokens": 3, "targets": 3, "mask": False}.get(name, float("nan"))
            rows[name] = torch.nn.functional.pad(value, (0, extra), value=filler)
    result = run({}, 1, rows=rows)[0]
    for what in ("before", "energies", "after"):
        assert torch.equal(result[what][:, size:], torch.zeros_like(result[what][:, size:]))
        result[what] = result[what][:, :size]
    same("padding", [result], policy)


def test_order_of_rows_changes_nothing(policy: dict[str, Any]) -> None:
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    result = run({}, 2, rows={name: value[order] for name, value in mini_batch().items()})
    for what in ("before", "energies", "after"):
        for rank in result:
            rank[what] = rank[what][torch.argsort(order)]
    same("order of rows", result, policy)


def all_energies(layout: Layout, micro_batch_tokens: int | None = None) -> list[Tensor]:
    runner = build_runner(layout, micro_batch_tokens=micro_batch_tokens)
    energies = []
    for preset in PRESETS:
        runner.probe = EnergyProbe(EnergyProbeConfig(preset=preset, layers=(0, -1)), runner.chunks, MODEL.num_layers)
        energies.append(runner.infer(*inputs(), outputs=2, energies=True)[1])
    return energies  # type: ignore[return-value]


@pytest.fixture(scope="module")
def whole_energies() -> list[Tensor]:
    energies: list[Tensor] = run_ranks(all_energies, 1, {})[0]
    return energies


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2+VPP2"])
def test_layout_and_packing_change_no_energy_of_any_preset(layout: str, whole_energies: list[Tensor]) -> None:
    for energies in run_ranks(all_energies, LAYOUTS[layout][1], LAYOUTS[layout][0], PACKED):
        for preset, got, want in zip(PRESETS, energies, whole_energies, strict=True):
            close(f"{preset} {layout}", got, want)


def energies_while_training(layout: Layout, recompute: bool) -> tuple[list[Tensor], Tensor]:
    """Energies read during the forward passes of an update, and by inference before it."""
    rows = mini_batch()
    runner = build_runner(layout, probe=EnergyProbeConfig(), recompute=recompute, optimizer=OPTIMIZER)
    _, inferred = runner.infer(rows["tokens"], rows["lengths"], rows["targets"], outputs=2, energies=True)
    longest_first = rows["lengths"].sort(descending=True, stable=True)
    # pipeline stages take all micro-batches in one shape
    shapes = [(2, int(longest_first.values[0 if layout else i])) for i in range(0, len(rows["tokens"]), 2)]
    assert runner.probe is not None
    assert inferred is not None
    with runner.probe.recording():
        runner.train_step(rows, train_policy)
    return runner.probe.collect(shapes), inferred[longest_first.indices]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [{}, PP2], ids=["PP1", "PP2"])
def test_energies_can_be_read_while_training_and_count_once(layout: Layout, recompute: bool) -> None:
    for read, inferred in run_ranks(energies_while_training, 2 if layout else 1, layout, recompute):
        for index, micro_batch in enumerate(read):
            expected = inferred[2 * index : 2 * index + 2, : micro_batch.size(1)]
            real = torch.where(expected != 0, micro_batch, 0)
            close(f"energies in training, recompute={recompute}", real, expected)


def mixed_precision(precision: Any, scalar: bool) -> dict[str, Any]:
    runner = build_runner(
        {}, head="scalar" if scalar else "lm", precision=precision, probe=EnergyProbeConfig(), optimizer=OPTIMIZER
    )
    rows = mini_batch()
    outputs, energies = runner.infer(
        rows["tokens"], rows["lengths"], None if scalar else rows["targets"], outputs=1 if scalar else 2, energies=True
    )
    report = runner.train_step(rows, train_values if scalar else train_policy)
    dtypes = {name: p.dtype for name, p in unwrap(runner.chunks[0]).named_parameters()}
    return {"outputs": outputs, "energies": energies, "report": report, "dtypes": dtypes, "after": exported(runner)}


@pytest.mark.parametrize("scalar", [False, True], ids=["policy", "critic"])
def test_bf16_stays_near_fp32_and_heads_stay_fp32(scalar: bool) -> None:
    half, full = (run_ranks(mixed_precision, 1, precision, scalar)[0] for precision in ("bf16", "fp32"))
    assert half["outputs"].dtype == half["energies"].dtype == torch.float32
    close(f"bf16 outputs, scalar={scalar}", half["outputs"], full["outputs"], 0.5)
    close(f"bf16 energies, scalar={scalar}", half["energies"], full["energies"], 0.05)
    close(f"bf16 parameters after an update, scalar={scalar}", half["after"], full["after"], 0.05)
    assert half["report"]["grad_norm"] == pytest.approx(full["report"]["grad_norm"], rel=0.05)
    for name, dtype in half["dtypes"].items():
        assert dtype == (torch.float32 if name.startswith("head.") else torch.bfloat16), name
