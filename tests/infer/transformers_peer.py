"""transformers as peer: the same weights in its model, and the same model with nothing rounded below float64."""

import numpy as np
import torch
import transformers


class _ExactRotary(torch.nn.Module):
    """cos and sin in float64; transformers computes them in float32 whatever the dtype of the model."""

    def __init__(self, inv_freq):
        super().__init__()
        self.inv_freq = torch.as_tensor(inv_freq, dtype=torch.float64)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.inv_freq
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def to_exact(model, spec):
    """Turns `model` into float64, in place. Its norms and its rotary table, which stay in float32, are replaced."""
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), spec.inv_freq(), rtol=5e-7)
    model = model.double()
    model.model.rotary_emb = _ExactRotary(spec.inv_freq())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
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
