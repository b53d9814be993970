"""The flags of `utils/evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from config.command_line import WrongFlags, flags_of
from config.configs import flag_of
from config.user_error import UserError
from utils.judging.requests import DEFAULT_JUDGE_MODEL


@dataclass(frozen=True)
class EvaluateConfig:
    """Compares systems on the same prompts, pair by pair, with a judge that sees every pair in both orders."""

    sft: Annotated[str, arg(aliases=["-s"])] = ""
    """The SFT run or checkpoint: a system, the reference of every KL, and what --best-of samples from."""
    ppo: Annotated[str, arg(aliases=["-p"])] = ""
    """The PPO run or checkpoint."""
    vanilla: Annotated[str, arg(aliases=["-v"])] = ""
    """The pre-trained model: a run or checkpoint, or a Hugging Face name or folder (gpt2-medium)."""
    system: UseAppendAction[tuple[str, ...]] = ()
    """One more system, NAME=CHECKPOINT or NAME=FILE.jsonl (rows of "prompt" and "response"); may be repeated."""
    best_of: str = ""
    """Best-of-n of the SFT model by the reward model, for instance 4,16."""
    reward_model: Annotated[str, arg(aliases=["-c"])] = ""
    """The reward model of proxy scores and --best-of; default: the one that the PPO run was trained with."""
    prompts: str = ""
    """A file as for --dataset, hub:OWNER/NAME, or demo; default: assets/prompts.csv, for models of the demo its
    held-out prompts."""
    limit: int = 0
    """Ask the first so many prompts; 0: all."""
    judge: str = "openai"
    """openai, gold (the demo's reward), rm:CHECKPOINT, or FILE.py:FUNCTION with (prompts, answers) -> floats."""
    judge_model: str = DEFAULT_JUDGE_MODEL
    """The language model that judges."""
    base_url: str = ""
    """An OpenAI-compatible server to ask instead of OpenAI's, for instance http://localhost:8000/v1."""
    judge_price: str = ""
    """IN,OUT: US dollars per million tokens; default: those of assets/judge_prices.json, for OpenAI's own models."""
    yes: bool = False
    """Do not ask before the judge is paid."""
    max_cost: float = 0.0
    """Stop asking before this many US dollars are passed; 0: no limit."""
    concurrency: int = 8
    """Requests to the judge at a time."""
    max_wait: float = 3600.0
    """Longest pause in seconds that the judge's server may ask for; at a longer one the rest is not asked."""
    temperature: float = -1.0
    """Sampling temperature, 0 is greedy; default (-1): the PPO run's, or else that of the model's preset."""
    max_new_tokens: int = 0
    """Longest answer in tokens; default (0): the PPO run's, or else 64."""
    seed: int = 0
    """Seed of the answers."""
    name: Annotated[str, arg(aliases=["-n"])] = ""
    """Name of the evaluation; its folder is runs/eval_NAME_TIME. Default: the names of what is compared, for instance
    ppo_hh_vs_sft_hh."""
    batch_size: Annotated[int, arg(aliases=["-b"])] = 32
    """Rows that a model works on at once: the knob for memory. Answers do not depend on it, up to rounding."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA, then MPS, then the CPU."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Matrix precision; auto: bf16 where the GPU has it, fp16 on older ones, fp32 on the CPU."""
    runs_dir: str = "runs"
    """Where runs are looked for and the evaluation's folder is made."""

    def __post_init__(self) -> None:
        lowest = {
            "limit": 0,
            "concurrency": 1,
            "max_new_tokens": 0,
            "batch_size": 1,
            "seed": 0,
            "max_cost": 0,
            "max_wait": 0,
        }
        for field, low in lowest.items():
            if not getattr(self, field) >= low:
                raise UserError(f"{flag_of(field)} {getattr(self, field)}: must be at least {low}")
        if not (self.temperature == -1 or 0 <= self.temperature < float("inf")):
            raise UserError(f"--temperature {self.temperature}: 0 is greedy, -1 the PPO run's; otherwise above 0")
        if set(self.name) & set("/\\") or self.name.strip(". ") != self.name or not self.name.isprintable():
            raise UserError(f"-n {self.name!r}: a name of a folder is needed, without slashes")

    @property
    def best_of_sizes(self) -> tuple[int, ...]:
        """The numbers of --best-of."""
        words = self.best_of.replace(",", " ").split()
        if not all(word.isdecimal() and int(word) >= 2 for word in words) or len(set(words)) < len(words):
            raise UserError(f"--best-of {self.best_of}: give different numbers of at least 2, for instance 4,16")
        return tuple(map(int, words))

    @property
    def price(self) -> tuple[float, float] | None:
        """--judge-price as numbers."""
        if not self.judge_price:
            return None
        try:
            low, high = (float(word) for word in self.judge_price.split(","))
        except ValueError:
            raise UserError(f"--judge-price {self.judge_price}: give IN,OUT, for instance 0.15,0.60") from None
        return low, high


def parse_flags(argv: list[str] | None, description: str) -> EvaluateConfig:
    """The command line of evaluate.py; UserError for a flag or a value that is wrong, SystemExit(0) after --help."""
    try:
        return flags_of(EvaluateConfig, argv, description)
    except WrongFlags as error:
        raise UserError(str(error).split(" For full helptext")[0]) from None
