import os
import subprocess
import sys

CODE = """
import hashlib
import numpy as np
import torch
torch.set_num_threads({threads})
from scviaduct.models.scvi import SCVI
from scviaduct.schema import Batch, Covariate, Schema
rng = np.random.default_rng(0)
x = rng.poisson(rng.gamma(1, 2, 90), (64, 90))
r, c = np.nonzero(x)
batch = Batch(
    n_genes=90, indptr=np.concatenate([[0], np.cumsum(np.bincount(r, minlength=64))]).astype(np.int64),
    indices=c.astype(np.int32), data=x[r, c].astype(np.float32), batch_index=rng.integers(0, 2, 64),
    seeds=np.arange(64, dtype=np.uint64),
)
torch.manual_seed(0)
model = SCVI(Schema(genes=tuple(map(str, range(90))), batch=Covariate("b", ("x", "y")))).train()
model(batch).loss.backward()
print(hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def test_compiled_just_now_and_loaded_from_the_cache_give_the_same_bits(tmp_path):
    # LLVM may link a helper that was not inlined from another module in the process that compiled it
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CODE.format(threads=1)]
    bits = [subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert bits[0] == bits[1]
