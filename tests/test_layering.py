"""The import rules of docs/layout.md, as a test: packages import only what stands below them."""

import ast
import re

import pytest
from rules import ROOT, tracked

# What each package may import besides itself, `errors` and the version in `pyengine`.
CORE = {"_C", "spec", "jsonfile", "ledger", "families", "tokenizer", "formats", "adapters"}
TORCH = CORE | {"reference", "ops", "nn", "optim", "models", "train"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "rope_spec": set(),
    "spec": {"rope_spec"},
    "jsonfile": set(),
    "ledger": set(),
    "formats": {"_C"},
    "families": {"spec", "jsonfile"},
    "tokenizer": {"spec", "jsonfile", "formats"},
    "adapters": {"spec", "jsonfile", "ledger", "families", "formats"},
    "infer": CORE,
    "reference": set(),
    "ops": {"_C", "reference"},
    "nn": {"ops", "spec"},
    "optim": {"ops"},
    "models": {"ops", "nn", "spec", "jsonfile", "families", "formats", "adapters"},
    "data": {"spec", "ledger", "tokenizer", "formats"},
    "evals": {"infer", "data"} | CORE,
    "quant": {"infer", "data"} | CORE,
    "report": {"ledger"},
    "train": TORCH - {"train"} | {"data", "evals"},
    "calibrate": {"nn", "models", "data", "tokenizer", "formats"},
    "recipes": TORCH | {"data", "evals", "quant", "infer"},
    "demo": TORCH | {"data", "evals", "quant", "infer", "report", "calibrate", "recipes"},
    "testing": {"_C", "reference", "ops", "spec", "families", "tokenizer", "formats", "adapters"},
}
NO_TORCH = {
    "errors",
    "rope_spec",
    "spec",
    "jsonfile",
    "ledger",
    "formats",
    "families",
    "tokenizer",
    "adapters",
    "infer",
    "data",
    "evals",
    "quant",
    "report",
}


def package_of(path):
    parts = path.relative_to(ROOT / "pyengine").parts
    return parts[0].removesuffix(".py")


def imports(path):
    """(top-level pyengine package or outside module, whether at module level) of every import in a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from names


FILES = [path for path in tracked("pyengine/**/*.py") if package_of(path) not in ("__init__", "cli", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_import_only_what_lies_below_them(path):
    package = package_of(path)
    assert package in ALLOWED, f"pyengine/{package} has no row in this table: decide what it may import"
    allowed = ALLOWED[package] | {package, "errors", "__version__"}
    modules = {p.stem for p in (ROOT / "pyengine").iterdir() if p.suffix == ".py" or p.is_dir()}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("pyengine.")}
    wrong = {name for name in used if name in modules | {"_C"}} - allowed
    assert not wrong, f"{path.relative_to(ROOT)} may not import pyengine.{', pyengine.'.join(sorted(wrong))}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if package_of(p) in NO_TORCH], ids=lambda p: str(p.relative_to(ROOT))
)
def test_inference_never_imports_torch(path):
    assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "transformers")]


# Native layers: which folders of csrc/ (and which outside headers) a file may include.
NATIVE = {
    "csrc/include/pe": {"pe"},
    "csrc/simd": {"pe", "simd"},
    "csrc/runtime": {"pe", "runtime"},
    "csrc/formats": {"pe", "runtime", "formats"},
    "csrc/cpu": {"pe", "runtime", "simd", "cpu"},
    "csrc/engine": {"pe", "runtime", "engine", "formats"},
    "csrc/bindings": {"pe", "runtime", "formats", "engine", "bindings"},
    "cuda": {"pe", "common"},
}


@pytest.mark.parametrize("folder", NATIVE)
def test_native_includes_point_downwards(folder):
    sources = [p for p in tracked(f"{folder}/**/*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for path in sources:
        # Headers of csrc/cpu hold declarations and static functions only; tests/test_objects.py sees what would leak.
        allowed = {"pe", "simd", "cpu"} if path.name.endswith(".isa.cpp") else NATIVE[folder]
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            top = name.split("/")[0] if "/" in name else None
            generated = name.endswith(".inc")
            assert generated or top in allowed, f"{path.relative_to(ROOT)} may not include {name}"


@pytest.mark.parametrize("path", tracked("csrc/**/*.isa.cpp"), ids=lambda p: p.name)
def test_isa_sources_include_no_standard_library(path):
    wrong = set(re.findall(r"#include <([^>]+)>", path.read_text())) - {"math.h", "stdint.h", "string.h", "immintrin.h"}
    assert not wrong, f"{path.name}: {wrong} would put inline code into an ISA object"


def test_only_ops_testing_and_inference_touch_the_native_module():
    users = {package_of(p) for p in FILES if any(name.endswith("pyengine._C") for name in imports(p))}
    assert users <= {"ops", "testing", "infer", "formats", "tokenizer", "demo"}


def rows_of_layout():
    """The rows `| name | ... | what it may import |` of docs/layout.md: name -> (marked as free of torch, imports)."""
    text = (ROOT / "docs/layout.md").read_text()
    found = re.findall(r"^\| `([\w/]+)`(\*?) \|.*\|([^|]*)\|$", text, re.MULTILINE)
    return {name: (star == "*", set(re.findall(r"`(\w+)`", cell))) for name, star, cell in found}


def test_the_document_shows_these_tables():
    rows = rows_of_layout()
    assert {name: imports for name, (_, imports) in rows.items()} == ALLOWED | NATIVE
    assert {name for name, (no_torch, _) in rows.items() if no_torch} == NO_TORCH
