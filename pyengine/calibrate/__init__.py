"""Rounding of a model's weights to what it computes on real text."""

from pyengine.calibrate.gptq import round_to_calibration
from pyengine.calibrate.sequences import read_sequences

__all__ = ["read_sequences", "round_to_calibration"]
