"""The three scripts from the command line: what they write, how they chain, what they say to wrong input."""

import json
import re
import shutil

import pytest
import torch
from scripts import SHORT, call, newest, run
from setups import assert_equal_weights, read_metrics, weights

from config.configs import PPOConfig, stage_defaults
from models.gpt import GPT, GPTActor, GPTCritic, GPTRewardModel
from models.lora import is_adapter
from models.weights.checkpoint import describe
from training import train_ppo
from training.storage.saving import STATE
from utils.runs.manifest import MANIFEST, write_manifest
from utils.tokenizer import TiktokenTokenizer, load_tokenizer, read_ranks

pytestmark = pytest.mark.slow

ROLES_OF_PPO = {"": GPTActor, "critic": GPTCritic}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SFT from the root, reward model and PPO with LoRA from src/, each as a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    stages = [
        ("sft", "-n one", ""),
        ("rm", "-n one -p sft_one --config gpt2-nano/lora", "src"),
        (
            "ppo",
            "-n one -a sft_one -c rm_one --config gpt2-nano/lora --eval-reward-fn utils/demo/gold.py:gold_reward",
            "src",
        ),
    ]
    for stage, arguments, where in stages:
        result = run(stage, arguments, folder, where)
        assert result.code == 0, result.err
        assert f"writing to {newest(folder, f'{stage}_one')}" in result.out and "done: " in result.out
        (folder / f"{stage}.out").write_text(result.out)
    return folder


def contents(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_runs_folder(runs, stage: str) -> None:
    run_folder = newest(runs, f"{stage}_one")
    assert re.fullmatch(rf"{stage}_one_\d{{14}}", run_folder.name)
    files = [".lock", "best", "checkpoints", "final", "hyperparams.json", "logs", "metrics.jsonl"]
    assert contents(run_folder) == sorted(files + (["samples.jsonl"] if stage != "rm" else []))
    assert contents(run_folder / "checkpoints") == (
        ["step_00000001", "step_00000002"] if stage == "ppo" else ["step_00000002"]
    )
    model = ["manifest.json", "model.json", "model.safetensors", "tokenizer"] + (["critic"] if stage == "ppo" else [])
    assert contents(run_folder / "best") == sorted(model)
    last = contents(run_folder / "checkpoints")[-1]
    for folder in ("final", f"checkpoints/{last}"):
        assert contents(run_folder / folder) == sorted([*model, STATE])
    assert list((run_folder / "logs").glob("events.out.tfevents.*"))

    record = json.loads((run_folder / "hyperparams.json").read_text())
    assert record["stage"] == stage and record["command"][0] == f"train_{stage}.py" and "fp32" in record["runs_on"]
    assert record["config"]["max_steps"] == (2 if stage == "ppo" else 3) and record["seed"] == 0
    assert record["model"] == describe(run_folder / "final")["model"]
    for checkpoint in ("best", "final"):
        description = describe(run_folder / checkpoint)
        assert description["stage"] == stage and description["template"]["assistant"] == "\n\nAssistant:"
        assert load_tokenizer(run_folder / checkpoint).identity() == description["tokenizer"]


def test_the_figures_of_the_runs(runs) -> None:
    steps = {
        "sft": ("train/loss", [1, 2, 3], "eval/loss", [0, 2, 3]),
        "rm": ("train/accuracy", [1, 2, 3], "eval/accuracy", [0, 2, 3]),
        "ppo": ("objective/kl", [1, 2], "eval/gold", [0, 1, 2]),
    }
    for stage, (key, trained, held_out, evaluated) in steps.items():
        lines = read_metrics(newest(runs, f"{stage}_one"))
        assert [line["step"] for line in lines if key in line] == trained
        assert [line["step"] for line in lines if held_out in line] == evaluated
    assert [line["step"] for line in read_metrics(newest(runs, "rm_one")) if "norm/gain" in line] == [0, 3]
    rows = [json.loads(row) for row in (newest(runs, "ppo_one") / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({row["prompt"] for row in rows}) == 4


def test_ppo_tells_how_good_the_reward_is_before_it_starts(runs) -> None:
    out = (runs / "ppo.out").read_text()
    held_out = describe(newest(runs, "rm_one") / "final")["held_out"]
    longer = max(held_out["longer_wins"], 1 - held_out["longer_wins"])
    accuracy = f"reward model: held-out accuracy {held_out['accuracy']:.3f}"
    line = f"{accuracy} (chance 0.500, longest or shortest wins {longer:.3f})"
    assert line in out and out.index(line) < out.index("writing to")
    assert ("no better than chance" in out) == (held_out["accuracy"] <= max(0.5, longer))
    assert "warning: the scores of this checkpoint" not in out and "temperature" not in out
    assert re.search(r"shared between the roles: [1-9]", out)


def test_ppo_tells_what_is_kept_for_later_before_it_starts(runs, capsys) -> None:
    out = (runs / "ppo.out").read_text()
    config = json.loads((newest(runs, "ppo_one") / "hyperparams.json").read_text())["config"]
    line = (
        f"held-out score, KL and gold reward every {config['eval_every']} iterations (--eval-every); the newest "
        f"{config['keep']} of a checkpoint every {config['save_every']} (--keep, --save-every)"
    )
    assert line in out and out.index(line) < out.index("writing to")
    train_ppo.report_kept(stage_defaults(PPOConfig, "gpt2-nano"))
    assert "held-out score and KL (gold reward: --eval-reward-fn) every 10 iterations" in capsys.readouterr().out


def test_lora_stages_keep_the_sft_weights(runs) -> None:
    sft = weights(GPT.from_checkpoint(newest(runs, "sft_one") / "final"))
    models = {
        "reward model": GPTRewardModel.from_checkpoint(newest(runs, "rm_one") / "final"),
        "actor": GPTActor.from_checkpoint(newest(runs, "ppo_one") / "final"),
        "critic": GPTCritic.from_checkpoint(newest(runs, "ppo_one") / "final" / "critic"),
    }
    for name, model in models.items():
        state = weights(model)
        assert_equal_weights({key: state[key] for key in sft}, sft)
        rest = {key for key in state if key not in sft}
        assert all(is_adapter(key) or key.startswith("head.") for key in rest), name
        assert any(state[key].any() for key in rest if key.endswith("lora_B")), name
    # The critic began as the reward model, scale included.
    reward_model, critic = models["reward model"], models["critic"]
    assert critic.normalisation == reward_model.normalisation != (1.0, 0.0)
    torch.testing.assert_close(critic.head.weight, reward_model.head.weight, atol=0.02, rtol=0)


def test_lora_after_full_and_full_after_lora(runs) -> None:
    """The reward model loads the SFT checkpoint in all pairings of LoRA and full fine-tuning, and so does PPO."""
    assert call("sft", "-n lora --config gpt2-nano/lora -p sft_one", runs).code == 0
    assert call("rm", "-n full -p sft_lora", runs).code == 0
    assert call("rm", "-n both -p sft_lora --config gpt2-nano/lora", runs).code == 0
    for name, arguments in (
        ("full", "-a sft_lora -c rm_full"),
        ("both", "-a sft_lora -c rm_both --config gpt2-nano/lora"),
        ("mixed", "-a sft_lora -c rm_full --config gpt2-nano/lora --max-steps 1"),
        ("crossed", "-a sft_one -c rm_one --max-steps 1"),
    ):
        result = call("ppo", f"-n {name} {arguments}", runs)
        assert result.code == 0, result.err
        first = next(line for line in read_metrics(newest(runs, f"ppo_{name}")) if "objective/kl" in line)
        assert first["objective/kl"] == 0 and first["policy/approxkl_epoch1"] == 0
        lora = "lora" in arguments.replace("sft_lora", "")
        assert GPTActor.from_checkpoint(newest(runs, f"ppo_{name}") / "final").config.lora_rank == (16 if lora else 0)
        # The base of a reward model with adapters is the reference's; with all else trained in full, nothing is equal.
        shares = name != "full"
        assert bool(re.search(r"shared between the roles: [1-9]", result.out)) == shares


def test_dropout_is_for_sft_only(runs) -> None:
    """Presets with dropout train SFT with it, and reward model and PPO without, in every mode."""
    assert call("sft", "-n wet --config gpt2-nano/dropout --max-steps 1", runs).code == 0
    assert describe(newest(runs, "sft_wet") / "final")["model"]["dropout"] == 0.2
    assert call("rm", "-n wet -p sft_wet --config gpt2-nano/dropout --max-steps 1", runs).code == 0
    assert call("ppo", "-n wet -a sft_wet -c rm_wet --config gpt2-nano/dropout --max-steps 1", runs).code == 0
    ids = torch.randint(0, 1000, (2, 20))
    att = torch.ones_like(ids, dtype=torch.bool)
    for model in (
        GPTRewardModel.from_checkpoint(newest(runs, "rm_wet") / "final"),
        GPTActor.from_checkpoint(newest(runs, "ppo_wet") / "final"),
        GPTCritic.from_checkpoint(newest(runs, "ppo_wet") / "final" / "critic"),
    ):
        with torch.no_grad():
            assert torch.equal(model.train()(ids, att), model(ids, att))
            assert torch.equal(model(ids, att), model.eval()(ids, att))


def test_rewards_in_python(runs, tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "def words(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
        "def broken(prompts, responses):\n    return [float('nan') for r in responses]\n"
    )
    alone = call("ppo", f"-n words -a sft_one --reward-fn {file}:words --max-steps 1", runs)
    assert alone.code == 0 and "reward: --reward-fn alone" in alone.out
    lines = read_metrics(newest(runs, "ppo_words"))
    step = next(line for line in lines if "objective/kl" in line)
    assert step["val/mean"] == 0  # no reward model: the critic starts with a head of zeros
    both = call(
        "ppo", f"-n both -a sft_one -c rm_one --reward-fn {file}:words --reward-fn-weight 0.1 --max-steps 1", runs
    )
    assert both.code == 0 and "reward model: held-out accuracy" in both.out
    critic = call("ppo", f"-n critic -a sft_one -c rm_one --reward-fn {file}:words --max-steps 1", runs)
    assert critic.code == 0 and "reward: --reward-fn alone" in critic.out
    step = next(line for line in read_metrics(newest(runs, "ppo_critic")) if "objective/kl" in line)
    assert step["val/mean"] != 0

    lines = call("ppo", f"-n nan -a sft_one --reward-fn {file}:broken", runs)
    assert lines.code == 2 and "gave nan for" in lines.err.splitlines()[-1]


def test_plain_text_for_pretraining(runs) -> None:
    assert call("sft", "-n text --dataset demo-text", runs).code == 0
    assert not (newest(runs, "sft_text") / "samples.jsonl").exists()
    assert call("sft", "-n after -p sft_text --max-steps 1", runs).code == 0
    assert describe(newest(runs, "sft_after") / "final")["trained_from"] == str(newest(runs, "sft_text") / "final")


def test_warnings_about_the_reward_model(runs) -> None:
    """A reward no better than length, one without a scale of its own, and one measured at another temperature."""
    file = newest(runs, "rm_one") / "final" / "model.json"
    original = file.read_text()
    cases = {
        "no better than chance or answer length": {"held_out": {"accuracy": 0.6, "longer_wins": 0.35}},
        "records no held-out accuracy": {"held_out": None},
        "were not normalised after its last step": {"normalised": None},
        "normalised on samples at temperature 0.7": {"normalised": {"step": 3, "temperature": 0.7}},
    }
    good = {"held_out": {"accuracy": 0.7, "longer_wins": 0.35}}
    try:
        for text, change in {"": {}, **cases}.items():
            file.write_text(json.dumps({**json.loads(original), **good, **change}))
            write_manifest(file.parent / MANIFEST)
            out = call("ppo", "-n warned -a sft_one -c rm_one --max-steps 1 --ppo-epochs 1", runs).out
            assert out.count("warning") == (1 if text else 0) and text in out
    finally:
        file.write_text(original)
        write_manifest(file.parent / MANIFEST)
    step = newest(runs, "rm_one") / "checkpoints" / "step_00000002"
    out = call("ppo", f"-n warned -a sft_one -c {step} --max-steps 1 --ppo-epochs 1", runs).out
    assert "were not normalised after its last step" in out


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_one_line_and_exit_code_2(runs) -> None:
    error = run("ppo", "--learning-rate 1", runs, "src").error
    assert "--learning-rate" in error and "--lr" in error
    for stage in SHORT:
        assert "did you mean --max-steps?" in call(stage, "--max-step 1", runs).error


WRONG = [
    ("sft", "-p sft_missing", "-p sft_missing: no such run or folder; runs in .*sft_one"),
    ("sft", "-p ./nowhere", "-p ./nowhere: no such run or folder"),
    ("sft", "--dataset missing.jsonl", "missing.jsonl: no such file"),
    ("sft", "--config gpt3", "--config gpt3: no such preset; there are gpt2, "),
    ("sft", "-p sft_one --config gpt2-medium", "holds a gpt2-nano, not a gpt2-medium; give --config gpt2-nano"),
    ("sft", "-p rm_one", "holds a reward model; an SFT or PPO model is needed here"),
    ("sft", "--freeze lora", "--freeze lora: the model has no adapters"),
    ("sft", "--max-length 500", "--max-length 500: the model's context is 192"),
    ("sft", "--resume nowhere", "--resume nowhere: no such run or folder; runs in .*sft_one"),
    ("rm", "-p sft_missing", "-p sft_missing: no such run"),
    ("rm", "-p rm_one", "-p rm_one: holds no language model; give a run of train_sft.py"),
    ("rm", "-p sft_one --response-length 192", "--response-length 192: responses and a prompt do not fit into 192"),
    ("rm", "-p sft_one --dataset demo-text", "--dataset demo-text: has nothing for stage rm"),
    ("ppo", "-a sft_missing -c rm_one", "-a sft_missing: no such run"),
    ("ppo", "-a sft_one -c rm_missing", "-c rm_missing: no such run"),
    ("ppo", "-a rm_one -c rm_one", "-a rm_one: holds no language model; give a run of train_sft.py"),
    ("ppo", "-a sft_one -c none", "-c none: PPO needs a reward"),
    ("ppo", "-a sft_one -c sft_one", "-c sft_one: holds no reward model; give a run of train_rm.py"),
    ("ppo", "-a sft_one -c rm_one --response-length 192", "--response-length 192: "),
    ("ppo", "-a sft_one -c rm_one --prompt-length 190", "--response-length 8: responses and prompts of 190"),
    ("ppo", "-a sft_one --reward-fn nowhere.py:f", "--reward-fn nowhere.py:f: give FILE.py:FUNCTION"),
]  # fmt: skip


@pytest.mark.parametrize("stage,arguments,message", WRONG, ids=[f"{s} {a}" for s, a, _ in WRONG])
def test_wrong_input_is_told_in_one_line(runs, stage: str, arguments: str, message: str) -> None:
    before = contents(runs)
    error = call(stage, f"-n wrong {arguments}", runs).error
    assert re.search(message, error), error
    assert contents(runs) == before  # and no run folder is left behind


def test_a_reward_model_of_another_vocabulary(runs, tmp_path) -> None:
    """The same sizes, but other tokens: ids would mean something else to it."""
    copy = tmp_path / "rm_other"
    shutil.copytree(newest(runs, "rm_one") / "final", copy)
    ranks = copy / "tokenizer" / "bpe.tiktoken"
    lines = ranks.read_text().splitlines()
    (a, i), (b, j) = (line.split() for line in lines[300:302])
    lines[300:302] = [f"{b} {i}", f"{a} {j}"]
    ranks.write_text("\n".join(lines) + "\n")
    error = call("ppo", f"-n wrong -a sft_one -c {copy}", runs).error
    assert "the vocabulary is not the one recorded in identity.json" in error
    identity = copy / "tokenizer" / "identity.json"
    other = TiktokenTokenizer("demo", read_ranks(ranks), "demo")
    other.save(copy)
    assert identity.is_file()
    description = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**description, "tokenizer": other.identity()}))
    write_manifest(copy / MANIFEST)
    error = call("ppo", f"-n wrong -a sft_one -c {copy}", runs).error
    assert "its tokenizer is not that of -a sft_one" in error


def test_bf16_with_adapters_shares_one_rounded_base_and_resumes(runs) -> None:
    """The frozen base is rounded before it is compared: fresh from the SFT model or back from a checkpoint."""
    flags = "-a sft_one -c rm_one --config gpt2-nano/lora --dtype bf16 -n half"
    started = call("ppo", flags + " --max-steps 1", runs)
    assert started.code == 0
    shared = float(re.search(r"shared between the roles: ([\d.]+) MB", started.out)[1])
    whole = describe(newest(runs, "sft_one") / "final")["model"]
    matrices = 12 * whole["n_layer"] * whole["n_embd"] ** 2
    assert shared >= 3 * 2 * matrices / 1e6 * 0.99
    run = newest(runs, "ppo_half")
    shutil.rmtree(run / "final")
    again = call("ppo", f"{flags} --max-steps 1 --resume {run}", runs)
    assert again.code == 0 and float(re.search(r"shared between the roles: ([\d.]+) MB", again.out)[1]) == shared


def test_actor_and_critic_on_one_adapter(runs) -> None:
    """One trunk in both folders of the checkpoint, a critic that starts at 0, and a resumption with the same bits."""
    flags = "-a sft_one -c rm_one --config gpt2-nano/lora --share-adapter"
    assert call("ppo", f"{flags} -n joint", runs).code == 0
    run = newest(runs, "ppo_joint")
    final = {name: weights(cls.from_checkpoint(run / "final" / name)) for name, cls in ROLES_OF_PPO.items()}
    trunk = {key: value for key, value in final[""].items() if key.startswith("transformer.")}
    assert_equal_weights({key: final["critic"][key] for key in trunk}, trunk)
    assert final["critic"]["head.norm_gain"] == 1 and final["critic"]["head.weight"].any()
    values = [line["val/mean"] for line in read_metrics(run) if "val/mean" in line]
    assert values[0] == 0 != values[-1]
    shutil.rmtree(run / "final")
    again = call("ppo", f"{flags} -n joint --resume {run / 'checkpoints' / 'step_00000001'}", runs)
    assert again.code == 0, again.err
    for name, cls in ROLES_OF_PPO.items():
        assert_equal_weights(weights(cls.from_checkpoint(run / "final" / name)), final[name])


def test_sharing_an_adapter_needs_one(runs) -> None:
    result = call("ppo", "-n no -a sft_one -c rm_one --config gpt2-nano --share-adapter", runs)
    assert result.error == "error: --share-adapter: the model has no adapters; give a --config that ends in /lora"
