"""token_logprobs against log_softmax over the whole vocabulary, values and gradients, in every setting."""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tiny import close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_eppo.algorithms.choices import UNCHANGED, Distribution
from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.megatron import logprobs
from nemo_eppo.megatron.logprobs import IGNORE, History, full_logits, token_logprobs
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ParallelConfig

SEQUENCE, BATCH, HIDDEN, VOCAB = 6, 3, 8, 101
DISTRIBUTIONS = {
    "plain": UNCHANGED,
    "temperature": UNCHANGED._replace(temperature=0.7),
    "top-k": UNCHANGED._replace(top_k=5),
    "top-p": UNCHANGED._replace(top_p=0.8),
    "all": Distribution(temperature=1.3, top_k=20, top_p=0.7),
    "penalty": UNCHANGED._replace(repetition_penalty=1.6),
    "shortest": UNCHANGED._replace(min_new_tokens=2, ending=(7, 100)),
    "all, looking back": Distribution(1.3, 40, 0.9, repetition_penalty=1.6, min_new_tokens=2, ending=(7, 100)),
}
Results = dict[str, Tensor]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def tensor_ranks() -> Any:
    """All ranks: every case here is tensor parallelism alone."""
    return dist.group.WORLD


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states [s, b, H], projection [V, H], targets, tokens and sequences [b, s], gradients [b, s, 2] of outputs.

    The last row is a pack of two sequences.
    """
    draw = torch.Generator().manual_seed(3)
    values = {
        "hidden": torch.randn(SEQUENCE, BATCH, HIDDEN, generator=draw, dtype=torch.float64),
        "weight": torch.randn(VOCAB, HIDDEN, generator=draw, dtype=torch.float64),
        "grads": torch.randn(BATCH, SEQUENCE, 2, generator=draw, dtype=torch.float64),
    }
    targets = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=draw)
    targets[targets == 7] = 8
    targets[0, :2] = targets[1, 3:] = targets[2, 3] = IGNORE
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=draw)
    tokens[:, -2:] = tokens[:, :1]  # a token twice
    sequences = torch.tensor([[0] * SEQUENCE, [1] * SEQUENCE, [2, 2, 2, 3, 3, 3]])
    whole = {"targets": targets, "tokens": tokens, "sequences": sequences}
    return {name: value.to(dtype) for name, value in values.items()} | whole


@cache
def reference(distribution: Distribution, dtype: torch.dtype, softcap: float | None = None) -> Results:
    """The definition, in fp64: cap all logits, penalise and filter them, but never the target; then log_softmax."""
    given = inputs(dtype)
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = (hidden @ weight.T).transpose(0, 1)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    targets, tokens, sequences = (given[name] for name in ("targets", "tokens", "sequences"))
    slopes, barred = torch.ones_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    for row, column in itertools.product(range(BATCH), range(SEQUENCE)):
        earlier = [p for p in range(column + 1) if sequences[row, p] == sequences[row, column]]
        drawn = sum(int(targets[row, p] != IGNORE) for p in earlier[:-1])
        barred[row, column, list(distribution.ending)] = drawn < distribution.min_new_tokens
        for token in {int(tokens[row, p]) for p in earlier}:
            negative, penalty = logits[row, column, token] < 0, distribution.repetition_penalty
            slopes[row, column, token] = penalty if negative else 1 / penalty
    logits = (logits * slopes / distribution.temperature).masked_fill(barred, -torch.inf)
    keep = torch.zeros_like(logits, dtype=torch.bool)
    for place in itertools.product(range(BATCH), range(SEQUENCE)):
        likeliest = sorted(range(VOCAB), key=lambda token: -float(logits[place][token]))
        likeliest = likeliest[: distribution.top_k or VOCAB]
        mass = logits[place].detach()[likeliest].softmax(-1)
        before = mass.cumsum(0) - mass
        keep[place][[t for t, m in zip(likeliest, before.tolist(), strict=True) if m < distribution.top_p]] = True
    keep.scatter_(-1, targets.clamp(min=0).unsqueeze(-1), True)
    keep &= ~barred
    logp = logits.masked_fill(~keep, -torch.inf).log_softmax(-1)
    chosen = logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp.masked_fill(~keep, 0)).sum(-1)
    outputs = torch.stack([chosen, entropy], -1) * (targets != IGNORE).unsqueeze(-1)
    (outputs * given["grads"].double()).sum().backward()
    return {"outputs": outputs.detach(), "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


def compute(
    distribution: Distribution,
    dtype: torch.dtype,
    tp: int,
    sequence_parallel: bool,
    chunk: int | None,
    softcap: float | None = None,
) -> Results:
    """The product, its projection padded with rows that would win every softmax if they were not masked."""
    initialize(ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel), seed=0)
    if chunk is not None:
        logprobs._CHUNK_ELEMENTS, logprobs._CHUNK_ROWS = chunk, 1
    given = inputs(dtype)
    padded = torch.nn.functional.pad(given["weight"], (0, 0, 0, -VOCAB % tp), value=9.0)
    weight = padded.chunk(tp)[dist.get_rank()].clone().requires_grad_()
    hidden = given["hidden"].chunk(tp)[dist.get_rank()] if sequence_parallel else given["hidden"]
    hidden = hidden.clone().requires_grad_()
    options: Any = {"vocab_size": VOCAB, "sequence_parallel": sequence_parallel, "distribution": distribution}
    history = History(given["tokens"], given["sequences"]) if distribution.looks_back else None
    outputs = token_logprobs(
        hidden, weight, given["targets"], tensor_ranks(), softcap=softcap, history=history, **options
    )
    (outputs * given["grads"]).sum().backward()
    return {"outputs": outputs.detach(), "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


@cache
def computed(
    tp: int, sequence_parallel: bool, chunk: int | None, softcap: float | None = None
) -> list[dict[tuple[str, torch.dtype], Results]]:
    """Of each rank, in one process group: the results for every distribution in fp64 and in fp32."""
    return run_ranks(compute_all, tp, tp, sequence_parallel, chunk, softcap)


def compute_all(*layout: Any) -> dict[tuple[str, torch.dtype], Results]:
    return {
        (name, dtype): compute(distribution, dtype, *layout)
        for name, distribution in DISTRIBUTIONS.items()
        for dtype in TOLERANCES
    }


def compare(case: str, tp: int, sequence_parallel: bool, got: list[Results], expected: Results, tol: float) -> None:
    for result in got:
        close(f"{case}, outputs", result["outputs"], expected["outputs"], tol)
    weight = torch.cat([result["weight"] for result in got])
    close(f"{case}, gradient of the projection", weight[:VOCAB], expected["weight"], tol)
    assert not weight[VOCAB:].any(), "padding rows get no gradient"
    hidden = [torch.cat([result["hidden"] for result in got])] if sequence_parallel else [r["hidden"] for r in got]
    for gradient in hidden:
        close(f"{case}, gradient of the hidden states", gradient, expected["hidden"], tol)
        ignored = inputs(torch.float32)["targets"].T == IGNORE
        assert not gradient[ignored].any(), "a row nobody asked for gets no gradient"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["TP1", "TP2", "TP2+SP"])
def test_equals_log_softmax_over_the_whole_vocabulary(tp: int, sequence_parallel: bool, distribution: str) -> None:
    for dtype, tolerance in TOLERANCES.items():
        got = [rank[distribution, dtype] for rank in computed(tp, sequence_parallel, None)]
        assert got[0]["outputs"].dtype == dtype
        expected = reference(DISTRIBUTIONS[distribution], dtype)
        compare(
            f"{distribution} TP{tp} SP={sequence_parallel} {dtype}", tp, sequence_parallel, got, expected, tolerance
        )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("softcap", [0.7, 4.0])
def test_logits_are_capped_before_all_else_and_so_are_their_gradients(softcap: float, distribution: str) -> None:
    for dtype, tolerance in TOLERANCES.items():
        got = [rank[distribution, dtype] for rank in computed(2, False, 1, softcap)]
        expected = reference(DISTRIBUTIONS[distribution], dtype, softcap)
        compare(f"{distribution} capped at {softcap} {dtype}", 2, False, got, expected, tolerance)
    uncapped = reference(DISTRIBUTIONS[distribution], torch.float64)["outputs"]
    assert float((expected["outputs"] - uncapped).abs().max()) > 0.1


@pytest.mark.parametrize("distribution", ["plain", "all", "all, looking back"])
def test_chunks_of_one_row_equal_one_chunk(distribution: str) -> None:
    got = [rank[distribution, torch.float64] for rank in computed(2, False, 1)]
    compare(f"{distribution}, chunked", 2, False, got, reference(DISTRIBUTIONS[distribution], torch.float64), 1e-12)


def test_bf16_is_scored_in_fp32() -> None:
    got = run_ranks(compute, 1, DISTRIBUTIONS["plain"], torch.bfloat16, 1, False, None)
    expected = reference(DISTRIBUTIONS["plain"], torch.bfloat16)
    assert got[0]["outputs"].dtype == torch.float32
    torch.testing.assert_close(got[0]["outputs"].double(), expected["outputs"], rtol=0, atol=1e-5)
    compare("bf16", 1, False, got, expected, 0.1)  # gradients are bf16


def test_logits_of_bf16_are_not_rounded_to_it() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=draw, dtype=torch.bfloat16) for n in (7, 50))
    exact = hidden.double() @ weight.double().T
    assert exact.abs().max() > 32, "where bf16 has steps of a quarter"
    torch.testing.assert_close(full_logits(hidden, weight).double(), exact, rtol=0, atol=1e-4)


def all_ignored() -> Results:
    initialize(ParallelConfig(), seed=0)
    given = inputs(torch.float32)
    hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))
    nothing = torch.full_like(given["targets"], IGNORE)
    options: Any = {"vocab_size": VOCAB, "sequence_parallel": False, "distribution": UNCHANGED}
    outputs = token_logprobs(hidden, weight, nothing, tensor_ranks(), **options)
    outputs.sum().backward()
    return {"outputs": outputs.detach(), "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


def test_a_micro_batch_without_targets_scores_zero() -> None:
    assert not any(value.any() for value in run_ranks(all_ignored, 1)[0].values())


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def memory(rows: int, vocabulary: int, chunk: int) -> tuple[int, int]:
    """Elements of the largest tensor saved for the backward pass, and of the largest one made in either pass."""
    initialize(ParallelConfig(), seed=0)
    logprobs._CHUNK_ELEMENTS, logprobs._CHUNK_ROWS = chunk, 1
    hidden = torch.randn(rows, 1, HIDDEN, requires_grad=True)
    weight = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1, rows))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    options: Any = {
        "vocab_size": vocabulary,
        "sequence_parallel": False,
        "distribution": UNCHANGED._replace(temperature=0.9),
    }
    with _LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(hidden, weight, targets, tensor_ranks(), **options).sum().backward()
    return max(saved), largest.elements


def test_logits_of_all_rows_are_never_held() -> None:
    rows, vocabulary, chunk = 400, 1000, 20_000
    saved, largest = run_ranks(memory, 1, rows, vocabulary, chunk)[0]
    assert rows * vocabulary > 10 * chunk
    assert saved == vocabulary * HIDDEN, "the projection is the largest tensor kept for the backward pass"
    assert largest == chunk, "no tensor of either pass exceeds one chunk"


def test_impossible_distributions_are_refused() -> None:
    impossible: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.2},
        {"min_new_tokens": -1},
        {"min_new_tokens": 2},
        {"stop_strings": ["###", ""]},
        {"stop_strings": "###"},
    ]
    for settings in impossible:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            load_config(SamplingParams, {"max_new_tokens": 1, **settings})
