"""Trainers of tiny models on tiny data, put together by hand."""

from collections.abc import Callable, Iterator

import pytest
from setups import LetterTokenizer, new_run, prompt_examples, ranked_examples, sft_examples

from config.configs import PPOConfig, RMConfig, SFTConfig
from training.engine.runtime import Runtime
from training.start import frozen
from training.trainers import PPOTrainer, RewardModelTrainer, SFTTrainer


@pytest.fixture
def tokenizer() -> LetterTokenizer:
    return LetterTokenizer()


@pytest.fixture
def runtime() -> Runtime:
    return Runtime("cpu", "fp32", 0)


@pytest.fixture
def sft_trainer(make_model, runtime, tokenizer, tmp_path) -> Callable[..., SFTTrainer]:
    """`sft_trainer(train, batch_size=2, ...)`: a trainer of a tiny model, a run folder of its own each time."""

    def make(train=None, validation=None, model=None, state=None, run=None, on=None, **settings) -> SFTTrainer:
        config = SFTConfig(**{**dict(batch_size=4, global_batch_size=8, warmup_steps=0, sample_tokens=6), **settings})
        model = make_model("lm", std=0.1) if model is None else model
        train, validation = train or sft_examples(24), validation or sft_examples(10, seed=9)
        run = run or new_run(tmp_path)
        return SFTTrainer(config, model, tokenizer, train, validation, run, on or runtime, {"stage": "sft"}, state)

    return make


@pytest.fixture
def rm_trainer(make_model, runtime, tokenizer, tmp_path) -> Callable[..., RewardModelTrainer]:
    """`rm_trainer(train, batch_size=2, ...)`, see `sft_trainer`; `sft` is the model whose samples set the scale."""

    def make(
        train=None, validation=None, model=None, sft=None, state=None, run=None, on=None, **settings
    ) -> RewardModelTrainer:  # fmt: skip
        defaults = dict(
            batch_size=4, global_batch_size=8, warmup_steps=0, normalise_prompts=16, response_length=8, lr=1e-3
        )
        config = RMConfig(**{**defaults, **settings})
        model = make_model("reward", std=0.1) if model is None else model
        sft = frozen(make_model("lm", std=0.1)) if sft is None else sft
        train, validation = train or ranked_examples(24), validation or ranked_examples(10, seed=9)
        run = run or new_run(tmp_path)
        description, on = {"stage": "rm"}, on or runtime
        return RewardModelTrainer(config, model, sft, tokenizer, train, validation, run, on, description, state)

    return make


@pytest.fixture
def ppo_trainer(make_model, runtime, tokenizer, tmp_path) -> Callable[..., PPOTrainer]:
    """`ppo_trainer(batch_size=2, ...)`: by default actor == reference, and the critic starts from the reward model."""

    def make(
        actor=None, critic=None, reference=None, reward_model="tiny", reward_fn=None, eval_reward_fn=None, state=None,
        run=None, train=None, on=None, **settings,
    ) -> PPOTrainer:  # fmt: skip
        defaults = dict(
            batch_size=4, global_batch_size=8, iterations=4, lr=1e-3, critic_lr=1e-3, temperature=0.8, kl_coef=0.1,
            response_length=8, eval_examples=6, max_grad_norm=1.0, ppo_epochs=2, value_clip_eps=0.2,
        )  # fmt: skip
        if reward_fn is not None:
            defaults["reward_fn"] = "given.py:directly"
        config = PPOConfig(**{**defaults, **settings})
        if reward_model == "tiny":
            reward_model = make_model("reward", seed=1, std=0.1)
        actor = make_model("actor", std=0.1) if actor is None else actor
        reference = make_model("lm", std=0.1) if reference is None else reference
        critic = make_model("critic", seed=1, std=0.1) if critic is None else critic
        return PPOTrainer(
            config, actor, critic, frozen(reference), None if reward_model is None else frozen(reward_model), tokenizer,
            train or prompt_examples(20), prompt_examples(10, seed=9), run or new_run(tmp_path), on or runtime,
            {"stage": "ppo"}, reward_fn, eval_reward_fn, state,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory) -> Iterator[None]:
    """Tokenised data go to a folder of the session: scripts started here leave the repo's own cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE_DIR", str(tmp_path_factory.mktemp("tokens")))
        yield
