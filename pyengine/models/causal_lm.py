"""`CausalLM`: the decoder that trains, built from a `ModelSpec`."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyengine.adapters import AdapterConfig
from pyengine.errors import ArgumentError
from pyengine.models.initialize import initialize
from pyengine.models.packing import pack_positions
from pyengine.nn import (
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    PackedPositions,
    PlainMlp,
    RMSNorm,
    SwiGluMlp,
)
from pyengine.ops.linear_cross_entropy import linear_cross_entropy
from pyengine.ops.matmul import matmul
from pyengine.ops.rope import rope_table
from pyengine.spec import NORM_NAMES, ModelSpec

IGNORE = -100


def _norm(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str | None) -> RMSNorm | LayerNorm:
    if spec.norm == "layer":
        return LayerNorm(spec.hidden_size, eps=spec.norm_eps, bias=spec.norm_bias, dtype=dtype, device=device)
    offset = spec.norm_weight_offset
    return RMSNorm(spec.hidden_size, eps=spec.norm_eps, weight_offset=offset, dtype=dtype, device=device)


class DecoderLayer(nn.Module):
    """Attention and MLP, one after the other or side by side, with norms before or after them, or both. The last sum is
    left to the norm that comes next."""

    def __init__(self, spec: ModelSpec, layer: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.residual_multiplier = spec.residual_multiplier
        self.parallel_blocks = spec.parallel_blocks
        self.norm_names = NORM_NAMES[spec.norm_placement]
        for name in self.norm_names.values():
            self.add_module(name, _norm(spec, dtype, device))
        self.self_attn = Attention(
            spec.hidden_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            qkv_bias=spec.qkv_bias,
            o_bias=spec.o_bias,
            qk_norm=spec.qk_norm,
            norm_eps=spec.norm_eps,
            norm_weight_offset=spec.norm_weight_offset,
            use_rope=spec.has_rope(layer),
            use_local_rope=spec.rope_table_of(layer) == 1,
            sliding_window=spec.window_of(layer),
            scale=spec.softmax_scale,
            dtype=dtype,
            device=device,
        )
        self.mlp = (SwiGluMlp if spec.gated_mlp else PlainMlp)(
            spec.hidden_size,
            spec.intermediate_size,
            activation=spec.activation,
            bias=spec.mlp_bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, residual: Tensor | None, packed: PackedPositions) -> tuple[Tensor, Tensor]:
        """x and residual [num_tokens, hidden_size] -> (what the MLP adds, residual stream before it)."""
        y, h = self._enter("attention_norm", x, residual)
        if self.parallel_blocks:
            mlp_input = self._enter("mlp_norm", h, None)[0] if "mlp_norm" in self.norm_names else y
            h = h + self._leave("attention_post_norm", self.self_attn(y, packed))
            return self._leave("mlp_post_norm", self.mlp(mlp_input)), h
        y, h = self._enter("mlp_norm", self._leave("attention_post_norm", self.self_attn(y, packed)), h)
        return self._leave("mlp_post_norm", self.mlp(y)), h

    def _enter(self, role: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(input of a block, residual stream with x in it)."""
        if role in self.norm_names:
            return self.get_submodule(self.norm_names[role])(x, residual)  # type: ignore[no-any-return]
        h = x if residual is None else x + residual
        return h, h

    def _leave(self, role: str, x: Tensor) -> Tensor:
        """What a block adds to the residual stream."""
        if role in self.norm_names:
            x = self.get_submodule(self.norm_names[role])(x)[0]
        return x if self.residual_multiplier == 1.0 else x * self.residual_multiplier


class Decoder(nn.Module):
    """Token ids to normalised hidden states, divided by `logits_divisor`: the head is linear."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.recompute = False
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        if spec.learned_positions:
            num_positions = spec.max_position_embeddings
            self.embed_positions = Embedding(num_positions, spec.hidden_size, dtype=dtype, device=device)
        self.learned_positions = spec.learned_positions
        self.embedding_multiplier = spec.embedding_multiplier
        self.logits_divisor = spec.logits_divisor
        self.layers = nn.ModuleList(DecoderLayer(spec, layer, dtype, device) for layer in range(spec.num_layers))
        self.norm = _norm(spec, dtype, device)

    def embed(self, input_ids: Tensor, packed: PackedPositions) -> Tensor:
        """input_ids [num_tokens] -> what enters the first layer, [num_tokens, hidden_size]."""
        x: Tensor = self.embed_tokens(input_ids)
        x = x if self.embedding_multiplier == 1.0 else x * self.embedding_multiplier
        return x + self.embed_positions(packed.position_ids) if self.learned_positions else x

    def forward(self, input_ids: Tensor, packed: PackedPositions) -> Tensor:
        """input_ids [num_tokens] -> [num_tokens, hidden_size]."""
        x, residual = self.embed(input_ids, packed), None
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x, residual = checkpoint(layer, x, residual, packed, use_reentrant=False)
            else:
                x, residual = layer(x, residual, packed)
        return self.norm(x, residual, weight_divisor=self.logits_divisor)[0]  # type: ignore[no-any-return]


class CausalLM(nn.Module):
    """A decoder-only language model. `state_dict()` has the names and shapes of `spec.tensor_shapes()`.

    Args:
        spec: the architecture.
        dtype: of parameters and activations: float32 or bfloat16.
        device: of the parameters. On "meta" they have no values.
        seed: of the initial weights, see `initialize`.
        max_context: as that of `LLM`, where it differs from the longest context of the model: it chooses the factors of
            LongRoPE.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
        max_context: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ArgumentError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        self.spec = spec
        self.adapter_config: AdapterConfig | None = None
        """Of the low-rank adapter that it has, see `pyengine.models.add_adapter`."""
        self.max_context = max_context
        self.model = Decoder(spec, dtype, device)
        if not spec.tie_word_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, dtype=dtype, device=device)
        self._rope: list[tuple[Tensor, Tensor]] = []
        if self.model.norm.weight.device.type != "meta":
            initialize(self, seed=seed, num_layers=spec.num_layers)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, max_context: int | None = None
    ) -> CausalLM:
        """See `pyengine.models.from_pretrained`."""
        from pyengine.models.pretrained import from_pretrained

        return from_pretrained(path, dtype=dtype, max_context=max_context)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """See `pyengine.models.save_pretrained`."""
        from pyengine.models.pretrained import save_pretrained

        save_pretrained(self, folder)

    @property
    def recompute(self) -> bool:
        """Whether backward computes the activations of each layer again instead of keeping them. Same bits."""
        return self.model.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.model.recompute = value

    @property
    def output_weight(self) -> nn.Parameter:
        """[vocab_size, hidden_size], the weight of the logits: the embedding where it is tied."""
        return self.model.embed_tokens.weight if self.spec.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_offsets: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with `targets` the negative log-likelihood of each. A segment is computed as if it were alone.

        Args:
            input_ids: [T] or [B, T] integers in [0, vocab_size).
            position_ids: as input_ids; by default from 0 in each segment.
            segment_offsets: [num_segments + 1] int32 into the flattened tokens, from 0 to their number; by default each
                row of input_ids is a segment.
            targets: as input_ids; `IGNORE` where nothing is to be predicted.

        Returns:
            float32 logits [*input_ids.shape, vocab_size], or nats [*input_ids.shape], 0 where ignored.

        Raises:
            ArgumentError: shapes or values that do not fit.
        """
        self.check_ids("input_ids", input_ids)
        if input_ids.dim() not in (1, 2):
            raise ArgumentError(f"input_ids: expected shape [T] or [B, T], got {tuple(input_ids.shape)}")
        packed = self.packed_positions(input_ids, position_ids, segment_offsets)
        hidden = self.model(input_ids.reshape(-1), packed)
        if targets is None:
            logits = matmul(hidden, self.output_weight, out_dtype=torch.float32)
            return logits.view(*input_ids.shape, -1)
        if targets.shape != input_ids.shape:
            raise ArgumentError(f"targets: expected shape {tuple(input_ids.shape)}, got {tuple(targets.shape)}")
        self.check_ids("targets", targets, allow_ignore=True)
        nll = linear_cross_entropy(hidden, self.output_weight, targets.reshape(-1), ignore_index=IGNORE)
        return nll.view(input_ids.shape)

    def packed_positions(
        self, input_ids: Tensor, position_ids: Tensor | None = None, segment_offsets: Tensor | None = None
    ) -> PackedPositions:
        """What the layers need to know of a batch beside its values; arguments as in `forward`."""
        positions, offsets = pack_positions(
            input_ids.shape, position_ids, segment_offsets, self.spec.max_position_embeddings, input_ids.device
        )
        num_positions = int(positions.max()) + 1 if positions.numel() else 1
        tables = self._rope_tables(num_positions, input_ids.device)
        return PackedPositions(positions, offsets, *tables[0], local=tables[1] if len(tables) > 1 else None)

    def check_ids(self, name: str, ids: Tensor, *, allow_ignore: bool = False) -> None:
        """Raises ArgumentError with `name` unless `ids` are integers in [0, vocab_size), or `IGNORE` where allowed."""
        if ids.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(f"{name}: expected torch.int32 or torch.int64, got {ids.dtype}")
        if ids.device.type == "meta" or not ids.numel():
            return
        wrong = (ids < 0) | (ids >= self.spec.vocab_size)
        if allow_ignore:
            wrong &= ids != IGNORE
        if bool(wrong.any()):
            expected = f"0 to {self.spec.vocab_size - 1}" + (f" or {IGNORE}" if allow_ignore else "")
            raise ArgumentError(f"{name}: expected ids {expected}, got {int(ids[wrong][0])}")

    def _rope_tables(self, num_positions: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """A row of a table depends on its position alone, so growing the tables changes no result."""
        if not self._rope or len(self._rope[0][0]) < num_positions or self._rope[0][0].device != device:
            size = min(1 << (num_positions - 1).bit_length(), self.spec.max_position_embeddings)
            tables = [
                rope_table(torch.from_numpy(inv_freq), size, attention_factor)
                for inv_freq, attention_factor in self.spec.rope_tables(self.max_context)
            ]
            self._rope = [(cos.to(device), sin.to(device)) for cos, sin in tables]
        return self._rope
