"""What backward passes written by hand owe to autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
"""Whether the running backward pass keeps its graph for another (retain_graph); torch has no public name for it."""


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to be differentiated twice.

    torch's decorator of this name leaves out, without a word, the second derivative of a node whose incoming gradient is
    a constant, which is that of every loss.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("A gradient written by hand has no second derivative; leave out create_graph=True")
        return backward(ctx, *gradients)

    return checked
