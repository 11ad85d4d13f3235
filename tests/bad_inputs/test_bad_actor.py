"""Bad settings of the actor, tried as rank 1: the way through NeMo is that of `test_bad_jobs`."""

from pathlib import Path

import pytest
from bad_input import Row, check, command

ACTOR = [
    Row(
        "an unknown method",
        "method=epo",
        r"cannot read the settings .*gpt_ppo_actor\.yaml: In 'gpt_ppo_actor': Could not find 'method/epo'",
    ),
    Row("a number as method", "method=1", "method=1: expected method=NAME, the name of a file in conf/method"),
    Row(
        "a method twice",
        "method=eppo method=ppo",
        "method is given twice on the command line: method=eppo and method=ppo",
    ),
    Row(
        "a method as a key",
        "+method.name=eppo",
        r"method: unknown key \(known keys: exp_manager, seed, model, data, generation, engine, energy, ppo,",
    ),
    Row(
        "a mini-batch that does not divide",
        "ppo.mini_batch_size=3",
        "ppo: rollout_batch_size = 8 x samples_per_prompt = 1 is not divisible by mini_batch_size = 3",
    ),
    Row(
        "more prompts than there are",
        "ppo.rollout_batch_size=64",
        "the data set has 32 examples, fewer than one global batch of 64",
    ),
    Row(
        "a prompt that is too long",
        "data.max_prompt_length=5",
        r"data/prompts\.train\.jsonl:1: 11 tokens \(field 'prompt' 11\), but max_prompt_length = 5; shorten it,",
    ),
    Row(
        "more tokens than the window",
        "generation.max_new_tokens=40",
        r"data\.max_prompt_length 16 \+ generation\.max_new_tokens 40 is more than the model's window of 48",
    ),
    Row(
        "no new tokens",
        "generation.max_new_tokens=0",
        r"generation\.max_new_tokens = 0: Input should be greater than 0",
    ),
    Row(
        "a negative temperature",
        "generation.temperature=-1",
        r"generation\.temperature = -1: Input should be greater than 0",
    ),
    Row("top_p above 1", "generation.top_p=1.5", r"generation\.top_p = 1\.5: Input should be less than or equal to 1"),
    Row(
        "greedy rollouts",
        "generation.greedy=true",
        r"settings do not fit together: generation\.greedy = true: PPO has to sample its rollouts",
    ),
    Row(
        "stop strings that are no list",
        "generation.stop_strings=Human",
        r"generation\.stop_strings = 'Human': Input should be a valid list",
    ),
    Row(
        "more least than most new tokens",
        "generation.min_new_tokens=30",
        "generation: min_new_tokens = 30 is more than max_new_tokens = 20",
    ),
    Row(
        "a negative eta",
        "shaping.energy_penalty.eta=-2",
        r"shaping\.energy_penalty\.eta = -2: Input should be greater than or equal to 0",
    ),
    Row(
        "an unknown energy",
        "energy.preset=residual",
        r"energy\.preset = 'residual': Input should be 'paper', 'mlp_block', 'mlp_linears', 'mlp_linears_out'",
    ),
    Row("a layer that there is not", "energy.layers=[7]", r"energy\.layers: 7 is not a layer of a model with 4 layers"),
    Row(
        "an unknown term",
        "shaping.energy_pnalty.eta=2",
        r"shaping\.energy_pnalty: unknown key \(did you mean 'energy_penalty'\?\)",
    ),
    Row(
        "an own term of no module",
        'shaping.terms=[{name:own,term:"nowhere:Term"}]',
        r"shaping\.terms\.own\.term = 'nowhere:Term': expected 'module:Class' \(No module named 'nowhere'\)",
    ),
    Row(
        "an own term that follows none",
        'shaping.terms=[{name:own,term:"nowhere:Term",after:kll}]',
        r"shaping\.terms\.own\.after = 'kll': expected one of proxy, latent_penalty, length_penalty,",
    ),
    Row("lambda without GAE", "method=grpo +ppo.advantages.lam=0.9", r"ppo\.advantages: estimator 'grpo' has no lam"),
    Row(
        "GRPO with one sample",
        "method=grpo ppo.samples_per_prompt=1",
        r"ppo: samples_per_prompt = 1: advantages\.estimator 'grpo' compares the responses to one prompt,",
    ),
    Row(
        "energies of an engine that reads none",
        "ppo.old_logprobs=engine engine.name=tensorrt_llm",
        r"settings do not fit together: ppo\.old_logprobs = 'engine' needs engine\.name = 'megatron', not",
    ),
    Row(
        "weights that would all be too large",
        "ppo.importance_cap=2 generation.top_k=5 engine.name=tensorrt_llm",
        r"importance_cap = 2: TensorRT-LLM's log-probs are those before generation\.top_k = 5 and top_p = 1, so all",
    ),
    Row(
        "a correction of nothing",
        "ppo.old_logprobs=engine ppo.importance_cap=2",
        r"ppo: importance_cap = 2 corrects for the difference between engine and trainer, but with old_logprobs =",
    ),
    Row(
        "GAE without a critic",
        "critic=null",
        r"settings do not fit together: critic = null: ppo\.advantages\.estimator 'gae' needs a critic",
    ),
    Row(
        "a critic without GAE",
        "method=grpo +critic.server.url=grpc://127.0.0.1:5555",
        r"settings do not fit together: critic is set, but ppo\.advantages\.estimator 'grpo' needs none:",
    ),
    Row(
        "a URL of http",
        "critic.server.url=http://127.0.0.1:5555",
        r"critic\.server\.url = 'http://127\.0\.0\.1:5555': expected grpc://HOST:PORT",
    ),
    Row(
        "a URL without port",
        "critic.server.url=grpc://127.0.0.1",
        r"critic\.server\.url = 'grpc://127\.0\.0\.1': expected grpc://HOST:PORT",
    ),
    Row(
        "a port beyond 65535",
        "critic.server.url=grpc://127.0.0.1:99999",
        r"critic\.server\.url = 'grpc://127\.0\.0\.1:99999': expected grpc://HOST:PORT",
    ),
    Row("no rewards", "rewards=[]", r"rewards = \[\]: List should have at least 1 item after validation, not 0"),
    Row(
        "rewards that are no list",
        "rewards=grpc://127.0.0.1:5556",
        r"rewards = 'grpc://127\.0\.0\.1:5556': Input should be a valid list",
    ),
    Row(
        "a reward of two kinds",
        'rewards=[{function:"m:f",colocated:{restore_from_path:rm}}]',
        r"rewards\.0: expected exactly one of server, colocated and function",
    ),
    Row(
        "a function of no module",
        'rewards=[{function:"nowhere:reward"}]',
        r"rewards\[0\]\.function = 'nowhere:reward': expected 'module:function' \(No module named 'nowhere'\)",
    ),
    Row(
        "a function without a module",
        "rewards=[{function:reward}]",
        r"rewards\[0\]\.function = 'reward': expected 'module:function' \(No module named 'reward'\)",
    ),
    Row(
        "a function that its module lacks",
        'rewards=[{function:"json:reward"}]',
        r"rewards\[0\]\.function = 'json:reward': expected 'module:function' \(module 'json' has no attribute",
    ),
    Row(
        "a function that is none",
        'rewards=[{function:"math:pi"}]',
        r"rewards\[0\]\.function = 'math:pi' is not a function",
    ),
    Row(
        "a function whose module does not parse",
        'gold_reward="own:reward"',
        r"gold_reward = 'own:reward': own cannot be imported \(SyntaxError: invalid syntax \(own\.py, line 1\)\)",
        {"own.py": "def reward(:\n"},
    ),
    Row(
        "a function whose module fails",
        'gold_reward="own:reward"',
        r"gold_reward = 'own:reward': own cannot be imported \(ZeroDivisionError: division by zero\)",
        {"own.py": "1 / 0\n"},
    ),
    Row(
        "a function whose module exits",
        'gold_reward="own:reward"',
        r"gold_reward = 'own:reward': own cannot be imported \(SystemExit: 0\)",
        {"own.py": "raise SystemExit(0)\n"},
    ),
    Row(
        "a reward model in the place of the policy",
        "model.restore_from_path=rm",
        r"model\.restore_from_path: rm holds a model with head 'scalar', expected 'lm'",
    ),
    Row(
        "a policy in the place of a reward model",
        "rewards=[{colocated:{restore_from_path:sft}}]",
        r"rewards\[0\]\.colocated\.restore_from_path: sft holds a model with head 'lm', expected 'scalar'",
    ),
    Row(
        "a kind of reward that is not given",
        "reward_kind=odin rewards=[{colocated:{restore_from_path:rm}}]",
        r"reward_kind = 'odin', but rewards\[0\]\.colocated has a reward model of kind 'bradley_terry'",
    ),
    Row(
        "two models and no combination",
        "rewards=[{colocated:{restore_from_path:rm}},{colocated:{restore_from_path:rm}}]",
        r"settings do not fit together: shaping\.combine = 'single', but rewards are of 2 reward models:",
    ),
    Row("no such prompts for validation", "data.validation=nowhere.jsonl", r"nowhere\.jsonl: no such file"),
    Row(
        "the best without validation",
        "checkpoint.best=validation/proxy_reward",
        r"settings do not fit together: checkpoint\.best = 'validation/proxy_reward' needs data\.validation",
    ),
    Row(
        "an unknown engine", "engine.name=vllm", r"engine\.name = 'vllm': Input should be 'megatron' or 'tensorrt_llm'"
    ),
    Row(
        "TensorRT-LLM that is not there",
        "engine.name=tensorrt_llm",
        r"engine\.name = 'tensorrt_llm': .* has no package tensorrt_llm\. Install",
    ),
    Row(
        "a KL penalty that holds nothing back",
        "shaping.kl.coefficient=0.1 shaping.kl.placement=loss",
        r"shaping\.kl: placement 'loss' with estimator 'k1' holds nothing back, its expected gradient is 0",
    ),
    Row(
        "KL in two places",
        "shaping.kl.coefficient=0.1 shaping.divergence.kind=kl",
        r"shaping\.divergence: kind 'kl' with coefficient 0\.0: set both, or neither",
    ),
    Row(
        "an alarm without a gold reward",
        "monitor.disagreement.action=stop",
        r"settings do not fit together: monitor\.disagreement\.against = 'gold' needs gold_reward",
    ),
]


OF_RANK_0 = [
    Row(
        "certificates that are nowhere",
        "critic.server.url=grpc://127.0.0.1:5555 critic.server.certificates=nowhere",
        r"certificates = nowhere: no ca\.pem, cert\.pem, key\.pem; expected ca\.pem, cert\.pem and key\.pem, as",
    ),
]
"""Only rank 0 asks the servers."""


@pytest.mark.parametrize("row", OF_RANK_0, ids=str)
def test_ends_with_one_clear_message_of_rank_0(row: Row, world: Path, directory: Path) -> None:
    check(row, command("train_gpt_ppo_actor", row.command), world, directory)


@pytest.mark.parametrize("row", ACTOR, ids=str)
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, command("train_gpt_ppo_actor", row.command), world, directory, rank=1)
