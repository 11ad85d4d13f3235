"""A model that leaves its device and comes back is, to the bit, one that never left, and takes no memory meanwhile."""

from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import TP2, build_runner, random_batch

from nemo_eppo.megatron import device
from nemo_eppo.megatron.offload import Offload
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.settings.model import LoRAConfig, Precision
from nemo_eppo.settings.training import OptimizerConfig


class Holder:
    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner


def update(runner: ModelRunner) -> dict[str, float]:
    return runner.train_step(random_batch(), lambda output, _: (-output[..., 0].mean(), {}))


def logprobs(runner: ModelRunner) -> torch.Tensor:
    rows = random_batch()
    return runner.infer(rows["tokens"], rows["lengths"], rows["targets"], outputs=2)[0]


def held(runner: ModelRunner) -> list[torch.Tensor]:
    """Weights, gradients, the copies that are updated, and their moments."""
    [part] = runner.optimizer.chained_optimizers
    moments = [state[name] for state in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    main = [p for group in part.param_groups for p in group["params"]]
    [chunk] = runner.chunks
    return [*chunk.module.parameters(), *main, *moments, *(buffer.grad_data for buffer in chunk.buffers)]


def leave_and_return(offload: Offload, runner: ModelRunner) -> None:
    """The stand-in for a GPU: from the CPU's memory to other memory of the CPU."""
    places = [(tensor, tensor.untyped_storage(), tensor.untyped_storage().nbytes()) for tensor in held(runner)]
    offload.set_aside()
    assert sum(storage.nbytes() for _, storage, _ in places) == 0
    assert {host.untyped_storage().data_ptr() for _, host in offload._moved} == {offload._memory.data_ptr()}
    assert len(offload._memory) == sum(len(host) for _, host in offload._moved), "torch would round each up"
    others = [torch.full((size,), 255, dtype=torch.uint8) for _, _, size in places]  # take the memory that is now free
    offload.restore()
    assert all(tensor.untyped_storage()._cdata == storage._cdata for tensor, storage, _ in places)
    del others


def journeys(precision: Precision, lora: LoRAConfig | None, layout: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"precision": precision, "lora": lora, "optimizer": OptimizerConfig(lr=1e-2)}
    stays, leaves = (build_runner(layout, **settings) for _ in range(2))
    offload = Offload(Holder(leaves))
    for _ in range(3):  # before the first update, the optimizer has no moments
        leave_and_return(offload, leaves)
        assert torch.equal(logprobs(leaves), logprobs(stays))
        leave_and_return(offload, leaves)
        assert update(leaves) == update(stays)
        for tensor, expected in zip(held(leaves), held(stays), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("precision", "lora", "layout"),
    [("fp32", None, {}), ("bf16", None, TP2), ("fp32", LoRAConfig(rank=2, alpha=4), {})],
    ids=["fp32", "bf16_tp2", "lora"],
)
def test_nothing_changes_for_a_model_that_leaves_and_returns(
    precision: Precision, lora: LoRAConfig | None, layout: dict[str, Any]
) -> None:
    run_ranks(journeys, layout.get("tensor_model_parallel_size", 1), precision, lora, layout)


def frozen_journeys() -> None:
    runner = build_runner({})
    offload, expected = Offload(Holder(runner)), logprobs(runner)
    for _ in range(2):
        offload.set_aside()
        offload.restore()
        assert torch.equal(logprobs(runner), expected)
        for parameter in runner.chunks[0].parameters():
            parameter.data.zero_()  # comes back as it was: its first copy is not made anew


def test_a_model_that_nothing_trains_is_copied_to_the_host_once() -> None:
    run_ranks(frozen_journeys, 1)


def nested_turns() -> tuple[int, int, int]:
    runner = build_runner({}, optimizer=OptimizerConfig(lr=1e-2))
    offload, moves = Offload(Holder(runner)), [0]
    set_aside = offload.set_aside

    def counted() -> None:
        moves[0] += 1
        set_aside()

    device.on_gpu, device.device = (lambda: True), lambda: device.CPU
    device.synchronize, device.locked_memory = (lambda: None), lambda size, dtype: torch.empty(size, dtype=dtype)
    offload.set_aside = counted  # type: ignore[method-assign]
    with offload.turn():
        for _ in range(3):
            with offload.turn():
                held(runner)
        inside = sum(tensor.untyped_storage().nbytes() for tensor in held(runner))
    return moves[0], inside, sum(tensor.untyped_storage().nbytes() for tensor in held(runner))


def test_turns_within_a_turn_move_nothing() -> None:
    [(moves, inside, outside)] = run_ranks(nested_turns, 1)
    assert moves == 1
    assert inside > 0 == outside


def a_turn() -> tuple[int, int]:
    runner = build_runner({}, optimizer=OptimizerConfig(lr=1e-2))
    before = held(runner)[0].data_ptr()
    with Offload(Holder(runner)).turn():
        update(runner)
    return before, held(runner)[0].data_ptr()


def test_a_cpu_has_nowhere_to_move_a_model() -> None:
    [(before, after)] = run_ranks(a_turn, 1)
    assert before == after != 0
