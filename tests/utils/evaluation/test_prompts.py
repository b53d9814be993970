"""Prompts of an evaluation: every form is read the same way, and wrong input is told in one line."""

import csv
import gzip
import io
import json

import pytest

from config.user_error import UserError
from utils.evaluation.prompts import DEFAULT_FILE, DEMO_FILE, read_prompts
from utils.template import PromptTemplate

TEMPLATE = PromptTemplate()
QUESTIONS = ["How do I make tea?", 'Say "hello", please.', "Two lines:\none\ntwo", "Grüße aus Köln?"]


def form(text: str) -> str:
    return f"\n\nHuman: {text}\n\nAssistant:"


@pytest.fixture
def write(tmp_path):
    """`write(name, text)`: a file, compressed when its name says so."""

    def make(name: str, text: str) -> str:
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / name)

    return make


def as_csv(rows) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("name", ["p.csv", "p.csv.gz", "p.jsonl", "p.jsonl.gz", "P.CSV", "p.json"])
def test_every_form_gives_the_same_prompts(write, name):
    if "jsonl" in name:
        text = "".join(json.dumps({"prompt": q, "other": 1}) + "\n" for q in QUESTIONS)
    elif name == "p.json":
        text = json.dumps([{"messages": [{"role": "user", "content": q}]} for q in QUESTIONS])
    else:
        text = as_csv([("id", "prompt", "category"), *((i, q, "x") for i, q in enumerate(QUESTIONS))])
    found = read_prompts(write(name, text), TEMPLATE)
    assert found.texts == [form(q) for q in QUESTIONS] and found.repeated == 0 and not found.of_demo


def test_a_text_file_has_a_prompt_a_line(write):
    path = write("p.txt", "\ufeffFirst?\r\n\r\n  Second?  \nHuman: third?\n")
    assert read_prompts(path, TEMPLATE).texts == [form("First?"), form("Second?"), form("third?")]


def test_dialogues_keep_their_turns(write):
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [{"prompt": dialogue.strip()}, {"chosen": dialogue + " yes", "rejected": dialogue + " no"}]
    found = read_prompts(write("p.jsonl", "".join(json.dumps(r) + "\n" for r in rows)), TEMPLATE)
    assert found.texts == [dialogue] and found.repeated == 1


def test_a_prompt_is_asked_once_and_a_limit_takes_the_first(write):
    path = write("p.txt", "a\nb\na\n  a \nc\n")
    assert (read_prompts(path, TEMPLATE).texts, read_prompts(path, TEMPLATE).repeated) == ([*map(form, "abc")], 2)
    assert read_prompts(path, TEMPLATE, limit=2).texts == [form("a"), form("b")]
    assert len(read_prompts(path, TEMPLATE, limit=9).texts) == 3


def test_the_prompts_that_ship():
    demo = read_prompts("demo", TEMPLATE, limit=5)
    assert demo.of_demo and len(demo.texts) == 5 and all(text.endswith("\n\nAssistant:") for text in demo.texts)
    assert demo.texts[0] == json.loads(gzip.decompress(DEMO_FILE.read_bytes()).split(b"\n")[0])["prompt"]
    assert len(read_prompts(str(DEFAULT_FILE), TEMPLATE).texts) >= 150


def test_paths_count_from_the_working_directory_or_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(read_prompts("assets/prompts.csv", TEMPLATE, limit=3).texts) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "", "has no prompt in it"),
        ("p.csv", "id,text\n1,a\n", r'p.csv:2: has no "chosen" \(keys: "id", "text"\); stage ppo needs "prompt"'),
        ("p.csv", "prompt\n", "has no prompt in it"),
        ("p.csv", 'prompt\na\n" "\n', r"p.csv:3: \"prompt\" is empty"),
        ("p.csv", "id,prompt\n1,a\n2\n", r"p.csv:3: has 1 field, the first line names 2 columns"),
        ("p.csv", 'prompt\n"a" b\n', "p.csv:2: not CSV"),
        ("p.txt", "\n \n", "has no prompt in it"),
        ("p.jsonl", "", "has no prompt in it"),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', "p.jsonl:2: "),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', 'p.jsonl:2: "prompt" is a number'),
        ("p.jsonl", '{"prompt": "a"}\n{oops\n', "p.jsonl:2: not JSON"),
        ("p.jsonl", json.dumps({"prompt": "Human: a\n\nAssistant: b"}), "ends inside a reply"),
        ("p.md", "a", "p.md:1: not JSON .* its name has to tell: .json, .csv, .tsv, .parquet, .txt"),
    ],
)
def test_wrong_files_are_told_in_one_line(write, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write(name, text), TEMPLATE)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="--prompts nowhere.csv: no such file"):
        read_prompts("nowhere.csv", TEMPLATE)
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_prompts(str(tmp_path / "bytes.txt"), TEMPLATE)
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"hello there\n" * 100)[:-9])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_prompts(str(tmp_path / "torn.txt.gz"), TEMPLATE)


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "missing/one":
            raise ConnectionError("no network\nat all")
        columns = {"a/b": {"act": ["Poet"], "prompt": ["Be a poet."]}, "c/d": {"text": ["x"]}}
        columns["e/f"] = {"messages": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]]}
        return datasets.Dataset.from_dict(columns[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_prompts("hub:a/b", TEMPLATE).texts == [form("Be a poet.")] and asked == [("a/b", "train")]
    assert read_prompts("hub:e/f", TEMPLATE).texts == [form("Hi")]
    with pytest.raises(UserError, match=r"hub:missing/one: could not be loaded \(ConnectionError: no network at all\)"):
        read_prompts("hub:missing/one", TEMPLATE)
    with pytest.raises(UserError, match=r'c/d train, row 0: has no "chosen" \(keys: "text"\); stage ppo needs'):
        read_prompts("hub:c/d", TEMPLATE)
