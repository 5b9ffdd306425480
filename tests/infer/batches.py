"""Batches of random sequences on a native decoder, and their logits."""

import numpy as np

LENGTHS = [1, 2, 17, 64, 65, 130]


def sequences(count):
    rng = np.random.default_rng(7)
    return [rng.integers(0, 384, LENGTHS[i % len(LENGTHS)]).astype(np.int32) for i in range(count)]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.tobytes() == b.tobytes(), f"{(a != b).sum()} of {a.size} logits differ, max {np.abs(a - b).max()}"


def options(weights, mode):
    return {"weights": weights, "mode": mode, "max_batch_tokens": 512, "cache_tokens": 8192}


def run_batch(llm, batch, chunk, adapters=None):
    """Logits of every token of every sequence, computed together: each step feeds up to `chunk` tokens of each.

    adapters: the name of each sequence's, or None.
    """
    decoder = llm._runner.decoder
    out = [np.empty((len(ids), llm.spec.vocab_size), np.float32) for ids in batch]
    names = adapters or [None] * len(batch)
    seqs = [decoder.add_sequence(adapter=llm._adapters.get(name)) for name in names]
    done = [0] * len(batch)
    while any(d < len(ids) for d, ids in zip(done, batch, strict=True)):
        tokens, slots, places = [], [], []
        for i, ids in enumerate(batch):
            part = ids[done[i] : done[i] + chunk]
            room = decoder.max_tokens - len(tokens)
            part = part[:room]
            if len(part):
                decoder.grow(seqs[i], len(part))
                tokens += part.tolist()
                slots += [seqs[i]] * len(part)
                places += [(i, done[i] + k) for k in range(len(part))]
                done[i] += len(part)
        logits = np.empty((len(tokens), llm.spec.vocab_size), np.float32)
        rows = np.arange(len(tokens), dtype=np.int32)
        decoder.step(np.array(tokens, np.int32), np.array(slots, np.int32), rows, logits=logits)
        for row, (i, position) in enumerate(places):
            out[i][position] = logits[row]
    for seq in seqs:
        decoder.free_sequence(seq)
    return out
