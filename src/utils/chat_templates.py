"""The prompt templates that --template knows by name, and the one that a chat model brings with it.

A model's own template is a program (Jinja) that writes a whole dialogue. `own_template` has it write dialogues of
placeholders, finds what stands around these, and takes the result only if it writes the same dialogues as the program.
"""

import re
from dataclasses import replace
from os.path import commonprefix

from config.user_error import UserError
from utils.template import Marks, PromptTemplate, Turn
from utils.tokenizer import HuggingFaceTokenizer, Tokenizer
from utils.tokenizers.huggingface import quiet_transformers

PLAIN, OWN, AUTO = "human-assistant", "own", "auto"

_ROLES = ("system", "user", "assistant")
_IM = {role: f"<|im_start|>{role}\n" for role in _ROLES}
_HEADER = {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in _ROLES}
_BOS, _EOT = "<|begin_of_text|>", "<|eot_id|>"

NAMED = {
    "chatml": Marks(
        name="chatml", tokens=("<|im_start|>", "<|im_end|>"), end="<|im_end|>", begin="",
        system=(_IM["system"], "<|im_end|>\n"), system_inside=False, user=(_IM["user"], "<|im_end|>\n"),
        assistant=_IM["assistant"], reply=("", "<|im_end|>"), after="\n",
    ),
    "llama3": Marks(
        name="llama3", tokens=(_BOS, "<|start_header_id|>", "<|end_header_id|>", _EOT), end=_EOT, begin=_BOS,
        system=(_BOS + _HEADER["system"], _EOT), system_inside=False, user=(_HEADER["user"], _EOT),
        assistant=_HEADER["assistant"], reply=("", _EOT), after="",
    ),
    # The names of the roles are plain text in the vocabularies of Zephyr and TinyLlama; see `_fitted`.
    "zephyr": Marks(
        name="zephyr", tokens=("</s>",), end="</s>", begin="", system=("<|system|>\n", "</s>\n"),
        system_inside=False, user=("<|user|>\n", "</s>\n"), assistant="<|assistant|>\n", reply=("", "</s>"), after="\n",
    ),
}  # fmt: skip

# The other way round: what a run's template is to other programs. `chat_template` fills the names in capitals in.
_CHAT = """\
{%- if messages[0]['role'] in ['system', 'developer'] -%}
  {%- set start = 1 -%}
{%- else -%}
  {%- set start = 0 -%}
{%- endif -%}
{%- if messages | length == start -%}
  {{- raise_exception('There is no turn of the user.') -}}
{%- endif -%}
{%- if start == 0 or INSIDE -%}
  {{- BEGIN -}}
{%- endif -%}
{%- set system = namespace(value='') -%}
{%- for message in messages -%}
  {%- set text = namespace(value='') -%}
  {%- if message['content'] is string -%}
    {%- set text.value = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] != 'text' -%}
        {{- raise_exception('Only text can be read, not ' ~ part['type'] ~ '.') -}}
      {%- endif -%}
      {%- set text.value = text.value ~ part['text'] -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set content = text.value | trim -%}
  {%- if loop.index0 < start and INSIDE -%}
    {%- set system.value = SYSTEM_OPENS ~ content ~ SYSTEM_ENDS if content else '' -%}
  {%- elif loop.index0 < start -%}
    {{- SYSTEM_OPENS ~ content ~ SYSTEM_ENDS if content else BEGIN -}}
  {%- elif message['role'] != ['user', 'assistant'][(loop.index0 - start) % 2] -%}
    {{- raise_exception('Turns are those of user, assistant, user, ... after at most one system message.') -}}
  {%- elif message['role'] == 'user' -%}
    {{- USER_OPENS ~ system.value ~ content ~ USER_ENDS -}}
    {%- set system.value = '' -%}
  {%- else -%}
    {%- if loop.last and add_generation_prompt -%}
      {{- raise_exception('A reply follows a turn of the user; the last turn is the assistant\\'s.') -}}
    {%- endif -%}
    {{- ASSISTANT ~ REPLY_OPENS ~ content ~ REPLY_ENDS -}}
    {{- LAST if loop.last else AFTER -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ASSISTANT -}}
{%- endif -%}
"""

_SYSTEM, *_SAID = (f"q{name}q" for name in ("Kind", "Alpha", "Beta", "Gamma", "Delta", "Omega"))  # placeholders
_REMEDY = "give --template chatml or human-assistant"


def choose_template(choice: str, tokenizer: Tokenizer) -> tuple[PromptTemplate, Tokenizer]:
    """The prompt template that --template names, and the tokenizer with that template's end mark as its EOS.

    Args:
        choice: "human-assistant", "own", a name of `NAMED`, or "auto": the tokenizer's own where it has one. Who starts
            from something else than a model in Hugging Face's form settles "auto" itself.
        tokenizer: of the model.

    Raises:
        UserError: the tokenizer has no such special tokens or no template of its own, or that cannot be taken apart.
    """
    has_own = isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template
    if choice == PLAIN or (choice == AUTO and not has_own):
        return PromptTemplate(), tokenizer
    try:
        if choice in NAMED:
            marks: Marks | None = NAMED[choice]
        elif has_own:
            marks = own_marks(tokenizer)
        else:
            raise ValueError(f"the tokenizer {tokenizer.name} has no chat template")
        return (PromptTemplate(), tokenizer) if marks is None else _fitted(marks, tokenizer)
    except ValueError as error:
        remedy = "give --template human-assistant" if choice in NAMED else _REMEDY
        raise UserError(f"--template {choice}: {error}; {remedy}") from None


def template_at_hand(tokenizer: Tokenizer) -> tuple[PromptTemplate, Tokenizer, str]:
    """As `choose_template` with "auto", but a template that cannot be taken apart is told in a line, the third value,
    and the human-assistant form taken in its place: for models that are looked at or compared, not trained."""
    try:
        template, tokenizer = choose_template(AUTO, tokenizer)
    except UserError as error:
        why = str(error).removeprefix(f"--template {AUTO}: ").removesuffix(f"; {_REMEDY}")
        return PromptTemplate(), tokenizer, f"note: {tokenizer.name} is asked in the human-assistant form: {why}"
    return template, tokenizer, ""


def _fitted(marks: Marks, tokenizer: Tokenizer) -> tuple[PromptTemplate, Tokenizer]:
    """A template of these marks, with every special token of the tokenizer in them, and the tokenizer with its EOS.

    Raises:
        ValueError: a token of the marks is none of the tokenizer's special ones.
    """
    for token in marks.tokens:
        tokenizer.mark(token)
    assert isinstance(tokenizer, HuggingFaceTokenizer), "no other tokenizer has marks"
    strings = [marks.begin, *marks.system, *marks.user, marks.assistant, *marks.reply, marks.after]
    open_to_all = next((t for t in tokenizer.writable_tokens if t.strip() and any(t in s for s in strings)), None)
    if open_to_all:
        raise ValueError(f"{open_to_all} is no special token of the tokenizer, so that anybody's text could have it")
    found = tuple(token for token in tokenizer.special_tokens if any(token in string for string in strings))
    return PromptTemplate(marks=replace(marks, tokens=found)), tokenizer.with_eos(marks.end)


def own_marks(tokenizer: HuggingFaceTokenizer) -> Marks | None:
    """The marks of the tokenizer's own chat template; None where it writes the human-assistant form, without any.

    Raises:
        ValueError: it does not write a dialogue as marks around what the turns say.
    """
    asked = _written(tokenizer, _dialogue(3), ask=True)
    if asked == PromptTemplate().prompt_of_turns(_dialogue(3)):
        return None
    before, between, behind, ask = _around(asked, _dialogue(3))
    *_, ended = _around(_written(tokenizer, _dialogue(2), ask=False), _dialogue(2))
    *_, unasked = _around(_written(tokenizer, _dialogue(1), ask=False), _dialogue(1))
    ends = {ended.index(token): token for token in sorted(tokenizer.special_tokens, key=len) if token in ended}
    if not ends:
        raise ValueError("its chat template ends a reply with no special token")
    end = ends[min(ends)]
    cut = min(ends) + len(end)
    rest = behind[cut:]
    opening = commonprefix([before[::-1], rest[::-1]])[::-1].lstrip()
    close = unasked if ask.startswith(unasked) and ask != unasked else ""  # or the turn's end alone asks for a reply
    cue = ask.removeprefix(close)
    marks = Marks(
        name=OWN, tokens=(end,), end=end, begin=before.removesuffix(opening), system=("", "\n\n"), system_inside=True,
        user=(opening, close), assistant=cue, reply=(between.removeprefix(ask), ended[:cut]),
        after=rest.removesuffix(opening),
    )  # fmt: skip
    with_system = True
    try:
        first, second, _ = _around(_written(tokenizer, _dialogue(1, _SYSTEM), ask=True), _dialogue(1, _SYSTEM))
    except ValueError:
        with_system = False  # it knows none; then the message stands in the first turn
    if with_system and second.endswith(opening):
        marks = replace(marks, system=(first, second.removesuffix(opening)), system_inside=False)
    elif with_system:
        marks = replace(marks, system=(first.removeprefix(before), second))
    if not (opening and cue.strip() and _writes_the_same(marks, tokenizer, with_system, ended[cut:])):
        raise ValueError("its chat template cannot be taken apart into marks and what the turns say")
    return marks


def _dialogue(count: int, system: str = "", more: str = "") -> list[Turn]:
    """So many turns of user and assistant that say placeholders, each with `more` behind it."""
    said = [(("user", "assistant")[i % 2], _SAID[i] + more) for i in range(count)]
    return [("system", system + more), *said] if system else said


def _written(tokenizer: HuggingFaceTokenizer, turns: list[Turn], ask: bool) -> str:
    """What the tokenizer's chat template makes of turns; ValueError where it refuses them."""
    try:
        with quiet_transformers():
            return tokenizer.chat_text([{"role": role, "content": text} for role, text in turns], ask)
    except Exception as error:  # Jinja's, the template's own, and what Python raises inside of it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"its chat template does not write a dialogue ({reason})") from None


def _around(text: str, turns: list[Turn]) -> list[str]:
    """What stands before, between and behind the turns; ValueError where one of them is not there once."""
    found = []
    for _, said in turns:
        before, _, text = text.partition(said)
        found.append(before)
    if text == "" and not found[-1] or any(said in part for _, said in turns for part in [*found, text]):
        raise ValueError("its chat template does not write every turn once")
    return [*found, text]


def _writes_the_same(marks: Marks, tokenizer: HuggingFaceTokenizer, with_system: bool, tail: str) -> bool:
    """Whether the marks give the dialogues that the chat template gives; `tail` is behind the last end mark."""
    for system in ("", _SYSTEM)[: 1 + with_system]:
        for count in range(1, len(_SAID) + 1):
            *begun, last = turns = _dialogue(count, system, more=": 'a'  b,\n\n\"c\" <d>")
            ask = last[0] == "user"
            whole = marks.prompt(turns) if ask else marks.prompt(begun) + last[1].join(marks.reply) + tail
            if whole != _written(tokenizer, turns, ask):
                return False
    return True


def chat_template(template: PromptTemplate) -> str:
    """Jinja that writes messages as the model of a template reads turns.

    A dialogue that ends with a reply has the EOS as its last token, as in training and for a reward model.
    """
    marks = template.marks
    user, assistant, reply = (template.human, ""), template.assistant, (template.response_prefix, "")
    system, begin, after = ("", ""), "", ""
    if marks is not None:
        user, assistant, reply, system, begin = marks.user, marks.assistant, marks.reply, marks.system, marks.begin
        after = marks.after
    strings = dict(
        SYSTEM_OPENS=system[0], SYSTEM_ENDS=system[1], USER_OPENS=user[0], USER_ENDS=user[1], ASSISTANT=assistant,
        REPLY_OPENS=reply[0], REPLY_ENDS=reply[1], AFTER=after, BEGIN=begin,
    )  # fmt: skip
    values = {name: repr(string) for name, string in strings.items()}
    values |= {"LAST": "eos_token" if marks is None else "''", "INSIDE": repr(bool(marks and marks.system_inside))}
    return re.sub("|".join(values), lambda name: values[name[0]], _CHAT)
