"""Generation with the trainer's own Megatron weights: nothing is copied, converted or sent when they change."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_eppo.algorithms.choices import Distribution
from nemo_eppo.algorithms.sampling import counter_uniform, filter_logits, repetition_slopes, sample_tokens
from nemo_eppo.generation.decoder import Decoder
from nemo_eppo.generation.engine import Limits, check_requests
from nemo_eppo.generation.stops import Stops
from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.generation import SamplingParams

_BLOCK = 8  # tokens per row between looks at what was sampled, each of which waits for the device


class MegatronEngine:
    """An `Engine` over the chunks of a policy.

    All ranks of a replica call `generate` with the same input and get the same completions. Replicas are independent:
    each may have prompts of its own, or none.

    Args:
        chunks: what `build_model(..., head="lm")` returned, wrapped or not.
    """

    def __init__(self, chunks: list[Any], limits: Limits) -> None:
        model = unwrap(chunks[0]).description
        limits.check(model)
        self._limits, self._vocab_size = limits, model.vocab_size
        self._decoder = Decoder(chunks)
        self._stages = self._decoder.stages
        self._version = 0

    def refit(self, named_weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """The weights are the trainer's own: only their version is new, and `named_weights` is not read."""
        self._version = version

    def sleep(self) -> None:
        """Free the cache."""
        self._decoder.release()

    def close(self) -> None:
        """Free the cache."""
        self._decoder.release()

    @torch.inference_mode()
    def generate(self, prompt_ids: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """Return one completion for each prompt; see `Engine`.

        Token t of a response is drawn with the uniform number of (seed, t). With `greedy`, log-probs are those of the
        softmax at `temperature`.

        Raises:
            ConfigError: a prompt or seed that cannot work, found before any communication.
            FloatingPointError: the model gives NaN; raised on all ranks.
        """
        longest, at_once = self._limits.max_sequence_length, self._limits.max_batch_size
        check_requests(prompt_ids, seeds, self._vocab_size, longest)
        if not prompt_ids:
            return []
        stops = Stops(sampling.stop_strings, self._limits.eos_id, self._limits.tokenizer)
        distribution = sampling.distribution(stops.ids)
        lengths, seed = torch.tensor([len(prompt) for prompt in prompt_ids]), torch.tensor(seeds)
        responses = [_Response(min(longest - len(prompt), sampling.max_new_tokens)) for prompt in prompt_ids]
        room = max(len(prompt) + response.limit for prompt, response in zip(prompt_ids, responses, strict=True))
        waiting = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # the last, and longest, join first
        rows: list[int] = []  # the prompt that each of the decoder's rows answers
        logits = seen = None
        if distribution.repetition_penalty != 1.0:
            seen = torch.zeros(0, self._vocab_size, dtype=torch.bool, device=device.device())
        self._decoder.start(min(len(prompt_ids), at_once), room + _BLOCK)
        while waiting or rows:
            if waiting and len(rows) < at_once:
                joining = [waiting.pop() for _ in range(min(len(waiting), at_once - len(rows)))]
                prompts = [torch.tensor(prompt_ids[i]) for i in joining]
                padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=self._limits.pad_id)
                first = self._decoder.add(padded, lengths[joining])
                logits = first if logits is None or first is None else torch.cat([logits, first])
                if seen is not None:
                    new = torch.zeros(len(prompts), self._vocab_size, dtype=torch.bool)
                    for row, prompt in enumerate(prompts):
                        new[row, prompt] = True
                    seen = torch.cat([seen, new.to(seen.device)])
                rows += joining
            drawn = torch.tensor([len(responses[i].tokens) for i in rows])
            steps = drawn[:, None] + torch.arange(min(_BLOCK, max(responses[i].left for i in rows)))
            uniforms = counter_uniform(seed[rows, None], steps).to(device.device())
            early = (steps < distribution.min_new_tokens).to(device.device())
            token, tokens, logprobs = self._decode(logits, _Draws(uniforms, early, seen), distribution, sampling.greedy)
            if not torch.isfinite(logprobs).all():
                raise FloatingPointError(f"the model of weight version {self._version} gives NaN or infinite log-probs")
            going = []
            for row, (i, ids, scores) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
                if responses[i].go_on(ids, scores, stops):
                    going.append(row)
            logits = None
            order = self._decoder.keep(going)
            rows = [rows[row] for row in order]
            seen = None if seen is None else seen[order]
            if order:
                logits = self._decoder.step(token[order])
        return [
            Completion(response.tokens, response.logprobs, response.reason, self._version) for response in responses
        ]

    def _decode(
        self, logits: Tensor | None, draws: "_Draws", distribution: Distribution, greedy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode `steps` tokens of each row: return the last [n]; and all, with log-probs, [n, steps] on the host."""
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        for step, (uniform, early) in enumerate(zip(draws.uniforms.unbind(1), draws.early.unbind(1), strict=True)):
            if step:
                logits = self._decoder.step(tokens[-1])
            if logits is not None:
                logits = _sampling_logits(logits, early, draws.seen, distribution)
            token, logprob = self._choose(logits, uniform, greedy)
            if draws.seen is not None:
                draws.seen.scatter_(1, token[:, None], True)
            tokens.append(token)
            logprobs.append(logprob)
        return tokens[-1], torch.stack(tokens, 1).cpu(), self._from_last_stage(torch.stack(logprobs, 1)).cpu()

    def _choose(self, logits: Tensor | None, uniforms: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        """Choose the next token of each row: return it [n], on all stages, and its log-prob [n], on the last."""
        if logits is None:
            token = torch.empty(len(uniforms), dtype=torch.int64, device=uniforms.device)
            logprob = torch.empty(len(uniforms), device=uniforms.device)
        else:
            token = logits.argmax(-1) if greedy else sample_tokens(logits, uniforms)
            logprob = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        return self._from_last_stage(token), logprob

    def _from_last_stage(self, values: Tensor) -> Tensor:
        if self._stages.size() > 1:
            dist.broadcast(values, group=self._stages, group_src=self._stages.size() - 1)
        return values


class _Draws(NamedTuple):
    """What the next tokens of n rows are drawn with, beside their logits."""

    uniforms: Tensor
    """fp64 [n, steps]."""
    early: Tensor
    """bool [n, steps]: the response is too short to end here."""
    seen: Tensor | None
    """bool [n, V]: tokens of prompt and response so far, kept up to date; None if none are penalised."""


@dataclass
class _Response:
    """One response while it is decoded."""

    limit: int
    """Most tokens that it may have."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH

    @property
    def left(self) -> int:
        """Number of tokens that it may still get."""
        return self.limit - len(self.tokens)

    def go_on(self, tokens: list[int], logprobs: list[float], stops: Stops) -> bool:
        """Take over tokens up to the response's end, and tell whether it goes on after them."""
        seen, left = len(self.tokens), self.left
        self.tokens += tokens[:left]
        self.logprobs += logprobs[:left]
        end = stops.end(self.tokens, seen)
        if end is not None:
            self.reason = FinishReason.STOP
            del self.tokens[end:], self.logprobs[end:]
        return end is None and self.left > 0


def _sampling_logits(logits: Tensor, early: Tensor, seen: Tensor | None, distribution: Distribution) -> Tensor:
    """Turn the model's logits [n, V] into those of the distribution; `early` [n] and `seen` as in `_Draws`."""
    if seen is not None:
        logits = logits * repetition_slopes(logits, seen, distribution.repetition_penalty)
    if distribution.min_new_tokens:
        barred = torch.zeros_like(logits, dtype=torch.bool)
        barred[:, list(distribution.ending)] = early[:, None]
        logits = logits.masked_fill(barred, -torch.inf)
    if distribution.temperature != 1.0:
        logits = logits / distribution.temperature
    if distribution.top_k or distribution.top_p < 1.0:
        logits = filter_logits(logits, distribution.top_k, distribution.top_p)
    return logits
