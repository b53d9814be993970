"""Datasets from text to ids: names, stages, splits, reports, cache, and bad input."""

import gzip
import json
import os
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from permissions import permissions_count

from config.user_error import UserError
from utils.data.batching import collate_ranked
from utils.data.sources import DATASETS, AnthropicHHRLHFDataset, DemoDataset, JSONLDataset
from utils.data.splits import SplitOptions
from utils.dataset import PromptDataset, RankedDataset, SFTDataset, load_dataset
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

pytestmark = pytest.mark.slow

T = PromptTemplate()
SHARED = SplitOptions(prompt_split="shared")


@pytest.fixture(scope="module")
def tok():
    return get_tokenizer("demo")


@pytest.fixture
def load(tok, tmp_path):
    """load_dataset with the demo's tokenizer and a cache of its own."""

    def load(name, stage="sft", split="train", max_length=256, **options):
        return load_dataset(str(name), stage, split, tok, max_length, **{"cache_dir": tmp_path / "cache"} | options)

    return load


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(n):
    return [
        {"chosen": T.format([f"question {i}"]) + f" good {i}", "rejected": T.format([f"question {i}"]) + f" bad {i}"}
        for i in range(n)
    ]


def prompt_texts(dataset, tok):
    if isinstance(dataset, PromptDataset):
        return [tok.decode(prompt) for prompt in dataset]
    examples = [dataset[i] for i in range(len(dataset))]
    if isinstance(dataset, RankedDataset):
        return [tok.decode(prompt) for example in examples for prompt in example.prompt_ids]
    return [tok.decode(example.prompt_ids) for example in examples]


# --- what comes out -------------------------------------------------------------------------------------------------


def test_each_stage_gives_its_examples(load, tok, tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(200))
    sft, rm, ppo = load(path, "sft"), load(path, "rm"), load(path, "ppo")
    assert (type(sft), type(rm), type(ppo)) == (SFTDataset, RankedDataset, PromptDataset)
    example, ranked, prompt = sft[0], rm[0], ppo[0]
    number = tok.decode(example.prompt_ids).removeprefix("\n\nHuman: question ").removesuffix("\n\nAssistant:")
    assert example.response_ids.tolist() == [*tok.encode(f" good {number}"), tok.eos_id]
    assert [tok.decode(response).split()[0] for response in ranked.response_ids] == ["good", "bad"]
    assert all(response[-1] == tok.eos_id and tok.eos_id not in response[:-1] for response in ranked.response_ids)
    assert tok.decode(prompt).endswith("\n\nAssistant:")
    assert all(array.dtype == np.int32 for array in (example.prompt_ids, ranked.prompt_ids[0], prompt))
    assert sft.lengths[0] == len(example.prompt_ids) + len(example.response_ids)
    assert rm.lengths[0] == max(len(p) + len(r) for p, r in zip(ranked.prompt_ids, ranked.response_ids, strict=True))
    assert ppo.lengths.tolist() == [len(prompt) for prompt in ppo]


def test_datasets_are_sequences(load, tmp_path):
    data = load(write(tmp_path / "f.jsonl", pairs(50)))
    assert len(list(data)) == len(data) and np.array_equal(data[-1].prompt_ids, data[len(data) - 1].prompt_ids)
    assert np.array_equal(data[np.int64(2)].prompt_ids, data[2].prompt_ids)
    for wrong in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[wrong]


def test_reward_model_and_ppo_see_the_same_prompt_ids(load, tok, tmp_path):
    """The reward model's input is the PPO prompt's ids followed by the response's, with no token re-made from text."""
    path = write(tmp_path / "f.jsonl", pairs(60))
    rm, ppo = load(path, "rm", splits=SHARED), load(path, "ppo", splits=SHARED)
    assert len(rm) == len(ppo)
    for i in range(len(rm)):
        assert rm[i].prompt_ids[0].tolist() == rm[i].prompt_ids[1].tolist() == ppo[i].tolist()
        assert rm[i].response_ids[0].tolist()[-2] == tok.encode(tok.decode(rm[i].response_ids[0]))[-1]


def test_rankings_of_different_sizes(load, tok, tmp_path):
    rows = [{"prompt": f"q {i}", "completions": [f"c {j}" for j in range(2 + i % 3)]} for i in range(80)]
    data = load(write(tmp_path / "f.jsonl", rows), "rm")
    assert {len(example.response_ids) for example in data} == {2, 3, 4}
    batch = collate_ranked([data[i] for i in range(len(data))], tok.pad_id)
    assert batch.mask.sum() == len(batch.rows.ids) == sum(len(example.response_ids) for example in data)
    assert batch.mask.shape[1] == 4


def test_pairs_that_differ_in_the_prompt_keep_their_own(load, tok, tmp_path):
    rows = [
        {"chosen": T.format([f"q {i}", "a", "b"]) + " good", "rejected": T.format([f"q {i}"]) + " bad"}
        for i in range(30)
    ]
    data = load(write(tmp_path / "f.jsonl", rows), "rm")
    for example in data:
        first, second = (tok.decode(prompt) for prompt in example.prompt_ids)
        assert first == T.format([second.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:"), "a", "b"])


def test_text_has_empty_prompts_and_one_eos(load, tok, tmp_path):
    path = write(tmp_path / "f.jsonl", [{"text": f"story {i}"} for i in range(40)])
    for stage in ("text", "sft"):
        example = load(path, stage)[0]
        assert len(example.prompt_ids) == 0 and example.response_ids.tolist().count(tok.eos_id) == 1


def test_long_prompts_lose_their_beginning_and_long_responses_are_dropped(load, tok, tmp_path):
    rows = [{"prompt": "word " * 100 + str(i), "response": "ok"} for i in range(20)] + [
        {"prompt": "q", "response": "word " * 100}
    ] * 4
    data = load(write(tmp_path / "f.jsonl", rows), max_length=40, splits=SplitOptions(validation_fraction=0.1))
    assert data.report.cut == len(data) and data.report.dropped in (0, 4) and data.lengths.max() == 40
    assert all(text.endswith("\n\nAssistant:") and "Human" not in text for text in prompt_texts(data, tok))
    assert all(example.response_ids.tolist() == [*tok.encode(" ok"), tok.eos_id] for example in data)
    prompts = load(tmp_path / "f.jsonl", "ppo", max_length=200, max_prompt_length=12)
    assert set(prompts.lengths.tolist()) <= {12, len(tok.encode(T.format(["q"])))}
    assert load(tmp_path / "f.jsonl", "ppo", max_length=30).lengths.max() == 29, "room for one token at least"


# --- splits ---------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_whole_and_independent_of_the_row_order(load, tok, tmp_path):
    rows = pairs(400)
    path, reverse = write(tmp_path / "f.jsonl", rows), write(tmp_path / "g.jsonl", rows[::-1])
    parts = {split: prompt_texts(load(path, "sft", split), tok) for split in ("train", "validation", "test")}
    assert sorted(sum(parts.values(), [])) == sorted(T.format([f"question {i}"]) for i in range(400))
    assert 5 < len(parts["validation"]) < 40 and 5 < len(parts["test"]) < 40
    for split, prompts in parts.items():
        assert sorted(prompts) == sorted(prompt_texts(load(reverse, "sft", split), tok))
        assert set(prompt_texts(load(path, "rm", split), tok)) <= set(prompts), "all stages hold out the same prompts"


def test_beginnings_of_one_conversation_stay_together(load, tok, tmp_path):
    rows = [
        {"prompt": T.format(turns), "response": "r"} for i in range(100) for turns in ([f"q {i}"], [f"q {i}", "a", "b"])
    ]
    path = write(tmp_path / "f.jsonl", rows)
    openings = [
        {T.opening(text) for text in prompt_texts(load(path, "sft", split), tok)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, openings)) == len(set.union(*openings)) == 100


WRITTEN = [
    lambda i: f"Human: is {i} odd",
    lambda i: f"\n\nHuman:  is  {i}  odd \n\nAssistant: Why?\n\nHuman: I ask.\n\nAssistant:",
    lambda i: f"\r\n\r\nHuman: is {i}\r\nodd\r\n\r\nAssistant:",
    lambda i: f"\n\nAssistant: Hello.\n\nHuman: is {i} odd\n\nAssistant:",
]
"""One conversation, begun in other ways."""


@pytest.mark.parametrize(("count", "ways"), [(4, WRITTEN[::2]), (100, WRITTEN)])
def test_white_space_is_no_other_conversation(load, tok, tmp_path, count, ways):
    rows = [{"prompt": begun(i), "chosen": "r", "rejected": "s"} for i in range(count) for begun in ways]
    path = write(tmp_path / "f.jsonl", rows)
    pools = [("rm", "train"), ("ppo", "train"), ("rm", "validation"), ("rm", "test")]
    found = [{T.opening(text) for text in prompt_texts(load(path, *pool), tok)} for pool in pools]
    assert sum(map(len, found)) == len(set.union(*found)) == count


def test_a_fixed_preamble_is_no_conversation(load, tok, tmp_path):
    rows = [{"prompt": T.format(["You are kind.", "Yes.", f"q {i}"]), "response": "r"} for i in range(100)]
    path = write(tmp_path / "f.jsonl", rows)
    assert len(load(path, "sft", "train")) > 70 and len(load(path, "sft", "validation")) > 0


def test_ppo_prompts_are_not_those_of_the_reward_model(load, tok, tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(1000))
    rm, ppo, sft = (set(prompt_texts(load(path, stage), tok)) for stage in ("rm", "ppo", "sft"))
    assert not rm & ppo and rm | ppo == sft
    assert len(ppo) > 200 and len(rm) > 500
    shared = set(prompt_texts(load(path, "ppo", splits=SHARED), tok))
    assert shared == sft
    more = set(prompt_texts(load(path, "ppo", splits=SplitOptions(ppo_fraction=0.6)), tok))
    assert ppo < more


def test_ppo_takes_all_prompts_of_a_file_that_no_reward_model_can_train_on(load, tmp_path):
    path = write(tmp_path / "f.jsonl", [{"prompt": f"q {i}"} for i in range(100)])
    assert len(load(path, "ppo")) > 80


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_files_of_a_few_rows(load, tmp_path, stage):
    path = write(tmp_path / "f.jsonl", pairs(4))
    sizes = [len(load(path, stage, split)) for split in ("train", "validation", "test")]
    assert sizes == ([2, 1, 1] if stage == "sft" else [1, 1, 1])
    one = write(tmp_path / "one.jsonl", pairs(1) * 3)
    if stage == "ppo":
        with pytest.raises(UserError, match="has 1 different prompt, too few to keep any for stage ppo, split train"):
            load(one, stage)
    else:
        assert len(load(one, stage)) == 3
    with pytest.raises(UserError, match="too few to keep any .* split validation; four are enough"):
        load(one, stage, "validation")


def test_rows_that_a_stage_cannot_use_do_not_move_the_others(load, tok, tmp_path):
    rows = pairs(6)
    rows[2]["chosen"] = T.format(["question 2"])  # says nothing: no demonstration, but still ranked
    path = write(tmp_path / "f.jsonl", rows)
    for split in ("train", "validation", "test"):
        sources = {
            stage: JSONLDataset(stage, path, options=SplitOptions(prompt_split="shared"))
            for stage in ("sft", "rm", "ppo")
        }
        prompts = {stage: {row.prompts[0] for row in source.rows(split)} for stage, source in sources.items()}
        assert prompts["rm"] == prompts["ppo"] == prompts["sft"] | (prompts["rm"] & {T.format(["question 2"])})


def test_limit(load, tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(100))
    few, all_rows = load(path, limit=7), load(path)
    assert len(few) == 7 and np.array_equal(few[6].prompt_ids, all_rows[6].prompt_ids)


# --- the names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "splits"), [("sft", 2), ("rm", 3), ("ppo", 3), ("text", 3)])
def test_demo_has_its_files(load, tok, stage, splits):
    sets = [load("demo", stage, split, limit=300) for split in ("train", "validation", "test")[:splits]]
    assert all(len(data) > 100 and data.report.bad == data.report.dropped == data.report.cut == 0 for data in sets)
    if stage != "text":
        texts = [set(prompt_texts(data, tok)) for data in sets]
        assert not texts[0] & texts[1]


def test_demo_text_under_both_names_of_its_stage(load):
    assert len(load("demo-text", "text")) == len(load("demo-text", "sft")) == len(load("demo", "text"))


def test_demo_pairs_tokenise_in_seconds(load):
    start = time.perf_counter()
    data = load("demo", "rm")
    cold = time.perf_counter() - start
    start = time.perf_counter()
    load("demo", "rm")
    assert len(data) == 32_000 and cold < 20 and time.perf_counter() - start < 2


class FakeHub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, rows_of):
        self.rows_of = rows_of
        self.asked = []

    def __call__(self, repository, split):
        from datasets import Dataset

        self.asked.append((repository, split))
        return Dataset.from_list(self.rows_of[repository][split])


@pytest.fixture
def hub(monkeypatch):
    def static(kind, n):
        return [
            {"prompt": T.format([f"{kind} {i}"]), "response": " a", "chosen": " a", "rejected": " b"} for i in range(n)
        ]

    hh = {
        "train": pairs(300),
        "test": [{key: text.replace("question", "test") for key, text in row.items()} for row in pairs(100)],
    }
    hh["train"][5]["chosen"] = "no turn at all"
    fake = FakeHub({
        "Anthropic/hh-rlhf": hh,
        "Dahoas/rm-static": {"train": static("rm", 300), "test": static("rm test", 100)},
        "Dahoas/sft-static": {"train": [{key: row[key] for key in ("prompt", "response")} for row in static("s", 300)]},
    })  # fmt: skip
    monkeypatch.setattr("datasets.load_dataset", fake)
    return fake


def test_hub_datasets_divide_their_own_splits(load, tok, hub):
    for name, words in (("hh", ("question", "test")), ("rm-static", ("rm ", "rm test"))):
        rm, ppo, sft = (prompt_texts(load(name, stage), tok) for stage in ("rm", "ppo", "sft"))
        assert not set(rm) & set(ppo) and set(rm) | set(ppo) == set(sft) and len(set(sft)) in (299, 300)
        held = [set(prompt_texts(load(name, "rm", split), tok)) for split in ("validation", "test")]
        assert not held[0] & held[1] and len(held[0] | held[1]) == 100 and min(map(len, held)) > 30
        assert all(words[1] in text for text in held[0] | held[1])
    assert ("Anthropic/hh-rlhf", "test") in hub.asked


@pytest.mark.parametrize("begun", WRITTEN)
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_no_conversation_of_the_hubs_test_split_is_trained_on(load, tok, hub, stage, begun):
    rows = hub.rows_of["Dahoas/rm-static"]
    for i in range(0, 40, 2):
        rows["train"][i]["prompt"] = T.format([f"is {i} odd", "Well.", "So?"])
        rows["test"][i]["prompt"] = begun(i)
    data = load("rm-static", stage)
    trained, tested = (
        {T.opening(text) for split in splits for text in prompt_texts(load("rm-static", stage, split), tok)}
        for splits in (["train"], ["validation", "test"])
    )
    assert not trained & tested and len(tested) == 100
    report = data.report
    assert report.of_test == 20 and report.kept + report.elsewhere == report.read == 300
    assert "20 left out because their conversation is in the test split" in report.summary()
    assert load("rm-static", stage, "test").report.of_test == 0


def test_bad_rows_of_the_hub_are_passed_over_and_counted(load, hub):
    report = load("hh", "rm").report
    assert (report.read, report.bad) == (300, 1)
    assert report.first_bad.startswith('Anthropic/hh-rlhf train, row 5: "chosen" has no turn of the model')
    assert report.kept + report.elsewhere + report.bad == report.read
    assert "1 bad (first bad row: Anthropic/hh-rlhf train, row 5" in report.summary()


def test_other_hub_names(load, tok, hub):
    sizes = [len(load("sft-static", "sft", split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 300 and min(sizes) > 3
    assert sorted(prompt_texts(load("prompts-only", "ppo"), tok)) == sorted(prompt_texts(load("rm-static", "ppo"), tok))


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_any_dataset_of_the_hub_by_its_name(load, tok, hub, stage):
    def turns(i, reply):
        return [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"{reply} {i}"}]

    rows = [{"prompt": f"question {i}", "chosen": turns(i, "good"), "rejected": turns(i, "bad")} for i in range(300)]
    hub.rows_of["owner/own"] = {"train": rows}
    sets = [load("hub:owner/own", stage, split) for split in ("train", "validation", "test")]
    found = [set(prompt_texts(data, tok)) for data in sets]
    assert not (found[0] & found[1] or found[1] & found[2]) and min(map(len, found)) > 3
    assert sets[0].report.name == "hub:owner/own" and sets[0].report.bad == 0
    assert sum(map(len, found)) == 300 or stage != "sft"
    everything = load("hub:owner/own", "sft")
    assert found[0] <= set(prompt_texts(everything, tok)) and (len(found[0]) == len(everything)) == (stage == "sft")


def test_hub_content_decides_the_cache(load, hub):
    first = load("hh", "rm").fingerprint
    assert load("hh", "rm").fingerprint == first
    hub.rows_of["Anthropic/hh-rlhf"]["train"] = pairs(10)
    assert load("hh", "rm").fingerprint != first


def test_an_unreachable_hub_is_told_with_its_remedies(load, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        UserError, match="--dataset hh: Anthropic/hh-rlhf could not be loaded .*go online, set HF_HOME .*local .jsonl"
    ):
        load("hh", "rm")


def test_hh_sft_is_what_the_preparation_wrote(load, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.data.sources.HH_SFT_FILE", tmp_path / "hh-sft.jsonl")
    with pytest.raises(
        UserError, match="--dataset hh-sft: .* is missing; make it with `python src/utils/prepare_sft_dataset.py`"
    ):
        load("hh-sft")
    write(tmp_path / "hh-sft.jsonl", [{"prompt": T.format([f"q {i}"]), "response": " r"} for i in range(50)])
    assert load("hh-sft").report.name == "hh-sft" and len(load("hh-sft", "ppo")) > 40
    with pytest.raises(UserError, match="has nothing for stage rm, only for sft, ppo"):
        load("hh-sft", "rm")


def test_unknown_names_list_what_exists(load):
    with pytest.raises(UserError) as caught:
        load("hh-rlhf-v2")
    assert "--dataset hh-rlhf-v2: not known" in str(caught.value) and all(
        name in str(caught.value) for name in DATASETS
    )
    with pytest.raises(UserError, match="~no-such-user/x.jsonl: there is no such user"):
        load("~no-such-user/x.jsonl")
    for argument in ({"stage": "dpo"}, {"split": "dev"}, {"max_length": 0}, {"limit": 0}):
        with pytest.raises(UserError, match=next(iter(argument))):
            load("demo", **argument)
    with pytest.raises(UserError, match="do not hold the cue"):
        load("demo", "ppo", max_prompt_length=2)


def test_sources_can_be_read_as_text():
    row = next(DemoDataset("rm").rows("train"))
    assert len(row.completions) == 2
    assert DATASETS["hh"] is AnthropicHHRLHFDataset


def test_files_are_found_from_any_working_directory(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "f.jsonl", pairs(20))
    assert len(load("demo", "ppo", "test")) > 100 and len(load("f.jsonl")) > 10


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_malformed_row_is_named_or_counted(load, tmp_path):
    rows = pairs(50)
    rows[17] = {"chosen": T.format(["q"]) + " same", "rejected": T.format(["q"]) + " same"}
    path = write(tmp_path / "f.jsonl", rows)
    with path.open("a") as file:
        file.write("{torn")
    with pytest.raises(UserError) as caught:
        load(path, "rm")
    assert str(caught.value).startswith(f"{path}:18: two of the ranked replies are identical")
    assert str(caught.value).endswith("(--skip-bad-rows passes over such rows)")
    report = load(path, "rm", skip_bad_rows=True).report
    assert (report.read, report.bad) == (51, 2) and f"{path}:18" in report.first_bad
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    report = load(copy, "rm", skip_bad_rows=True).report  # from the cache, which knows the rows under another name
    assert report.first_bad.startswith(f"{copy}:18: ") and report.name == str(copy)
    with pytest.raises(UserError, match=f"{path}:51: not JSON"):
        load(path, "ppo")


def test_a_stage_that_does_not_suit_the_rows(load, tmp_path):
    path = write(tmp_path / "f.jsonl", [{"prompt": "q", "response": "r"}] * 3)
    with pytest.raises(UserError, match=f'{path}:1: has no "chosen" .*stage rm needs "chosen" and "rejected"'):
        load(path, "rm")
    with pytest.raises(UserError, match=f"{path}: has no rows for stage rm; 3 bad, the first: {path}:1: has no"):
        load(path, "rm", skip_bad_rows=True)


def test_files_with_nothing_in_them(load, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n\r\n")
    for name in ("empty.jsonl", "empty.jsonl.gz", "blank.jsonl"):
        with pytest.raises(UserError, match="has no rows for stage sft"):
            load(tmp_path / name)
    path = write(tmp_path / "long.jsonl", [{"prompt": f"q {i}", "response": "word " * 500} for i in range(9)])
    with pytest.raises(
        UserError, match="long.jsonl: nothing is left: .* dropped as too long .*at most 64 tokens a row"
    ):
        load(path, max_length=64)


def test_unreadable_files(load, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in pairs(2000)).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    cases = {"folder.jsonl": "is a directory", "none.jsonl": "no such file", "torn.jsonl.gz": "damaged or cut short"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_file_without_permission(load, tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(3))
    path.chmod(0)
    with permissions_count(), pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(path)


def test_odd_but_right_files(load, tok, tmp_path):
    lines = [json.dumps(row) for row in pairs(30)] + [
        json.dumps({"chosen": T.format(["nul \0 <|endoftext|>"]) + " x\0", "rejected": T.format(["n"]) + " y"})
    ]
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    data = load(tmp_path / "f.jsonl", splits=SplitOptions(validation_fraction=0.01))
    assert data.report.read == 31
    assert all(
        example.response_ids.tolist().count(tok.eos_id) == 1 and tok.eos_id not in example.prompt_ids
        for example in data
    )


def test_duplicates_are_kept_and_counted(load, tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(50) + pairs(50))
    data = load(path)
    assert data.report.duplicates * 2 == len(data) and f"{data.report.duplicates} duplicates" in data.report.summary()


def test_megabyte_rows_are_quick(load, tmp_path):
    rows = (
        pairs(20) + [{"chosen": T.format(["x " * 2**19]) + " a", "rejected": T.format(["y"]) + " " + "b" * 2**20}] * 3
    )
    path = write(tmp_path / "f.jsonl", rows)
    start = time.perf_counter()
    report = load(path, "rm", splits=SHARED).report
    assert time.perf_counter() - start < 5 and report.kept > 10


def test_a_file_that_changes_while_it_is_read(load, tmp_path, monkeypatch):
    path = write(tmp_path / "f.jsonl", pairs(30))
    rows = JSONLDataset.rows

    def rows_while_writing(self, split):
        yield from rows(self, split)
        write(path, pairs(31))

    monkeypatch.setattr(JSONLDataset, "rows", rows_while_writing)
    with pytest.raises(UserError, match="was changed while it was being read"):
        load(path)


# --- cache ----------------------------------------------------------------------------------------------------------


def test_cache_is_used_and_gives_the_same(load, tmp_path, monkeypatch):
    path = write(tmp_path / "f.jsonl", pairs(60))
    first = load(path, "rm")
    monkeypatch.setattr(JSONLDataset, "rows", lambda *_: pytest.fail("tokenised again"))
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    for again in (load(path, "rm"), load(copy, "rm")):
        assert again.fingerprint == first.fingerprint and again.lengths.tolist() == first.lengths.tolist()
        assert again.report.kept == first.report.kept
        for one, other in zip(first, again, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one.response_ids, other.response_ids, strict=True))
    assert again.report.name == str(copy)


@pytest.mark.parametrize("change", [
    {"max_length": 255}, {"max_prompt_length": 100}, {"split": "validation"}, {"stage": "sft"}, {"limit": 5},
    {"skip_bad_rows": True}, {"template": PromptTemplate(human="\n\nUser: ")},
    {"splits": SHARED}, {"splits": SplitOptions(validation_fraction=0.1)},
    {"splits": SplitOptions(ppo_fraction=0.31)}, {"splits": SplitOptions(seed=1)},
])  # fmt: skip
def test_anything_that_matters_makes_another_entry(load, tmp_path, change):
    path = write(
        tmp_path / "f.jsonl", [{"prompt": f"q {i}", "response": "r", "chosen": "r", "rejected": "s"} for i in range(60)]
    )
    assert load(path, "rm").fingerprint != load(path, **{"stage": "rm"} | change).fingerprint


def test_content_and_tokenizer_make_another_entry(load, tok, tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(60))
    first = load(path).fingerprint
    ranks = dict(tok.ranks)
    ranks[b"a"], ranks[b"b"] = ranks[b"b"], ranks[b"a"]
    other = type(tok)("demo", ranks)
    assert load_dataset(str(path), "sft", "train", other, 256, cache_dir=tmp_path / "cache").fingerprint != first
    write(path, pairs(61))
    assert load(path).fingerprint != first


@pytest.mark.parametrize(("row", "is_new"), [
    ({"prompt": "q", "response": "r"}, False),
    ({"text": "r"}, False),
    ({"prompt": "q", "response": "r\r\ns"}, True),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, True),
    ({"prompt": "q", "completion": "r"}, True),
    ({"question": "q", "answer": "r"}, True),
    ({"text": "word " * 400}, True),
])  # fmt: skip
def test_rows_that_an_earlier_version_read_alike_keep_their_fingerprint(load, tmp_path, monkeypatch, row, is_new):
    """Runs of version 2 are gone on with, unless they would see other rows now."""
    path = write(tmp_path / "f.jsonl", [*({"prompt": f"q {i}", "response": "r"} for i in range(20)), row])
    whole = SplitOptions(validation_fraction=0.001)
    now = load(path, splits=whole)
    monkeypatch.setattr("utils.dataset._CACHE_VERSION", 99)
    later = load(path, splits=whole)
    assert (later.fingerprint != now.fingerprint) == is_new and (now.earlier_fingerprint == "") == is_new


def test_long_texts_are_told(load, tmp_path):
    path = write(tmp_path / "f.jsonl", [{"text": f"{i} " + "word " * 300} for i in range(9)])
    data = load(path, "text", max_length=100)
    report = data.report
    assert report.kept == report.long > 0 == report.dropped and report.pieces == len(data) > 3 * report.kept
    assert f"{report.long} long texts in {report.pieces} pieces" in report.summary()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_cache_is_built_again(load, tmp_path, damage):
    path = write(tmp_path / "f.jsonl", pairs(60))
    first = load(path, "rm")
    entry = next((tmp_path / "cache").glob("*.npz"))
    data = bytearray(entry.read_bytes())
    if damage == "cut":
        entry.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 3] ^= 1
        entry.write_bytes(data)
    elif damage == "empty":
        entry.write_bytes(b"")
    else:
        np.savez(entry, label=np.zeros(3))
    again = load(path, "rm")
    assert again.table.responses.flat.tolist() == first.table.responses.flat.tolist()
    assert sorted((tmp_path / "cache").iterdir()) == [entry] and np.load(entry)["prompt_flat"].dtype == np.int32


def load_in_process(path, cache, queue):
    data = load_dataset(str(path), "rm", "train", get_tokenizer("demo"), 256, cache_dir=cache)
    queue.put((data.fingerprint, data.table.responses.flat.tolist()))


def test_two_processes_build_one_entry_at_once(tmp_path):
    path = write(tmp_path / "f.jsonl", pairs(500))
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=load_in_process, args=(path, tmp_path / "cache", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


# --- real data ------------------------------------------------------------------------------------------------------


def test_real_dialogues_in_every_stage(load, tmp_path):
    folder = os.environ.get("TEST_DATA_DIR")
    if not folder:
        pytest.skip("TEST_DATA_DIR is not set: it has GPT-2's vocabulary and real dialogues")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(Path(folder) / "tiktoken-cache"))
        gpt2 = get_tokenizer("gpt2")
    path = Path(folder) / "hh-rlhf" / "harmless-test-1000.jsonl.gz"
    total, differing, dialogues = 0, 0, []
    for split in ("train", "validation", "test"):
        data = load_dataset(str(path), "rm", split, gpt2, 1024, cache_dir=tmp_path, splits=SHARED)
        total += len(data)
        for example in data:
            prompts = [gpt2.decode(prompt) for prompt in example.prompt_ids]
            differing += prompts[0] != prompts[1]
            dialogues += [gpt2.decode([*p, *r]) for p, r in zip(example.prompt_ids, example.response_ids, strict=True)]
            assert all(prompt.endswith("\n\nAssistant:") for prompt in prompts)
            assert all(ids.tolist().count(gpt2.eos_id) == 1 and ids[-1] == gpt2.eos_id for ids in example.response_ids)
        assert (data.report.bad, data.report.dropped) == (0, 0)
    assert (total, differing) == (1000, 4)
    sft = load_dataset(str(path), "sft", "train", gpt2, 256, cache_dir=tmp_path)
    assert sft.report.empty == 2 and sft.report.cut > 0 and sft.lengths.max() == 256
    with gzip.open(path) as file:
        originals = [json.loads(line)[key] for line in file for key in ("chosen", "rejected")]
    assert sorted(" ".join(text.split()) for text in dialogues) == sorted(" ".join(text.split()) for text in originals)
