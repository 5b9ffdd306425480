"""Every op lives in the same nine places. A new op that skips one fails here, with the path it lacks."""

import re

import pytest
from rules import ROOT, ops

PLACES = [
    "csrc/include/pe/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cpu/{op}.isa.cpp",
    "csrc/bindings/{op}.cpp",
    "cuda/{op}.cu",
    "pyengine/reference/{op}.py",
    "pyengine/ops/{op}.py",
    "tests/ops/test_{op}.py",
    "bench/bench_{op}.py",
]
# CUDA twins that are still to be written. A file takes its op off this list; an empty file may not.
OWED_CUDA = set(ops()) - {"rms_norm"}
FIELDS = ["Math", "Shapes", "Numerics", "Writes", "Order", "Cost", "Reference"]


@pytest.mark.parametrize("op", ops())
def test_op_has_every_file(op):
    missing = [path for place in PLACES if not (ROOT / (path := place.format(op=op))).exists()]
    if op in OWED_CUDA:
        missing = [path for path in missing if not path.startswith("cuda/")]
    assert not missing, f"{op} lacks: " + ", ".join(missing)


@pytest.mark.parametrize("op", ops())
def test_contract_fills_every_field_in_order(op):
    text = (ROOT / f"csrc/include/pe/{op}.h").read_text()
    found = [field for field in re.findall(r"^// (\w+)\s{2,}\S", text, re.MULTILINE) if field in FIELDS]
    assert found == FIELDS, f"{op}.h: expected the fields {FIELDS}, in this order, got {found}"
    assert text.startswith(f"// {op} -- "), f"{op}.h: the first line must read '// {op} -- what it is'"


def test_no_stub_of_a_cuda_kernel():
    for path in (ROOT / "cuda").glob("*.cu"):
        assert "__global__" in path.read_text(), f"{path.name} holds no kernel"
        assert path.stem not in OWED_CUDA, f"{path.name} exists: take it off OWED_CUDA"
