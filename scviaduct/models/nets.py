"""Networks conditioned on covariates: fully connected layers whose covariates are look-ups.

scvi-tools concatenates one-hot codes to a layer's input. `W x + b + sum_k C_k[code_k]` is the same function, costs the
same for 10 batches and for 10,000, and keeps a block of its own for each covariate, to which surgery can add rows.
Layer order and constants are scvi-tools': Linear, BatchNorm (momentum 0.01, eps 1e-3), LayerNorm without weights, ReLU,
dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from scviaduct.models import products, rows
from scviaduct.models.counts import Cells, Counts
from scviaduct.models.fused import Values, normalised_and_rectified
from scviaduct.models.noise import Noise
from scviaduct.models.statistics import normalised_over_processes, several_processes

_VAR_EPS = 1e-4
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Gaussian(NamedTuple):
    """A diagonal normal distribution per cell."""

    mean: Tensor
    """(cells, latent)."""
    std: Tensor
    """(cells, latent)."""

    def sample(self, noise: Noise) -> Tensor:
        """A reparameterised draw, (cells, latent)."""
        return torch.addcmul(self.mean, self.std, noise.normal(self.mean.shape[1]))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at z, summed over the latent dimensions, the last."""
        return -(0.5 * ((z - self.mean) / self.std) ** 2 + torch.log(self.std) + _HALF_LOG_2PI).sum(-1)

    def log_ratio(self, z: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
        """(cells,) log density of N(mean, std**2) at z, minus that of this: an estimate of minus `kl`."""
        ratio = 0.5 * (((z - self.mean) / self.std) ** 2 - ((z - mean) / std) ** 2)
        return (ratio + torch.log(self.std / std)).sum(-1)

    def kl(self, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
        """(cells,) KL divergence from this to N(mean, std**2), summed over the latent dimensions."""
        ratio = (self.std / std) ** 2
        distance = ((self.mean - mean) / std) ** 2
        return 0.5 * (ratio + distance - 1.0 - torch.log(ratio)).sum(1)


class Columns(nn.Module):
    """One row per category of a covariate (a row here is a column of scvi-tools' weight).

    As upstream, a covariate with one category has no row: there is nothing to tell apart. After surgery such a reference
    category is a row of zeros, which changes nothing, and the new categories have rows.

    Shapes: `weight` (categories, width), `new` (new categories, width) after surgery. Rows of `labels` never grow: a query
    has the reference's labels.
    """

    weight: Tensor | None
    new: nn.Parameter | None

    def __init__(
        self, covariate: int, n_categories: int, width: int, *, single: bool = False, labels: bool = False
    ) -> None:
        super().__init__()
        self.covariate = covariate
        self.labels = labels
        self.n_categories = n_categories
        self.width = width
        self.weight = nn.Parameter(torch.zeros(n_categories, width)) if n_categories > 1 or single else None
        self.register_parameter("new", None)

    def table(self) -> Tensor | None:
        """(categories, width), or None while there is nothing to tell apart."""
        if self.new is None or self.weight is None:
            return self.weight
        return torch.cat([self.weight, self.new])

    def add(self, h: Tensor, codes: Sequence[Tensor]) -> Tensor:
        """H plus the row of each cell's category."""
        table = self.table()
        return h if table is None else h + F.embedding(codes[self.covariate], table)

    def extend(self, n_new: int) -> None:
        """Freeze what is there as a buffer; the new rows, the only parameter, start at the mean of the others.

        The mean is the reference's idea of a batch without an effect of its own; a random row, upstream's choice, is an
        effect that no data support and that training must first unlearn.
        """
        known = self.table()
        known = torch.zeros(self.n_categories, self.width) if known is None else known.detach()
        if n_new == 0 and self.weight is None:
            return
        for name in ("weight", "new"):
            self.__delattr__(name)
        self.register_buffer("weight", known)
        self.n_categories += n_new
        start = known.mean(0, keepdim=True).expand(n_new, -1).clone()
        self.register_parameter("new", nn.Parameter(start) if n_new else None)


class Blocks(nn.ModuleList):
    """The `Columns` of each covariate that a layer sees."""

    def __init__(self, n_categories: Sequence[int], width: int, *, single: bool = False, labels: bool = False) -> None:
        super().__init__(Columns(k, n, width, single=single, labels=labels) for k, n in enumerate(n_categories))

    @property
    def tables(self) -> list[Tensor]:
        """The (categories, width) rows of each covariate that has any."""
        tables = [cast(Columns, block).table() for block in self]
        return [t for t in tables if t is not None]

    def forward(self, h: Tensor, codes: Sequence[Tensor]) -> Tensor:
        """H plus, for each covariate, the row of each cell's category."""
        for block in self:
            h = cast(Columns, block).add(h, codes)
        return h

    def values(self, h: Tensor, bias: Tensor | None, codes: Sequence[Tensor]) -> Values:
        """As `forward` with the bias, but the first covariate's rows are left to be added later."""
        first: tuple[Tensor, Tensor] | None = None
        for block in cast("list[Columns]", self):
            table = block.table()
            if table is None:
                continue
            if first is None:
                first = (table if bias is None else table + bias, codes[block.covariate])
            else:
                h = h + F.embedding(codes[block.covariate], table)
        if first is not None:
            return Values(h, *first)
        added = h.new_zeros(1, h.shape[1]) if bias is None else bias.unsqueeze(0)
        return Values(h, added, torch.zeros(len(codes[0] if codes else h), dtype=torch.long, device=h.device))


def reset(layer: nn.Module, n_in: int, columns: Blocks) -> None:
    """torch's initialisation of a Linear, in which the covariates' columns count as inputs."""
    bound = 1.0 / math.sqrt(n_in + sum(len(t) for t in columns.tables))
    for tensor in layer.parameters():
        nn.init.uniform_(tensor, -bound, bound)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias`, in the type of the weight.

    Under torch.autocast it is computed in bfloat16; what follows (norms, exponentials, likelihoods) is not.
    """
    if len(weight) >= products.WIDE and _float32_on_cpu(x, weight):
        return products.wide_linear(x, weight, bias)
    if products.is_large(x, weight) and _float32_on_cpu(x, weight):
        return products.large_linear(x, weight, bias)
    return F.linear(x, weight, bias).to(weight.dtype)


def _float32_on_cpu(*tensors: Tensor) -> bool:
    right = all(t.dim() == 2 and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return right and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """torch's Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, width)."""
        return linear(x, self.weight, self.bias)


class Affine(nn.Module):
    """A linear map of the input, a bias, and a row for each covariate's category."""

    bias: Tensor | None
    columns: Blocks

    def product(self, x: Any) -> Tensor:
        """The linear map alone, (cells, width)."""
        raise NotImplementedError

    def values(self, x: Any, codes: Sequence[Tensor]) -> Values:
        """What `forward` gives, before it is added up."""
        return self.columns.values(self.product(x), self.bias, codes)

    def forward(self, x: Any, codes: Sequence[Tensor]) -> Tensor:
        """The input of (cells) and a (cells,) code per covariate to (cells, width)."""
        return self.values(x, codes).dense()


class CategoricalLinear(Affine):
    """`W x + b + sum_k C_k[code_k]`; weight is (width, inputs)."""

    def __init__(
        self, n_in: int, width: int, n_categories: Sequence[int], *, labels: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, n_in))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.columns = Blocks(n_categories, width, labels=labels)
        reset(self, n_in, self.columns)

    def product(self, x: Tensor) -> Tensor:
        """(cells, inputs) to (cells, width)."""
        return linear(x, self.weight, None)

    def forward(self, x: Tensor, codes: Sequence[Tensor]) -> Tensor:
        """(cells, inputs) and a (cells,) code per covariate to (cells, width)."""
        if x.shape[0] * len(self.weight) >= rows.LARGE and _float32_on_cpu(x, self.weight):
            return rows.added(self.values(x, codes))
        return self.columns(linear(x, self.weight, self.bias), codes)


class CountsLinear(Affine):
    """The first layer of an encoder: `log1p(counts) W + continuous V + b + sum_k C_k[code_k]`.

    `weight` is (genes, width), as the sparse product wants it; `continuous` (continuous covariates, width) exists
    only where there are any. `transform` names what the encoder sees of the counts (`counts.TRANSFORMS`).
    """

    def __init__(
        self, n_genes: int, width: int, n_continuous: int, n_categories: Sequence[int], transform: str = "log1p"
    ) -> None:
        super().__init__()
        self.transform = transform
        self.weight = nn.Parameter(torch.empty(n_genes, width))
        self.continuous = nn.Parameter(torch.empty(n_continuous, width)) if n_continuous else None
        self.bias = nn.Parameter(torch.empty(width))
        self.columns = Blocks(n_categories, width)
        reset(self, n_genes + n_continuous, self.columns)

    def seen(self, counts: Counts) -> NDArray[np.float32]:
        """(nnz,) what the encoder sees of the counts."""
        return counts.values(self.transform)

    def product(self, cells: Cells) -> Tensor:
        """Cells to (cells, width)."""
        h = cells.counts.product(self.seen(cells.counts), self.weight)
        return h if self.continuous is None else torch.addmm(h, cells.continuous, self.continuous).to(h.dtype)


class BatchNorm(nn.Module):
    """BatchNorm1d (momentum 0.01, eps 1e-3) whose statistics are those of the global batch.

    `frozen` (surgery) uses the running statistics in training too and never updates them.
    """

    momentum, eps = 0.01, 1e-3
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.frozen = False

    def observe(self, moments: Tensor, n: int) -> None:
        """Move the running statistics towards the (2, width) mean and variance of n cells, made unbiased."""
        self.running_mean.lerp_(moments[0], self.momentum)
        self.running_var.lerp_(moments[1] * (n / (n - 1.0)), self.momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (cells, width)."""
        live = self.training and not self.frozen
        if live and several_processes():
            y, moments, n = normalised_over_processes(x, self.weight, self.bias, self.eps)
            self.observe(moments, n)
            return y
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, live, self.momentum, self.eps
        )


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """The shape of a stack of hidden layers."""

    n_hidden: int
    n_layers: int
    dropout_rate: float
    batch_norm: bool
    layer_norm: bool
    n_categories: tuple[int, ...]
    """Categories of each covariate the first layer sees."""
    deep: bool
    """Whether the further layers see them too."""
    labels: bool = False
    """Whether the one covariate is the cells' label, which surgery does not extend."""
    negative_slope: float = 0.0
    """Of the activation: 0 for ReLU, 0.01 for torch's LeakyReLU."""


class HiddenLayer(nn.Module):
    """Linear, then the norms, ReLU (or LeakyReLU) and dropout."""

    def __init__(self, linear: nn.Module, hidden: Hidden) -> None:
        super().__init__()
        self.linear = linear
        self.batch_norm = BatchNorm(hidden.n_hidden) if hidden.batch_norm else None
        self.layer_norm = hidden.layer_norm
        self.dropout_rate = hidden.dropout_rate
        self.negative_slope = hidden.negative_slope
        # one node costs 80 us more Python than torch's four, and pays where rows are cells x labels, not cells
        self.labels = hidden.labels
        self.fused = not (hidden.batch_norm and hidden.layer_norm)

    def forward(self, x: Any, codes: Sequence[Tensor], noise: Noise | None) -> Tensor:
        """(cells, inputs) to (cells, n_hidden); noise None means no dropout.

        With several codes for each row of the input the output has a row for each code.
        """
        p = self.dropout_rate if self.training else 0.0
        if not self.labels:
            return self._by_torch(self.linear(x, codes), noise, p)
        values = cast(Affine, self.linear).values(x, codes)
        if not (self.fused and values.fusable):
            return self._by_torch(values.dense(), noise, p)
        kept = noise.chosen(p) if noise is not None and p else None
        if noise is not None and not p:
            noise.dropout(values.h, 0.0)  # counts as a draw
        slope = self.negative_slope
        return normalised_and_rectified(
            values, self.batch_norm, layer_norm=self.layer_norm, negative_slope=slope, kept=kept
        )

    def _by_torch(self, h: Tensor, noise: Noise | None, p: float) -> Tensor:
        if self.batch_norm is not None:
            h = self.batch_norm(h)
        if self.layer_norm:
            h = F.layer_norm(h, h.shape[1:])
        h = F.leaky_relu(h, self.negative_slope) if self.negative_slope else F.relu(h)
        return noise.dropout(h, p) if noise is not None else h


class Given(nn.Module):
    """The place of a first linear map that was applied already."""

    def forward(self, h: Tensor, _: Sequence[Tensor]) -> Tensor:
        """The input, (cells, n_hidden), as it is."""
        return h


class FCLayers(nn.Module):
    """A stack of hidden layers on top of a given first linear map."""

    def __init__(self, first: nn.Module, hidden: Hidden) -> None:
        super().__init__()
        deep = hidden.n_categories if hidden.deep else ()
        width = hidden.n_hidden
        further = [CategoricalLinear(width, width, deep, labels=hidden.labels) for _ in range(hidden.n_layers - 1)]
        self.layers = nn.ModuleList(HiddenLayer(linear, hidden) for linear in (first, *further))

    def forward(self, x: Any, codes: Sequence[Tensor], noise: Noise | None) -> Tensor:
        """Input of the first map to (cells, n_hidden)."""
        for layer in self.layers:
            x = layer(x, codes, noise)
        return x


class Encoder(nn.Module):
    """q(z | x): hidden layers, then mean and variance; std = sqrt(exp(.) + 1e-4)."""

    def __init__(self, n_genes: int, n_continuous: int, n_latent: int, hidden: Hidden) -> None:
        super().__init__()
        first = CountsLinear(n_genes, hidden.n_hidden, n_continuous, hidden.n_categories)
        self.hidden = FCLayers(first, hidden)
        self.mean_and_log_var = Linear(hidden.n_hidden, 2 * n_latent)

    def forward(self, cells: Cells, noise: Noise | None) -> Gaussian:
        """Cells to the (cells, latent) mean and standard deviation."""
        h = self.hidden(cells, cells.codes, noise)
        mean, log_var = self.mean_and_log_var(h).chunk(2, dim=1)
        return Gaussian(mean, torch.sqrt(torch.exp(log_var) + _VAR_EPS))


class Decoder(nn.Module):
    """z and covariates to the logits of each gene; only the heads that the likelihood uses exist."""

    def __init__(self, n_in: int, n_genes: int, hidden: Hidden, heads: Sequence[str]) -> None:
        super().__init__()
        self.hidden = FCLayers(CategoricalLinear(n_in, hidden.n_hidden, hidden.n_categories), hidden)
        self.heads = nn.ModuleDict({name: Linear(hidden.n_hidden, n_genes) for name in heads})

    def forward(self, z: Tensor, codes: Sequence[Tensor]) -> dict[str, Tensor]:
        """(cells, n_in) to one (cells, genes) tensor per head."""
        h = self.hidden(z, codes, None)
        return {name: head(h) for name, head in self.heads.items()}
