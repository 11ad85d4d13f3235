"""The launch files of examples/ fit the GPUs that they are written for, by doctor's own estimate."""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from scales import LLAMA, SIZES, planned

from nemo_eppo.cli import main
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.launch.command import REPOSITORY
from nemo_eppo.launch.job_checks import memory_of
from nemo_eppo.launch.launch_file import read_launch
from nemo_eppo.models.hf_names import entries
from nemo_eppo.settings.model import ModelConfig

LAUNCHES = REPOSITORY / "examples" / "launch"
GPU = 80 * 2**30
ROOM = 0.9  # the rest is for the CUDA context, NCCL's buffers and what PyTorch's allocator cannot use


def write_llama(size: str, directory: Path) -> None:
    """A Hugging Face directory of this size, whose weights are a hole in a file, and a tokenizer of a few words."""
    architecture = SIZES[size][0]
    model = ModelConfig(**architecture, **LLAMA)
    word_level(["Human", "Assistant"], directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    header, end = dict[str, Any](), 0
    for entry in entries(model, None).values():
        for name, shape in entry.tensors.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_doctor_accepts_a_node_of_80_gb_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama("8B", tmp_path / "model")
    row = {"prompt": "Human", "response": "Assistant", "chosen": "Assistant", "rejected": "Human"}
    for kind in ("sft", "preferences", "prompts"):
        for side in ("train", "validation"):
            (tmp_path / f"{kind}.{side}.jsonl").write_text((json.dumps(row) + "\n") * 128)
    monkeypatch.setattr("nemo_eppo.megatron.device.capacities", lambda: [int(ROOM * GPU)] * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    places = [f"output={tmp_path}/run", f"variables.model={tmp_path}/model", f"variables.data={tmp_path}"]
    file = LAUNCHES / "llama3_8b_1_node.yaml"
    with contextlib.suppress(SystemExit):
        main(["doctor", str(file), *places, "--json"])
    findings = {found["check"]: found for found in json.loads(capsys.readouterr().out)["findings"]}
    jobs = ("sft", "reward_model", "critic", "actor")
    for check in [f"{job}: {what}" for job in jobs for what in ("layout", "memory")] + ["GPUs of the jobs"]:
        assert findings[check]["status"] == "ok", findings[check]
    assert not [check for check in findings if check.endswith("speed")], "nothing is slow on GPUs"
    here = (
        "GPU",
        "accelerators",
        "disk",
        "memory of the machine",
        "shared memory",
        "open files",
    )  # of whatever runs the tests
    faults = [check for check, found in findings.items() if found["status"] == "error" and not check.startswith(here)]
    assert not faults
    peaks = [float(re.match(r"[\d.]+", findings[f"{job}: memory"]["found"]).group()) for job in jobs]  # type: ignore[union-attr]
    page = (REPOSITORY / "examples" / "README.md").read_text()
    assert f"a GPU needs {math.ceil(max(peaks))} GiB" in page


@pytest.mark.parametrize(("name", "size"), [("llama3_8b_2_nodes", "8B"), ("llama3_70b_12_nodes", "70B")])
def test_a_rank_of_the_cluster_files_fits_a_gpu(name: str, size: str) -> None:
    for job in planned(read_launch(LAUNCHES / f"{name}.yaml"), ModelConfig(**SIZES[size][0], **LLAMA)):
        assert memory_of(job).device < ROOM * GPU, job.name
