"""dev/new_op writes an op that compiles and registers; its rule tests pass, its own tests fail until it is written."""

import shutil
import subprocess
import sys
import sysconfig

import pybind11
import pytest
from rules import ROOT, tracked

NEW_OP = ROOT / "dev/new_op"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
LEVELS = {"scalar": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}


def run(arguments, folder=ROOT):
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", params=["x2", "a_name_of_the_most_chars"])
def tree(request, tmp_path_factory):
    """(copy of the source tree with a new op in it, its name)."""
    copy = tmp_path_factory.mktemp("tree")
    for pattern in ["csrc/**/*", "cuda/**/*", "pyengine/**/*.py", "tests/*.py", "bench/*.py", "dev/**/*", "*.toml"]:
        for path in tracked(pattern):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (copy / "tests/ops").mkdir()
    result = run([sys.executable, str(copy / "dev/new_op"), request.param], copy)
    assert result.returncode == 0, result.stderr
    return copy, request.param


def test_help_shows_an_example():
    result = run([sys.executable, str(NEW_OP), "--help"])
    assert result.returncode == 0
    assert "example: dev/new_op " in result.stdout


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rms_norm", "expected a new op; 'rms_norm' has bench/bench_rms_norm.py"),
        ("runtime", "expected a new op; 'runtime' has csrc/bindings/runtime.cpp"),
        ("RmsNorm", "lower-case words"),
        ("a__b", "lower-case words"),
        ("2d", "lower-case words"),
        ("../x", "lower-case words"),
        ("", "lower-case words"),
        ("x" * 25, "at most 24 characters, got 25"),
        ("softmax_fwd", "without direction or device"),
        ("lambda", "leave free"),
        ("double", "leave free"),
    ],
)
def test_bad_names_are_refused_and_write_nothing(name, complaint):
    before = set(tracked("**/*"))
    result = run([sys.executable, str(NEW_OP), name])
    assert result.returncode == 2
    assert complaint in result.stderr
    assert set(tracked("**/*")) == before


@pytest.mark.slow
def test_rule_tests_pass(tree):
    folder, name = tree
    arguments = ["-q", "-p", "no:cacheprovider", "--noconftest", "tests/test_inventory.py", "tests/test_layering.py"]
    result = run([sys.executable, "-m", "pytest", *arguments, "-k", name], folder)
    assert result.returncode == 0, result.stdout
    # Contract, files, layering of the two Python files, and of the ISA source.
    assert " 5 passed" in "\n" + result.stdout.replace("\n", " "), result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile them")
def test_native_files_compile(tree, tmp_path):
    folder, name = tree
    headers = tmp_path / "pe"
    headers.mkdir()
    spaces = "".join(f"namespace {level} {{ extern const Type name; }} " for level in ("scalar", "avx2", "avx512"))
    (headers / "isa.h").write_text(
        "#pragma once\nnamespace pe { enum class Isa : int { scalar, avx2, avx512 }; }\n"
        f"#define PE_DECLARE_ISA_TABLE(Type, name) {spaces} static_assert(true)\n"
    )
    includes = [f"-I{folder}/csrc/include", f"-I{folder}/csrc", f"-I{tmp_path}"]
    python_includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}", "-fvisibility=hidden"]
    sources = [(f"csrc/cpu/{name}.cpp", []), (f"csrc/bindings/{name}.cpp", python_includes)]
    sources += [(f"csrc/cpu/{name}.isa.cpp", [f"-DPE_ISA={level}", *flags]) for level, flags in LEVELS.items()]
    for source, flags in sources:
        result = run(["g++", *FLAGS, *includes, *flags, source], folder)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_tools_find_nothing(tree):
    folder, name = tree
    bin_folder = sys.prefix + "/bin/"
    python = [str(path) for path in folder.glob(f"**/*{name}.py")]
    native = [str(path) for path in folder.glob(f"csrc/**/{name}.*")]
    assert len(python) == 4
    assert len(native) == 4
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        result = run([bin_folder + command[0], *command[1:], *python], folder)
        assert result.returncode == 0, result.stdout
    (folder / ".clang-format").write_text((ROOT / ".clang-format").read_text())
    result = run([bin_folder + "clang-format", "--dry-run", "-Werror", *native], folder)
    assert result.returncode == 0, result.stderr


# Stands in for the native module: what the bindings of the new op do.
STAND_IN = """
import sys, types
import torch
native = types.ModuleType("pyengine._C")
copy = lambda source, target: target.copy_(source)
native.{name}_fwd_cpu = native.{name}_bwd_cpu = copy
native.available_isas = lambda: ["scalar"]
native.num_threads = lambda: 1
native.set_num_threads = native.set_active_isa = lambda value: None
import pyengine
sys.modules["pyengine._C"] = pyengine._C = native
"""


@pytest.mark.slow
def test_its_own_tests_fail_where_it_is_not_written(tree):
    folder, name = tree
    (folder / "tests/conftest.py").write_text(
        STAND_IN.format(name=name)
        + "import pytest\n@pytest.fixture(params=['scalar'])\ndef isa(request):\n    return request.param\n"
    )
    (folder / "pyengine/ops/__init__.py").write_text("")
    arguments = ["-q", "-p", "no:cacheprovider", f"tests/ops/test_{name}.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-k", "not opcheck and not compiles"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    failed = {line.split("::")[1].split("[")[0].split(" ")[0] for line in result.stdout.splitlines() if "::" in line}
    expected = {"test_nothing_is_left_to_fill", "test_matches_reference", "test_gradcheck_of_the_reference"}
    assert expected <= failed
    # It registers, runs, and copies.
    assert "test_nan_stays_in_its_row" not in failed
    assert "test_error_names_the_op_the_argument_and_both_dtypes" not in failed
