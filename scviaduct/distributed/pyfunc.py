"""A bundle as an MLflow model: counts in, latents out. No pickle and no code lies in it; this module reads it.

    mlflow.pyfunc.load_model("models:/kang@current").predict(counts)

`counts` are cells by genes, a DataFrame or an AnnData, with the model's covariates as columns (of obs). They are read as
`scviaduct embed` reads a file, and the result is what it writes.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

import scviaduct
from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import Reading
from scviaduct.distributed.outputs import latents
from scviaduct.distributed.workers import device
from scviaduct.errors import DataError, IncompleteError, ScviaductError
from scviaduct.schema import Schema
from scviaduct.storage.columns import DATASET, OBS_DATASET
from scviaduct.storage.genes import normalise

_INPUT = "input.h5ad"
_FILE_OF_CELL = "dataset of the cell"


class Latents:
    """What MLflow calls: `predict`."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.model = bundle, bundle.model().to(device())

    def predict(
        self, model_input: pd.DataFrame | ad.AnnData | list[dict[str, Any]], params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """(cells, n_latent) posterior means, indexed by cell; NaN for cells without a count over the model's genes.

        Raises:
            MlflowException: with the reason why the cells are not the model's kind.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / _INPUT
            try:
                cells = _cells(model_input, self.model.schema)
                cells.write_h5ad(file)
                values = latents(self.model, file, _reading(cells))
            except ScviaductError as error:
                reason = str(error).replace(str(file), "The input")
                raise MlflowException(reason, error_code=INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame(values, index=cells.obs_names, columns=_names(self.bundle))


def _load_pyfunc(path: str) -> Latents:
    """What MLflow calls to load a model."""
    return Latents(Bundle.open(path))


def _cells(given: Any, schema: Schema) -> ad.AnnData:
    """What was given, as an AnnData that can be written: names as text, the file of each cell as a column."""
    if isinstance(given, list | dict):  # what a server gets as JSON
        given = pd.DataFrame(given)
    if isinstance(given, pd.DataFrame):
        given = _of_table(given, schema)
    elif not isinstance(given, ad.AnnData):
        raise DataError(f"The input must be a DataFrame or an AnnData of counts, not a {type(given).__name__}.")
    obs = given.obs.copy()
    if schema.batch.key == DATASET and DATASET in obs:
        obs[_FILE_OF_CELL] = obs[DATASET].astype(str)
    obs.index = obs.index.astype(str)
    proteins = {schema.proteins_key: given.obsm[schema.proteins_key]} if schema.proteins_key in given.obsm else {}
    return ad.AnnData(given.X, obs=obs, var=pd.DataFrame(index=given.var_names.astype(str)), obsm=proteins)


def _of_table(table: pd.DataFrame, schema: Schema) -> ad.AnnData:
    """Columns with the model's genes are counts (all numbers, where none is); the others are obs."""
    names = [str(name) for name in table.columns]
    keys = {DATASET if key == OBS_DATASET else key for key in schema.keys}
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]
    known = set(schema.genes) | set(normalise(schema.genes))
    genes = [n not in keys and (n in known or m in known) for n, m in zip(names, normalise(names), strict=True)]
    if not any(genes):
        genes = [number and n not in keys for n, number in zip(names, numeric, strict=True)]
    text = [n for n, gene, number in zip(names, genes, numeric, strict=True) if gene and not number]
    if text:
        raise DataError(f"The input: column {text[0]!r} is a gene of the model, but holds no numbers.")
    counts = csr_matrix(table.loc[:, genes].to_numpy(np.float64, na_value=np.nan))
    obs = table.loc[:, [n in keys for n in names]].set_axis(table.index.astype(str))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[n for n, g in zip(names, genes, strict=True) if g]))


def _reading(cells: ad.AnnData) -> Reading:
    return Reading(batch_key=_FILE_OF_CELL if _FILE_OF_CELL in cells.obs else None)


def _names(bundle: Bundle) -> list[str]:
    return [f"latent_{i}" for i in range(bundle.facts["config"]["n_latent"])]


def _pyfunc() -> Any:
    """The module mlflow.pyfunc, which warns of its own type hints while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
    return mlflow.pyfunc


def write_flavour(bundle: Path, folder: Path) -> None:
    """Write what makes MLflow see a model in a bundle: MLmodel, and the packages that it needs, into `folder`."""
    pyfunc = _pyfunc()
    from mlflow import __version__ as mlflow_version
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec
    from mlflow.types.schema import Schema as Columns

    opened = Bundle.open(bundle)
    schema, columns = opened.schema, {DATASET if k == OBS_DATASET else k for k in opened.schema.keys}
    numbers = {*schema.continuous, schema.size_factor}
    needed = [k for k in schema.keys if not (schema.labels and k == schema.labels.key)]
    inputs: list[Any] = [
        ColSpec("double" if k in numbers else "string", DATASET if k == OBS_DATASET else k) for k in needed
    ]
    # genes are matched by name, Ensembl versions aside, and some may be missing
    inputs += [ColSpec("double", gene, required=False) for gene in schema.genes if gene not in columns]
    signature = ModelSignature(Columns(inputs), Columns([ColSpec("float", name) for name in _names(opened)]))
    # "the model itself checks its input": MLflow would drop columns such as ENSG….14, and refuses an AnnData
    signature._is_signature_from_type_hint = True
    requirements = [f"scviaduct=={scviaduct.__version__}", f"mlflow>={'.'.join(mlflow_version.split('.')[:2])}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no example of an input
        pyfunc.save_model(
            str(folder / "flavour"),
            loader_module=__name__,
            signature=signature,
            pip_requirements=requirements,
            metadata={"bundle_digest": opened.digest, "model": opened.name},
        )
    for file in sorted((folder / "flavour").iterdir()):
        file.rename(folder / file.name)
    (folder / "flavour").rmdir()


def proven(folder: Path) -> None:
    """Load a model as MLflow does and embed two cells with it.

    Raises:
        ScviaductError: it does not load, or gives no numbers.
    """
    logging.getLogger("mlflow.pyfunc").setLevel(logging.ERROR)
    loaded = _pyfunc().load_model(str(folder), suppress_warnings=True)
    schema = Bundle.open(folder).schema
    cells = pd.DataFrame(np.ones((2, len(schema.genes))), columns=list(schema.genes), index=["a", "b"])
    for covariate in schema.covariates:
        cells[DATASET if covariate.key == OBS_DATASET else covariate.key] = covariate.categories[0]
    for key in (*schema.continuous, *([schema.size_factor] if schema.size_factor else [])):
        cells[key] = 1.0
    found = loaded.predict(cells)
    if found.shape[0] != 2 or not np.isfinite(found.to_numpy()).all():
        raise IncompleteError(f"The model in {folder} does not give latents after it was loaded back.")
