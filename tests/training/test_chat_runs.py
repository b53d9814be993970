"""Chat models through all three stages: what --template takes, what the models read, and what people see of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_tokenizers import chat_folder
from scripts import call, newest

from config.configs import SFTConfig
from config.user_error import UserError
from experiments import quick_looks
from experiments.export import run as export
from experiments.graded_answers import text_model
from inference import answers
from inference.answers import Machine, Sampling, TextModel, kl_to_sft, sample_answers, score_answers
from inference.systems import System, common_template, find_systems
from models.weights.checkpoint import describe
from training.start import sft_start, template_of
from utils.chat_templates import NAMED
from utils.dataset import load_dataset
from utils.template import PromptTemplate
from utils.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

PLAIN = PromptTemplate()
QUESTIONS = [f"What is {a} plus {b}? <|im_end|> </s>" for a in range(6) for b in range(6)]
ASKED = [PLAIN.format([question]) for question in QUESTIONS]


def model_folder(folder: Path, kind: str, **options) -> Path:
    """A tiny GPT-2 in Hugging Face's form with the tokenizer of a chat model, which has two stop ids."""
    from transformers import GPT2Config, GPT2LMHeadModel

    chat_folder(folder, kind, **options)
    rows = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=160, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, **sizes))
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: model_folder(root / kind, kind) for kind in ("chatml", "zephyr")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ranked pairs whose prompts have a system message and marks written by somebody."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}],
            "chosen": "It is <|im_end|> so.",
            "rejected": "No.",
        }
        for question in QUESTIONS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module", params=["chatml", "zephyr"])
def runs(request, models, data, tmp_path_factory) -> Path:
    """Runs sft_c, rm_c and ppo_c, the last with a reward function that records what it sees in seen.json."""
    root = tmp_path_factory.mktemp("runs")
    (root / "seen.py").write_text(
        "import json, pathlib\ndef seen(prompts, responses):\n"
        "    pathlib.Path(__file__).with_suffix('.json').write_text(json.dumps([prompts, responses]))\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE_DIR", str(root / "cache"))
        for stage, words in (
            ("sft", f"-p {models[request.param]}"), ("rm", "-p sft_c"),
            ("ppo", f"-a sft_c -c rm_c --reward-fn {root}/seen.py:seen --reward-fn-weight 1"),
        ):  # fmt: skip
            result = call(stage, f"-n c {words} --dataset {data}", root)
            assert result.code == 0, result.err
            assert stage != "sft" or "template own: turns between" in result.out
    return root


def test_all_stages_take_the_template_of_the_model_and_its_end_mark(runs):
    folders = [newest(runs, f"{stage}_c") / "final" for stage in ("sft", "rm", "ppo")]
    first = template_of(folders[0])
    assert first.marks.name == "own" and all(template_of(folder) == first for folder in folders)
    ends = {describe(folder)["tokenizer"]["eos_id"] for folder in folders}
    tokenizer = load_tokenizer(folders[0])
    assert ends == {tokenizer.eos_id} and tokenizer.encode_marked([tokenizer.mark(first.marks.end)]) == [[*ends]]


def test_people_and_reward_functions_see_text(runs):
    prompts, responses = json.loads((runs / "seen.json").read_text())
    asked = {f"Be kind.{prompt}" for prompt in ASKED}
    assert set(prompts) <= asked and len(responses) == len(prompts)
    for stage in ("sft", "ppo"):
        shown = [json.loads(line) for line in (newest(runs, f"{stage}_c") / "samples.jsonl").read_text().splitlines()]
        assert shown and {row["prompt"] for row in shown} <= asked


def test_a_run_goes_on_with_its_template(runs, data, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE_DIR", str(runs / "cache"))
    result = call("sft", f"-n c --dataset {data} --resume auto --resume-override max_steps --max-steps 4", runs)
    assert result.code == 0, result.err
    assert template_of(newest(runs, "sft_c") / "final").marks.name == "own"


def test_a_data_set_has_other_rows_for_another_template(runs, data, tmp_path):
    """One cache: what a template made is not taken for another one's, and is found again."""
    source = newest(runs, "sft_c") / "final"
    tokenizer, template = load_tokenizer(source), template_of(source)
    found = {}
    for made in (template, PLAIN, template):
        rows = load_dataset(str(data), "rm", "train", tokenizer, 160, template=made, cache_dir=tmp_path)
        found.setdefault(made == template, []).append((rows.fingerprint, [r.tolist() for r in rows[0].prompt_ids]))
        for ids in rows[0].response_ids:
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
    assert found[True][0] == found[True][1] and found[True][0][0] != found[False][0][0]
    assert found[True][0][1][0] in template.encode_prompts(tokenizer, [f"Be kind.{prompt}" for prompt in ASKED])
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_a_data_set_is_shown_as_the_model_reads_it(runs, data, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE_DIR", str(runs / "cache"))
    words = ["--dataset", str(data), "--tokenizer", "sft_c", "--runs-dir", str(runs), "--rows", "1"]
    quick_looks.look_at_dataset(quick_looks.argparse.ArgumentParser(), words)
    row = capsys.readouterr().out.splitlines()[-1]
    marks = template_of(newest(runs, "sft_c") / "final").marks
    start, end = (text.replace("\n", "\\n").replace(marks.end, "[EOS]") for text in (marks.system[0], marks.assistant))
    row = row.replace("[EOS] ", "[EOS]")
    assert row.startswith(f"{start}Be kind.[EOS]") and f"{end}|It is <|im_end|> so.[EOS]" in row


def test_a_chat_model_is_asked_in_its_own_form(models, monkeypatch, capsys):
    """With all ids at which it ends by its own configuration."""
    given = []
    monkeypatch.setattr(quick_looks, "generate", lambda model, rows, **options: given.append((rows, options)))
    for raw in ([], ["--raw"]):
        with pytest.raises(AttributeError):  # there is no answer
            words = ["-m", str(models["chatml"]), "--prompt", "Hi", *raw, "--device", "cpu"]
            quick_looks.look_at_gpt(quick_looks.argparse.ArgumentParser(), words)
    source = System("model", "huggingface", str(models["chatml"]), "-m").load()
    assert given[0][0] == source.template.encode_prompts(source.tokenizer, [PLAIN.format(["Hi"])])
    assert given[1][0] == [source.tokenizer.encode("Hi")]
    assert source.tokenizer.stop_ids == given[0][1]["eos_id"] == (2, 0)
    taken = []
    monkeypatch.setattr(answers, "generate", lambda *_, **options: taken.append(options["eos_id"]))
    with pytest.raises(AttributeError):
        sample_answers(source, ASKED[:2], "a", Sampling(1.0, 4), Machine())
    assert taken == [(2, 0)]


def test_systems_of_different_templates_answer_the_same_turns(runs, models, tiny_runs):
    """Each in its own form, and the reward model reads the answers in its own."""
    others = [f"other={models['zephyr']}", f"demo={next(tiny_runs.glob('sft_t_*'))}"]
    systems = find_systems("sft_c", "ppo_c", str(models["chatml"]), (), others, str(runs))
    template = common_template(systems)
    assert (template.human, template.assistant) == (PLAIN.human, PLAIN.assistant) and template.marks is not None
    prompts = ASKED[:3]
    sft = next(system for system in systems if system.name == "sft").load()
    rm = text_model(newest(runs, "rm_c") / "final", "reward")
    for system in systems:
        source = system.load()
        found = sample_answers(source, prompts, system.name, Sampling(1.0, 4), Machine(), 0)
        asked = source.template.encode_prompts(source.tokenizer, prompts)
        assert [a.prompt for a in found] == prompts and [a.prompt_ids.tolist() for a in found] == asked
        scores = score_answers(rm, found, Machine(), "x", own_ids=False)
        rows = zip(
            rm.template.encode_prompts(rm.tokenizer, prompts),
            rm.template.encode_responses(rm.tokenizer, [rm.template.response(a.text) for a in found]), strict=True,
        )  # fmt: skip
        with torch.no_grad():
            plain = [float(rm.model(torch.tensor([p + r]), torch.ones(1, len(p + r), dtype=bool))) for p, r in rows]
        np.testing.assert_allclose(scores, plain, atol=1e-5)
        kl = kl_to_sft(source, sft, found, 1.0, Machine(), "x")
        assert (kl is not None) == (source.template == sft.template and source.same_tokens(sft))
    other = TextModel(sft.model, sft.tokenizer, PLAIN)
    assert not other.same_tokens(sft) and sft.same_tokens(sft)


@pytest.mark.parametrize("stem", ["ppo_c", "rm_c"])
def test_an_export_writes_the_template(runs, stem, tmp_path, capsys):
    """The export's own check reads it back; here a dialogue beside it, as transformers reads it."""
    from transformers import AutoTokenizer

    export.run(export.argparse.ArgumentParser(), ["-m", stem, "--to", str(tmp_path / "out"), "--runs-dir", str(runs)])
    source = newest(runs, stem) / "final"
    ours, template = load_tokenizer(source), template_of(source)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    for start in (0, 1):
        turns = [{"role": role, "content": text} for role, text in said[start:]]
        wanted = template.encode_prompts(ours, [template.prompt_of_turns(said[start:-1])])[0]
        assert theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False) == wanted
        wanted += template.encode_responses(ours, [" d"])[0]
        assert theirs.apply_chat_template(turns, return_dict=False) == wanted
    assert theirs.eos_token_id == ours.eos_id


def start(pretrain: str | Path, runs: Path | str = "runs", **options):
    _, tokenizer, template, _ = sft_start(SFTConfig(pretrain=str(pretrain), runs_dir=str(runs), **options), None)
    return template, tokenizer


def test_what_template_takes(models, runs, tmp_path):
    template, tokenizer = start(models["chatml"])
    assert template.marks.name == "own" and tokenizer.eos_id == 2
    for name in NAMED:
        if name == "chatml":
            assert start(models["chatml"], template=name)[0].marks == NAMED[name]
        else:
            with pytest.raises(UserError, match=f"--template {name}: the tokenizer chatml has no special token"):
                start(models["chatml"], template=name)
    assert start(models["chatml"], template="human-assistant")[0] == PLAIN
    assert start("scratch")[0] == start("scratch", tokenizer=str(models["chatml"]))[0] == PLAIN
    made, tokenizer = start("scratch", tokenizer=str(models["chatml"]), template="own")
    assert made == template and tokenizer.eos_id == 2
    of_run = template_of(newest(runs, "sft_c") / "final")
    assert start("sft_c", runs)[0] == start("sft_c", runs, template="own")[0] == of_run
    assert start("sft_c", runs, template="human-assistant")[0] == PLAIN
    bare = model_folder(tmp_path / "bare", "chatml", template="", eos_token="<|endoftext|>")
    assert start(bare)[0] == PLAIN and start(bare)[1].eos_id == 0
    template, tokenizer = start(bare, template="chatml")
    assert template.marks == NAMED["chatml"] and tokenizer.eos_id == 2
    with pytest.raises(UserError, match="--template own: the tokenizer bare has no chat template"):
        start(bare, template="own")


