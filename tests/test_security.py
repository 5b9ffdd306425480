"""Promises of SECURITY.md that hold for the source as a whole."""

import ast
import re

import pytest
from rules import ROOT, tracked

SOURCES = tracked("pyengine/**/*.py")
# Modules that can run code from what they read, and functions that do.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("np", "load"),
}


def offences(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(id=name) if name in FORBIDDEN_CALLS:
                    yield name
                case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in FORBIDDEN_ATTRIBUTES:
                    yield f"{owner}.{name}"
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and not allowed:
                    yield f"{keyword.arg}="


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_reads_pickle_or_runs_what_it_read(path):
    assert not list(offences(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "yaml.load(text, Loader)",
        "np.load(path, allow_pickle=True)",
        "exec(source)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_checker_sees_planted_offences(source):
    assert list(offences(source))


def test_native_code_never_aborts_on_purpose():
    # Not in a release: this model of a processor ends where the processor would fault.
    development = ROOT / "csrc/runtime/tile_emulator.cpp"
    for path in {*tracked("csrc/**/*.cpp"), *tracked("csrc/**/*.h")} - {development}:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        found = re.search(r"\b(?:abort|assert|terminate|_Exit|exit|strcpy|sprintf|alloca)\s*\(", code)
        assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_every_proof_that_the_document_names_exists():
    text = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE)[1:]
    proofs = [path for _, cell in rows for path in re.findall(r"`([^`]+)`", cell)]
    assert len(proofs) > 10
    assert all((ROOT / path).is_file() for path in proofs)
