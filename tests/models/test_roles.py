"""Reward model and critic: where the score is read, the head's start and precision, normalisation, checkpoint order."""

import pytest
import torch
from every_family import EVERY

from models.families import load_checkpoint, new_model
from models.roles import ScalarHead

FAMILIES = EVERY
EOS = 49
LENGTHS = [9, 4, 1, 12]


@pytest.fixture
def rows(random_rows):
    """Rows that end in EOS."""
    return [torch.cat([row, torch.tensor([EOS])]) for row in random_rows(LENGTHS, vocab_size=EOS)]


def ones(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


# ---------------------------------------------------------------------------------------------------------------------
# Reward model
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 7, 100])
def test_score_does_not_depend_on_padding(make_model, padded, rows, side, extra):
    model = make_model("reward", block_size=128)
    alone = torch.cat([model(row[None], ones(row[None])) for row in rows])
    ids, att = padded(rows, extra, side)
    scores = model(ids, att)
    assert scores.shape == (4,) and scores.dtype == torch.float32
    assert alone.std() > 0.1
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    if side == "right":
        torch.testing.assert_close(model(ids, att, right_padded=True), alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("right_padded", [False, True])
def test_score_is_read_at_the_last_real_token(make_model, right_padded):
    """[11, 12, EOS, PAD, PAD] is read in column 2, a full row in its last one, a row of one token in column 0."""
    model = make_model("reward")
    ids = torch.tensor([[11, 12, EOS, 50, 50], [11, 12, 13, 14, EOS], [EOS, 50, 50, 50, 50]])
    att = ids != 50
    by_hand = model.head(model.hidden(ids, att, right_padded=right_padded))
    scores = model(ids, att, right_padded=right_padded)
    torch.testing.assert_close(scores, by_hand[[0, 1, 2], [2, 4, 0]], atol=1e-6, rtol=0)


@torch.no_grad()
def test_score_depends_on_the_eos(make_model, padded, rows):
    model = make_model("reward")
    ids, att = padded(rows, 3)
    last = torch.tensor([len(row) - 1 for row in rows])
    other = ids.clone()
    other[range(4), last] = 7
    assert (model(ids, att) - model(other, att)).abs().min() > 1e-3


@torch.no_grad()
def test_score_does_not_depend_on_what_pad_is(make_model, padded, rows):
    """Also when PAD is EOS itself: the place is found from the mask, never by comparing ids."""
    model = make_model("reward")
    scores = [model(*padded(rows, 5, side, pad_id)) for side in ("left", "right") for pad_id in (50, EOS, 0)]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-5, rtol=0)


def test_head_starts_at_std_one_over_sqrt_d_plus_one():
    torch.manual_seed(0)
    for d, std in ((768, 0.0360609), (1024, 0.0312348)):
        heads = [ScalarHead(d) for _ in range(10)]
        weights = torch.cat([head.weight.flatten() for head in heads] + [ScalarHead(d).weight.flatten()] * 4)
        assert weights.numel() >= 10_000
        assert weights.std().item() == pytest.approx(std, rel=0.05)
        assert all(head.bias.item() == 0 for head in heads)


def test_a_new_head_starts_the_same_in_every_way_it_is_made(make_model, tmp_path):
    from models.weights.checkpoint import save_model

    save_model(make_model(n_embd=512), tmp_path)
    torch.manual_seed(0)
    for model in (load_checkpoint(tmp_path, "reward"), new_model(make_model(n_embd=512).config, "critic")):
        assert model.head.weight.std().item() == pytest.approx(1 / 513**0.5, rel=0.15)
        assert model.head.bias.item() == 0 and model.normalisation == (1.0, 0.0)


@torch.no_grad()
def test_scores_are_fp32_under_bf16_autocast(make_model, padded, rows):
    """bf16 is spaced 1/32 in [4, 8): two responses 1e-3 apart would get one score."""
    model = make_model("reward")
    ids, att = padded(rows)
    h = torch.zeros(2, 16)
    h[1, 0] = 1e-3 / model.head.weight[0, 0]
    model.head.bias.fill_(6.86)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids, att).dtype == torch.float32
        first, second = model.head(h)
    assert second - first == pytest.approx(1e-3, rel=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = torch.nn.functional.linear(h, model.head.weight, model.head.bias).flatten()
    assert coarse[0] == coarse[1]


@torch.no_grad()
def test_normalisation_is_an_affine_of_the_score(make_model, padded, rows):
    model = make_model("reward")
    ids, att = padded(rows)
    raw = model(ids, att)
    model.set_normalisation(2.0, -0.5)
    assert model.normalisation == (2.0, -0.5)
    torch.testing.assert_close(model(ids, att), 2.0 * raw - 0.5)
    assert not any("norm_" in name for name, _ in model.named_parameters())  # measured, never trained
    assert {"head.norm_gain", "head.norm_bias"} <= set(model.state_dict())


@pytest.mark.parametrize(
    "gain, bias", [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (1.0, float("nan"))]
)
def test_a_useless_normalisation_is_refused(make_model, gain, bias):
    with pytest.raises(ValueError, match="normalisation"):
        make_model("reward").set_normalisation(gain, bias)


def test_score_sends_gradient_to_trunk_and_head(make_model, padded, rows):
    model = make_model("reward")
    model(*padded(rows)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.head.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Critic
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_values_stand_at_every_column(make_model, padded, rows):
    critic = make_model("critic")
    ids, att = padded(rows)
    values = critic(ids, att)
    assert values.shape == ids.shape and values.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(ids, att).dtype == torch.float32


@torch.no_grad()
def test_the_reward_models_gain_scales_the_values(make_model, padded, rows):
    critic = make_model("critic")
    ids, att = padded(rows)
    critic.set_normalisation(1.0, 0.0)
    raw = critic(ids, att)
    critic.set_normalisation(3.0, 0.0)
    torch.testing.assert_close(critic(ids, att), 3.0 * raw)


@torch.no_grad()
def test_a_critic_from_a_reward_model_values_the_end_with_its_score(make_model, padded, rows, tmp_path):
    from models.weights.checkpoint import save_model

    reward = make_model("reward")
    reward.set_normalisation(0.7, 0.2)
    save_model(reward, tmp_path)
    critic = load_checkpoint(tmp_path, "critic").eval()
    ids, att = padded(rows)
    last = torch.tensor([len(row) - 1 for row in rows])
    torch.testing.assert_close(critic(ids, att)[range(4), last], reward(ids, att), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# All roles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, role", [("lm", "lm"), ("actor", "lm"), ("reward", "reward"), ("critic", "critic")])
def test_roles_know_their_name(make_model, kind, role):
    assert make_model(kind).role == role


@pytest.mark.parametrize("role", ["lm", "actor", "reward", "critic"])
@pytest.mark.parametrize("rank", [0, 2])
def test_train_mode_without_dropout_changes_no_bit(make_model, padded, rows, role, rank):
    model = make_model(role, lora_rank=rank)
    ids, att = padded(rows)
    quiet = model(ids, att)
    model.train()
    assert torch.equal(model(ids, att), quiet)


def test_a_head_of_zeros_values_everything_at_zero(make_model, padded, rows):
    critic = new_model(make_model().config, "critic")
    torch.nn.init.zeros_(critic.head.weight)
    assert not critic(*padded(rows)).any()
