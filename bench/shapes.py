"""Shapes of real models, in one place: [rows, columns] of the work that one layer does."""

# SmolLM2-135M: hidden 576, intermediate 1536, 9 query and 3 key/value heads of 64, vocabulary 49152.
# Llama-3-8B: hidden 4096, intermediate 14336, 32 and 8 heads of 128, vocabulary 128256.
HIDDEN = {"smollm2-135m": 576, "llama-3-8b": 4096}
INTERMEDIATE = {"smollm2-135m": 1536, "llama-3-8b": 14336}
HEADS = {"smollm2-135m": (9, 3, 64), "llama-3-8b": (32, 8, 128)}
VOCAB = {"smollm2-135m": 49152, "llama-3-8b": 128256}

# Tokens in one call: one decode step, a small batch, a prefill.
NUM_TOKENS = {"decode-1": 1, "decode-32": 32, "prefill-512": 512}
