"""Write the offline demo's data: `python src/utils/demo/make.py` regenerates assets/demo, byte for byte.

What the files hold and how they are split is told in assets/demo/README.md; the world they are drawn from is in
`utils.demo.world`, the reward behind the preference labels in `utils.demo.gold`.
"""

import gzip
import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    importlib.import_module("config")  # before any package: it tells of those that are missing

import tyro
from tqdm import tqdm

from utils.demo.gold import HIGHEST, gold_reward
from utils.demo.train_bpe import DEMO_FOLDER, corpus_texts, train_bpe
from utils.demo.world import (
    SPLITS,
    best_possible_accuracy,
    sample_pair_rows,
    sample_prompts,
    sample_sft_rows,
    sample_text_rows,
)
from utils.tokenizers.bpe import write_ranks

SEED = 0
TEST_SEED = 20261127
"""Of the test files alone: nothing about the world or the recipe was chosen by looking at them."""
SIZES = {
    "text": 6000,
    "prompts-train": 3000,
    "prompts-validation": 400,
    "prompts-test": 800,
    "sft-train": 12000,
    "sft-validation": 500,
    "pairs-train": 32000,
    "pairs-validation": 2000,
    "pairs-test": 2000,
}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as gzipped JSON lines whose bytes depend on the rows alone (no time stamp, no file name inside)."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8"))


def make_demo(out: Path, sizes: Mapping[str, int] = SIZES, seed: int = SEED, test_seed: int = TEST_SEED) -> None:
    """Write every file of the demo into `out` and print what each holds.

    Args:
        out: Folder to write, made if missing; files of the same names are replaced.
        sizes: Rows per file, keys as in `SIZES`.
        seed: Seed of every generator but those of the test files; the texts are a pure function of it and the sizes.
        test_seed: Seed of the test files.
    """
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(sizes) + 1, desc="demo data", unit=" files")

    def write(name: str, rows: Iterable[Mapping[str, object]]) -> None:
        write_rows(out / f"{name}.jsonl.gz", rows)
        bar.update()

    write("text", sample_text_rows(seed, sizes["text"]))
    for split in SPLITS:
        own = test_seed if split == "test" else seed
        # In training each stage has a pool of prompts of its own; held-out prompts serve all stages.
        pools = {stage: stage if split == "train" else split for stage in ("sft", "pairs", "ppo")}
        prompts = {pool: sample_prompts(own, pool, sizes[f"prompts-{split}"]) for pool in set(pools.values())}
        write(f"prompts-{split}", ({"prompt": p.text} for p in prompts[pools["ppo"]]))
        if f"sft-{split}" in sizes:
            rows = sample_sft_rows(own, split, prompts[pools["sft"]], sizes[f"sft-{split}"])
            write(f"sft-{split}", rows)
            golds = gold_reward([r["prompt"] for r in rows], [r["response"] for r in rows])
            mean, best = sum(golds) / len(golds), golds.count(HIGHEST) / len(golds)
            bar.write(f"sft-{split}: {len(rows)} demonstrations, gold {mean:.3f}, {best:.1%} at the best")
        pairs = sample_pair_rows(own, split, prompts[pools["pairs"]], sizes[f"pairs-{split}"])
        write(f"pairs-{split}", pairs)
        bar.write(f"pairs-{split}: {len(pairs)} pairs, best possible accuracy {best_possible_accuracy(pairs):.4f}")
    ranks, _ = train_bpe(corpus_texts(out))
    write_ranks(out / "bpe.tiktoken", ranks)
    bar.update()
    bar.close()
    total = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(ranks)} BPE ranks, {total / 1e6:.2f} MB in all")


def main(out: Path = DEMO_FOLDER) -> None:
    """Write the offline demo's data: a closed world of facts in the form of HH-RLHF, with a programmatic gold reward.

    Args:
        out: Folder to write.
    """
    make_demo(out)


if __name__ == "__main__":
    tyro.cli(main)
