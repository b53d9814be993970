"""The answers of all systems of an evaluation: kept, ranked, and summed up."""

import itertools
import json

import numpy as np
import pytest

from config.user_error import UserError
from inference import answer_sets, answers
from inference.answer_sets import Answering
from inference.answers import Machine, Sampling
from inference.systems import find_systems, load_reward_model
from models.weights.checkpoint import weights_digest
from utils.template import PromptTemplate

pytestmark = pytest.mark.slow

PROMPTS = [PromptTemplate().prompt(text) for text in ("What is tea?", "How many legs does a crab have?", "Hi!")]


@pytest.fixture
def systems(tiny_runs):
    return find_systems("sft_t", "ppo_t", "sft_vanilla_t", (2, 4), (), str(tiny_runs))


@pytest.fixture
def answering(tiny_runs, tmp_path):
    """`answering(temperature=0.9, rm=True, ...)`."""

    def make(rm: bool = True, temperature: float = 0.9, prompts=PROMPTS) -> Answering:
        model = load_reward_model(next(tiny_runs.glob("rm_t_*")) / "final", "-c") if rm else None
        sampling = Sampling(temperature, 6)
        return Answering(prompts, PromptTemplate(), sampling, Machine(batch_size=2), model, tmp_path / "cache")

    return make


def by_length(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_every_system_has_what_applies_to_it(answering, systems):
    sets = {s.system.name: s for s in answering().answer_sets(systems)}
    assert list(sets) == ["vanilla", "sft", "best_of_2", "best_of_4", "ppo"]
    figures = {name: found.figures(by_length) for name, found in sets.items()}
    assert figures["sft"]["kl"] == 0 and abs(figures["ppo"]["kl"]) > 0.1 and abs(figures["vanilla"]["kl"]) > 0.1
    assert figures["best_of_4"]["kl"] is None
    assert figures["best_of_4"]["analytic_kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert "analytic_kl" not in figures["ppo"] and all(f["cut_prompts"] == 0 for f in figures.values())
    for name, found in sets.items():
        assert figures[name]["proxy"] == pytest.approx(found.proxy.mean())
        assert figures[name]["gold"] == pytest.approx(np.mean([len(text) for text in found.texts]))
    json.dumps(figures, allow_nan=False)


def test_best_of_n_is_chosen_by_the_reward_model_from_samples_of_its_own(answering, systems):
    sets = {s.system.name: s for s in answering().answer_sets(systems)}
    best = sets["best_of_4"]
    assert best.sample_proxy.shape == (4, len(PROMPTS))
    np.testing.assert_allclose(best.proxy, best.sample_proxy.max(0))
    np.testing.assert_allclose(sets["best_of_2"].proxy, best.sample_proxy[:2].max(0))
    chosen = [best.samples[k][i].text for i, k in enumerate(best.sample_proxy.argmax(0))]
    assert [a.text for a in best.answers] == chosen
    own = [a.ids.tolist() for a in sets["sft"].answers]
    assert all([a.ids.tolist() for a in draw] != own for draw in best.samples)


def test_the_unbiased_estimate_is_the_mean_over_all_choices(answering, systems):
    best = {s.system.name: s for s in answering().answer_sets(systems)}["best_of_2"]
    expected = {"proxy": [], "gold": []}
    for pair in itertools.combinations(range(4), 2):
        for i in range(len(PROMPTS)):
            k = max(pair, key=lambda k: best.sample_proxy[k, i])
            expected["proxy"].append(best.sample_proxy[k, i])
            expected["gold"].append(len(best.samples[k][i].text))
    unbiased = best.figures(by_length)["unbiased"]
    assert unbiased["samples"] == 4
    assert unbiased["proxy"] == pytest.approx(np.mean(expected["proxy"]))
    assert unbiased["gold"] == pytest.approx(np.mean(expected["gold"]))


def test_answers_are_sampled_once(answering, systems, monkeypatch):
    first = answering().answer_sets(systems)
    sample = answer_sets.sample_answers
    asked = []
    monkeypatch.setattr(answer_sets, "sample_answers", lambda *a: asked.append(a[2]) or sample(*a))
    second = answering().answer_sets(systems)
    assert asked == []
    for a, b in zip(first, second):
        assert a.texts == b.texts and a.figures(by_length) == b.figures(by_length)
        assert [x.ended for x in a.answers] == [x.ended for x in b.answers]
        assert [x.prompt_ids.tolist() for x in a.answers] == [x.prompt_ids.tolist() for x in b.answers]
    answering(temperature=0.8).answer_sets(systems[:2])
    answering(prompts=PROMPTS[:2]).answer_sets(systems[:2])
    assert asked == ["vanilla", "sft"] * 2


def test_weights_are_hashed_once_for_all_draws(answering, systems, monkeypatch):
    hashed = []
    monkeypatch.setattr(answers, "weights_digest", lambda model: hashed.append(model) or weights_digest(model))
    answering().answer_sets(systems)
    assert len(hashed) == 3  # of vanilla, sft and ppo; best of 4 draws four times


def test_other_weights_give_another_digest(systems):
    model = systems[1].load().model
    before = weights_digest(model)
    assert before == weights_digest(systems[1].load().model)
    model.transformer.wte.weight.data[0, 0] += 1e-3
    assert weights_digest(model) != before


def test_without_a_reward_model_there_is_no_proxy(answering, systems):
    sft, ppo = answering(rm=False).answer_sets([systems[1], systems[-1]])
    figures = ppo.figures(None)
    assert sft.proxy is None and figures["proxy"] is None and figures["gold"] is None
    assert figures["proxy_gold_correlation"] is None
    with pytest.raises(UserError, match="--best-of: a reward model has to choose"):
        answering(rm=False).answer_sets(systems)


def test_greedy_answers_have_no_kl_and_no_best_of_n(answering, systems):
    _, ppo = answering(temperature=0.0).answer_sets([systems[1], systems[-1]])
    assert ppo.kl is None
    with pytest.raises(UserError, match="--best-of: greedy samples are all alike"):
        answering(temperature=0.0).answer_sets(systems)


def test_answers_from_files_stand_beside_the_others(answering, tiny_runs, tmp_path):
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": "Tea is a drink."}) + "\n" for p in PROMPTS))
    systems = find_systems("sft_t", "", "", (), [f"made={path}"], str(tiny_runs))
    made = answering().answer_sets(systems)[1].figures(by_length)
    assert made["kind"] == "file" and made["eos_rate"] is None and made["kl"] is None
    assert made["mean_length"] == 4 and made["gold"] == 15 and made["proxy"] is not None
