import importlib.util
import os

# Before torch is imported, here or in a child: its threads spin between operations, and take the cores from the native
# pool and from other workers. A test of what torch does on several threads asks for them.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from pyengine import _C

if importlib.util.find_spec("torch") is None:
    # These import torch or transformers, their subject or their oracle, as soon as they are read.
    collect_ignore_glob = [
        "calibrate/test_*.py",
        "ops/test_*.py",
        "infer/test_against_transformers.py",
        "infer/test_smollm2.py",
        "infer/test_training_parity.py",
        "test_new_op.py",
    ]


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Every ISA level that this machine has, in turn."""
    previous = _C.set_active_isa(request.param)
    yield request.param
    _C.set_active_isa(previous)
