"""Stage 3: PPO against the reward model, held near the SFT model by a KL penalty.

    python src/training/train_ppo.py -n demo -a sft_demo -c rm_demo                 # offline
    python src/training/train_ppo.py -n hh -b 2 -a sft_hh -c rm_hh --config gpt2-medium/lora --dataset rm-static

What it does: sample at --temperature until EOS; per-token reward -beta * (log pi - log pi_ref), the score on the last token; GAE;
advantages whitened over the whole rollout; --ppo-epochs passes with clipped policy and value losses; critic started from the reward model.
What it does not do: top-k or top-p sampling (samples must come from the distribution whose log-probabilities are used), score padding.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, from whatever folder the script is started

from config.configs import PPOConfig, parse_cli  # noqa: E402
from config.user_error import UserError, run_main  # noqa: E402
from models.checkpoint import describe  # noqa: E402
from training.runtime import Runtime  # noqa: E402
from training.start import Roles, describe_model, find_resumption, open_run, ppo_start, row_limit, template_of  # noqa: E402
from training.trainers import PPOTrainer  # noqa: E402
from utils.dataset import load_dataset  # noqa: E402
from utils.reward_function import load_reward_function  # noqa: E402
from utils.tokenizer import load_tokenizer  # noqa: E402


def main() -> int:
    """Parse, seed, models, data, trainer, fit."""
    config = parse_cli(PPOConfig)
    resumption = find_resumption("ppo", config)
    reward_fn = load_reward_function(config.reward_fn, "--reward-fn") if config.reward_fn else None
    eval_reward_fn = load_reward_function(config.eval_reward_fn, "--eval-reward-fn") if config.eval_reward_fn else None
    runtime = Runtime(config.device, config.dtype, config.seed)
    roles = ppo_start(config, resumption)
    tokenizer, template = load_tokenizer(roles.sft), template_of(roles.sft)
    limit = row_limit(config, roles.actor)
    prompt_limit = config.prompt_length or limit - config.response_length
    if prompt_limit < 1 or prompt_limit + config.response_length > limit:
        raise UserError(
            f"--response-length {config.response_length}: prompts of {prompt_limit} tokens and responses do not fit {limit} tokens"
        )
    options = {"max_prompt_length": prompt_limit, "skip_bad_rows": config.skip_bad_rows, "template": template}
    splits = {s: load_dataset(config.dataset, "ppo", s, tokenizer, limit, **options) for s in ("train", "validation")}
    for data in splits.values():
        print(data.report.summary())
    report_reward_model(roles)
    run = open_run("ppo", config, roles.actor, resumption, {"sft": str(roles.sft), "rm": str(roles.rm or "")})
    print(
        f"{roles.actor.config.name} from {roles.sft} on {runtime.describe()}; shared between the roles: {roles.shared_bytes / 1e6:.1f} MB"
    )
    trainer = PPOTrainer(
        config, roles.actor, roles.critic, runtime.place(roles.reference), roles.reward_model and runtime.place(roles.reward_model),
        tokenizer, splits["train"], splits["validation"], run, runtime, describe_model("ppo", tokenizer, template, str(roles.sft)),
        reward_fn, eval_reward_fn, resumption and resumption.state,
    )  # fmt: skip
    return trainer.fit()


def report_reward_model(roles: Roles) -> None:
    """Say how good the reward is before hours are spent on it."""
    if roles.reward_model is None:
        print("reward: --reward-fn alone")
        return
    held_out = describe(roles.rm).get("held_out", {})
    gain, bias = roles.reward_model.normalisation
    if not held_out:
        print(f"warning: {roles.rm} records no held-out accuracy; PPO optimises whatever it learned")
        return
    accuracy, longer = held_out["accuracy"], held_out["longer_wins"]
    baseline = max(longer, 1 - longer)
    print(
        f"reward model: held-out accuracy {accuracy:.3f} (chance 0.500, longest or shortest wins {baseline:.3f}), gain {gain:.3f}, bias {bias:.3f}"
    )
    if accuracy <= max(0.5, baseline):
        print("warning: the reward model is no better than chance or answer length; PPO on it will not help")
    if (gain, bias) == (1.0, 0.0):
        print(
            "warning: the reward model was never normalised; --kl-coef and the value clip assume scores of mean 0 and deviation 1"
        )


if __name__ == "__main__":
    run_main(main)
