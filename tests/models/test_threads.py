import subprocess
import sys

import pytest

CODE = """
import torch
torch.set_num_threads({threads})
from scviaduct.models.counts import use_threads
print(use_threads(500), torch.get_num_threads(), use_threads(500), torch.get_num_threads())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_asking_for_threads_does_not_change_torch_s(threads):
    # numba and torch can share one OpenMP; numba's first use then sets it to all cores
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(threads=threads)], capture_output=True, text=True, check=True
    )
    assert set(run.stdout.split()) == {str(threads)}
