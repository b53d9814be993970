"""One table: every kind of file times every form of a row times every stage gives what plain JSON Lines give.

A new kind is an entry in `KINDS`, a new form one in `FORMS`, a new refusal one in `REFUSED`.
"""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config.user_error import UserError
from utils.data.sources import JSONLDataset
from utils.data.splits import SPLITS
from utils.dataset import load_dataset
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

T = PromptTemplate()
COUNT = 12


@pytest.fixture(scope="module")
def tok():
    return get_tokenizer("demo")


# --- what is said, and the plain form of it -------------------------------------------------------------------------


def dialogue(i: int) -> dict:
    """The content of row i: turns before the last reply, a good and a bad reply; every fourth bad one is empty."""
    turns = [f"question {i}, what?\nSay."] if i % 3 else [f"question {i}", f"{i}?", 'Yes, "that".']
    return {
        "system": "" if i % 2 else "You are kind.",
        "turns": turns,
        "good": f"5{i}" if i == 2 else f"good, {i} ä\n\nReally.",
        "bad": "" if i % 4 == 3 else f"bad {i}",
    }


def plain(d: dict) -> dict:
    """{"prompt", "response", "chosen", "rejected"} as strings."""
    prompt = d["system"] + T.format(d["turns"])
    return {"prompt": prompt, "response": d["good"], "chosen": d["good"], "rejected": d["bad"]}


# --- forms: a row as others write it, and the stages it is for ------------------------------------------------------

ALL = ("sft", "rm", "ppo")


def messages(d: dict, *replies: str, role="role", content="content", names=("system", "user", "assistant")) -> list:
    texts = [(names[1 + i % 2], text) for i, text in enumerate(d["turns"])]
    texts = [(names[0], d["system"])] * bool(d["system"]) + texts + [(names[2], reply) for reply in replies]
    return [{role: name, content: text} for name, text in texts]


def reply(text: str) -> list:
    return [{"role": "assistant", "content": text}]


def sharegpt(d: dict, *replies: str) -> list:
    return messages(d, *replies, role="from", content="value", names=("system", "human", "gpt"))


def parts(d: dict) -> list:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages(d, d["good"])]


def one_turn(d: dict) -> dict:
    return d | {"system": "", "turns": d["turns"][:1]}


FORMS = {
    "prompt and response": (("sft", "ppo"), lambda d: {k: plain(d)[k] for k in ("prompt", "response")}),
    "prompt, chosen, rejected": (ALL, lambda d: {k: plain(d)[k] for k in ("prompt", "chosen", "rejected")}),
    "HH": (ALL, lambda d: {k: f"{plain(d)['prompt']} {plain(d)[k]}" for k in ("chosen", "rejected")}),
    "completions": (ALL, lambda d: {"prompt": plain(d)["prompt"], "completions": [d["good"], d["bad"]]}),
    "prompt and completion": (("sft", "ppo"), lambda d: {"prompt": plain(d)["prompt"], "completion": d["good"]}),
    "messages": (("sft", "ppo"), lambda d: {"messages": messages(d, d["good"]), "source": "x"}),
    "messages with parts": (("sft", "ppo"), lambda d: {"messages": parts(d)}),
    "messages for a prompt": (("ppo",), lambda d: {"messages": messages(d)}),
    "ShareGPT": (("sft", "ppo"), lambda d: {"id": "a", "conversations": sharegpt(d, d["good"])}),
    "ShareGPT, ranked": (ALL, lambda d: {
        "conversations": sharegpt(d), "chosen": {"from": "gpt", "value": d["good"]},
        "rejected": {"from": "gpt", "value": d["bad"]},
    }),
    "TRL prompt": (("ppo",), lambda d: {"prompt": messages(d)}),
    "TRL prompt and completion": (("sft", "ppo"), lambda d: {"prompt": messages(d), "completion": reply(d["good"])}),
    "TRL implicit prompt": (ALL, lambda d: {"chosen": messages(d, d["good"]), "rejected": messages(d, d["bad"])}),
    "TRL explicit prompt": (ALL, lambda d: {
        "prompt": messages(d), "chosen": reply(d["good"]), "rejected": reply(d["bad"]),
    }),
    "UltraFeedback": (ALL, lambda d: {
        "prompt": d["turns"][0], "prompt_id": "f0", "chosen": messages(d, d["good"]), "rejected": messages(d, d["bad"]),
        "messages": messages(d, d["good"]), "score_chosen": 8.5, "score_rejected": 2.0,
    }),
    "UltraChat": (("sft", "ppo"), lambda d: {"prompt": d["turns"][0], "messages": messages(d, d["good"])}),
    "Alpaca": (("sft", "ppo"), lambda d: {"instruction": d["turns"][0], "input": "", "output": d["good"]}),
    "Alpaca, ranked": (ALL, lambda d: {"instruction": d["turns"][0], "chosen": d["good"], "rejected": d["bad"]}),
    "question and answer": (("sft",), lambda d: {"question": d["turns"][0], "answer": d["good"]}),
}  # fmt: skip
ONE_TURN = ("Alpaca", "Alpaca, ranked", "question and answer")
FLAT = ("prompt and response", "prompt, chosen, rejected", "HH", "prompt and completion", *ONE_TURN)
"""Forms whose values are strings, so that a table can hold them."""

# --- kinds of files -------------------------------------------------------------------------------------------------


def as_jsonl(rows: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def as_table(rows: list[dict], separator: str = ",", end: str = "\r\n") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=5)
    return out.getvalue()


BOM = b"\xef\xbb\xbf"
KINDS = {
    "rows.jsonl": as_jsonl,
    "rows.jsonl, CRLF": lambda rows: as_jsonl(rows, "\r\n"),
    "rows.jsonl, BOM": lambda rows: BOM + as_jsonl(rows),
    "rows.ndjson": as_jsonl,
    "rows.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "rows.jsonl.zst": lambda rows: pa.compress(as_jsonl(rows), "zstd", asbytes=True),
    "rows.json, lines": as_jsonl,
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.JSON": lambda rows: BOM + b" \n" + json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n",
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "rows.parquet": as_parquet,
    "rows.csv": as_table,
    "rows.csv, BOM, LF": lambda rows: BOM + as_table(rows, end="\n"),
    "rows.csv, CR": lambda rows: as_table(rows, end="\r"),
    "rows.csv.zst": lambda rows: pa.compress(as_table(rows), "zstd", asbytes=True),
    "rows.CSV": as_table,
    "rows.tsv": lambda rows: as_table(rows, "\t"),
}


def write(folder, kind, rows):
    path = folder / kind.partition(",")[0]
    path.write_bytes(KINDS[kind](rows))
    return path


def rows_of(path, stage):
    return list(JSONLDataset(stage, path).file_rows(path))


def texts(rows):
    return [(row.prompts, row.completions) for row in rows]


def plain_rows(folder, content, stage):
    (folder / "plain.jsonl").write_bytes(as_jsonl([plain(d) for d in content]))
    return rows_of(folder / "plain.jsonl", stage)


def with_line_ends(value, end):
    if isinstance(value, str):
        return value.replace("\n", end)
    if isinstance(value, dict):
        return {key: with_line_ends(v, end) for key, v in value.items()}
    return [with_line_ends(v, end) for v in value] if isinstance(value, list) else value


def is_table(kind):
    return any(kind.lower().startswith(f"rows.{name}") for name in ("csv", "tsv"))


def content_for(form):
    return [one_turn(d) if form in ONE_TURN else d for d in map(dialogue, range(COUNT))]


def forms_for(kind):
    """All forms; of tables those of strings alone, of a kind that only wraps another one a few."""
    wraps_another = "," in kind or kind.count(".") > 1
    return FLAT[:3] if wraps_another else FLAT if is_table(kind) else FORMS


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in KINDS for form in forms_for(kind)])
def test_every_kind_and_form_gives_what_plain_json_lines_give(tmp_path, kind, form):
    stages, written = FORMS[form]
    content = content_for(form)
    path = write(tmp_path, kind, [written(d) for d in content])
    for stage in stages:
        expected = plain_rows(tmp_path, content, stage)
        assert texts(rows_of(path, stage)) == texts(expected) and len(expected) == COUNT, stage


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("form", FORMS)
def test_line_ends_are_the_same_in_every_form(tmp_path, form, end):
    stages, written = FORMS[form]
    content = content_for(form)
    path = write(tmp_path, "rows.jsonl", [with_line_ends(written(d), end) for d in content])
    for stage in stages:
        assert texts(rows_of(path, stage)) == texts(plain_rows(tmp_path, content, stage)), stage


def test_a_prompt_beside_a_dialogue_may_be_its_system_text(tmp_path):
    content = dialogue(0) | {"system": "Be kind."}
    path = write(tmp_path, "rows.jsonl", [{"prompt": "Be kind.", "messages": messages(content, "a")}])
    assert texts(rows_of(path, "sft")) == [(("Be kind." + T.format(content["turns"]),), (" a",))]


def test_empty_rows_of_a_spreadsheet_are_blank_lines(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\n,\n\n,\n")
    assert texts(rows_of(tmp_path / "rows.csv", "sft")) == [((T.format(["a"]),), (" b",))]


def test_alpacas_input_follows_its_instruction(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Hi", "output": "Hello"}]
    found = rows_of(write(tmp_path, "rows.csv", [rows[0]]), "sft") + rows_of(write(tmp_path, "rows.json", rows), "sft")
    assert [row.prompts[0] for row in found] == [T.format([q]) for q in ("Add.\n\n1 and 2", "Add.\n\n1 and 2", "Hi")]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_plain_text_and_of_table_cells(tmp_path, end):
    path = write(tmp_path, "rows.csv", [{"text": f"a{end}b"}])
    assert texts(rows_of(path, "text")) == [(("",), ("a\nb",))]
    path = write(tmp_path, "rows.jsonl", [{"text": f"a{end}b"}])
    assert texts(rows_of(path, "sft")) == [(("",), ("a\nb",))]


def test_only_line_ends_change(tmp_path):
    odd = "\ufeffA\u2028b\u2029\x0b\x0c\x85e\u0301\u00a0c"
    (row,) = rows_of(write(tmp_path, "rows.jsonl", [{"prompt": "q", "response": odd}]), "sft")
    assert row.completions == (f" {odd}",)


def test_replies_that_differ_in_line_ends_alone_rank_nothing(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{"prompt": "q", "chosen": "a\nb", "rejected": "a\r\nb"}])
    with pytest.raises(UserError, match="rows.jsonl:1: two of the ranked replies are identical"):
        rows_of(path, "rm")


@pytest.mark.parametrize("stage", ALL)
def test_splits_and_tokens_are_the_same_in_every_kind(tmp_path, tok, stage):
    rows = [FORMS["prompt, chosen, rejected"][1](dialogue(i)) for i in range(COUNT)]
    found = {}
    for kind in ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"):
        path = write(tmp_path, kind, rows)
        sets = [load_dataset(str(path), stage, split, tok, 128, cache_dir=tmp_path) for split in SPLITS]
        found[kind] = [{k: v.tolist() for k, v in data.table.to_arrays().items()} for data in sets]
        assert len({data.fingerprint for data in sets}) == 3
    assert all(tables == found["rows.jsonl"] for tables in found.values())


def test_what_a_file_is_read_as_is_part_of_its_fingerprint(tmp_path, tok):
    for name in ("rows.txt", "rows.csv"):
        (tmp_path / name).write_text("prompt\n" + "".join(f"question {i}\n" for i in range(20)))
    (one, other) = (load_dataset(str(tmp_path / name), "ppo", "train", tok, 64, cache_dir=tmp_path) for name in
                    ("rows.txt", "rows.csv"))  # fmt: skip
    assert one.report.read == 21 and other.report.read == 20


def test_text_files_have_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(BOM + b"First?\r\n\r\n Second? \nthird")
    assert [row.prompts[0] for row in rows_of(tmp_path / "p.txt", "ppo")] == [
        T.format([q]) for q in ("First?", "Second?", "third")
    ]


# --- what is refused, and the remedy --------------------------------------------------------------------------------


def row(**keys) -> bytes:
    return as_jsonl([keys])


USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = BOT | {"tool_calls": [{"function": {"name": "f"}}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
GOOD = b'{"prompt": "q", "response": "r"}\n'

REFUSED = {
    # files
    "UTF-16": ("f.csv", "prompt\na\n".encode("utf-16"), "ppo", "f.csv: is UTF-16 text; save the file as UTF-8"),
    "Latin-1 in a table": ("f.csv", b"prompt\na\ncaf\xe9\n", "ppo", "f.csv:3: not UTF-8 text (byte 0xe9); save"),
    "Latin-1 in an array": ("f.json", b'[{"prompt": "caf\xe9"}]', "ppo", "f.json:1: not UTF-8 text (byte 0xe9); save"),
    "Latin-1 in a text": ("f.txt", b"a\ncaf\xe9\n", "ppo", "f.txt:2: not UTF-8 text (byte 0xe9); save"),
    "Excel": ("f.xlsx", b"PK\x03\x04....", "sft", "f.xlsx: is an Excel workbook or a zip archive; save"),
    "Excel under another name": ("f.csv", b"PK\x03\x04....", "sft", "f.csv: is an Excel workbook or a zip archive"),
    "old Excel": ("f.xls", b"\xd0\xcf\x11\xe0....", "sft", "save the sheet as CSV UTF-8"),
    "zip": ("f.jsonl.zip", b"PK\x03\x04....", "sft", "or unpack the archive"),
    "bzip2": ("f.jsonl.bz2", b"BZh91AY", "sft", "is compressed with bzip2; unpack it"),
    "xz": ("f.jsonl.xz", b"\xfd7zXZ\x00", "sft", "is compressed with xz; unpack it"),
    "Arrow": ("f.arrow", b"ARROW1\x00\x00", "sft", "is an Arrow file; save it as .parquet"),
    "a pointer": ("f.parquet", b"version https://git-lfs.github.com/spec/v1\n", "sft", "`git lfs pull` fetches"),
    "a web page": ("f.csv", b"<!DOCTYPE html>\n<html>", "sft", "f.csv: is a web page; download the file itself"),
    "no parquet": ("f.parquet", GOOD, "sft", "is named .parquet but is no parquet data; give it the name of"),
    "torn parquet": ("f.parquet", as_parquet([{"prompt": "a"}])[:-9], "sft", "parquet data is damaged or cut short ("),
    "compressed parquet": ("f.parquet.gz", gzip.compress(as_parquet([{"prompt": "a"}])), "sft", "; unpack it"),
    "not zstandard": ("f.jsonl.zst", GOOD, "sft", "is named .zst but is not zstandard data; rename it"),
    "torn zstandard": ("f.jsonl.zst", pa.compress(GOOD * 99, "zstd", asbytes=True)[:-9], "sft",
                       "f.jsonl.zst: zstandard data is damaged or cut short"),
    "torn gzip of a table": ("f.csv.gz", gzip.compress(b"prompt\n" + b"abc\n" * 9)[:-9], "ppo",
                             "f.csv.gz: gzip data is damaged or cut short"),
    "JSON Lines as CSV": ("f.csv", GOOD, "sft", "f.csv: is named .csv but holds JSON; name it .jsonl"),
    "an array as CSV": ("f.csv", b"[" + GOOD + b"]", "sft", "is named .csv but holds JSON; name it .json"),
    "JSON Lines as text": ("f.txt", GOOD, "ppo", "is named .txt but holds JSON; name it .jsonl"),
    "CSV as JSON Lines": ("f.jsonl", b"prompt,response\na,b\n", "sft", "its name has to tell: .json, .csv, .tsv"),
    "an array as JSON Lines": ("f.jsonl", b"[" + GOOD.strip() + b"]\n", "sft",
                               "f.jsonl:1: is a list of 1; one JSON object per line is needed; a file that is"),
    "an array over lines": ("f.jsonl", b"[\n" + GOOD + b"]", "sft", "is read when its name ends in .json"),
    "text for SFT": ("f.txt", b"a\nb\n", "sft", "a .txt file has one prompt a line, for PPO and evaluations; write"),
    # arrays
    "objects over many lines": ("f.json", json.dumps({"data": [{"prompt": "q"}]}, indent=1).encode(), "sft",
                                "objects over many lines are read as one JSON array in a file whose name ends"),
    "an empty array": ("f.json", b" [ ]\n", "sft", "f.json: has no rows for stage sft; there is no row in it"),
    "an array cut short": ("f.json", b"[" + GOOD + b",", "sft", "f.json:2: not JSON (the file ends inside the array)"),
    "a row cut short": ("f.json", b"[" + GOOD + b', {"prompt": "a', "sft", "f.json:2: not JSON (Unterminated string"),
    "no comma": ("f.json", b"[" + GOOD + GOOD + b"]", "sft", "f.json:1: not JSON (a comma is missing behind it)"),
    "more behind": ("f.json", b"[" + GOOD + b"]" + GOOD, "sft", "f.json:1: there is more behind the end"),
    "a bad row": ("f.json", b"[" + GOOD + b', {"prompt": 3}]', "ppo", 'f.json:2: "prompt" is a number'),
    "an object around": ("f.json", b'{"data": [{"prompt": "q"}]}', "sft",
                         'f.json:1: is an object around a list of rows ("data"); write that list alone'),
    # tables
    "a short row": ("f.csv", b"prompt,response\na,b\nc\n", "sft", "f.csv:3: has 1 field, the first line names 2"),
    "a long row": ("f.csv", b"prompt,response\na,b, c\n", "sft", "f.csv:2: has 3 fields, the first line names 2"),
    "a long row behind a break": ("f.csv", b'prompt,response\n"a\nb",c\nd,e,f\n', "sft", "f.csv:4: has 3 fields"),
    "quotes": ("f.tsv", b'prompt\tresponse\n"a" b\tc\n', "sft",
               "quote fields that hold tabs or quotes, and double those quotes"),
    "an open quote": ("f.csv", b'prompt,response\na,"b\nc,d\n', "sft", "f.csv:2: not CSV (unexpected end of data)"),
    "columns called alike": ("f.csv", b"prompt,prompt\na,b\n", "sft", 'f.csv:1: two columns are called "prompt"'),
    "semicolons": ("f.csv", b"prompt;response\na;b\n", "sft", "f.csv:1: its columns are separated by ';'"),
    "bars": ("f.csv", b"prompt|response\na|b\n", "sft", "f.csv:1: its columns are separated by '|'; save it with"),
    "quoted semicolons": ("f.csv", b'"prompt";"response"\n', "sft", "; commas have to be between its columns"),
    "tabs in .csv": ("f.csv", b"prompt\tresponse\na\tb\n", "sft", r"its columns are separated by '\t'; name it .tsv"),
    "no such column": ("f.csv", b"id,reply\n1,a\n", "sft", 'f.csv:2: has no "chosen" (keys: "id", "reply"); stage sft'),
    "a header alone": ("f.csv", b"prompt,response\n", "sft", "has no rows for stage sft; there is no row in it"),
    "messages in a cell": ("f.csv", b"messages\n\"[{'role': 'user'}]\"\n", "sft",
                           '"messages" is a string; it has to be a list of {"role"'),
    "null in parquet": ("f.parquet", as_parquet([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}]),
                        "sft", 'f.parquet:2: "response" is null'),
    "a number in parquet": ("f.parquet", as_parquet([{"prompt": "a", "response": 5}]), "sft", '"response" is a number'),
    # rows
    "a labelled reply": ("f.jsonl", row(prompt="q", completion="a", label=False), "sft", 'is a reply with a "label"'),
    "labelled messages": ("f.jsonl", row(prompt=[USER], completion=[BOT], label=True), "rm", 'is a reply with a "'),
    "labelled steps": ("f.jsonl", row(prompt="q", completions=["a", "b"], labels=[True, False]), "rm",
                       'has "labels" beside "completions"'),
    "labelled dialogues": ("f.jsonl", row(messages=[USER, BOT], label=False), "sft", 'is a reply with a "label"'),
    "labelled by a tag": ("f.jsonl", row(instruction="q", output="a", kto_tag=False), "sft", 'reply with a "kto_tag"'),
    "a reply not to be learned": ("f.jsonl", row(messages=[USER, BOT, USER, BOT | {"weight": 0}]), "sft",
                                  '"messages[3]" has weight 0: it is not to be trained on; remove that turn'),
    "a turn as a row": ("f.jsonl", row(message_id="1", text="q", role="prompter"), "sft",
                        'has "role" beside "text"; write each dialogue as "messages"'),
    "a reply to a text": ("f.jsonl", row(text="q", response="a"), "sft",
                          'has "response" beside "text"; rename "text" to "prompt", or remove "response" for'),
    "functions": ("f.jsonl", row(messages=[USER, BOT], functions=[{"name": "f"}]), "sft", 'has "functions", which'),
    "a system prompt beside": ("f.jsonl", row(instruction="q", system_prompt="s", output="a"), "sft",
                               'has "system_prompt", which is not read; write it into the dialogue, or remove it'),
    "replies with scores": ("f.jsonl", row(instruction="q", completions=[{"response": "a", "overall_score": 5}] * 2),
                            "rm", '"completions[0][0]" has no "role" (keys: "response", "overall_score")'),
    "tool calls": ("f.jsonl", row(messages=[USER, TOOL]), "sft",
                   'f.jsonl:1: "messages[1]" has "tool_calls"; a dialogue has turns of system, user and'),
    "a turn of a tool": ("f.jsonl", row(messages=[USER, {"role": "tool", "content": "x"}, BOT]), "sft",
                         '"messages[1]" has the role "tool"'),
    "no role": ("f.jsonl", row(messages=[{"content": "x"}]), "sft", '"messages[0]" has no "role" (keys: "content")'),
    "an image": ("f.jsonl", row(messages=[IMAGE, BOT]), "sft", 'has a part that is no text ("image_url")'),
    "tools": ("f.jsonl", row(messages=[USER, BOT], tools="[...]"), "sft", 'has "tools", which is not read'),
    "a system text beside": ("f.jsonl", row(conversations=[USER, BOT], system="s"), "sft", 'has "system", which'),
    "a context beside": ("f.jsonl", row(instruction="q", context="c", response="a"), "sft",
                         'has "context", which is not read; rename it to "input", or remove it'),
    "a system text inside": ("f.jsonl", row(messages=[USER, {"role": "system", "content": "s"}, BOT]), "sft",
                             '"messages[1]" is a system text inside the dialogue'),
    "the person last": ("f.jsonl", row(messages=[USER, BOT, USER]), "sft", '"messages" ends with a turn of the person'),
    "the model alone": ("f.jsonl", row(messages=[BOT]), "sft", '"messages" has no turn of the person before'),
    "no messages": ("f.jsonl", row(messages=[]), "sft", '"messages" is a list of 0; it has to be a list of'),
    "an empty turn": ("f.jsonl", row(messages=[USER | {"content": " "}, BOT]), "sft", '"messages[0]" is empty'),
    "half a pair in a turn": ("f.jsonl", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "ppo",
                              '"messages[0]" has half of a surrogate pair'),
    "a prompt of the model's": ("f.jsonl", row(prompt=[USER, BOT]), "ppo", '"prompt" ends with a turn of the model'),
    "another prompt": ("f.jsonl", row(prompt="other?", chosen=[USER, BOT], rejected=[USER, BOT]), "rm",
                       '"chosen" is a dialogue without "prompt" in it; leave one of them out'),
    "a dialogue for a reply": ("f.jsonl", row(prompt="q", completion=[USER, BOT]), "sft",
                               '"completion" is a whole dialogue; give the reply alone, or the dialogue as "messages"'),
    "messages for the reward model": ("f.jsonl", row(messages=[USER, BOT]), "rm", 'has no "chosen" (keys: "messages")'),
    "names of its own": ("f.jsonl", row(query="q", reply="a"), "sft",
                         'rename "query" to "prompt" and "reply" to "response", if that is what they are'),
    "names in capitals": ("f.jsonl", row(Prompt="q", Chosen="a", Rejected="b"), "rm",
                          'rename "Prompt" to "prompt" and "Chosen" to "chosen" and "Rejected" to "rejected"'),
    "names in the plural": ("f.jsonl", row(inputs="q", targets="a"), "sft",
                            'rename "inputs" to "prompt" and "targets" to "response"'),
    "messages of another name": ("f.jsonl", row(model="m", conversation=[USER, BOT], turn=1), "sft",
                                 'rename "conversation" to "messages"'),
    "a question for pairs": ("f.jsonl", row(question="q", system="s", chosen="a", rejected="b"), "rm",
                             '; rename "question" to "prompt", if that is what they are; "system" is not read, write'),
    "two replies": ("f.jsonl", row(question="q", id_0="x", id_1="y", response_j="yes", response_k="no"), "rm",
                    'rename "question" to "prompt", if that is what they are; call the better one of "response_j" and '
                    '"response_k" "chosen", the other "rejected"'),
    "two dialogues": ("f.jsonl", row(model_a="x", model_b="y", winner="model_a", conversation_a=[USER, BOT],
                                     conversation_b=[USER, BOT]), "sft",
                      'call the better one of "conversation_a" and "conversation_b" "chosen", the other "rejected"'),
    "instructions without pairs": ("f.jsonl", row(instruction="q", output="a"), "rm", 'best first) (--skip-bad-rows'),
    "a question with more": ("f.jsonl", row(question="q", answer="a", choices=["a", "b"]), "sft",
                             'rename "question" to "prompt" and "answer" to "response"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_told_with_its_remedy(tmp_path, case):
    name, data, stage, told = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(JSONLDataset(stage, tmp_path / name).rows("train"))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and told in message and "\n" not in message


@pytest.mark.parametrize("name", ["f.csv", "f.json", "f.jsonl", "f.tsv", "f.parquet"])
def test_bad_rows_are_passed_over_in_every_kind(tmp_path, name):
    rows = [{"prompt": f"q {i}", "response": "r" if i % 4 else None} for i in range(COUNT)]
    if name[2:] in ("csv", "tsv"):
        data = as_table(rows, "\t" if "tsv" in name else ",").replace(b"q 4", b'"q" 4').replace(b"q 8", b"q \xff 8")
        data = data.replace(b"q 0", b"q 0,\t")
    else:
        data = KINDS[f"rows.{name[2:]}"](rows)
    (tmp_path / name).write_bytes(data)
    source = JSONLDataset("sft", tmp_path / name, skip_bad_rows=True)
    assert len(list(source.file_rows(source.path))) == COUNT - 3
    assert (source.counts.bad, source.counts.read) == (3, COUNT)


def test_a_folder_is_told_how_it_becomes_one_file(tmp_path):
    (tmp_path / "train-00000-of-00002.parquet").write_bytes(as_parquet([{"prompt": "a"}]))
    with pytest.raises(UserError, match=r"is a directory; one file is needed: datasets.load_dataset\('pa.*joins"):
        rows_of(tmp_path, "sft")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"datasets.load_from_disk\(.*\).to_parquet\('all.parquet'\) writes it"):
        rows_of(tmp_path, "sft")


def test_long_fields_and_large_files(tmp_path, monkeypatch):
    """Fields beyond csv's own limit, and arrays of more characters than are decoded at once."""
    long = "word " * 40_000
    for kind in ("rows.csv", "rows.json", "rows.parquet"):
        path = write(tmp_path, kind, [{"prompt": f"q {i}", "response": long + str(i)} for i in range(3)])
        assert [row.completions[0][-1] for row in rows_of(path, "sft")] == ["0", "1", "2"]
    monkeypatch.setattr("utils.data.files.MAX_LINE_BYTES", 2**16)
    for kind in ("rows.csv", "rows.jsonl", "rows.json"):
        with pytest.raises(UserError, match=r"rows.\w+:[12]: "):
            rows_of(write(tmp_path, kind, [{"prompt": "q", "response": long}]), "sft")
