"""Systems of an evaluation: what flags mean, and one line for what they cannot mean."""

import json
import shutil

import pytest

from config.user_error import UserError
from inference.systems import System, common_template, find_reward_model, find_systems, run_around
from models.families import load_checkpoint
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

TIME = "20260101000000"


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory):
    """Runs of all stages, and a Hugging Face folder beside them."""
    root = tmp_path_factory.mktemp("systems") / "runs"
    shutil.copytree(tiny_runs, root)
    model = load_checkpoint(root / f"sft_t_{TIME}" / "final")
    model.save_pretrained(root / "hf", 1023)
    get_tokenizer("demo").export_huggingface(root / "hf")
    return root


@pytest.fixture
def find(runs):
    """`find(sft="sft_t", others=["x=..."], ...)`."""
    nothing = dict(sft="", ppo="", vanilla="", best_of=(), others=())
    return lambda **flags: find_systems(**{**nothing, **flags}, runs_dir=str(runs))


def test_systems_come_in_the_order_of_the_stages(find, runs, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text("")
    systems = find(sft="sft_t", ppo="ppo_t", vanilla="sft_vanilla_t", best_of=(16, 4), others=[f"z={file}", "a=ppo_t"])
    assert [s.name for s in systems] == ["vanilla", "sft", "best_of_4", "best_of_16", "ppo", "z", "a"]
    assert systems[1].source == str(runs / f"sft_t_{TIME}" / "final")
    assert [(s.kind, s.n) for s in systems[2:4]] == [("best_of_n", 4), ("best_of_n", 16)]
    assert systems[2].source == systems[1].source and systems[5].kind == "file"
    assert systems[3].describe() == {"kind": "best_of_n", "source": systems[1].source, "of": 16}


def test_models_are_loaded_with_their_tokenizer_and_template(find, runs):
    sft, ppo = find(sft="sft_t", ppo=str(runs / f"ppo_t_{TIME}"))
    loaded = ppo.load()
    assert loaded.tokenizer.identity()["kind"] == "demo" and loaded.template == PromptTemplate()
    assert loaded.context == 96 and not loaded.model.training
    assert sft.load().model.lm_head is not None


def test_a_hugging_face_folder_can_be_the_vanilla_model(find, runs):
    get = find(vanilla=str(runs / "hf"), ppo="ppo_t")[0]
    assert get.kind == "huggingface" and get.template() == PromptTemplate()
    assert find(vanilla="gpt2-medium", ppo="ppo_t")[0] == System(
        "vanilla", "huggingface", "gpt2-medium", "-v gpt2-medium"
    )


def test_a_hugging_face_model_is_loaded_or_names_the_flag(find, runs, tmp_path):
    loaded = find(vanilla=str(runs / "hf"), ppo="ppo_t")[0].load()
    assert loaded.tokenizer.eos_id == 1023 and loaded.context == 96
    shutil.copytree(runs / "hf", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^-v \S+/broken: the weights are damaged"):
        find(vanilla=str(tmp_path / "broken"), ppo="ppo_t")[0].load()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "two systems are needed"),
        ({"sft": "sft_t"}, "two systems are needed"),
        ({"sft": "nowhere", "ppo": "ppo_t"}, "-s nowhere: no such run.*runs in .*: ppo_t, rm_t, sft_t, sft_vanilla_t"),
        ({"sft": "rm_t", "ppo": "ppo_t"}, "-s rm_t: holds a reward model; give a run of train_sft.py"),
        ({"sft": "sft_t", "ppo": "sft_t"}, "-p sft_t: holds an SFT model; give a run of train_ppo.py"),
        ({"vanilla": "ppo_t", "sft": "sft_t"}, "-v ppo_t: holds a PPO policy; give a run of train_sft.py"),
        ({"sft": "sft_t", "ppo": f"ppo_t_{TIME}/final/critic"}, "-p ppo_t_.*: holds a critic; give a run of train_ppo"),
        ({"sft": "sft_t", "others": ["rm=rm_t"]}, "--system rm=rm_t: holds a reward model; give a run of train_sft.py"),
        ({"ppo": "ppo_t", "best_of": (4,)}, "--best-of: samples from the SFT model; name it with -s"),
        ({"sft": "sft_t", "others": ["ppo_t"]}, "--system ppo_t: give NAME=CHECKPOINT or NAME=FILE.jsonl"),
        ({"sft": "sft_t", "others": ["=ppo_t"]}, "--system =ppo_t: give NAME="),
        ({"sft": "sft_t", "others": ["x="]}, "--system x=: give NAME="),
        ({"sft": "sft_t", "others": ["a/b=ppo_t"]}, "--system a/b=ppo_t: give NAME="),
        ({"sft": "sft_t", "others": ["x=no.jsonl"]}, "--system x=no.jsonl: no such file"),
        ({"sft": "sft_t", "others": ["x=no_run"]}, "--system no_run: no such run"),
        ({"sft": "sft_t", "others": ["sft=ppo_t"]}, "two systems called sft"),
        ({"others": ["x=sft_t", "x=ppo_t"]}, "two systems called x"),
    ],
)
def test_wrong_flags_are_told_in_one_line(find, flags, message):
    with pytest.raises(UserError, match=message) as error:
        find(**flags)
    assert "\n" not in str(error.value)


def test_systems_of_different_templates_are_refused(find, runs, tmp_path):
    shutil.copytree(runs / f"ppo_t_{TIME}" / "final", tmp_path / "other")
    path = tmp_path / "other" / "model.json"
    description = json.loads(path.read_text())
    description["template"]["human"] = "\n\nUser: "
    path.write_text(json.dumps(description))
    systems = find(sft="sft_t", others=[f"mine={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="sft and mine were trained with different prompt templates"):
        common_template(systems)
    assert common_template(systems[1:]).human == "\n\nUser: "
    del description["template"]
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match="--system mine=.*names no prompt template"):
        common_template(systems)


def test_the_reward_model_is_the_one_that_the_ppo_run_names(find, runs, tiny_runs, tmp_path):
    ppo = find(sft="sft_t", ppo="ppo_t")[1]
    folder, line = find_reward_model("", ppo, str(runs))
    assert folder == tiny_runs / f"rm_t_{TIME}" / "final" and "trained with" in line
    assert find_reward_model("rm_t", None, str(runs))[0] == runs / f"rm_t_{TIME}" / "final"
    assert find_reward_model("", None, str(runs))[0] is None
    with pytest.raises(UserError, match="-c sft_t: holds an SFT model; give a run of train_rm.py"):
        find_reward_model("sft_t", ppo, str(runs))
    # The whole folder of runs was moved, so the recorded path leads nowhere.
    shutil.copytree(runs, tmp_path / "moved")
    settings = tmp_path / "moved" / f"ppo_t_{TIME}" / "hyperparams.json"
    settings.write_text(json.dumps({"rm": f"/gone/runs/rm_t_{TIME}/final"}))
    moved = System("ppo", "checkpoint", str(tmp_path / "moved" / f"ppo_t_{TIME}" / "final"), "-p ppo_t")
    assert find_reward_model("", moved, str(tmp_path / "moved"))[0] == tmp_path / "moved" / f"rm_t_{TIME}" / "final"
    # Without a word on where to look: beside the run that names it.
    assert find_reward_model("", moved, str(runs))[0] == tmp_path / "moved" / f"rm_t_{TIME}" / "final"
    shutil.move(tmp_path / "moved" / f"rm_t_{TIME}", tmp_path / "away")
    folder, line = find_reward_model("", moved, str(tmp_path))
    assert folder is None and f"/gone/runs/rm_t_{TIME}/final, which is neither there" in line and "with -c" in line


def test_settings_are_those_of_the_run_around_a_checkpoint(runs, tmp_path):
    run = runs / f"ppo_t_{TIME}"
    folder, settings = run_around(run / "final")
    assert folder == run and settings["config"]["temperature"] == 0.9
    assert run_around(tmp_path / "a" / "b" / "c") == (tmp_path / "a" / "b" / "c", {})
