"""Activations and dtypes by their names in a model's settings."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nemo_eppo.settings.model import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
