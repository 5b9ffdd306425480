"""pyengine/_C.pyi names what the native module has, no more and no less."""

import ast

from rules import ROOT

from pyengine import _C


def members(tree):
    names = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = None
        elif isinstance(node, ast.ClassDef):
            names[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.AnnAssign) and node.target.id != "Tensor":
            names[node.target.id] = None
    return names


def test_stub_and_module_agree():
    stub = members(ast.parse((ROOT / "pyengine/_C.pyi").read_text()))
    module = {name for name in dir(_C) if not name.startswith("_")}
    assert set(stub) == module
    for name, methods in stub.items():
        if methods is not None:
            real = {m for m in vars(getattr(_C, name)) if not m.startswith("_")}
            assert {m for m in methods if not m.startswith("_")} == real, name
