"""Architectural surgery (scArches, Lotfollahi et al., Nature Biotechnology 2022), safe by construction.

Only the rows of new categories are parameters. Every tensor of the reference becomes a buffer, which no optimiser, no
weight decay and no momentum can reach; its batch norms use their running statistics and never update them. Unlike
scvi-tools, which appends columns at the end of a weight, new categories join their own covariate's block, so references
with several covariates keep theirs.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from scviaduct.errors import DataError
from scviaduct.models.base import Model
from scviaduct.models.nets import BatchNorm, Columns, HiddenLayer
from scviaduct.schema import Schema

_PER_BATCH = ("library_log_means", "library_log_vars")


def extend(model: Model, schema: Schema, *, dropout: bool = False, trained: tuple[str, ...] = ()) -> Model:
    """A copy of the model that also knows a query's new categories and trains nothing but their rows.

    New rows start at the mean of the reference's rows of that covariate (see `Columns.extend`), at 0 where the
    reference has one category. The library's prior of new batches is unknown until `set_library_prior`.

    Args:
        model: the reference, itself untouched.
        schema: the reference's schema with categories appended (`Covariate.extended`).
        dropout: keep the encoder's dropout while the query trains.
        trained: submodules of the reference that the query trains as well, e.g. "classifier".

    Raises:
        DataError: the schema is not an extension of the model's.
    """
    n_new = _new_categories(model.schema, schema)
    query = copy.deepcopy(model)
    query.adopt(schema)
    spared = {id(m) for name in trained for m in query.get_submodule(name).modules()}
    for module in list(query.modules()):
        if id(module) not in spared:
            _freeze(module)
        if isinstance(module, Columns):
            module.extend(0 if module.labels else n_new[module.covariate])
        elif isinstance(module, BatchNorm):
            module.frozen = True
        elif isinstance(module, HiddenLayer) and not dropout:
            module.dropout_rate = 0.0
    for name, prior in query.named_buffers(recurse=False):
        if name in _PER_BATCH:
            query.register_buffer(name, torch.cat([prior, prior.new_full((n_new[0],), torch.nan)]))
    return query


def _freeze(module: nn.Module) -> None:
    """Turn a module's own parameters into buffers of the same names; an earlier query's rows are left to `extend`."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not (isinstance(module, Columns) and name == "new"):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def _new_categories(old: Schema, new: Schema) -> list[int]:
    """How many categories each covariate gains."""
    for name in ("genes", "labels", "continuous", "size_factor", "proteins"):
        if getattr(old, name) != getattr(new, name):
            raise DataError(f"The query's {name} differ from the reference's; align the query to the reference first")
    if [c.key for c in old.covariates] != [c.key for c in new.covariates]:
        raise DataError(
            f"The reference's covariates are {[c.key for c in old.covariates]}, the query's {[c.key for c in new.covariates]}"
        )
    for a, b in zip(old.covariates, new.covariates, strict=True):
        if b.categories[: len(a)] != a.categories:
            raise DataError(
                f"Categories of {a.key!r} must begin with the reference's {list(a.categories[:5])}…, "
                f"not {list(b.categories[:5])}…; append new ones with Covariate.extended"
            )
    return [len(b) - len(a) for a, b in zip(old.covariates, new.covariates, strict=True)]


def adapter(model: Model) -> dict[str, Tensor]:
    """All that an extended model has beyond its reference, by name: a few kilobytes to save and share."""
    state = model.state_dict()
    own = {name for name, _ in model.named_parameters()} | set(_PER_BATCH)
    return {name: tensor.clone() for name, tensor in state.items() if name in own}


def attach(model: Model, tensors: dict[str, Tensor]) -> None:
    """Put an adapter into a model extended with the same schema.

    Raises:
        DataError: names or shapes are not those of the model's own adapter.
    """
    expected = {name: tuple(t.shape) for name, t in adapter(model).items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != given:
        wrong = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
        raise DataError(
            f"{len(wrong)} tensors of the adapter do not fit, e.g. {wrong[0]!r}: the model has "
            f"{expected.get(wrong[0])}, the adapter {given.get(wrong[0])}; extend the reference with the adapter's schema"
        )
    model.load_state_dict(tensors, strict=False)


def report(before: Model, after: Model) -> dict[str, float]:
    """Greatest absolute change of each reference tensor through surgery; all 0 unless something is broken."""
    state, changes = after.state_dict(), {}
    for name, tensor in before.state_dict().items():
        if name not in state:  # an adversary, which a query has no use for
            continue
        now = state[name][: len(tensor)] if name in _PER_BATCH else state[name]
        changes[name] = float((now - tensor).abs().max()) if tensor.numel() else 0.0
    return changes
