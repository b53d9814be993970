"""Stage 1: supervised fine-tuning.

    python src/training/train_sft.py -n demo                                    # offline: gpt2-nano on the demo, CPU
    python src/training/train_sft.py -n hh -b 2 -p huggingface --config gpt2-medium/dropout --dataset hh-sft

What it does: next-token loss on the response and its EOS only, weighted by token over the whole optimizer step; AdamW,
linear warm-up, cosine decay; length-bucketed batches without packing.
What it does not do: train on the prompt, put an EOS on a cut response.
"""

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, from whatever folder the script is started

from config.command_line import parse_cli  # noqa: E402
from config.configs import SFTConfig, resolved  # noqa: E402
from config.user_error import run_main  # noqa: E402
from training.engine.runtime import Runtime  # noqa: E402
from training.memory.preflight import fit, preflight  # noqa: E402
from training.start import describe_model, freeze, row_limit, sft_start  # noqa: E402
from training.storage.recorded import recorded_settings  # noqa: E402
from training.storage.resuming import Resumption, find_resumption, open_run  # noqa: E402
from training.trainers import SFTTrainer  # noqa: E402
from utils.dataset import TokenDataset, load_dataset  # noqa: E402
from utils.tokenizer import Tokenizer  # noqa: E402

DEMO_CHARACTERS = 3.5  # a token of the demo's sentences holds so many


def main() -> int:
    """Parse, seed, data, model, trainer, fit."""
    config = parse_cli(SFTConfig, recorded=recorded_settings)
    resumption = find_resumption("sft", config)
    config = preflight(config, resumption)
    if config.plan:
        return 0
    runtime = Runtime.of(config)
    model, tokenizer, template, source = sft_start(config, resumption)
    freeze(model, config, runtime.matrix_dtype)
    stage = "text" if config.dataset == "demo-text" else "sft"
    options = {"skip_bad_rows": config.skip_bad_rows, "template": template}
    splits = {
        s: load_dataset(config.dataset, stage, s, tokenizer, row_limit(config, model), **options)
        for s in ("train", "validation")
    }
    for data in splits.values():
        print(data.report.summary())
    if source == "scratch" and tokenizer.kind == "demo" and config.dataset not in ("demo", "demo-text"):
        print(scratch_in_words(model.config.stem, tokenizer, splits["train"]))
    run = open_run("sft", config, model, runtime, resumption, splits["train"], {"pretrain": source})
    print(f"{model.config.name} from {source} on {runtime.describe()}")
    if model.config.dropout:
        print(dropout_in_words(config, model.config.dropout, resumption))
    trainer = SFTTrainer(
        config, model, tokenizer, splits["train"], splits["validation"], run, runtime,
        describe_model("sft", tokenizer, template, source), resumption and resumption.state,
    )  # fmt: skip
    return fit(trainer, config)


def characters_per_token(data: TokenDataset, tokenizer: Tokenizer) -> float:
    """How much of a text a token holds, over the first 256 rows."""
    rows = [data[i] for i in range(min(256, len(data)))]
    parts = [ids for row in rows for ids in (row.prompt_ids, row.response_ids)]
    return sum(len(tokenizer.decode(ids)) for ids in parts) / max(1, sum(len(ids) for ids in parts))


def scratch_in_words(family: str, tokenizer: Tokenizer, data: TokenDataset) -> str:
    """What `-p scratch` makes of data that are not the demo's: a vocabulary that falls apart into letters."""
    here = f"{DEMO_CHARACTERS} characters a token; here {characters_per_token(data, tokenizer):.1f}"
    return (
        f"-p scratch: a random {family} with the demo's vocabulary of {tokenizer.vocab_size:,} ids, made "
        f"for the demo's sentences ({here}); for other texts start from a model that has read some: -p huggingface "
        "--config gpt2/lora"
    )


def dropout_in_words(config: SFTConfig, dropout: float, resumption: Resumption | None) -> str:
    """What dropout makes of the size of a pass: the masks of a pass are drawn together, so other passes have others.

    A stream of random numbers for each row would mend that, but attention draws its masks inside torch's kernel.
    """

    def passes(settings: dict[str, Any]) -> str:
        tokens = settings["tokens_per_micro_batch"]
        return f"--tokens-per-micro-batch {tokens}" if tokens else f"-b {settings['batch_size']}"

    now = passes(resolved(config))
    then = passes(resumption.hyperparams["config"]) if resumption is not None else now
    effect = f"dropout {dropout} draws its masks pass by pass"
    if then != now:
        return f"note: {effect}: with {now} in place of {then} the run will not end as it would have"
    return f"{effect}: results depend on {now} by more than rounding"


if __name__ == "__main__":
    run_main(main)
