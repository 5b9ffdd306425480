"""ISA objects export only their own namespace and run no code at load time (dev/check_objects.py)."""

import subprocess
import sys

import pytest
from rules import ROOT

sys.path.insert(0, str(ROOT / "dev"))
from check_objects import problems

OBJECTS = sorted(
    path
    for folder in (ROOT / "build").glob("*")
    for path in folder.glob("CMakeFiles/pyengine_core_*.dir/csrc/cpu/*.isa.cpp.o")
)


@pytest.mark.skipif(not OBJECTS, reason="no objects of a build below build/")
def test_isa_objects_are_clean():
    found = [
        problem
        for path in OBJECTS
        for problem in problems(str(path), path.parts[-4].removeprefix("pyengine_core_").removesuffix(".dir"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("template <class T> T twice(T x) { return x + x; } template int twice(int);", "shared inline copy"),
        ("int leak(int x) { return x; }", "exported from outside"),
        ("int f(); int value = f();", "runs at load time"),
        ('void mix() { asm volatile("movdq2q %%xmm0, %%mm0" ::: "mm0"); }', "MMX register"),
    ],
)
def test_checker_sees_planted_mistakes(tmp_path, source, complaint):
    (tmp_path / "bad.cpp").write_text(source)
    subprocess.run(["g++", "-c", "bad.cpp", "-o", "bad.o"], cwd=tmp_path, check=True)
    assert any(complaint in problem for problem in problems(str(tmp_path / "bad.o"), "avx2"))
