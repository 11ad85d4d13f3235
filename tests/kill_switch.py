"""Ends a job by SIGKILL in a chosen phase of a PPO step."""

import os
import signal
from typing import Any

from nemo_eppo.models import checkpoint_files
from nemo_eppo.training.critic import CriticService
from nemo_eppo.training.critics import RemoteCritic
from nemo_eppo.training.policy import Policy
from nemo_eppo.training.ppo import PPO

PHASES: dict[str, tuple[Any, str]] = {
    "generate": (Policy, "generate"),
    "critic_train": (RemoteCritic, "train"),
    "actor_train": (PPO, "_train_policy"),
    "save": (checkpoint_files, "complete"),
    "saved": (checkpoint_files, "complete"),
    "critic": (CriticService, "_train"),
}


def arm(phase: str, call: int) -> None:
    """Call number `call` of the phase's function does not return; `save` not even begins to make files final."""
    owner, name = PHASES[phase]
    original, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if calls < call or phase != "save" else None
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)
