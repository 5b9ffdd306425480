"""Pretraining: next-token prediction on shards of packed documents, from random weights or from a model.

pyengine.recipes.pretrain.run(load_config(PretrainConfig, "pretrain.yaml", ["optim.learning_rate=1e-3"]))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from pyengine.data.packing import PackedDataset
from pyengine.data.shards import Shard, shard_content_id
from pyengine.errors import ArgumentError, ConfigError
from pyengine.ledger import Ledger, content_id
from pyengine.models import CausalLM, from_pretrained
from pyengine.spec import ModelSpec, RopeSpec
from pyengine.tokenizer import Tokenizer
from pyengine.train.config import Config, Range
from pyengine.train.loop import LoopConfig, OptimConfig, Trainer
from pyengine.train.random_state import seed_everything
from pyengine.train.run import TrainResult, run_training
from pyengine.train.schedule import ScheduleConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Size of a new Llama model; the vocabulary is that of the data."""

    hidden_size: Annotated[int, Range(low=1)] = 256
    intermediate_size: Annotated[int, Range(low=1)] = 704
    num_layers: Annotated[int, Range(low=1)] = 6
    num_heads: Annotated[int, Range(low=1)] = 4
    num_kv_heads: Annotated[int, Range(low=1)] = 4
    head_dim: Annotated[int, Range(low=2)] = 64
    max_position_embeddings: Annotated[int, Range(low=1)] = 2048
    norm_eps: Annotated[float, Range(above=0.0, high=0.1)] = 1e-5
    rope_theta: Annotated[float, Range(low=1.0)] = 10000.0
    tie_word_embeddings: bool = True
    sliding_window: Annotated[int, Range(low=1)] | None = None
    bos_token_id: Annotated[int, Range(low=0)] | None = None
    eos_token_id: Annotated[int, Range(low=0)] | None = None

    def build(self, vocab_size: int) -> ModelSpec:
        return ModelSpec(
            family="llama",
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            norm_eps=self.norm_eps,
            rope=RopeSpec(theta=self.rope_theta),
            tie_word_embeddings=self.tie_word_embeddings,
            sliding_window=self.sliding_window,
            bos_token_id=self.bos_token_id,
            eos_token_ids=() if self.eos_token_id is None else (self.eos_token_id,),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Shards as `pyengine.data.shards` writes them, without suffix, and the tokens of a row."""

    train: Path
    eval: Path | None = None
    seq_len: Annotated[int, Range(low=2)] = 512


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """A pretraining run.

    Attributes:
        folder: of the run; one that holds a checkpoint is gone on with.
        data: what to read.
        loop, optim, schedule: how to train.
        model: size of a new model.
        init_from: a model to go on from instead (Hugging Face folder or GGUF file); `model` is not used then.
        tokenizer: folder whose tokenizer made the shards; copied beside the trained model.
        dtype: of parameters and activations; bfloat16 has float32 masters.
        seed: of initial weights and data order.
    """

    folder: Path
    data: DataConfig
    loop: LoopConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init_from: Path | None = None
    tokenizer: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Annotated[int, Range(low=0, high=2**63 - 1)] = 0
    resume: bool = True


def run(config: PretrainConfig, *, ledger: Ledger | None = None) -> TrainResult:
    """Train a model; see `pyengine.train.run` for what the folder holds afterwards, and for `ledger`."""
    seed_everything(config.seed)
    inputs = {"train_shard": shard_content_id(config.data.train)}
    shard = Shard(config.data.train)
    if config.data.seq_len > config.model.max_position_embeddings and config.init_from is None:
        message = f"expected at most model.max_position_embeddings = {config.model.max_position_embeddings}"
        raise ConfigError(f"{message}, got {config.data.seq_len}", key="data.seq_len")
    if config.init_from is None:
        spec = config.model.build(shard.index.vocab_size)
        model = CausalLM(spec, dtype=_DTYPES[config.dtype], seed=config.seed)
    else:
        inputs["init_from"] = content_id(config.init_from)
        model = from_pretrained(config.init_from, dtype=_DTYPES[config.dtype])
        if shard.index.vocab_size > model.spec.vocab_size:
            raise ArgumentError(
                f"data.train: expected ids of at most {model.spec.vocab_size} tokens, got {shard.index.vocab_size}"
            )
    model.recompute = config.loop.recompute
    eval_rows = None
    if config.data.eval is not None:
        inputs["eval_shard"] = shard_content_id(config.data.eval)
        eval_rows = PackedDataset(Shard(config.data.eval), config.data.seq_len, config.seed)
    trainer = Trainer(
        model,
        config.optim.build(model),
        PackedDataset(shard, config.data.seq_len, config.seed),
        config=config.loop,
        schedule=config.schedule,
        eval_rows=eval_rows,
    )
    if config.tokenizer is not None:
        Tokenizer.from_folder(config.tokenizer).save(config.folder / "model")
    return run_training(
        trainer,
        model,
        config.folder,
        stage="pretrain",
        config=config,
        inputs=inputs,
        resume=config.resume,
        ledger=ledger,
    )
