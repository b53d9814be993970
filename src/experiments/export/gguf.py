"""The export as one file for llama.cpp, read back by transformers."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config.user_error import UserError
from experiments.export.contents import TEXTS, TOLERANCE, Export, must, read_model, reading_back
from models.weights.gguf import need_gguf, read_gguf
from models.weights.gguf_writer import write_gguf

# As far as logits may be off, in standard deviations, beside what the folder's own type makes of them.
_ALLOWED = {"f16": TOLERANCE["fp16"], "q8_0": 1.0}


@dataclass(frozen=True)
class GgufFile:
    """name: of the file. kind: how its matrices are written."""

    name: str
    kind: str

    @classmethod
    def wanted(cls, kind: str, folder_name: str, model: str, is_reward: bool) -> Self:
        """The file of --gguf; UserError where there can be none."""
        if is_reward:
            told = "holds a reward model, whose scores have no place in a GGUF file; leave --gguf out"
            raise UserError(f"{model}: {told}")
        need_gguf(f"--gguf {kind}")
        return cls(f"{folder_name}-{kind}.gguf", kind)

    def write(self, export: Export, folder: Path) -> str:
        """Write it beside the Hugging Face form in `folder`, and read it back; a line on what was found.

        Raises:
            UserError: the model or its tokenizer has no place in a GGUF file.
            RunStopped: it is not the model.
            OSError: it cannot be written.
        """
        file = folder / self.name
        try:
            write_gguf(folder, file, self.kind)
            with reading_back():
                return self._read_back(export, folder, file)
        except UserError as error:
            told = str(error).removeprefix(f"{folder}: ").removeprefix(f"{file}: ")
            raise UserError(f"--gguf {self.kind}: {told}; leave it out") from None

    def _read_back(self, export: Export, folder: Path, file: Path) -> str:
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # transformers takes the weights out of the file, but not all sizes: no rotations of long contexts, and not the
        # context of GPT-2, which can be had from config.json alone.
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        fields = GGUFReader(file).fields
        eos = fields["tokenizer.ggml.eos_token_id"].contents()
        must(eos == export.stop_ids[0], f"{self.name} ends texts with another id")
        written = fields["tokenizer.chat_template"].contents()
        must(written == tokenizer.chat_template, f"{self.name} has another chat template")
        if export.source.model.family == "llama":
            found = read_gguf(file)
            config, options = found.config, dict(add_special_tokens=False, split_special_tokens=True)
            reader = found.tokenizer()
            for text in TEXTS:
                same = reader(text, **options)["input_ids"] == export.source.tokenizer.encode(text)
                must(same, f"{text!r} gets other ids from {self.name}")
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting of transformers turns off
            model = read_model(AutoModelForCausalLM, folder, gguf_file=self.name, config=config)
        return export.answers(model, tokenizer, _ALLOWED[self.kind] + TOLERANCE[export.dtype])
