"""Write the offline demo's data: `python src/utils/make_demo.py` regenerates assets/demo, byte for byte.

What the files hold and how they are split is told in assets/demo/README.md; the world they are drawn from is in
`utils.demo_world`, the reward behind the preference labels in `utils.demo_gold`.
"""

import gzip
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from tqdm import tqdm

from utils.demo_gold import gold_reward
from utils.demo_world import (
    Prompt,
    best_possible_accuracy,
    sample_pair_rows,
    sample_prompts,
    sample_sft_rows,
    sample_text_rows,
)
from utils.tokenizer import write_ranks
from utils.train_bpe import DEMO_FOLDER, corpus_texts, train_bpe

SEED = 0
SIZES = {
    "text": 6000,
    "prompts-train": 6000,
    "prompts-validation": 400,
    "prompts-test": 800,
    "sft-train": 12000,
    "sft-validation": 500,
    "pairs-train": 40000,
    "pairs-validation": 1000,
    "pairs-test": 2000,
}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as gzipped JSON lines whose bytes depend on the rows alone (no time stamp, no file name inside)."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8"))


def make_demo(out: Path, sizes: Mapping[str, int] = SIZES, seed: int = SEED) -> None:
    """Write every file of the demo into `out` and print what each holds.

    Args:
        out: Folder to write, made if missing; files of the same names are replaced.
        sizes: Rows per file, keys as in `SIZES`.
        seed: Seed of every generator; the texts are a pure function of it and of the sizes.
    """
    out.mkdir(parents=True, exist_ok=True)
    splits = ("train", "validation", "test")
    bar = tqdm(total=len(sizes) + 1, desc="demo data", unit=" files")
    prompts: dict[str, list[Prompt]] = {}
    for split in splits:
        prompts[split] = sample_prompts(seed, split, sizes[f"prompts-{split}"])
        write_rows(out / f"prompts-{split}.jsonl.gz", ({"prompt": p.text} for p in prompts[split]))
        bar.update()
    write_rows(out / "text.jsonl.gz", sample_text_rows(seed, sizes["text"]))
    bar.update()
    for split in splits[:2]:
        rows = sample_sft_rows(seed, split, prompts[split], sizes[f"sft-{split}"])
        write_rows(out / f"sft-{split}.jsonl.gz", rows)
        bar.update()
        golds = gold_reward([r["prompt"] for r in rows], [r["response"] for r in rows])
        mean, best = sum(golds) / len(golds), sum(gold == max(golds) for gold in golds) / len(golds)
        bar.write(f"sft-{split}: {len(rows)} demonstrations, gold {mean:.3f}, {best:.1%} at the best")
    for split in splits:
        pairs = sample_pair_rows(seed, split, prompts[split], sizes[f"pairs-{split}"])
        write_rows(out / f"pairs-{split}.jsonl.gz", pairs)
        bar.update()
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
