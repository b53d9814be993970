"""Model families in tests: with `FAMILIES = EVERY` a module runs what makes models (`make_model`) once for each."""

import pytest

_SIZES = dict(n_layer=2, n_embd=16, block_size=64, vocab_size=50)
TINY = {
    "gpt2": dict(name="gpt2-nano", n_head=2, **_SIZES),
    # Shared keys, heads that do not add up to n_embd, an output table of its own: all that GPT-2 does not have.
    "llama": dict(name="llama-nano", n_head=4, n_kv_head=2, head_dim=6, n_inner=24, tied=False, **_SIZES),
}
"""Sizes of each family's tiny model. llama-nano, of which scripts are tested, is a tied one."""

EVERY = tuple(TINY)

GPT2_ALONE = pytest.mark.parametrize("family", ["gpt2"], indirect=True, scope="session")
"""For a test of what only GPT-2 has, in a module with FAMILIES."""
