from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest

pytest.importorskip("torch")

from pyengine.errors import ConfigError
from pyengine.train.config import Config, Range, load_config, to_yaml

pytestmark = pytest.mark.train


@dataclass(frozen=True, kw_only=True)
class Optim(Config):
    lr: Annotated[float, Range(above=0.0, high=1.0)] = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    kind: Literal["adamw", "on"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class Run(Config):
    steps: Annotated[int, Range(low=1)]
    optim: Optim = Optim()
    folder: Path = Path("run")
    name: str = "x"
    compile: bool = False
    window: Annotated[int, Range(low=1)] | None = None

    def check(self) -> None:
        if self.window is not None and self.window > self.steps:
            raise ConfigError(f"expected at most steps = {self.steps}, got {self.window}", key="window")


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(Run, path, overrides)


def test_file_defaults_and_overrides(tmp_path):
    config = load(tmp_path, "steps: 10\noptim:\n  lr: 3e-4\n  kind: on\n", "optim.betas=[0.8, 1]", "window=7", "name=7")
    assert config == Run(
        steps=10, optim=Optim(lr=3e-4, betas=(0.8, 1.0), kind="on"), window=7, name="7", folder=Path("run")
    )
    assert type(config.optim.betas[1]) is float
    assert load_config(Run, None, ["steps=3"]) == Run(steps=3)
    assert load(tmp_path, "steps: 3\noptim:\n").optim == Optim()
    assert load(tmp_path, "steps: 3\nwindow: 2\n", "window=null").window is None
    assert load(tmp_path, "steps: 3\noptim:\n  lr: 1e-2", "optim.kind=on").optim == Optim(lr=1e-2, kind="on")


@pytest.mark.parametrize("steps", [1, 10**12])
def test_yaml_round_trip(tmp_path, steps):
    config = Run(
        steps=steps, optim=Optim(lr=1e-08, betas=(0.1,)), folder=Path("a b/ü"), name="null", compile=True, window=1
    )
    assert load(tmp_path, to_yaml(config)) == config
    awkward = replace(config, name="3e-4", window=None)
    assert load(tmp_path, to_yaml(awkward)) == awkward
    assert load(tmp_path, to_yaml(replace(config, name="a: b # 'c'\n"))).name == "a: b # 'c'\n"


@pytest.mark.parametrize(
    ("text", "key", "line", "message"),
    [
        ("steps: 1\nstep: 2\n", "step", 2, "perhaps 'steps'"),
        ("steps: 1\noptim:\n  lr: 1\n  learning: 2\n", "optim.learning", 4, "expected a known key"),
        ("steps: 1\noptim:\n  bettas: [1]\n", "optim.bettas", 3, "perhaps 'betas'"),
        ("steps: 1\nwimdow:\n  - 3\n", "wimdow", 2, "perhaps 'window'"),
        ("name: a\n", "steps", 1, "expected a value, got none"),
        ("\nsteps: ten\n", "steps", 2, "expected an integer, got 'ten'"),
        ("steps: 1.5\n", "steps", 1, "expected an integer, got '1.5'"),
        ("steps: '3'\n", "steps", 1, "expected an integer, got '3'"),
        ("steps: true\n", "steps", 1, "expected an integer, got 'true'"),
        ("steps: null\n", "steps", 1, "expected an integer, got nothing"),
        ("steps: [1]\n", "steps", 1, "expected one value, got a list"),
        ("steps: 0\n", "steps", 1, "expected at least 1, got 0"),
        ("steps: 1\noptim: {lr: 0}\n", "optim.lr", 2, "expected more than 0 and at most 1, got 0"),
        ("steps: 1\noptim:\n  lr: 1.1\n", "optim.lr", 3, "expected more than 0 and at most 1, got 1.1"),
        ("steps: 1\noptim:\n  lr: .nan\n", "optim.lr", 3, "expected a number, got '.nan'"),
        ("steps: 1\noptim:\n  lr: nan\n", "optim.lr", 3, "expected a number, got nan"),
        ("steps: 1\noptim: 3\n", "optim", 2, "expected a mapping, got '3'"),
        ("steps: 1\noptim:\n  betas: 3\n", "optim.betas", 3, "expected a list, got '3'"),
        ("steps: 1\noptim:\n  betas:\n  - 0.9\n  - x\n", "optim.betas[1]", 5, "expected a number, got 'x'"),
        ("steps: 1\noptim:\n  kind: adam\n", "optim.kind", 3, "expected one of adamw, on, got 'adam'"),
        ("steps: 1\ncompile: yes\n", "compile", 2, "expected true or false, got 'yes'"),
        ("steps: 1\nwindow: 0\n", "window", 2, "expected at least 1, got 0"),
        ("steps: 2\nwindow: 3\n", "window", 2, "expected at most steps = 2, got 3"),
        ("steps: 1\nsteps: 2\n", "steps", 2, "expected every key once"),
    ],
)  # fmt: skip
def test_errors_name_key_file_and_line(tmp_path, text, key, line, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert error.value.key == key
    assert error.value.file == str(tmp_path / "run.yaml")
    assert error.value.line == line
    assert message in str(error.value)
    assert f"run.yaml:{line}: {key}" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: *a\n",
        "- 1\n",
        "steps: [1\n",
        "? [a]\n: 1\n",
        "steps: \x07\n",
        "a:" * 3,
        "[" * 500_000,
        "{a: " * 100_000,
        "- " * 100_000,
    ],
)
def test_hostile_yaml_is_a_config_error(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(tmp_path, text)


def test_limits_of_the_file(tmp_path):
    with pytest.raises(ConfigError, match="expected at most 1048576 bytes"):
        load(tmp_path, "#" * (1 << 20) + "\n")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(Run, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected KEY.KEY=VALUE, got 'steps'"),
        ("=3", "expected KEY.KEY=VALUE"),
        ("optim..lr=3", "expected KEY.KEY=VALUE"),
        ("optim.lr=big", "optim.lr: expected a number, got 'big'"),
        ("optim.rl=1", "optim.rl: expected a known key, perhaps 'lr', got 'rl'"),
        ("optim=3", "optim: expected a mapping, got '3'"),
        ("steps.x=3", "steps: expected one value, got a mapping"),
        ("steps={", "expected YAML"),
    ],
)
def test_override_errors(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Run, None, ["steps=2", override])


def test_python_values_are_checked_too():
    with pytest.raises(ConfigError, match="steps: expected at least 1, got 0"):
        Run(steps=0)
    with pytest.raises(ConfigError, match="steps: expected an integer, got True"):
        Run(steps=True)
    with pytest.raises(ConfigError, match="optim: expected Optim, got 3"):
        Run(steps=1, optim=3)
    with pytest.raises(ConfigError, match=r"betas\[1\]: expected a number, got 'x'"):
        Optim(betas=(1.0, "x"))
    assert Run(steps=1, folder="a").folder == Path("a")
