"""Conversion in the memory of one file and one layer, and what is handed to Megatron-Bridge."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import random_model, same_tensors, save, tensors_of
from transformers import AutoModelForCausalLM, LlamaConfig

from nemo_eppo.models.hf_directory import write_hf_directory

_PEAK = """
import sys
from pathlib import Path
from nemo_eppo.megatron.checkpoint_weights import read_weights
from nemo_eppo.tools.convert import HfToMegatron, MegatronToHf

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

source, target, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
job = HfToMegatron(source, target) if way == "there" else MegatronToHf(source, target, max_shard_bytes=40 << 20)
if way == "back":
    next(read_weights(job.source / "weights", job.manifest.model, None))  # torch imports the most of itself
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, here
before = kilobytes("VmRSS")
job.run()
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
def test_a_model_needs_the_memory_of_one_file_and_one_layer(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=24,
        num_attention_heads=8,
        eos_token_id=0,
    )
    source = save(AutoModelForCausalLM.from_config(config), tmp_path / "hf", max_shard_size="40MB")
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    layer = total // 24
    for way, start, target in (("there", source, "megatron"), ("back", tmp_path / "megatron", "back")):
        command = [sys.executable, "-c", _PEAK, str(start), str(tmp_path / target), way]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout)
        print(f"{way}: {peak / 2**20:.0f} MiB for a model of {total / 2**20:.0f} MiB in files of 40 MB")
        assert peak < 2 * 40e6 + 3 * layer < total / 3  # twice a file: what is read of it, and what is written of it
    same_tensors(tmp_path / "back", source)


def held_while_writing(directory: Path, tokenizer: Path) -> int:
    """Most tensors alive at once while ten of 400 bytes go into files of at most 1000."""

    alive: Any = weakref.WeakSet()
    most = 0

    def tensors() -> Any:
        nonlocal most
        for index in range(10):
            tensor = torch.full((100,), float(index))
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{index}", tensor
            del tensor

    write_hf_directory(directory, {"eos_token_id": 0}, tensors(), tokenizer, max_shard_bytes=1000)
    return most


def test_at_most_one_file_and_one_tensor_are_held(tmp_path: Path) -> None:
    assert held_while_writing(tmp_path / "out", save(random_model("Llama"), tmp_path / "llama")) == 3
    assert len(tensors_of(tmp_path / "out")) == 10
