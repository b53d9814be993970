"""Tokenizers of small chat models in Hugging Face's form, each with the chat template of a known family.

SmolLM2's (ChatML) and Llama 3.2's have byte-level BPE; TinyLlama's (Zephyr) has SentencePiece's BPE with byte fallback,
with the prefix as a normalizer, as LLaMA 2 has it, or as a pre-tokenizer, as newer files do.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "What is the capital of Italy? It is Rome.\n\nHuman: hi\n\nAssistant: hello there, system user naïve!",
    "<|user|>\nI don't know, they'll say 12 or 345.\n<|assistant|>\n  x = 1",
] * 20
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# As the models have them: SmolLM2-Instruct's, Llama-3.2-Instruct's without its part on tools, TinyLlama-Chat's.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA32 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
TINYLLAMA = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)


def byte_level(special: list[str], pattern: str = "", size: int = 420) -> Tokenizer:
    """Byte-level BPE, split as GPT-2 does or by a pattern; the special tokens come first, as in SmolLM2."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    before = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([*before, split]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, **options))
    return made


def sentencepiece(special: list[str], prefix: str = "normalizer", size: int = 460) -> Tokenizer:
    """SentencePiece's BPE with byte fallback; the prefix by a "normalizer" or a "pre-tokenizer"."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # while it is trained: no piece goes on behind a space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + _BYTES, show_progress=False)
    made.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    made.pre_tokenizer = None
    if prefix == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    description = json.loads(made.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(description))


_IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_SP = ["<unk>", "<s>", "</s>"]
KINDS: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, str]]] = {
    "chatml": (lambda: byte_level(_IM), SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "llama3": (lambda: byte_level(_HEADERS, _LLAMA3), LLAMA32,
               {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "zephyr": (lambda: sentencepiece(_SP), TINYLLAMA, {"bos_token": "<s>", "eos_token": "</s>"}),
    "zephyr, newer": (lambda: sentencepiece(_SP, "pre-tokenizer"), TINYLLAMA,
                      {"bos_token": "<s>", "eos_token": "</s>"}),
    "zephyr, special roles": (lambda: sentencepiece([*_SP, "<|system|>", "<|user|>", "<|assistant|>"]), TINYLLAMA,
                              {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama2": (lambda: sentencepiece(_SP), LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}),
}  # fmt: skip


def chat_folder(folder: Path, kind: str = "chatml", template: str | None = None, **config: str) -> Path:
    """A folder with the tokenizer of one of `KINDS`; `template` replaces its chat template, "" takes it away."""
    folder.mkdir(parents=True, exist_ok=True)
    make, own, tokens = KINDS[kind]
    made = make()
    if kind == "llama3":  # as Llama 3's, it puts BOS before a text unless it is told not to
        bos = tokens["bos_token"]
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config}
    template = own if template is None else template
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
