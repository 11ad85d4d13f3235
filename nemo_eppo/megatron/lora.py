"""LoRA (arXiv 2106.09685): low-rank adapters beside frozen linear layers, y = W x + (alpha / rank) B A x.

An adapter lies next to its linear in the tree of modules and adds to the linear's output, so that names and weights of
the base model do not change. Where a linear splits its output over tensor-parallel ranks, B is split and A is whole;
where it splits its input, A is split and B is whole. Only tensors as wide as the adapter's rank are communicated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.norms import rms_norm
from nemo_eppo.settings.model import LoRAConfig, LoRATarget

_SPLIT_OUTPUT = ("linear_qkv", "linear_fc1")
SUFFIX = "_lora"
"""A linear's name with this suffix is the name of its adapter, a module beside it."""


class Adapter(nn.Module):
    """Holds A and B beside one linear of this rank, both zero until they are initialised or loaded."""

    def __init__(self, linear: Any, target: LoRATarget, config: LoRAConfig, model_config: Any) -> None:
        super().__init__()
        self.enabled = True
        self._linear = (linear,)  # a tuple, so that torch does not make it a part of this module
        self._target, self._scale = target, config.alpha / config.rank
        self._splits_output = target in _SPLIT_OUTPUT
        self._sequence_parallel, self._norm_epsilon = model_config.sequence_parallel, model_config.layernorm_epsilon
        self._norm_plus_one = model_config.layernorm_zero_centered_gamma
        outputs, inputs = linear.weight.shape
        self.a = nn.Parameter(linear.weight.new_zeros(config.rank, inputs))
        self.b = nn.Parameter(linear.weight.new_zeros(outputs, config.rank))
        split, whole = (self.b, self.a) if self._splits_output else (self.a, self.b)
        set_tensor_model_parallel_attributes(split, True, 0 if self._splits_output else 1, 1)
        # each rank applies the whole factor to its part of the sequence only: Megatron sums its gradients
        whole.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]
        # before the linear's other hooks, so that an energy probe reads the sum
        self.hook = linear.register_forward_hook(self._add, prepend=True)

    @property
    def weight(self) -> Tensor:
        """Return the linear's own weight, this rank's shard."""
        weight: Tensor = self._linear[0].weight
        return weight

    def _add(self, linear: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        """Return the linear's output, with the adapter's added, and its bias; None changes nothing."""
        if not self.enabled:
            return None
        x = args[0]
        if hasattr(linear, "layer_norm_weight"):  # TransformerEngine fuses the norm before a linear into it
            x = rms_norm(x, linear.layer_norm_weight, self._norm_epsilon, self._norm_plus_one)
        low = F.linear(x, self.a) * self._scale
        if self._splits_output and self._sequence_parallel:
            low = gather_from_sequence_parallel_region(low)
        elif self._splits_output:
            low = copy_to_tensor_model_parallel_region(low)
        elif self._sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        return output[0] + F.linear(low, self.b), output[1]

    def local(self, x: Tensor) -> Tensor:
        """Return this rank's addition to its linear's output for normed inputs [..., in / tp or in], for generation.

        Where the linear splits its input, the caller sums it over the ranks, together with the linear's own output.
        """
        return F.linear(F.linear(x, self.a) * self._scale, self.b)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return a copy of the linear's weight plus, while `enabled`, the adapter's, added in fp32."""
        weight = self.weight.detach()
        if not self.enabled:
            return weight.clone()
        return (weight.float() + self._scale * self.b.float() @ self.a.float()).to(weight.dtype)

    @torch.no_grad()
    def initialise(self, seed: int, layer: int) -> None:
        """Set B to zero, which leaves the model's outputs as they are, and A to random numbers.

        They depend on seed, layer and target, not on the layout.
        """
        digest = hashlib.sha256(f"{seed} {layer} {self._target}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        group = parallel_state.get_tensor_model_parallel_group()
        parts = 1 if self._splits_output else group.size()
        inputs = self.a.size(1) * parts
        whole = torch.randn(self.a.size(0), inputs, generator=generator) * inputs**-0.5
        self.a.copy_(whole.chunk(parts, dim=1)[group.rank() % parts])
        self.b.zero_()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Describe how A and B lie over the ranks, so that a checkpoint can be loaded in another layout."""
        assert metadata is not None
        shards = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"b": 0} if self._splits_output else {"a": 1},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self._target == "linear_fc1":  # gate rows, then up rows, on each rank
            shards[f"{prefix}b"] = apply_swiglu_sharded_factory(shards[f"{prefix}b"], sharded_offsets)
        return shards


def _linears(chunks: Sequence[Any]) -> Iterator[tuple[Any, LoRATarget, int]]:
    """Yield every linear that can have an adapter: its parent module, its name there, its layer counted from 1."""
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            for parent, targets in (
                (layer.self_attention, ("linear_qkv", "linear_proj")),
                (layer.mlp, ("linear_fc1", "linear_fc2")),
            ):
                for target in targets:
                    yield parent, target, layer.layer_number  # type: ignore[misc]


def adapters(chunks: Sequence[Any]) -> Iterator[Adapter]:
    """Yield this rank's adapters."""
    for parent, target, _ in _linears(chunks):
        if hasattr(parent, target + SUFFIX):
            yield getattr(parent, target + SUFFIX)


def attach(chunks: Sequence[Any], config: LoRAConfig) -> None:
    """Put adapters, all zero, beside the linears of a model that has none."""
    if any(True for _ in adapters(chunks)):
        raise RuntimeError("the model has adapters already")
    for parent, target, _ in _linears(chunks):
        if target in config.targets:
            setattr(parent, target + SUFFIX, Adapter(getattr(parent, target), target, config, parent.config))
    for chunk in chunks:
        unwrap(chunk).lora = config


def attached(chunks: Sequence[Any]) -> LoRAConfig | None:
    """Return the settings of the model's adapters; None if it has none."""
    return getattr(unwrap(chunks[0]), "lora", None)


@torch.no_grad()
def merge(chunks: Sequence[Any]) -> None:
    """Add the adapters to the weights beside them, and remove them."""
    for parent, target, _ in _linears(chunks):
        adapter = getattr(parent, target + SUFFIX, None)
        if adapter is not None:
            adapter.weight.copy_(adapter.merged_weight())
            adapter.hook.remove()
            delattr(parent, target + SUFFIX)
    for chunk in chunks:
        unwrap(chunk).lora = None


def train_adapters(chunks: Sequence[Any], config: LoRAConfig) -> None:
    """Attach fresh adapters and freeze everything else but heads; collective, before DDP and the optimizer exist."""
    seed = [torch.initial_seed()]
    dist.broadcast_object_list(seed)  # pipeline stages have seeds of their own
    attach(chunks, config)
    for parent, target, layer in _linears(chunks):
        if target in config.targets:
            getattr(parent, target + SUFFIX).initialise(seed[0], layer)
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f"{SUFFIX}." in name or name.startswith("head."))
        if model.pre_process and model.config.recompute_granularity is not None:
            model.embedding.register_forward_hook(_require_gradients)


def _require_gradients(embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
    # activation recomputation gives a layer's adapters no gradients if the layer's input needs none
    return output.requires_grad_() if torch.is_grad_enabled() else output


class AdaptersOff:
    """The frozen reference of a policy with adapters: the same model without them, so that no copy is kept."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._adapters = list(adapters(chunks))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the block with the base weights alone."""
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for adapter in self._adapters:
            adapter.enabled = enabled
