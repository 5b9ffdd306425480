import pytest

from pyengine import _C


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Every ISA level that this machine has, in turn."""
    previous = _C.set_active_isa(request.param)
    yield request.param
    _C.set_active_isa(previous)
