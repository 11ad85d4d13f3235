"""The work that an estimate counts, against what torch and the process groups are really asked to do."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tiny import PP2, SP2, TP2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_eppo.launch.work import Shape, Work, update
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.settings.model import ModelConfig, ParallelConfig
from nemo_eppo.settings.training import OptimizerConfig

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=96,
    max_sequence_length=64,
)
ROWS, LENGTH, TARGETS = 4, 16, 10


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(MODEL.vocab_size, (ROWS, LENGTH))
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :TARGETS] = tokens[:, :TARGETS]
    return {"tokens": tokens, "lengths": torch.full((ROWS,), LENGTH), "targets": targets}


def loss(output: torch.Tensor, _: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -output[..., 0].sum() / 1000, {}


def built(layout: dict[str, Any], recompute: bool = False) -> ModelRunner:
    parallel = ParallelConfig(**layout)
    runtime.initialize(parallel, 1)
    chunks = wrap_data_parallel(
        build_model(MODEL, parallel, head="lm", recompute=recompute), OptimizerConfig(lr=1e-6), "fp32"
    )
    optimizer, scheduler = build_optimizer(chunks, OptimizerConfig(lr=1e-6), "fp32", 10)
    return ModelRunner(chunks, ROWS, optimizer=optimizer, scheduler=scheduler)


def counted(recompute: bool) -> list[tuple[int, int]]:
    """FLOPs of products with weights, and of attention, in a forward pass and in an update."""
    runner, found = built({}, recompute), []
    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted, all S * S of them
        for work in (partial(runner.infer, *batch().values(), outputs=2), partial(runner.train_step, batch(), loss)):
            with FlopCounterMode(display=False) as counter:
                work()
            by_kind = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
            found.append((by_kind.pop("aten.mm", 0) + by_kind.pop("aten.addmm", 0), sum(by_kind.values())))
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_torch_counts(recompute: bool) -> None:
    ((products, attention), (updating, attending)) = run_ranks(counted, 1, recompute)[0]
    shape = Shape(MODEL, ParallelConfig(), "fp32", language=True, recompute=recompute)
    forward, backward = (work(ROWS, LENGTH, TARGETS) for work in (shape.forward, shape.backward))
    assert products == forward.products
    assert updating == forward.products + backward.products
    # torch's plain attention computes the hidden half, too, and its backward pass has 4 products for 2
    seen = (LENGTH + 1) / (2 * LENGTH)
    assert attention * seen == forward.attention
    assert attending == (4 if recompute else 3) * attention
    assert backward.attention == (3.5 if recompute else 2.5) * forward.attention


def test_a_window_hides_what_lies_before_it() -> None:
    windowed = MODEL.model_copy(update={"sliding_window": 3, "global_layers": (1,)})
    shape = Shape(windowed, ParallelConfig(), "fp32", language=True)
    seen = torch.ones(LENGTH, LENGTH).tril()
    assert shape.pairs(LENGTH) == (seen.sum() + seen.triu(-2).sum()) / 2
    assert shape.pairs(2) == 3


def test_a_decoding_step_is_a_forward_pass_of_one_token() -> None:
    shape = Shape(MODEL, ParallelConfig(), "fp32", language=True)
    step, forward = shape.decode(ROWS, 1), shape.forward(ROWS, 1, 1)
    assert (step.products, step.attention) == (forward.products, forward.attention)
    more = shape.decode(ROWS, 11)
    keys_and_values = 2 * 2 * 8 * 4  # of 2 groups of 8 channels, 4 bytes each
    assert more.memory - step.memory == 10 * ROWS * MODEL.num_layers * keys_and_values


def sent(layout: dict[str, Any]) -> list[dict[str, int]]:
    """Bytes that this rank gives to collectives of its groups, in a forward pass and in an update."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, mappings

    runner, found = built(layout), []
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "replica": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "stage": parallel_state.get_pipeline_model_parallel_group(),
    }
    bytes_of: Counter[str] = Counter()

    def watch(owner: Any, name: str, size_of: Any) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            for kind, group in groups.items():
                if group.size() > 1 and (kwargs.get("group") is group or any(arg is group for arg in args)):
                    bytes_of[kind] += size_of(*args)
            return call(*args, **kwargs)

        setattr(owner, name, watched)

    # a ring of two ranks: each sends half of what is scattered or gathered, twice for a sum
    watch(dist, "all_reduce", lambda tensor, *_: tensor.nbytes)
    for module in (mappings, layers):  # they hold names of their own
        watch(module, "dist_all_gather_func", lambda output, *_: output.nbytes // 2)
        watch(module, "dist_reduce_scatter_func", lambda _, whole, *__: whole.nbytes // 2)
    for operation in (partial(runner.infer, *batch().values(), outputs=2), partial(runner.train_step, batch(), loss)):
        bytes_of.clear()
        operation()
        found.append(dict(bytes_of))
    return found


@pytest.mark.parametrize("layout", [TP2, SP2])
def test_sums_over_tensor_ranks_have_the_bytes_of_the_real_ones(layout: dict[str, Any]) -> None:
    forward, training = run_ranks(sent, 2, layout)[0]
    shape = Shape(MODEL, ParallelConfig(**layout), "fp32", language=True)
    passes = [work(ROWS, LENGTH, TARGETS).tensor_bytes for work in (shape.forward, shape.backward)]
    hidden = ROWS * LENGTH * MODEL.hidden_size * 4
    assert passes == [4 * hidden, 4 * hidden]
    # beside the layers: the embedding's sum, log-probs of few numbers; sequence parallelism gathers inputs once more
    assert passes[0] <= forward["tensor"] <= passes[0] + 2 * hidden
    assert sum(passes) <= training["tensor"] <= sum(passes) + 5 * hidden


def test_gradients_of_replicas_have_the_bytes_of_the_real_sum() -> None:
    _, training = run_ranks(sent, 2, {})[0]
    layer = 32 * (2 * 32 + 2 * 16 + 3 * 48) + 2 * 32
    parameters = 2 * layer + 2 * 96 * 32 + 32
    expected = update(parameters, 2, 2, distributed=False, number_bytes=4).replica_bytes
    assert expected == 4 * parameters
    assert expected <= training["replica"] <= 1.05 * expected


def test_stages_send_hidden_states_once() -> None:
    shape = Shape(MODEL, ParallelConfig(**PP2), "fp32", language=True)
    assert shape.forward(ROWS, LENGTH, TARGETS, last=False).stage_bytes == ROWS * LENGTH * 32 * 4
    assert (shape.layers, shape.forward(ROWS, LENGTH, TARGETS).layer) == (1, 1)


def test_a_distributed_optimizer_updates_a_share_and_gathers_weights() -> None:
    whole, shared = (update(100, 1, 4, distributed=distributed, number_bytes=2) for distributed in (False, True))
    assert (whole.memory, shared.memory) == (100 * 44, 100 * 16 + 25 * 28)
    assert (whole.replica_bytes, shared.replica_bytes) == (0.75 * 800, 0.75 * (400 + 200))


def test_work_adds_up_and_scales() -> None:
    assert Work(products=1, layer=2) + Work(products=3) * 2 == Work(products=7, layer=2)
