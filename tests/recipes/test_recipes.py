import json
import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.data.jsonl import Conversation, Message, write_jsonl  # noqa: E402
from pyengine.data.shards import TokenisedDocument, shard_content_id, write_shard  # noqa: E402
from pyengine.errors import ArgumentError, ConfigError  # noqa: E402
from pyengine.ledger import content_id, read  # noqa: E402
from pyengine.models import CausalLM, from_pretrained, save_pretrained  # noqa: E402
from pyengine.recipes import pretrain, sft  # noqa: E402
from pyengine.spec import ModelSpec, RopeSpec  # noqa: E402
from pyengine.testing import assert_same_bits  # noqa: E402
from pyengine.testing.tiny import write_tiny_tokenizer  # noqa: E402
from pyengine.tokenizer import ChatTemplate, Tokenizer  # noqa: E402
from pyengine.train.config import load_config, to_yaml  # noqa: E402

pytestmark = pytest.mark.train

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a language model predicts the next token of a text",
    "user assistant system 0123456789",
    "naïve café, пример текста",
] * 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a tokenizer, two shards, conversations, and a model to fine-tune."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = [
        TokenisedDocument(str(number), [*tokenizer.encode(text), end], len(text.encode()))
        for number, text in enumerate(TEXTS)
    ]
    write_shard(folder / "train", documents, vocab_size=384, tokenizer=content_id(folder / "tokenizer.json"))
    write_shard(folder / "eval", documents[:4], vocab_size=384, tokenizer=content_id(folder / "tokenizer.json"))
    conversations = [
        Conversation(
            [Message("user", f"what comes after {number}?"), Message("assistant", f"after {number} comes {number + 1}")]
        )
        for number in range(12)
    ]
    write_jsonl(folder / "chat.jsonl", conversations)
    spec = ModelSpec(
        family="llama", vocab_size=384, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, max_position_embeddings=128, norm_eps=1e-5, rope=RopeSpec(theta=10000.0), tie_word_embeddings=True,
    )  # fmt: skip
    save_pretrained(CausalLM(spec, seed=1), folder / "base")
    write_tiny_tokenizer(folder / "base")
    return folder


def pretrain_config(data, folder, *overrides):
    text = f"""
folder: {folder}
tokenizer: {data}
data: {{train: {data / "train"}, eval: {data / "eval"}, seq_len: 48}}
model: {{hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 8}}
loop: {{num_steps: 60, rows_per_step: 4, eval_every: 20, checkpoint_every: 20}}
optim: {{learning_rate: 1e-2}}
schedule: {{shape: wsd, warmup_steps: 5, decay_steps: 20}}
"""
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(text)
    return load_config(pretrain.PretrainConfig, path, overrides)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pretraining_memorises_a_toy_corpus(data, tmp_path, dtype):
    config = pretrain_config(data, tmp_path / "run", f"dtype={dtype}")
    result = pretrain.run(config)
    losses = [json.loads(line)["train/loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(384), rel=0.1)
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert result.eval_loss < 0.3 * losses[0]
    model, tokenizer = from_pretrained(result.model_folder), Tokenizer.from_folder(result.model_folder)
    start = tokenizer.encode("the quick brown fox jumps over the")
    with torch.no_grad():
        following = int(model(torch.tensor(start))[-1].argmax())
    assert tokenizer.encode("the quick brown fox jumps over the lazy dog")[len(start)] == following
    checkpoint, train = read(result.folder)[-2:]
    assert train.kind == "train"
    assert train.inputs == checkpoint.inputs
    assert train.inputs["train_shard"] == shard_content_id(data / "train")
    assert train.inputs["eval_shard"] == shard_content_id(data / "eval")
    assert train.facts["config"]["data"]["seq_len"] == 48
    again = load_config(pretrain.PretrainConfig, result.folder / "config.yaml")
    assert again == config


def test_pretraining_is_a_pure_function_of_its_configuration(data, tmp_path):
    short = ["loop.num_steps=3", "loop.checkpoint_every=null", "schedule.decay_steps=0"]
    models = [
        from_pretrained(pretrain.run(pretrain_config(data, tmp_path / name, *short, *more)).model_folder)
        for name, more in (("a", []), ("b", []), ("c", ["seed=1"]))
    ]
    for name, value in models[0].state_dict().items():
        assert_same_bits(models[1].state_dict()[name], value)
    assert not torch.equal(models[2].output_weight, models[0].output_weight)


def test_continued_pretraining_begins_with_the_given_model(data, tmp_path):
    overrides = ["loop.num_steps=1", "optim.learning_rate=1e-9", f"init_from={data / 'base'}", "schedule.decay_steps=0"]
    result = pretrain.run(pretrain_config(data, tmp_path / "run", *overrides))
    base, model = from_pretrained(data / "base"), from_pretrained(result.model_folder)
    torch.testing.assert_close(model.output_weight, base.output_weight, rtol=1e-6, atol=1e-8)
    assert read(result.folder)[-1].inputs["init_from"] == content_id(data / "base")


def test_rows_longer_than_the_model_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"data.seq_len: expected at most model.max_position_embeddings = 32, got 48"):
        pretrain.run(pretrain_config(data, tmp_path / "run", "model.max_position_embeddings=32"))


def test_a_model_with_a_smaller_vocabulary_is_refused(data, tmp_path):
    small = from_pretrained(data / "base").spec
    save_pretrained(CausalLM(replace(small, vocab_size=100)), tmp_path / "small")
    with pytest.raises(ArgumentError, match=r"data.train: expected ids of at most 100 tokens, got 384"):
        pretrain.run(pretrain_config(data, tmp_path / "run", f"init_from={tmp_path / 'small'}"))


def sft_config(data, folder, *overrides):
    loop = ["loop.num_steps=40", "loop.rows_per_step=2", "loop.checkpoint_every=20", "loop.eval_every=20"]
    optim = ["optim.learning_rate=1e-2", "dtype=float32"]
    paths = [f"folder={folder}", f"model={data / 'base'}", f"data.train={data / 'chat.jsonl'}", "data.seq_len=96"]
    return load_config(sft.SftConfig, None, [*paths, f"data.eval={data / 'chat.jsonl'}", *loop, *optim, *overrides])


def test_fine_tuning_learns_what_the_assistant_says(data, tmp_path):
    result = sft.run(sft_config(data, tmp_path / "run"))
    losses = [json.loads(line)["train/loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert ChatTemplate.from_folder(result.model_folder).source == ChatTemplate.from_folder(data / "base").source
    ids = [Tokenizer.from_folder(folder).encode("a b") for folder in (result.model_folder, data / "base")]
    assert ids[0] == ids[1]
    train = read(result.folder)[-1]
    assert train.facts["stage"] == "sft"
    assert train.inputs == {
        "init_from": content_id(data / "base"),
        "train_conversations": content_id(data / "chat.jsonl"),
        "eval_conversations": content_id(data / "chat.jsonl"),
    }


def test_only_the_assistant_is_learned(data):
    tokenizer, template = sft.load_text_side(data / "base")
    config = sft.DataConfig(train=data / "chat.jsonl", seq_len=200)
    rows = sft.load_rows(data / "chat.jsonl", tokenizer, template, config, seed=0)
    learned = "".join(
        tokenizer.decode(row.targets[row.targets != -100].tolist(), skip_special_tokens=False)
        for row in (rows[index] for index in range(rows.rows_per_epoch))
    )
    template.close()
    turns = learned.split("<|im_end|>")
    assert sorted(turns) == sorted([f"after {number} comes {number + 1}" for number in range(12)] + [""])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fine_tuning_resumes_with_the_same_bits(data, tmp_path, dtype):
    """Ended after 4 of 6 steps; the rate is constant, so the first steps do not depend on how many follow."""
    more = ["schedule.shape=constant", "loop.checkpoint_every=2", "loop.eval_every=null", f"dtype={dtype}"]
    whole = sft.run(sft_config(data, tmp_path / "whole", *more, "loop.num_steps=6"))
    sft.run(sft_config(data, tmp_path / "parts", *more, "loop.num_steps=4"))
    parts = sft.run(sft_config(data, tmp_path / "parts", *more, "loop.num_steps=6"))
    assert parts.resumed_from == 4
    states = [from_pretrained(r.model_folder, dtype=getattr(torch, dtype)).state_dict() for r in (whole, parts)]
    for name, value in states[0].items():
        assert_same_bits(states[1][name], value)
    assert parts.train_loss == whole.train_loss


@pytest.mark.parametrize("kind", [pretrain.PretrainConfig, sft.SftConfig])
def test_configurations_survive_yaml(tmp_path, kind):
    required = ["folder=run", "data.train=a", "loop.num_steps=5"] + (["model=m"] if kind is sft.SftConfig else [])
    config = load_config(kind, None, required)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(kind, path) == config
    with pytest.raises(ConfigError, match=r"optim\.learning_rat: expected a known key, perhaps 'learning_rate'"):
        load_config(kind, None, [*required, "optim.learning_rat=1"])
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: expected more than 0 and at most 10"):
        load_config(kind, None, [*required, "optim.learning_rate=0"])
