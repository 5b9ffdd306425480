"""Documents name only paths that exist, and the project speaks of itself alone."""

import re

import pytest
from rules import ROOT, tracked

DOCUMENTS = [*tracked("*.md"), *tracked("docs/**/*.md"), *tracked("dev/*.md")]
TOPS = "cmake|csrc|cuda|pyengine|bench|tests|dev|docs|examples"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_in_a_document_exists(path):
    if path.name == "LOG.md":
        return  # a log may name what is gone
    for name in re.findall(rf"(?:^|[\s`(])((?:{TOPS})/[\w./-]*\w)", path.read_text()):
        if not any(mark in name for mark in ("<", "NNNN")):
            there = (ROOT / name).exists() or list(ROOT.glob(name + "*"))
            assert there, f"{path.name} names {name}, which is not there"


def test_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "dev/demo" in text
    assert "dev/test" in text


@pytest.mark.parametrize(
    "pattern", ["pyengine/**/*.py", "csrc/**/*.*", "docs/**/*.md", "*.md", "dev/**/*", "tests/**/*"]
)
def test_no_path_of_a_machine(pattern):
    for path in tracked(pattern):
        found = re.search(r"(?<![\w.])/(?:work|root|home)/\w+", path.read_text(errors="replace"))
        assert not found or path.name == "test_docs.py", f"{path.relative_to(ROOT)}: {found and found.group()}"
