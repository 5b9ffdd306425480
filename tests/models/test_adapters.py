"""Adapters in training: PEFT's gradients, the bits of serving, and files that both read."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from infer.test_peft import CASES, load, make_adapter, random_ids, with_adapter  # noqa: E402
from infer.test_training_parity import documents  # noqa: E402
from infer.transformers_peer import logits, to_exact  # noqa: E402

from pyengine import LLM  # noqa: E402
from pyengine.adapters import AdapterConfig  # noqa: E402
from pyengine.errors import ArgumentError  # noqa: E402
from pyengine.models import (  # noqa: E402
    add_adapter,
    from_pretrained,
    load_adapter,
    merge_adapter,
    save_adapter,
    save_pretrained,
)
from pyengine.testing import assert_accurate, assert_same_bits  # noqa: E402
from pyengine.testing.tiny import tiny_model  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore::FutureWarning")]

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["llama", "llama_patterns", "qwen2", "granite", "phi3", "gemma3"]


def make(folder, name, dtype=torch.float32):
    model_type, overrides, config = CASES[name]
    base = tiny_model(folder / "base", model_type, dtype=dtype, **overrides)
    return base, make_adapter(base, folder / "adapter", **config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_training_gives_the_bits_of_serving(tmp_path, name, dtype):
    base, folder = make(tmp_path, name, dtype)
    model = from_pretrained(base, dtype=dtype)
    load_adapter(model, folder)
    llm = LLM(base)
    llm.load_adapter("a", folder)
    batch = documents(lengths=[1, 2, 33, 130])
    offsets = torch.tensor([0, 1, 3, 36, 166], dtype=torch.int32)
    # Gradients on: the forward that autograd records.
    packed = model(torch.cat(batch), segment_offsets=offsets)
    assert packed.requires_grad
    served = torch.cat([torch.from_numpy(llm.logits(ids.tolist(), adapter="a")) for ids in batch])
    assert_same_bits(packed.detach(), served)
    with torch.no_grad():
        assert_same_bits(model(torch.cat(batch), segment_offsets=offsets), served)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_peft(tmp_path, name):
    base, folder = make(tmp_path, name)
    model = from_pretrained(base)
    load_adapter(model, folder)
    ids = torch.tensor([random_ids(31, 5)])
    exact_model = with_adapter(to_exact(load(base), model.spec), folder).double()
    peer = with_adapter(load(base), folder)
    for other in (exact_model, peer):
        for key, parameter in other.named_parameters():
            parameter.requires_grad_("lora_" in key)
        out = other(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(out, ids[0, 1:], reduction="sum").backward()
    targets = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    model(ids, targets=targets).sum().backward()
    assert all((parameter.grad is not None) == ("lora_" in key) for key, parameter in model.named_parameters())

    # Saved as if they were weights, the gradients come under PEFT's names.
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    save_adapter(model, tmp_path / "grads")
    ours = with_adapter(load(base), tmp_path / "grads").state_dict()
    exact, baseline = (
        {key: p.grad for key, p in other.named_parameters() if p.grad is not None} for other in (exact_model, peer)
    )
    assert exact
    scale = {key: grad.abs().max() for key, grad in exact.items()}

    def pooled(values):
        return torch.cat([(values[key].double() / scale[key]).flatten() for key in scale])

    assert_accurate(pooled(ours).float(), pooled(exact), pooled(baseline).float())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(tmp_path, name):
    base, folder = make(tmp_path, name)
    model = from_pretrained(base)
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "again")
    theirs, ours = (with_adapter(load(base), place).state_dict() for place in (folder, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_new_adapter_does_nothing_until_it_is_trained(tmp_path):
    base, _ = make(tmp_path, "llama")
    model, plain = from_pretrained(base), from_pretrained(base)
    config = AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    trained = add_adapter(model, config)
    assert [tuple(p.shape) for p in trained[:2]] == [(4, 64), (64, 4)]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    ids = torch.tensor(random_ids(40, 1))
    assert_same_bits(model(ids).detach(), plain(ids).detach())

    targets = torch.cat([ids[1:], torch.tensor([-100])])
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(ids, targets=targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    save_adapter(model, tmp_path / "trained")
    llm = LLM(base)
    llm.load_adapter("trained", tmp_path / "trained")
    assert_same_bits(torch.from_numpy(llm.logits(ids.tolist(), adapter="trained")), model(ids).detach())
    peer = with_adapter(load(base), tmp_path / "trained")
    torch.testing.assert_close(logits(peer, ids.tolist()), model(ids).detach(), rtol=1e-3, atol=1e-3)


def test_initial_values_are_a_function_of_the_seed_and_the_name(tmp_path):
    base, _ = make(tmp_path, "llama")
    config = AdapterConfig(rank=4, target_modules=("q_proj",))
    a, b, c = (from_pretrained(base) for _ in range(3))
    first, same, other = add_adapter(a, config), add_adapter(b, config), add_adapter(c, config, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[2])
    bound = 64**-0.5
    assert 0.9 * bound < first[0].abs().max() <= bound


def test_dropout_falls_on_the_input_of_the_adapter_alone(tmp_path):
    base, _ = make(tmp_path, "llama")
    model = from_pretrained(base)
    config = AdapterConfig(rank=4, target_modules=("q_proj",), dropout=0.5)
    plain = model(torch.tensor(random_ids(20, 1))).detach()
    b = add_adapter(model, config)[1]
    ids = torch.tensor(random_ids(20, 1))
    assert_same_bits(model.train()(ids).detach(), plain)
    b.data.normal_()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_merging_equals_pefts(tmp_path, name, dtype):
    base, folder = make(tmp_path, name, dtype)
    model = from_pretrained(base, dtype=dtype)
    load_adapter(model, folder)
    merge_adapter(model)
    save_pretrained(model, tmp_path / "merged")
    theirs = with_adapter(load(base, dtype), folder).merge_and_unload().state_dict()
    exact = with_adapter(load(base).double(), folder).double().merge_and_unload().state_dict()
    ours = load(tmp_path / "merged", dtype).state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_accurate(ours[key], exact[key], theirs[key])


def test_errors(tmp_path):
    base, folder = make(tmp_path, "llama")
    model = from_pretrained(base)
    for names in ("(q|k)_proj", ("nothing",)):
        with pytest.raises(ArgumentError, match=r"^target_modules: expected names of linear modules, got"):
            add_adapter(model, AdapterConfig(target_modules=names))
    with pytest.raises(ArgumentError, match=r"^model: expected one with an adapter, got one without"):
        save_adapter(model, tmp_path / "out")
    load_adapter(model, folder)
    with pytest.raises(ArgumentError, match=r"^model: expected one without an adapter, got one that has one"):
        load_adapter(model, folder)
