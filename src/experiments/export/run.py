"""A run in Hugging Face's form: `main.py -t export -m RUN --to FOLDER`, held against the run before it is let go.

The folder has the weights and config.json (from the model family's own `save_pretrained`), the tokenizer with a chat
template, generation_config.json and a model card. It is made beside its place, read back by transformers, and renamed
only when that gives the same tokens (of a reward model: the same scores) as the model it was made of. With `--gguf` a
file for llama.cpp stands in it, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from config.user_error import UserError
from experiments.export.card import card
from experiments.export.contents import DTYPES, Export
from experiments.export.gguf import GgufFile
from experiments.export.place import CONFIG, replacing, target_folder
from experiments.export.records import room_of, temperature_of
from experiments.graded_answers import text_model
from inference.systems import load_reward_model
from models.weights.checkpoint import describe
from models.weights.gguf_writer import KINDS
from utils.runs.finding import find_checkpoint
from utils.runs.folder import typed_path


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Write a language model or a reward model of ours as a folder of `transformers`."""
    text = "run (its folder or name) or checkpoint of a language model (SFT or PPO) or of a reward model"
    parser.add_argument("-m", "--model", required=True, help=text)
    parser.add_argument("--to", required=True, help="the folder to write; made if it is not there")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that stands there")
    text = "type of the weights in the file (default fp32)"
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help=text)
    text = "write a language model as FOLDER/NAME-KIND.gguf, too, for llama.cpp"
    parser.add_argument("--gguf", default="", choices=KINDS, help=text)
    parser.add_argument("--runs-dir", default="runs", help="where runs are looked for")
    flags = parser.parse_args(rest)
    checkpoint = _checkpoint(flags.model, flags.runs_dir)
    target = target_folder(flags.to, flags.overwrite, checkpoint)
    description = describe(checkpoint)
    is_reward = description["role"] == "reward"
    flag = f"-m {flags.model}"
    gguf = GgufFile.wanted(flags.gguf, target.name, flag, is_reward) if flags.gguf else None
    source = load_reward_model(checkpoint, flag) if is_reward else text_model(checkpoint)
    room = 0 if is_reward else room_of(checkpoint, source.context)
    export = Export(source, flags.dtype, is_reward, temperature_of(checkpoint, description), room)
    with replacing(target, flags.to) as folder:
        export.write(folder)
        told = [f"read back by transformers: {export.check(folder)}"]
        if gguf is not None:
            told.append(f"{gguf.name}: read back by transformers: {gguf.write(export, folder)}")
        text = card(export, folder, target.name, checkpoint, description, told, flags.runs_dir)
        (folder / "README.md").write_text(text, encoding="utf-8")
    parameters = sum(p.numel() for p in source.model.parameters())
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {parameters:,} parameters in {flags.dtype}, {size / 1e6:.1f} MB, from {checkpoint}")
    print(*told, sep="\n")
    return 0


def _checkpoint(argument: str, runs_dir: str) -> Path:
    """The checkpoint to export; UserError where there is none, it is a critic, or it is in Hugging Face's form."""
    folder = typed_path(argument)
    if (folder / CONFIG).is_file() and not (folder / "model.json").is_file():
        raise UserError(f"-m {argument}: is in Hugging Face's form already; give a run or checkpoint of ours")
    checkpoint = find_checkpoint(argument, runs_dir, "-m")
    if describe(checkpoint)["role"] == "critic":
        told = "holds a critic, whose values of every token have no place in Hugging Face's form"
        raise UserError(f"-m {argument}: {told}; give an SFT, PPO or reward model")
    return checkpoint
