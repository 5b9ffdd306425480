import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.errors import ArgumentError  # noqa: E402
from pyengine.models import CausalLM, from_pretrained  # noqa: E402
from pyengine.models.causal_lm import IGNORE  # noqa: E402
from pyengine.reference.causal_lm import causal_lm_logits  # noqa: E402
from pyengine.spec import ModelSpec, RopeSpec  # noqa: E402
from pyengine.testing import assert_accurate, assert_same_bits, force_num_threads  # noqa: E402
from pyengine.testing.tiny import tiny_llama  # noqa: E402

pytestmark = pytest.mark.train

VARIANTS = {
    "grouped_tied": {},
    "untied": {"tie_word_embeddings": False},
    "no_groups": {"num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "wide_heads": {"head_dim": 24},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def spec_of(**overrides):
    values = {
        "family": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "norm_eps": 1e-5,
        "rope": RopeSpec(theta=10000.0),
        "tie_word_embeddings": False,
    }
    return ModelSpec(**(values | overrides))


def exact_model(model):
    """Logits of the specification in float64, and the leaves to take gradients of."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}

    def logits(input_ids):
        return torch.stack([causal_lm_logits(model.spec, leaves, row) for row in input_ids])

    return logits, leaves


def loss_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama(tmp_path / "model", **VARIANTS[variant])
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = from_pretrained(folder)
    exact, leaves = exact_model(model)
    torch.manual_seed(0)
    input_ids, targets = torch.randint(384, (2, 31)), torch.randint(384, (2, 31))

    exact_logits = exact(input_ids)
    exact_grads = torch.autograd.grad(loss_of(exact_logits, targets), list(leaves.values()))
    peer_logits = peer(input_ids).logits
    loss_of(peer_logits, targets).backward()
    logits = model(input_ids)
    nll = model(input_ids, targets=targets)
    nll.sum().backward()

    torch.testing.assert_close(peer_logits.double(), exact_logits, rtol=1e-4, atol=1e-4)
    assert_accurate(logits, exact_logits, peer_logits)
    peer_nll = -peer_logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert_accurate(nll, -exact_logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], peer_nll)
    peer_parameters = dict(peer.named_parameters())
    assert peer_parameters.keys() == dict(model.named_parameters()).keys() == model.spec.tensor_shapes().keys()
    for (name, parameter), exact_grad in zip(model.named_parameters(), exact_grads, strict=True):
        assert_accurate(parameter.grad, exact_grad, peer_parameters[name].grad)


def test_sliding_window_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=5,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.MistralForCausalLM(config)
    peer.config._attn_implementation = "eager"
    peer.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert model.spec.sliding_window == 5
    input_ids = torch.randint(97, (1, 24))
    assert_accurate(model(input_ids), exact_model(model)[0](input_ids), peer(input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 3}, {"tie_word_embeddings": True}], ids=str)
def test_a_packed_document_has_the_bits_it_has_alone(isa, dtype, overrides):
    model = CausalLM(spec_of(**overrides), dtype=dtype, seed=1)
    lengths = [1, 17, 2, 40, 5]
    documents = [torch.randint(97, (length,)) for length in lengths]
    offsets = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    packed_ids, targets = torch.cat(documents), torch.cat([document.roll(-1) for document in documents])
    logits = model(packed_ids, segment_offsets=offsets)
    nll = model(packed_ids, segment_offsets=offsets, targets=targets)
    for start, stop, document in zip(offsets, offsets[1:], documents, strict=False):
        assert_same_bits(model(document), logits[start:stop])
        assert_same_bits(model(document, targets=targets[start:stop]), nll[start:stop])


def test_same_bits_for_any_number_of_threads():
    model = CausalLM(spec_of(), seed=1)
    input_ids, targets = torch.randint(97, (3, 21)), torch.randint(97, (3, 21))
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            model.zero_grad()
            nll = model(input_ids, targets=targets)
            nll.sum().backward()
            results.append([nll.detach(), *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_gives_the_same_bits(dtype):
    model = CausalLM(spec_of(), dtype=dtype, seed=1)
    input_ids, targets = torch.randint(97, (2, 9)), torch.randint(97, (2, 9))
    grads = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(input_ids, targets=targets).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*grads, strict=True):
        assert_same_bits(got, expected)


def test_rows_are_segments_and_positions_start_at_zero():
    model = CausalLM(spec_of(), seed=1)
    rows = torch.randint(97, (2, 11))
    positions = torch.arange(11).expand(2, 11)
    offsets = torch.tensor([0, 11, 22])
    assert_same_bits(model(rows), model(rows, position_ids=positions, segment_offsets=offsets))
    assert_same_bits(model(rows).flatten(0, 1), model(rows.flatten(), segment_offsets=offsets))
    shifted = model(rows, position_ids=positions + 7)
    torch.testing.assert_close(shifted, model(rows), rtol=1e-4, atol=1e-4)
    assert not torch.equal(shifted, model(rows)), "positions must reach the rotary embedding"


def test_ignored_targets_give_zero_and_no_gradient():
    model = CausalLM(spec_of(), seed=1)
    input_ids = torch.randint(97, (12,))
    targets = torch.full((12,), IGNORE)
    targets[3] = 5
    nll = model(input_ids, targets=targets)
    assert nll.count_nonzero() == 1
    assert nll[3] > 0
    (grad,) = torch.autograd.grad(nll.sum(), model.model.embed_tokens.weight)
    unseen = [token for token in range(97) if token not in input_ids[:4]]
    assert not grad[unseen].any(), "tokens after the only target got a gradient"


def test_initial_weights_depend_on_seed_and_name_alone():
    small, large = CausalLM(spec_of(), seed=3), CausalLM(spec_of(num_layers=3), seed=3)
    for name, value in small.state_dict().items():
        if not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert_same_bits(large.state_dict()[name], value)
    other = CausalLM(spec_of(), seed=4)
    assert not torch.equal(other.output_weight, small.output_weight)
    q, k = (small.state_dict()[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qk")
    assert not torch.equal(q[:8], k[:8])
    halves = CausalLM(spec_of(), seed=3, dtype=torch.bfloat16)
    assert_same_bits(halves.output_weight.data, small.output_weight.data.bfloat16())
    weight = CausalLM(spec_of(hidden_size=256), seed=0).state_dict()
    assert weight["model.layers.0.mlp.up_proj.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weight["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([0, 97])}, "input_ids: expected ids 0 to 96, got 97"),
        ({"input_ids": torch.tensor([0, -1])}, "input_ids: expected ids 0 to 96, got -1"),
        ({"input_ids": torch.tensor([0.0])}, "input_ids: expected torch.int32 or torch.int64, got torch.float32"),
        ({"input_ids": torch.zeros(1, 1, 1, dtype=torch.int64)}, r"input_ids: expected shape \[T\] or \[B, T\]"),
        ({"input_ids": torch.zeros(65, dtype=torch.int64)}, "position_ids: expected 0 to 63, got 64"),
        ({"position_ids": torch.tensor([0, 1, -1])}, "position_ids: expected 0 to 63, got -1"),
        ({"position_ids": torch.tensor([0])}, r"position_ids: expected shape \(3,\), got \(1,\)"),
        ({"segment_offsets": torch.tensor([0, 2])}, "segment_offsets: expected to rise from 0 to 3"),
        ({"segment_offsets": torch.tensor([0, 2, 1, 3])}, "segment_offsets: expected to rise from 0 to 3"),
        ({"segment_offsets": torch.tensor([[0, 3]])}, r"segment_offsets: expected integers \[num_segments \+ 1\]"),
        ({"targets": torch.tensor([1, 2])}, r"targets: expected shape \(3,\), got \(2,\)"),
        ({"targets": torch.tensor([1, 2, 97])}, "targets: expected ids 0 to 96 or -100, got 97"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments, message):
    model = CausalLM(spec_of())
    with pytest.raises(ArgumentError, match=message):
        model(**({"input_ids": torch.tensor([1, 2, 3])} | arguments))


def test_dtype_error():
    with pytest.raises(ArgumentError, match="dtype: expected torch.float32 or torch.bfloat16, got torch.float16"):
        CausalLM(spec_of(), dtype=torch.float16)
