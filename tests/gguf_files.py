"""Tiny LLaMAs and GPT-2s in folders of transformers, to be written to and read from GGUF files."""

import torch
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.weights.gguf_tokenizer import splits

CHAT = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The hen lays an egg, 1234 of them in 2026.\n 5 more, don't you think? na\u00efve \u4e2d\u6587"
# What may differ between two LLaMAs.
SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
    "all heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 1e4,
        }
    },
}  # fmt: skip


def tiny_tokenizer(split="smollm", **options):
    """Byte-level BPE with splits of that name and a chat template."""
    backend = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = splits()[split], decoders.ByteLevel()
    alphabet = splits()["gpt-2"].alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT] * 3, trainer)
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0], "pad_token": SPECIAL[2]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **(names | options))


def tiny_model(folder, kind="llama", tokenizer=None, **sizes):
    """Write a folder with a random model and a tokenizer; returns the model."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(tokenizer)}
    if kind == "llama":
        plain = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**(plain | ids | sizes)))
    else:
        # Of a GGUF file transformers does not read how many positions a GPT-2 has: it takes 1024.
        plain = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
        model = GPT2LMHeadModel(GPT2Config(**(plain | ids | sizes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms of one and biases of zero would hide mistakes
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return model.eval()
