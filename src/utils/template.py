"""How a dialogue is written: as text, and as the ids that a model reads. As text it has the form of HH-RLHF:

    "\\n\\nHuman: first question\\n\\nAssistant: first reply\\n\\nHuman: second question\\n\\nAssistant: second reply"

A *prompt* is everything up to and including the last "\\n\\nAssistant:", a *response* is what follows and starts with
its own space, so that prompt and response can be tokenised apart and their ids joined. Training, generation and
evaluation all use these functions: a prompt that misses the leading blank line or carries a trailing space is another
prompt to the model.

People, reward functions and judges see this text whatever the model. Ids come of it in one place, `encode_prompts` and
`encode_responses`. Without `marks` they are those of the text. With `Marks` the text is taken apart into turns, and
these are written between special tokens, as a chat model was trained to read them. What a turn says is plain text and
never gives a special token.

So that no turn can be forged in what another one says, such a template quotes "\\n\\nHuman:" and "\\n\\nAssistant:"
inside a turn of messages by a backslash before the word, and takes it away again before the ids.

They are also where line ends become the project's own (`unix_lines`): a text looks the same to the model whatever
system it was written on. Nothing else of it changes: a byte order mark inside a text, U+2028, composed and decomposed
letters are what somebody wrote.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from config.user_error import UserError
from utils.tokenizers.interface import Tokenizer

Turn = tuple[str, str]
"""(role, text); the role is "system", "user" or "assistant"."""


def unix_lines(text: str) -> str:
    """The text with LF for every line end, CRLF and a CR alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class Marks:
    """What a chat model reads around what the turns say. Where one of `tokens` stands in a string, that special token
    is meant; all else in it is plain text."""

    name: str = field(compare=False)
    """What --template calls it."""
    tokens: tuple[str, ...]
    """Special tokens of the tokenizer, as they are written."""
    end: str
    """The one of them that ends a reply: the EOS of all stages."""
    begin: str
    """Before the first turn where there is no system message: BOS, or a system message that the template has itself."""
    system: tuple[str, str]
    """Around a system message, which stands in place of `begin`, or inside the person's first turn."""
    system_inside: bool
    """Whether it is inside that turn, before what the person says."""
    user: tuple[str, str]
    """Around a turn of the person."""
    assistant: str
    """Opens a turn of the model, and ends every prompt."""
    reply: tuple[str, str]
    """Before a reply, and behind it up to the end mark; both belong to the reply's tokens."""
    after: str
    """Between the end mark and the next turn."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A prompt of these turns, a system message first, with `assistant` at its end."""
        system = turns[0][1] if turns and turns[0][0] == "system" else ""
        others = [turn for turn in turns if turn[0] != "system"]
        start = system.join(self.system) if system and not self.system_inside else self.begin
        if system and self.system_inside:
            at = next((i for i, (role, _) in enumerate(others) if role == "user"), 0)
            others[at : at + 1] = [(role, system.join(self.system) + text) for role, text in others[at : at + 1]]
        return start + "".join(self._turn(*turn) for turn in others) + self.assistant

    def _turn(self, role: str, text: str) -> str:
        return text.join(self.user) if role == "user" else self.assistant + text.join(self.reply) + self.after

    def turns(self, text: str) -> list[Turn]:
        """The turns of what `prompt` wrote; with the role "" what stands between no marks, as where it was cut."""
        roles = {self.user[0]: "user", self.assistant: "assistant", self.assistant + self.reply[0]: "assistant"}
        closings = [self.begin, self.user[1], self.reply[1] + self.after]
        if not self.system_inside:
            roles |= {self.system[0]: "system"}
            closings.append(self.system[1])
        elif self.system[0].strip():
            roles |= {self.user[0] + self.system[0]: "system", self.system[1]: "user"}
        known = dict.fromkeys(filter(None, closings), "") | roles
        patterns = {string: re.escape(string) for string in sorted(known, key=len, reverse=True)}
        for token in map(re.escape, self.tokens):  # some tokenizers begin to read with a space, behind a mark, too
            patterns = {s: re.sub(f"{re.escape(token)}(?=.)", lambda m: f"{m[0]} ?", p) for s, p in patterns.items()}
        found, role, at = [], "", 0
        for match in re.finditer("|".join(f"({pattern})" for pattern in patterns.values()), text):
            found.append((role, text[at : match.start()].strip()))
            role, at = known[list(patterns)[match.lastindex - 1]], match.end()
        return [(role, said) for role, said in [*found, (role, text[at:].strip())] if role or said]

    def spelled(self, tokenizer: Tokenizer) -> Self:
        """The same, with special tokens as `Tokenizer.encode_marked` takes them; UserError where it lacks one."""
        try:
            names = {token: tokenizer.mark(token) for token in self.tokens}
        except ValueError as error:
            raise UserError(f"{error}, which the model's template has; put the model's own tokenizer back") from None

        def spell(value: Any) -> Any:
            if not isinstance(value, str):
                return tuple(map(spell, value)) if isinstance(value, tuple) else value
            return re.sub(pattern, lambda found: names[found[0]], value)

        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return type(self)(**{f.name: spell(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Reads what `dataclasses.asdict` made, or JSON of it; ValueError where it is something else."""
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"the marks of a prompt template are {sorted(names)}, found {data!r}")
        lists = {name: data[name] for name in ("tokens", "system", "user", "reply")}
        are_lists = all(isinstance(part, list | tuple) for part in lists.values())
        strings = [data[name] for name in names - {*lists, "system_inside"}]
        strings += [string for part in lists.values() for string in part] if are_lists else []
        is_right = are_lists and all(isinstance(string, str) for string in strings)
        is_right = is_right and all(len(part) == 2 for name, part in lists.items() if name != "tokens")
        if not is_right or data["end"] not in data["tokens"] or type(data["system_inside"]) is not bool:
            raise ValueError(f"the marks of a prompt template are strings and pairs of them, found {data!r}")
        return cls(**data | {name: tuple(part) for name, part in lists.items()})


@dataclass(frozen=True)
class PromptTemplate:
    """The strings around the turns of a dialogue; saved with every checkpoint."""

    human: str = "\n\nHuman: "
    """Opens a turn of the person."""
    assistant: str = "\n\nAssistant:"
    """Opens a turn of the model, and ends every prompt."""
    response_prefix: str = " "
    """Stands between `assistant` and the text of a reply; it belongs to the reply's tokens."""
    marks: Marks | None = None
    """What a chat model reads in place of these strings; None: it reads them."""

    def __post_init__(self) -> None:
        if not self.human.strip() or not self.assistant.strip():
            raise ValueError("a prompt template needs a text in both `human` and `assistant`")

    def format(self, turns: Sequence[str]) -> str:
        """Writes a prompt.

        Args:
            turns: texts of person, model, person, ... in turn, first and last by the person (an odd number).

        Returns:
            The prompt text, ending with `assistant`.

        Raises:
            ValueError: the number of turns is even, so that the last one is the model's (or there is none).
        """
        if len(turns) % 2 == 0:
            raise ValueError(
                f"a prompt ends with a turn of the person, so it has an odd number of turns, not {len(turns)}"
            )
        return self.prompt_of_turns([(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)])

    def prompt_of_turns(self, turns: Sequence[tuple[str, str]]) -> str:
        """Writes a prompt from (role, text) of "system", "user" and "assistant" in any order. The text of "system"
        stands as it is, as a text before the first turn of a dialogue does."""
        openings = {"": "", "system": "", "user": self.human, "assistant": self.assistant + self.response_prefix}
        said = [(role, unix_lines(text.strip())) for role, text in turns]
        if self.marks is not None:
            said = [(role, self._quoting(role).sub(r"\1\\", text)) for role, text in said]
        return "".join(openings[role] + text for role, text in said) + self.assistant

    def turns(self, prompt: str) -> list[Turn]:
        """The turns of a prompt in the template's form: what `prompt_of_turns` was given, for a template with marks."""
        roles = {self.human.rstrip(): "user", self.assistant: "assistant"}
        cue = "|".join(map(re.escape, roles))
        start, *parts = re.split(f"({cue})", prompt.removesuffix(self.assistant))
        found = [("system", start.strip())] if start.strip() else []
        found += [(roles[opening], text.strip()) for opening, text in zip(parts[::2], parts[1::2], strict=True)]
        return [(role, self._quoting(role, r"\\").sub(r"\1", text)) for role, text in found]

    def _quoting(self, role: str, quote: str = "") -> re.Pattern:
        """Where a turn would be taken for several. The text of a system may begin like a turn, too."""
        words = "|".join(re.escape(opening.strip()) for opening in (self.human, self.assistant))
        return re.compile(rf"(\n\n{'' if role == 'user' or role == 'assistant' else '|^'}){quote}(?=\\*(?:{words}))")

    def split_dialogue(self, text: str) -> tuple[str, str]:
        """Cuts a whole dialogue after its last `assistant`.

        Returns:
            (prompt, response), the response as `response` normalises it; it is "" if the last reply is empty.

        Raises:
            ValueError: there is no turn of the model, or the person's turn is the last one. The message says which.
        """
        text = self._with_opening(unix_lines(text))
        cut = text.rfind(self.assistant)
        if cut < 0:
            raise ValueError(f"has no turn of the model ({_shown(self.assistant)})")
        cut += len(self.assistant)
        prompt, reply = text[:cut], text[cut:]
        if self.human.rstrip() in reply:
            raise ValueError(
                f"ends with a turn of the person; the last turn has to be the model's ({_shown(self.assistant)})"
            )
        return prompt, self.response(reply)

    def prompt(self, text: str) -> str:
        """The text of a prompt as the model sees it, from a bare question or from the beginning of a dialogue.

        A text that starts with "Human:", or has "\\n\\nHuman:" or "\\n\\nAssistant:" in it, is a dialogue already: its
        leading blank line and its final "\\n\\nAssistant:" are put right (added when they are missing, no trailing
        space), the rest stays. Any other text becomes the one turn of a person.

        Raises:
            ValueError: the text is empty, or its last turn is a reply of the model with text in it, so that it is no
            prompt.
        """
        if not text.strip():
            raise ValueError("is empty")
        text = unix_lines(text)
        human, assistant = self.human.rstrip(), self.assistant
        if not (text.lstrip().startswith(human.strip()) or human in text or assistant in text):
            return self.format([text])
        text = self._with_opening(text).rstrip()
        head, cue, rest = text.rpartition(assistant.strip())
        if cue and not rest and (assistant[0] != "\n" or head[-1:] in ("", "\n")):
            text = head.rstrip()
        elif text.rfind(assistant) > text.rfind(human):
            raise ValueError(
                f"ends inside a reply of the model; a prompt ends with the person's turn, or with {_shown(assistant)}"
            )
        return text + assistant

    def response(self, text: str) -> str:
        """The text of a reply: exactly `response_prefix` before it, no white space after it; "" if there is nothing in
        it."""
        text = unix_lines(text).strip()
        return self.response_prefix + text if text else ""

    def encode_prompts(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts in the template's form, as the model reads them; none for an empty text."""
        if self.marks is None:
            return tokenizer.encode_batch(prompts)
        marks = self.marks.spelled(tokenizer)
        return tokenizer.encode_marked([marks.prompt(self.turns(prompt)) if prompt else "" for prompt in prompts])

    def encode_responses(self, tokenizer: Tokenizer, responses: Sequence[str]) -> list[list[int]]:
        """Ids of responses in the template's form, as they stand behind a prompt, each with its EOS."""
        if self.marks is None:
            return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(responses)]
        marks = self.marks.spelled(tokenizer)
        # Read behind the end of a prompt, or a tokenizer that puts a space before texts would put one here.
        before = marks.user[1] + marks.assistant
        texts = [response.removeprefix(self.response_prefix).join(marks.reply) for response in responses]
        start, *rows = tokenizer.encode_marked([before, *(before + text for text in texts)])
        grown = [i for i, row in enumerate(rows) if row[: len(start)] != start]  # a token over the seam
        rows = [row[len(start) :] for row in rows]
        for i, row in zip(grown, tokenizer.encode_marked([marks.end + texts[i] for i in grown]), strict=True):
            rows[i] = row[1:]
        return rows

    def cue_length(self, tokenizer: Tokenizer) -> int:
        """Tokens of the end of every prompt, the cue to answer."""
        if self.marks is None:
            return len(tokenizer.encode(self.assistant))
        marks = self.marks.spelled(tokenizer)
        return len(tokenizer.encode_marked([marks.assistant or marks.user[1]])[0])

    def decode_prompt(self, tokenizer: Tokenizer, ids: Iterable[int]) -> str:
        """The text of a prompt from its ids, also of one that has lost its beginning."""
        if self.marks is None:
            return tokenizer.decode(ids)
        marks = self.marks.spelled(tokenizer)
        turns = marks.turns(tokenizer.decode_marked(ids))
        ends = turns[-1:] == [("assistant", "")]
        return self.prompt_of_turns(turns[:-1] if ends else turns) if turns else ""

    def opening(self, prompt: str) -> str:
        """The person's first turn, with single spaces for all white space: what two prompts from one conversation have
        in common, however their lines are broken and whether or not a greeting stands before it."""
        human = self.human.rstrip()
        start = max(0, prompt.find(human))
        cut = prompt.find(self.assistant, start)
        turn = prompt[start:] if cut < 0 else prompt[start:cut]
        return self.human + " ".join(turn.removeprefix(human).split())

    @property
    def note(self) -> str:
        """A line on what a chat model reads; "" where it is the text."""
        marks = self.marks
        return marks and f"template {marks.name}: turns between {', '.join(marks.tokens)}; EOS is {marks.end}" or ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint's JSON; a template without marks has none there, as before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "marks" or value is not None}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a key is missing, unknown, or not what it should be.
        """
        names = {field.name for field in fields(cls)} - {"marks"}
        if not isinstance(data, dict):
            raise ValueError(f"a prompt template has the strings {sorted(names)}, found {data!r}")
        strings = {name: value for name, value in data.items() if name != "marks"}
        if set(strings) != names or not all(isinstance(value, str) for value in strings.values()):
            raise ValueError(f"a prompt template has the strings {sorted(names)}, found {sorted(data)}")
        return cls(**strings, marks=Marks.from_dict(data["marks"]) if "marks" in data else None)

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Self:
        """The template that the description of a model names, HH-RLHF's where it names none; ValueError as above."""
        return cls.from_dict(description["template"]) if "template" in description else cls()

    def _with_opening(self, text: str) -> str:
        """The text; if its first turn is a person's or the model's, with the blank line before it."""
        bare = text.lstrip()
        for opening in (self.human.rstrip(), self.assistant):
            if bare.startswith(opening.strip()):
                return opening[: len(opening) - len(opening.lstrip())] + bare
        return text


def _shown(text: str) -> str:
    """A piece of text on one line, its line breaks visible."""
    return '"' + text.replace("\n", "\\n") + '"'
