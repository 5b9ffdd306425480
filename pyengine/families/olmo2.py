"""OLMo 2: norms after attention and MLP instead of before them; q and k are normalised over their whole width."""

from __future__ import annotations

from pyengine.families.family import ATTENTION_BIAS, Family

FAMILY = Family(
    name="olmo2",
    classes={"olmo2": "Olmo2ForCausalLM"},
    gguf_architecture="olmo2",
    traits={"norm_placement": "post", "qk_norm": "full"},
    options=(ATTENTION_BIAS,),
    default_norm_eps=1e-5,
    gguf_tied=False,
)
