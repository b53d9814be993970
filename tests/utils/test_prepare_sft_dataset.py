"""The SFT split: nothing that the reward model's data have, written whole or not at all."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.user_error import UserError
from utils.prepare_sft_dataset import PrepareConfig, main, prepare
from utils.template import PromptTemplate

pytestmark = pytest.mark.slow

T = PromptTemplate()
ROOT = Path(__file__).resolve().parents[2]


def pair(i, good="good", bad="bad"):
    prompt = T.format([f"question {i}"])
    return {"chosen": f"{prompt} {good} {i}", "rejected": f"{prompt} {bad} {i}"}


def static(i, good="good", bad="bad"):
    return {
        "prompt": T.format([f"question {i}"]),
        "response": f" {good} {i}",
        "chosen": f" {good} {i}",
        "rejected": f" {bad} {i}",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbers(path):
    return [int(json.loads(line)["response"].split()[-1]) for line in path.read_text().splitlines()]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new folder" / "hh-sft.jsonl"


def test_conversations_of_rm_static_stay_out(tmp_path, out):
    hh = write(tmp_path / "hh.jsonl", [pair(i) for i in range(12)])
    rm = write(tmp_path / "rm.jsonl", [
        static(0),
        static(1, good="other"),  # only the rejected side is shared
        static(2, bad="other"),  # only the chosen side is
        static(3, good="bad", bad="good"),  # sides exchanged
        static(4, good="one", bad="two"),  # same question, other dialogues
        {"prompt": "Human: question 5\nAssistant:", "chosen": "good  5\n", "rejected": "x"},  # same but for white space
        pair(6),  # in the HH form
        {"prompt": T.format(["question 7", "Which?", "That."]), "chosen": "a", "rejected": "b"},  # goes on
        {"prompt": "\r\n\r\nHuman:  question\r\n8\r\n\r\nAssistant:", "chosen": "a", "rejected": "b"},
    ])  # fmt: skip
    report = prepare(PrepareConfig(hh, rm, out))
    assert numbers(out) == [9, 10, 11]
    assert (report.read, report.written, report.in_rm_static) == (12, 3, 9)
    assert json.loads(out.read_text().splitlines()[0]) == {
        "prompt": "\n\nHuman: question 9\n\nAssistant:",
        "response": " good 9",
    }


def test_later_turns_of_a_conversation_stay_out(tmp_path, out):
    """HH-RLHF holds several beginnings of one conversation; rm-static may have any of them, on either side."""
    turns = ["question 1", "Which?", "That."]
    longer = {side: f"{T.format(turns)} {side}" for side in ("chosen", "rejected")}
    differ = {"chosen": f"{T.format(['question 2'])} a", "rejected": f"{T.format(['question 3'])} a"}
    hh = write(tmp_path / "hh.jsonl", [longer, differ, pair(4)])
    assert prepare(PrepareConfig(hh, write(tmp_path / "rm.jsonl", [static(1), static(3)]), out)).in_rm_static == 2
    assert numbers(out) == [4]


def test_duplicates_and_silence_are_left_out_and_counted(tmp_path, out):
    silent = pair(3)
    silent["chosen"] = T.format(["question 3"])
    hh = write(tmp_path / "hh.jsonl", [pair(1), pair(2), pair(1), pair(1, bad="worse"), silent])
    report = prepare(PrepareConfig(hh, write(tmp_path / "rm.jsonl", [static(9)]), out))
    assert numbers(out) == [1, 2]
    assert (report.read, report.written, report.duplicates, report.empty) == (5, 2, 2, 1)


def test_what_it_writes_is_the_dataset_hh_sft(tmp_path, monkeypatch):
    from utils.dataset import load_dataset
    from utils.tokenizer import get_tokenizer

    out = tmp_path / "hh-sft.jsonl"
    hh = write(tmp_path / "hh.jsonl", [pair(i) for i in range(60)])
    prepare(PrepareConfig(hh, write(tmp_path / "rm.jsonl", [static(0)]), out))
    monkeypatch.setattr("utils.data.sources.HH_SFT_FILE", out)
    data = load_dataset("hh-sft", "sft", "train", get_tokenizer("demo"), 256, cache_dir=tmp_path / "cache")
    assert data.report.read == 59 and len(data) > 40


def test_the_hub_is_the_default_and_its_test_rows_stay_out(tmp_path, out, monkeypatch):
    import datasets

    assert (PrepareConfig().hh, PrepareConfig().rm_static) == ("hub", "hub")
    rows = {
        ("Anthropic/hh-rlhf", "train"): [pair(i) for i in range(5)] + [{"chosen": "broken", "rejected": "row"}],
        ("Dahoas/rm-static", "train"): [static(0)],
        ("Dahoas/rm-static", "test"): [static(1)],
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: datasets.Dataset.from_list(rows[name, split]))
    report = prepare(PrepareConfig(out=out))
    assert numbers(out) == [2, 3, 4] and report.bad == 1


def test_an_unreachable_hub_names_the_flag(out, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match="--rm-static rm-static: Dahoas/rm-static could not be loaded"):
        prepare(PrepareConfig(out=out))


def test_wrong_input_leaves_no_file(tmp_path, out):
    hh = write(tmp_path / "hh.jsonl", [pair(i) for i in range(3)])
    torn = write(tmp_path / "torn.jsonl", [pair(1), {"chosen": "x"}])
    cases = [
        (PrepareConfig(hh, hh, out), "--hh: no row is left to write: 3 are of conversations in --rm-static"),
        (PrepareConfig(torn, write(tmp_path / "rm.jsonl", [static(9)]), out), 'torn.jsonl:2: "chosen" has no turn'),
        (PrepareConfig("none.jsonl", hh, out), "--hh none.jsonl: no such file"),
        (PrepareConfig(hh, str(tmp_path / "no"), out), "--rm-static .*no: no such file"),
        (PrepareConfig(hh, hh, tmp_path), "--out .*is a directory"),
        (PrepareConfig(hh, str(tmp_path / "rm.jsonl"), Path(hh) / "x.jsonl"), "--out .*cannot be written"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            prepare(config)
    assert not out.exists() and not list(out.parent.glob("*"))
    assert prepare(PrepareConfig(torn, str(tmp_path / "rm.jsonl"), out, skip_bad_rows=True)).bad == 1


def test_a_failure_keeps_the_file_of_before(tmp_path):
    out = tmp_path / "sft.jsonl"
    out.write_text("old")
    hh = write(tmp_path / "hh.jsonl", [pair(1)])
    with pytest.raises(UserError, match="no row is left to write"):
        prepare(PrepareConfig(hh, hh, out))
    assert out.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["hh.jsonl", "sft.jsonl"]


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(UserError, match="--hhh"):
        main(["--hhh", "x"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folder", "script"), [(".", "src/utils/prepare_sft_dataset.py"), ("src", "utils/prepare_sft_dataset.py")]
)
def test_as_a_script_from_the_root_and_from_src(tmp_path, out, folder, script):
    hh = write(tmp_path / "hh.jsonl", [pair(i) for i in range(5)])
    rm = write(tmp_path / "rm.jsonl", [static(0)])
    command = [sys.executable, script, "--hh", hh, "--rm-static", rm, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 demonstrations from 5 rows; left out: 1 of conversations in rm-static" in done.stdout
    wrong = subprocess.run([*command, "--rm-static", hh], cwd=ROOT / folder, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_real_dialogues(tmp_path, out):
    if not os.environ.get("TEST_DATA_DIR"):
        pytest.skip("TEST_DATA_DIR is not set: it has real dialogues")
    hh = Path(os.environ["TEST_DATA_DIR"]) / "hh-rlhf" / "harmless-test-1000.jsonl.gz"
    with gzip.open(hh, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:400]
    report = prepare(PrepareConfig(str(hh), write(tmp_path / "rm.jsonl", rows), out))

    def openings(rows, *keys):
        return {T.opening(T.prompt(row[key].rpartition(T.assistant)[0] + T.assistant)) for row in rows for key in keys}

    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert not openings(written, "prompt") & openings(rows, "chosen", "rejected")
    assert report.read == 1000 and len(written) == report.written > 570
    assert report.in_rm_static > 400  # more rows than have the very dialogue
