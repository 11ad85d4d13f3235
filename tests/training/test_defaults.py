"""Each default stands in one place: what the YAML files show is what the schemas say."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Lt
from pydantic_core import PydanticUndefined

from nemo_eppo.config import Config, config_types
from nemo_eppo.settings.critic import CriticConfig
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig
from nemo_eppo.settings.reward_model import RewardServerConfig, RewardTrainingConfig
from nemo_eppo.settings.training import SFTConfig

CONF = Path(__file__).parents[2] / "conf"
JOBS_OWN = {  # what sets the jobs apart, and so has another value than the schema that they share
    "energy.cache",
    "exp_manager.name",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "server.port",
}


def differences(
    schema: type[Config], values: Mapping[str, Any], path: str = "", whole: Config | None = None
) -> Iterator[str]:
    """Keys whose value in the file is not the default of the schema that has one, or of the section `whole`."""
    for name, value in values.items():
        field = schema.model_fields[name]
        default = field.get_default(call_default_factory=True, validated_data={})
        if whole is not None:
            default = getattr(whole, name)
        if isinstance(value, Mapping):
            section = default if isinstance(default, Config) else None
            yield from differences(config_types(field.annotation)[0], value, f"{path}{name}.", section)
            continue
        if default is PydanticUndefined or isinstance(value, list):
            continue
        if str(getattr(default, "value", default)) != str(value):
            yield f"{path}{name}"


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        ("gpt_sft", SFTConfig),
        ("gpt_reward_model", RewardTrainingConfig),
        ("serve_reward_model", RewardServerConfig),
        ("gpt_ppo_critic", CriticConfig),
        ("gpt_ppo_actor", PPOConfig),
        ("gpt_reference_energies", ReferenceEnergiesConfig),
    ],
)
def test_yaml_and_schema_agree(file: str, schema: type[Config]) -> None:
    values = yaml.safe_load((CONF / f"{file}.yaml").read_text())
    values.pop("defaults", None)
    values["model"].pop("restore_from_path")
    assert set(differences(schema, values)) <= JOBS_OWN


@pytest.mark.parametrize("schema", [CriticConfig, PPOConfig, ReferenceEnergiesConfig, RewardTrainingConfig, SFTConfig])
def test_seeds_of_all_jobs_have_the_same_bounds(schema: type[Config]) -> None:
    assert schema.model_fields["seed"].metadata == [Ge(ge=0), Lt(lt=2**31)]
