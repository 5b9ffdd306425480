"""A tiny model and packed rows with documents of unequal length and unequal numbers of targets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pyengine.models import CausalLM
from pyengine.optim import AdamW
from pyengine.spec import ModelSpec, RopeSpec
from pyengine.train.loop import LoopConfig, Trainer
from pyengine.train.schedule import ScheduleConfig

VOCAB_SIZE = 61


class ToyRow(NamedTuple):
    input_ids: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray


class ToyRows:
    """Row i depends on i and the seed alone. With `padding` rows end early and many targets are ignored."""

    rows_per_epoch = 1 << 20

    def __init__(self, seq_len=16, seed=0, *, padding=True):
        self.seq_len, self.seed, self.padding = seq_len, seed, padding

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        row = ToyRow(*(np.full(self.seq_len, fill, np.int32) for fill in (0, -100, -1, 0)))
        length = int(rng.integers(4, self.seq_len + 1)) if self.padding else self.seq_len
        cut = int(rng.integers(1, length)) if self.padding else length
        for segment, (start, stop) in enumerate([(0, cut), (cut, length)]):
            if start == stop:
                continue
            # A token follows from the one before, so there is something to learn.
            ids = (int(rng.integers(VOCAB_SIZE)) + 7 * np.arange(stop - start)) % VOCAB_SIZE
            row.input_ids[start:stop] = ids
            row.targets[start : stop - 1] = ids[1:]
            row.segment_ids[start:stop] = segment
            row.position_ids[start:stop] = np.arange(stop - start)
        if self.padding:
            row.targets[rng.random(self.seq_len) < rng.random()] = -100
            row.targets[0] = int(rng.integers(VOCAB_SIZE))
        return row


def toy_spec(**overrides):
    values = {
        "family": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "norm_eps": 1e-5,
        "rope": RopeSpec(theta=10000.0),
        "tie_word_embeddings": True,
    }
    return ModelSpec(**(values | overrides))


def toy_trainer(model: CausalLM, *, rows=None, schedule=None, lr=3e-3, loss=None, eval_rows=None, **loop) -> Trainer:
    options = {} if loss is None else {"loss": loss}
    return Trainer(
        model,
        AdamW(model.named_parameters(), lr=lr),
        ToyRows() if rows is None else rows,
        config=LoopConfig(**({"num_steps": 10, "rows_per_step": 4} | loop)),
        schedule=ScheduleConfig(shape="constant") if schedule is None else schedule,
        eval_rows=eval_rows,
        **options,
    )
