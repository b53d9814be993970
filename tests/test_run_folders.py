"""docs/run-folders.md: what a run or checkpoint from elsewhere cannot do, tried on every command that reads one.

Each plant puts Python code into runs of a tiny model, in a place whose name some reader could follow. Were it run, a
file would appear; the answer to every question on the terminal is yes.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from scripts import SHORT, Result, train_tiny

from config.user_error import UserError, run_main
from models.gpt import GPT
from training.trainers import PPOTrainer, RewardModelTrainer, SFTTrainer
from utils.data.token_cache import read_arrays
from utils.reward_function import load_reward_function
from utils.runs.durable import write_file
from utils.runs.folder import REPO
from utils.runs.manifest import MANIFEST, fault_of, write_manifest
from utils.tokenizer import get_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs sft_tiny, rm_tiny and ppo_tiny of a tiny model. Do not write there."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE_DIR", str(tmp_path_factory.mktemp("tokens")))
        train_tiny(folder)
    return folder


@dataclass(frozen=True)
class Place:
    """Where a case takes place. runs: a copy that may be spoiled. code: a Python file; were it imported, `marker` would
    be there."""

    runs: Path
    code: Path
    marker: Path

    def run(self, stem: str) -> Path:
        return max(p for p in self.runs.iterdir() if p.name.rpartition("_")[0] == stem)

    def checkpoints(self) -> list[Path]:
        """Every model folder."""
        return [path.parent for path in self.runs.rglob("model.json")]


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "tokens"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for trainer in (SFTTrainer, RewardModelTrainer, PPOTrainer):
        monkeypatch.setattr(trainer, "fit", lambda self: 0)
    runs = shutil.copytree(made, tmp_path / "runs")
    for path in runs.glob("*/hyperparams.json"):  # the runs have moved
        path.write_text(path.read_text().replace(str(made), str(runs)))
    marker, code = tmp_path / "ran", tmp_path / f"planted_{abs(hash(tmp_path))}.py"
    code.write_text(f"open({str(marker)!r}, 'w').close()\nclass Planted: pass\ndef f(prompts, texts): return [0.0]\n")
    return Place(runs, code, marker)


def task(*words: str) -> Callable[[Place], Result]:
    """A task of experiments/main.py; a word RUN:STEM is that run's folder."""
    return lambda place: _call("experiments.main", ["main.py", "-t", *_filled(words, place)])


def script(stage: str, words: str) -> Callable[[Place], Result]:
    """A training script."""
    return lambda place: _call(
        f"training.train_{stage}",
        [f"train_{stage}.py", *SHORT[stage].split(), "--device", "cpu", "--runs-dir", str(place.runs),
         *_filled(words.split(), place)],
    )  # fmt: skip


def resumed(stage: str, step: str) -> Callable[[Place], Result]:
    """A training script with --resume alone: all settings are those that the run brings along."""
    return lambda place: _call(
        f"training.train_{stage}",
        [f"train_{stage}.py", "--resume", f"{place.run(f'{stage}_tiny')}/checkpoints/{step}", "--runs-dir",
         str(place.runs)],
    )  # fmt: skip


def evaluation(words: str) -> Callable[[Place], Result]:
    """utils/evaluate.py."""
    more = f"--judge gold --limit 2 --max-new-tokens 4 --device cpu {words}"
    return lambda place: _call(
        "utils.evaluate", ["evaluate.py", *_filled(more.split(), place), "--runs-dir", str(place.runs)]
    )


def _filled(words, place: Place) -> list[str]:
    """RUN:STEM and RUN:STEM/FOLDER as paths."""
    found = []
    for word in words:
        stem, slash, inner = word.removeprefix("RUN:").partition("/")
        found.append(f"{place.run(stem)}{slash}{inner}" if word.startswith("RUN:") else word)
    return found


def _call(module: str, argv: list[str]) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "path", [*sys.path])
        main = importlib.import_module(module).main
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            run_main(main)
    return Result(stop.value.code, out.getvalue(), err.getvalue())


COMMANDS: dict[str, Callable[[Place], Result]] = {
    "overoptimisation": task(
        "overoptimisation", "RUN:ppo_tiny", "--prompts", "4", "--best-of", "2", "--device", "cpu"
    ),
    "doctor": task("doctor", "RUN:ppo_tiny"),
    "gpt": task("gpt", "-m", "RUN:sft_tiny", "--device", "cpu", "--max-new-tokens", "3"),
    "gpt checkpoint": task("gpt", "-m", "RUN:sft_tiny/final", "--device", "cpu", "--max-new-tokens", "3"),
    "reward": task("reward", "-m", "RUN:rm_tiny", "--device", "cpu", "--prompt", "Hi!", "--response", "Hi."),
    "tokenizer": task("tokenizer", "--tokenizer", "RUN:sft_tiny"),
    "dataset": task("dataset", "--tokenizer", "RUN:sft_tiny"),
    "evaluate": evaluation("-s RUN:sft_tiny -p RUN:ppo_tiny"),
    "evaluate vanilla": evaluation("-s RUN:sft_tiny -v RUN:sft_start/final"),
    "sft": script("sft", "-n next -p RUN:sft_tiny"),
    "sft checkpoint": script("sft", "-n next -p RUN:sft_tiny/final"),
    "rm": script("rm", "-n next -p RUN:sft_tiny"),
    "ppo": script("ppo", "-n next -a RUN:sft_tiny -c RUN:rm_tiny"),
    # Going on at an earlier step sets final/ aside, so what starts from a run comes first.
    "resume ppo": script("ppo", "-n tiny -a sft_tiny -c rm_tiny --resume RUN:ppo_tiny/checkpoints/step_00000001"),
    "resume ppo alone": resumed("ppo", "step_00000001"),
    "resume rm": script("rm", "-n tiny -p sft_tiny --resume RUN:rm_tiny/checkpoints/step_00000002"),
    "resume rm alone": resumed("rm", "step_00000002"),
    "resume sft": script("sft", "-n tiny -p sft_start --resume RUN:sft_tiny/checkpoints/step_00000002"),
    "resume sft alone": resumed("sft", "step_00000002"),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Plants
# ---------------------------------------------------------------------------------------------------------------------


def _change(path: Path, **entries) -> None:
    value = json.loads(path.read_text())
    value.update(entries)
    path.write_text(json.dumps(value))


def _reseal(place: Place) -> None:
    for folder in place.checkpoints():
        if (folder / MANIFEST).is_file():
            write_manifest(folder / MANIFEST)


def reward_functions(place: Place) -> None:
    """Every record names the file as its reward functions and as its judge."""
    spec = f"{place.code}:f"
    for path in place.runs.glob("*/hyperparams.json"):
        record = json.loads(path.read_text())
        record["config"] |= dict(reward_fn=spec, eval_reward_fn=spec, reward_fn_weight=1.0, judge=spec)
        path.write_text(json.dumps(record | {"reward_fn": spec, "eval_reward_fn": spec, "judge": spec}))
    for path in place.runs.rglob("model.json"):
        _change(path, reward_fn=spec, eval_reward_fn=spec)
    _reseal(place)


def tokenizer_code(place: Place) -> None:
    """Every tokenizer is of a class that the folder brings along."""
    for folder in place.checkpoints():
        if not (tokenizer := folder / "tokenizer").is_dir():
            continue
        get_tokenizer("demo").export_huggingface(tokenizer)
        shutil.copy(place.code, tokenizer / "planted.py")
        auto_map = {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}
        _change(tokenizer / "tokenizer_config.json", tokenizer_class="Planted", auto_map=auto_map)
        _change(tokenizer / "identity.json", kind="huggingface")
    _reseal(place)


def model_code(place: Place) -> None:
    """Every checkpoint is a Hugging Face folder, too, of an architecture that it brings along."""
    auto_map = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
    for folder in place.checkpoints():
        shutil.copy(place.code, folder / "planted.py")
        get_tokenizer("demo").export_huggingface(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "planted", "auto_map": auto_map}))
    _reseal(place)


class _Bomb:
    """A pickle that runs code."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __reduce__(self):
        return exec, (f"open({str(self.place.marker)!r}, 'w').close()",)


def pickled_states(place: Place) -> None:
    """Every trainer's state is a pickle that runs code."""
    for path in place.runs.rglob("trainer_state.pt"):
        path.write_bytes(pickle.dumps(_Bomb(place)))
    _reseal(place)


def pickled_weights(place: Place) -> None:
    """Every file of weights is."""
    for path in place.runs.rglob("model.safetensors"):
        path.write_bytes(pickle.dumps(_Bomb(place)))
        (path.parent / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(place)))
    _reseal(place)


PLANTS = (reward_functions, tokenizer_code, model_code, pickled_states, pickled_weights)
# What the one line has to name; all others go on, or are told of damage.
TOLD = {
    (reward_functions, "overoptimisation"): "--reward-fn",
    (reward_functions, "resume ppo"): "add what cannot be taken from the run: --reward-fn ",
    (reward_functions, "resume ppo alone"): "add what cannot be taken from the run: --reward-fn ",
    **{(tokenizer_code, name): "auto_map" for name in COMMANDS if name != "doctor"},
    **{(model_code, name): "auto_map" for name in ("gpt checkpoint", "sft checkpoint", "evaluate vanilla")},
    **{(pickled_states, name): "trainer_state.pt" for name in COMMANDS if name.startswith("resume")},
    **{(pickled_weights, name): "model.safetensors" for name in ("gpt", "reward", "sft", "rm", "ppo", "evaluate")},
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_nothing_that_a_run_brings_along_is_run(plant, name, place):
    plant(place)
    result = COMMANDS[name](place)
    assert not place.marker.exists()
    assert result.code in (0, 2, 3) and "Traceback" not in result.err, result.err
    if (plant, name) in TOLD:
        told = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert result.code == 2 and len(told) == 1 and TOLD[plant, name] in told[0], result.err


def test_the_plants_do_work(place):
    """What the tests above look for does appear where the user names the code."""
    load_reward_function(f"{place.code}:f", "--reward-fn")
    assert place.marker.exists()
    place.marker.unlink()
    pickle.loads(pickle.dumps(_Bomb(place)))
    assert place.marker.exists()


def test_the_runs_are_good_without_a_plant(place):
    for name, command in COMMANDS.items():
        result = command(place)
        assert result.code in (0, 3), (name, result.err)


@pytest.mark.parametrize("words", [
    ["src/experiments/main.py", "-t", "overoptimisation", "RUN:ppo_tiny"],
    ["src/training/train_sft.py", *SHORT["sft"].split(), "-p", "RUN:sft_tiny", "--plan", "--device", "cpu"],
])  # fmt: skip
def test_modules_in_the_folder_around_are_not_imported(words, place):
    """A process started inside the run: Python files named like libraries stand there."""
    reward_functions(place)
    folder = place.run("ppo_tiny")
    for module in ("json", "torch", "numpy", "config", "utils", "sitecustomize", "planted"):
        shutil.copy(place.code, folder / f"{module}.py")
    words = [sys.executable, str(REPO / words[0]), *_filled(words[1:], place), "--runs-dir", str(place.runs)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert not place.marker.exists() and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (2 if "overoptimisation" in words else 0), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Caches, links, sizes, texts
# ---------------------------------------------------------------------------------------------------------------------


def test_caches_hold_numbers_only(place):
    """Token and answer caches: an array of objects is passed over, and so is one that claims more than there is."""
    folder = place.runs / ".cache"
    folder.mkdir()
    np.savez(folder / f"{'0' * 32}.npz", label=np.array([_Bomb(place)], dtype=object), ids=np.zeros(2))
    assert read_arrays(folder, "0" * 32) is None and not place.marker.exists()
    with (folder / f"{'1' * 32}.npz").open("wb") as file:
        import zipfile

        with zipfile.ZipFile(file, "w") as archive:
            header = "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
            header = header.ljust(117) + "\n"
            archive.writestr("label.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    assert read_arrays(folder, "1" * 32) is None


LINKS = {
    ".lock": "resume ppo", "metrics.jsonl": "resume ppo", "samples.jsonl": "resume ppo", "new.writing": "resume ppo",
    "checkpoints/step_00000000": "resume ppo", "logs": "resume ppo", "doctor": "doctor",
    "overoptimisation.json": "overoptimisation", "overoptimisation.png": "overoptimisation",
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_or_deleted_through_a_link(name, place, tmp_path):
    victim = tmp_path / "victim"
    if name in ("doctor", "logs", "checkpoints/step_00000000"):
        victim.mkdir()
    kept = [victim / "mine.png", victim / "mine.old"] if victim.is_dir() else [victim]
    for file in kept:
        file.write_text("precious\n")
    link = place.run("ppo_tiny") / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    result = COMMANDS[LINKS[name]](place)
    assert [file.read_text() for file in kept] == ["precious\n"] * len(kept)
    if LINKS[name] != "overoptimisation":
        assert result.code == 2 and f"{name}: is a link" in result.err
    else:
        assert result.code == 0 and not link.is_symlink()


def test_a_file_is_not_written_through_a_link_beside_it(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "new.writing").symlink_to(tmp_path / "victim")
    write_file(tmp_path / "file", b"data")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "tokenizer/../../outside"])
def test_a_manifest_speaks_of_its_own_folder_only(name, place):
    folder = place.run("sft_tiny") / "final"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"size": 0, "sha256": ""}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "outside its folder" in fault_of(folder)


@pytest.mark.parametrize("size", ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "embedding_rows",
                                  "lora_rank"])  # fmt: skip
@pytest.mark.parametrize("name", ["gpt", "rm"])
def test_sizes_that_the_weights_do_not_have_are_told_at_once(size, name, place):
    for value in (10**6, 10**12, 10**400, -1):
        for folder in place.checkpoints():
            description = json.loads((folder / "model.json").read_text())
            description["model"][size] = value
            (folder / "model.json").write_text(json.dumps(description))
        _reseal(place)
        result = COMMANDS[name](place)
        assert result.code == 2 and "Traceback" not in result.err, (value, result.err)


def test_sizes_of_a_hugging_face_folder_are_those_of_its_weights(made, tmp_path):
    folder = tmp_path / "hf"
    GPT.from_checkpoint(next(made.glob("sft_tiny_*")) / "final").save_pretrained(folder)
    _change(folder / "config.json", n_embd=2**20, n_head=1)
    with pytest.raises(UserError, match="the weights are damaged: .* bytes are too few for its config.json"):
        GPT.from_pretrained(folder)


def test_a_hugging_face_folder_names_no_kernels(made, tmp_path, monkeypatch):
    """Entries of config.json that make transformers look for code elsewhere do not reach it."""
    from transformers import GPT2LMHeadModel

    folder, seen = tmp_path / "hf", []
    GPT.from_checkpoint(next(made.glob("sft_tiny_*")) / "final").save_pretrained(folder)
    _change(folder / "config.json", attn_implementation="someone/kernel", transformers_weights="../other.safetensors")
    load = GPT2LMHeadModel.from_pretrained
    monkeypatch.setattr(
        GPT2LMHeadModel, "from_pretrained", lambda *a, config, **k: seen.append(config) or load(*a, config=config, **k)
    )
    GPT.from_pretrained(folder)
    assert "someone" not in str(seen[0].to_dict()) + str(seen[0]._attn_implementation)
    assert not hasattr(seen[0], "transformers_weights")


HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e"


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("sft checkpoint", "rm")])
def test_texts_of_a_run_do_not_reach_the_terminal_as_control(name, place):
    """Names, versions, settings and samples with escape sequences in them are shown with these visible."""
    for path in place.runs.glob("*/hyperparams.json"):
        record = json.loads(path.read_text())
        record["versions"] = dict.fromkeys(record.get("versions", {}), HOSTILE)
        record["config"] |= dict(reward_fn=HOSTILE, eval_reward_fn=HOSTILE, dtype=HOSTILE)
        path.write_text(json.dumps(record | {"runs_on": HOSTILE}))
    for path in place.runs.rglob("model.json"):
        description = json.loads(path.read_text())
        description["model"]["name"] = description["stage"] = HOSTILE
        path.write_text(json.dumps(description | {"held_out": HOSTILE}))
    for path in place.runs.rglob("identity.json"):
        _change(path, name=HOSTILE)
    _reseal(place)
    result = COMMANDS[name](place)
    assert "Traceback" not in result.err
    shown = result.out + "".join(line.rpartition("\r")[2] for line in result.err.splitlines(keepends=True))
    assert not set(HOSTILE) & {c for c in shown if not c.isprintable() and c not in "\n\t"}, ascii(shown)


def test_what_a_model_says_does_not_reach_the_terminal_as_control(place, monkeypatch):
    from utils.tokenizer import TiktokenTokenizer

    monkeypatch.setattr(TiktokenTokenizer, "_decode", lambda self, ids: HOSTILE)
    for name in ("gpt", "reward", "dataset"):
        shown = COMMANDS[name](place).out
        assert not any(c in shown for c in HOSTILE if not c.isprintable())
        assert (r"\x1b[2J" in shown) == (name != "reward")  # which shows what was typed, and decodes one token


def test_the_document_names_the_tests():
    text = (REPO / "docs" / "run-folders.md").read_text()
    own = [name for name in globals() if name.startswith("test_") and name != "test_the_document_names_the_tests"]
    assert not [name for name in own if f"`{name}`" not in text]
    assert os.path.basename(__file__) in text
