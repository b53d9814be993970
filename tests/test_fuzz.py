"""Mutated real files: whatever is done to a data file or a checkpoint, it is loaded rightly or refused in one line.

2,400 cases from fixed seeds. Data: rows of HH-RLHF where TEST_DATA_DIR has them, else of the demo, in every form; what
is read has to equal a reading by other means. Checkpoints: a folder of a tiny reward model; with its manifest no
altered file may get through, and without one what is loaded has to be exactly what the altered file says.
"""

import gzip
import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from config.model_configs import GPTConfig
from config.user_error import UserError
from models.gpt import GPTRewardModel
from training.start import describe_model, template_of
from training.storage.saving import STATE, Saver, load_state
from utils.data.files import read_jsonl
from utils.data.rows import BadRow, parse_row
from utils.data.sources import DEMO_FOLDER
from utils.dataset import load_dataset
from utils.runs.manifest import MANIFEST
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer, load_tokenizer

pytestmark = pytest.mark.slow

DATA_CASES, LOAD_CASES, SEALED_CASES, BARE_CASES = 1200, 200, 500, 500
ROWS = 12


@contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """Fails what hangs."""

    def late(number, frame):
        raise AssertionError(f"still at work after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextmanager
def refused_or(done: list) -> Iterator[None]:
    """The body ends, which is noted in `done`, or raises a UserError of one line that is not empty."""
    try:
        with in_time():
            yield
        done.append(True)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# Mutations
# ---------------------------------------------------------------------------------------------------------------------

STRANGE = [
    None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\x00", "\ud800", "\u2028", "\ufeff",
    "a" * 10_000, [], [[]], {}, {"prompt": "a"}, ["a", "b"], ["a", "a"], ["a", None], "\n\nHuman: a\n\nAssistant:",
    "\n\nAssistant: b", "Human:", "\r\n\r\nHuman: a\r\n\r\nAssistant: b", "<|endoftext|>",
]  # fmt: skip


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of the file somewhere else in it, or in place of another, or gone."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    piece = data[a : min(b, a + 5000)]
    return rng.choice([data[:at] + piece + data[at:], data[:at] + piece + data[at + len(piece) :], data[:a] + data[b:]])


PIECES = [
    b"\0", b"\xff", b"\n", b"\r\n", b"\xef\xbb\xbf", b'"', b"\\", b"{", b"[" * 2000, b"\xed\xa0\x80", b"\\ud800",
    b"1e999", b"NaN",
]  # fmt: skip


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(PIECES) * rng.choice([1, 1, 3]) + data[at:]


def swap_values(data: bytes, rng: random.Random) -> bytes:
    """Another type or text for one value of one row."""
    lines = data.decode().splitlines()
    i = rng.randrange(len(lines))
    row = json.loads(lines[i])
    key = rng.choice(list(row))
    change = rng.randrange(4)
    if change == 0:
        row[key] = rng.choice(STRANGE)
    elif change == 1:
        row[rng.choice(["prompt", "response", "chosen", "rejected", "completions", "text", "Prompt"])] = row.pop(key)
    elif change == 2:
        row[rng.choice(["prompt", "response", "completions", "text"])] = rng.choice(STRANGE)
    else:
        row = rng.choice([row, [row], list(row.values()), json.dumps(row)])
    lines[i] = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def line_ends(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x0b\n", b"\xe2\x80\xa8", b" \n\t"]))


BYTES = (flip_bits, truncate, splice, insert)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes; at times inside gzip, and to the gzip data."""
    for step in range(rng.choice([1, 1, 1, 2, 3])):
        ways = [*BYTES, line_ends] + [swap_values] * 3 * (step == 0)  # the first change still finds JSON
        data = rng.choice(ways)(data or b"x", rng)
    if rng.random() < 0.25:
        data = gzip.compress(data, mtime=0)
        if rng.random() < 0.6:
            data = rng.choice(BYTES)(data, rng)
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> list[tuple[str, bytes]]:
    """(stage, lines) of real rows in every form."""
    folder = os.environ.get("TEST_DATA_DIR")
    real = sorted(Path(folder).rglob("*.jsonl*")) if folder else []
    paths = [("rm", real[0])] if real else []
    paths += [("rm", DEMO_FOLDER / "pairs-test.jsonl.gz"), ("sft", DEMO_FOLDER / "sft-validation.jsonl.gz")]
    paths += [("ppo", DEMO_FOLDER / "prompts-test.jsonl.gz"), ("text", DEMO_FOLDER / "text.jsonl.gz")]
    found = []
    for stage, path in paths:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        found.append((stage, b"\n".join(data.splitlines()[:ROWS]) + b"\n"))
    rows = [json.loads(line) for line in found[0][1].splitlines()]
    template = PromptTemplate()
    ranked = []
    for row in rows:
        prompt, good = template.split_dialogue(row["chosen"])
        ranked.append({"prompt": prompt, "completions": [good or "a", good + " b", "no"]})
    return [*found, ("rm", "".join(json.dumps(row) + "\n" for row in ranked).encode())]


def independent_lines(data: bytes) -> list[bytes] | None:
    """The lines of a file by other means than the reader's; None for gzip data that Python cannot open."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except Exception:
            return None
    data = data.removeprefix(b"\xef\xbb\xbf")
    return data.split(b"\n")


def test_mutated_data_files_are_read_rightly_or_refused(files, tmp_path) -> None:
    """`read_jsonl` gives the values that `json` gives line by line, and a row is parsed or refused."""
    path, template, whole = tmp_path / "rows.jsonl", PromptTemplate(), []
    for seed in range(DATA_CASES):
        rng = random.Random(seed)
        stage, data = files[seed % len(files)]
        data = mutated(data, rng)
        path.write_bytes(data)
        lines = independent_lines(data)
        with refused_or(whole):
            read = list(read_jsonl(path))
            assert lines is not None, seed  # torn gzip must not look like a short file
            expected = {}
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        expected[number] = json.loads(line.decode())
                    except (ValueError, RecursionError):
                        expected[number] = BadRow
            assert [number for number, _ in read] == list(expected), seed
            for number, value in read:
                if expected[number] is BadRow:
                    assert isinstance(value, BadRow), seed
                    continue
                assert json.dumps(value) == json.dumps(expected[number]), seed
                check_row(value, stage, template)
    assert DATA_CASES / 2 < len(whole) < DATA_CASES  # both outcomes are common


def check_row(value, stage: str, template: PromptTemplate) -> None:
    """A parsed row has the texts of the value, and nothing else."""
    try:
        row = parse_row(value, stage, "here:1", template)
    except BadRow as error:
        assert str(error).startswith("here:1: ") and "\n" not in str(error)
        return
    if row is None:
        return
    own = "\n".join(json.dumps(text) for text in strings(value)).replace("\\r\\n", "\\n")
    assert len(row.prompts) == max(1, len(row.completions))
    for text in (*row.prompts, *row.completions):
        text.encode("utf-8")
        core = text.replace("\r\n", "\n").strip().removeprefix("Human:").removesuffix("Assistant:").strip()
        assert json.dumps(core)[1:-1] in own, (text, value)
    if stage == "rm":
        assert len(row.completions) >= 2
        assert len(set(zip(row.prompts, row.completions, strict=True))) == len(row.completions)


def strings(value) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in strings(one)]


def test_mutated_data_files_become_datasets_or_are_refused(files, tmp_path) -> None:
    """The whole way to token ids, with and without --skip-bad-rows: every row counts once and decodes to its text."""
    tokenizer, template, whole = get_tokenizer("demo"), PromptTemplate(), []
    for seed in range(LOAD_CASES):
        rng = random.Random(10_000 + seed)
        stage, data = files[seed % len(files)]
        path = tmp_path / f"rows{seed}.jsonl"
        path.write_bytes(mutated(data, rng))
        skip = rng.random() < 0.5
        with refused_or(whole):
            data = load_dataset(
                str(path), stage, "train", tokenizer, 256, cache_dir=tmp_path / "cache", skip_bad_rows=skip
            )
            report = data.report
            passed = report.dropped + report.bad + report.empty + report.elsewhere
            assert report.read == report.kept + passed and report.kept == len(data) > 0
            assert skip or report.bad == 0
            read = [value for _, value in read_jsonl(path) if not isinstance(value, BadRow)]
            texts = set()
            for value in read:
                try:
                    row = parse_row(value, stage, "", template)
                    texts |= {*row.prompts, *row.completions} if row else set()
                except BadRow:
                    assert skip
            for i in range(len(data)):
                example = data[i]
                ids = [example] if isinstance(example, np.ndarray) else []
                if stage in ("sft", "text"):
                    ids = [example.prompt_ids, example.response_ids]
                elif stage == "rm":
                    ids = [*example.prompt_ids, *example.response_ids]
                for each in ids:
                    text = tokenizer.decode(each.tolist())
                    rest = text.lstrip("\ufffd")  # the first letter of a prompt that was cut may have lost a byte
                    assert text in texts or (rest and any(other.endswith(rest) for other in texts)), text
    assert len(whole) > LOAD_CASES / 4


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A real step checkpoint of a tiny reward model: weights, description, tokenizer, trainer's state, manifest."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = get_tokenizer("demo")
    torch.manual_seed(0)
    size = dict(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=tokenizer.vocab_size)
    model = GPTRewardModel(GPTConfig(name="gpt2-nano", **size))
    optimizer = torch.optim.AdamW(model.parameters())
    described = describe_model("rm", tokenizer, PromptTemplate(), "scratch")
    state = {"step": 1, "best": 0.5, "optimizer": optimizer.state_dict(), "scaler": {}, "rng": {}}
    Saver(run, {"": model}, tokenizer, described, 1).save_step(1, state)
    return run / "checkpoints" / "step_00000001"


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Another name, type, shape or place for one tensor in the header of a safetensors file, or another header size."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, change = header[name], rng.randrange(8)
    if change == 0:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U8", "X9", 3])
    elif change == 1:
        entry["shape"] = rng.choice([[], [1], entry["shape"][::-1], [*entry["shape"], 1], [-1], [2**62, 4], "a"])
    elif change == 2:
        entry["data_offsets"] = [entry["data_offsets"][0] + rng.choice([-4, 4, 2**40]), entry["data_offsets"][1]]
    elif change == 3:
        header[rng.choice(["extra", name + ".x", ""])] = header.pop(name)
    elif change == 4:
        header.pop(name)
    elif change == 5:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif change == 6:
        header["__metadata__"] = rng.choice([None, [], {"format": 3}, "x"])
    text = json.dumps(header).encode()
    length = rng.choice([0, 2**63, len(text) + 1, len(text) - 1, size]) if change == 7 else len(text)
    return struct.pack("<Q", length) + text + data[8 + size :]


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """Another type, value or name for one entry of a JSON file, at any depth."""
    value = json.loads(data)
    at = value
    while True:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
            at = at[key]
            continue
        break
    if rng.random() < 0.25:
        at.pop(key)
    elif isinstance(at, dict) and rng.random() < 0.2:
        at[f"{key}x"] = at.pop(key)
    else:
        at[key] = rng.choice([*STRANGE, 3, 8, 17, "lm", "critic"])
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_folder(folder: Path, rng: random.Random, names: list[str]) -> str | None:
    """Change one file of a folder; its name, or None if by chance nothing has changed."""
    name = rng.choice(names)
    path = folder / name
    data = path.read_bytes()
    ways: list[Callable] = list(BYTES)
    if name.endswith(".safetensors"):
        ways += [edit_header] * 4
    elif name.endswith(".json"):
        ways += [edit_json] * 4
    kind = rng.random()
    if kind < 0.04:
        path.unlink()
        return name
    if kind < 0.06:
        path.unlink()
        path.mkdir()
        return name
    changed = rng.choice(ways)(data, rng)
    path.write_bytes(changed)
    return name if changed != data else None


def load_everything(folder: Path) -> GPTRewardModel:
    """What a stage reads of a checkpoint."""
    template_of(folder)
    load_tokenizer(folder)
    return GPTRewardModel.from_checkpoint(folder)


TOKENIZER = ["tokenizer/identity.json", "tokenizer/bpe.tiktoken"]
FILES = ["model.safetensors", "model.safetensors", "model.json", *TOKENIZER, STATE, MANIFEST]


def test_an_altered_checkpoint_is_refused_or_loads_what_was_saved(checkpoint, tmp_path) -> None:
    """With its manifest: a change of the weights or of model.json is never loaded, and any other changes nothing."""
    whole, original = [], load_everything(checkpoint).state_dict()
    for seed in range(SEALED_CASES):
        rng = random.Random(20_000 + seed)
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        name = mutate_folder(folder, rng, FILES)
        if name is None:
            continue
        with refused_or(whole):
            loaded = load_everything(folder).state_dict()
            if name == STATE:
                load_state(folder)
            assert name not in ("model.safetensors", "model.json"), (seed, name)
            assert all(torch.equal(loaded[key], original[key]) for key in original), (seed, name)
            a, b = (load_tokenizer(place).identity() for place in (folder, checkpoint))
            assert a | {"name": ""} == b | {"name": ""}, (seed, name)  # its name decides nothing
    assert 0 < len(whole) < SEALED_CASES / 3


def test_a_folder_without_a_manifest_loads_what_its_files_say_or_is_refused(checkpoint, tmp_path) -> None:
    """A model folder that nobody sealed: no traceback, and no tensor other than the file's."""
    whole = []
    for seed in range(BARE_CASES):
        rng = random.Random(30_000 + seed)
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        (folder / MANIFEST).unlink()
        description = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps({k: v for k, v in description.items() if k != "sealed"}))
        mutate_folder(folder, rng, FILES[:-1])
        with refused_or(whole):
            loaded = load_everything(folder).state_dict()
            tensors = independent_tensors(folder / "model.safetensors")
            assert set(loaded) == set(tensors), seed
            for key, tensor in loaded.items():
                assert torch.isfinite(tensor).all() and np.array_equal(tensor.numpy(), tensors[key]), (seed, key)
        with refused_or(whole):
            state = load_state(folder)
            assert {"step", "optimizer"} <= set(state)
    assert len(whole) > BARE_CASES / 10


NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}


def independent_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file, read by its description alone."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            raw = data[start:stop]
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(raw, NUMPY[entry["dtype"]])
            found[name] = values.reshape(entry["shape"]).astype("<f4")
    return found
