"""What sets small models of Gemma 2, Phi-3 and Mistral apart from a Llama of the same size, as settings of ModelConfig.

Windows are shorter than the tests' sequences, and caps so low that most scores and logits feel them.
"""

from typing import Any

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
MISTRAL: dict[str, Any] = {"sliding_window": 3}
