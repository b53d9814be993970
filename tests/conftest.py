"""What all tests share: settings, tiny models with weights that hide nothing, and the folder of real data."""

import os

# Before torch and transformers are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; torch looks at its first product

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from every_family import TINY  # noqa: E402
from torch import nn  # noqa: E402

from config.model_configs import CONFIGS  # noqa: E402
from models import families  # noqa: E402
from models.weights.checkpoint import save_model  # noqa: E402
from utils.template import PromptTemplate  # noqa: E402
from utils.tokenizer import get_tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps device and precision in class attributes: what one test chose must not reach the next."""
    yield
    state = sys.modules.get("accelerate.state")  # importing it takes seconds
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder TEST_DATA_DIR, with GPT-2's vocabulary and real dialogues; skips where it is not set."""
    folder = os.environ.get("TEST_DATA_DIR")
    if not folder:
        pytest.skip("TEST_DATA_DIR is not set: it has GPT-2's vocabulary and real dialogues")
    return Path(folder)


@torch.no_grad()
def randomise(module: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """Random numbers in every parameter, biases, LayerNorms and both halves of the adapters included.

    At a model's initialisation all biases are 0, all norms the identity and the outputs nearly uniform: most mistakes
    would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if name.endswith((*(f"ln_{which}.weight" for which in "12f"), "norm.weight")):
            parameter.add_(1.0)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What makes models runs once for each of a module's FAMILIES; see `every_family`."""
    chosen = any(mark.args[0] == "family" for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and hasattr(metafunc.module, "FAMILIES") and not chosen:
        metafunc.parametrize("family", metafunc.module.FAMILIES, indirect=True, scope="session")


@pytest.fixture(scope="session")
def family(request) -> str:
    """Which family `make_model` makes models of: GPT-2 in modules that name no FAMILIES."""
    return getattr(request, "param", "gpt2")


@pytest.fixture(scope="session")
def make_model(family) -> Callable[..., nn.Module]:
    """`make_model("critic", seed=1, n_layer=3, ...)`: a tiny model in eval mode with random weights everywhere.

    Of `family`, by its role in `models.families.FAMILIES`; a class means itself.
    """

    def make(role: str | type[nn.Module] = "lm", seed: int = 0, std: float = 0.3, **options) -> nn.Module:
        cls = families.FAMILIES[family][role] if isinstance(role, str) else role
        config = CONFIGS[cls.family](**{**TINY[cls.family], **options})
        return randomise(cls(config), seed, std).eval()

    return make


@pytest.fixture(scope="session")
def padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`padded(rows, extra=7, side="left", pad_id=50)`: ids [B, L] and att [B, L], `extra` columns wider than needed."""

    def pad(rows: list, extra: int = 0, side: str = "right", pad_id: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row) for row in rows) + extra
        ids = torch.full((len(rows), width), pad_id)
        att = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[b, place] = torch.as_tensor(row)
            att[b, place] = True
        return ids, att

    return pad


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., list[torch.Tensor]]:
    """`random_rows([3, 5], vocab_size=50, seed=0)`: one 1-D tensor of ids per length."""

    def rows(lengths: list[int], vocab_size: int = 50, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]

    return rows


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory, family) -> Path:
    """A folder of runs sft_vanilla_t, sft_t, rm_t and ppo_t (temperature 0.9, 6 tokens, trained with rm_t).

    Tiny random models with the demo's tokenizer: enough to find, load, sample and score. Do not write there.
    """
    root, time = tmp_path_factory.mktemp("runs"), "20260101000000"
    sizes = dict(n_layer=1, block_size=96, vocab_size=1024, init_std=0.3)
    config = CONFIGS[family](**TINY[family] | sizes)
    roles = {"sft_vanilla_t": "lm", "sft_t": "lm", "rm_t": "reward", "ppo_t": "lm", "ppo_t/critic": "critic"}
    for seed, (name, role) in enumerate(roles.items()):
        stem, _, inner = name.partition("/")
        torch.manual_seed(seed)
        folder = root / f"{stem}_{time}" / "final"
        description = {"template": PromptTemplate().to_dict(), "stage": stem.split("_")[0], "step": 3}
        save_model(families.new_model(config, role), folder / inner, description)
        get_tokenizer("demo").save(folder)
    settings = {"temperature": 0.9, "response_length": 6}
    record = {"stage": "ppo", "config": settings, "rm": str(root / f"rm_t_{time}" / "final")}
    (root / f"ppo_t_{time}" / "hyperparams.json").write_text(json.dumps(record))
    return root
