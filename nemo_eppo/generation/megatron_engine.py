"""Generation with the trainer's own Megatron weights: nothing is copied, converted or sent when they change."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_eppo.algorithms.sampling import counter_uniform, filter_logits, sample_tokens
from nemo_eppo.generation.decoder import Decoder
from nemo_eppo.generation.engine import Limits, check_requests
from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.rollout.sampling import SamplingParams

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

    def wake(self) -> None:
        """Nothing to do: the cache is allocated when it is needed."""

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
        lengths, seed = torch.tensor([len(prompt) for prompt in prompt_ids]), torch.tensor(seeds)
        limits = (longest - lengths).clamp(max=sampling.max_new_tokens)
        waiting = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # the last, and longest, join first
        tokens = torch.full((len(prompt_ids), int(limits.max()) + _BLOCK), self._limits.pad_id)
        logprobs = torch.zeros(tokens.shape)
        drawn = torch.zeros_like(lengths)  # tokens of each response so far
        rows = torch.zeros(0, dtype=torch.int64)  # the prompt that each of the decoder's rows answers
        logits = None
        self._decoder.start(min(len(prompt_ids), at_once), int((lengths + limits).max()) + _BLOCK)
        while waiting or len(rows):
            if waiting and len(rows) < at_once:
                joining = [waiting.pop() for _ in range(min(len(waiting), at_once - len(rows)))]
                prompts = [torch.tensor(prompt_ids[i]) for i in joining]
                padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=self._limits.pad_id)
                first = self._decoder.add(padded, lengths[joining])
                logits = first if logits is None or first is None else torch.cat([logits, first])
                rows = torch.cat([rows, torch.tensor(joining)])
            steps = drawn[rows, None] + torch.arange(min(_BLOCK, int((limits - drawn)[rows].max())))
            uniforms = counter_uniform(seed[rows, None], steps).to(device.device())
            token, block = self._decode(logits, uniforms, sampling)
            tokens[rows[:, None], steps], logprobs[rows[:, None], steps] = block
            drawn[rows] += steps.size(1)
            going = ~(block[0] == self._limits.eos_id).any(1) & (drawn < limits)[rows]
            logits = None
            order = self._decoder.keep(going.nonzero().flatten().tolist())
            rows = rows[order]
            if order:
                logits = self._decoder.step(token[order])
        if not torch.isfinite(logprobs).all():
            raise FloatingPointError(f"the model of weight version {self._version} gives NaN or infinite log-probs")
        results = zip(tokens.tolist(), logprobs.tolist(), limits.tolist(), strict=True)
        return [self._completion(*result) for result in results]

    def _decode(
        self, logits: Tensor | None, uniforms: Tensor, sampling: SamplingParams
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Decode `steps` tokens of each row: return the last [n], and all with log-probs [n, steps] on the host."""
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        for step, uniform in enumerate(uniforms.unbind(1)):
            if step:
                logits = self._decoder.step(tokens[-1])
            token, logprob = self._choose(logits, uniform, sampling)
            tokens.append(token)
            logprobs.append(logprob)
        found = torch.stack(tokens, 1).cpu(), self._from_last_stage(torch.stack(logprobs, 1)).cpu()
        return tokens[-1], found

    def _choose(self, logits: Tensor | None, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        """Choose the next token of each row: return it [n], on all stages, and its log-prob [n], on the last."""
        if logits is None:
            token = torch.empty(len(uniforms), dtype=torch.int64, device=uniforms.device)
            logprob = torch.empty(len(uniforms), device=uniforms.device)
        else:
            if sampling.temperature != 1.0:
                logits = logits / sampling.temperature
            if sampling.top_k or sampling.top_p < 1.0:
                logits = filter_logits(logits, sampling.top_k, sampling.top_p)
            token = logits.argmax(-1) if sampling.greedy else sample_tokens(logits, uniforms)
            logprob = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        return self._from_last_stage(token), logprob

    def _from_last_stage(self, values: Tensor) -> Tensor:
        if self._stages.size() > 1:
            dist.broadcast(values, group=self._stages, group_src=self._stages.size() - 1)
        return values

    def _completion(self, tokens: list[int], logprobs: list[float], limit: int) -> Completion:
        """Cut what was decoded of one row at its first EOS, or at its limit."""
        stopped = self._limits.eos_id in tokens[:limit]
        length = tokens.index(self._limits.eos_id) + 1 if stopped else limit
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        return Completion(tokens[:length], logprobs[:length], reason, self._version)
