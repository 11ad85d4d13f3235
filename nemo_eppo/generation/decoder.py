"""Incremental decoding with a key-value cache, computed directly on the weights of a Megatron decoder.

No module of the model is called: no hook fires, no training state changes, and a step costs little more than its matrix
products. Every rank of a replica takes part: tensor-parallel ranks add up the outputs of their heads and channels, and
pipeline stages pass hidden states on. Sequence parallelism splits only activations of training, so it is not used.

A row of the cache belongs to one sequence; its columns are the sequence's positions. Sequences join and leave while
others continue, and do not affect each other.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from nemo_eppo.generation.cache import KeyValueCache, rounded
from nemo_eppo.generation.energies import EnergyReader, MLPTensors
from nemo_eppo.generation.layers import Layer, layer_weights, rotate
from nemo_eppo.generation.replay import Recorder, ReplayedSteps
from nemo_eppo.megatron import device
from nemo_eppo.megatron.attention import ALL_BUT_CUDNN, attend
from nemo_eppo.megatron.logprobs import full_logits, soft_capped
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.norms import rms_norm
from nemo_eppo.models.numerics import ACTIVATIONS
from nemo_eppo.settings.energy import EnergyProbeConfig

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 8192  # prompt tokens computed at once: bounds the memory of activations


class Outputs(NamedTuple):
    """Outputs of the model at the latest token of each of n rows."""

    logits: Tensor | None
    """fp32 [n, V] for the next token; None except on the last pipeline stage."""
    energies: Tensor
    """fp32 [n, E]; 0 for layers of other pipeline stages."""

    def select(self, rows: Tensor | list[int]) -> "Outputs":
        """Return the outputs of these rows, in this order."""
        return Outputs(None if self.logits is None else self.logits[rows], self.energies[rows])


class _ChunkOutputs(NamedTuple):
    """Outputs of a chunk of layers."""

    out: Tensor
    """Hidden states [n, s, H]; in a decoding step, the last chunk's are logits [n, V]."""
    energies: Tensor


class _Newest(NamedTuple):
    """One new token of each row, and the columns of the cache that it sees."""

    places: Tensor
    """Where its keys and values go in a layer's cache [n, G, 2, W, D]: row numbers [n * G * 2] of its view [-1, D]."""
    positions: Tensor
    """Position [n] of each new token."""
    longest: int
    """Number of columns that attention reads: those that any row sees, rounded up on a GPU."""
    visible: Tensor | None
    """Mask [n, 1, 1, longest]: 0 where a row sees a column, else -inf; None if all rows see all columns in all layers,
    or for a `DecodingAttention`, which needs none."""
    in_window: Tensor | None
    """The same for layers with a sliding window."""


class DecodingAttention(Protocol):
    """Attention of each row's newest token to the columns of the cache up to its own; see `flash_decode`."""

    def __call__(
        self,
        query: Tensor,
        cache: Tensor,
        positions: Tensor,
        longest: int,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Query [n, G, R, D], cache [n, G, 2, W, D], positions [n] -> [n, G, R, D]."""


class Decoder:
    """Runs a policy's chunks token by token, with a cache of the sequences so far.

    Args:
        chunks: what `build_model(..., head="lm")` returned, wrapped or not.
        energy: the energies that are read; None for none.
        record: records the part of a step between messages from and to other stages, which is then replayed; None for
            no recordings.
        attention: attention of decoding steps; None for `attention_of_device`.
    """

    def __init__(
        self,
        chunks: list[Any],
        energy: EnergyProbeConfig | None = None,
        record: Recorder | None = None,
        attention: DecodingAttention | None = None,
    ) -> None:
        self._models = [unwrap(chunk) for chunk in chunks]
        config, self._description = self._models[0].config, self._models[0].description
        self._dtype, self._hidden_size, self._eps = config.params_dtype, config.hidden_size, config.layernorm_epsilon
        self._heads_per_group = config.num_attention_heads // config.num_query_groups
        self._head_width = config.kv_channels
        self._attention: Any = {"scale": config.softmax_scale, "softcap": self._description.attention_softcap}
        self._tensor_ranks, self.stages = self._models[0].tp_group, self._models[0].pp_group
        self._groups = config.num_query_groups // self._tensor_ranks.size()
        self._activation = ACTIVATIONS[self._description.activation]
        self._reader = None if energy is None else EnergyReader(energy, self._tensor_ranks)
        self._energies_per_token = 0 if energy is None else energy.energies_per_token()
        self._layers = [[layer_weights(layer, energy) for layer in model.decoder.layers] for model in self._models]
        self._decoding_attention = attention or attention_of_device(self._dtype, self._head_width)
        self._record = record
        self._replayed: list[ReplayedSteps] = []
        self._cache = KeyValueCache(list(map(len, self._layers)), self._groups, self._head_width, self._dtype)

    def start(self, columns: int) -> None:
        """Forget all sequences; new ones will have up to `columns` tokens each."""
        self._cache.start(columns)
        self._rotary = self._rotary_table(columns)
        self._columns = torch.arange(rounded(columns), device=device.device())
        self._lengths = torch.zeros(0, dtype=torch.int64)  # tokens of each sequence, on the host
        self._positions = self._lengths.to(device.device())  # the same on the device, read without waiting

    def _make_room(self, columns: int) -> None:
        """Make room in the cache for `columns` tokens per sequence; when it moves, recordings start anew."""
        if self._cache.make_room(rows := len(self._lengths), columns) and self._record is not None:
            advances = [partial(self._advance_at, chunk) for chunk in range(len(self._models))]
            self._replayed = [ReplayedSteps(advance, rows, self._record) for advance in advances]

    @torch.inference_mode()
    def add(self, tokens: Tensor, lengths: Tensor, repeated: list[int]) -> Outputs:
        """Begin sequences in the rows after those in use: one for each of d prompts, and r more that repeat some.

        Args:
            tokens: [d, P] prompts, right padding; on the host, as `lengths` is.
            lengths: [d] tokens of each prompt.
            repeated: the prompt (0 to d - 1) of each of the r further rows; a prompt is computed once.

        Returns:
            outputs of the d + r new rows.
        """
        first, longest = len(self._lengths), tokens.size(1)
        prompt_of = torch.tensor([*range(len(lengths)), *repeated])
        self._lengths = torch.cat([self._lengths, lengths[prompt_of]])
        self._make_room(longest)
        tokens, lengths, prompt_of = (part.to(device.device()) for part in (tokens, lengths, prompt_of))
        self._positions = torch.cat([self._positions, lengths[prompt_of]])
        at_once = max(1, _PREFILL_TOKENS // longest)  # rows
        last_hidden, energies = [], []
        for start in range(0, len(lengths), at_once):
            part = slice(start, start + at_once)
            hidden, read = self._prefill(tokens[part], first + start)
            places = torch.arange(len(read), device=read.device), lengths[part] - 1
            energies.append(read[places])
            if hidden is not None:
                last_hidden.append(hidden[places])
        outputs = Outputs(self._logits(torch.cat(last_hidden)) if last_hidden else None, torch.cat(energies))
        if not repeated:
            return outputs
        others = slice(first + len(tokens), len(self._lengths))
        self._cache.copy(first + prompt_of[len(tokens) :], others, longest)
        return outputs.select(prompt_of)

    def _prefill(self, tokens: Tensor, first: int) -> tuple[Tensor | None, Tensor]:
        """Run prompts [n, P] in n rows of the cache: hidden [n, P, H] on the last stage, energies [n, P, E]."""
        rotary, rows = self._rotary[:, None, : tokens.size(1)], slice(first, first + len(tokens))

        def run_chunk(chunk: int, entering: Tensor | None) -> _ChunkOutputs:
            return self._run_chunk(chunk, tokens, entering, rotary, rows, None)

        return self._run_stages(tokens.shape, run_chunk)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Outputs:
        """Append one token [n] to each row."""
        positions = self._positions
        self._lengths, self._positions = self._lengths + 1, positions + 1
        longest, window = rounded(int(self._lengths.max())), self._description.sliding_window
        self._make_room(longest)
        newest: _Newest | None = None
        if not self._replayed:
            hides = int(self._lengths.min()) < longest or (window is not None and window < longest)
            newest = self._newest(positions, longest, hides)

        def run_chunk(chunk: int, entering: Tensor | None) -> _ChunkOutputs:
            if newest is not None:
                return self._advance(chunk, tokens, newest, entering)
            given = (tokens, positions) if entering is None else (tokens, positions, entering)
            replayed: _ChunkOutputs = self._replayed[chunk](longest, *given)
            return replayed

        return Outputs(*self._run_stages((len(tokens), 1), run_chunk))

    def _advance_at(
        self, chunk: int, longest: int, tokens: Tensor, positions: Tensor, entering: Tensor | None = None
    ) -> _ChunkOutputs:
        return self._advance(chunk, tokens, self._newest(positions, longest, hides=True), entering)

    def _advance(self, chunk: int, tokens: Tensor, newest: _Newest, entering: Tensor | None) -> _ChunkOutputs:
        """Append one token [n] to the first n rows in a chunk's layers; the last chunk gives logits [n, V]."""
        rotary, rows = self._rotary[:, newest.positions[:, None]], slice(len(tokens))
        hidden, energies = self._run_chunk(chunk, tokens[:, None], entering, rotary, rows, newest)
        out = self._logits(hidden[:, 0]) if self._models[chunk].post_process else hidden
        return _ChunkOutputs(out, energies[:, 0])

    def _newest(self, positions: Tensor, longest: int, hides: bool) -> _Newest:
        """Describe new tokens at these positions [n]; `hides`: some row may not see all of the `longest` columns."""
        visible = in_window = None
        if hides and self._decoding_attention is None:
            window = self._description.sliding_window
            columns, places = self._columns[:longest], positions[:, None]
            seen = columns <= places
            # torch's memory-efficient attention needs the queries' dtype
            visible = in_window = torch.where(seen, 0.0, -torch.inf)[:, None, None].to(self._dtype)
            if window is not None:
                in_window = visible.masked_fill((columns <= places - window)[:, None, None], -torch.inf)
        firsts = torch.arange(len(positions) * self._groups * 2, device=positions.device) * self._cache.columns
        places = (firsts.view(len(positions), -1) + positions[:, None]).flatten()
        return _Newest(places, positions, longest, visible, in_window)

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> list[int]:
        """End all sequences except those in these rows (ascending), moving as few as possible.

        Returns:
            The kept rows in their new order.
        """
        size = len(rows)
        if size == len(self._lengths):
            return rows
        holes = sorted(set(range(size)) - set(rows))
        movers = [row for row in rows if row >= size]
        order = list(range(size))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        for hole, mover in zip(holes, movers, strict=True):  # one by one: indexing with lists would copy twice
            self._cache.copy(mover, hole, int(self._lengths[mover]))
        self._lengths, self._positions = self._lengths[order], self._positions[order]
        return order

    def release(self) -> None:
        """Free the cache."""
        self._replayed = []
        self._cache.start(0)

    def _run_stages(
        self, shape: tuple[int, ...], run_chunk: Callable[[int, Tensor | None], _ChunkOutputs]
    ) -> tuple[Tensor | None, Tensor]:
        """Run this rank's chunks: receive hidden states [*shape, H] from the stage before, and send them to the next.

        Args:
            run_chunk: runs a chunk, given its number and the hidden states before it (None for the first chunk).

        Returns:
            the last chunk's output, None on other ranks; energies, 0 for other stages' layers.
        """
        out, parts = None, []
        for chunk, model in enumerate(self._models):
            entering = None
            if not model.pre_process:
                entering = torch.empty(*shape, self._hidden_size, dtype=self._dtype, device=device.device())
                dist.recv(entering, group=self.stages, group_src=(self.stages.rank() - 1) % self.stages.size())
            out, energies = run_chunk(chunk, entering)
            parts.append(energies)
            if not model.post_process:
                dist.send(out, group=self.stages, group_dst=(self.stages.rank() + 1) % self.stages.size())
        return out if self._models[-1].post_process else None, sum(parts[1:], parts[0])

    @sdpa_kernel(ALL_BUT_CUDNN)
    def _run_chunk(
        self,
        chunk: int,
        tokens: Tensor,
        entering: Tensor | None,
        rotary: Tensor,
        rows: slice,
        newest: _Newest | None,
    ) -> _ChunkOutputs:
        """Run a chunk's layers on tokens [b, s], filling these b rows of its cache; `entering` becomes the output.

        Returns:
            hidden [b, s, H]; energies [b, s, E], 0 for layers of other chunks.
        """
        model, hidden = self._models[chunk], entering
        if hidden is None:
            hidden = model.scaled(self._embed(tokens, model.embedding.word_embeddings.weight))
        energies = torch.zeros(*tokens.shape, self._energies_per_token, device=tokens.device)
        for layer, columns_of_layer in zip(self._layers[chunk], self._cache.chunks[chunk], strict=True):
            entered = self._reader.l1(hidden) if self._reader and layer.energies else None
            self._attend(hidden, layer, columns_of_layer[rows], rotary, newest)
            mlp = self._transform(hidden, layer)
            if self._reader and entered is not None:
                for columns in layer.energies:
                    energies[..., columns] = self._reader.read(entered, mlp, hidden)
        return _ChunkOutputs(hidden, energies)

    def _attend(self, hidden: Tensor, layer: Layer, cache: Tensor, rotary: Tensor, newest: _Newest | None) -> None:
        """Add the layer's attention to hidden [b, s, H]; cache [b, G, 2, W, D], rotary [2, b or 1, s, 1, 1, D]."""
        rows, size, _ = hidden.shape
        width, heads = self._head_width, self._heads_per_group
        qkv = layer.qkv(self._norm(hidden, layer.attention_norm))
        qkv = qkv.view(rows, size, self._groups, heads + 2, width)
        query, key = qkv[..., :heads, :], qkv[..., heads, :]
        if layer.q_norm is not None and layer.k_norm is not None:
            query.copy_(self._norm(query, layer.q_norm))
            key.copy_(self._norm(key, layer.k_norm))
        rotate(qkv[..., : heads + 1, :], rotary)
        if newest is not None:
            cache.view(-1, width).index_copy_(0, newest.places, qkv[:, 0, :, heads:].reshape(-1, width))
            if self._decoding_attention is not None:
                seen = (newest.positions, newest.longest)
                out = self._decoding_attention(query[:, 0], cache, *seen, window=layer.window, **self._attention)
            else:
                keys, values = cache[..., : newest.longest, :].unbind(2)
                # `attend` takes the heads of a group as queries of one head
                visible = newest.visible if layer.window is None else newest.in_window
                out = attend(query[:, 0], keys, values, visible, **self._attention)
        else:  # padding comes after the prompt's tokens: a causal mask hides it
            cache[..., :size, :] = qkv[..., heads:, :].permute(0, 2, 3, 1, 4)
            out = attend(
                query.flatten(2, 3).transpose(1, 2),
                key.transpose(1, 2),
                qkv[..., heads + 1, :].transpose(1, 2),
                causal=True,
                window=layer.window,
                **self._attention,
            ).transpose(1, 2)
        out = self._sum(layer.projection(out.reshape(rows, size, -1)))
        hidden += out if layer.after_attention is None else self._norm(out, layer.after_attention)

    def _transform(self, hidden: Tensor, layer: Layer) -> MLPTensors:
        """Add the layer's MLP to hidden [b, s, H]."""
        normed = self._norm(hidden, layer.mlp_norm)
        gate, up = layer.gate_up(normed).chunk(2, -1)
        activated = self._activation(gate).mul_(up)
        out = self._sum(layer.down(activated))
        hidden += out if layer.after_mlp is None else self._norm(out, layer.after_mlp)
        return MLPTensors(normed, gate, up, activated, out)

    def _embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Token ids [b, s], weight [V / tp, H] -> embeddings [b, s, H]."""
        if self._tensor_ranks.size() == 1:
            return F.embedding(tokens, weight)
        local = tokens - self._tensor_ranks.rank() * weight.size(0)
        own = (local >= 0) & (local < weight.size(0))
        return self._sum(torch.where(own[..., None], F.embedding(torch.where(own, local, 0), weight), 0))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] -> fp32 logits [n, V], without the vocabulary's padding."""
        model = self._models[-1]
        logits = full_logits(self._norm(hidden, model.decoder.final_layernorm.weight), model.projection_weight())
        if self._tensor_ranks.size() > 1:
            shards = [torch.empty_like(logits) for _ in range(self._tensor_ranks.size())]
            dist.all_gather(shards, logits, group=self._tensor_ranks)
            logits = torch.cat(shards, -1)
        return soft_capped(logits[:, : self._description.vocab_size], self._description.logit_softcap)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps, self._description.norm_plus_one)

    def _sum(self, partial: Tensor) -> Tensor:
        if self._tensor_ranks.size() > 1:
            dist.all_reduce(partial, group=self._tensor_ranks)
        return partial

    def _rotary_table(self, columns: int) -> Tensor:
        """Return cosines and sines [2, W, 1, 1, D] for `rotate`; sines carry the sign of the rotation."""
        cos, sin = self._models[0].rotary_pos_emb.get_cos_sin(columns)
        table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])[:, :, None, None]
        # TransformerEngine's kernel, if the trainer uses it, rounds once, at the end
        fused = self._models[0].config.apply_rope_fusion
        return table.to(device.device(), torch.float32 if fused else self._dtype)


@cache
def attention_of_device(dtype: torch.dtype, width: int) -> DecodingAttention | None:
    """Return `flash_decode` on a GPU; None, for torch's attention, on a CPU and where Triton cannot compile.

    Args:
        dtype: dtype of the cache.
        width: D, width of a head.
    """
    if not device.on_gpu():
        return None
    try:
        from nemo_eppo.generation.flash_decoding import flash_decode  # Triton comes with torch for GPUs only

        one = torch.zeros(1, 1, 2, 16, width, dtype=dtype, device=device.device())
        flash_decode(one[:, :, 0, :1], one, torch.zeros(1, dtype=torch.int64, device=one.device), 1)
    except Exception as error:  # no C compiler or Python headers: many kinds of errors
        logger.warning("decoding is slower, with torch's attention: Triton cannot make a kernel here (%r)", error)
        return None
    return flash_decode
