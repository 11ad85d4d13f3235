"""How the runner deals rows, what it refuses, and how models start."""

from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import MODEL, PP2, SP2, TP2, VPP2, Layout, build_runner, inputs, random_batch
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.model import build_model, unwrap
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.settings.energy import EnergyProbeConfig, Preset
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.settings.training import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.1)


def first_rows(count: int) -> Rows:
    return {name: value[:count] for name, value in random_batch().items()}


def infer_few(layout: Layout, counts: list[int]) -> list[Tensor]:
    runner = build_runner(layout, micro_batch_size=1, probe=EnergyProbeConfig())
    results = []
    for count in counts:
        rows = first_rows(count)
        scores, energies = runner.infer(rows["tokens"], rows["lengths"], rows["targets"], outputs=2, energies=True)
        assert energies is not None
        results.append(torch.cat([scores, energies], -1))
    return results


@pytest.mark.parametrize(("layout", "ranks"), [(VPP2, 2), ({}, 2)], ids=["PP2+VPP2", "DP2"])
def test_any_number_of_rows_can_be_inferred(layout: Layout, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [1, 2, 3, 5]
    everything = run_ranks(infer_few, 1, {}, [6])[0][0]
    monkeypatch.setattr(device, "tokens_multiple", lambda: 8)
    for results in run_ranks(infer_few, ranks, layout, counts):
        for count, result in zip(counts, results, strict=True):
            assert torch.allclose(result, everything[:count], atol=1e-6)


def at_last_token(output: Tensor, rows: Rows) -> Tensor:
    return output[torch.arange(len(output)), rows["lengths"] - 1 - rows["back"]]


def sum_of_row(output: Tensor, rows: Rows) -> Tensor:
    return output.sum(1)


def infer_and_count(
    layout: Layout, micro_batches: dict[str, int]
) -> tuple[list[Tensor], list[Tensor], list[int], list[tuple[int, ...]]]:
    """What two reducers give and what they would give of `infer`; numbers sent over each collective of the runner;
    shapes of the model's inputs."""
    runner, shapes = build_runner(layout, **micro_batches), []  # type: ignore[arg-type]
    for chunk in runner.chunks:
        chunk.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    rows = random_batch() | {"back": torch.tensor([1, 2, 3, 1, 2, 3])}
    everything, _ = runner.infer(rows["tokens"], rows["lengths"], rows["targets"], outputs=2)
    sent, broadcast, all_reduce = [], torch.distributed.broadcast, torch.distributed.all_reduce

    def count(collective: Any) -> Any:
        def counted(tensor: Tensor, *args: Any, group: Any = None, **rest: Any) -> Any:
            if group in (runner._stages, runner._replicas):
                sent.append(tensor.numel())
            return collective(tensor, *args, group=group, **rest)

        return counted

    torch.distributed.broadcast, torch.distributed.all_reduce = count(broadcast), count(all_reduce)
    try:
        reduced = [runner.infer_rows(rows, reduce, outputs=2) for reduce in (at_last_token, sum_of_row)]
    finally:
        torch.distributed.broadcast, torch.distributed.all_reduce = broadcast, all_reduce
    return reduced, [at_last_token(everything, rows), sum_of_row(everything, rows)], sent, shapes


@pytest.fixture(scope="module")
def reduced_alone() -> list[Tensor]:
    """What the reducers give on one rank whose rows are padded."""
    reduced: list[Tensor] = run_ranks(infer_and_count, 1, {}, {})[0][0]
    return reduced


PADDED, PACKED = {"micro_batch_size": 5}, {"micro_batch_tokens": 20}


@pytest.mark.parametrize(
    ("layout", "ranks", "collectives", "micro_batches"),
    [
        pytest.param(TP2, 2, 0, PADDED, id="TP2"),
        pytest.param(PP2, 2, 1, PADDED, id="PP2"),
        pytest.param({}, 2, 1, PADDED, id="DP2"),
        pytest.param(VPP2, 2, 1, PADDED, id="PP2+VPP2"),
        pytest.param({}, 1, 0, PACKED, id="one, packed"),
        pytest.param(SP2, 2, 0, PACKED, id="TP2+SP, packed"),
        pytest.param(VPP2, 2, 1, PACKED, id="PP2+VPP2, packed"),
        pytest.param(PP2, 4, 2, PACKED, id="PP2+DP2, packed"),
    ],
)
def test_a_reduced_row_is_what_infer_gives_and_no_token_of_it_travels(
    layout: Layout,
    ranks: int,
    collectives: int,
    micro_batches: dict[str, int],
    reduced_alone: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the model's inputs have few shapes as on GPUs: packs have one, and in a pipeline, whose stages do not tell
    each other, padded rows too."""
    monkeypatch.setattr(device, "tokens_multiple", lambda: 8)
    p2p = "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator"
    monkeypatch.setattr(f"{p2p}._communicate_shapes", None)  # a stage that asks another for a shape fails
    monkeypatch.setattr(torch.cuda, "synchronize", None)  # or that waits for its GPU
    for reduced, expected, sent, shapes in run_ranks(infer_and_count, ranks, layout, micro_batches):
        assert all(tokens % 8 == 0 for _, tokens in shapes)
        assert len(set(shapes)) == 1 or (micro_batches is PADDED and "pipeline_model_parallel_size" not in layout)
        for got, same, alone in zip(reduced, expected, reduced_alone, strict=True):
            assert torch.equal(got, same)
            assert torch.allclose(got, alone, atol=1e-5)
            assert got.abs().min() > 0
        assert len(sent) == 2 * collectives
        # two numbers of each row, or of the rows and repetitions of a replica; every token would be 144 numbers
        assert max(sent, default=0) <= 2 * (6 + 2)


def test_a_cpu_computes_no_token_that_is_in_no_row() -> None:
    [(*_, shapes)] = run_ranks(infer_and_count, 1, {}, PACKED)
    assert sum(tokens for _, tokens in shapes) == 3 * int(random_batch()["lengths"].sum())  # infer and two reducers


def nothing(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    return output.sum() * 0, {}


def refusals(layout: Layout) -> list[str]:
    """What is said about: rows too few to train on; a token outside the vocabulary, in training and inference."""
    runner = build_runner(layout, micro_batch_size=1, optimizer=OPTIMIZER)
    strange = first_rows(6)
    strange["tokens"][3, 2] = MODEL.vocab_size  # a padding row of the embedding under TP2
    attempts: list[Any] = [
        lambda: runner.train_step(first_rows(1), nothing),
        lambda: runner.train_step(strange, nothing),
        lambda: runner.infer(strange["tokens"], strange["lengths"], strange["targets"], outputs=2),
        lambda: runner.infer(*inputs(), outputs=2, energies=True),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises((ValueError, RuntimeError)) as error:
            attempt()
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("layout", [VPP2, {}], ids=["PP2+VPP2", "DP2"])
def test_bad_input_is_refused_on_every_rank(layout: Layout) -> None:
    for few, training, inference, no_probe in run_ranks(refusals, 2, layout):
        assert "rows cannot fill the micro-batches" in few
        assert training == inference == "tokens: id 101; expected ids from 0 to 100"
        assert "has no energy probe" in no_probe


def grouped(layout: Layout) -> list[list[list[int]]]:
    """Rows of each micro-batch of one update in groups of two, all replicas together."""
    runner = build_runner(layout, micro_batch_size=2, optimizer=OPTIMIZER)
    rows, seen = first_rows(6) | {"index": torch.arange(6)}, []

    def record(output: Tensor, part: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(part["index"].tolist())
        return output.sum() * 0, {}

    runner.train_step(rows, record, group=2)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, seen)
    return gathered


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_of_rows_stay_together_and_are_trained_once(ranks: int) -> None:
    micro_batches = [batch for replica in run_ranks(grouped, ranks, {})[0] for batch in replica]
    assert sorted(row for batch in micro_batches for row in batch) == list(range(6))
    for batch in micro_batches:
        assert all(
            second == first + 1 and first % 2 == 0 for first, second in zip(batch[::2], batch[1::2], strict=True)
        )


def fresh_weights(layout: Layout) -> dict[str, Tensor]:
    model, parallel = MODEL.model_copy(update={"num_layers": 3}), ParallelConfig(**layout)
    initialize(parallel, seed=1)
    return dict(export_tensors(build_model(model, parallel, head="scalar"), model))


@pytest.mark.parametrize(("layout", "ranks"), [({"pipeline_model_parallel_size": 3}, 3), (TP2, 2)], ids=["PP3", "TP2"])
def test_no_two_layers_start_alike(layout: Layout, ranks: int) -> None:
    weights = run_ranks(fresh_weights, ranks, layout)[0]
    layers = [weights[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    halves = [half for layer in layers for half in layer.chunk(2)]
    assert len({float(half.sum()) for half in halves}) == 6


def probe_of_fused_norms(layout: Layout) -> list[str]:
    """Pretend that the norms are fused as TransformerEngine fuses them."""
    runner = build_runner(layout)
    for layer in unwrap(runner.chunks[0]).decoder.layers:
        layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
    said = []
    presets: tuple[Preset, ...] = ("paper", "mlp_linears_out", "down_proj", "mlp_block", "mlp_linears")
    for preset in presets:
        try:
            EnergyProbe(EnergyProbeConfig(preset=preset), runner.chunks, MODEL.num_layers)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_presets_that_fused_norms_hide_are_refused_on_every_rank() -> None:
    for said in run_ranks(probe_of_fused_norms, 2, PP2):
        assert said[:3] == ["", "", ""]
        assert all("use 'paper', 'mlp_linears_out' or 'down_proj'" in message for message in said[3:])


def test_layers_that_do_not_exist_are_refused() -> None:
    assert EnergyProbeConfig(layers=(-1, 0)).layer_indices(4) == [3, 0]
    with pytest.raises(ConfigError, match=r"energy\.layers: 4 is not a layer of a model with 4 layers"):
        EnergyProbeConfig(layers=(-1, 4)).layer_indices(4)
