"""Helpers shared by tests and benchmarks. The product never imports them."""
