"""What the package costs to import and to install, and what the wheel holds."""

import email
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
from rules import ROOT
from test_layering import NO_TORCH

WHEELS = sorted((ROOT / "build/wheel").glob("*.whl"))
# dev/test writes both after it has installed the wheel, without extras, into an empty environment.
PACKAGES, VENV_BYTES = ROOT / "build/wheel/packages.txt", ROOT / "build/wheel/venv_bytes.txt"
MB = 1_000_000


def child(source, **environment):
    result = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- import -----------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing():
    loaded = child("import sys; import pyengine; print(pyengine.__version__); print(*sys.modules)").split()
    heavy = {"numpy", "torch", "click", "rich", "msgspec", "tokenizers", "yaml", "pyengine._C"}
    assert not heavy & set(loaded)


HELP = """
import sys
from pyengine.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"numpy", "torch", "tokenizers", "msgspec"}, loaded
assert "pyengine._C" not in sys.modules
"""


def processor_seconds(arguments):
    """User and system time of a child that runs to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_loads_no_engine_and_costs_little():
    arguments = [sys.executable, "-c", HELP, "--help"]
    assert "Usage" in subprocess.run(arguments, capture_output=True, text=True, timeout=120).stdout
    # Processor time, which other work on the machine does not lengthen much; the least of five, to shed cold caches.
    assert min(processor_seconds(arguments) for _ in range(5)) < 0.2


BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Blocker())
sys.modules["torch"] = None
"""


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_packages_for_inference_import_without_torch(name):
    child(BLOCKER + f"import pyengine.{name}")


def test_every_module_for_inference_imports_without_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name in sorted(NO_TORCH | {"cli"})
        for path in [ROOT / f"pyengine/{name}.py", *sorted((ROOT / f"pyengine/{name}").rglob("*.py"))]
        # The worker is a program: importing it would read from standard input.
        if path.is_file() and path.stem not in ("template_worker", "__main__")
    ]
    assert len(modules) > 40
    child(BLOCKER + "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in modules))


def test_the_public_names_exist():
    import pyengine

    has_torch = importlib.util.find_spec("torch") is not None
    for name in pyengine.__all__:
        if has_torch or name in NO_TORCH | {"LLM", "SamplingParams", "__version__"}:
            assert getattr(pyengine, name) is not None
    with pytest.raises(AttributeError, match="module 'pyengine' has no attribute 'absent'"):
        _ = pyengine.absent


def test_torch_is_absent_where_it_must_be():
    """dev/test sets this for its first run, against an environment without torch."""
    if not os.environ.get("PYENGINE_EXPECT_NO_TORCH"):
        pytest.skip("dev/test sets PYENGINE_EXPECT_NO_TORCH for its run without torch")
    with pytest.raises(ImportError):
        importlib.import_module("torch")


# --- the wheel --------------------------------------------------------------------------------------------------------

needs_wheel = pytest.mark.skipif(not WHEELS, reason="no wheel in build/wheel: dev/test makes one")
needs_install = pytest.mark.skipif(
    not PACKAGES.exists() or not VENV_BYTES.exists(),
    reason="dev/test records an install",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    assert len(WHEELS) == 1, f"expected one wheel, got {[path.name for path in WHEELS]}"
    with zipfile.ZipFile(WHEELS[0]) as archive:
        archive.extractall(folder)
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


@needs_wheel
def test_wheel_is_small():
    assert WHEELS[0].stat().st_size <= 20 * MB


@needs_wheel
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(files_of(wheel))
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "pyengine").rglob("*.py")}
    extensions = {name for name in names if name.endswith(".so")}
    assert len(extensions) == 1
    assert sources <= names
    assert "pyengine/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    others = {name for name in names - sources - extensions if ".dist-info/" not in name}
    assert {name for name in others if not name.endswith((".typed", ".pyi", ".json", ".yaml"))} == set()


@needs_wheel
def test_metadata_names_what_is_needed(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text())
    required = message.get_all("Requires-Dist")
    base = {re.split(r"[\s<>=!;\[]", line)[0].lower() for line in required if "extra ==" not in line}
    assert "torch" not in base
    assert {"numpy", "safetensors", "tokenizers"} <= base
    assert message["License-Expression"] == "Apache-2.0"
    assert "train" in message.get_all("Provides-Extra")


@needs_wheel
def test_wheel_names_no_folder_of_the_machine_that_built_it(wheel):
    root = str(ROOT).encode()
    for name, path in files_of(wheel).items():
        data = path.read_bytes()
        assert root not in data, name
        found = re.search(rb"/(?:work|root|home|tmp)/[\w.-]+", data) if name.endswith(".so") else None
        assert not found, f"{name}: {found and found.group()}"


@needs_wheel
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf to read the extension with")
def test_the_extension_links_the_system_alone(wheel):
    (extension,) = wheel.rglob("*.so")
    dynamic = subprocess.run(["readelf", "-d", str(extension)], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "TEXTREL" not in dynamic
    assert "BIND_NOW" in dynamic
    libraries = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)}
    assert libraries <= {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "libdl", "ld-linux-x86-64"}
    symbols = subprocess.run(
        ["readelf", "-Ws", "--dyn-syms", str(extension)], capture_output=True, text=True, check=True
    )
    defined = re.findall(r"\sDEFAULT\s+\d+ (\S+)", symbols.stdout)
    assert "PyInit__C" in defined
    assert not [name for name in defined if re.match(r"_ZN?K?2pe", name)], "names of pe are exported"
    assert "GOMP_" not in symbols.stdout


@needs_install
def test_install_is_small():
    lines = PACKAGES.read_text().splitlines()
    names = {line.split("==")[0].split(" @ ")[0].lower() for line in lines if line.strip()}
    assert "pyengine" in names
    assert not {name for name in names if name == "torch" or name.startswith("nvidia-")}
    assert len(names) <= 30, sorted(names)
    assert int(VENV_BYTES.read_text()) <= 250 * MB
