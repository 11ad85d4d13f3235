"""The job that answers an actor's prompts with the SFT model, and writes the answers' energies into its cache."""

from contextlib import ExitStack

import torch.distributed as dist

from nemo_eppo.config import ConfigError, RunStopped
from nemo_eppo.data.datasets import GlobalBatches, PromptDataset
from nemo_eppo.generation.build import check_engine
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.observability.progress import Progress
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig
from nemo_eppo.training.energy_cache import energy_cache
from nemo_eppo.training.policy import build_policy
from nemo_eppo.training.setup import build, plan
from nemo_eppo.training.stopping import StopWatch


def read_reference_energies(config: ReferenceEnergiesConfig, run: Run) -> None:
    """Answer all prompts that the cache does not know yet, in the order in which the actor meets them.

    Raises:
        ConfigError: a file or a setting does not fit.
        RunStopped: the job was told to end; what it has answered is in the cache.
    """
    data, planned = config.data, plan(config.model, head="lm")
    config.check_model(planned.model, runtime.world_size())
    check_engine(config.engine, planned.model, config.model.parallel, config.generation)
    prompts = PromptDataset(
        data.train, planned.tokenizer, max_prompt_length=data.max_prompt_length, too_long=data.too_long
    )
    cache = energy_cache(planned, config, run.directory)
    if cache is None:
        raise ConfigError("model.restore_from_path = null: nothing identifies fresh weights, expected the SFT model's")
    order = next(GlobalBatches(len(prompts), len(prompts), seed=config.seed, digest=prompts.digest))
    steps = range(0, len(order), config.batch_size)
    with ExitStack() as stack:
        runtime.initialize(config.model.parallel, config.seed)
        runner = build(planned, "lm", probe=config.energy)
        policy = build_policy(planned, config, runner, AdaptersOff(runner.chunks), cache, run.directory)
        stack.callback(policy.engine.close)
        watch = stack.enter_context(StopWatch(run))
        progress = stack.enter_context(Progress("batch", len(steps), {}, disable=dist.get_rank() != 0))
        for step, first in enumerate(steps, start=1):
            batch = [prompts[index].token_ids.tolist() for index in order[first : first + config.batch_size]]
            if unanswered := policy.unanswered(batch):
                policy.answer(unanswered, planned.tokenizer.pad_id)
            progress.update(step, {})
            if step < len(steps) and (stop := watch.due()):
                run.logger.info("%s: ending. The same command answers the other prompts.", stop)
                raise RunStopped
    run.logger.info("all %d prompts are answered; their energies are in %s", len(prompts), cache.directory)
    runtime.shutdown()
