"""A run folder as a whole life would leave it, with made-up figures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from pyengine.ledger import Ledger, content_id
from pyengine.report import facts


def write_metrics(path: Path, steps: int, start: float, floor: float, seed: int) -> str:
    draw = random.Random(seed)
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            progress = step / steps
            record = {
                "step": step,
                "tokens": step * 16384,
                "train/loss": floor + (start - floor) * math.exp(-5 * progress) + draw.gauss(0, 0.06),
                "train/grad_norm": 0.4 + 2.5 * math.exp(-8 * progress) + abs(draw.gauss(0, 0.12)),
                "train/learning_rate": 1e-3 * min(1, 20 * progress) * (0.55 + 0.45 * math.cos(math.pi * progress)),
                "train/tokens_per_second": 5200 + draw.gauss(0, 120),
            }
            if step % max(1, steps // 12) == 0:
                record["eval/loss"] = floor + 0.12 + (start - floor) * math.exp(-5 * progress)
            file.write(json.dumps(record) + "\n")
    return content_id(path)


def made_up(name: str) -> str:
    return content_id(name.encode())


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pretrain_metrics = write_metrics(folder / "pretrain.jsonl", 900, 8.6, 2.9, 1)
    sft_metrics = write_metrics(folder / "sft.jsonl", 120, 3.4, 2.1, 2)
    with Ledger(folder) as ledger:
        ledger.record(
            facts.ENVIRONMENT,
            facts={
                "versions": {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.13.0+cpu", "tokenizers": "0.23.3"},
                "cpu": "A processor with 2 cores",
                "isa": "avx512_vnni",
                "threads": 2,
                "os": "Linux 6.1",
            },
        )
        ledger.record(
            facts.CORPUS,
            inputs={"source": made_up("source")},
            outputs={"train": made_up("train.jsonl"), "held_out": made_up("held_out.jsonl")},
            facts={
                "name": "Python 3.11 standard library",
                "license": "PSF-2.0",
                "files": 638,
                "documents": 15458,
                "bytes": 9076694,
                "train_documents": 15075,
                "held_out_documents": 383,
                "documents_by_kind": {"comment": 7650, "docstring": 7215, "code": 593},
                "dropped": {
                    "comment_too_short": 2525,
                    "docstring_too_short": 801,
                    "duplicate": 654,
                    "comment_few_letters": 119,
                    "comment_is_code": 89,
                    "file_generated": 69,
                },
            },
        )
        ledger.record(
            facts.TOKENIZER,
            inputs={"train": made_up("train.jsonl")},
            outputs={"tokenizer": made_up("tokenizer.json")},
            facts={
                "algorithm": "byte-level BPE",
                "vocab_size": 8192,
                "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                "bytes_per_token": 3.412,
            },
        )
        for split, count, tokens in (("train", 15075, 2583000), ("held_out", 383, 76600)):
            ledger.record(
                facts.SHARDS,
                inputs={split: made_up(f"{split}.jsonl"), "tokenizer": made_up("tokenizer.json")},
                outputs={"shard": made_up(f"shard {split}")},
                facts={
                    "split": split,
                    "documents": count,
                    "tokens": tokens,
                    "text_bytes": round(3.412 * tokens),
                    "token_bits": 16,
                },
            )
        train = ledger.record(
            facts.TRAIN,
            inputs={"train": made_up("shard train"), "held_out": made_up("shard held_out")},
            outputs={"metrics": pretrain_metrics},
            facts={
                "stage": "pretrain",
                "config": {"hidden_size": 256, "num_layers": 6, "optimizer": {"name": "adamw", "betas": [0.9, 0.95]}},
                "metrics": "pretrain.jsonl",
                "parameters": 7342336,
                "steps": 900,
                "tokens": 900 * 16384,
                "seconds": 2835.0,
                "train_loss": 2.938,
                "eval_loss": 3.058,
            },
        )
        ledger.record(
            facts.CHECKPOINT,
            inputs={"train": train},
            outputs={"model": made_up("base")},
            facts={"stage": "pretrain", "step": 900, "path": "checkpoints/pretrain-900", "bytes": 29400000},
        )
        sft = ledger.record(
            facts.TRAIN,
            inputs={"model": made_up("base"), "pairs": made_up("pairs.jsonl")},
            outputs={"metrics": sft_metrics},
            facts={
                "stage": "sft",
                "config": {"learning_rate": 1e-4, "epochs": 2},
                "metrics": "sft.jsonl",
                "parameters": 7342336,
                "steps": 120,
                "tokens": 120 * 16384,
                "seconds": 391.5,
                "train_loss": 2.12,
            },
        )
        ledger.record(
            facts.CHECKPOINT,
            inputs={"train": sft},
            outputs={"model": made_up("chat")},
            facts={"stage": "sft", "step": 120, "path": "checkpoints/sft-120", "bytes": 29400000},
        )
        ledger.record(
            facts.QUANTIZE,
            inputs={"model": made_up("chat"), "held_out": made_up("shard held_out")},
            outputs={"model": made_up("int4")},
            facts={
                "format": "progressive int4, group 32",
                "bits_per_weight": 4.25,
                "bytes": 4410000,
                "perplexity_before": 21.31,
                "perplexity_after": 22.04,
                "kl": 0.0316,
            },
        )
        for name, model, value, unit, baseline, baseline_name in (
            ("bits per byte", "base", 1.293, "bits per byte", 2.614, "unigram"),
            ("perplexity of docstrings", "fine-tuned", 8.83, "", 19.7, "base"),
            ("perplexity of docstrings", "int4", 9.02, "", 8.83, "fine-tuned"),
            ("same bits, batch 1 and 8", "int4", 100, "% of tokens", None, None),
        ):
            source = {"base": "base", "fine-tuned": "chat", "int4": "int4"}[model]
            ledger.record(
                facts.EVALUATE,
                inputs={"model": made_up(source), "held_out": made_up("shard held_out")},
                facts={
                    "name": name,
                    "model": model,
                    "value": value,
                    "unit": unit,
                    "baseline": baseline,
                    "baseline_name": baseline_name,
                    "better": "lower" if baseline else None,
                },
            )
        ask = "Write the docstring of this Python function:\ndef add(a, b):"
        for prompt, model, answer in (
            (ask, "fine-tuned", "Return the sum of a and b."),
            (ask, "int4", "Return the sum of a and b.\n\nBoth must be numbers."),
            ("Return the", "int4", "Return the value of the key if it is in the mapping, else the default."),
        ):
            ledger.record(
                facts.GENERATE,
                inputs={"model": made_up("int4" if model == "int4" else "chat")},
                outputs={"answer": content_id(answer.encode())},
                facts={
                    "model": model,
                    "prompt": prompt,
                    "answer": answer,
                    "tokens": 12,
                    "tokens_per_second": 812.4 if model == "int4" else 401.2,
                },
            )
    return folder
