"""What the engine chose and where its time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine import _C

if TYPE_CHECKING:
    from pyengine.infer.loader import LoadedModel
    from pyengine.infer.scheduler import SchedulerStats

# Mode -> what is done to activations before a product with block weights.
_ROUNDING = {
    "exact": "",
    "bf16": ", rounded to bfloat16 before each product",
    "fast": ", rounded to int8 per 32 before each product",
}


@dataclass(frozen=True)
class Explanation:
    """Facts of one loaded model. `str()` gives a page to read."""

    model: str
    num_parameters: int
    isa: str
    isa_limit_reason: str
    threads: int
    mode: str
    act_dtype: str
    kv_dtype: str
    weight_formats: dict[str, int]
    """Format -> number of matrices."""
    weight_bytes: int
    bytes_per_token: int
    """Weights that one decode step reads."""
    cache_bytes: int
    """Reserved for keys and values; memory is used as the cache fills."""
    max_context: int
    prefix_cache: dict[str, int] | None = None
    """Started and hit tokens, preemptions, pages that hold prefixes, and pages evicted, copied and merged; or None."""
    profile: dict[str, Any] = field(default_factory=dict)
    """Steps, tokens, and seconds by kind of phase since the model was loaded."""

    def __str__(self) -> str:
        formats = ", ".join(f"{count} x {name}" for name, count in self.weight_formats.items())
        lines = [
            f"model     {self.model}, {self.num_parameters / 1e6:.1f} M parameters",
            f"isa       {self.isa}" + (f" ({self.isa_limit_reason})" if self.isa_limit_reason else ""),
            f"threads   {self.threads}",
            f"weights   {formats}; {self.weight_bytes / 1e6:.1f} MB, "
            f"{self.bytes_per_token / 1e6:.1f} MB read per token",
            f"mode      {self.mode}: activations {self.act_dtype}" + _ROUNDING[self.mode],
            f"cache     {self.kv_dtype}, {self.max_context} tokens a sequence, "
            f"{self.cache_bytes / 1e6:.0f} MB reserved",
        ]
        if self.prefix_cache is not None:
            c = self.prefix_cache
            lines.append(
                f"prefixes  {c['num_hit_tokens']} of {c['num_started_tokens']} tokens found in the cache, "
                f"{c['num_indexed_pages']} pages kept, {c['num_evicted_pages']} evicted, "
                f"{c['num_preemptions']} preemptions"
            )
        seconds = self.profile.get("seconds", {})
        total = sum(seconds.values())
        if total > 0:
            shares = sorted(seconds.items(), key=lambda item: -item[1])
            text = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in shares if s / total >= 0.01)
            lines.append(f"time      {self.profile['num_steps']} steps, {self.profile['num_tokens']} tokens: {text}")
        return "\n".join(lines)


def explain(loaded: LoadedModel, stats: SchedulerStats | None) -> Explanation:
    """The explanation of a loaded model; `stats` where prefixes are cached."""
    info = _C.build_info()
    return Explanation(
        model=loaded.path,
        num_parameters=loaded.spec.num_parameters(),
        isa=info["isa"],
        isa_limit_reason=info["isa_limit_reason"],
        threads=info["num_threads"],
        mode=loaded.mode,
        act_dtype=loaded.act_dtype,
        kv_dtype=loaded.kv_dtype,
        weight_formats=dict(Counter(loaded.weight_formats.values())),
        weight_bytes=loaded.model.num_bytes,
        bytes_per_token=loaded.model.bytes_per_token,
        cache_bytes=loaded.decoder.cache_bytes,
        max_context=loaded.max_context,
        prefix_cache=None if stats is None else asdict(stats) | loaded.decoder.cache_stats(),
        profile=loaded.decoder.profile(),
    )
