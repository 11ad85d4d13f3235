"""The Triton kernel of decoding steps, run by Triton's interpreter against plain fp64, and compiled for GPUs.

The interpreter cannot multiply in bf16: fp16 stands for both.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from distributed import run_ranks
from small_models import (
    EOS,
    GEMMA2_MODEL,
    LAYOUTS,
    PAD,
    QWEN3,
    build_policy,
    random_prompts,
    tokenizer,
)
from torch import Tensor

from nemo_eppo.generation.decoder import attention_of_device
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron import device
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig

sys.modules.pop("triton", None)  # on a CPU `device.install()` hides it

from nemo_eppo.generation.flash_decoding import flash_decode  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


@dataclass
class Case:
    groups: int = 2
    heads: int = 3
    width: int = 24
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    blocks: int = 1
    dtype: torch.dtype = torch.float32
    positions: tuple[int, ...] = (0, 299, 130, 63, 64)


CASES = {
    "one split": Case(),
    "many splits": Case(blocks=30),
    "one head a group": Case(heads=1, width=64, blocks=20),
    "many heads": Case(heads=20, groups=1, width=16, blocks=100),
    "wide": Case(width=256, heads=2, blocks=20, dtype=torch.float16),
    "fp16": Case(heads=4, width=128, blocks=20, dtype=torch.float16),
    "window": Case(window=70, blocks=20),
    "window of one": Case(window=1, blocks=20),
    "window in fp16": Case(window=129, blocks=1, dtype=torch.float16),
    "wider window": Case(window=1000, blocks=20),
    "softcap": Case(softcap=2.0, scale=3.0, blocks=20),
    "all": Case(softcap=5.0, scale=0.3, blocks=20, window=100, dtype=torch.float16),
}


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query, cache and positions as the decoder has them: parts of larger tensors, and NaN where no row looks."""
    draw = torch.Generator().manual_seed(4)
    rows, positions = len(case.positions), torch.tensor(case.positions)
    qkv = torch.randn(rows, 1, case.groups, case.heads + 2, case.width, generator=draw).to(case.dtype)
    storage = torch.randn(rows + 2, case.groups, 2, 320, case.width, generator=draw).to(case.dtype)
    for row, position in enumerate(case.positions):
        storage[row, ..., position + 1 :, :] = torch.nan
        if case.window is not None:
            storage[row, ..., : max(0, position + 1 - case.window), :] = torch.nan
    return qkv[:, 0, :, : case.heads], storage[:rows], positions


def plain(query: Tensor, cache: Tensor, positions: Tensor, case: Case) -> Tensor:
    out = torch.empty(query.shape, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        first = 0 if case.window is None else max(0, position + 1 - case.window)
        keys, values = cache[row, :, :, first : position + 1].double().unbind(1)
        logits = query[row].double() @ keys.mT * (case.width**-0.5 if case.scale is None else case.scale)
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        out[row] = logits.softmax(-1) @ values
    return out


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention(name: str) -> None:
    case = CASES[name]
    query, cache, positions = tensors(case)
    settings: dict[str, Any] = {"window": case.window, "scale": case.scale, "softcap": case.softcap}
    out = flash_decode(query, cache, positions, 300, **settings, blocks=case.blocks)
    assert out.dtype == case.dtype
    tolerance = 2e-6 if case.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), plain(query, cache, positions, case), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("blocks", [1, 30])
def test_nan_stays_nan_in_its_row(blocks: int) -> None:
    case = CASES["many splits"]
    query, cache, positions = tensors(case)
    expected = plain(query, cache, positions, case)
    cache[1, 0, 0, 5, 3] = torch.nan
    out = flash_decode(query, cache, positions, 300, blocks=blocks)
    assert out[1, 0].isnan().all()
    others = torch.ones(out.shape[:2], dtype=torch.bool)
    others[1, 0] = False
    torch.testing.assert_close(out[others].double(), expected[others], atol=2e-6, rtol=2e-6)


def generate_both(layout: dict[str, Any], model: ModelConfig) -> list[list[Completion]]:
    device.cached_tokens_multiple = lambda: 16
    chunks, energy = build_policy(layout, model), EnergyProbeConfig(preset="mlp_linears", layers=(-1, 0))
    limits = EngineLimits(EOS, PAD, 2, model.max_sequence_length, tokenizer())
    prompts = random_prompts([7, 1, 12])
    made = []
    for attention in (None, partial(flash_decode, blocks=8)):
        engine = MegatronEngine(chunks, limits, energy, attention=attention)
        made.append(engine.generate(prompts, SamplingParams(max_new_tokens=4, temperature=2.0), [0, 1, 2]))
        engine.close()
    return made


@pytest.mark.parametrize(("layout", "model"), [("one rank", GEMMA2_MODEL), ("TP 2", QWEN3)])
def test_responses_are_those_of_torchs_attention(layout: str, model: ModelConfig) -> None:
    ranks = LAYOUTS[layout].get("tensor_model_parallel_size", 1)
    expected, made = run_ranks(generate_both, ranks, LAYOUTS[layout], model)[0]
    for one, other in zip(made, expected, strict=True):
        assert one.token_ids == other.token_ids
        for name in ("logprobs", "entropies", "energies"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=5e-6, rtol=1e-5)


def test_where_triton_makes_no_kernels_torch_attends_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr("nemo_eppo.generation.flash_decoding.flash_decode", no_compiler)
    attention_of_device.cache_clear()
    assert attention_of_device(torch.float32, 16) is None
    attention_of_device.cache_clear()
    assert "Failed to find C compiler" in caplog.text


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemo_eppo.generation.flash_decoding import _attend_split as kernel, _columns_tile

types = dict(query="*{0}", cache="*{0}", positions="*i64")
types |= dict.fromkeys(("parts", "log_sums"), "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
aligned = "query", "cache", "positions", "parts", "log_sums", "query_row", "query_group", "cache_row", "cache_group"
for dtype, width, capability, capped in (
    ("bf16", 128, 80, False), ("bf16", 256, 100, True), ("fp32", 256, 90, True),
):
    tile = _columns_tile(width, {"bf16": 2, "fp32": 4}[dtype])
    constants = dict(CAPPED=capped, GROUPS=8, HEADS=4, WIDTH=width, HEADS_TILE=16, WIDTH_TILE=width, COLUMNS_TILE=tile)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32").format(dtype) for n in names}
    alignment = {(names.index(n),): [["tt.divisibility", 16]] for n in (*aligned, "cache_values")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, alignment), GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    print(dtype, width, capability, tile, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_it_compiles_for_gpus(tmp_path: Any) -> None:
    """And needs no more shared memory than each block of a GPU has, 99 KiB on the smallest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    print(out.stdout)
    assert all(int(line.split()[-1]) <= 99 * 1024 for line in out.stdout.splitlines())
