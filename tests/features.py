"""What sets small models of some families apart from a Llama of the same size, as settings of ModelConfig.

Windows are shorter than the tests' sequences, caps so low that most scores and logits feel them, and rotary positions
are stretched from so short a length that some channels turn as before, some not, and some in between.
"""

from typing import Any

from nemo_eppo.settings.model import RopeScaling

_STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = RopeScaling(rope_type="linear", factor=2.5)
DYNAMIC = RopeScaling(rope_type="dynamic", factor=2.0)
LLAMA3 = RopeScaling(rope_type="llama3", low_freq_factor=0.1, high_freq_factor=2.0, **_STRETCHED)
YARN = RopeScaling(rope_type="yarn", beta_fast=2.0, beta_slow=0.05, **_STRETCHED)
GEMMA2: dict[str, Any] = {
    "head_dim": 12,
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embedding": True,
    "query_pre_attn_scalar": 20,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "sliding_window": 4,
    "global_layers": (1, 3),
    "tie_embeddings": True,
}
PHI3: dict[str, Any] = {"family": "Phi3", "sliding_window": 5}
MISTRAL: dict[str, Any] = {"sliding_window": 3, "rope_scaling": LINEAR}
QWEN3: dict[str, Any] = {"qk_norm": True, "sliding_window": 4, "global_layers": (0, 1), "rope_scaling": YARN}
