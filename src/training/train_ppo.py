"""Stage 3: PPO against the reward model, held near the SFT model by a KL penalty.

    python src/training/train_ppo.py -n demo -a sft_demo -c rm_demo             # offline
    python src/training/train_ppo.py -n hh -b 2 -a sft_hh -c rm_hh --config gpt2-medium/lora --dataset rm-static

What it does: sample at --temperature until EOS; per-token reward -beta * (log pi - log pi_ref), the score on the last
token; GAE; advantages whitened over the whole rollout; --ppo-epochs passes with clipped policy and value losses; critic
started from the reward model.
What it does not do: top-k or top-p sampling (samples must come from the distribution whose log-probabilities are used),
score padding.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, from whatever folder the script is started

from config.command_line import parse_cli  # noqa: E402
from config.configs import PPOConfig  # noqa: E402
from config.user_error import UserError, run_main  # noqa: E402
from models.weights.checkpoint import describe  # noqa: E402
from training.engine.runtime import Runtime  # noqa: E402
from training.memory.preflight import fit, preflight  # noqa: E402
from training.start import Roles, describe_model, ppo_start, prompt_limit, row_limit, template_of  # noqa: E402
from training.storage.recorded import recorded_settings  # noqa: E402
from training.storage.resuming import find_resumption, open_run  # noqa: E402
from training.trainers import PPOTrainer  # noqa: E402
from utils.dataset import load_dataset  # noqa: E402
from utils.reward_function import load_reward_function  # noqa: E402
from utils.runs.origins import record_origins  # noqa: E402
from utils.tokenizer import load_tokenizer  # noqa: E402


def main() -> int:
    """Parse, seed, models, data, trainer, fit."""
    config = parse_cli(PPOConfig, recorded=recorded_settings)
    resumption = find_resumption("ppo", config)
    config = preflight(config, resumption)
    if config.plan:
        return 0
    reward_fn = load_reward_function(config.reward_fn, "--reward-fn") if config.reward_fn else None
    eval_reward_fn = load_reward_function(config.eval_reward_fn, "--eval-reward-fn") if config.eval_reward_fn else None
    runtime = Runtime.of(config)
    roles = ppo_start(config, resumption, runtime.matrix_dtype)
    tokenizer, template = load_tokenizer(roles.sft), template_of(roles.sft)
    limit, prompts = row_limit(config, roles.actor), prompt_limit(config, roles.actor)
    options = {"max_prompt_length": prompts, "skip_bad_rows": config.skip_bad_rows, "template": template}
    splits = {s: load_dataset(config.dataset, "ppo", s, tokenizer, limit, **options) for s in ("train", "validation")}
    for data in splits.values():
        print(data.report.summary())
    report_reward_model(roles, config)
    report_kept(config)
    origins = record_origins(sft=roles.sft, rm=roles.rm)
    run = open_run("ppo", config, roles.actor, runtime, resumption, splits["train"], origins)
    print(
        f"{roles.actor.config.name} from {roles.sft} on {runtime.describe()}; shared between the roles: "
        f"{roles.shared_bytes / 1e6:.1f} MB"
    )
    trainer = PPOTrainer(
        config, roles.actor, roles.critic, runtime.place(roles.reference),
        roles.reward_model and runtime.place(roles.reward_model), tokenizer, splits["train"], splits["validation"], run,
        runtime, describe_model("ppo", tokenizer, template, str(roles.sft)), reward_fn, eval_reward_fn,
        resumption and resumption.state,
    )  # fmt: skip
    return fit(trainer, config)


def report_reward_model(roles: Roles, config: PPOConfig) -> None:
    """Say how good the reward is before hours are spent on it."""
    if roles.reward_model is None:
        print("reward: --reward-fn alone")
        return
    description = describe(roles.rm)
    held_out, normalised = description.get("held_out"), description.get("normalised")
    for record, keys in ((held_out, {"accuracy", "longer_wins"}), (normalised, {"step", "temperature"})):
        if record and not (isinstance(record, dict) and keys <= set(record)):
            names = " and ".join(sorted(keys))
            raise UserError(f"{roles.rm}: model.json has a record without {names}; take another checkpoint")
    gain, bias = roles.reward_model.normalisation
    if not held_out:
        print(f"warning: {roles.rm} records no held-out accuracy; PPO optimises whatever it learned")
    else:
        accuracy, longer = held_out["accuracy"], held_out["longer_wins"]
        baseline = max(longer, 1 - longer)
        print(
            f"reward model: held-out accuracy {accuracy:.3f} (chance 0.500, longest or shortest wins {baseline:.3f}), "
            f"gain {gain:.3f}, bias {bias:.3f}"
        )
        if accuracy <= max(0.5, baseline):
            print("warning: the reward model is no better than chance or answer length; PPO on it will not help")
    if not normalised or normalised["step"] != description["step"]:
        print(
            "warning: the scores of this checkpoint were not normalised after its last step; --kl-coef and the value "
            "clip assume mean 0 and deviation 1. Take final/ or best/ of the run"
        )
    elif normalised["temperature"] != config.temperature:
        print(
            f"warning: the reward was normalised on samples at temperature {normalised['temperature']}, PPO samples at "
            f"{config.temperature}; its scores will not start at mean 0 and deviation 1"
        )


def report_kept(config: PPOConfig) -> None:
    """Say what can be looked at after the run, while that can still be changed."""
    gold = "score, KL and gold reward" if config.eval_reward_fn else "score and KL (gold reward: --eval-reward-fn)"
    print(
        f"kept for later: held-out {gold} every {config.eval_every} iterations (--eval-every); the newest "
        f"{config.keep} of a checkpoint every {config.save_every} (--keep, --save-every), best/ and final/"
    )


if __name__ == "__main__":
    run_main(main)
