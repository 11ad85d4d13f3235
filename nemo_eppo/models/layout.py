"""The layout of a model over a job's ranks, and its checks."""

from pydantic import Field, model_validator

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.models.families import family_of
from nemo_eppo.models.model_config import ModelConfig


class ParallelConfig(Config):
    """How one job's model is laid out; data parallelism takes the rest of the world size."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share every weight matrix."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline rank (interleaved schedule); null for one."""
    sequence_parallel: bool = False
    """Also split activations outside attention and MLP over the tensor-parallel ranks."""

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel = true needs tensor_model_parallel_size > 1")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        return self

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the replicas of the model in a job of `world_size` ranks; ConfigError if they do not fill it."""
        if world_size % self.model_parallel_size:
            raise ConfigError(
                f"world size {world_size} is not divisible by tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size} x pipeline_model_parallel_size {self.pipeline_model_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def check_update(self, name: str, rows: int, world_size: int) -> None:
        """Raise ConfigError if `rows` per update, the setting `name`, cannot fill all replicas and stages equally."""
        replicas, stages = self.data_parallel_size(world_size), self.pipeline_model_parallel_size
        if rows % replicas:
            raise ConfigError(f"{name} = {rows} is not divisible by {replicas} replicas")
        if self.virtual_pipeline_model_parallel_size and rows // replicas < stages:
            raise ConfigError(
                f"{name} = {rows}: expected at least {replicas * stages}, so that every replica has a row for each of "
                f"{stages} interleaved stages"
            )


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
