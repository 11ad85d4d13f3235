"""The endpoints of the critic and reward servers: their arrays, what `step` means in each, and which values are valid.

B sequences of S tokens, padded at the right, have T = S - 1 actions: action t predicts token t + 1. K is the number of
reward models, D the width of their latents.
"""

import numpy as np
import torch

from nemo_eppo.servers.protocol import Array, Arrays, Endpoint, Limits, RequestError, StepRule, refuse_where

_TOKENS = Array(np.int32, ("B", "S"), torch.int64)
_PER_SEQUENCE = Array(np.int32, ("B",), torch.int64)
_PER_ACTION = Array(np.float32, ("B", "T"))
_MASK = Array(np.uint8, ("B", "T"), torch.bool)


def _check_sequences(arrays: Arrays, limits: Limits) -> None:
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    (rows, longest), vocabulary = tokens.shape, limits.vocab_size
    for size, limit, what in (
        (rows, limits.max_batch_size, "sequences (max_batch_size)"),
        (longest, limits.max_sequence_length, "tokens each (max_sequence_length)"),
    ):
        if size > limit:
            raise RequestError("tokens", f"shape {list(tokens.shape)}", f"at most {limit} {what}")
    refuse_where((tokens < 0) | (tokens >= vocabulary), "tokens", tokens, f"a token id in [0, {vocabulary})")
    refuse_where((lengths < 2) | (lengths > longest), "lengths", lengths, f"a length in [2, {longest}]")


def _check_responses(arrays: Arrays, limits: Limits) -> None:
    _check_sequences(arrays, limits)
    prompts = arrays["prompt_lengths"]
    wrong = (prompts < 1) | (prompts >= arrays["lengths"])
    refuse_where(wrong, "prompt_lengths", prompts, "at least 1 and less than the length")


def _check_update(arrays: Arrays, limits: Limits) -> None:
    _check_sequences(arrays, limits)
    mask = arrays["mask"]
    refuse_where(mask > 1, "mask", mask, "0 or 1")
    padding = np.arange(1, arrays["tokens"].shape[1]) >= arrays["lengths"][:, None]
    refuse_where((mask == 1) & padding, "mask", mask, "0 on padding: action t predicts token t+1 < length")
    if not mask.any():
        raise RequestError("mask", "all 0", "at least one response token")
    for name in ("returns", "values"):
        wrong = (mask == 1) & ~np.isfinite(arrays[name])
        refuse_where(wrong, name, arrays[name], "a finite number where mask is 1")


ENDPOINTS = {
    "critic_infer": Endpoint(
        {"tokens": _TOKENS, "lengths": _PER_SEQUENCE}, {"values": _PER_ACTION}, check=_check_sequences
    ),
    # One mini-batch is one update. `values` are those at the time of the rollout.
    "critic_train": Endpoint(
        {"tokens": _TOKENS, "lengths": _PER_SEQUENCE, "returns": _PER_ACTION, "values": _PER_ACTION, "mask": _MASK},
        reply="metrics",
        step=StepRule.NEXT,
        check=_check_update,
    ),
    # Begins or resumes the run `run` after update `step`; a critic that has made more goes back to it. One that has
    # made updates of another run refuses, unless `fresh` says that it shall set them aside and begin anew.
    "critic_begin": Endpoint(
        {"run": Array(np.int64, ("1",), torch.int64), "fresh": Array(np.uint8, ("1",), torch.bool)},
        reply="step",
        reply_type=int,
        step=StepRule.SET,
    ),
    # Starts to save update `step`, and removes all earlier checkpoints except of the updates `keep` (0: the start).
    "critic_save": Endpoint(
        {"keep": Array(np.int64, ("K",), torch.int64)}, reply="path", reply_type=str, step=StepRule.CURRENT
    ),
    # Answers when the checkpoint that `critic_save` started is complete.
    "critic_saved": Endpoint({}, reply="path", reply_type=str, step=StepRule.ANY),
    "reward_infer": Endpoint(
        {"tokens": _TOKENS, "prompt_lengths": _PER_SEQUENCE, "lengths": _PER_SEQUENCE},
        {"rewards": Array(np.float32, ("B", "K")), "latents": Array(np.float32, ("B", "D"), optional=True)},
        check=_check_responses,
    ),
}
