"""Signatures of the native module; tests/test_stub.py holds them to it."""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing

# Anything that the caster reads: torch tensors, numpy arrays, buffers.
Tensor: typing.TypeAlias = typing.Any

class Adapter:
    def __init__(self, model: DecoderModel) -> None: ...
    def add(self, layer: int, slot: str, offset: int, a: Tensor, b: Tensor, scale: float) -> None: ...
    @property
    def id(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_holders(self) -> int:
        """
        How many keep it alive, native sequences among them.
        """

class DecoderModel:
    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        sliding_windows: collections.abc.Sequence[int],
        rope_tables: collections.abc.Sequence[int],
        norm_eps: float,
        norm_weight_offset: float,
        embedding_multiplier: float,
        residual_multiplier: float,
        attention_scale: float,
        tie_word_embeddings: bool,
        qkv_bias: bool,
        o_bias: bool,
        mlp_bias: bool,
        qk_norm: str | None,
        norm: str,
        norm_bias: bool,
        norm_placement: str,
        parallel_blocks: bool,
        gated_mlp: bool,
        activation: str,
        num_learned_positions: int,
        act_dtype: str,
        product_input: str,
        capacity_bytes: int,
    ) -> None: ...
    def add_matrix(
        self, slot: str, format: str, parts: list[Tensor], row_orders: list[Tensor | None], num_cols: int
    ) -> None: ...
    def check(self) -> None: ...
    def set_rope(self, cos: Tensor, sin: Tensor, *, table: int = 0) -> None: ...
    def set_vector(self, slot: str, values: Tensor) -> None: ...
    @property
    def bytes_per_token(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_learned_positions(self) -> int: ...

class Decoder:
    def __init__(
        self, model: DecoderModel, *, page_size: int, num_pages: int, kv_dtype: str, max_tokens: int
    ) -> None: ...
    def add_sequence(self, salt: str | None = None, adapter: Adapter | None = None) -> int: ...
    def adopt_prefix(self, seq: int, next_token_ids: Tensor) -> int: ...
    def cache_stats(self) -> dict[str, int]: ...
    def fork_sequence(self, seq: int) -> int: ...
    def free_sequence(self, seq: int) -> None: ...
    def grow(self, seq: int, num_tokens: int) -> None: ...
    def length(self, seq: int) -> int: ...
    def pages_needed(self, seq: int, num_tokens: int) -> int: ...
    def profile(self) -> dict[str, typing.Any]: ...
    def reset_profile(self) -> None: ...
    def step(
        self,
        token_ids: Tensor,
        seqs: Tensor,
        rows: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        target_logprobs: Tensor | None = None,
        hidden_rows: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None: ...
    def truncate(self, seq: int, length: int) -> None: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...

class SampleState:
    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int = 0,
        sequence: int = 0,
        prompt_ids: list[int] = ...,
        bias_ids: list[int] = ...,
        biases: list[float] = ...,
        allowed_ids: list[int] = ...,
        end_ids: list[int] = ...,
        min_tokens: int = 0,
        bad_words: list[list[int]] = ...,
    ) -> None: ...
    def set_mask(self, mask: Tensor) -> None: ...
    @property
    def num_output_ids(self) -> int: ...

class Drawn:
    @property
    def counts(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[float]: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def top_ids(self) -> list[int]: ...
    @property
    def top_logprobs(self) -> list[float]: ...

class Sampler:
    def __init__(self, decoder: Decoder) -> None: ...
    def propose(
        self, token_ids: list[int], seqs: list[int], rows: list[int], states: list[SampleState], limits: list[int]
    ) -> list[list[int]]: ...
    def step(
        self,
        token_ids: list[int],
        seqs: list[int],
        rows: list[int],
        states: list[SampleState],
        num_logprobs: int,
        num_proposals: list[int] = ...,
    ) -> Drawn: ...

class PromptLookup:
    def __init__(self, *, min_match: int, max_match: int) -> None: ...
    def extend(self, token_ids: list[int]) -> None: ...
    def propose(self, limit: int) -> list[int]: ...
    @property
    def num_tokens(self) -> int: ...

class MappedBytes:
    """
    Keeps a file mapped for the views of its bytes.
    """

class SafetensorsFile:
    """
    A safetensors file, mapped and checked whole.
    """
    def __init__(self, path: typing.Any) -> None: ...
    def data(self, name: str) -> typing.Any:
        """
        The bytes of a tensor, read-only, without a copy.
        """
    def info(self, name: str) -> tuple[str, tuple[typing.Any, ...], int, int]:
        """
        (dtype, shape, file offset, number of bytes) of a tensor.
        """
    def names(self) -> list[str]:
        """
        Tensor names in the order of their bytes.
        """
    @property
    def metadata(self) -> dict[str, typing.Any]:
        """
        The __metadata__ entry: str -> str.
        """

class GgufFile:
    """
    A GGUF file, mapped and checked whole.
    """
    def __init__(self, path: typing.Any) -> None: ...
    def data(self, name: str) -> typing.Any:
        """
        The bytes of a tensor, read-only, without a copy.
        """
    def info(self, name: str) -> tuple[str, tuple[typing.Any, ...], int, int]:
        """
        (type, shape in elements with rows first, file offset, number of bytes) of a tensor.
        """
    def names(self) -> list[str]:
        """
        Tensor names in the order of the file.
        """
    @property
    def alignment(self) -> int: ...
    @property
    def metadata(self) -> dict[str, typing.Any]:
        """
        key -> int, float, bool, str, list[str] or, for arrays of numbers, a memoryview.
        """
    @property
    def metadata_types(self) -> dict[str, typing.Any]:
        """
        key -> 'uint32', 'array[string]', ...
        """
    @property
    def version(self) -> int: ...

def active_isa() -> str: ...
def adamw_cpu(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None: ...
def attention_bwd_cpu(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> None: ...
def attention_decode_cpu(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    y: Tensor,
    scale: float,
    sliding_window: int | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    round_q: bool = False,
) -> None: ...
def attention_fwd_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> None: ...
def available_cpus(cgroup_root: str = "/sys/fs/cgroup") -> int: ...
def available_isas() -> list[str]: ...
def block_formats() -> dict[str, tuple[int, int, int]]: ...
def block_weights_pack(block_format: str, raw: Tensor, row_order: Tensor | None, packed: Tensor) -> None: ...
def block_weights_packed_bytes(block_format: str, num_rows: int, num_cols: int) -> int: ...
def block_weights_unpack(block_format: str, packed: Tensor, out: Tensor) -> None: ...
def build_info() -> dict[str, typing.Any]: ...
def dequantize_int8_cpu(q: Tensor, scale: Tensor, x: Tensor) -> None: ...
def describe_tensor(tensor: Tensor) -> dict[str, typing.Any]: ...
def draw(logits: Tensor, states: list[SampleState], num_logprobs: int) -> Drawn: ...
def gelu_bwd_cpu(grad_y: Tensor, x: Tensor, grad_x: Tensor, approximate: str = "none") -> None: ...
def gelu_fwd_cpu(x: Tensor, y: Tensor, approximate: str = "none") -> None: ...
def gguf_dequantize(
    type: str, data: bytes | bytearray | memoryview, num_elements: int
) -> numpy.typing.NDArray[numpy.float32]:
    """
    Blocks of a ggml type to float32.
    """

def gguf_type_geometry(type: str) -> tuple[int, int, int]:
    """
    (id, elements per block, bytes per block) of a ggml type.
    """

def kv_append_cpu(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None: ...
def layer_norm_bwd_cpu(
    grad_y: Tensor,
    grad_h_in: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_h: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
) -> None: ...
def layer_norm_fwd_cpu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None: ...
def linear_cross_entropy_bwd_cpu(
    grad_nll: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_x: Tensor | None,
    grad_w: Tensor | None,
    ignore_index: int,
) -> None: ...
def linear_cross_entropy_fwd_cpu(
    x: Tensor, w: Tensor, targets: Tensor, nll: Tensor, lse: Tensor, ignore_index: int
) -> None: ...
def lora_cpu(
    y: Tensor,
    x: Tensor,
    a: collections.abc.Sequence[Tensor],
    b: collections.abc.Sequence[Tensor],
    scales: collections.abc.Sequence[float],
    adapter_of_row: Tensor | None = None,
    u: Tensor | None = None,
) -> None: ...
def matmul_cpu(x: Tensor, packed: Tensor, y: Tensor, accumulate: bool = False) -> None: ...
def matmul_pack_cpu(w: Tensor, packed: Tensor) -> None: ...
def matmul_unpacked_cpu(x: Tensor, w: Tensor, y: Tensor) -> None: ...
def matmul_w4a16_cpu(x: Tensor, packed: Tensor, block_format: str, y: Tensor, *, round_x: bool = False) -> None: ...
def matmul_w4a8_cpu(x: Tensor, packed: Tensor, block_format: str, y: Tensor) -> None: ...
def matmul_w8a8_cpu(x: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, y: Tensor) -> None: ...
def matmul_w8a8_pack_cpu(w: Tensor, packed: Tensor) -> None: ...
def num_threads() -> int: ...
def packed_weight_bytes(format: str, num_rows: int, num_cols: int) -> int: ...
def philox4x32_10(
    counter: typing.Annotated[collections.abc.Sequence[int], "FixedSize(4)"],
    key: typing.Annotated[collections.abc.Sequence[int], "FixedSize(2)"],
) -> typing.Annotated[list[int], "FixedSize(4)"]: ...
def quantize_int8_cpu(x: Tensor, q: Tensor, scale: Tensor) -> None: ...
def rms_norm_bwd_cpu(
    grad_y: Tensor,
    grad_h_in: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_h: Tensor,
    grad_weight: Tensor,
    weight_offset: float,
) -> None: ...
def rms_norm_fwd_cpu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    h: Tensor | None,
    y: Tensor,
    rstd: Tensor | None,
    eps: float,
    weight_offset: float,
) -> None: ...
def rope_cpu(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, y: Tensor, inverse: bool = False) -> None: ...
def rope_table(inv_freq: Tensor, cos_out: Tensor, sin_out: Tensor, scale: float = 1.0) -> None: ...
def row_lse_cpu(logits: Tensor) -> float: ...
def sample_cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    previous_ids: Tensor | None,
    previous_offsets: Tensor | None,
    token_ids: Tensor,
    logprobs: Tensor | None,
    top_ids: Tensor | None,
    top_logprobs: Tensor | None,
) -> None: ...
def sample_uniform(seed: int, sequence: int, position: int) -> float: ...
def set_active_isa(name: str) -> str: ...
def set_num_threads(count: int) -> None: ...
def sum_of_squares_cpu(x: Tensor) -> float: ...
def swiglu_bwd_cpu(
    grad_y: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str = "silu"
) -> None: ...
def swiglu_fwd_cpu(gate: Tensor, up: Tensor, y: Tensor, activation: str = "silu") -> None: ...

MATMUL_PANEL: int = 16
