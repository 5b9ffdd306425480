"""transformers as peer: the same weights in its model, and the same model with nothing rounded below float64."""

import numpy as np
import torch
import transformers


class _ExactRotary(torch.nn.Module):
    """cos and sin in float64; transformers computes them in float32 whatever the dtype of the model."""

    def __init__(self, tables, is_interleaved):
        super().__init__()
        self.is_interleaved = is_interleaved
        self.tables = [(torch.as_tensor(inv_freq, dtype=torch.float64), factor) for inv_freq, factor in tables]

    def forward(self, x, position_ids, layer_type="full_attention"):
        table, factor = self.tables[-1 if layer_type == "sliding_attention" else 0]
        angle = position_ids[..., None].double() * table
        angle = angle.repeat_interleave(2, -1) if self.is_interleaved else torch.cat([angle, angle], -1)
        return factor * angle.cos(), factor * angle.sin()


def _check_tables(rotary, tables, context_length):
    """`tables` are what the rotary module of transformers computes for a sequence of `context_length` tokens."""
    last = torch.tensor([[context_length - 1]])
    for (inv_freq, factor), kind in zip(tables, ("full_attention", "sliding_attention"), strict=False):
        names = {} if hasattr(rotary, "inv_freq") else {"layer_type": kind}
        cos, sin = rotary(torch.zeros(1), last, **names)
        prefix = "" if not names else f"{kind}_"
        np.testing.assert_allclose(getattr(rotary, f"{prefix}inv_freq").numpy(), inv_freq, rtol=5e-7)
        np.testing.assert_allclose(torch.hypot(cos, sin).numpy(), factor, rtol=5e-7)


def to_exact(model, spec, context_length=None):
    """Turns `model` into float64, in place. Its norms and its rotary table, which stay in float32, are replaced."""
    body = model.base_model
    if hasattr(body, "rotary_emb"):
        tables = spec.rope_tables(context_length)
        _check_tables(body.rotary_emb, tables, context_length or spec.max_position_embeddings)
        body.rotary_emb = _ExactRotary(tables, "Cohere" in type(body.rotary_emb).__name__)
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind.endswith("RMSNorm"):
                # Gemma has an `eps`, and adds 1 to the weight.
                eps = getattr(child, "variance_epsilon", None) or child.eps
                norm = torch.nn.RMSNorm(child.weight.shape, eps=eps, dtype=torch.float64)
                norm.weight = torch.nn.Parameter(child.weight.detach() + 1.0) if hasattr(child, "eps") else child.weight
                setattr(module, name, norm)
            elif kind.endswith("LayerNorm") and kind != "LayerNorm":
                eps = child.variance_epsilon
                norm = torch.nn.LayerNorm(child.weight.shape, eps=eps, bias=False, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    # The eager softmax rounds to float32 too; this one does not.
    model.set_attn_implementation("sdpa")
    return model


def from_source(source):
    """LlamaForCausalLM in float32 with the dequantised weights of `source`."""
    from pyengine.families import config_from_spec

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_from_spec(source.spec)))
    tensors = {name: torch.from_numpy(np.array(source.dense(name), np.float32)) for name in source.spec.tensor_shapes()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval()


@torch.inference_mode()
def logits(model, token_ids, num_last=0):
    """Logits after each token, or after the last `num_last`: [T, vocab_size] in the dtype of the model."""
    return model(torch.tensor([token_ids]), logits_to_keep=num_last).logits[0]


@torch.inference_mode()
def greedy(model, prompts, num_tokens):
    """Greedy continuations of prompts of any lengths, in one padded batch: a list of `num_tokens` ids for each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache, out = None, []
    for _ in range(num_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        result = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, ids = result.past_key_values, result.logits.argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], -1)
        out.append(ids[:, 0])
    return torch.stack(out, -1).tolist()
