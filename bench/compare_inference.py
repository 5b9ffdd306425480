"""pyengine and its peers in one run: the same GGUF file, token ids and threads, greedy, end tokens ignored.

    python bench/compare_inference.py --llama-python PATH [--openvino-python PATH] [--threads 1] [--rounds 7]
        [--only "decode 1"] [--quick]

The first PATH is the Python of an environment with llama-cpp-python, built for this machine, the second of one with
openvino-genai. llama-cpp-python with AVX-512 and without AMX:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
      -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON" \\
      pip install --no-binary llama-cpp-python llama-cpp-python

Each peer lives in a process of its own, which is stopped while another is timed. A round times every peer once, in
rotating order; ratios are taken within a round. Probes of the machine surround every timed section, and a round in
which one of them moved by more than --max-move is thrown away. The keys and values of all peers have 2 bytes each.

Accuracy stands beside speed: KL is the mean over real text of the divergence from mode exact with a float32 cache,
which tests/infer/test_smollm2.py holds to the accuracy of transformers in float32. OpenVINO shows no logits.

A busy neighbour is a process that spins while a peer is timed.

A table goes to stdout, and as its last line the ratios as JSON. The whole record is appended to
bench/results/compare_inference.jsonl, unless --quick.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from arguments import parse_comparison  # noqa: E402
from probes import Probes  # noqa: E402
from rounds import Row, Worker, commit, machine, progress, run_row, table  # noqa: E402

BASE = "llama.cpp"
RESULTS = HERE / "results/compare_inference.jsonl"
NUM_WARM = 3
NUM_KL_TOKENS = 512
LONG = 2048
MODES = ("exact", "bf16", "fast")


def main() -> None:
    args = parse_args()
    tokens = token_stream(args.model)
    probe = Probes(args.threads)
    with ExitStack() as stack:
        workers = start_workers(stack, args)
        rows = measure(workers, tokens, probe, args)
        memory = {worker.name: worker("peak_bytes") for worker in workers}
        accuracy = measure_kl(workers, tokens(0, NUM_KL_TOKENS), args)
    # A second load would raise the peak of those processes, so it has processes of its own.
    with ExitStack() as stack:
        rows.append(Row("load", "s"))
        loaders = start_workers(stack, args)
        run_row(rows[-1], loaders, lambda worker: float(worker("load")), probe, args.rounds, max_move=args.max_move)
    report(rows, workers, memory, accuracy, args)


def parse_args() -> argparse.Namespace:
    args = parse_comparison(__doc__)
    if not args.quick and args.llama_python is None:
        sys.exit("--llama-python: expected a path; only --quick runs without it")
    return args


def token_stream(model: Path) -> Callable[[int, int], list[int]]:
    """(start, count) -> token ids of real text; the text repeats."""
    from pyengine.infer.source import open_source
    from pyengine.testing.texts import CODE, PROSE

    ids = open_source(model).tokenizer().encode(PROSE + CODE)
    return lambda start, count: [ids[i % len(ids)] for i in range(start, start + count)]


def pyengine_worker(args: argparse.Namespace, mode: str, kv_dtype: str = "bfloat16") -> Worker:
    command = [sys.executable, str(HERE / "peers/pyengine_peer.py"), "--model", str(args.model)]
    command += ["--threads", str(args.threads), "--option", f"mode={mode}", "--option", f"kv_dtype={kv_dtype}"]
    return Worker(f"pyengine {mode}", command, {"PYTHONPATH": str(HERE.parent)})


def start_workers(stack: ExitStack, args: argparse.Namespace) -> list[Worker]:
    workers = [stack.enter_context(pyengine_worker(args, mode)) for mode in MODES]
    if args.llama_python:
        command = [args.llama_python, str(HERE / "peers/llama_cpp_peer.py"), "--model", str(args.model)]
        workers.append(stack.enter_context(Worker(BASE, [*command, "--threads", str(args.threads)])))
    if args.openvino_python:
        command = [args.openvino_python, str(HERE / "peers/openvino_peer.py"), "--model", str(args.model)]
        workers.append(stack.enter_context(Worker("OpenVINO", [*command, "--threads", str(args.threads)])))
    for worker in workers:
        progress(f"{worker.name}: {worker.info}")
    return workers


def measure(
    workers: list[Worker], tokens: Callable[[int, int], list[int]], probe: Probes, args: argparse.Namespace
) -> list[Row]:
    """All workloads. Every call of a worker starts at another place of the text, the same one for all in a round."""
    num_steps = 8 if args.quick else 64
    calls = dict.fromkeys((worker.name for worker in workers), 0)

    def start_of(worker: Worker) -> int:
        calls[worker.name] += 1
        return 37 * calls[worker.name]

    def decode(num_sequences: int, context: int, num_neighbours: int = 0) -> Callable[[Worker], float]:
        def call(worker: Worker) -> float:
            start = start_of(worker)
            prompts = [tokens(start + 53 * s, context) for s in range(num_sequences)]
            with busy_neighbours(num_neighbours):
                seconds = worker("decode", prompts=prompts, num_steps=num_steps)
            return num_sequences * num_steps / float(seconds)

        return call

    def prefill(num_tokens: int) -> Callable[[Worker], float]:
        return lambda worker: num_tokens / float(worker("prefill", prompt=tokens(start_of(worker), num_tokens)))

    workloads: list[tuple[str, str, Callable[[Worker], float]]] = [
        ("decode 1, context 128", "tok/s", decode(1, 128)),
        (f"decode 1, context {LONG}", "tok/s", decode(1, LONG)),
        ("prefill 512", "tok/s", prefill(512)),
        (f"prefill {LONG}", "tok/s", prefill(LONG)),
        ("decode 8 sequences", "tok/s", decode(8, 16)),
        ("decode 32 sequences", "tok/s", decode(32, 16)),
        ("decode 1, 1 neighbour", "tok/s", decode(1, 128, num_neighbours=1)),
        ("decode 1, 2 neighbours", "tok/s", decode(1, 128, num_neighbours=2)),
    ]
    rows = []
    for name, unit, call in workloads:
        if not re.search(args.only, name):
            continue
        for worker in workers:
            for _ in range(1 if args.quick else NUM_WARM):
                call(worker)
        rows.append(Row(name, unit))
        run_row(rows[-1], workers, call, probe, args.rounds, max_move=args.max_move)
    return rows


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Other work on the cores, of the kind that never sleeps."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_kl(workers: list[Worker], token_ids: list[int], args: argparse.Namespace) -> dict[str, float]:
    """Peer -> mean KL per token, nats, of those that show logits."""
    import numpy as np

    from pyengine.evals import measure_divergence

    with tempfile.TemporaryDirectory() as folder, pyengine_worker(args, "exact", kv_dtype="float32") as reference:
        logits = {}
        for key, worker in [("reference", reference), *((worker.name, worker) for worker in workers)]:
            path = str(Path(folder) / "logits.npy")
            if worker("logits", token_ids=token_ids, path=path):
                logits[key] = np.load(path)
    exact = logits.pop("reference")
    return {name: measure_divergence([(exact, values)]).mean_kl for name, values in logits.items()}


def report(
    rows: list[Row], workers: list[Worker], memory: dict[str, int], accuracy: dict[str, float], args: argparse.Namespace
) -> None:
    print(table(rows, BASE))
    for worker in workers:
        name = worker.name
        kl = f"{accuracy[name]:.2g} nats/token" if name in accuracy else "not to be had"
        print(f"{name}: peak memory {memory[name] / 1e6:.0f} MB, KL {kl}")
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(HERE.parent),
        "machine": machine(),
        "model": args.model.name,
        "threads": args.threads,
        "max_probe_move": args.max_move,
        "peers": {worker.name: worker.info for worker in workers},
        "peak_bytes": memory,
        "mean_kl": accuracy,
        "rows": [vars(row) for row in rows],
    }
    summary: dict[str, Any] = {"bench": "compare_inference", "commit": record["commit"], "threads": args.threads}
    if args.llama_python:
        ours = [worker.name for worker in workers if worker.name != BASE]
        summary["ratio"] = {
            row.name: {name: round(row.ratio(name, BASE)[0], 3) for name in ours} for row in rows if row.values
        }
        summary["memory_ratio"] = {name: round(memory[BASE] / memory[name], 3) for name in ours}
    summary["mean_kl"] = {name: float(f"{value:.3g}") for name, value in accuracy.items()}
    record["summary"] = summary
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    main()
