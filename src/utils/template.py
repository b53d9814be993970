"""How a dialogue is written as text: the form of Anthropic's HH-RLHF.

    "\\n\\nHuman: first question\\n\\nAssistant: first reply\\n\\nHuman: second question\\n\\nAssistant: second reply"

A *prompt* is everything up to and including the last "\\n\\nAssistant:", a *response* is what follows and starts with
its own space, so that prompt and response can be tokenised apart and their ids joined. Training, generation and
evaluation all use these functions: a prompt that misses the leading blank line or carries a trailing space is another
prompt to the model.

They are also where line ends become the project's own (`unix_lines`): a text looks the same to the model whatever
system it was written on. Nothing else of it changes: a byte order mark inside a text, U+2028, composed and decomposed
letters are what somebody wrote.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields


def unix_lines(text: str) -> str:
    """The text with LF for every line end, CRLF and a CR alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class PromptTemplate:
    """The strings around the turns of a dialogue; saved with every checkpoint."""

    human: str = "\n\nHuman: "
    """Opens a turn of the person."""
    assistant: str = "\n\nAssistant:"
    """Opens a turn of the model, and ends every prompt."""
    response_prefix: str = " "
    """Stands between `assistant` and the text of a reply; it belongs to the reply's tokens."""

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
        openings = {"system": "", "user": self.human, "assistant": self.assistant + self.response_prefix}
        return unix_lines("".join(openings[role] + text.strip() for role, text in turns)) + self.assistant

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

    def opening(self, prompt: str) -> str:
        """The person's first turn, with single spaces for all white space: what two prompts from one conversation have
        in common, however their lines are broken and whether or not a greeting stands before it."""
        human = self.human.rstrip()
        start = max(0, prompt.find(human))
        cut = prompt.find(self.assistant, start)
        turn = prompt[start:] if cut < 0 else prompt[start:cut]
        return self.human + " ".join(turn.removeprefix(human).split())

    def to_dict(self) -> dict[str, str]:
        """Plain data for a checkpoint's JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, str]) -> "PromptTemplate":
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a key is missing, unknown, or not a string.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict):
            raise ValueError(f"a prompt template has the strings {sorted(names)}, found {data!r}")
        if set(data) != names or not all(isinstance(value, str) for value in data.values()):
            raise ValueError(f"a prompt template has the strings {sorted(names)}, found {sorted(data)}")
        return cls(**data)

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
