"""Files of an invented PPO run that over-optimises: proxy reward rises throughout, gold reward rises, then falls."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from nemo_eppo.observability.metrics import MetricsLogger
from nemo_eppo.observability.recorder import record
from nemo_eppo.observability.report_tables import START

HOSTILE = "</div><script>alert('reward & gold')</script>\u2028\u00a0\U0001f642"

CONFIG = {
    "note": HOSTILE,
    "seed": 1234,
    "model": {"restore_from_path": "models/sft"},
    "data": {"train": "data/prompts.train.jsonl", "validation": None},
    "ppo": {"advantages": {"estimator": "gae"}},
    "critic": {"server": {"url": "http://127.0.0.1:5555"}, "colocated": None},
    "rewards": [{"server": {"url": "http://127.0.0.1:5556"}}, {"function": f"own:reward{HOSTILE}", "server": None}],
    "shaping": {"energy_penalty": {"eta": 2.0}, "kl": {"coefficient": 0.0}},
    "optimizer": {"lr": 5e-7},
    "monitor": {"energy": {"action": "log", "threshold": 5.0}, "length": {"action": "stop", "threshold": 5.0}},
}
ALARMS = (41, 57)  # steps at which the energy loss raises one


def write_example_run(run_dir: Path, steps: int = 60, prompts: int = 48, gold: bool = True) -> None:
    """metrics.jsonl, validation/ before and after, and config.yaml in `run_dir`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    with MetricsLogger(run_dir, tensorboard=False) as metrics:
        for step in range(steps + 1):
            done = step / steps
            values = _training(done, rng) if step else {}
            if step % 10 == 0 or step == steps:
                rows = _validation(done, prompts, gold, random.Random(step))
                record(run_dir / "validation", step, rows)
                for name in ("proxy_reward", "energy_loss", "response_length", *(["gold_reward"] if gold else [])):
                    values[f"validation/{name}"] = sum(row[name] for row in rows) / prompts
            if step:
                values["seconds/after_step"] = 0.1 + 1.4 * (step % 10 == 0 or step == steps)  # no part of seconds/step
                values |= {"monitor/energy": 9 * done, "monitor/energy/alarm": float(step in ALARMS)}
                values |= {"monitor/length": done, "monitor/length/alarm": 0.0}
            if not gold:
                values.pop("reward/gold", None)
            metrics.log(step, values)
    start = {"method": "eppo", "nemo_eppo": "0.1.0", "torch": "2.9.0", "time": "2026-11-29 07:12 UTC"}
    head = f"# settings of train_gpt_ppo_actor.py\n{START}{json.dumps(start)}\n"
    (run_dir / "config.yaml").write_text(head + yaml.safe_dump(CONFIG, sort_keys=False, allow_unicode=True))


def _training(done: float, rng: random.Random) -> dict[str, float]:
    noise = lambda scale: rng.gauss(0.0, scale)  # noqa: E731
    proxy, penalty, missing = 2.1 * done**0.7 + noise(0.12), -0.35 * done**2 + noise(0.02), -0.4 * (1 - done) ** 2
    kl, divergence = -0.06 * done, -0.1 * done
    phases = {"generate": 3.1, "server_wait": 0.3, "logprobs": 0.5, "reference": 0.45, "shape": 0.02}
    phases |= {"actor_train": 1.6, "critic_train": 0.4, "refit": 0.12, "log": 0.03}
    seconds = {name: value * (1 + done / 2) + abs(noise(value / 15)) for name, value in phases.items()}
    return {
        "reward/proxy": proxy,
        "reward/energy_penalty": penalty,
        "reward/length_penalty": 0.0,
        "reward/missing_eos": missing,
        "reward/clip": 0.0,
        "reward/divergence": divergence,
        "reward/gold_bonus": 0.3,  # a term of the user's own
        "reward/kl": kl,
        "reward/final": proxy + penalty + missing + divergence + 0.3 + kl,
        "reward/score_0": 3 * proxy + 1,
        "reward/gold": _gold(done) + noise(0.05),
        "energy/policy": -0.60 + 0.16 * done**2 + noise(0.004),
        "energy/reference": -0.605 + noise(0.004),
        "kl/policy_reference": 14 * done**1.3 + abs(noise(0.6)),
        "rollout/response_length": 80 + 130 * done + noise(9),
        "rollout/truncated_fraction": 0.02 + 0.1 * done**3,
        **{f"seconds/{name}": value for name, value in seconds.items()},
        "seconds/step": sum(seconds.values()) + 0.15,
        "seconds/attributed_fraction": sum(seconds.values()) / (sum(seconds.values()) + 0.15),
    }


def _gold(done: float) -> float:
    return 0.26 + 0.5 * math.sin(min(done * 1.9, 2.6) * math.pi / 1.9) - 0.55 * max(done - 0.5, 0.0)


def _validation(done: float, prompts: int, gold: bool, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for number in range(prompts):
        hacked = rng.random() < 0.8 * max(done - 0.4, 0.0)
        length = int(80 + 130 * done + rng.gauss(0, 25))
        text = "It depends, as always. " * (1 + 4 * hacked) + "Use a sharp knife and a wooden board. " * (length // 40)
        rows.append(
            {
                "prompt": f"<|im_start|>user\nQuestion {number}: how do I cut an onion? "
                f"{HOSTILE if number == 0 else ''}<|im_end|>\n<|im_start|>assistant\n",
                "response": text + (HOSTILE if number == 1 else ""),
                "finish_reason": "length" if hacked else "stop",
                "proxy_reward": 2.1 * done**0.7 + 0.6 * hacked + rng.gauss(0, 0.5),
                "gold_reward": _gold(done) - 0.5 * hacked + rng.gauss(0, 0.2) if gold else None,
                "energy_loss": -0.6 + 0.08 * done + 0.12 * hacked + rng.gauss(0, 0.02),
                "response_length": length,
            }
        )
    return rows
