"""Builds the C++ tests beside this file under sanitizers and runs them."""

import os
import shutil
import subprocess

import pytest
from rules import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build them")]

FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer", "-pthread"]
SOURCES = {
    "checked": [],
    "arena": ["runtime/arena", "runtime/error"],
    "thread_pool": ["runtime/parallel", "runtime/error"],
    "kv_cache": ["engine/kv_cache", "engine/prefix_index", "runtime/arena", "runtime/error"],
}
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"],
    # GCC 12 warns that it does not model fences; the pool uses none.
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}
HANG_SECONDS = 300


def build(folder, sources, sanitizer):
    executable = folder / "test"
    command = [
        "g++",
        *FLAGS,
        *SANITIZERS[sanitizer],
        f"-I{ROOT}/csrc",
        f"-I{ROOT}/csrc/include",
        f"-I{ROOT}/tests/native",
    ]
    result = subprocess.run([*command, *sources, "-o", str(executable)], capture_output=True, text=True)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip(f"g++ has no library for -fsanitize={sanitizer}")
    assert result.returncode == 0, result.stderr
    return executable


def run(executable, *arguments):
    options = {"TSAN_OPTIONS": "halt_on_error=0:exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [str(executable), *arguments], env=os.environ | options, capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.mark.parametrize(("name", "sanitizer"), [*((name, "address") for name in SOURCES), ("thread_pool", "thread")])
def test_native(tmp_path, name, sanitizer):
    sources = [f"{ROOT}/tests/native/{name}.cpp", *(f"{ROOT}/csrc/{part}.cpp" for part in SOURCES[name])]
    arguments = ["fork"] if name == "thread_pool" and sanitizer == "address" else []
    result = run(build(tmp_path, sources, sanitizer), *arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("sanitizer", "source", "complaint"),
    [
        (
            "address",
            "int main(int n, char**) { int* volatile p = new int[2](); volatile int x = p[n + 1]; return x; }",
            "heap-buffer-overflow",
        ),
        (
            "address",
            "int main(int n, char**) { volatile int x = 0x7fffffff; x = x + n; return 0; }",
            "signed integer overflow",
        ),
        (
            "thread",
            "#include <thread>\nint main() { int x = 0; std::thread t([&] { ++x; }); ++x; t.join(); return x * 0; }",
            "data race",
        ),
    ],
    ids=["overflow", "undefined", "race"],
)
def test_the_sanitizer_sees_planted_bugs(tmp_path, sanitizer, source, complaint):
    (tmp_path / "bad.cpp").write_text(source + "\n")
    result = run(build(tmp_path, [str(tmp_path / "bad.cpp")], sanitizer))
    assert result.returncode != 0
    assert complaint in result.stderr
