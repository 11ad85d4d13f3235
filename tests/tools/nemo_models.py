"""Models as NeMo and NeMo-Aligner save them: Megatron-core's own modules, by its own saving, under their names."""

from pathlib import Path
from typing import Any

import nemo_eppo.megatron  # noqa: F401  # has to come before megatron.core

# isort: split
import torch
import torch.nn.functional as F
import yaml
from hf_models import batch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.settings.model import ParallelConfig

ROWS = 72  # 61 tokens of the tokenizer, padded as NeMo does
# as in NeMo's megatron_llama_config.yaml, with some of what it says of training
LLAMA: dict[str, Any] = {
    "mcore_gpt": True,
    "encoder_seq_length": 64,
    "max_position_embeddings": "${.encoder_seq_length}",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-6,
    "bias": False,
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": False,
    "apply_query_key_layer_scaling": True,
    "transformer_block_type": "pre_ln",
    "precision": "bf16",
    "data": {"data_prefix": "${nowhere}"},
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model.MegatronGPTSFTModel",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rotary_base": 5e5},
    "llama, stretched": {"seq_len_interpolation_factor": 2.5, "num_query_groups": None},
    "qwen2": {"qkv_bias": True, "share_embeddings_and_output_weights": True},
    "mistral": {"kv_channels": 12, "window_size": [3, 0]},
    "reward": {"output_sequence": False, "use_avg_pool": False, "scale_positional_embedding": True},
}
REWARD = LLAMA | MODELS["reward"]


class NemoModule(GPTModel):
    """Megatron-core's model with RMSNorm, as NeMo sets it up; with `rewards` it has NeMo-Aligner's head, too."""

    def __init__(self, config: dict[str, Any], rewards: bool, *, stage: int = 0, stages: int = 1) -> None:
        transformer = TransformerConfig(
            num_layers=config["num_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["ffn_hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_query_groups"],
            kv_channels=config["kv_channels"],
            normalization="RMSNorm",
            layernorm_epsilon=config["layernorm_epsilon"],
            add_bias_linear=False,
            add_qkv_bias=config.get("qkv_bias", False),
            gated_linear_unit=True,
            activation_func=F.silu,
            window_size=tuple(config["window_size"]) if "window_size" in config else None,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            masked_softmax_fusion=False,
            use_cpu_initialization=True,
            pipeline_model_parallel_size=stages,
            pipeline_dtype=torch.float32,
            tensor_model_parallel_size=torch.distributed.get_world_size() // stages,
        )
        super().__init__(
            transformer,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=ROWS,
            max_sequence_length=config["encoder_seq_length"],
            position_embedding_type="rope",
            rotary_base=config.get("rotary_base", 10000),
            seq_len_interpolation_factor=config.get("seq_len_interpolation_factor"),
            share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
            parallel_output=False,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
        )
        if rewards:
            self.rm_head = RowParallelLinear(
                config["hidden_size"],
                1,
                config=transformer,
                init_method=transformer.init_method,
                bias=True,
                input_is_parallel=False,
                skip_bias_add=False,
            )

    @torch.no_grad()
    def results(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> logits [b, s, ROWS], or scores [b, s]."""
        size = tokens.size(1)
        mask = torch.ones(size, size, dtype=torch.bool).triu(1)[None, None]
        positions = torch.arange(size).expand_as(tokens)
        if not hasattr(self, "rm_head"):
            return self(tokens, positions, mask)
        self.post_process = False  # the hidden states instead of logits
        return self.rm_head(self(tokens, positions, mask))[0].squeeze(-1).T


def make_nemo(root: Path) -> dict[str, Tensor]:
    """Save every model with random weights as NeMo does; its results."""
    initialize(ParallelConfig(), seed=0)
    results = {}
    for name, changes in MODELS.items():
        module = NemoModule(LLAMA | changes, name == "reward")
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter_name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(1 + 0.3 * noise if "norm" in parameter_name else 0.15 * noise)
        results[name] = module.results(batch()[0])
        write_nemo(root / name, module.sharded_state_dict(prefix="model."), LLAMA | changes)
    return results


def write_nemo(directory: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    weights = directory / "model_weights"
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(weights))
    (directory / "model_config.yaml").write_text(yaml.safe_dump(config))


def resave(root: Path, target: Path, layout: dict[str, int]) -> None:
    """Save models again from two ranks, with a tensor of an optimizer beside, as a training's checkpoints have it."""
    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=0)
    rank, stages = torch.distributed.get_rank(), parallel.pipeline_model_parallel_size
    for name in ("llama", "qwen2"):
        module = NemoModule(LLAMA | MODELS[name], False, stage=rank % stages, stages=stages)
        stored = dist_checkpointing.load(module.sharded_state_dict(prefix="model."), str(root / name / "model_weights"))
        module.load_state_dict({key.removeprefix("model."): value for key, value in stored.items()})
        state = module.sharded_state_dict(prefix="model.")
        moment = "optimizer.state.exp_avg.model.decoder.final_layernorm.weight"
        state[moment] = ShardedTensor.from_rank_offsets(moment, torch.zeros(32), replica_id=rank)
        write_nemo(target / name, state, LLAMA | MODELS[name])


def make_bf16(root: Path) -> dict[str, Tensor]:
    initialize(ParallelConfig(), seed=0)
    module = NemoModule(REWARD, True).bfloat16()
    head = module.rm_head.float()
    head.bias.data.fill_(0.3)
    write_nemo(root / "reward", module.sharded_state_dict(prefix="model."), REWARD)
    return {
        "score.weight": head.weight,
        "score.bias": head.bias,
        "model.norm.weight": module.decoder.final_layernorm.weight,
    }
