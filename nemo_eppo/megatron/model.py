"""Megatron models of all jobs: a policy that gives log-probabilities, and models with a scalar head."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor, nn

from nemo_eppo.algorithms.choices import UNCHANGED, Distribution
from nemo_eppo.megatron import device
from nemo_eppo.megatron.heads import ScalarHeads, build_head
from nemo_eppo.megatron.logprobs import History, soft_capped, token_logprobs
from nemo_eppo.megatron.packing import sequence_numbers
from nemo_eppo.megatron.specs import decoder_spec, transformer_config
from nemo_eppo.models.layout import check_layout
from nemo_eppo.models.rope import inverse_frequencies
from nemo_eppo.settings.model import Head, ModelConfig, ParallelConfig, Precision


class _Decoder(GPTModel):
    """Base of both kinds of model: a GPTModel built from `ModelConfig`."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, config: Any, vp_stage: int | None, tied: bool
    ) -> None:
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        super().__init__(
            config,
            decoder_spec(model, config, vp_stage),
            vocab_size=model.padded_vocab_size(parallel.tensor_model_parallel_size),
            max_sequence_length=model.max_sequence_length,
            pre_process=first,
            post_process=last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            vp_stage=vp_stage,
        )
        # megatron-core's RoPE scaling has fixed constants
        self.rotary_pos_emb.inv_freq = inverse_frequencies(model.head_width, model.rotary_base, model.rope_scaling).to(
            self.rotary_pos_emb.inv_freq.device
        )
        self.description = model

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden, *rest = super()._preprocess(*args, **kwargs)
        return (hidden if hidden is None else self.scaled(hidden), *rest)

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Return token embeddings [..., H] as the first layer takes them; the factor is rounded to their dtype."""
        if not self.description.scale_embedding:
            return embeddings
        return embeddings * torch.tensor(self.description.hidden_size**0.5, dtype=embeddings.dtype)


class PolicyModel(_Decoder):
    """A language model; its forward pass with `labels` [b, s] gives log-probability and entropy, [b, s, 2]."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, config: Any, vp_stage: int | None) -> None:
        super().__init__(model, parallel, config, vp_stage, tied=model.tie_embeddings)
        self.distribution = UNCHANGED

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, labels: Tensor | None = None, **rest: Any
    ) -> Tensor:
        softcap = self.description.logit_softcap
        if labels is None or not self.post_process:
            out = super()._postprocess(hidden_states=hidden_states, input_ids=input_ids, labels=labels, **rest)
            return soft_capped(out, softcap) if self.post_process else out
        history = None
        if self.distribution.looks_back:
            history = History(input_ids, sequence_numbers(input_ids, rest["packed_seq_params"]))
        return token_logprobs(
            hidden_states,
            self.projection_weight(),
            labels,
            parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.description.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            distribution=self.distribution,
            softcap=softcap,
            history=history,
        )

    def projection_weight(self) -> Tensor:
        """Return this rank's rows [V / tp, H] of the output projection, which may be the input embedding."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


class ScalarModel(_Decoder):
    """A decoder with a head of `heads.py` instead of the output projection."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        config: Any,
        vp_stage: int | None,
        head: ScalarHeads,
        latent_size: int,
    ) -> None:
        super().__init__(model, parallel, config, vp_stage, tied=False)
        if self.post_process:
            del self.output_layer
            self.head = build_head(head, config, latent_size)

    def forward(self, *inputs: Any, seeds: Tensor | None = None, **rest: Any) -> Tensor:
        """Run GPTModel's forward pass; after the last stage it gives [b, s, outputs] in fp32.

        Args:
            seeds: int64 [b, s], see `heads.py`; None draws no random numbers.
        """
        self._seeds = seeds  # GPTModel's own forward pass does not pass them to the head
        return super().forward(*inputs, **rest)

    def _postprocess(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        return self.head(hidden_states, self._seeds) if self.post_process else hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Describe the shards of all weights; GPTModel's own method needs an output projection."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    head: Head,
    precision: Precision = "fp32",
    recompute: bool = False,
    latent_size: int = 0,
    dropout: float = 0.0,
) -> list[nn.Module]:
    """Build this rank's chunks of the model (one, or one per virtual pipeline stage), with fresh weights.

    Call `runtime.initialize(parallel, ...)` first. In bf16 each chunk is wrapped in Megatron's Float16Module, and heads
    stay in fp32.

    Args:
        recompute: drop the activations of layers and recompute them in the backward pass.
        latent_size: d of the head "inform".
        dropout: share of the residual stream's additions dropped in training; which ones depends on the layout.

    Raises:
        ConfigError: the layout does not fit the model, or this machine's modules cannot compute it.
    """
    check_layout(model, parallel)
    config = transformer_config(model, parallel, precision, recompute)
    config.hidden_dropout = dropout
    stages = parallel.virtual_pipeline_model_parallel_size
    chunks: list[nn.Module] = []
    for stage in range(stages or 1):
        vp_stage = stage if stages else None
        decoder: Any
        if head == "lm":
            decoder = PolicyModel(model, parallel, config, vp_stage).to(device.device())
        else:
            decoder = ScalarModel(model, parallel, config, vp_stage, head, latent_size).to(device.device())
        chunks.append(Float16Module(config, decoder) if precision == "bf16" else decoder)
        if hasattr(decoder, "head"):
            decoder.head.float()
    return chunks


def unwrap(chunk: nn.Module) -> Any:
    """Return the decoder inside Megatron's precision and data-parallel wrappers."""
    while not isinstance(chunk, _Decoder):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def set_distribution(chunks: list[nn.Module], distribution: Distribution) -> None:
    """Choose the distribution whose log-probabilities the policy reports."""
    for chunk in chunks:
        unwrap(chunk).distribution = distribution
