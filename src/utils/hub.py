"""Names on the Hugging Face hub, the folder of what was or can be downloaded under one, and files that were not."""

import re
from pathlib import Path

from config.user_error import UserError

# Only what looks like this is asked for on the network: gpt2 and its sizes, or owner/name.
_NAME = re.compile(r"(distil)?gpt2(-medium|-large|-xl)?|(?!runs/|sft_|rm_|ppo_)[\w-][\w.-]*/[\w.-]+")
_GPT2 = re.compile(r"(openai-community/)?gpt2(-medium|-large|-xl)?|(distilbert/)?distilgpt2")
# A model's description and its tokenizer, not its weights; of an adapter all.
_FILES = ("config.json", "*token*", "vocab*", "merges.txt", "spiece.model", "adapter_config.json",
          "adapter_model.safetensors")  # fmt: skip


def is_hub_name(argument: str) -> bool:
    """Whether an argument looks like the name of a hub's model and there is no such file or folder."""
    return _NAME.fullmatch(argument) is not None and not Path(argument).exists()


def is_openai_gpt2(name: str) -> bool:
    """Whether a hub's name is that of one of OpenAI's GPT-2 models, or of the one distilled from them."""
    return _GPT2.fullmatch(name) is not None


LFS_POINTER = "is a pointer of Git LFS, not the file; fetch it with git lfs pull"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what `git clone` leaves in the place of a large one when Git LFS is not installed."""
    with file.open("rb") as opened:
        return opened.read(23) == b"version https://git-lfs"


def hub_folder(name: str, cached_only: bool = False) -> Path:
    """The local folder of a hub's model with its description and tokenizer, downloaded where it is not in the cache.

    Args:
        name: owner/name, or one of the few names without an owner.
        cached_only: without any network.

    Raises:
        UserError: it is not in the cache and cannot be downloaded.
    """
    # It takes a while to import, and most runs do without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES), local_files_only=cached_only))
    except (OSError, ValueError) as error:
        reason = "it is not in this machine's cache, and the hub cannot be asked"
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            reason = "there is no such folder, and the hub has no such model or gives it only to who is logged in"
        raise UserError(
            f"{name}: cannot be loaded from Hugging Face ({reason}); go online once, or give a folder"
        ) from None
