"""What the training stages share: countries in turn, the schedule, the average, the checkpoint."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]


def evenly(n_countries: int, rng: torch.Generator) -> Iterator[int]:
    """Countries for ever, each once before any comes again."""
    while True:
        yield from torch.randperm(n_countries, generator=rng).tolist()


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def decayed(module: nn.Module, lr: float, decay: float) -> list[Group]:
    """The module's parameters as AdamW's groups; vectors do not decay."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": decay, "peak": lr},
        {"params": vectors, "weight_decay": 0.0, "peak": lr},
    ]


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_average(module: nn.Module, average: dict[str, Tensor]) -> None:
    """Put the averaged parameters into the module."""
    module.load_state_dict(average, strict=False)


class Ema:
    """An exponential moving average of a module's trained parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.average = {name: p.detach().clone() for name, p in trained(module).items()}

    def update(self, module: nn.Module) -> None:
        """Follow the module; faster in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, p in trained(module).items():
                self.average[name].lerp_(p, 1 - decay)


class Run:
    """A module in training, which goes on from its checkpoint.

    Args:
        groups: AdamW's, each with its `peak` learning rate.
        steps: at which the learning rate is zero.
        follow: decay of the average.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[Group],
        file: Path,
        *,
        steps: int,
        follow: float,
        warmup: int = 100,
    ) -> None:
        self.module, self.file, self.steps, self.warmup = module, file, steps, warmup
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
        self.average = Ema(module, follow)
        self.step = 0
        self.begun = time.time()

    def resume(self, rng: torch.Generator) -> None:
        """Go on from the checkpoint, if there is one."""
        if not self.file.exists():
            return
        state: dict[str, Any] = torch.load(self.file)
        self.module.load_state_dict(state["trained"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.average, self.average.steps = state["average"], state["step"]
        self.step = state["step"]
        rng.set_state(state["rng"])

    def learn(self, loss: Tensor) -> None:
        """One step down the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(self.step, self.steps, self.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained(self.module).values()), 1.0)
        self.optimizer.step()
        self.average.update(self.module)
        self.step += 1

    def save(self, rng: torch.Generator, **settings: float) -> None:
        """Write the checkpoint, so that a crash leaves the old one whole."""
        scratch = self.file.with_suffix(".tmp")
        state = {
            "trained": {name: p.detach() for name, p in trained(self.module).items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.average,
            "step": self.step,
            "rng": rng.get_state(),
            **settings,
        }
        torch.save(state, scratch)
        scratch.replace(self.file)

    def report(self, **values: Tensor | float) -> None:
        """A line of progress."""
        numbers = {name: torch.as_tensor(value).item() for name, value in values.items()}
        shown = " ".join(f"{name} {number:.4f}" for name, number in numbers.items())
        print(f"{self.step} {time.time() - self.begun:.0f}s {shown}", flush=True)
