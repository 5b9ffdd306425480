import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from train.toy import ToyRows, toy_spec, toy_trainer  # noqa: E402

from pyengine.errors import ArgumentError  # noqa: E402
from pyengine.ledger import content_id, read  # noqa: E402
from pyengine.models import CausalLM, from_pretrained  # noqa: E402
from pyengine.testing import assert_same_bits  # noqa: E402
from pyengine.train import run as run_module  # noqa: E402
from pyengine.train.checkpoint import CheckpointError, latest_checkpoint  # noqa: E402
from pyengine.train.config import Config  # noqa: E402
from pyengine.train.loop import Callback, LoopConfig, sum_nll  # noqa: E402
from pyengine.train.metrics import MetricsLog, plot_loss, read_metrics  # noqa: E402
from pyengine.train.random_state import get_random_state, seed_everything, set_random_state  # noqa: E402
from pyengine.train.run import TrainingStopped, run_training  # noqa: E402
from pyengine.train.schedule import ScheduleConfig  # noqa: E402

pytestmark = pytest.mark.train

NUM_STEPS = 10
INPUTS = {"train_shard": content_id(b"toy")}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    folder: Path
    loop: LoopConfig
    seed: int = 0


class Killed(BaseException):
    """Stands for a process that is gone: nothing that the run would do afterwards happens."""


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, metrics):
        if trainer.step == self.step:
            raise Killed


def noisy_loss(model, batch):
    """Draws from every generator, so a random state that is not restored shows."""
    noise = torch.rand(()).item() + random.random() + float(np.random.rand())
    return sum_nll(model, batch) * (1.0 + 0.1 * noise)


def run(folder, *, dtype=torch.float32, kill_at=None, kill_before_save=False, seed=0, inputs=INPUTS, **loop):
    seed_everything(seed)
    model = CausalLM(toy_spec(), dtype=dtype, seed=seed)
    options = {"num_steps": NUM_STEPS, "rows_per_micro_batch": 3, "eval_every": 4, "num_eval_rows": 2} | loop
    schedule = ScheduleConfig(shape="cosine", warmup_steps=3)
    trainer = toy_trainer(model, schedule=schedule, loss=noisy_loss, eval_rows=ToyRows(seed=1), **options)
    if kill_at is not None:
        trainer.callbacks.append(KillAt(kill_at))
    config = RunConfig(folder=folder, loop=trainer.config, seed=seed)
    result = run_training(trainer, model, folder, stage="toy", config=config, inputs=inputs)
    return result, model, trainer


def without_speed(entries):
    return [{key: value for key, value in entry.items() if key != "train/tokens_per_second"} for entry in entries]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kills", [(1,), (2, 3), (5,), (6, 7, 9), (10,)], ids=str)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path, kills, dtype):
    result, model, trainer = run(tmp_path / "whole", dtype=dtype, checkpoint_every=2)
    for kill in kills:
        with pytest.raises(Killed):
            run(tmp_path / "killed", dtype=dtype, checkpoint_every=2, kill_at=kill)
    resumed, resumed_model, resumed_trainer = run(tmp_path / "killed", dtype=dtype, checkpoint_every=2)
    # The kill comes before the save of the same step.
    assert resumed.resumed_from == (kills[-1] - 1) // 2 * 2
    for name, value in model.state_dict().items():
        assert_same_bits(resumed_model.state_dict()[name], value)
    state = trainer.optimizer.state_dict()
    assert ("master.model.norm.weight" in state) == (dtype == torch.bfloat16)
    for name, value in resumed_trainer.optimizer.state_dict().items():
        assert_same_bits(value, state[name])
    entries = read_metrics(tmp_path / "whole")
    assert [entry["step"] for entry in entries] == list(range(1, NUM_STEPS + 1))
    assert without_speed(read_metrics(tmp_path / "killed")) == without_speed(entries)
    assert (resumed.train_loss, resumed.eval_loss) == (result.train_loss, result.eval_loss)
    assert (resumed.num_steps, resumed.num_tokens) == (result.num_steps, result.num_tokens)
    saved, again = (from_pretrained(r.model_folder, dtype=dtype) for r in (result, resumed))
    assert_same_bits(again.output_weight.data, saved.output_weight.data)


def test_a_longer_run_is_the_continuation(tmp_path):
    """The schedule depends on the number of steps; without a falling rate the first steps are the same."""
    run(tmp_path, num_steps=4, checkpoint_every=2)
    result, _, _ = run(tmp_path, num_steps=6, checkpoint_every=3)
    assert (result.resumed_from, result.num_steps) == (4, 6)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path):
    _, model, _ = run(tmp_path / "whole", checkpoint_every=2)
    with pytest.raises(Killed):
        run(tmp_path / "hit", checkpoint_every=2, kill_at=7)
    weights = tmp_path / "hit" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    result, resumed, _ = run(tmp_path / "hit", checkpoint_every=2)
    assert result.resumed_from == 4
    assert [error.path.name for error in result.damaged] == ["optimizer.safetensors"]
    for name, value in model.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], value)


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_begin_anew(tmp_path):
    run(tmp_path, num_steps=2, checkpoint_every=2)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        run(tmp_path, num_steps=2, checkpoint_every=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_per_step": 5}, "loop.rows_per_step: expected 4, with which .* began, got 5"),
        ({"max_grad_norm": None}, "loop.max_grad_norm: expected 1.0, .* got None"),
        ({"seed": 1}, "seed: expected 0, .* got 1"),
        ({"inputs": {"train_shard": content_id(b"other")}}, "expected a run of toy on the same data"),
    ],
    ids=str,
)
def test_another_configuration_is_refused(tmp_path, change, message):
    run(tmp_path, num_steps=2, checkpoint_every=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ArgumentError, match=message):
        run(tmp_path, checkpoint_every=2, **change)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_without_resume_a_folder_with_checkpoints_is_refused(tmp_path):
    _, model, trainer = run(tmp_path, num_steps=2, checkpoint_every=2)
    config = RunConfig(folder=tmp_path, loop=trainer.config)
    with pytest.raises(ArgumentError, match="folder: expected no checkpoint without resume"):
        run_training(trainer, model, tmp_path, stage="toy", config=config, inputs=INPUTS, resume=False)


def test_the_folder_holds_what_it_should(tmp_path):
    result, model, _ = run(tmp_path, checkpoint_every=4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "loss.png", "ledger.jsonl", "checkpoints", "model"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000010"
    from_checkpoint = from_pretrained(result.checkpoint)
    assert_same_bits(from_checkpoint.output_weight.data, model.output_weight.data)
    state = latest_checkpoint(tmp_path / "checkpoints").checkpoint.state()
    assert state["sample_index"] == 4 * NUM_STEPS
    assert state["config"]["loop"]["rows_per_step"] == 4


def test_the_ledger_links_data_checkpoints_and_model(tmp_path):
    result, _, _ = run(tmp_path, checkpoint_every=4)
    entries = read(tmp_path)
    assert [entry.kind for entry in entries] == ["checkpoint"] * 3 + ["train"]
    assert [entry.facts["step"] for entry in entries[:3]] == [4, 8, 10]
    assert all(entry.inputs == INPUTS for entry in entries)
    last = entries[2]
    assert last.outputs["checkpoint"] == content_id(result.checkpoint / "MANIFEST.json")
    assert last.facts["path"] == "checkpoints/step-00000010"
    assert last.facts["bytes"] == sum(path.stat().st_size for path in result.checkpoint.iterdir())
    train = entries[3]
    assert train.outputs == {"checkpoint": last.outputs["checkpoint"], "model": content_id(result.model_folder)}
    facts = train.facts
    assert (facts["stage"], facts["steps"], facts["tokens"]) == ("toy", NUM_STEPS, result.num_tokens)
    assert (facts["train_loss"], facts["eval_loss"]) == (result.train_loss, result.eval_loss)
    assert facts["parameters"] == toy_spec().num_parameters()
    head = json.loads((result.checkpoint / "state.json").read_text())["ledger_head"]
    assert read(tmp_path, head=head)


def test_metrics_have_the_stated_keys(tmp_path):
    result, _, _ = run(tmp_path)
    entries = read_metrics(tmp_path)
    keys = {"step", "tokens", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"}
    for entry in entries:
        assert entry.keys() - {"eval/loss"} == keys
        assert ("eval/loss" in entry) == (entry["step"] in (4, 8, 10))
    assert entries[-1]["train/loss"] == result.train_loss
    assert entries[-1]["tokens"] == result.num_tokens
    assert result.checkpoint is None


def test_metrics_keep_numbers_that_are_not_finite_and_drop_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "train/loss": float("nan"), "eval/loss": float("-inf")})
    log.write({"step": 2, "train/loss": 0.1})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":3,"tra')
    first, second = read_metrics(tmp_path)
    assert math.isnan(first["train/loss"])
    assert first["eval/loss"] == -math.inf
    assert second == {"step": 2, "train/loss": 0.1}
    MetricsLog(tmp_path, resume_step=1).close()
    assert len(read_metrics(tmp_path)) == 1
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")
    MetricsLog(tmp_path).close()
    assert read_metrics(tmp_path) == []
    plot_loss(tmp_path)


def test_the_plot_shows_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    run(tmp_path)
    drawn = {}
    real = Axes.plot

    def plot(self, steps, values, *, label, **style):
        drawn[label] = dict(zip(steps, values, strict=True))
        return real(self, steps, values, label=label, **style)

    monkeypatch.setattr(Axes, "plot", plot)
    plot_loss(tmp_path)
    entries = read_metrics(tmp_path)
    for key in ("train/loss", "eval/loss", "train/learning_rate"):
        assert drawn[key] == {entry["step"]: entry[key] for entry in entries if key in entry}


def test_a_failed_save_is_tried_again_and_given_up_in_the_end(tmp_path, monkeypatch, caplog):
    real, failures = run_module.save_checkpoint, iter([True, True, False, True, True, True])

    def save(*args, **options):
        if next(failures):
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(run_module, "save_checkpoint", save)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, checkpoint_every=1)
    assert len(read_metrics(tmp_path)) == 6
    assert latest_checkpoint(tmp_path / "checkpoints").checkpoint.step == 3
    assert caplog.text.count("was not saved") == 4


def test_random_states_round_trip():
    seed_everything(5)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = json.loads(json.dumps(get_random_state()))

    def draw():
        return random.gauss(0, 1), random.random(), float(np.random.standard_normal()), torch.rand(3).tolist()

    expected = draw()
    seed_everything(6)
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    class Signal(Callback):
        def on_step_end(self, trainer, metrics):
            if trainer.step == 3:
                os.kill(os.getpid(), number)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    whole, model, _ = run(tmp_path / "whole")
    seed_everything(0)
    stopped = CausalLM(toy_spec(), seed=0)
    options = {"num_steps": NUM_STEPS, "rows_per_micro_batch": 3, "eval_every": 4, "num_eval_rows": 2}
    schedule = ScheduleConfig(shape="cosine", warmup_steps=3)
    trainer = toy_trainer(stopped, schedule=schedule, loss=noisy_loss, eval_rows=ToyRows(seed=1), **options)
    trainer.callbacks.append(Signal())
    folder = tmp_path / "stopped"
    config = RunConfig(folder=folder, loop=trainer.config)
    with pytest.raises(TrainingStopped) as error:
        run_training(trainer, stopped, folder, stage="toy", config=config, inputs=INPUTS)
    assert (error.value.signal, error.value.checkpoint.step) == (number, 3)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    resumed, resumed_model, _ = run(folder)
    assert resumed.resumed_from == 3
    assert resumed.train_loss == whole.train_loss
    assert_same_bits(resumed_model.output_weight.data, model.output_weight.data)


@pytest.mark.slow
def test_the_second_signal_ends_at_once():
    script = (
        "import os, signal\n"
        "from pyengine.train.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.signal == signal.SIGTERM\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, ""), result.stderr
