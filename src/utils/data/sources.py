"""The datasets by name: where their rows come from and which split a row belongs to.

    name          class                   source                                    stages
    hh            AnthropicHHRLHFDataset  hub Anthropic/hh-rlhf                     sft (the chosen dialogue), rm, ppo
    rm-static     DahoasRMStaticDataset   hub Dahoas/rm-static                      sft (its `response`), rm, ppo
    sft-static    DahoasSFTStaticDataset  hub Dahoas/sft-static                     sft, ppo
    prompts-only  PromptsOnlyDataset      the prompts of rm-static                  ppo
    hh-sft        HHSFTDataset            made by utils/prepare_sft_dataset.py      sft, ppo
    demo          DemoDataset             assets/demo                               sft, rm, ppo, text
    demo-text     DemoTextDataset         assets/demo/text.jsonl.gz                 text (also under the name sft)
    hub:NAME      NamedHubDataset         any other dataset OWNER/NAME of the hub   what its rows allow
    PATH          JSONLDataset            a file of any kind of data/files.py       what its rows allow (data/rows.py)

Splits. The demo ships its own. Everything else is divided by a hash of the conversation (utils/data/splits.py): a
local file into train, validation and test; hh and rm-static, which have a test split, share the hub's test split
between validation and test, half each, and lose from their training split the rows whose conversation is in it. The
training prompts are divided once more between the reward model and PPO.

A dataset named with hub: has its training split divided as a local file is.

Malformed rows of a file stop with file and line, unless `skip_bad_rows`; those of a hub dataset, which the user cannot
mend, are always passed over. Either way the `DatasetReport` counts them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from config.user_error import UserError
from utils.data.files import file_kind, is_data_file, read_rows
from utils.data.rows import FORMS, STAGES, BadRow, Row, is_plain_text, parse_row
from utils.data.splits import SplitOptions
from utils.data.token_table import Counts
from utils.runs.folder import REPO, typed_path
from utils.template import PromptTemplate
from utils.tokenizer import DEMO_FOLDER

HH_SFT_FILE = REPO / "runs" / "data" / "hh-sft.jsonl"

_FEW_OPENINGS = 10


class RowSource(ABC):
    """Raw rows of one dataset for one stage.

    `counts` tells how many rows were read so far, and passed over as bad, empty or elsewhere: of the whole data, since
    a row that cannot be read belongs to no split.
    """

    name: str
    stages: tuple[str, ...] = STAGES
    flag = "--dataset"
    """What the user set to get here, for messages."""

    def __init__(
        self,
        stage: str,
        *,
        template: PromptTemplate | None = None,
        options: SplitOptions | None = None,
        skip_bad_rows: bool = False,
    ):
        """Args: `stage` decides what is read of a row; see `load_dataset` for the rest.

        Raises:
            UserError: this dataset has nothing for the stage.
        """
        if stage not in self.stages:
            raise UserError(f"--dataset {self.name}: has nothing for stage {stage}, only for {', '.join(self.stages)}")
        self.stage = stage
        self.template = template or PromptTemplate()
        self.options = options or SplitOptions()
        self.skip_bad_rows = skip_bad_rows
        self.counts = Counts()

    @abstractmethod
    def rows(self, split: str) -> Iterator[Row]:
        """The rows of "train", "validation" or "test", in the order of the data.

        Raises:
            UserError: the data cannot be read, or a row is malformed.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes when the content of the data changes."""

    def file_rows(self, path: Path) -> Iterator[Row]:
        """Every row of a file; `counts` goes on counting."""
        return self._rows_of((f"{path}:{number}", data) for number, data in read_rows(path))

    def _rows_of(self, values: Iterable[tuple[str, Any]]) -> Iterator[Row]:
        """The rows of (where, decoded value)."""
        rows = (self._parse(where, data, self.counts) for where, data in values)
        return (row for row in rows if row is not None)

    def _parse(self, where: str, data: Any, counts: Counts) -> Row | None:
        """One row, or None (counted) for one that is malformed and skipped, or says nothing."""
        counts.read += 1
        is_new = _holds_cr(data)
        try:
            if isinstance(data, BadRow):
                raise data
            row = parse_row(data, self.stage, where, self.template)
        except BadRow as error:
            if not self.skip_bad_rows:
                raise UserError(f"{error} (--skip-bad-rows passes over such rows)") from None
            counts.bad += 1
            counts.renewed += is_new
            counts.first_bad = counts.first_bad or str(error)
            return None
        counts.empty += row is None
        counts.renewed += is_new or (row is not None and row.is_new)
        return row

    def _any_stage(self, data: Any) -> Row | None:
        """What decides a row's split, read alike in all stages: also rows that are of no use to this one count."""
        if not isinstance(data, dict):
            return None
        is_text = self.stage == "text" or is_plain_text(data, "sft")
        try:
            return parse_row(data, "text" if is_text else "ppo", "", self.template)
        except BadRow:
            return None

    def _key(self, row: Row) -> str:
        """What decides a row's split: the opening of its conversation, or the text itself."""
        return self.template.opening(row.prompts[0]) if row.prompts[0] else row.completions[0]


class JSONLDataset(RowSource):
    """A local file, divided into splits by a hash of each conversation's opening.

    The class's name is part of the fingerprints of runs, so it stays what it was when JSON Lines were all that is read.
    """

    def __init__(self, stage: str, path: str | Path, **options: Any):
        """Args: `path` of a file, against the working directory; the rest as for `RowSource`."""
        self.path = typed_path(path)
        self.name = getattr(type(self), "name", str(path))
        super().__init__(stage, **options)

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes, behind what kind they are read as."""
        kind = file_kind(self.path)
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        return digest if kind == "jsonl" else f"{kind} {digest}"

    def rows(self, split: str) -> Iterator[Row]:
        """See `RowSource.rows`. Reads the file twice: what is held out of a small file depends on all its prompts."""
        points, is_ranked, by_opening = self._survey()
        parts = self.options.parts(points)
        wanted = self.options.wanted(self.stage, split, is_ranked)
        if not any(part in wanted for part in parts.values()):
            raise UserError(
                f"{self.path}: has {len(parts)} different prompt{'s' * (len(parts) != 1)}, too few to keep any for "
                f"stage {self.stage}, split {split}; four are enough for every split"
            )
        for row in self.file_rows(self.path):
            if parts[self.options.point(self._key(row) if by_opening else _whole_key(row))] in wanted:
                yield row
            else:
                self.counts.elsewhere += 1

    def _survey(self) -> tuple[set[float], bool, bool]:
        """Hash points of all keys, whether any row is ranked, and whether openings (or whole prompts) are the keys."""
        if self.stage != "ppo" and file_kind(self.path) == "txt":
            raise UserError(
                f"{self.path}: a .txt file has one prompt a line, for PPO and evaluations; write plain text for SFT as "
                'rows {"text": ...} of a .jsonl file'
            )
        counts = Counts()
        openings, prompts = set(), set()
        is_ranked = False
        usable = 0
        for number, data in read_rows(self.path):
            row = self._parse(f"{self.path}:{number}", data, counts)
            usable += row is not None
            row = row or self._any_stage(data)
            if row is not None:
                openings.add(self.options.point(self._key(row)))
                prompts.add(self.options.point(_whole_key(row)))
                is_ranked = is_ranked or "rejected" in data or "completions" in data
        if not usable:
            bad = f"{counts.bad} bad, the first: {counts.first_bad}"
            empty = f"{counts.empty} say nothing" if counts.empty else "there is no row in it"
            told = bad if counts.bad else f"{empty}; {FORMS[self.stage]}"
            raise UserError(f"{self.path}: has no rows for stage {self.stage}; {told}")
        # A few openings over many prompts are a fixed preamble, not conversations that belong together.
        by_opening = len(openings) >= _FEW_OPENINGS or len(openings) == len(prompts)
        return (openings if by_opening else prompts), is_ranked, by_opening


class HHSFTDataset(JSONLDataset):
    """Demonstrations of HH-RLHF that rm-static does not have, as utils/prepare_sft_dataset.py wrote them."""

    name = "hh-sft"
    stages = ("sft", "ppo")

    def __init__(self, stage: str, **options: Any):
        """Raises UserError if the file has not been made yet; arguments as for `RowSource`."""
        super().__init__(stage, HH_SFT_FILE, **options)
        if not self.path.exists():
            raise UserError(
                f"--dataset hh-sft: {self.path} is missing; make it with `python src/utils/prepare_sft_dataset.py`"
            )


class DemoTextDataset(JSONLDataset):
    """Plain text of the demo's world, for pre-training: the whole text is the response to an empty prompt."""

    name = "demo-text"
    stages = ("text", "sft")

    def __init__(self, stage: str, **options: Any):
        """Arguments as for `RowSource`."""
        super().__init__(stage, _demo_file("text.jsonl.gz"), **options)


class DemoDataset(RowSource):
    """The offline demo: files per stage and split with disjoint prompts, so that nothing has to be held out."""

    name = "demo"
    _files = {"sft": "sft", "rm": "pairs", "ppo": "prompts"}

    def rows(self, split: str) -> Iterator[Row]:
        """See `RowSource.rows`."""
        if self.stage != "text":
            return self.file_rows(_demo_file(f"{self._files[self.stage]}-{split}.jsonl.gz"))
        text = DemoTextDataset("text", template=self.template, options=self.options)
        text.counts = self.counts
        return text.rows(split)

    def fingerprint(self) -> str:
        """SHA-256 over all files of the demo."""
        digest = hashlib.sha256()
        for path in sorted(DEMO_FOLDER.glob("*.jsonl.gz")):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def load_from_hub(repository: str, split: str, told: str, instead: str) -> Any:
    """A split of a dataset as a `datasets.Dataset`, from the local cache or downloaded; UserError where neither works.

    Args:
        told, instead: begin and end of the error: what was asked for, and what else the user may do.
    """
    import datasets  # takes a second, and most commands do without
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # its retries would print a line each; the failure is told once, below
    try:
        return datasets.load_dataset(repository, split=split)
    except Exception as error:  # hub, network, file and value errors alike
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{told} could not be loaded ({reason}); go online, set HF_HOME to a cache that has it, or {instead}"
        ) from None


class HubDataset(RowSource):
    """A dataset of the Hugging Face hub, memory-mapped by `datasets`, so that rows stream from disk."""

    repository: str
    stages = ("sft", "rm", "ppo")
    has_test_split = True
    is_ranked = True
    """Whether a reward model can train on it, so that PPO has prompts to avoid."""

    def __init__(self, stage: str, **options: Any):
        """Arguments as for `RowSource`; bad rows are always passed over and counted."""
        super().__init__(stage, **options | {"skip_bad_rows": True})

    def rows(self, split: str) -> Iterator[Row]:
        """See `RowSource.rows`."""
        held_out = split != "train" and self.has_test_split
        tested = self._tested() if split == "train" and self.has_test_split else set()
        wanted = self.options.wanted(self.stage, split, self.is_ranked)
        for row in self.hub_rows("test" if held_out else "train"):
            point = self.options.point(self._key(row))
            if held_out:
                part = "validation" if point < 0.5 else "test"
            else:
                part = self.options.part(point, self.has_test_split)
            if part in wanted and point not in tested:
                yield row
            else:
                self.counts.elsewhere += 1
                self.counts.of_test += point in tested

    def _tested(self) -> set[float]:
        """Hash points of the conversations in the hub's test split, whatever the stage can use of their rows."""
        rows = map(self._any_stage, self.load("test"))
        return {self.options.point(self._key(row)) for row in rows if row is not None}

    def hub_rows(self, split: str) -> Iterator[Row]:
        """Every row of the hub's own split "train" or "test"; `counts` goes on counting."""
        return self._rows_of((f"{self.repository} {split}, row {i}", data) for i, data in enumerate(self.load(split)))

    def load(self, split: str) -> Any:
        """The hub's own split "train" or "test", as a `datasets.Dataset`.

        Raises:
            UserError: it is neither in the local cache nor can it be downloaded.
        """
        told = f"{self.flag} {self.name}: {self.repository}"
        return load_from_hub(self.repository, split, told, "give the path of a local .jsonl or .parquet file")

    def fingerprint(self) -> str:
        """The revision that `datasets` has on disk."""
        splits = ("train", "test") if self.has_test_split else ("train",)
        return " ".join(self.load(split)._fingerprint for split in splits)


class AnthropicHHRLHFDataset(HubDataset):
    """HH-RLHF (Bai et al. 2022): pairs of whole dialogues, chosen and rejected."""

    name = "hh"
    repository = "Anthropic/hh-rlhf"


class DahoasRMStaticDataset(HubDataset):
    """The part of HH-RLHF set aside for reward models, as prompt, response (the chosen one), chosen, rejected."""

    name = "rm-static"
    repository = "Dahoas/rm-static"


class DahoasSFTStaticDataset(HubDataset):
    """The part of HH-RLHF set aside for fine-tuning, as prompt and response."""

    name = "sft-static"
    repository = "Dahoas/sft-static"
    stages = ("sft", "ppo")
    has_test_split = False
    is_ranked = False


class PromptsOnlyDataset(HubDataset):
    """The prompts of rm-static alone; by default those that the reward model does not train on."""

    name = "prompts-only"
    repository = "Dahoas/rm-static"
    stages = ("ppo",)


class NamedHubDataset(HubDataset):
    """Any other dataset of the hub, by its name: its training split, divided as a local file is."""

    stages = STAGES
    has_test_split = False

    def __init__(self, stage: str, repository: str, **options: Any):
        """Args: `repository` as OWNER/NAME; the rest as for `RowSource`."""
        self.repository, self.name = repository, f"hub:{repository}"
        super().__init__(stage, **options)

    @property
    def is_ranked(self) -> bool:
        """Whether its columns have rankings."""
        return not {"rejected", "completions"}.isdisjoint(self.load("train").column_names)


_HUB = (AnthropicHHRLHFDataset, DahoasRMStaticDataset, DahoasSFTStaticDataset, PromptsOnlyDataset)
_LOCAL = (HHSFTDataset, DemoDataset, DemoTextDataset)
DATASETS: dict[str, type[RowSource]] = {cls.name: cls for cls in (*_HUB, *_LOCAL)}


def open_source(name_or_path: str, stage: str, **options: Any) -> RowSource:
    """The raw rows of a dataset by name or path; `options` as for `RowSource`.

    Raises:
        UserError: no such name, and no such file.
    """
    name = str(name_or_path)
    if name in DATASETS:
        return DATASETS[name](stage, **options)
    if name.startswith("hub:"):
        return NamedHubDataset(stage, name.removeprefix("hub:"), **options)
    if is_data_file(name) or typed_path(name).exists():
        return JSONLDataset(stage, name, **options)
    raise UserError(f"--dataset {name}: not known; choose {', '.join(DATASETS)}, hub:OWNER/NAME, or the path of a file")


def _holds_cr(value: Any) -> bool:
    """Whether a text in a row has a carriage return, which code before version 3 (utils/dataset.py) kept."""
    if isinstance(value, str):
        return "\r" in value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_cr, parts))


def _whole_key(row: Row) -> str:
    return " ".join(row.prompts[0].split()) or row.completions[0]


def _demo_file(name: str) -> Path:
    path = DEMO_FOLDER / name
    if not path.is_file():
        shipped = ", ".join(sorted(file.name for file in DEMO_FOLDER.glob("*.jsonl.gz"))) or "nothing"
        raise UserError(
            f"--dataset demo: {path} is missing (there is {shipped}); restore it with `python src/utils/demo/make.py`"
        )
    return path
