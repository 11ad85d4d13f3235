"""Building a planned model."""

import gc
import weakref

from distributed import run_ranks
from jobs import Models

from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.optimizer import OptimizerConfig
from nemo_eppo.training.setup import ModelSetup, build, plan


def left_of_the_first_of_two_models(models: Models) -> list[bool]:
    """Whether weights, gradients and optimizer of a model that was let go of outlive the building of the next."""
    planned = plan(ModelSetup(restore_from_path=models.sft))
    runtime.initialize(planned.setup.parallel, 1)
    gc.disable()  # it would come too late or not at all: a device's memory is not what Python counts
    runner = build(planned, "lm", optimizer=OptimizerConfig(lr=1e-6))
    held = (*runner.chunks[0].parameters(), runner.chunks[0].buffers[0].grad_data, runner.optimizer)
    watched = [weakref.ref(thing) for thing in held]
    del runner, held
    build(planned, "lm", optimizer=OptimizerConfig(lr=1e-6))
    return [reference() is not None for reference in watched]


def test_a_model_that_is_let_go_of_leaves_its_memory_to_the_next(models: Models) -> None:
    [left] = run_ranks(left_of_the_first_of_two_models, 1, models)
    assert not any(left)
