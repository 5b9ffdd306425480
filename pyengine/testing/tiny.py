"""Tiny random models on disk, made by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a language model predicts the next token of a text",
    "user assistant system 0123456789 (x + y) * z = 42;",
    "naïve café, пример текста, 文字の例, 😀 emoji",
] * 4


def tiny_llama(folder: Path, *, seed: int = 0, vocab_size: int = 384, **overrides: Any) -> Path:
    """Writes a random LlamaForCausalLM with a trained byte-level BPE tokenizer as a Hugging Face folder.

    `overrides` are fields of LlamaConfig. Returns `folder`. Needs torch and transformers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(values | overrides)))
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder, vocab_size=vocab_size)
    return folder


def tiny_model(
    folder: Path,
    model_type: str,
    *,
    dtype: Any = None,
    seed: int = 0,
    auto_class: str = "AutoModelForCausalLM",
    **overrides: Any,
) -> Path:
    """As `tiny_llama`, for any `model_type` and any `auto_class` of transformers; `overrides` are fields of its config.

    Weights are large enough that attention and text depend on the whole context, and norms and biases are random too:
    transformers starts them at 1 and 0, where many mistakes do not show.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **(values | overrides))
        model = getattr(transformers, auto_class).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.to(dtype or torch.float32).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path, *, vocab_size: int = 384) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja (ChatML) in `folder`. Needs tokenizers only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE, encoding="utf-8")
