"""Whose tokenizer a model in Hugging Face's form gets, decided alike by every caller: folders, and names in the hub's
cache."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from scripts import call, newest, save_start

from config.configs import SFTConfig
from config.model_configs import get_configs
from config.user_error import UserError
from experiments.quick_looks import find_tokenizer, load_language_model
from inference.systems import find_systems
from models.gpt import GPT, GPTRewardModel
from models.weights.checkpoint import describe, save_model
from models.weights.huggingface import Pretrained
from training.memory.sources import plan_sources
from training.start import check_family, sft_start
from utils.tokenizer import get_tokenizer

pytestmark = pytest.mark.slow

DEMO, GPT2 = "demo", "gpt2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def tables(data_dir, tmp_path_factory):
    """Model folders without a tokenizer, by the rows of their token tables; and GPT-2's vocabulary in its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("tables")
    sizes = dict(n_layer=1, n_head=1, n_embd=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken-cache"))

        def folder(rows: int) -> Path:
            if not (root / str(rows)).is_dir():
                torch.manual_seed(0)
                GPT2LMHeadModel(GPT2Config(vocab_size=rows, **sizes)).save_pretrained(root / str(rows))
            return root / str(rows)

        yield folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`cache(name, folder)` puts a folder into a hub cache of this test's own, as `snapshot_download` leaves it."""
    home = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))

    def put(name: str, folder: Path) -> None:
        place = home / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, place / "snapshots" / ("0" * 40))

    return put


def with_tokenizer(folder: Path, place: Path, name: str = DEMO) -> Path:
    shutil.copytree(folder, place)
    get_tokenizer(name).export_huggingface(place)
    return place


# Each way in which a model is named: what it makes of it is the id of the tokenizer, or an error.


def by_sft(argument: str, runs: str) -> str:
    return sft_start(SFTConfig(pretrain=argument, runs_dir=runs, config="gpt2"), None)[1].identity()["sha256"]


def by_look(argument: str, runs: str) -> str:
    return load_language_model(argument, runs).tokenizer.identity()["sha256"]


def by_vanilla(argument: str, runs: str) -> str:
    systems = find_systems(sft="", ppo="", vanilla=argument, best_of=(), others=[f"b={argument}"], runs_dir=runs)
    texts = [system.load().tokenizer.identity()["sha256"] for system in systems]
    assert len(set(texts)) == 1
    return texts[0]


def by_tokenizer(argument: str, runs: str) -> str:
    return find_tokenizer(argument, runs).identity()["sha256"]


def by_plan(argument: str, runs: str) -> str:
    """A plan knows a tokenizer by its size."""
    sizes = plan_sources(SFTConfig(pretrain=argument, runs_dir=runs, config="gpt2", plan=True)).sft
    return next(t.identity()["sha256"] for t in map(get_tokenizer, (DEMO, GPT2)) if t.vocab_size == sizes.vocab_size)


CALLERS = {"-p": by_sft, "-m": by_look, "-v": by_vanilla, "--tokenizer": by_tokenizer, "--plan": by_plan}
# Rows of the table, the tokenizer beside it -> the tokenizer that is taken, or what is told.
FOLDERS = {
    "its own": (1024, DEMO, DEMO),
    "its own, in a padded table": (1088, DEMO, DEMO),
    "its own, although the table has GPT-2's size": (50257, DEMO, DEMO),
    "GPT-2's": (50257, None, GPT2),
    "GPT-2's, in a padded table": (50304, None, GPT2),
    "unknown": (
        50400,
        None,
        "no tokenizer for it, and its token table of 50400 rows .*; put its tokenizer.json there",
    ),
    "unknown and small": (
        1024,
        None,
        "no tokenizer for it, and its token table of 1024 rows is not of GPT-2's size",
    ),
    "half of one": (50257, "tokenizer_config.json", "none of the files .*tokenizer_config.json alone makes none"),
    "larger than the table": (1000, DEMO, "its tokenizer has 1024 ids, its token table 1000 rows; put the model's own"),
    "larger by a token": (
        1023,
        DEMO,
        r"1024 ids, its token table 1023 rows; take what was added .<.endoftext.>. out",
    ),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_caller_decides_alike(kind, caller, tables, tmp_path, capfd):
    if kind.startswith("larger") and caller == "--tokenizer":
        pytest.skip("a tokenizer that is looked at alone has no table")
    rows, beside, expected = FOLDERS[kind]
    folder = tmp_path / "model"
    if beside == DEMO:
        with_tokenizer(tables(rows), folder)
    else:
        shutil.copytree(tables(rows), folder)
        if beside:
            (folder / beside).write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    runs = str(tmp_path / "runs")
    if expected in (DEMO, GPT2):
        assert CALLERS[caller](str(folder), runs) == get_tokenizer(expected).identity()["sha256"]
        told = capfd.readouterr().out
        assert (f"GPT-2's, because {folder} has none and {rows} rows" in told) == (
            expected == GPT2 and caller != "--plan"
        )
        return
    with pytest.raises(UserError, match=expected) as error:
        CALLERS[caller](str(folder), runs)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert str(error.value).startswith(("tokenizer ", f"{caller} ", "-p " if caller == "--plan" else caller))
    assert ("--tokenizer" in str(error.value)) == (
        kind.startswith("unknown") and caller in ("-p", "--plan", "--tokenizer")
    )


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    "name,rows,beside,expected",
    [
        ("somebody/model", 1024, DEMO, DEMO),
        ("somebody/model", 50257, DEMO, DEMO),
        ("openai-community/gpt2", 50257, None, GPT2),
        ("gpt2-medium", 50257, None, GPT2),
        ("distilgpt2", 50257, None, GPT2),
        (
            "somebody/model",
            50257,
            None,
            "no tokenizer for it, and GPT-2's need not be|the hub's model has none",
        ),
        ("nobody/model", 0, None, "nobody/model: cannot be loaded from Hugging Face .*not in this machine's cache.*"),
    ],
)
def test_names_of_the_hub(name, rows, beside, expected, caller, tables, cache, tmp_path, capfd):
    """From the cache, for no test goes online."""
    if rows:
        cache(name, with_tokenizer(tables(rows), tmp_path / "model") if beside else tables(rows))
    elif caller == "--plan":
        pytest.skip("a plan can be made before the model is downloaded")
    if expected in (DEMO, GPT2):
        assert CALLERS[caller](name, str(tmp_path)) == get_tokenizer(expected).identity()["sha256"]
        assert ("GPT-2's, which is that of" in capfd.readouterr().out) == (
            expected == GPT2 and caller in ("-p", "-m", "-v")
        )
        return
    with pytest.raises(UserError, match=expected) as error:
        CALLERS[caller](name, str(tmp_path))
    assert "\n" not in str(error.value)


def test_training_from_a_name_of_the_hub(tables, cache, tmp_path):
    """The weights are the cached ones, and the tokenizer travels with the checkpoint under the model's name."""
    folder = with_tokenizer(tables(1024), tmp_path / "model")
    cache("somebody/model", folder)
    runs = tmp_path / "runs"
    result = call("sft", "-n hub -p somebody/model --config gpt2 --dataset demo --max-steps 1 --lr 1e-30", runs)
    assert result.code == 0, result.err
    final = newest(runs, "sft_hub") / "final"
    description = describe(final)
    assert description["trained_from"] == description["tokenizer"]["name"] == "somebody/model"
    ours, theirs = load_file(final / "model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(ours["transformer.wpe.weight"], theirs["transformer.wpe.weight"])


def test_a_tokenizer_by_name(tables, cache, tmp_path, capsys):
    """--tokenizer owner/name is that model's; beside another table it is told."""
    cache("somebody/model", with_tokenizer(tables(1024), tmp_path / "model"))
    config = SFTConfig(pretrain=str(tables(50257)), tokenizer="somebody/model", config="gpt2", runs_dir=str(tmp_path))
    tokenizer = sft_start(config, None)[1]
    assert tokenizer.name == "somebody/model" and tokenizer.encode("It is Rome.") == get_tokenizer(DEMO).encode(
        "It is Rome."
    )
    assert "somebody/model: has 1024 ids, the token table 50257 rows: is it the model's own?" in capsys.readouterr().out
    assert get_tokenizer("gpt2-xl").identity() == get_tokenizer("gpt2").identity()
    with pytest.raises(UserError, match="tokenizer some/other: cannot be loaded from Hugging Face"):
        get_tokenizer("some/other")


def test_a_plan_of_a_name_takes_the_cached_sizes(tables, cache, tmp_path, monkeypatch):
    """And asks nobody: it can be made before anything is downloaded."""
    look, asked = huggingface_hub.snapshot_download, []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k["local_files_only"]) or look(*a, **k)
    )
    cache("somebody/model", with_tokenizer(tables(1088), tmp_path / "model"))
    config = SFTConfig(pretrain="somebody/model", config="gpt2/dropout", runs_dir=str(tmp_path), plan=True)
    sizes = plan_sources(config).sft
    assert asked == [True]
    assert (sizes.n_embd, sizes.vocab_size, sizes.embedding_rows, sizes.dropout) == (4, 1024, 1088, 0.2)


# Stages in the wrong order, and a vocabulary that was made for other texts -------------------------------------------


IN_THEIR_FORM = "is a model in Hugging Face's form, and a run of train_{}.py is needed"


@pytest.mark.parametrize(
    "stage,words,told",
    [
        ("rm", "-p FOLDER", IN_THEIR_FORM.format("sft") + "; make one with train_sft.py -p FOLDER"),
        ("rm", "-p gpt2", IN_THEIR_FORM.format("sft") + "; make one with train_sft.py -p gpt2"),
        ("ppo", "-a FOLDER", IN_THEIR_FORM.format("sft") + "; make one with train_sft.py -p FOLDER"),
        ("ppo", "-a sft_start -c FOLDER", IN_THEIR_FORM.format("rm")),
        ("ppo", "-a sft_start -c sft_start", "holds no reward model; give a run of train_rm.py"),
        ("rm", "-p rm_start", "holds no language model; give a run of train_sft.py"),
        ("ppo", "-a rm_start", "holds no language model; give a run of train_sft.py"),
        ("sft", "-p sft_started", "no such run or folder; runs in RUNS: rm_start, sft_start"),
        ("sft", "-p RUNS", "is a folder of runs; give one of them: sft_start_"),
    ],
)
def test_models_of_another_stage_or_form(stage, words, told, tmp_path):
    runs, folder = tmp_path / "runs", tmp_path / "hf"
    start = save_start(runs)
    (start.parent / "hyperparams.json").write_text("{}")
    GPT.from_checkpoint(start).save_pretrained(folder)
    save_model(GPTRewardModel.from_checkpoint(start), runs / "rm_start_20260101000000" / "final")
    told, words = (t.replace("FOLDER", str(folder)).replace("RUNS", str(runs)) for t in (told, words))
    flag = " ".join(words.split()[-2:])
    assert call(stage, words, runs).error.startswith(f"error: {flag}: {told}")
    assert call(stage, f"{words} --plan", runs).error.startswith(f"error: {flag}: {told}")


def test_own_texts_on_the_demos_vocabulary_are_told(tmp_path):
    rows = [{"prompt": f"Describe wombat {i}!", "response": "Marsupial, quadrupedal, nocturnal."} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = "-p scratch: a random gpt2-nano with the demo's vocabulary of 1,024 ids, made for the demo's sentences ("
    own = call("sft", f"--dataset {tmp_path / 'own.jsonl'} --max-steps 1", tmp_path).out
    lines = [line for line in own.splitlines() if line.startswith(told)]
    assert len(lines) == 1 and lines[0].endswith("-p huggingface --config gpt2/lora")
    assert 1.0 < float(lines[0].partition("here ")[2].partition(")")[0]) < 3.0
    assert told not in call("sft", "--dataset demo --max-steps 1", tmp_path).out


def test_what_is_said_of_the_demos_vocabulary_is_so():
    from training.train_sft import DEMO_CHARACTERS, characters_per_token
    from utils.dataset import load_dataset

    tokenizer = get_tokenizer(DEMO)
    data = load_dataset("demo", "sft", "train", tokenizer, 192)
    assert round(characters_per_token(data, tokenizer), 1) == DEMO_CHARACTERS


@pytest.mark.parametrize(
    "channels, layers, expected", [(576, 30, "smollm2-135m"), (2048, 16, "llama-3.2-1b"), (128, 3, "llama-nano")]
)
def test_a_model_of_another_family_than_the_preset_names_the_nearest_preset(tmp_path, channels, layers, expected):
    """By its config.json alone, before any weight is read."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=channels, num_hidden_layers=layers, num_attention_heads=4, vocab_size=100)
    found = Pretrained("somewhere/llama", "somewhere/llama", config, tmp_path)
    with pytest.raises(UserError, match=f"^-p somewhere/llama: holds a LLaMA, .*give --config {expected} or "):
        check_family(found, get_configs("gpt2/lora"))
    check_family(found, get_configs("smollm2-360m"))
