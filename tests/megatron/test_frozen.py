"""The frozen reference takes turns with the live weights without disturbing them."""

import torch
from distributed import run_ranks

from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.settings.model import ModelConfig, ParallelConfig
from nemo_eppo.settings.training import OptimizerConfig

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, vocab_size=20, max_sequence_length=16
)


def _take_turns() -> None:
    runtime.initialize(ParallelConfig(), 1)
    settings = OptimizerConfig(lr=1e-2)
    chunks = wrap_data_parallel(build_model(MODEL, ParallelConfig(), head="lm"), settings, "fp32")
    optimizer, scheduler = build_optimizer(chunks, settings, "fp32", 10)
    runner = ModelRunner(chunks, 2, optimizer=optimizer, scheduler=scheduler)
    tokens = torch.randint(0, 20, (4, 12))
    rows = {"tokens": tokens, "lengths": torch.full((4,), 12), "targets": tokens.roll(-1, 1)}

    def logprobs() -> torch.Tensor:
        return runner.infer(rows["tokens"], rows["lengths"], rows["targets"], outputs=2)[0]

    def update() -> None:
        runner.train_step(rows, lambda output, _: (-output[..., 0].mean(), {}))

    before = logprobs()
    frozen = FrozenWeights(chunks)
    places = [tensor.data_ptr() for tensor in (*frozen._parameters, *frozen._aside)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in frozen._aside}) == 1, "a GPU locks memory by blocks"
    update()
    after = logprobs()
    assert not torch.equal(before, after)
    for _ in range(2):
        with frozen.active():
            assert torch.equal(logprobs(), before)
            # to pin new memory at every turn would be slow, and others look at the parameters' own
            assert [tensor.data_ptr() for tensor in (*frozen._parameters, *frozen._aside)] == places
        assert torch.equal(logprobs(), after)
    update()  # the optimizer still owns the live weights
    assert not torch.equal(logprobs(), after)
    with frozen.active():
        assert torch.equal(logprobs(), before)


def test_the_reference_stays_as_it_was_and_the_policy_goes_on() -> None:
    run_ranks(_take_turns, 1)
