"""Text to training rows: corpus, tokenizer training, token shards, packing."""
