"""Stage 2: the reward model.

    python src/training/train_rm.py -n demo -p sft_demo                         # offline
    python src/training/train_rm.py -n hh -b 2 -p sft_hh --config gpt2-medium/lora --dataset rm-static

What it does: one score per completion, read at its EOS; -log sigmoid of the score differences of all pairs of a prompt,
every completion forwarded once; one epoch; then a fixed affine gives the scores of SFT samples mean 0 and deviation 1,
as PPO needs them.
What it does not do: average over positions, train a second epoch, use dropout.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, from whatever folder the script is started

from config.command_line import parse_cli  # noqa: E402
from config.configs import RMConfig  # noqa: E402
from config.user_error import run_main  # noqa: E402
from training.engine.runtime import Runtime  # noqa: E402
from training.memory.preflight import fit, preflight  # noqa: E402
from training.reward_scale import RewardScale  # noqa: E402
from training.start import describe_model, prompt_limit, rm_start, row_limit  # noqa: E402
from training.storage.recorded import recorded_settings  # noqa: E402
from training.storage.resuming import find_resumption, open_run  # noqa: E402
from training.trainers import RewardModelTrainer  # noqa: E402
from utils.dataset import load_dataset  # noqa: E402
from utils.runs.origins import record_origins  # noqa: E402


def main() -> int:
    """Parse, seed, model, data, trainer, fit."""
    config = parse_cli(RMConfig, recorded=recorded_settings)
    resumption = find_resumption("rm", config)
    config = preflight(config, resumption)
    if config.plan:
        return 0
    runtime = Runtime.of(config)
    model, sft, tokenizer, template, source = rm_start(config, resumption, runtime.matrix_dtype)
    prompt_limit(config, model)  # room for the samples that the scores are normalised on; told before any work
    options = {"skip_bad_rows": config.skip_bad_rows, "template": template}
    splits = {
        s: load_dataset(config.dataset, "rm", s, tokenizer, row_limit(config, model), **options)
        for s in ("train", "validation")
    }
    for data in splits.values():
        print(data.report.summary())
    RewardScale.check_rows(config.dataset, len(splits["train"]))
    run = open_run("rm", config, model, runtime, resumption, splits["train"], record_origins(sft=source))
    print(f"{model.config.name} from {source} on {runtime.describe()}")
    trainer = RewardModelTrainer(
        config, model, runtime.place(sft), tokenizer, splits["train"], splits["validation"], run, runtime,
        describe_model("rm", tokenizer, template, str(source)), resumption and resumption.state,
    )  # fmt: skip
    return fit(trainer, config)


if __name__ == "__main__":
    run_main(main)
