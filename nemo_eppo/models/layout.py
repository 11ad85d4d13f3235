"""The layout of a model over a job's ranks, and its checks."""

from nemo_eppo.config import ConfigError
from nemo_eppo.models.families import family_of
from nemo_eppo.settings.model import ModelConfig, ParallelConfig


def check_layout(model: ModelConfig, parallel: ParallelConfig, where: str = "model") -> None:
    """Raise ConfigError, before any model is built, if it has no family or does not divide; names all such settings."""
    family_of(model)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    problems = [
        f"{where}.{name} = {value} is not divisible by {what} = {parts}"
        for name, value, what, parts in (
            ("num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tp),
            ("num_query_groups", model.kv_heads, "tensor_model_parallel_size", tp),
            ("ffn_hidden_size", model.ffn_hidden_size, "tensor_model_parallel_size", tp),
            ("num_layers", model.num_layers, "pipeline (x virtual) stages", chunks),
        )
        if value % parts
    ]
    if problems:
        raise ConfigError("impossible layout:\n" + "\n".join(f"  - {problem}" for problem in problems))
