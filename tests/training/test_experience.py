"""Experience: the four roles' outputs against a naive left-padded computation, reward functions, minibatches."""

import numpy as np
import pytest
import torch
from every_family import EVERY, GPT2_ALONE
from setups import EOS, VOCAB, prompt_examples, random_ids, response, runtime_on

from training.experience import ActorCritic, split_minibatches
from utils.data.batching import collate_ranked
from utils.data.examples import RankedExample
from utils.data.rows import Row
from utils.data.token_table import Counts, LengthLimits, tokenize_rows
from utils.tokenizer import get_tokenizer

FAMILIES = EVERY
PAD, TAU = VOCAB, 0.8


def experience_of(trainer, count: int = 12, micro_batch: int = 5):
    """Rollouts of a trainer, looked at in micro-batches."""
    experience = trainer.rollouts.sample(list(prompt_examples(count)), list(range(count)))
    plan = split_minibatches(experience.lengths, 1, micro_batch, np.random.default_rng(0))[0]
    trainer.rollouts.evaluate_roles(experience, plan)
    return experience


@torch.no_grad()
def test_compact_rows_equal_the_left_padded_layout(ppo_trainer, make_model) -> None:
    # Every role has weights of its own, so that no two can be mixed up unseen.
    # The actor of this seed ends now and then.
    actor, reference = make_model("actor", seed=85), make_model("lm", seed=3, std=0.2)
    critic, reward_model = make_model("critic", seed=4, std=0.2), make_model("reward", seed=5, std=0.2)
    reward_model.set_normalisation(1.7, -0.3)
    trainer = ppo_trainer(actor, critic, reference, reward_model, temperature=TAU)
    experience = experience_of(trainer, count=16)
    prompts, responses = experience.prompts(), experience.responses()
    assert len({len(p) for p in prompts}) > 3 and len({len(r) for r in responses}) > 3

    P, T = max(map(len, prompts)) + 7, experience.rmask.shape[1]
    ids = torch.full((len(prompts), P + T), PAD)
    att = torch.zeros_like(ids, dtype=torch.bool)
    for b, (p, r) in enumerate(zip(prompts, responses)):
        ids[b, P - len(p) : P + len(r)] = torch.tensor(p + r)
        att[b, P - len(p) : P + len(r)] = True
    rmask = att[:, P:]
    tokens = ids[:, P:].where(rmask, 0)

    def logprobs(model):
        logits = model(ids, att)[:, P - 1 : P - 1 + T] / TAU
        return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) * rmask, logits

    logp, logits = logprobs(actor)
    expected = {
        "logp": logp,
        "logp_ref": logprobs(reference)[0],
        "values": critic(ids, att)[:, P - 1 : P - 1 + T] * rmask,
        "entropy": torch.distributions.Categorical(logits=logits).entropy() * rmask,
        "scores": reward_model(ids, att),
    }
    assert torch.equal(experience.rmask, rmask)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(experience, name), value, atol=1e-5, rtol=0, msg=name)
        assert getattr(experience, name).dtype == torch.float32
    assert experience.logp[~rmask].eq(0).all() and experience.values[~rmask].eq(0).all()
    # The sampler's cached forward agrees, too.
    torch.testing.assert_close(experience.sampler_logp, experience.logp, atol=1e-4, rtol=0)


def test_micro_batch_size_changes_no_output(ppo_trainer) -> None:
    whole, single = (experience_of(ppo_trainer(), micro_batch=size) for size in (12, 1))
    for name in ("logp", "logp_ref", "values", "entropy", "scores"):
        torch.testing.assert_close(getattr(whole, name), getattr(single, name), atol=1e-5, rtol=0, msg=name)


def test_scores_are_those_of_the_reward_models_own_pipeline(ppo_trainer, make_model, runtime) -> None:
    """100 texts through dataset and collation, and the same ids as PPO holds them, score alike."""
    tokenizer = get_tokenizer("demo")
    model = make_model("reward", vocab_size=tokenizer.vocab_size, block_size=192, std=0.1)
    rng = np.random.default_rng(0)
    words = ["how", "many", "legs", "has", "a", "snake", "?", "Sure", "Paris", ",", "please", "don't", "42", "!\n"]
    texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(300)]
    prompts = [f"\n\nHuman: {text}\n\nAssistant:" for text in texts[:100]]
    pairs = [(" " + a, " " + b + ".") for a, b in zip(texts[100:200], texts[200:])]
    rows = [Row((p, p), pair) for p, pair in zip(prompts, pairs)]
    table = tokenize_rows(rows, tokenizer, LengthLimits(192, None, 1), Counts(), "")
    examples = [
        RankedExample(tuple(table.prompts[table.prompt_of[m]] for m in (2 * i, 2 * i + 1)),
                      tuple(table.responses[m] for m in (2 * i, 2 * i + 1)))
        for i in range(100)
    ]  # fmt: skip
    batch = collate_ranked(examples, tokenizer.pad_id).rows
    with torch.no_grad():
        trained = model(batch.ids, batch.att, right_padded=True).view(100, 2)

    prompt_ids = [np.array(ids) for ids in tokenizer.encode_batch(prompts)]
    for k in range(2):
        responses = tokenizer.encode_batch([pair[k] for pair in pairs])
        ids = [[*p, *r, tokenizer.eos_id] for p, r in zip(prompt_ids, responses)]
        width = max(map(len, ids)) + 11
        left = torch.tensor([[tokenizer.pad_id] * (width - len(row)) + row for row in ids])
        with torch.no_grad():
            scored = model(left, left != tokenizer.pad_id)
        torch.testing.assert_close(scored, trained[:, k], atol=1e-4, rtol=0)
        assert ids[0][-2] == responses[0][-1]  # nothing stands between the last token and EOS


# ---------------------------------------------------------------------------------------------------------------------
# Rewards in Python
# ---------------------------------------------------------------------------------------------------------------------


def count_letters(prompts, responses) -> list[float]:
    return [float(len(r)) + 100 * len(p) for p, r in zip(prompts, responses)]


def expected_letters(experience) -> torch.Tensor:
    said = [len(r) for r in experience.responses(with_eos=False)]
    return torch.tensor([float(n + 100 * len(p)) for n, p in zip(said, experience.prompts())])


def test_reward_function_in_place_of_the_model(ppo_trainer) -> None:
    experience = experience_of(ppo_trainer(reward_model=None, reward_fn=count_letters))
    assert torch.equal(experience.scores, expected_letters(experience))


def test_reward_function_added_to_the_model(ppo_trainer) -> None:
    alone = experience_of(ppo_trainer())
    both = experience_of(ppo_trainer(reward_fn=count_letters, reward_fn_weight=0.5))
    torch.testing.assert_close(both.scores, alone.scores + 0.5 * expected_letters(alone))


# ---------------------------------------------------------------------------------------------------------------------
# Actor and critic, minibatches
# ---------------------------------------------------------------------------------------------------------------------


def test_value_loss_reaches_the_critic_alone_and_the_policy_loss_the_actor(make_model, ppo_trainer) -> None:
    module = ActorCritic(make_model("actor"), make_model("critic"))
    batch = experience_of(ppo_trainer()).micro_batch(np.arange(4))
    logp, values, entropy = module(batch, TAU)
    assert entropy is None
    values.sum().backward()
    assert all(p.grad is None for p in module.actor.parameters())
    assert all(p.grad is not None for p in module.critic.parameters() if p.requires_grad)
    module.zero_grad(set_to_none=True)
    logp.sum().backward()
    assert all(p.grad is None for p in module.critic.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.actor.parameters())


def test_outputs_are_fp32_under_bf16_autocast(make_model, ppo_trainer) -> None:
    trainer = ppo_trainer(on=runtime_on("cpu", "bf16"))
    experience = experience_of(trainer, count=16)
    assert {getattr(experience, n).dtype for n in ("logp", "logp_ref", "values", "scores")} == {torch.float32}
    reference = experience_of(ppo_trainer(on=runtime_on("cpu")))
    for name in ("logp", "values", "scores"):  # the same responses, unless a rounding changed a draw
        same = [i for i, (a, b) in enumerate(zip(experience.responses(), reference.responses())) if a == b]
        T = min(experience.rmask.shape[1], reference.rmask.shape[1])
        a, b = (getattr(e, name)[same] for e in (experience, reference))
        a, b = (x[:, :T] if x.ndim == 2 else x for x in (a, b))
        assert len(same) > 6 and 0 < (a - b).abs().max() < 2e-2


@pytest.mark.parametrize("minibatches", [1, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_every_row_is_in_exactly_one_minibatch_of_a_pass(minibatches: int, micro_batch: int) -> None:
    length = np.random.default_rng(0).integers(2, 40, size=11)
    generator = np.random.default_rng(1)
    passes = [split_minibatches(length, minibatches, micro_batch, generator) for _ in range(2)]
    for plan in passes:
        assert len(plan) == minibatches
        assert sorted(np.concatenate([part for minibatch in plan for part in minibatch])) == list(range(11))
        sizes = [sum(map(len, minibatch)) for minibatch in plan]
        assert max(sizes) - min(sizes) <= 1
        for minibatch in plan:
            assert all(len(part) <= micro_batch for part in minibatch)
            ordered = length[np.concatenate(minibatch)]
            assert (np.diff(ordered) >= 0).all()
    if minibatches > 1:  # a fresh permutation each pass
        assert any(sorted(np.concatenate(a).tolist()) != sorted(np.concatenate(b).tolist()) for a, b in zip(*passes))


def test_micro_batches_of_like_rows_leave_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([len(random_ids(rng, 2, 40)) + len(response(rng, 1, 40)) for _ in range(64)])
    plan = split_minibatches(lengths, 1, 8, rng)[0]
    area = sum(len(part) * lengths[part].max() for part in plan)
    assert area < 1.25 * lengths.sum() < 64 * lengths.max()
    assert EOS < VOCAB


def flat(prompts, responses) -> list[float]:
    return [0.5] * len(responses)


def by_length(prompts, responses) -> list[float]:
    return [float(len(r)) for r in responses]


@GPT2_ALONE  # the rule is that of rewards, whose lengths it makes
@pytest.mark.parametrize(("head", "reward_fn", "weight", "told"), [
    (0.0, None, 0.0, ["the reward model (-c)"]), (0.1, flat, 0.5, ["--reward-fn given.py:directly"]),
    (None, flat, 0.0, ["--reward-fn given.py:directly"]), (0.0, flat, 0.5, ["the reward model (-c)", "--reward-fn"]),
    (0.1, by_length, 0.5, []), (None, by_length, 0.0, []),
])  # fmt: skip
def test_each_source_of_a_reward_that_is_constant_is_named(
    head, reward_fn, weight, told, ppo_trainer, make_model, capsys
) -> None:
    """Also where the two are added, and the sum differs."""
    model = None if head is None else make_model("reward", seed=1, std=0.1)
    if head == 0.0:
        torch.nn.init.zeros_(model.head.weight)
    trainer = ppo_trainer(reward_model=model, reward_fn=reward_fn, reward_fn_weight=weight)
    for _ in range(3):
        experience_of(trainer)
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == len(told)
    assert all(f"rewards of {source}" in line and "are alike" in line for source, line in zip(told, warnings))
