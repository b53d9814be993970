"""What the models of every family keep: padding, causality, the cache, recomputation, columns asked for."""

import pytest
import torch
import torch.nn.functional as F
from every_family import EVERY, GPT2_ALONE

import models.trunk
from models.cache import KVCache, model_inputs
from models.families import load_checkpoint

FAMILIES = EVERY
LENGTHS = [9, 4, 1, 12]
SIDES = ["left", "right"]


def real(outputs: torch.Tensor, att: torch.Tensor) -> torch.Tensor:
    """The outputs at real tokens [N, ...], row by row."""
    return outputs[att]


# ---------------------------------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------------------------------


def test_positions_count_real_tokens_only():
    att = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    _, positions, _ = model_inputs(torch.zeros(3, 5, dtype=torch.long), att, None, False, 64)
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 2, 2]]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("extra", [0, 7, 100])
def test_a_row_means_the_same_with_any_padding(make_model, padded, random_rows, side, extra):
    rows = random_rows(LENGTHS)
    model, critic = make_model(block_size=128), make_model("critic", block_size=128)
    ids, att = padded(rows, extra, side)
    hidden, logp, values = model.hidden(ids, att), model(ids, att).log_softmax(-1), critic(ids, att)
    for outputs in (hidden, logp, values):
        assert torch.isfinite(outputs).all()  # at padding too: a NaN there would reach gradients
    alone = [row[None] for row in rows]
    torch.testing.assert_close(real(hidden, att), torch.cat([model.hidden(r)[0] for r in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        real(logp, att), torch.cat([model(r)[0].log_softmax(-1) for r in alone]), atol=1e-5, rtol=0
    )
    values_alone = torch.cat([critic(r, torch.ones_like(r, dtype=torch.bool))[0] for r in alone])
    torch.testing.assert_close(real(values, att), values_alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", SIDES)
def test_what_stands_at_padding_does_not_matter(make_model, padded, random_rows, side):
    model = make_model()
    ids, att = padded(random_rows(LENGTHS), 3, side, pad_id=0)
    expected = real(model(ids, att), att)
    for garbage in (7, 50, 10**9, -1):  # real, the virtual PAD and impossible ids: none is looked up
        assert torch.equal(real(model(ids.masked_fill(~att, garbage), att), att), expected)


def test_pad_ids_are_never_looked_up_on_any_path(make_model, padded, random_rows):
    model = make_model()
    ids, att = padded(random_rows(LENGTHS), 3, "right", pad_id=10**9)
    model(ids, att, right_padded=True)
    cache = KVCache.allocate(model.config, len(ids), 20, ids.device, torch.float32)
    left, left_att = padded(random_rows(LENGTHS), 3, "left", pad_id=10**9)
    model.hidden(left, left_att, cache)


def test_right_padded_promise_changes_nothing(make_model, padded, random_rows):
    model = make_model()
    ids, att = padded(random_rows(LENGTHS), 5)
    torch.testing.assert_close(
        real(model(ids, att, right_padded=True), att), real(model(ids, att), att), atol=1e-5, rtol=0
    )


def test_gradients_do_not_depend_on_padding(make_model, padded, random_rows):
    rows = random_rows(LENGTHS)
    gradients = []
    for extra, side in [(0, "right"), (11, "left"), (3, "right")]:
        model = make_model()
        ids, att = padded(rows, extra, side)
        real(model(ids, att), att).square().mean().backward()
        gradients.append(model.token_table.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-5, rtol=1e-4)


def test_every_query_sees_something(make_model):
    """A softmax over nothing is NaN on some devices; where it is not, the outputs alone would not tell."""
    model = make_model()
    ids, att = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[False] * 4, [False, True, True, False]])
    assert torch.isfinite(model(ids, att)).all()
    _, _, mask = model_inputs(ids, att, None, False, 64)
    assert mask.shape == (2, 1, 4, 4) and mask.any(-1).all()
    assert mask[1, 0].tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
    ]


def test_right_padded_rows_need_no_mask_unless_the_cache_holds_something(make_model):
    model = make_model()
    ids, att = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[True, True, True], [True, False, False]])
    cache = KVCache.allocate(model.config, 2, 6, ids.device, torch.float32)
    assert model_inputs(ids, att, cache, True, 64)[2] is None
    assert torch.equal(cache.att[:, :3], att)
    cache.length = 3
    _, positions, mask = model_inputs(ids, att, cache, True, 64)
    assert positions.tolist() == [[3, 4, 5], [1, 1, 1]]
    assert mask[1, 0, 0].tolist() == [True, False, False, True, False, False]


def test_attention_mask_of_a_tokenizer_is_accepted(make_model, padded, random_rows):
    model = make_model()
    ids, att = padded(random_rows(LENGTHS), 2, "left")
    assert torch.equal(model(ids, att.long()), model(ids, att))
    assert torch.equal(model(ids, att.long(), right_padded=True), model(ids, att, right_padded=True))


# ---------------------------------------------------------------------------------------------------------------------
# Causality and slicing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_token_reaches_its_own_value_and_later_logprobs_only(make_model, random_rows):
    """Changing response token t leaves V[:, :t+1] and logprobs[:, :t] as they were and changes V[:, t+1]."""
    P, T, t = 5, 6, 2
    model, critic = make_model(), make_model("critic")
    (row,) = random_rows([P + T])
    changed = row.clone()
    changed[P + t] = (row[P + t] + 1) % 50
    ids, att = torch.stack([row, changed]), torch.ones(2, P + T, dtype=torch.bool)
    values = critic(ids, att)[:, P - 1 : P - 1 + T]
    logp = model(ids, att)[:, P - 1 : P - 1 + T].log_softmax(-1).gather(-1, ids[:, P:, None]).squeeze(-1)
    assert torch.equal(values[0, : t + 1], values[1, : t + 1])
    assert torch.equal(logp[0, :t], logp[1, :t])
    assert (values[0, t + 1 :] - values[1, t + 1 :]).abs().min() > 1e-6
    assert (logp[0, t:] - logp[1, t:]).abs().min() > 1e-6


def test_sum_of_response_logprobs_is_minus_the_sft_loss(make_model, padded, random_rows):
    P, n = 4, [5, 3]
    model = make_model()
    ids, att = padded(random_rows([P + m for m in n]))
    T = max(n)
    rmask = torch.arange(T) < torch.tensor(n)[:, None]
    logits = model(ids, att)
    tokens = ids[:, P:].masked_fill(~rmask, 0)
    logp = logits[:, P - 1 : P - 1 + T].log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    labels = ids.masked_fill(~att, -100)
    labels[:, :P] = -100
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert (logp * rmask).sum().item() == pytest.approx(-sum(n) * loss.item(), rel=1e-5)


def test_at_projects_the_chosen_columns(make_model, padded, random_rows):
    model, critic = make_model(), make_model("critic")
    ids, att = padded(random_rows(LENGTHS))
    at = torch.tensor([0, 5, ids.numel() - 1, 5])
    torch.testing.assert_close(model(ids, att, at=at), model(ids, att).flatten(0, 1)[at], atol=1e-6, rtol=0)
    torch.testing.assert_close(critic(ids, att, at=at), critic(ids, att).flatten()[at], atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Cache and context
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [7, 1, 1, 3]])
@pytest.mark.parametrize("side", SIDES)
def test_cache_gives_what_the_whole_sequence_gives(make_model, padded, random_rows, chunks, side):
    model = make_model()
    ids, att = padded(random_rows([12, 5, 9]), 0, side)
    cache = KVCache.allocate(model.config, len(ids), 12, ids.device, torch.float32)
    parts = [model.hidden(i, a, cache) for i, a in zip(ids.split(chunks, 1), att.split(chunks, 1), strict=True)]
    torch.testing.assert_close(real(torch.cat(parts, 1), att), real(model.hidden(ids, att), att), atol=1e-5, rtol=0)
    assert cache.length == 12


def test_cache_rows_can_be_dropped(make_model, padded, random_rows):
    model = make_model()
    ids, att = padded(random_rows([8, 5, 6]), 0, "left")
    keep = torch.tensor([2, 0])
    cache = KVCache.allocate(model.config, 3, 9, ids.device, torch.float32)
    model.hidden(ids, att, cache)
    cache.keep_rows(keep)
    assert all(k.transpose(2, 3).is_contiguous() and v.is_contiguous() for k, v in zip(cache.keys, cache.values))
    new = torch.tensor([[3], [4]])
    whole = model.hidden(torch.cat([ids[keep], new], 1), torch.cat([att[keep], torch.ones(2, 1, dtype=torch.bool)], 1))
    torch.testing.assert_close(model.hidden(new, None, cache)[:, -1], whole[:, -1], atol=1e-5, rtol=0)


def test_more_tokens_than_the_context_holds(make_model):
    model = make_model(block_size=8)
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="9 tokens do not fit the context of 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = KVCache.allocate(model.config, 1, 20, torch.device("cpu"), torch.float32)
    model.hidden(torch.zeros(1, 8, dtype=torch.long), None, cache)
    with pytest.raises(ValueError, match="do not fit"):
        model.hidden(torch.zeros(1, 1, dtype=torch.long), None, cache)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def test_padded_token_table_has_no_logits(make_model, random_rows):
    model = make_model(vocab_size=50, embedding_rows=64)
    logits = model(random_rows([6])[0][None])
    assert logits.shape == (1, 6, 50)
    logits.square().sum().backward()
    assert model.output_table.grad[50:].abs().max() == 0


def test_class_methods_build_the_class_they_are_called_on(make_model, tmp_path):
    from models.weights.checkpoint import save_model

    save_model(make_model(), tmp_path)
    for role, folder in (("lm", str(tmp_path)), ("actor", tmp_path)):
        cls = type(make_model(role))
        assert type(cls.from_checkpoint(folder)) is type(load_checkpoint(folder, role)) is cls


# ---------------------------------------------------------------------------------------------------------------------
# Dropout, recomputation, precision
# ---------------------------------------------------------------------------------------------------------------------


def test_without_dropout_train_mode_changes_no_bit(make_model, random_rows):
    model, ids = make_model(), random_rows([10])[0][None]
    quiet = model(ids)
    model.train()
    assert torch.equal(model(ids), quiet)


def test_recomputation_changes_no_gradient(make_model, padded, random_rows, monkeypatch):
    calls = []
    original = models.trunk.checkpoint

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(models.trunk, "checkpoint", counted)
    ids, att = padded(random_rows(LENGTHS), 2, "left")
    gradients = []
    for recompute in (False, True):
        model = make_model(activation_checkpointing=recompute).train()
        real(model(ids, att), att).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert calls == [{"use_reentrant": False}] * 2  # once a layer, and only where asked for
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@GPT2_ALONE
def test_recomputation_leaves_dropout_alone(make_model, random_rows):
    ids = random_rows([10])[0][None]
    gradients = []
    for recompute in (False, True):
        model = make_model(activation_checkpointing=recompute, dropout=0.2).train()
        torch.manual_seed(1)
        model(ids).square().mean().backward()
        gradients.append(model.token_table.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_recomputation_leaves_the_cache_alone(make_model, random_rows):
    ids = random_rows([10])[0][None]
    model = make_model(activation_checkpointing=True).train()
    cache = KVCache.allocate(model.config, 1, 11, ids.device, torch.float32)
    with torch.no_grad():
        model.hidden(ids[:, :9], None, cache)
    cache.keys = [k.clone() for k in cache.keys]
    torch.testing.assert_close(model.hidden(ids[:, 9:], None, cache)[:, 0], model.hidden(ids)[:, 9], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_the_loss_sends_its_gradients_where_those_of_the_logits_go(make_model, random_rows, method):
    """To the table that projects onto the vocabulary, one of its own or not; with adapters neither table trains."""
    ids, found = random_rows([20])[0][None], []
    for by_blocks in (False, True):
        model = make_model(lora_rank=2).train()
        model.freeze_weights(method)
        if by_blocks:
            model(ids, at=torch.arange(19), targets=ids[0, 1:]).backward()
        else:
            F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum").backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        for table in (model.token_table, model.output_table):
            assert (table.grad is not None) == (method == "none")
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_asking_for_some_columns_gives_those_of_all(make_model, padded, random_rows, role, checkpointing):
    """Behind the last attention only the wanted columns are computed: same values, same gradients."""
    ids, att = padded(random_rows([9, 4, 12]), 2)
    at = torch.tensor([0, 3, 8, 14, 17, 30, 39])
    found = []
    for some in (False, True):
        model = make_model(role, activation_checkpointing=checkpointing).train()
        h = model.hidden(ids, att, right_padded=True, at=at if some else None)
        h = h if some else h.flatten(0, 1)[at]
        h.square().sum().backward()
        found.append((h, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-4, rtol=1e-4)
