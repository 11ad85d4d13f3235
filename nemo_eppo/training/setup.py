"""From settings to a model on all ranks: `plan` checks before anything expensive starts, `build` builds."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.megatron import checkpoint, device, lora, runtime
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.weights import load_tensors
from nemo_eppo.models import checkpoint_files
from nemo_eppo.models.hf_directory import HfDirectory
from nemo_eppo.models.layout import check_layout
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import Head, ModelConfig, ModelSetup
from nemo_eppo.settings.training import OptimizerConfig

logger = logging.getLogger(__name__)
_SLOW_PRECISION = {
    "fp32": "model.precision = fp32 on a GPU: bf16 computes an order of magnitude faster there",
    "bf16": "model.precision = bf16 on a CPU: fp32 is faster there; if this machine has GPUs, torch finds none of them",
}


@dataclass(frozen=True)
class Plan:
    """A model whose files, tokenizer and layout have been checked, but which is not built yet."""

    setup: ModelSetup
    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_path: Path
    source: Path | HfDirectory | None
    """Checkpoint directory or Hugging Face directory; None for fresh weights."""
    manifest: checkpoint_files.Manifest | None

    def identity(self) -> str | None:
        """Name the model that is started from, as `checkpoint_files.model_identity` does; None for fresh weights."""
        source = self.source.path if isinstance(self.source, HfDirectory) else self.source
        return None if source is None else checkpoint_files.model_identity(source)

    def check_fits(self, where: str, tokenizer: Tokenizer, of: str, longest: int = 0) -> None:
        """Raise ConfigError if this model cannot read the sequences of another one.

        Args:
            where: the option or config key that names this model, for messages.
            tokenizer: tokenizer of the sequences.
            of: names the other model.
            longest: tokens of the longest prompt and response together.
        """
        path, window = self.setup.restore_from_path, self.model.max_sequence_length
        if difference := unlike(self.tokenizer, tokenizer, of):
            raise ConfigError(f"{where}: {path} has another tokenizer than {of}: {difference}")
        if window < longest:
            raise ConfigError(
                f"{where}: {path} has a window of {window} tokens; expected at least {longest}, the longest prompt and "
                "response together"
            )


def unlike(tokenizer: Tokenizer, other: Tokenizer, of: str) -> str:
    """Say how a tokenizer differs from the `other`, that of the model `of`; "" if their token ids mean the same."""
    sizes = (("vocabulary of", tokenizer.vocab_size, other.vocab_size), ("EOS", tokenizer.eos_id, other.eos_id))
    differences = [f"{what} {ours!r}, {of} has {theirs!r}" for what, ours, theirs in sizes if ours != theirs]
    if not differences and tokenizer.digest != other.digest:
        differences = [f"other tokens than {of}'s under the same numbers"]
    return "; ".join(differences)


def plan(setup: ModelSetup, where: str = "model", head: Head | None = None, ranks: int | None = None) -> Plan:
    """Read and check everything the model needs, without building it.

    Args:
        where: the config key of `setup`, or the option that names its model, for error messages.
        head: the head that the checkpoint must have; None for any.
        ranks: number of ranks that the layout is for; None for those of this job.

    Raises:
        ConfigError: checkpoint or tokenizer is missing, damaged or wrong, the vocabulary does not fit, the tokenizer
            is not the model's own, or the model or the number of ranks does not allow the layout.
    """
    source = own_tokenizer = manifest = None
    model = setup.architecture
    if setup.restore_from_path is not None:
        source, own_tokenizer, manifest = _read_source(setup.restore_from_path, where, head)
        model = manifest.model
    assert model is not None
    tokenizer_path = setup.tokenizer or own_tokenizer
    assert tokenizer_path is not None
    tokenizer = Tokenizer.from_directory(tokenizer_path)
    if own_tokenizer is not None and setup.tokenizer is not None and not setup.allow_other_tokenizer:
        _check_same_tokenizer(tokenizer, tokenizer_path, own_tokenizer, where)
    if not model.vocab_size:
        model = model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer {tokenizer_path} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        )
    check_layout(model, setup.parallel, f"{where}.architecture")
    setup.parallel.data_parallel_size(ranks or runtime.world_size())
    return Plan(setup, model, tokenizer, tokenizer_path, source, manifest)


def _read_source(
    path: Path, where: str, head: Head | None
) -> tuple[Path | HfDirectory, Path, checkpoint_files.Manifest]:
    """Find and check the model at `path`; return it, the directory of its tokenizer, and its manifest; see `plan`."""
    if HfDirectory.at(path):
        directory = HfDirectory(path)
        if head not in (None, directory.head):
            raise ConfigError(f"{where}: {path} holds a {directory.architecture}, expected head '{head}'")
        return directory, path, directory.manifest()
    key = where if where.startswith("--") else f"{where}.restore_from_path"
    source = checkpoint_files.find(path, key)
    try:
        return source, source / checkpoint_files.TOKENIZER, checkpoint_files.read_manifest(source, head)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_same_tokenizer(tokenizer: Tokenizer, path: Path, own: Path, where: str) -> None:
    if not any(own.glob("tokenizer*")):  # a model that comes without one
        return
    try:
        if Tokenizer.from_directory(own).digest == tokenizer.digest:
            return
        difference = "which has another vocabulary or other special tokens"
    except ConfigError as error:
        difference = str(error)
    raise ConfigError(
        f"{where}.tokenizer = {path}: expected the tokenizer that comes with the model, {own} ({difference}); null "
        f"takes that one, {where}.allow_other_tokenizer = true forces this one"
    )


def build(
    plan: Plan,
    head: Head,
    *,
    latent_size: int = 0,
    dropout: float = 0.0,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 1,
    probe: EnergyProbeConfig | None = None,
    resume: Path | None = None,
) -> ModelRunner:
    """Build the planned model on every rank, load its weights, and prepare it for training if there is an optimizer.

    Args:
        head: head of the model; its weights are fresh if the checkpoint has another head.
        latent_size: size d of the latents of the head "inform".
        dropout: probability of dropout in the residual stream during training.
        total_steps: updates over which the learning rate decays.
        probe: which energies the model can read; None for none.
        resume: a checkpoint of this run; weights, optimizer state and schedule are loaded from it instead.

    Raises:
        ConfigError: model.lora is set without an optimizer, or is another than `resume` was saved with.
    """
    setup = plan.setup
    if setup.lora is not None and optimizer is None:
        raise ConfigError("model.lora is for models that are trained; adapters of a checkpoint are merged on load")
    if optimizer is not None and (setup.precision == "fp32") == device.on_gpu():
        logger.warning(_SLOW_PRECISION[setup.precision])
    gc.collect()  # reference cycles hold an earlier model and its optimizer, which would stay beside the new one
    chunks: list[Any] = build_model(
        plan.model,
        setup.parallel,
        head=head,
        precision=setup.precision,
        recompute=setup.recompute,
        latent_size=latent_size,
        dropout=dropout,
    )
    fresh_head = head != "lm" and plan.manifest is not None and plan.manifest.head != head
    if isinstance(plan.source, HfDirectory) and resume is None:
        load_tensors(chunks, plan.model, plan.source.tensor, fresh_head=fresh_head)
    elif isinstance(plan.source, Path) and resume is None:
        checkpoint.verify(plan.source)
        checkpoint.load(plan.source, ModelRunner(chunks, setup.micro_batch_size), fresh_head=fresh_head)
    if setup.lora is not None:
        lora.train_adapters(chunks, setup.lora)
    megatron_optimizer = scheduler = None
    if optimizer is not None:
        if resume is not None and optimizer.distributed is None:
            optimizer = optimizer.model_copy(update={"distributed": checkpoint.is_sharded(resume)})
        chunks = wrap_data_parallel(chunks, optimizer, setup.precision)
        megatron_optimizer, scheduler = build_optimizer(chunks, optimizer, setup.precision, total_steps)
    runner = ModelRunner(
        chunks,
        setup.micro_batch_size,
        micro_batch_tokens=setup.micro_batch_tokens,
        optimizer=megatron_optimizer,
        scheduler=scheduler,
        probe=EnergyProbe(probe, chunks, plan.model.num_layers) if probe is not None else None,
    )
    if resume is not None:
        checkpoint.load(resume, runner, optimizer=True)
    return runner
