"""The thread pool inside the processes and threads that torch makes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch")

HANG_SECONDS = 120  # a guard: importing torch in several processes takes seconds

SOURCE = """
import torch
from torch.utils.data import DataLoader, Dataset

from pyengine import _C
from pyengine.ops.rms_norm import rms_norm

_C.set_num_threads(4)
torch.manual_seed(0)
X, WEIGHT = torch.randn(64, 4096), torch.ones(4096)
RIGHT = rms_norm(X, WEIGHT)


class Items(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        assert torch.equal(rms_norm(X, WEIGHT), RIGHT)
        return torch.tensor(index)


if __name__ == "__main__":
    loader = DataLoader(Items(), batch_size=2, num_workers=2, multiprocessing_context="METHOD", persistent_workers=True)
    for _ in range(2):
        assert sorted(torch.cat(list(loader)).tolist()) == list(range(8))
        assert torch.equal(rms_norm(X, WEIGHT), RIGHT)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(tmp_path, method):
    path = tmp_path / "main.py"
    path.write_text(SOURCE.replace("METHOD", method))
    result = subprocess.run(
        [sys.executable, str(path)], env=dict(os.environ), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def two_torch_threads():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_ops_inside_parallel_torch(two_torch_threads):
    import torch

    from pyengine.ops.rms_norm import rms_norm
    from pyengine.testing import force_num_threads

    torch.manual_seed(0)
    x, weight = torch.randn(64, 4096), torch.ones(4096)
    expected = rms_norm(x, weight)
    with force_num_threads(3):
        for _ in range(20):
            assert torch.equal(rms_norm(x, weight), expected)
            x @ x.T  # torch's own region between ours
        with ThreadPoolExecutor(4) as executor:
            assert all(torch.equal(y, expected) for y in executor.map(lambda _: rms_norm(x, weight), range(40)))
