"""Products with a last layer of many thousand outputs, by oneDNN where torch has it.

torch.mm is MKL's. On AMD's CPUs it took 1.2 to 1.3 times as long for these shapes (128 cells, 223 units, 1,024 of 50,000
outputs at a time, one thread of an EPYC of 2022: 40, 48 and 41 ms for output, weight gradient and input gradient of all
outputs, oneDNN 35, 38 and 34), and its last bits depend on the number of threads more often.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The operator that torch.compile emits for a Linear; there is no other name for it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def times_transposed(x: Tensor, w: Tensor) -> Tensor:
    """X w^T of float32 matrices on a CPU; not differentiable."""
    if _ONEDNN is None or x.numel() == 0 or w.numel() == 0:
        return torch.mm(x, w.T)
    return _ONEDNN(x, w, None, "none", [], "")
