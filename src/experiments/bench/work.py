"""What the benchmark measures: one description per row of its table, understood by both sides.

The peers run in an environment of their own, without this project's requirements, so this file needs the standard
library alone.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS, TOKENS = "s/iteration", "tokens/s"
NOT_AN_ID = -1
"""As the end of text: no id that can be sampled ends a row, so that both sides sample the same number of tokens."""

PRODUCT = re.compile(r"(aten|mkldnn)::_?(addmm|mm|bmm|baddbmm|mv|addmv|linear_pointwise|scaled_dot_product\w*)_?")
"""torch's names of matrix products; a "_" at the end is the form that works in place."""


@dataclass(frozen=True)
class Work:
    """One row of the table.

    name: the row's key. kind: which function of ours.py and peers.py does it. peer: who else does it, ""
    for nobody. preset: model preset. batch: rows. prompt, new: tokens of a prompt and of a response. warmup, repeats:
    untimed and timed repetitions in each process. device: cpu or cuda. memory_gb: cap of the GPU's memory, 0 for none.
    aim: the ratio wanted to the tuned peer, 0 for none. tuned: whether the peer gets what ours has, or its defaults.
    profiled: whether one more repetition, untimed, tells how long the matrix products take. sizes: the model's sizes
    for the peer, filled in from the preset.
    """

    name: str
    kind: str
    title: str
    unit: str = TOKENS
    peer: str = ""
    preset: str = "gpt2"
    batch: int = 8
    prompt: int = 64
    new: int = 64
    epochs: int = 4
    warmup: int = 1
    repeats: int = 3
    device: str = "cpu"
    memory_gb: float = 0.0
    aim: float = 0.0
    tuned: bool = True
    profiled: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def faster_is_larger(self) -> bool:
        """Whether a larger figure is the better one."""
        return self.unit == TOKENS

    def to_json(self) -> str:
        """For a child process's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        """The work that a child process was given."""
        return cls(**json.loads(text))


_SFT_TITLE = "SFT step, batch 4 x 512 tokens, bf16 autocast, AdamW"
_PPO_TITLE = "PPO iteration, batch 8, 64 + 64 tokens, 4 epochs, bf16, "
_SFT = Work("sft", "sft", "", peer="transformers_compiled", batch=4, prompt=1, new=511, warmup=2, repeats=6)
_PPO = Work("ppo_lora", "ppo", "", SECONDS, "trl", "gpt2/lora", repeats=1)

_LLAMA = "SmolLM2 135M: "

WORKS = (
    Work("sampling_b8", "sampling", "sampling, batch 8, 64 + 64 tokens, bf16", peer="transformers", aim=2),
    Work("sampling_b32", "sampling", "sampling, batch 32, 64 + 64 tokens, bf16", peer="transformers", batch=32, aim=2),
    replace(_PPO, title=_PPO_TITLE + "LoRA r=8", aim=3),
    replace(_PPO, name="ppo_lora_critic", peer="trl_critic", title=_PPO_TITLE + "LoRA r=8 in both critics"),
    replace(_PPO, name="ppo_full", preset="gpt2", title=_PPO_TITLE + "all weights", aim=2),
    replace(_SFT, title=f"{_SFT_TITLE} (peer compiled)", aim=1.3),
    replace(_SFT, name="sft_eager", peer="transformers_eager", title=f"{_SFT_TITLE} (peer eager)"),
    replace(_SFT, name="sft_nanogpt", peer="nanogpt_compiled", title=f"{_SFT_TITLE} (nanoGPT, compiled)"),
    Work("llama_sampling_b8", "sampling", f"{_LLAMA}sampling, batch 8, 64 + 64 tokens, bf16", peer="transformers",
         preset="smollm2-135m", aim=1.8),
    Work("llama_sampling_b32", "sampling", f"{_LLAMA}sampling, batch 32, 64 + 64 tokens, bf16", peer="transformers",
         preset="smollm2-135m", batch=32, aim=1.8),
    replace(_PPO, name="llama_ppo_lora", preset="smollm2-135m/lora", title=f"{_LLAMA}{_PPO_TITLE}LoRA r=8", aim=2.7),
    replace(_SFT, name="llama_sft", preset="smollm2-135m", title=f"{_LLAMA}{_SFT_TITLE} (peer compiled)", aim=1.17),
    Work("demo_rollout", "rollout", "rollout of the offline demo, 128 prompts, fp32", preset="gpt2-nano", batch=128),
)  # fmt: skip


def scaling_works() -> list[Work]:
    """Sampling and PPO against batch, response length and model size, one thing changed at a time."""
    sampling, ppo = WORKS[0], replace(_PPO, repeats=1)
    works = [replace(sampling, name=f"sampling_batch_{b}", batch=b) for b in (1, 2, 4, 8, 16, 32, 64)]
    works += [replace(sampling, name=f"sampling_new_{n}", new=n) for n in (16, 64, 256, 512)]
    works += [replace(sampling, name=f"sampling_{p}", preset=p) for p in ("gpt2", "gpt2-medium", "gpt2-large")]
    works += [replace(ppo, name=f"ppo_lora_batch_{b}", batch=b) for b in (4, 8, 16)]
    works += [replace(ppo, name=f"ppo_lora_new_{n}", new=n) for n in (32, 64, 128)]
    works += [replace(ppo, name=f"ppo_lora_{p}", preset=f"{p}/lora") for p in ("gpt2", "gpt2-medium")]
    return [replace(w, title=w.name.replace("_", " "), peer="", repeats=1, aim=0) for w in works]


def gpu_works(memory_gb: float) -> list[Work]:
    """Every size and stage on a GPU whose memory is capped at `memory_gb`."""
    works = []
    for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        for preset in (size, f"{size}/lora"):
            same = {"preset": preset, "device": "cuda", "memory_gb": memory_gb}
            stem = preset.replace("/", "_")
            works += [
                Work(f"{stem}_sampling", "sampling", f"{preset}: sampling", batch=32, **same),
                Work(f"{stem}_sft", "sft", f"{preset}: SFT step", batch=32, prompt=1, new=511, warmup=2, **same),
                Work(f"{stem}_rm", "rm", f"{preset}: reward-model step", prompt=256, new=256, warmup=2, **same),
                Work(f"{stem}_ppo", "ppo", f"{preset}: PPO iteration", SECONDS, batch=32, prompt=256, new=64, **same),
            ]
    return works


def median_seconds(work: Work, once: Callable[[], Any]) -> float:
    """Median duration of `once` after the warm-up."""
    for _ in range(work.warmup):
        once()
    spent = []
    for _ in range(work.repeats):
        started = time.perf_counter()
        once()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def peak_gb() -> float:
    """Most memory this process has held, in GB (1e9 bytes); NaN where the system does not tell (Windows)."""
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def answer(result: dict[str, Any]) -> None:
    """What a child process found, as its last line of output."""
    print("\n" + json.dumps(result), flush=True)


def run_child(measure: Callable[[Work], dict[str, Any]]) -> None:
    """Body of a child process, `script.py WORK`: measure and answer."""
    result = measure(Work.from_json(sys.argv[1]))
    answer({"peak_gb": peak_gb()} | result)
