"""Architectures that this package does not know, through NVIDIA's Megatron-Bridge where that is installed."""

import importlib.util
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.conversion.hf_weights import UnsupportedArchitecture


def import_with_bridge(source: Path, output: Path, reason: UnsupportedArchitecture) -> None:
    """Have Megatron-Bridge make its checkpoint of a Hugging Face directory: for Megatron-LM and NeMo, not for the jobs
    of this package, which build the architectures they know.

    Raises:
        ConfigError: it is not installed; the message begins with `reason`.
    """
    if importlib.util.find_spec("megatron.bridge") is None:
        raise ConfigError(
            f"{reason}; others are converted by Megatron-Bridge, which is not installed (package megatron-bridge; it "
            "needs TransformerEngine, and comes with NVIDIA's NeMo containers)"
        ) from None
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(str(source), str(output))
