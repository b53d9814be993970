"""The commands for a GPU (GPT-2 medium on HH-RLHF), run here with a tiny Hugging Face folder in place of the hub name.

Real GPT-2 BPE and 1,000 real HH pairs; only the model's sizes and the numbers of steps are small.
"""

import json
import re

import pytest
import torch
from scripts import call, newest
from setups import assert_equal_weights, read_metrics, weights

from models.gpt import GPT, GPTActor, GPTRewardModel
from models.weights.checkpoint import describe
from utils.dataset import load_dataset
from utils.tokenizer import get_tokenizer, load_tokenizer

pytestmark = pytest.mark.slow

SHORTER = "--response-length 6 --eval-examples 4"


@pytest.fixture(scope="module")
def world(data_dir, tmp_path_factory):
    """Run folder, Hugging Face folder without a tokenizer of its own, and the real pairs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(0)
    sizes = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=256, vocab_size=50257, initializer_range=0.1)
    GPT2LMHeadModel(sizes).save_pretrained(folder / "gpt2-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken-cache"))
        runs = folder / "runs"
        data = data_dir / "hh-rlhf" / "harmless-test-1000.jsonl.gz"
        result = call(
            "sft", f"-n hh -b 2 -p {folder / 'gpt2-tiny'} --config gpt2-medium/dropout --dataset {data}", runs
        )
        assert result.code == 0, result.err
        (runs / "sft.out").write_text(result.out)
        yield runs, folder / "gpt2-tiny", data


def test_sft_takes_sizes_from_the_folder_and_the_recipe_from_the_preset(world) -> None:
    runs, folder, data = world
    run = newest(runs, "sft_hh")
    description = describe(run / "final")
    model = description["model"]
    assert (model["name"], model["n_embd"], model["n_layer"], model["block_size"]) == (
        "gpt2-medium/dropout",
        16,
        2,
        256,
    )
    assert model["dropout"] == 0.2 and model["vocab_size"] == 50257 and description["trained_from"] == str(folder)
    assert description["tokenizer"]["kind"] == "tiktoken" and description["tokenizer"]["eos_id"] == 50256
    config = json.loads((run / "hyperparams.json").read_text())["config"]
    assert config["lr"] == 5e-5 and config["batch_size"] == 2 and config["dataset"] == str(data)
    # Rows are cut to the folder's context of 256, not to the preset's of 1,024.
    counts = r"sft train: (\d+) rows, .* (\d+) with the prompt cut from the left, (\d+) dropped as too long"
    kept, cut, dropped = map(int, re.search(counts, (runs / "sft.out").read_text()).groups())
    whole = load_dataset(str(data), "sft", "train", load_tokenizer(run / "final"), 1024)
    assert kept + dropped == len(whole) and cut + dropped == sum(whole.lengths > 256) > 0 and dropped > 0
    # An untrained model of 50,257 tokens, at a few small steps.
    losses = [line["eval/loss"] for line in read_metrics(run) if "eval/loss" in line]
    assert 10 < losses[0] < 13 and losses[-1] < losses[0]
    tokenizer = load_tokenizer(run / "final")
    assert tokenizer.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("config", ["gpt2-medium/lora", "gpt2-medium"])
def test_reward_model_and_ppo(world, config: str) -> None:
    runs, _, data = world
    name = config.replace("/", "_")
    result = call("rm", f"-n {name} -b 2 -p sft_hh --config {config} --dataset {data} {SHORTER}", runs)
    assert result.code == 0, result.err
    result = call("ppo", f"-n {name} -b 2 -a sft_hh -c rm_{name} --config {config} --dataset {data} {SHORTER}", runs)
    assert result.code == 0, result.err
    assert "reward model: held-out accuracy" in result.out
    steps = [line for line in read_metrics(newest(runs, f"ppo_{name}")) if "objective/kl" in line]
    assert steps[0]["objective/kl"] == 0 and steps[0]["policy/approxkl_epoch1"] == 0
    assert steps[0]["policy/sampler_vs_train_logp_max"] < 1e-3
    final = newest(runs, f"ppo_{name}") / "final"
    actor, sft = GPTActor.from_checkpoint(final), GPT.from_checkpoint(newest(runs, "sft_hh") / "final")
    assert actor.config.lora_rank == (8 if "lora" in config else 0) and actor.config.dropout == 0
    if "lora" in config:
        state = weights(actor)
        assert_equal_weights({key: state[key] for key in weights(sft)}, weights(sft))
    gain, _ = GPTRewardModel.from_checkpoint(newest(runs, f"rm_{name}") / "final").normalisation
    assert gain != 1.0
    config = json.loads((newest(runs, f"ppo_{name}") / "hyperparams.json").read_text())["config"]
    assert config["temperature"] == 0.7 and config["kl_coef"] == 0.05


def test_rows_whose_prompts_differ_are_trained_on(world) -> None:
    """A few of these pairs differ already before the last reply; each reply keeps its own prompt."""
    _, _, data = world
    rows = load_dataset(str(data), "rm", "train", get_tokenizer("gpt2"), 1024)
    odd = [
        row for row in (rows[i] for i in range(len(rows))) if row.prompt_ids[0].tolist() != row.prompt_ids[1].tolist()
    ]
    assert odd and all(len(row.response_ids) == 2 for row in odd)


def test_full_fine_tuning_without_dropout_from_the_folder(world) -> None:
    runs, folder, data = world
    result = call("sft", f"-n full -b 2 -p {folder} --config gpt2-medium --dataset {data} --max-steps 1", runs)
    assert result.code == 0, result.err
    assert describe(newest(runs, "sft_full") / "final")["model"]["dropout"] == 0


def test_a_folder_with_its_own_tokenizer(world, tmp_path) -> None:
    """A Hugging Face tokenizer in the model's folder is used, and travels with the checkpoint."""
    runs, folder, data = world
    own = tmp_path / "with-tokenizer"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    load_tokenizer(newest(runs, "sft_hh") / "final").export_huggingface(own)
    assert call("sft", f"-n own -b 2 -p {own} --config gpt2-medium --dataset {data} --max-steps 1", runs).code == 0
    identity = describe(newest(runs, "sft_own") / "final")["tokenizer"]
    assert identity["kind"] == "huggingface"
    # The same vocabulary, so a reward model of the other run fits.
    assert identity["sha256"] == describe(newest(runs, "sft_hh") / "final")["tokenizer"]["sha256"]


def test_names_that_are_neither_a_run_nor_on_the_hub(world, tmp_path) -> None:
    runs, _, data = world
    error = call("sft", f"-n no -p nobody/nothing --config gpt2 --dataset {data}", runs).error
    assert "-p nobody/nothing: cannot be loaded from Hugging Face" in error
    (tmp_path / "empty").mkdir()
    error = call("sft", f"-n no -p {tmp_path / 'empty'} --config gpt2 --dataset {data}", runs).error
    assert "no checkpoint in" in error
