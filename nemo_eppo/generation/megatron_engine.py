"""Generation on the trainer's own Megatron weights: nothing is copied, converted or sent when the weights change."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eppo.algorithms.sampling import counter_uniform, filter_logits, sample_tokens
from nemo_eppo.generation.decoder import Decoder
from nemo_eppo.generation.engine import check_limits, check_requests
from nemo_eppo.megatron import device
from nemo_eppo.megatron.model_config import ModelConfig
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.rollout.sampling import SamplingParams

_BLOCK = 8  # steps between looks at what was sampled, each of which waits for the device


class MegatronEngine:
    """An `Engine` over the chunks of a policy.

    All ranks of a replica call `generate` with the same input and get the same completions. Replicas are independent:
    each may have prompts of its own, or none.

    Args:
        chunks: what `build_model(..., head="lm")` returned, wrapped or not.
        model_config: their architecture.
        eos_id: the token that ends a response.
        pad_id: fills short prompts; never part of a response.
        max_batch_size: prompts decoded at once.
        max_sequence_length: longest prompt and response together.
    """

    def __init__(
        self,
        chunks: list[Any],
        model_config: ModelConfig,
        *,
        eos_id: int,
        pad_id: int,
        max_batch_size: int,
        max_sequence_length: int,
    ) -> None:
        check_limits(
            model_config,
            eos_id=eos_id,
            pad_id=pad_id,
            max_batch_size=max_batch_size,
            max_sequence_length=max_sequence_length,
        )
        self._vocab_size, self._eos_id, self._pad_id = model_config.vocab_size, eos_id, pad_id
        self._max_batch_size, self._max_sequence_length = max_batch_size, max_sequence_length
        self._decoder = Decoder(chunks, model_config.vocab_size)
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
        """One completion for each prompt; see `Engine`.

        Token t of a response is drawn with the uniform number of (seed, t). Log-probs are those of the distribution
        sampled from, after temperature and filters; under `greedy`, of the softmax at `temperature` (1 unless set).

        Raises:
            ConfigError: a prompt or seed that cannot work, found before any communication.
            FloatingPointError: the model gives NaN; on all ranks.
        """
        check_requests(prompt_ids, seeds, self._vocab_size, self._max_sequence_length)
        order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))  # the first wave needs most memory
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self._max_batch_size):
            wave = order[start : start + self._max_batch_size]
            results = self._wave([prompt_ids[i] for i in wave], sampling, [seeds[i] for i in wave])
            completions.update(zip(wave, results, strict=True))
        return [completions[i] for i in range(len(prompt_ids))]

    def _wave(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """Decode prompts together, in blocks of steps; rows that have ended leave between blocks."""
        count, longest = len(prompts), max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        limits = (self._max_sequence_length - lengths).clamp(max=sampling.max_new_tokens)
        steps = int(limits.max())
        tokens = torch.full((count, steps), self._pad_id)
        logprobs = torch.zeros(count, steps)
        rows = torch.arange(count)  # the prompt that each of the decoder's rows answers
        padded = torch.tensor([prompt + [self._pad_id] * (longest - len(prompt)) for prompt in prompts])
        logits = self._decoder.prefill(padded.to(device.device()), lengths.to(device.device()), longest + steps)
        for start in range(0, steps, _BLOCK):
            stop = min(start + _BLOCK, steps)
            uniforms = counter_uniform(torch.tensor(seeds)[rows, None], torch.arange(start, stop)).to(device.device())
            drawn, scores = [], []
            for step in range(start, stop):
                token, logprob = self._choose(logits, uniforms[:, step - start], sampling)
                drawn.append(token)
                scores.append(logprob)
                if step + 1 < stop:
                    logits = self._decoder.step(token)
            tokens[rows, start:stop] = torch.stack(drawn, 1).cpu()
            logprobs[rows, start:stop] = self._from_last_stage(torch.stack(scores, 1)).cpu()
            ended = (tokens[rows, start:stop] == self._eos_id).any(1) | (limits[rows] <= stop)
            if ended.all():
                break
            if ended.any():
                order = self._decoder.keep((~ended).nonzero().flatten().tolist())
                rows, token = rows[order], token[order]
            logits = self._decoder.step(token)
        if not torch.isfinite(logprobs).all():
            raise FloatingPointError(f"the model of weight version {self._version} gives NaN or infinite log-probs")
        results = zip(tokens.tolist(), logprobs.tolist(), limits.tolist(), strict=True)
        return [self._completion(*result) for result in results]

    def _choose(self, logits: Tensor | None, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        """The next token of each row [n], known to all stages, and its log-prob [n], known to the last."""
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
        stopped = self._eos_id in tokens[:limit]
        length = tokens.index(self._eos_id) + 1 if stopped else limit
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        return Completion(tokens[:length], logprobs[:length], reason, self._version)
