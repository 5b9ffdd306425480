"""Torch ops over the native kernels. One module per op; each exports the function of its name. Importing this loads torch."""

from pyengine.ops.rms_norm import rms_norm, rms_norm_residual

__all__ = ["rms_norm", "rms_norm_residual"]
