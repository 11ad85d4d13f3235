"""Generation with the trainer's own Megatron weights: nothing is copied, converted or sent when they change.

Under pipeline parallelism there are up to as many lanes as stages, each with a batch and a cache of its own, so that a
stage works on other lanes while one's newest tokens pass through the other stages.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_eppo.algorithms.choices import Distribution
from nemo_eppo.algorithms.sampling import counter_uniform, filter_logits, repetition_slopes, sample_tokens
from nemo_eppo.generation.decoder import Decoder, DecodingAttention, Outputs
from nemo_eppo.generation.engine import EngineLimits, check_requests
from nemo_eppo.generation.replay import Recorder
from nemo_eppo.generation.stops import Stops
from nemo_eppo.megatron import device
from nemo_eppo.megatron.collectives import sibling
from nemo_eppo.megatron.logprobs import columns_of
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams

_BLOCK = 8 if device.on_gpu() else 2  # tokens per row between reads of the sampled tokens, each a wait for the GPU
_NUMBERS = 2  # log-prob and entropy, which come before a token's energies


class MegatronEngine:
    """An `Engine` over the chunks of a policy; the constructor is collective over the job.

    All ranks of a replica call `generate` with the same input and get the same completions. Replicas are independent:
    each may have prompts of its own, or none.

    Args:
        chunks: what `build_model(..., head="lm")` returned, wrapped or not.
        energy: the energies that completions get, and with them entropies; None for neither.
        record, attention: see `Decoder`.
    """

    def __init__(
        self,
        chunks: list[Any],
        limits: EngineLimits,
        energy: EnergyProbeConfig | None = None,
        record: Recorder | None = None,
        attention: DecodingAttention | None = None,
    ) -> None:
        model = unwrap(chunks[0]).description
        limits.check(model)
        self._limits, self._vocab_size, self._reads = limits, model.vocab_size, energy is not None
        self._stages = unwrap(chunks[0]).pp_group
        if self._stages.size() > 1:
            # sampled tokens get a group of their own, so that hidden states of other lanes do not wait for them
            self._stages = sibling(self._stages)
        self._lanes = [Decoder(chunks, energy, record, attention) for _ in range(self._stages.size())]
        self._version = 0

    def refit(self, named_weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """The weights are the trainer's own: only their version is new, and `named_weights` is not read."""
        self._version = version

    def sleep(self) -> None:
        """Free the caches and return their memory to the device: training's small tensors would fragment it."""
        for decoder in self._lanes:
            decoder.release()
        device.empty_cache()

    def close(self) -> None:
        """Free the caches."""
        self.sleep()

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
        limits = [min(longest - len(prompt), sampling.max_new_tokens) for prompt in prompt_ids]
        work = _Work(
            prompt_ids,
            torch.tensor(seeds),
            [_Response(limit) for limit in limits],
            waiting=sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i])),
            distribution=sampling.distribution(stops.ids),
            greedy=sampling.greedy,
            stops=stops,
        )
        columns = _BLOCK + max(len(prompt) + limit for prompt, limit in zip(prompt_ids, limits, strict=True))
        running = []
        for decoder in self._lanes[: -(-len(prompt_ids) // at_once)]:
            decoder.start(columns)
            running.append(self._answer_prompts(decoder, work))
        while running:  # in the same order on all ranks
            running = [lane for lane in running if next(lane, "ended") is None]
        return [response.completion(self._version, self._reads) for response in work.responses]

    def _answer_prompts(self, decoder: Decoder, work: "_Work") -> Iterator[None]:
        """Answer prompts until none waits. Yields, to let other lanes run, while a token comes from the last stage."""
        batch: _Batch | None = None
        while work.waiting or batch:
            free = self._limits.max_batch_size - (len(batch.rows) if batch else 0)
            if work.waiting and free:
                joining = [work.waiting.pop() for _ in range(min(len(work.waiting), free))]
                new = self._begin(decoder, joining, work)
                batch = new if batch is None else batch.joined(new)
            assert batch is not None
            responses = [work.responses[i] for i in batch.rows]
            lengths = torch.tensor([len(response.tokens) for response in responses])
            steps = lengths[:, None] + torch.arange(min(_BLOCK, max(response.left for response in responses)))
            uniforms = counter_uniform(work.seeds[batch.rows, None], steps).to(device.device())
            early = (steps < work.distribution.min_new_tokens).to(device.device())
            token, tokens, read = yield from self._decode(decoder, batch, uniforms, early, work)
            for response, ids, passes in zip(responses, tokens.tolist(), read, strict=True):
                response.take(ids, passes, work.stops)
            batch = self._advance(decoder, batch, token, work.responses)

    def _begin(self, decoder: Decoder, joining: list[int], work: "_Work") -> "_Batch":
        """Add the prompts of the requests `joining` to the decoder's rows; equal ones are computed once."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in joining:
            groups.setdefault(tuple(work.prompts[i]), []).append(i)
        repeated = [number for number, group in enumerate(groups.values()) for _ in group[1:]]
        rows = [group[0] for group in groups.values()] + [i for group in groups.values() for i in group[1:]]
        prompts = list(groups)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = [torch.tensor(prompt) for prompt in prompts]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self._limits.pad_id)
        seen = None
        if work.distribution.repetition_penalty != 1.0:
            seen = torch.zeros(len(rows), self._vocab_size, dtype=torch.bool)
            for row, i in zip(seen, rows, strict=True):
                row[work.prompts[i]] = True
            seen = seen.to(device.device())
        return _Batch(rows, decoder.add(padded, lengths, repeated), seen)

    def _advance(
        self, decoder: Decoder, batch: "_Batch", token: Tensor, responses: list["_Response"]
    ) -> "_Batch | None":
        """Drop the rows whose responses have ended, and run the decoder on the newest `token` [n] of the others.

        If energies are read, an ended response's last token is run as well, since its energies are not known yet.
        """
        kept = [row for row, i in enumerate(batch.rows) if not responses[i].ended or responses[i].unread(self._reads)]
        order = decoder.keep(kept)
        if not order:
            return None
        batch = batch.reordered(order, decoder.step(token[order]))
        if all(not responses[i].ended for i in batch.rows):
            return batch
        last = nn.functional.pad(self._summed(batch.outputs.energies.clone()).cpu(), (_NUMBERS, 0))
        for i, read in zip(batch.rows, last.split(1), strict=True):
            if responses[i].ended:
                responses[i].read.append(read)
        order = decoder.keep([row for row, i in enumerate(batch.rows) if not responses[i].ended])
        return batch.reordered(order, batch.outputs.select(order)) if order else None

    def _decode(
        self, decoder: Decoder, batch: "_Batch", uniforms: Tensor, early: Tensor, work: "_Work"
    ) -> Generator[None, None, tuple[Tensor, Tensor, Tensor]]:
        """Decode some more tokens of each row. Yields while a token comes from the last stage.

        Args:
            uniforms: fp64 [n, steps], the random numbers of the next tokens.
            early: bool [n, steps], true where the response is still too short to end.

        Returns:
            the last token [n]; on the host, all tokens [n, steps] and their numbers [n, steps, _NUMBERS + E].
        """
        tokens: list[Tensor] = []
        read: list[Tensor] = []
        outputs, seen = batch.outputs, batch.seen
        for step, (uniform, too_early) in enumerate(zip(uniforms.unbind(1), early.unbind(1), strict=True)):
            if step:
                outputs = decoder.step(tokens[-1])
            logits = outputs.logits
            if logits is not None:
                logits = _sampling_logits(logits, too_early, seen, work.distribution)
            token, numbers = self._choose(logits, uniform, work.greedy)
            if self._stages.size() > 1:
                last = self._stages.size() - 1
                broadcast = dist.broadcast(token, group=self._stages, group_src=last, async_op=True)
                yield
                broadcast.wait()
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            tokens.append(token)
            read.append(torch.cat([numbers, outputs.energies], -1))
        all_numbers = self._summed(torch.stack(read, 1)).cpu()
        if not torch.isfinite(all_numbers).all():
            raise FloatingPointError(
                f"the model of weight version {self._version} gives NaN or infinite log-probs or energies"
            )
        return tokens[-1], torch.stack(tokens, 1).cpu(), all_numbers

    def _choose(self, logits: Tensor | None, uniforms: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        """Choose the next token of each row. Return it [n] with its log-prob and, if it is read, its distribution's
        entropy [n, _NUMBERS]; except on the last stage, these are 0 and the token is undefined."""
        numbers = torch.zeros(len(uniforms), _NUMBERS, device=uniforms.device)
        if logits is None:
            token = torch.empty(len(uniforms), dtype=torch.int64, device=uniforms.device)
        else:
            token = logits.argmax(-1) if greedy else sample_tokens(logits, uniforms)
            logprobs = logits.log_softmax(-1)
            numbers[:, 0] = logprobs.gather(-1, token[:, None])[:, 0]
            if self._reads:
                numbers[:, 1] = torch.special.entr(logprobs.exp_()).sum(-1)
        return token, numbers

    def _summed(self, parts: Tensor) -> Tensor:
        """Add up the numbers of all pipeline stages, in place."""
        if self._stages.size() > 1:
            dist.all_reduce(parts, group=self._stages)
        return parts


@dataclass(frozen=True)
class _Work:
    """Requests and responses of one call of `generate`, shared by the lanes."""

    prompts: list[list[int]]
    seeds: Tensor
    """int64, one for each prompt."""
    responses: list["_Response"]
    waiting: list[int]
    """Prompts, by number, that wait for a row; the last, and longest, are next."""
    distribution: Distribution
    greedy: bool
    stops: Stops


@dataclass
class _Batch:
    """The requests in the n rows of a decoder."""

    rows: list[int]
    """Number of the request that each row answers."""
    outputs: Outputs
    """Outputs at the latest token of each row."""
    seen: Tensor | None
    """bool [n, V]: whether a token is in prompt or response so far; None if repetition is not penalised."""

    def joined(self, new: "_Batch") -> "_Batch":
        """Return these rows followed by the new ones."""

        def both(x: Tensor | None, y: Tensor | None) -> Any:
            return None if x is None or y is None else torch.cat([x, y])

        outputs = map(both, self.outputs, new.outputs)
        return _Batch(self.rows + new.rows, Outputs(*outputs), both(self.seen, new.seen))

    def reordered(self, order: list[int], outputs: Outputs) -> "_Batch":
        """Return the rows with these numbers, in this order, with the outputs of their latest tokens."""
        return _Batch([self.rows[row] for row in order], outputs, None if self.seen is None else self.seen[order])


@dataclass
class _Response:
    """One response while it is decoded."""

    limit: int
    """Largest number of tokens."""
    tokens: list[int] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    """Parts [p, _NUMBERS + E]: row t has numbers of response token t and energies of the token before it."""
    reason: FinishReason = FinishReason.LENGTH
    ended: bool = False

    @property
    def left(self) -> int:
        """Number of tokens that it may still get."""
        return self.limit - len(self.tokens)

    def take(self, tokens: list[int], read: Tensor, stops: Stops) -> None:
        """Append tokens up to the response's end, and what was read."""
        seen = len(self.tokens)
        self.tokens += tokens[: self.left]
        self.read.append(read)
        end = stops.end(self.tokens, seen)
        if end is not None:
            self.reason = FinishReason.STOP
            del self.tokens[end:]
        self.ended = end is not None or not self.left

    def unread(self, reads: bool) -> bool:
        """Whether energies are read (`reads`) and those of the newest token are not known: it has not been run."""
        return reads and sum(map(len, self.read)) == len(self.tokens)

    def completion(self, version: int, reads: bool) -> Completion:
        read, size = torch.cat(self.read), len(self.tokens)
        entropies, energies = (read[:size, 1].clone(), read[: size + 1, _NUMBERS:].clone()) if reads else (None, None)
        return Completion(self.tokens, read[:size, 0].clone(), self.reason, version, entropies, energies)


def _sampling_logits(logits: Tensor, early: Tensor, seen: Tensor | None, distribution: Distribution) -> Tensor:
    """Turn the model's logits [n, V] into those of the distribution; `early` [n] as in `_decode`."""
    if seen is not None:
        logits = logits * repetition_slopes(logits, seen, distribution.repetition_penalty)
    if distribution.min_new_tokens:
        barred = torch.zeros_like(logits, dtype=torch.bool)
        barred[:, columns_of(distribution.ending, 0, logits.size(1), logits.device)] = early[:, None]
        logits = logits.masked_fill(barred, -torch.inf)
    if distribution.temperature != 1.0:
        logits = logits / distribution.temperature
    if distribution.top_k or distribution.top_p < 1.0:
        logits = filter_logits(logits, distribution.top_k, distribution.top_p)
    return logits
