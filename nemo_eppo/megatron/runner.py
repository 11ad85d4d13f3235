"""Forward passes and updates of one model over all ranks of a job.

Inputs and outputs are the *global* batch, the same on every rank. Rows are dealt to data-parallel replicas by length,
cut into micro-batches that are padded to their longest row or packed without padding, run through Megatron's pipeline
schedule, and put back in order. So layout, micro-batch size, padding and packing change no result beyond rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from nemo_eppo.megatron import device
from nemo_eppo.megatron.energy import EnergyProbe, EnergyProbes
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.packing import Packing, balanced_packs

Rows = dict[str, Tensor]
LossFunction = Callable[[Tensor, Rows], tuple[Tensor, dict[str, Tensor]]]
"""(model output [b, s, C], rows of the micro-batch) -> (loss, sums to report).

The loss is divided by the *global* denominator, so that the losses of all micro-batches and ranks add up."""
RowReducer = Callable[[Tensor, Rows], Tensor]
"""(outputs [b, S, C] as `infer` gives them, rows of the micro-batch) -> [b, k], the numbers kept of each row."""


@dataclass(frozen=True)
class _MicroBatch:
    """Rows of one forward pass: for losses cut to the longest row, for the model padded further or packed."""

    indices: Tensor
    rows: Rows
    shape: tuple[int, int]
    """Shape of the model's input: [B, S], with padding that losses do not see, or [1, n] of packed rows."""
    packing: Packing | None

    @property
    def tokens(self) -> Tensor:
        """Token ids [*shape]."""
        return self._per_token(self.rows["tokens"], 0)

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward pass beside tokens and positions."""
        inputs: dict[str, Any] = {"packed_seq_params": self.packing.params if self.packing else None}
        if "targets" in self.rows:
            inputs["labels"] = self._per_token(self.rows["targets"], IGNORE)
        if "seeds" in self.rows:
            inputs["seeds"] = self._per_token(self.rows["seeds"].unsqueeze(1).expand_as(self.rows["tokens"]), 0)
        return inputs

    def padded(self, output: Tensor) -> Tensor:
        """Return the model's output [*shape, C] as [b, s, C]."""
        rows, width = self.rows["tokens"].shape
        return output[:rows, :width] if self.packing is None else self.packing.unpack(output)

    def to_width(self, output: Tensor, width: int) -> Tensor:
        """Return the model's output as [b, width, C], 0 beyond each row's length."""
        output = self.padded(output)[:, :width]
        inside = torch.arange(output.size(1), device=output.device) < self.rows["lengths"].unsqueeze(1)
        return nn.functional.pad(torch.where(inside.unsqueeze(-1), output, 0), (0, 0, 0, width - output.size(1)))

    def _per_token(self, padded: Tensor, fill: int) -> Tensor:
        """[b, s] -> [*shape]."""
        if self.packing is not None:
            return self.packing.pack(padded, fill)
        rows, width = self.shape
        return nn.functional.pad(padded, (0, width - padded.size(1), 0, rows - len(padded)), value=fill)


class ModelRunner:
    """Runs a model's chunks; with an optimizer it also trains them.

    Args:
        chunks: what `build_model` returned, wrapped by `wrap_data_parallel` if it is to be trained.
        micro_batch_size: rows per forward pass.
        micro_batch_tokens: pack rows without padding into micro-batches of at most this many tokens, or of one longer
            row; None for padded micro-batches of `micro_batch_size`.
    """

    def __init__(
        self,
        chunks: list[Any],
        micro_batch_size: int,
        *,
        micro_batch_tokens: int | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
        probe: EnergyProbe | EnergyProbes | None = None,
    ) -> None:
        self.chunks, self.micro_batch_size, self.micro_batch_tokens = chunks, micro_batch_size, micro_batch_tokens
        self.optimizer, self.scheduler, self.probe = optimizer, scheduler, probe
        self.config = unwrap(chunks[0]).config
        self._schedule = get_forward_backward_func()
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        self._replicas = parallel_state.get_data_parallel_group()

    @torch.no_grad()
    def infer(
        self, tokens: Tensor, lengths: Tensor, targets: Tensor | None = None, *, outputs: int, energies: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run a forward pass over the global batch.

        Args:
            tokens: [N, S]; lengths: [N] real tokens per row; targets: [N, S] next tokens for a policy.
            outputs: C, how many numbers per token the model gives.
            energies: also read the energy probe.

        Returns:
            outputs [N, S, C] and energies [N, S, E] or None, fp32 in CPU memory, 0 beyond each row's length, equal on
            every rank.

        Raises:
            ValueError: a token is not in the model's vocabulary.
        """
        rows: Rows = {"tokens": tokens, "lengths": lengths}
        if targets is not None:
            rows["targets"] = targets
        probe = self.probe if energies else None
        if energies and probe is None:
            raise RuntimeError("energies were asked for, but this runner has no energy probe")
        batches = self._inference_batches(rows)
        shapes = [batch.shape for batch in batches]
        with probe.recording() if probe else nullcontext():
            parts = self._collect(batches, lambda _, output: output, shapes, outputs)
        if probe and batches:
            parts = [torch.cat(pair, dim=-1) for pair in zip(parts, probe.collect(shapes), strict=True)]
        width = outputs + (probe.energies_per_token() if probe else 0)
        full_rows = (batch.to_width(part, tokens.size(1)) for batch, part in zip(batches, parts, strict=True))
        result = self._assemble(batches, full_rows, *tokens.shape, width)
        return result[..., :outputs], result[..., outputs:] if probe else None

    @torch.no_grad()
    def infer_rows(self, rows: Mapping[str, Tensor], reduce: RowReducer, *, outputs: int) -> Tensor:
        """Run a forward pass over the global batch and keep a few numbers of each row.

        Only the last pipeline stage ever holds the model's outputs of every token.

        Args:
            rows: as in `train_step`.
            reduce: see RowReducer; it runs on the last pipeline stage.
            outputs: k, how many numbers per row `reduce` gives.

        Returns:
            [N, k], fp32 in CPU memory, equal on every rank.

        Raises:
            ValueError: a token is not in the model's vocabulary.
        """
        count, width = rows["tokens"].shape
        batches = self._inference_batches(rows)

        def read(batch: _MicroBatch, output: Tensor) -> Tensor:
            return reduce(batch.to_width(output.float(), width), batch.rows)

        parts = self._collect(batches, read, [(len(batch.indices),) for batch in batches], outputs)
        return self._assemble(batches, parts, count, outputs)

    def train_step(
        self, rows: Mapping[str, Tensor], loss_function: LossFunction, *, group: int = 1
    ) -> dict[str, float]:
        """Make one optimizer update on a global mini-batch.

        Args:
            rows: tensors [N, ...]; "tokens" and "lengths" are required. Tensors whose second dimension is S or S - 1
                are cut to the micro-batch's longest row. A policy reads "targets" [N, S], the next tokens, and a head
                that draws random numbers "seeds" [N].
            loss_function: see LossFunction; it runs on the last pipeline stage.
            group: number of consecutive rows that stay in one micro-batch; `micro_batch_size` then counts groups.

        Returns:
            the reported sums over the whole mini-batch, "loss", "grad_norm" and "lr", the same on every rank.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite; nothing was updated.
            ValueError: a token is not in the model's vocabulary, or there are too few rows for the layout.
        """
        self._check_tokens(rows["tokens"])
        dealt = self._deal(rows["lengths"], group)
        for micro_batches in dealt:  # every rank checks all replicas, so that all fail if one has too few
            if len(micro_batches) % self._batch_multiple or not micro_batches:
                raise ValueError(
                    f"tokens: {len(rows['tokens'])} rows cannot fill the micro-batches of {len(dealt)} data-parallel "
                    f"replicas: one would get {len(micro_batches)}, expected a multiple of {self._batch_multiple}"
                )
        batches = self._cut(rows, dealt[self._replicas.rank()])
        self._set_training(True)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scale = len(batches) * self._replicas.size()  # Megatron divides by both; our losses are global sums already

        def loss(batch: _MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, report = loss_function(batch.padded(output), batch.rows)
            return value * scale, {"loss": value.detach(), **report}

        reports = self._run(batches, lambda batch: partial(loss, batch), forward_only=False)
        sums = self._sum_reports(reports)
        # the parts of Megatron's own step, which would apply a NaN before reporting it
        self.optimizer.prepare_grads()
        sums["grad_norm"] = float(self.optimizer.get_grad_norm())
        if not all(math.isfinite(value) for value in sums.values()):
            raise FloatingPointError(f"a loss or gradient is not finite, nothing was updated: {sums}")
        for part in self.optimizer.chained_optimizers:
            if part.config.clip_grad and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, sums["grad_norm"])
        self.optimizer.step_with_ready_grads()
        sums["lr"] = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(1)
        return sums

    def _set_training(self, mode: bool) -> None:
        for chunk in self.chunks:
            if chunk.training != mode:  # `train` visits all modules
                chunk.train(mode)

    def _inference_batches(self, rows: Mapping[str, Tensor]) -> list[_MicroBatch]:
        """Cut this replica's micro-batches, repeating the last to fill all stages; none if it gets no rows."""
        self._check_tokens(rows["tokens"])
        mine = self._deal(rows["lengths"])[self._replicas.rank()]
        return self._cut(rows, mine + mine[-1:] * (-len(mine) % self._batch_multiple))

    def _collect(
        self,
        batches: list[_MicroBatch],
        read: Callable[[_MicroBatch, Tensor], Tensor],
        shapes: Sequence[tuple[int, ...]],
        width: int,
    ) -> list[Tensor]:
        """Run the model; `read` each output on the last stage, and return these results [*shape, width] fp32 on all."""
        if not batches:
            return []
        self._set_training(False)

        def make(batch: _MicroBatch) -> Callable[..., Tensor]:
            return lambda output, non_loss_data: read(batch, output).float()

        collected = self._run(batches, make, forward_only=True)
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.zeros(sum(sizes), width, device=device.device())
        if parallel_state.is_pipeline_last_stage():
            flat = torch.cat([part.reshape(size, width) for part, size in zip(collected, sizes, strict=True)])
        if self._stages.size() > 1:
            dist.broadcast(flat, parallel_state.get_pipeline_model_parallel_last_rank(), group=self._stages)
        return [part.view(*shape, width) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    def _assemble(self, batches: list[_MicroBatch], parts: Iterable[Tensor], *shape: int) -> Tensor:
        """Put the rows of all replicas' micro-batches back in order, [*shape] fp32 in CPU memory."""
        result = torch.zeros(shape, device=device.device())
        for batch, part in zip(batches, parts, strict=True):
            result[batch.indices.to(part.device)] = part
        if self._replicas.size() > 1:
            dist.all_reduce(result, group=self._replicas)
        return result.cpu()

    def _run(
        self, batches: list[_MicroBatch], make_loss: Callable[[_MicroBatch], Any], forward_only: bool
    ) -> list[Any]:
        """Run Megatron's schedule over the micro-batches; return what the last stage's loss functions reported."""

        def forward_step(batch_iterator: Iterator[_MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
            batch = next(batch_iterator)
            tokens = batch.tokens
            positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
            return model(tokens, positions, None, **batch.model_inputs()), make_loss(batch)

        iterators = [iter(batches) for _ in self.chunks]
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].shape[1],
            micro_batch_size=batches[0].shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    @property
    def _batch_multiple(self) -> int:
        """The number of micro-batches must be a multiple of this: the interleaved schedule has to fill all stages."""
        return self._stages.size() if len(self.chunks) > 1 else 1

    def _deal(self, lengths: Tensor, group: int = 1) -> list[list[Tensor]]:
        """Return the row indices of each micro-batch of each replica, with equal work for replicas.

        Where groups are fewer than replicas or micro-batches, some get none.
        """
        replicas, sizes = self._replicas.size(), lengths.view(-1, group)
        rows = torch.arange(len(lengths)).view(-1, group)
        if self.micro_batch_tokens is not None:
            packs = balanced_packs(
                sizes.sum(1).tolist(),
                self.micro_batch_tokens,
                replicas * self._batch_multiple,
                self.config.hidden_size,
            )
            return [[rows[pack].flatten() for pack in packs[replica::replicas] if pack] for replica in range(replicas)]
        order = rows[torch.argsort(sizes.amax(1), descending=True, stable=True)]
        return [self._split(order[replica::replicas]) for replica in range(replicas)]

    def _split(self, share: Tensor) -> list[Tensor]:
        """Split a replica's row indices [groups, group] into the indices of its micro-batches."""
        rounds = -(-len(share) // (self.micro_batch_size * self._batch_multiple))
        parts = share.tensor_split(rounds * self._batch_multiple) if rounds else ()
        return [part.flatten() for part in parts if len(part)]

    def _check_tokens(self, tokens: Tensor) -> None:
        # tensor-parallel embeddings give zeros, not an error, for an id outside the vocabulary
        vocab_size, low, high = unwrap(self.chunks[0]).description.vocab_size, int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"tokens: id {low if low < 0 else high}; expected ids from 0 to {vocab_size - 1}")

    def _cut(self, rows: Mapping[str, Tensor], micro_batches: Sequence[Tensor]) -> list[_MicroBatch]:
        """Cut micro-batches, given as row indices, out of the global batch.

        Lengths are rounded up to the device's multiple. All micro-batches get the largest shape in a pipeline, whose
        stages do not exchange shapes, and on a GPU if they are packs, since its kernels plan anew for every shape and
        packs are of about equal size. Elsewhere this would only add padding.
        """
        multiple = device.tokens_multiple()
        if self.config.sequence_parallel:
            multiple = math.lcm(multiple, self.config.tensor_model_parallel_size)
        shapes = []
        for indices in micro_batches:
            lengths = rows["lengths"][indices]
            count, size = (len(indices), lengths.max()) if self.micro_batch_tokens is None else (1, lengths.sum())
            shapes.append((count, -(-int(size) // multiple) * multiple))
        packs_on_gpu = self.micro_batch_tokens is not None and device.tokens_multiple() > 1
        if shapes and (packs_on_gpu or self._stages.size() > 1):
            counts, sizes = zip(*shapes, strict=True)
            shapes = [(max(counts), max(sizes))] * len(shapes)
        return [self._micro_batch(rows, indices, shape) for indices, shape in zip(micro_batches, shapes, strict=True)]

    def _micro_batch(self, rows: Mapping[str, Tensor], indices: Tensor, shape: tuple[int, int]) -> _MicroBatch:
        full, lengths = rows["tokens"].size(1), rows["lengths"][indices]
        size, batch = int(lengths.max()), {}
        for name, value in rows.items():
            picked = value[indices]
            if value.dim() > 1 and value.size(1) in (full, full - 1):
                picked = picked[:, : size - (full - value.size(1))]
            batch[name] = picked.to(device.device()).contiguous()
        packing = None if self.micro_batch_tokens is None else Packing(lengths, size, shape[1])
        return _MicroBatch(indices, batch, shape, packing)

    def _sum_reports(self, reports: list[dict[str, Tensor]]) -> dict[str, float]:
        names = [sorted(reports[0])] if parallel_state.is_pipeline_last_stage() else [None]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        if self._stages.size() > 1:
            dist.broadcast_object_list(names, last, group=self._stages)
        keys: list[str] = names[0] or []
        sums = torch.zeros(len(keys), dtype=torch.float64, device=device.device())
        for report in reports:
            sums += torch.stack([report[key].detach().to(sums) for key in keys])
        if self._stages.size() > 1:
            dist.broadcast(sums, last, group=self._stages)
        if self._replicas.size() > 1:
            dist.all_reduce(sums, group=self._replicas)
        return dict(zip(keys, sums.tolist(), strict=True))
