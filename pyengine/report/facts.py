"""Kinds of ledger entries that the product writes, and the facts that a report reads from each."""

from __future__ import annotations

from collections.abc import Mapping

CORPUS = "corpus"
TOKENIZER = "tokenizer"
SHARDS = "shards"
TRAIN = "train"
CHECKPOINT = "checkpoint"
QUANTIZE = "quantize"
EVALUATE = "evaluate"
GENERATE = "generate"
ENVIRONMENT = "environment"

KINDS: Mapping[str, Mapping[str, str]] = {
    CORPUS: {
        "name": "what the text is",
        "license": "licence of the text",
        "files": "source files read",
        "documents": "documents kept",
        "bytes": "UTF-8 bytes kept",
        "train_documents": "documents in the training split",
        "held_out_documents": "documents in the held-out split",
        "documents_by_kind": "{kind: documents}",
        "dropped": "{reason: documents or files dropped}",
    },
    TOKENIZER: {
        "algorithm": "such as byte-level BPE",
        "vocab_size": "entries, special tokens included",
        "special_tokens": "list of special tokens",
        "bytes_per_token": "UTF-8 bytes per token on held-out text",
    },
    SHARDS: {
        "split": "train or held_out",
        "documents": "documents",
        "tokens": "tokens",
        "text_bytes": "UTF-8 bytes of the text behind the tokens",
        "token_bits": "16 or 32",
    },
    TRAIN: {
        "stage": "such as pretrain or sft",
        "config": "the configuration as a mapping",
        "metrics": "metrics file, relative to the run folder",
        "parameters": "trained parameters",
        "steps": "optimizer steps done",
        "tokens": "tokens trained on",
        "seconds": "wall time of the stage",
        "train_loss": "last training loss, nats per token",
        "eval_loss": "last held-out loss, nats per token",
    },
    CHECKPOINT: {
        "stage": "stage that wrote it",
        "step": "optimizer step",
        "path": "folder, relative to the run folder",
        "bytes": "size on disk",
    },
    QUANTIZE: {
        "format": "name of the weight format",
        "bits_per_weight": "bits per weight, scales included",
        "calibration_tokens": "tokens of text that the rounding kept the outputs on; 0: none",
        "bytes": "size on disk",
        "perplexity_before": "perplexity of the source model on held-out text",
        "perplexity_after": "perplexity of the quantised model on the same text",
        "kl": "mean KL(source || quantised), nats per token",
    },
    EVALUATE: {
        "name": "what is measured",
        "model": "which model, in words",
        "value": "the figure",
        "unit": "its unit",
        "baseline": "the figure to compare with",
        "baseline_name": "what the baseline is",
        "better": "lower or higher",
    },
    GENERATE: {
        "model": "which model, in words",
        "prompt": "text in",
        "answer": "text out",
        "tokens": "tokens generated",
        "tokens_per_second": "decode speed",
    },
    ENVIRONMENT: {
        "versions": "{package: version}",
        "cpu": "name of the processor",
        "isa": "ISA level in use",
        "threads": "worker threads",
        "os": "operating system",
    },
}
"""Kinds that the product writes, with their facts. Other kinds and facts are legal; a reader shows what it knows."""
