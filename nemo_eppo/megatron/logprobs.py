"""Log-probabilities and entropies of tokens, straight from hidden states and a vocabulary-parallel output projection.

The vocabulary is not gathered, and the logits of all tokens are never held at once: rows are projected in chunks,
reduced to two numbers each, and projected once more in the backward pass. Rows without a target are not projected.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nemo_eppo.algorithms.choices import Distribution
from nemo_eppo.algorithms.sampling import keep_mask, repetition_slopes

IGNORE = -100
"""Target of a position whose log-probability is not computed; its outputs are 0."""

_CHUNK_ELEMENTS = 2**24  # logits per chunk: 64 MB in fp32
_CHUNK_ROWS = 1024  # rows per chunk at least: with fewer, a GPU spends its time adding to the weight's gradient
_MASKED = -1e30  # a logit of probability 0: finite, so that probability times logit is 0


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    sequence_parallel: bool,
    distribution: Distribution,
    softcap: float | None = None,
    history: "History | None" = None,
) -> Tensor:
    """Log-probability of each target token and entropy of the distribution it came from.

    Args:
        hidden: [s, b, H] final hidden states, or this rank's [s / tp, b, H] under sequence parallelism.
        weight: [V / tp, H] this rank's rows of the output projection.
        targets: [b, s] the token that follows each position; IGNORE where none is wanted.
        group: tensor-parallel ranks.
        vocab_size: rows of the projection that are real tokens; padding rows get probability 0.
        distribution: penalty, temperature and filters. With top-k or top-p the kept set follows the current logits,
            always includes the target, and costs a gather of one chunk's logits.
        softcap: cap of the logits, see `soft_capped`; None for none.
        history: needed by a distribution that looks back; None for others.

    Returns:
        [b, s, 2] fp32 (fp64 for fp64 hidden states): log-probability, entropy in nats.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    targets = targets.transpose(0, 1)
    rows = (targets != IGNORE).reshape(-1).nonzero().squeeze(1)
    wanted = hidden.flatten(0, 1).index_select(0, rows)
    assert history is not None or not distribution.looks_back
    preceding = None if history is None else _preceding(rows, history, group.rank() * weight.size(0), weight.size(0))
    projection = _Projection(group, vocab_size, distribution, softcap, preceding)
    computed = _TokenLogProbs.apply(wanted, weight, targets.reshape(-1)[rows], projection)
    out = computed.new_zeros(targets.numel(), 2).index_copy(0, rows, computed)
    return out.view(*targets.shape, 2).transpose(0, 1)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return c * tanh(logits / c), between -c and c (Gemma 2, arXiv 2408.00118, section 2); None leaves the logits."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class History(NamedTuple):
    """The tokens of a micro-batch; the first target of each sequence must be the first token of its response."""

    tokens: Tensor
    """int64 [b, s] token at each position."""
    sequences: Tensor
    """int64 [b, s] number, from 0, of the sequence that each position belongs to."""


class _Preceding(NamedTuple):
    """The tokens before the target of each of n rows."""

    sequence: Tensor
    """int64 [n] number of the row's sequence."""
    column: Tensor
    """int32 [n] column of the row's position."""
    generated: Tensor
    """int32 [n] number of the response's tokens before the target."""
    first_column: Tensor
    """int32 [sequences, V / tp] column where each of this rank's tokens first occurs; s if it does not."""


def _preceding(rows: Tensor, history: History, first_token: int, size: int) -> _Preceding:
    """Look up the tokens before `rows` [n], flat indices into [s, b]; this rank has `size` ids from `first_token`."""
    tokens, sequences = history
    never, count = tokens.size(1), int(sequences.max()) + 1
    columns = torch.arange(never, dtype=torch.int32, device=tokens.device).expand_as(tokens)
    sequence, column = sequences.T.reshape(-1)[rows], columns.T.reshape(-1)[rows]
    start = column.new_full((count,), never).scatter_reduce_(0, sequence, column, "amin")
    own = (tokens >= first_token) & (tokens < first_token + size)
    index = (sequences * size + tokens - first_token)[own]
    first_column = column.new_full((count * size,), never).scatter_reduce_(0, index, columns[own], "amin")
    return _Preceding(sequence, column, column - start[sequence], first_column.view(count, size))


class _Projection(NamedTuple):
    """Arguments of `token_logprobs` that determine logits, beside hidden states and weight."""

    group: dist.ProcessGroup
    vocab_size: int
    distribution: Distribution
    softcap: float | None
    preceding: _Preceding | None


class _TokenLogProbs(torch.autograd.Function):
    """[n, H] hidden rows, [V / tp, H] weight, [n] targets -> [n, 2]; keeps three numbers per row for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, projection: _Projection) -> Tensor:
        ctx.projection = projection
        parts = []
        for rows in _chunks(hidden.size(0), weight.size(0)):
            x, own, index, _ = _chunk_logits(hidden[rows], weight, targets[rows], projection, rows)
            peak = x.amax(-1)
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=projection.group)
            x.sub_(peak.unsqueeze(-1))
            target = x.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            exp = x.exp()
            sums = torch.stack([exp.sum(-1), torch.where(own, target, 0), torch.linalg.vecdot(exp, x)], dim=-1)
            dist.all_reduce(sums, group=projection.group)
            log_z = sums[:, 0].log()
            logprob, entropy = sums[:, 1] - log_z, log_z - sums[:, 2] / sums[:, 0]
            parts.append(torch.stack([logprob, entropy, peak + log_z], dim=-1))
        result = torch.cat(parts) if parts else full_logits(hidden, weight).new_zeros(0, 3)
        ctx.save_for_backward(hidden, weight, targets, result)
        return result[:, :2].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, result = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = None  # a frozen projection needs none
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=result.dtype, device=weight.device)
        temperature, softcap = ctx.projection.distribution.temperature, ctx.projection.softcap
        for rows in _chunks(hidden.size(0), weight.size(0)):
            x, own, index, penalties = _chunk_logits(hidden[rows], weight, targets[rows], ctx.projection, rows)
            slope = penalties
            if softcap is not None:  # d(c tanh(x / c)) / dx = 1 - tanh(x / c)^2; masked logits have no gradient anyway
                ratio = x * (temperature / softcap) if penalties is None else x * (temperature / softcap) / penalties
                slope = 1 - ratio.clamp_(-1, 1).square_()
                slope = slope if penalties is None else slope.mul_(penalties)
            logp = x.sub_(result[rows, 2:3])
            p = logp.exp()
            grad_logprob, grad_entropy = (grads[0][rows] / temperature).split(1, -1)
            grad = logp.add_(result[rows, 1:2]).mul_(-grad_entropy).sub_(grad_logprob).mul_(p)
            grad.scatter_add_(-1, index.unsqueeze(-1), torch.where(own.unsqueeze(-1), grad_logprob, 0))
            if slope is not None:
                grad.mul_(slope)
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


@cache
def columns_of(tokens: tuple[int, ...], first: int, size: int, where: torch.device) -> Tensor:
    """Return the columns of these tokens on a rank that has `size` ids from `first`, as a tensor on its device: with a
    list as index, the host would wait for the device."""
    own = [token - first for token in tokens if first <= token < first + size]
    return torch.tensor(own, dtype=torch.int64, device=where)


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden [n, H] @ weight [V, H].T in fp32 (fp64 stays fp64): bf16 has steps of 0.125 from 16 on, which is
    more than an update changes."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def rows_at_once(vocabulary: int) -> int:
    """Return how many tokens' logits are held at the same time, with `vocabulary` logits per token."""
    return max(_CHUNK_ROWS, _CHUNK_ELEMENTS // vocabulary)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = rows_at_once(vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _chunk_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, projection: _Projection, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute this rank's logits [n, V / tp] of the sampling distribution; for each target, [n], whether this rank owns
    it, and its column here (0 if not); and the factors of the repetition penalty, None without one."""
    group, vocab_size, distribution, softcap, preceding = projection
    logits = soft_capped(full_logits(hidden, weight), softcap)
    size = weight.size(0)
    first, penalties = group.rank() * size, None
    if preceding is not None and distribution.repetition_penalty != 1.0:
        seen = preceding.first_column[preceding.sequence[rows]] <= preceding.column[rows].unsqueeze(-1)
        penalties = repetition_slopes(logits, seen, distribution.repetition_penalty)
        logits.mul_(penalties)
    if distribution.temperature != 1.0:
        logits.div_(distribution.temperature)
    if preceding is not None and distribution.min_new_tokens:
        barred = columns_of(distribution.ending, first, size, logits.device)
        early = preceding.generated[rows] < distribution.min_new_tokens
        logits[:, barred] = torch.where(early.unsqueeze(-1), _MASKED, logits[:, barred])
    if first + size > vocab_size:
        logits[:, max(0, vocab_size - first) :] = _MASKED
    own = (targets >= first) & (targets < first + size)
    index = torch.where(own, targets - first, 0)
    if distribution.top_k or distribution.top_p < 1.0:
        shards = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(shards, logits.contiguous(), group=group)
        keep = keep_mask(torch.cat(shards, -1), distribution.top_k, distribution.top_p)
        keep.scatter_(-1, targets.unsqueeze(-1), True)
        logits.masked_fill_(~keep[:, first : first + size], _MASKED)
    return logits, own, index, penalties
