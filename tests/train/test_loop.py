import io
import logging
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.specification import causal_lm_logits  # noqa: E402
from train.toy import ToyRows, toy_spec, toy_trainer  # noqa: E402

from pyengine.errors import ConfigError  # noqa: E402
from pyengine.models import CausalLM, from_pretrained, save_pretrained  # noqa: E402
from pyengine.testing import assert_accurate, assert_same_bits, force_num_threads  # noqa: E402
from pyengine.train import progress  # noqa: E402
from pyengine.train.accumulate import GradientAccumulator  # noqa: E402
from pyengine.train.batch import batches_of, collate  # noqa: E402
from pyengine.train.loop import Callback, LoopConfig, TrainingError, sum_nll  # noqa: E402
from pyengine.train.schedule import ScheduleConfig, learning_rate  # noqa: E402

pytestmark = pytest.mark.train


def losses_of(trainer):
    losses = []

    class Record(Callback):
        def on_step_end(self, trainer, metrics):
            losses.append(metrics["train/loss"])

    trainer.callbacks.append(Record())
    trainer.train()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_fifty_losses_equal_transformers(tmp_path, tied):
    """The same data, initial weights, schedule, clipping and decay in transformers with torch.optim.AdamW."""
    transformers = pytest.importorskip("transformers")
    model = CausalLM(toy_spec(tie_word_embeddings=tied), seed=2)
    save_pretrained(model, tmp_path)
    rows = ToyRows(padding=False)
    schedule = ScheduleConfig(shape="cosine", warmup_steps=5)
    losses = losses_of(toy_trainer(model, rows=rows, schedule=schedule, num_steps=50, max_grad_norm=0.5))

    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    groups = [
        {"params": [p for p in peer.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in peer.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    peer_losses = []
    for step in range(50):
        batch = [rows[index] for index in range(4 * step, 4 * step + 4)]
        input_ids = torch.from_numpy(np.stack([row.input_ids for row in batch])).long()
        targets = torch.from_numpy(np.stack([row.targets for row in batch])).long()
        logits = peer(input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.5)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(schedule, step, peak=3e-3, num_steps=50)
        optimiser.step()
        peer_losses.append(loss.item())
    assert losses == pytest.approx(peer_losses, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


class _Recorded(Exception):
    pass


def gradients_of(trainer):
    """The gradients and scale that the first step hands to the optimizer."""
    recorded = {}

    def record(*, lr, grad_scale, grads):
        recorded.update(grads)
        raise _Recorded

    trainer.optimizer.step = record
    with pytest.raises(_Recorded):
        trainer.train_step()
    return recorded


def exact_gradients(model, rows):
    """Of the mean over all targets of all rows, in float64, document by document."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        for segment in range(row.segment_ids.max() + 1):
            chosen = row.segment_ids == segment
            input_ids, targets = (torch.from_numpy(part[chosen]).long() for part in (row.input_ids, row.targets))
            logits = causal_lm_logits(model.spec, leaves, input_ids)
            total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            count += int((targets != -100).sum())
    grads = torch.autograd.grad(total / count, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2, 3, 5])
def test_micro_batches_equal_the_big_batch(rows_per_micro_batch):
    """Rows with unequal numbers of targets: a mean of means would be far off."""
    model, rows = CausalLM(toy_spec(), seed=2), ToyRows()
    counts = {int((rows[index].targets != -100).sum()) for index in range(6)}
    assert len(counts) > 3
    whole = gradients_of(toy_trainer(model, rows=rows, rows_per_step=6))
    parts = gradients_of(toy_trainer(model, rows=rows, rows_per_step=6, rows_per_micro_batch=rows_per_micro_batch))
    exact = exact_gradients(model, [rows[index] for index in range(6)])
    assert whole.keys() == parts.keys() == exact.keys()
    for name, grad in exact.items():
        torch.testing.assert_close(whole[name].double(), grad, rtol=1e-3, atol=1e-6)
        assert_accurate(parts[name], grad, whole[name], factor=4)


def test_micro_batches_report_the_same_loss():
    model, rows = CausalLM(toy_spec(), seed=2), ToyRows()
    losses = [
        toy_trainer(model, rows=rows, rows_per_step=6, rows_per_micro_batch=size, lr=1e-9).train_step()["train/loss"]
        for size in (1, 2, 6)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_bfloat16_gradients_add_up_in_float32():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    accumulator = GradientAccumulator({"p": parameter})
    for _ in range(300):
        parameter.grad = torch.ones(3, dtype=torch.bfloat16)
        accumulator.add()
    assert accumulator.grads()["p"].tolist() == [300.0] * 3, "bfloat16 would stop at 256"
    assert parameter.grad is None


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    model = CausalLM(toy_spec(), seed=2)
    trainer = toy_trainer(model, max_grad_norm=1e-3)
    scales = []
    real_step = trainer.optimizer.step

    def record(*, lr, grad_scale, grads):
        scales.append(grad_scale)
        norm = math.sqrt(sum(float((grad.double() * grad_scale).square().sum()) for grad in grads.values()))
        assert norm == pytest.approx(1e-3, rel=1e-3)
        real_step(lr=lr, grad_scale=grad_scale, grads=grads)

    trainer.optimizer.step = record
    metrics = trainer.train_step()
    assert metrics["train/grad_norm"] > 0.01
    assert scales == [pytest.approx(1e-3 / metrics["train/grad_norm"], rel=1e-3)]
    unclipped = toy_trainer(CausalLM(toy_spec(), seed=2), max_grad_norm=None)
    assert unclipped.train_step()["train/grad_norm"] == metrics["train/grad_norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_goes_well_down(dtype):
    model = CausalLM(toy_spec(), dtype=dtype, seed=2)
    losses = losses_of(toy_trainer(model, rows=ToyRows(padding=False), num_steps=80, lr=1e-2))
    assert losses[0] == pytest.approx(math.log(61), rel=0.1)
    assert np.mean(losses[-10:]) < 0.3 * losses[0]


def test_same_bits_for_any_number_of_threads():
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            model = CausalLM(toy_spec(), seed=2)
            losses = losses_of(toy_trainer(model, num_steps=5, rows_per_micro_batch=2))
            results.append((losses, model.state_dict()))
    for losses, state in results[1:]:
        assert losses == results[0][0]
        for name, value in state.items():
            assert_same_bits(value, results[0][1][name])


def test_evaluation_is_the_mean_over_targets_and_changes_nothing():
    model = CausalLM(toy_spec(), seed=2)
    rows = ToyRows(seed=9)
    trainer = toy_trainer(model, eval_rows=rows, num_eval_rows=5, rows_per_micro_batch=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = trainer.evaluate()
    with torch.no_grad():
        batches = [collate([rows[index]]) for index in range(5)]
        expected = sum(float(sum_nll(model, batch)) for batch in batches) / sum(b.num_targets for b in batches)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert model.training
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])
    rows.rows_per_epoch = 2
    two = toy_trainer(model, eval_rows=rows, num_eval_rows=2).evaluate()
    assert trainer.evaluate() == pytest.approx(two, rel=1e-6), "an epoch with fewer rows is read once"


def test_evaluation_comes_at_its_interval_and_at_the_end():
    seen = {}

    class Record(Callback):
        def on_step_end(self, trainer, metrics):
            seen[metrics["step"]] = "eval/loss" in metrics

        def on_train_end(self, trainer):
            seen["end"] = trainer.step

    trainer = toy_trainer(CausalLM(toy_spec()), eval_rows=ToyRows(seed=1), num_steps=7, eval_every=3, num_eval_rows=1)
    trainer.callbacks.append(Record())
    trainer.train()
    assert seen == {1: False, 2: False, 3: True, 4: False, 5: False, 6: True, 7: True, "end": 7}


def test_what_is_not_finite_stops_the_run_before_the_update():
    model = CausalLM(toy_spec(), seed=2)
    trainer = toy_trainer(model, loss=lambda model, batch: sum_nll(model, batch) * float("nan"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match="step 0: expected a finite loss and gradient, got nan and nan"):
        trainer.train()
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])
    assert trainer.step == trainer.optimizer.num_steps == 0


def test_rows_without_targets():
    class Empty(ToyRows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row.targets[:] = -100
            return row

    with pytest.raises(TrainingError, match="step 0: expected at least one target"):
        toy_trainer(CausalLM(toy_spec()), rows=Empty()).train()


def test_padding_is_cut_off_and_segments_are_kept():
    rows = [ToyRows()[index] for index in range(5)]
    batch = collate(rows)
    lengths = [int((row.segment_ids == segment).sum()) for row in rows for segment in range(2)]
    assert batch.segment_offsets.tolist() == [0, *np.cumsum([length for length in lengths if length])]
    assert batch.num_tokens == sum(lengths)
    assert batch.num_targets == sum(int((row.targets != -100).sum()) for row in rows)
    kept = np.concatenate([row.input_ids[row.segment_ids >= 0] for row in rows])
    assert batch.input_ids.tolist() == kept.tolist()
    model = CausalLM(toy_spec(), seed=2)
    parts = sum(sum_nll(model, part).item() for part in batches_of(ToyRows(), 0, 5, 2))
    assert sum_nll(model, batch).item() == pytest.approx(parts, rel=1e-6)


def test_config_rules():
    with pytest.raises(ConfigError, match="rows_per_micro_batch: expected at most rows_per_step = 4, got 5"):
        LoopConfig(num_steps=1, rows_per_step=4, rows_per_micro_batch=5)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    metrics = {"train/loss": 1.25, "train/tokens_per_second": 1234.5}
    terminal = Terminal()
    with progress.ProgressReport(3, stream=terminal) as report:
        report.update(3, metrics)
    assert "3/3" in terminal.getvalue()
    assert "loss 1.2500" in terminal.getvalue()
    clock = iter([0.0, 29.0, 31.0, 32.0, 33.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    plain = io.StringIO()
    with caplog.at_level(logging.INFO, "pyengine"), progress.ProgressReport(9, stream=plain) as report:
        for step in (1, 2, 3, 9):
            report.update(step, metrics)
    assert plain.getvalue() == ""
    assert [record.getMessage() for record in caplog.records] == [
        "step 2 of 9  loss 1.2500  1,234 tokens/s",
        "step 9 of 9  loss 1.2500  1,234 tokens/s",
    ]


def test_the_model_survives_the_trip_to_disk_in_the_middle(tmp_path):
    model = CausalLM(toy_spec(), seed=2)
    trainer = toy_trainer(model, num_steps=3)
    trainer.train()
    save_pretrained(model, tmp_path)
    again = toy_trainer(from_pretrained(tmp_path), num_steps=4)
    again.optimizer.load_state_dict(trainer.optimizer.state_dict(), num_steps=3)
    again.step = 3
    trainer.config = again.config
    assert again.train_step()["train/loss"] == trainer.train_step()["train/loss"]
