"""`nemo-eppo convert`: converts Hugging Face directories and .nemo files to Megatron checkpoints, and these to Hugging
Face directories.

Creating a conversion object checks everything; `run` converts. The weights are streamed in one process, so a model of
any size needs the memory of one of its files and one decoder layer.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.files import directory_made_whole
from nemo_eppo.megatron.checkpoint_weights import read_weights, write_weights
from nemo_eppo.models import checkpoint_files
from nemo_eppo.models.families import family_of_architecture
from nemo_eppo.models.hf_config import causal_architecture, hf_config
from nemo_eppo.models.hf_directory import REWARD_KEY, HfDirectory, RewardStatistics, write_hf_directory
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.models.numerics import DTYPES
from nemo_eppo.settings.model import ModelConfig, Precision
from nemo_eppo.tools.nemo_model import NemoModel, unpack

FilePrecision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {**DTYPES, "fp16": torch.float16}


class HfToMegatron:
    """Converts a language or reward model of a Hugging Face directory to a checkpoint that loads under any layout.

    Args:
        output: the directory to write, which must not exist.
        precision: the precision of the checkpoint; None: the narrowest that holds every tensor exactly.

    Raises:
        ConfigError: as HfDirectory; also if the tokenizer has more tokens than the model.
    """

    def __init__(self, source: Path, output: Path, precision: Precision | None = None) -> None:
        _require_absent(output)
        self.source, self.output = HfDirectory(source), output
        self.precision: Precision = precision or self.source.precision
        _check_vocabulary(source, self.source.model)

    def run(self) -> None:
        """Convert."""
        with directory_made_whole(self.output) as incomplete:
            _write_weights(incomplete, self.source, self.precision)
            checkpoint_files.seal(incomplete, self.source.manifest(), self.source.path)


class NemoToMegatron:
    """Converts a model of NeMo 1.x or NeMo-Aligner to a checkpoint that loads under any layout.

    Args:
        source: a .nemo file, or the directory it unpacks to. A file is unpacked beside the output while it is read.
        tokenizer: a Hugging Face directory with the model's tokenizer.
        output: the directory to write, which must not exist.
        precision: the precision of the checkpoint; None: the narrowest that holds every array exactly.

    Raises:
        ConfigError: as NemoModel; also if the tokenizer has more tokens than the model.
    """

    def __init__(self, source: Path, tokenizer: Path, output: Path, precision: Precision | None = None) -> None:
        _require_absent(output)
        self.source, self.tokenizer, self.output = source, tokenizer, output
        with TemporaryDirectory() as scratch:
            model = NemoModel(unpack(source, Path(scratch) / "nemo", descriptions_only=True), source)
        self.precision: Precision = precision or model.precision
        _check_vocabulary(tokenizer, model.model)

    def run(self) -> None:
        """Convert."""
        with directory_made_whole(self.output) as incomplete:
            unpacked = incomplete / "nemo"
            model = NemoModel(unpack(self.source, unpacked), self.source)
            _write_weights(incomplete, model, self.precision)
            shutil.rmtree(unpacked, ignore_errors=True)
            checkpoint_files.seal(incomplete, model.manifest(), self.tokenizer)


class MegatronToHf:
    """Converts a checkpoint's model, with its adapters merged, to a Hugging Face directory.

    A reward model becomes a sequence-classification model with one output, which has no bias in transformers: the bias
    goes into the mean of the statistics in config.json, so that standardised scores are the same.

    Args:
        source: a checkpoint, or a directory of checkpoints `step_*`, of which the newest is taken.
        output: the directory to write, which must not exist.
        architecture: name of the Hugging Face architecture; None for that of the model's family.
        precision: the precision of the files; None for that of the checkpoint. Scalar heads stay fp32.
        max_shard_bytes: the largest size of a file, each of which is held in memory in turn.

    Raises:
        ConfigError: there is no such checkpoint, its head has no Hugging Face counterpart, it has no statistics of
            scores or does not score the last token, or the architecture lacks a feature of the model.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        architecture: str | None = None,
        precision: FilePrecision | None = None,
        max_shard_bytes: int = 4 * 2**30,
    ) -> None:
        _require_absent(output)
        self.source, self.output = checkpoint_files.find(source, "--input"), output
        self.manifest = checkpoint_files.read_manifest(self.source)
        if self.manifest.head not in ("lm", "scalar"):
            raise ConfigError(f"{self.source} has a head of kind {self.manifest.head}, which Hugging Face lacks")
        self.stored = checkpoint_files.stored_precision(self.source)
        self.precision: FilePrecision = precision or self.stored
        self.max_shard_bytes = max_shard_bytes
        self.model = self.manifest.model
        suffix = "ForCausalLM" if self.manifest.head == "lm" else "ForSequenceClassification"
        self.architecture = architecture or causal_architecture(self.model).replace("ForCausalLM", suffix)
        if not self.architecture.endswith(suffix):
            raise ConfigError(f"architecture {self.architecture!r}: expected one that ends with {suffix}")
        self.config = hf_config(self.model, self.architecture) | _token_ids(self.source / checkpoint_files.TOKENIZER)
        self.model = self.model.model_copy(update={"family": family_of_architecture(self.architecture).name})
        self.config["torch_dtype"] = str(_DTYPES[self.precision]).removeprefix("torch.")
        if self.manifest.head == "scalar":
            state = self.manifest.state
            if "mean" not in state or "std" not in state:
                raise ConfigError(
                    f"{self.source} has no mean, std: it is a critic, or a sequence classifier without {REWARD_KEY} in "
                    "its config.json"
                )
            if state["score"] != "last":
                raise ConfigError(
                    f"{self.source} scores the {state['score']} over tokens; sequence-classification models score the "
                    "last token"
                )
            self.config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}

    def run(self) -> None:
        """Convert; ConfigError if a file of the checkpoint has changed since it was written."""
        checkpoint_files.verify(self.source)
        outputs = None if self.manifest.head == "lm" else 1
        lora = self.manifest.lora
        factor = lora.alpha / lora.rank if lora else None
        tensors = read_weights(self.source / checkpoint_files.WEIGHTS, self.model, outputs, factor)
        bar = tqdm(tensors, total=len(hf_names(self.model)), unit="tensor", disable=None)
        tokenizer = self.source / checkpoint_files.TOKENIZER
        write_hf_directory(self.output, self.config, self._stored_tensors(bar), tokenizer, self.max_shard_bytes)

    def _stored_tensors(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors in the files' precision; a reward head's bias goes into `config` instead."""
        for name, tensor in tensors:
            if name == "score.bias":
                state = self.manifest.state
                statistics = RewardStatistics(mean=state["mean"] - float(tensor), std=state["std"])
                self.config[REWARD_KEY] = statistics.model_dump()
                continue
            stored = tensor if name == "score.weight" else tensor.to(_DTYPES[self.precision])
            if not stored.isfinite().all():
                raise ConfigError(f"{name} is not finite in {self.precision}: largest |value| {tensor.abs().max():.3g}")
            yield name, stored


def _write_weights(incomplete: Path, source: HfDirectory | NemoModel, precision: Precision) -> None:
    weights = incomplete / checkpoint_files.WEIGHTS
    weights.mkdir()
    with tqdm(total=len(hf_names(source.model)), unit="tensor", disable=None) as bar:

        def tensor(name: str) -> Tensor:
            bar.update()
            return source.tensor(name)

        write_weights(weights, source.model, None if source.head == "lm" else 1, DTYPES[precision], tensor)


def _check_vocabulary(tokenizer: Path, model: ModelConfig) -> None:
    size = Tokenizer.from_directory(tokenizer).vocab_size
    if size > model.vocab_size:
        raise ConfigError(f"{tokenizer}: the tokenizer has {size} tokens, the model {model.vocab_size}")


def _require_absent(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"--output: {output} already exists; choose another or remove it")


def _token_ids(tokenizer_path: Path) -> dict[str, int | None]:
    tokenizer = Tokenizer.from_directory(tokenizer_path)
    # transformers takes the score at the token before the first pad token: with EOS as pad token, that is the last but
    # one; without a pad token it raises an error instead
    pad = None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
