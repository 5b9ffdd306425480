"""`pyengine demo`: the whole life of a language model on one machine, with real text and a real model."""

from pyengine.demo.run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
