import errno
import os
import shutil
import signal

import pytest

torch = pytest.importorskip("torch")

from train.crash_shim import Disk, events_of, run_until, watch  # noqa: E402

from pyengine.testing import assert_same_bits  # noqa: E402
from pyengine.train import checkpoint as checkpoint_module  # noqa: E402
from pyengine.train.checkpoint import (  # noqa: E402
    CheckpointError,
    latest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

pytestmark = pytest.mark.train


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "a.weight": torch.randn(5, 7, generator=generator),
            "b": torch.randn(3, generator=generator).bfloat16(),
        },
        "optimizer": {"exp_avg.a.weight": torch.randn(5, 7, generator=generator), "scalar": torch.tensor(step)},
    }


def state_of(step):
    return {"step": step, "seed": 2**63 - 1, "rate": 0.1, "list": [1, None, "ü"], "python": {"state": [step] * 20}}


def save(folder, step, **options):
    return save_checkpoint(
        folder, step, tensors=tensors_of(step), state=state_of(step), files={"config.json": b"{}\n"}, **options
    )


def assert_holds(found, step):
    assert found.step == step
    assert found.state() == state_of(step)
    for name, group in tensors_of(step).items():
        loaded = found.tensors(name)
        assert loaded.keys() == group.keys()
        for key, value in group.items():
            assert_same_bits(loaded[key].reshape(-1), value.reshape(-1))


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    saved = save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint == saved
    assert found.damaged == []
    assert_holds(saved, 7)
    assert saved.path.name == "step-00000007"
    assert saved.num_bytes == sum(path.stat().st_size for path in saved.path.iterdir())
    assert (saved.path / "config.json").read_bytes() == b"{}\n"


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])
    assert latest_checkpoint(tmp_path / "none") == (None, [])


def test_retention_keeps_the_newest_that_hold(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    save(tmp_path, 4, keep=1)
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004"], "at least two are kept"
    (tmp_path / "step-00000004" / "config.json").write_bytes(b"{}\r")
    save(tmp_path, 5, keep=2)
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"], "a damaged one does not count"


def test_saving_a_step_again(tmp_path):
    save(tmp_path, 1)
    first = save(tmp_path, 2)
    assert save(tmp_path, 2) == first
    with pytest.raises(CheckpointError, match="expected no other checkpoint of this step"):
        save_checkpoint(tmp_path, 2, tensors=tensors_of(3), state=state_of(2))
    assert_holds(latest_checkpoint(tmp_path).checkpoint, 2)
    (first.path / "config.json").unlink()
    assert latest_checkpoint(tmp_path).checkpoint.step == 1
    save(tmp_path, 2)
    assert_holds(latest_checkpoint(tmp_path).checkpoint, 2)
    assert len([name for name in steps_in(tmp_path) if name.startswith("step-00000002.damaged-")]) == 1


@pytest.fixture(scope="module")
def save_events(tmp_path_factory):
    """The calls of one save with two older checkpoints there, the older of which goes."""
    folder = tmp_path_factory.mktemp("events")
    save(folder, 1)
    save(folder, 2)
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    disk = Disk(before)
    events = events_of(lambda: save(folder, 3))
    names = [event.name for event in events]
    assert {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"} <= set(names)
    for event in events:
        event.paths = tuple(before / path.relative_to(folder) for path in event.paths)
    publish = next(i for i, e in enumerate(events) if e.name == "rename" and e.paths[1] == before / "step-00000003")
    return before, disk, events, publish


def test_the_order_of_the_protocol(save_events):
    """Each file is synced before the manifest is written, all before the rename, and the parent after it."""
    before, _, events, publish = save_events
    steps = [(event.name, event.paths[-1].name) for event in events[:publish]]
    temporary = events[publish].paths[0].name
    files = ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "MANIFEST.json"]
    placed = [steps.index(("rename", name)) for name in files]
    assert placed == sorted(placed)
    for event in (event for event in events[:publish] if event.name == "write"):
        synced = [i for i, e in enumerate(events[:publish]) if e.name == "fsync" and e.paths == event.paths]
        written = max(i for i, e in enumerate(events[:publish]) if e.name == "write" and e.paths == event.paths)
        assert synced
        assert synced[-1] > written
    assert steps[-1] == ("fsync", temporary)
    after = [(event.name, event.paths[-1]) for event in events[publish + 1 :]]
    removal = next(i for i, (name, _) in enumerate(after) if name in ("rename", "unlink"))
    assert after.index(("fsync", before)) < removal, "nothing is deleted before the new checkpoint is durable"


@pytest.mark.slow
def test_death_at_every_call_leaves_a_whole_checkpoint(tmp_path, save_events):
    _, _, events, publish = save_events
    save(tmp_path / "start", 1)
    save(tmp_path / "start", 2)
    assert len(events) > 40
    for stop_at in range(len(events) + 1):
        folder = tmp_path / f"stop{stop_at}"
        shutil.copytree(tmp_path / "start", folder)
        finished = run_until(lambda folder=folder: save(folder, 3), stop_at)
        assert finished == (stop_at == len(events))
        found = latest_checkpoint(folder)
        assert found.damaged == [], f"stopped at {stop_at}: {events[stop_at]}"
        assert_holds(found.checkpoint, 3 if stop_at > publish else 2)
        for path in folder.glob("step-????????"):
            verify_checkpoint(path)
        save(folder, 4)
        assert_holds(latest_checkpoint(folder).checkpoint, 4)
        assert not [name for name in steps_in(folder) if ".tmp-" in name], "leftovers are removed"
        shutil.rmtree(folder)


@pytest.mark.parametrize("names_survive", [True, False])
def test_power_loss_at_every_call_leaves_a_whole_checkpoint(tmp_path, save_events, names_survive):
    before, _, events, publish = save_events
    disk = Disk(before)
    durable = next(i for i, e in enumerate(events) if i > publish and e.name == "fsync" and e.paths == (before,))
    for stop_at in range(len(events) + 1):
        folder = tmp_path / f"stop{stop_at}"
        disk.write_after_power_loss(folder, names_survive=names_survive)
        found = latest_checkpoint(folder)
        published = stop_at > (publish if names_survive else durable)
        assert_holds(found.checkpoint, 3 if published else 2)
        shutil.rmtree(folder)
        if stop_at < len(events):
            disk.apply(events[stop_at])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_an_error_at_every_call_is_raised_and_costs_nothing(tmp_path, save_events, code):
    _, _, _, publish = save_events
    save(tmp_path / "start", 1)
    save(tmp_path / "start", 2)
    for fail_at in range(publish):
        folder = tmp_path / f"fail{fail_at}"
        shutil.copytree(tmp_path / "start", folder)
        count = 0

        def on_event(event, fail_at=fail_at):
            nonlocal count
            count += 1
            if count - 1 == fail_at:
                raise OSError(code, os.strerror(code))

        with watch(on_event), pytest.raises(OSError, match=os.strerror(code)):
            save(folder, 3)
        assert steps_in(folder) == ["step-00000001", "step-00000002"]
        assert_holds(latest_checkpoint(folder).checkpoint, 2)
        shutil.rmtree(folder)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=300)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage)
    events = []
    with watch(events.append), pytest.raises(CheckpointError, match=r"expected \d+ bytes of free space, got 300"):
        save(tmp_path, 2)
    assert not [event for event in events if event.name != "open" or event.creates]


def _flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


FILES = ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "MANIFEST.json"]


@pytest.mark.parametrize("name", FILES)
def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path, name, caplog):
    save(tmp_path / "good", 1)
    save(tmp_path / "good", 2)
    size = (tmp_path / "good" / "step-00000002" / name).stat().st_size
    bits = range(0, 8 * size, 7 if name == "MANIFEST.json" else 8 * size // 5)
    damages = {f"flip {bit}": lambda path, bit=bit: _flip(path, bit) for bit in bits}
    damages |= {
        "truncate": lambda path: os.truncate(path, size - 1),
        "empty": lambda path: os.truncate(path, 0),
        "grow": lambda path: path.write_bytes(path.read_bytes() + b" "),
        "missing": lambda path: path.unlink(),
        "extra": lambda path: path.with_name("extra").write_bytes(b""),
        "folder": lambda path: (path.unlink(), path.mkdir()),
    }
    folder = tmp_path / "good"
    original = (folder / "step-00000002" / name).read_bytes()
    for label, damage in damages.items():
        path = folder / "step-00000002" / name
        damage(path)
        caplog.clear()
        found = latest_checkpoint(folder)
        assert found.checkpoint.step == 1, label
        assert len(found.damaged) == 1, label
        assert str(folder / "step-00000002") in str(found.damaged[0])
        assert "damaged checkpoint left out" in caplog.text
        if path.is_dir():
            path.rmdir()
        (path.parent / "extra").unlink(missing_ok=True)
        path.write_bytes(original)
    assert_holds(latest_checkpoint(folder).checkpoint, 2)


def test_every_checkpoint_damaged(tmp_path):
    for step in (1, 2):
        _flip(save(tmp_path, step).path / "state.json", 9)
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint is None
    assert [error.path.parent.name for error in found.damaged] == ["step-00000002", "step-00000001"]


def test_folders_that_only_look_like_checkpoints(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000010").write_bytes(b"")
    (tmp_path / "step-7").mkdir()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000008")
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint.step == 1
    assert [error.path.parent.name for error in found.damaged] == ["step-00000010", "step-00000009", "step-00000008"]
    assert "step: expected 8, got 1" in str(found.damaged[2])


@pytest.mark.slow
def test_sigkill_at_random_times(tmp_path):
    """A process that does nothing but save is killed again and again; what it said was saved is there."""
    import random
    import time

    rng = random.Random(0)
    newest = 0
    for _ in range(20):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            step = newest
            while True:
                step += 1
                save(tmp_path, step)
                os.write(write, step.to_bytes(8, "little"))
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            reported = [pipe.read(8)]
            time.sleep(rng.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported += iter(lambda pipe=pipe: pipe.read(8), b"")
        newest = int.from_bytes(reported[-1], "little")
        found = latest_checkpoint(tmp_path)
        assert found.damaged == []
        assert found.checkpoint.step in (newest, newest + 1)
        newest = found.checkpoint.step
        assert_holds(found.checkpoint, newest)
