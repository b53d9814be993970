"""The one door to devices, precision, gradient scaling and process ranks: a thin layer over Hugging Face Accelerate.

Algorithm code asks a Runtime to place tensors, to run a backward pass and to take an optimizer step; it never names a
device or a rank.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from config.configs import RunConfig
from config.devices import TORCH_TYPE, choose_device, choose_dtype, describe_device, sum_in_full_precision
from config.user_error import UserError
from training.engine.compiling import compile_blocks
from training.engine.determinism import cost_of_determinism, set_deterministic
from training.engine.host_memory import HostMemory

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Overflow(FloatingPointError):
    """The gradients of a step overflowed under loss scaling; the step has not been taken, and a lower scale may do."""


class NonFiniteStep(FloatingPointError):
    """The loss or a gradient norm of an optimizer step is not finite; the step has not been taken.

    loss: whether it is the loss. groups: the names of the broken norms.
    """

    def __init__(self, loss: bool, groups: Sequence[str]) -> None:
        what = [*(["loss"] if loss else []), *(f"gradient of {name}" for name in groups)]
        super().__init__(f"the {' and the '.join(what)} is not finite; the weights are left as they were")
        self.loss = loss
        self.groups = groups


class Runtime:
    """Device, precision and ranks of one run."""

    def __init__(self, device: str = "auto", dtype: str = "auto", seed: int = 0, deterministic: bool = False) -> None:
        kind = choose_device(device)
        set_deterministic(deterministic)
        self.dtype = choose_dtype(dtype, kind)
        self.accelerator = Accelerator(mixed_precision=_PRECISION[self.dtype], cpu=kind == "cpu")
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        sum_in_full_precision()
        self._memory = HostMemory()
        # Each rank draws its own numbers (lm_human_preferences core.py `set_mpi_seed`).
        set_seed(seed + 100003 * self.rank)

    @classmethod
    def of(cls, config: RunConfig) -> Runtime:
        """The runtime that a run's flags ask for; UserError under a launcher, see `require_one_process`."""
        runtime = cls(config.device, config.dtype, config.seed, config.deterministic)
        require_one_process(runtime)
        if config.deterministic:
            print(f"deterministic: {cost_of_determinism(runtime.device)}")
        return runtime

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The type in which matrix products are taken; weights that train and the optimizer stay fp32."""
        return TORCH_TYPE[self.dtype]

    def describe(self) -> str:
        """One line for the start of a run."""
        return describe_device(self.device, self.dtype)

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap a module and its optimizer for this run's precision and ranks; `compiled`: see `engine.compiling`."""
        if self.device.type == "cpu":
            self._memory.keep_freed(module.parameters())
        module, optimizer = self.accelerator.prepare(module, optimizer)
        if compiled:
            compile_blocks(self.unwrap(module), self.autocast)
        return module, optimizer

    def wait(self) -> None:
        """Return once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module that does not train to the device."""
        return module.to(self.device)

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module inside a prepared one."""
        return self.accelerator.unwrap_model(module)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of forward passes outside a prepared module's own forward."""
        return self.accelerator.autocast()

    def accumulate(self, module: nn.Module, micro_batches: Sequence[Any]) -> Iterator[Any]:
        """The micro-batches of one step, whose gradients add up: ranks exchange them only at the last one."""
        for micro_batch in micro_batches[:-1]:
            with self.accelerator.no_sync(module):
                yield micro_batch
        yield from micro_batches[-1:]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a sum already divided by the whole step's count over all ranks."""
        # Data-parallel engines average over ranks; ours is a share of one sum.
        self.accelerator.backward(loss * self.world_size)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        groups: dict[str, list[nn.Parameter]],
        max_norm: float,
        loss: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Unscale, clip each group of parameters by its own norm, step, zero.

        Clipping has to stand between the last backward pass and the step, on unscaled gradients, or it does nothing.

        Args:
            optimizer, groups, max_norm: what steps, and how it is clipped.
            loss: [] the step's loss over all ranks, checked together with the norms.

        Returns:
            The groups' norms before clipping, 0-dim tensors.

        Raises: with weights, optimizer state and gradients as they were; the caller goes on with `discard` or not at
            all. Both are dealt with by `engine.nonfinite.Guard.step`.
            Overflow: the gradients overflowed under loss scaling; `discard` lowers the scale for the same batch again.
            NonFiniteStep: the loss is not finite, or a norm where no loss scaling would explain it.
        """
        self.accelerator.unscale_gradients(optimizer)
        gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in groups.items()}
        norms = {name: torch.nn.utils.get_total_norm(grads) for name, grads in gradients.items()}
        self._check_finite(norms, loss)
        for name, group in groups.items():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norms[name])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._memory.after_step()
        return norms

    def _check_finite(self, norms: dict[str, Tensor], loss: Tensor | None) -> None:
        """Raise what `step` says unless loss and norms are all finite."""
        checked = [*norms.values()] if loss is None else [*norms.values(), loss.detach()]
        finite = torch.stack([x.isfinite().to(self.device) for x in checked]).tolist()  # the step's one wait
        if all(finite):
            return
        # At a scale of 1 there is nothing left that halving could cure.
        scale = self.loss_scale
        curable = scale is not None and scale > 1
        broken = [] if curable else [name for name, ok in zip(norms, finite) if not ok]
        loss_is_broken = loss is not None and not finite[-1]
        if broken or loss_is_broken:
            raise NonFiniteStep(loss_is_broken, broken)
        raise Overflow("the gradients overflowed under loss scaling; the weights are left as they were")

    def discard(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients of a step that `step` did not take; if they overflowed, the loss scale is halved."""
        optimizer.zero_grad(set_to_none=True)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it has unscaled these gradients, and would refuse to unscale others

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by before a backward pass; None without loss scaling."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else None

    def scaler_state(self) -> dict[str, Any]:
        """State of the loss scaling; empty without it."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        """Put the loss scaling back to `scaler_state()`."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Elementwise sum of a tensor over all ranks."""
        return self.accelerator.reduce(value, reduction="sum")

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """Elementwise maximum of a tensor [n] over all ranks."""
        return self.accelerator.gather(value).view(self.world_size, -1).amax(0)


def require_one_process(runtime: Runtime) -> None:
    """Refuse a launcher (UserError): every process would train on the same rows and write the same run."""
    if runtime.world_size > 1:
        raise UserError("--strategy naive: runs on one device; start the script with python, without a launcher")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that train."""
    return [p for p in model.parameters() if p.requires_grad]


def set_lr(optimizer: torch.optim.Optimizer, scale: float, frozen: str | None = None) -> None:
    """Set each group's learning rate to `scale` times its peak (`peak_lr`, kept in the group); of `frozen` to 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["name"] == frozen else group["peak_lr"] * scale


def adamw(
    groups: Iterable[dict], betas: tuple[float, float], eps: float, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over named groups ({"name", "params", "lr"}); weight decay touches matrices only.

    torch's own default of weight decay is 0.01, so it is always passed.
    """
    split = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
        common = {"name": group["name"], "lr": group["lr"], "peak_lr": group["lr"]}
        for chosen, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if chosen:
                split.append(common | {"params": chosen, "weight_decay": decay})
    return torch.optim.AdamW(split, betas=betas, eps=eps, fused=device.type in ("cuda", "cpu"))


class Interrupt:
    """SIGINT and SIGTERM as a request to finish the step, save and exit; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[Interrupt]:
        """Handle the signals inside this context and put the old handlers back behind it."""
        old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _handle(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this step; again to stop at once", file=sys.stderr)

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells report it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.signal or 0)
