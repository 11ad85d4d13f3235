"""Adapters trained on a Hugging Face model, exported: transformers computes what the policy with adapters did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hf_models import batch, random_model, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import checkpoint, lora
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.model import LoRAConfig, ModelSetup, ParallelConfig
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.tools.convert import MegatronToHf
from nemo_eppo.training.setup import build, plan

TP2 = ParallelConfig(tensor_model_parallel_size=2)
FAMILIES = ("Qwen2", "Gemma2", "Phi3")  # Qwen2 is Llama with biases and tied embeddings
ADAPTERS = {"lora": LoRAConfig(rank=4, alpha=8.0)}
OPTIMIZER = OptimizerConfig(lr=0.05)


def rows() -> Rows:
    tokens, lengths = batch()
    targets = tokens.roll(-1, 1)
    targets[torch.arange(10) >= lengths[:, None] - 1] = IGNORE
    return {"tokens": tokens, "lengths": lengths, "targets": targets}


def logprobs(runner: ModelRunner) -> Tensor:
    return runner.infer(*rows().values(), outputs=2)[0][..., 0]


def exported(runner: ModelRunner, setup: ModelSetup) -> dict[str, Tensor]:
    return dict(export_tensors(runner.chunks, plan(setup).model))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def train_and_convert(source: Path, root: Path) -> dict[str, Any]:
    """Adapters trained on a Hugging Face directory, and everything that can then be done with their checkpoint."""
    initialize(TP2, seed=1)

    def job(source: Path, **settings: Any) -> tuple[ModelRunner, ModelSetup]:
        setup = ModelSetup(restore_from_path=source, parallel=TP2, **settings)
        return build(plan(setup), "lm", optimizer=OPTIMIZER if "lora" in settings else None), setup

    runner, setup = job(source, **ADAPTERS)
    result: dict[str, Any] = {"fresh": torch.equal(logprobs(runner), logprobs(job(source)[0]))}
    before = logprobs(runner)
    for _ in range(2):
        runner.train_step(rows(), lambda output, _: (-output[..., 0].sum() / 40, {}))
    trained = logprobs(runner)
    result["moved"] = float((trained - before).abs().max())
    manifest = checkpoint_files.Manifest(head="lm", step=2, model=plan(setup).model, optimizer=True)
    checkpoint.save(root / "lora", runner, manifest, source)

    read, _ = job(root / "lora")
    merged = exported(read, setup)
    result["read without model.lora"] = same(merged, exported(runner, setup))
    again, _ = job(root / "lora", lora=LoRAConfig(rank=2))
    result["fresh adapters on merged ones"] = torch.equal(logprobs(again), logprobs(read))
    again.train_step(rows(), lambda output, _: (-output[..., 0].sum() / 40, {}))
    with AdaptersOff(again.chunks).active():
        result["whose base stays"] = same(exported(again, setup), merged)
    result["and which are other adapters"] = lora.attached(again.chunks) == LoRAConfig(rank=2)
    return result | {"logprobs": trained}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_adapters_do(family: str, tmp_path: Path) -> None:
    source = save(random_model(family), tmp_path / "source")
    for result in run_ranks(train_and_convert, 2, source, tmp_path):
        trained, moved = result.pop("logprobs"), result.pop("moved")
        assert moved > 0.1
        assert all(result.values()), result
    MegatronToHf(tmp_path / "lora", tmp_path / "hf").run()
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokens, lengths, targets = rows().values()
    for row, length, wanted, ours in zip(tokens, lengths.tolist(), targets, trained, strict=True):
        with torch.no_grad():
            scores = network(row[None, :length]).logits[0].log_softmax(-1)
        expected = scores[torch.arange(length - 1), wanted[: length - 1]]
        torch.testing.assert_close(ours[: length - 1], expected, rtol=0, atol=1e-5)


def test_adapters_where_they_make_no_sense(tmp_path: Path) -> None:
    source = save(random_model("Llama"), tmp_path / "source")
    served = plan(ModelSetup(restore_from_path=source, lora=LoRAConfig()))
    with pytest.raises(ConfigError, match=r"model\.lora is for models that are trained"):
        build(served, "lm")
    with pytest.raises(ValueError, match="needs restore_from_path, not a fresh architecture"):
        ModelSetup(architecture=served.model, tokenizer=source, lora=LoRAConfig())
