"""What the parts share: a check that passes or fails, and agreement of numbers in fp32 and in bf16."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # nemo_eppo of this checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' small models
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the harness

from pairs import Row
from torch import Tensor

from nemo_eppo.settings.model import ModelConfig, Precision

PASS, FAIL = "pass", "FAIL"
CHECK = "check"
"""The column of a row that holds one of these; rows without it are measurements."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
EXACT = 1e-4
"""Largest relative error of fp32 results."""

LLAMA_1B = ModelConfig(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_sequence_length=8192,
    tie_embeddings=True,
)
LLAMA_3B = LLAMA_1B.model_copy(update={"num_layers": 28, "hidden_size": 3072, "num_attention_heads": 24})
LLAMA_8B = LLAMA_1B.model_copy(
    update={"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "tie_embeddings": False}
)
TINY = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_sequence_length=256,
)


def passed(row: Row, expected: str, ok: bool) -> Row:
    """The row as that of a check, with what was expected."""
    return {**row, "expected": expected, CHECK: PASS if ok else FAIL}


def at_most(row: Row, found: float, limit: float) -> Row:
    """The row as that of a check that `found` is no more than `limit`; NaN is more than anything."""
    return passed({**row, "found": found}, f"at most {limit:.2g}", found <= limit)


def agreement(row: Row, precision: Precision, ours: Tensor, peer: Tensor, judge: Tensor) -> Row:
    """A check that our numbers are the judge's, which were computed in fp32.

    The error is the norm of all differences over that of the judge's numbers. In fp32 it may be EXACT, in bf16 twice
    that of the peer, which computed the same in bf16 in another way.
    """
    judge = judge.double().cpu()
    difference, of_peer = (x.double().cpu() - judge for x in (ours, peer))
    error, peers = (float(x.norm() / judge.norm()) for x in (difference, of_peer))
    row = {**row, "precision": precision, "largest difference": float(difference.abs().max()), "peer's error": peers}
    return at_most(row, error, EXACT if precision == "fp32" else 2 * peers + EXACT)
