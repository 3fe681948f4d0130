"""A layer's values with the rows of its cells' categories added, where they are many numbers on a CPU.

torch gathers the rows, adds them, and on the way back sorts the codes and sums once for the bias and once for the table.
Here a row is added in place, and one pass sums for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scviaduct.models import row_kernels
from scviaduct.models.autograd import once_differentiable
from scviaduct.models.fused import Values
from scviaduct.models.layer_kernels import require_codes

LARGE = 1 << 17
"""Numbers from which on `added` is worth its Python."""


def added(values: Values) -> Tensor:
    """`values.dense()`, in the memory of values.h.

    Raises:
        IndexError: a code has no row.
    """
    require_codes(values.codes.numpy(), len(values.added), "categories")
    h: Tensor = _Added.apply(*values)
    return h


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        row_kernels.add(h.numpy(), table.numpy(), codes.numpy())
        ctx.mark_dirty(h)
        ctx.codes, ctx.shape = codes, table.shape
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        total = torch.zeros(ctx.shape)
        if ctx.needs_input_grad[1]:
            row_kernels.add_up(grad.contiguous().numpy(), ctx.codes.numpy(), total.numpy())
        return grad, total, None
