"""Adam (Kingma and Ba, ICLR 2015) and AdamW (Loshchilov and Hutter, ICLR 2019) by torch's fused kernels.

The numbers are those of torch.optim's classes with fused=True, bit for bit. Those spend 0.3 to 0.7 ms a step on their
lists, where a step of SCVI with 128 cells takes 5 to 7, and the first of them imports torch's compiler, for 0.9 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scviaduct.models.training import Optimizer

_BETA1, _BETA2 = 0.9, 0.999
_KERNELS = {"Adam": torch._fused_adam_, "AdamW": torch._fused_adamw_}


class Group:
    """Parameters with one learning rate, and what is remembered of each.

    `lr` may be changed between steps. Parameters without a gradient are left as they are, and their step is not counted.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.exp_avg = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.parameters]
        self._steps = torch.zeros(len(self.parameters), device=self.parameters[0].device if self.parameters else None)
        self.step = list(self._steps.unbind())  # one for each, but counted in one operation

    def move(self, kernel: Any, eps: float, weight_decay: float) -> None:
        """Move every parameter that has a gradient."""
        has = [k for k, p in enumerate(self.parameters) if p.grad is not None]
        if not has:
            return
        self._steps[has if len(has) < len(self.step) else slice(None)] += 1
        grads = [p.grad for p in self.parameters]
        lists = (self.parameters, grads, self.exp_avg, self.exp_avg_sq, self.step)
        moved, by, mean, square, step = ([values[k] for k in has] for values in lists)
        options = {"amsgrad": False, "maximize": False, "eps": eps, "weight_decay": weight_decay}
        kernel(moved, by, mean, square, [], step, lr=self.lr, beta1=_BETA1, beta2=_BETA2, **options)


class Adam:
    """One of `kind` over groups of parameters, which share all options but the learning rate."""

    def __init__(self, groups: list[Group], kind: Optimizer, *, eps: float, weight_decay: float) -> None:
        self.groups, self.eps, self.weight_decay = groups, eps, weight_decay
        self._kernel = _KERNELS[kind]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.groups:
            group.move(self._kernel, self.eps, self.weight_decay)

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, as "number of the parameter.name", the names being torch's."""
        return {f"{number}.{name}": tensor for number, name, tensor in self._remembered()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave of an optimizer of the same parameters.

        Raises:
            ValueError: it was one of other parameters.
        """
        mine = self.tensors()
        if strange := [name for name, t in tensors.items() if name not in mine or mine[name].shape != t.shape]:
            raise ValueError(f"the optimizer's {strange[0]} belongs to none of these {len(mine) // 3} parameters")
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)

    def _remembered(self) -> Iterator[tuple[int, str, Tensor]]:
        first = 0
        for group in self.groups:
            for name in ("exp_avg", "exp_avg_sq", "step"):
                yield from ((first + k, name, tensor) for k, tensor in enumerate(getattr(group, name)))
            first += len(group.parameters)
