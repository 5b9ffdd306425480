"""Supervised fine-tuning on conversations; only what the assistant says is learned.

Data is JSON lines of `{"messages": [{"role": ..., "content": ...}, ...]}`. The chat template of the model makes the
text and the mask of the assistant's tokens; whole conversations are packed into rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from pyengine.data.jsonl import Conversation, read_jsonl
from pyengine.data.packing import PackedConversations, pack_conversations
from pyengine.formats import open_gguf
from pyengine.ledger import Ledger, content_id
from pyengine.models import from_pretrained
from pyengine.tokenizer import ChatTemplate, Tokenizer, assistant_mask
from pyengine.train.config import Config, Range
from pyengine.train.loop import LoopConfig, OptimConfig, Trainer
from pyengine.train.random_state import seed_everything
from pyengine.train.run import TrainResult, run_training
from pyengine.train.schedule import ScheduleConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Files of conversations, and the tokens of a row. `drop_long` leaves out conversations that are longer."""

    train: Path
    eval: Path | None = None
    seq_len: Annotated[int, Range(low=2)] = 512
    drop_long: bool = False


@dataclass(frozen=True, kw_only=True)
class SftConfig(Config):
    """A fine-tuning run.

    Attributes:
        folder: of the run; one that holds a checkpoint is gone on with.
        model: to start from: Hugging Face folder or GGUF file, with its tokenizer and chat template.
        tokenizer: folder to take tokenizer and chat template from instead.
        data: what to read.
        loop, optim, schedule: how to train.
        dtype: of parameters and activations; bfloat16 has float32 masters.
        seed: of the data order.
    """

    folder: Path
    model: Path
    data: DataConfig
    loop: LoopConfig
    tokenizer: Path | None = None
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=2e-5, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_steps=10))
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: Annotated[int, Range(low=0, high=2**63 - 1)] = 0
    resume: bool = True


def run(config: SftConfig, *, ledger: Ledger | None = None) -> TrainResult:
    """Train a model; see `pyengine.train.run` for what the folder holds afterwards, and for `ledger`."""
    seed_everything(config.seed)
    inputs = {"init_from": content_id(config.model), "train_conversations": content_id(config.data.train)}
    tokenizer, template = load_text_side(config.tokenizer or config.model)
    rows = load_rows(config.data.train, tokenizer, template, config.data, config.seed)
    eval_rows = None
    if config.data.eval is not None:
        inputs["eval_conversations"] = content_id(config.data.eval)
        eval_rows = load_rows(config.data.eval, tokenizer, template, config.data, config.seed)
    model = from_pretrained(config.model, dtype=_DTYPES[config.dtype])
    model.recompute = config.loop.recompute
    trainer = Trainer(
        model,
        config.optim.build(model),
        rows,
        config=config.loop,
        schedule=config.schedule,
        eval_rows=eval_rows,
    )
    tokenizer.save(config.folder / "model")
    template.save(config.folder / "model")
    template.close()
    return run_training(
        trainer, model, config.folder, stage="sft", config=config, inputs=inputs, resume=config.resume, ledger=ledger
    )


def load_text_side(path: Path) -> tuple[Tokenizer, ChatTemplate]:
    """Tokenizer and chat template of a Hugging Face folder or a GGUF file."""
    if path.is_dir():
        return Tokenizer.from_folder(path), ChatTemplate.from_folder(path)
    metadata = open_gguf(path).metadata
    return Tokenizer.from_gguf(metadata, path=path), ChatTemplate.from_gguf(metadata, path=path)


def load_rows(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate, data: DataConfig, seed: int
) -> PackedConversations:
    """The conversations of a file as packed rows."""
    conversations = []
    for record in read_jsonl(path, Conversation):
        messages = [{"role": message.role, "content": message.content} for message in record.messages]
        conversations.append(assistant_mask(tokenizer, template, messages))
    return pack_conversations(conversations, data.seq_len, seed, drop_long=data.drop_long)
