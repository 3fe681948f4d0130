"""The only part that knows zarr, dask, h5py and anndata: stores, audits, the sampler and the loader."""
