"""Behaviour that earlier code of this kind had and that must not occur here, where no module's own tests would see it.

Most of it is tested beside the code it concerns; docs/coverage.md says where.
"""

import ast
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import training
from config.configs import PPOConfig
from training.engine.runtime import Runtime
from training.experience import ActorCritic, Rollouts, split_minibatches
from training.sampling import Sampler
from training.start import frozen
from utils.dataset import load_dataset
from utils.tokenizer import get_tokenizer

SRC = Path(training.__file__).resolve().parents[1]


def trees(*folders: str) -> dict[Path, ast.Module]:
    """The syntax trees of all modules in these folders of src/."""
    return {path: ast.parse(path.read_text()) for folder in folders for path in sorted((SRC / folder).rglob("*.py"))}


@pytest.fixture
def tok():
    return get_tokenizer("demo")


@pytest.fixture
def prompts(tok) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, tok.vocab_size - 1, size=n).astype(np.int32) for n in (3, 9, 5, 12, 4, 7)]


def test_rollouts_are_drawn_from_the_whole_vocabulary(make_model, tok, prompts) -> None:
    """Sampling among the 50 most likely ids while log-probabilities are those of the full softmax."""
    model = make_model("actor", vocab_size=tok.vocab_size, std=0.02)
    sampler = Sampler(tok, Runtime("cpu", "fp32", 0), 1.0, 1, 64)
    rows = sampler.sample(model, prompts[:1] * 600, list(range(600)))
    said = Counter(row[0] for row in rows.responses())
    # 600 draws from about 1,000 ids that are nearly alike: 450 different ones are expected.
    assert len(said) > 300
    with torch.no_grad():
        logp = model(torch.tensor(prompts[0])[None].long())[0, -1].log_softmax(-1)
    drawn = torch.tensor([row[0] for row in rows.responses()])
    torch.testing.assert_close(rows.sampler_logp[:, 0], logp[drawn], atol=1e-5, rtol=0)


def test_every_forward_pass_of_training_goes_through_the_module_itself(make_model, tok, prompts) -> None:
    """Methods called on what is inside a wrapper pass by compilation, parallel engines and hooks."""
    runtime = Runtime("cpu", "fp32", 0)
    sizes = dict(vocab_size=tok.vocab_size, std=0.1)
    policy = ActorCritic(make_model("actor", **sizes), make_model("critic", **sizes))
    reference, reward_model = frozen(make_model("lm", **sizes)), frozen(make_model("reward", **sizes))
    calls = Counter()
    modules = {"policy": policy, "critic": policy.critic, "reward model": reward_model}
    modules |= {"actor's trunk": policy.actor.transformer, "reference's trunk": reference.transformer}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    config = PPOConfig(batch_size=2, global_batch_size=6, response_length=6)
    rollouts = Rollouts(policy, reference, reward_model, None, config, tok, runtime)
    experience = rollouts.sample(prompts, list(range(6)))
    calls.clear()  # sampling works with the cache and needs no gradient
    parts = split_minibatches(experience.lengths, 1, 2, np.random.default_rng(0))[0]
    rollouts.evaluate_roles(experience, parts)
    assert calls == dict.fromkeys(modules, len(parts)) == dict.fromkeys(modules, 3)
    inside = {"hidden", "lm_head", "trunk", "transformer", "actor", "critic"}  # a prepared module; unwrap(): exceptions
    within_a_forward = {("experience.py", "self"), ("sampling.py", "model")}
    for path, tree in trees("training").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in inside:
                owner = ast.unparse(node.func.value)
                assert (path.name, owner) in within_a_forward, f"{path.name}: {owner}.{node.func.attr}(...)"


def test_devices_and_workers_are_chosen_in_one_place() -> None:
    """Only the runtime, what it sees of the machine, saved generators, flags and a GPU's own room name a device."""
    for path, tree in trees("training", "utils", "models", "inference").items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "num_workers"), path.name
            if path.name in ("runtime.py", "devices.py", "saving.py", "determinism.py", "flags.py", "device.py"):
                continue
            if path.parent.name == "gpu":
                continue
            named = (isinstance(node, ast.Attribute) and node.attr == "cuda") or (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")
            )
            assert not named, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("stage", ["sft", "rm", "text"])
@pytest.mark.parametrize("kind", ["demo", "file", "dialogues"])
def test_every_source_ends_its_responses_with_one_eos(tok, tmp_path, monkeypatch, stage: str, kind: str) -> None:
    """One data set that adds EOS beside one that does not."""
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "cache"))
    if kind == "demo":
        path = "demo"
    else:
        rows = [
            {"text": f"story {i}"} if stage == "text"
            else {"prompt": f"q {i}", "response": f"yes {i}"} if kind == "file" and stage == "sft"
            else {"prompt": f"q {i}", "completions": [f"a {i}", f"b {i}", f"c {i}"]} if kind == "file"
            else {"chosen": f"\n\nHuman: q {i}\n\nAssistant: yes", "rejected": f"\n\nHuman: q {i}\n\nAssistant: no"}
            for i in range(60)
        ]  # fmt: skip
        path = str(tmp_path / "rows.jsonl.gz")
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    data = load_dataset(path, stage, "train", tok, 192, limit=40)
    assert len(data) > 20
    for example in data:
        responses = example.response_ids if stage == "rm" else (example.response_ids,)
        for response in responses:
            assert response[-1] == tok.eos_id and tok.eos_id not in response[:-1]
            assert len(response) > 1 and response[-2] == tok.encode(tok.decode(response))[-1]
