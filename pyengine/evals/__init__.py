"""Figures about a model. Numpy in and out, so that the native engine and torch models are measured by the same code."""

from pyengine.evals.divergence import Divergence, kl_divergence, measure_divergence
from pyengine.evals.perplexity import Perplexity, measure_perplexity, nll_from_logits

__all__ = [
    "Divergence",
    "Perplexity",
    "kl_divergence",
    "measure_divergence",
    "measure_perplexity",
    "nll_from_logits",
]
