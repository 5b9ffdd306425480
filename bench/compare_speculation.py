"""Speculative decoding: what it gains on answers that repeat their prompt, and what a wider step costs.

    python bench/compare_speculation.py --llama-python PATH [--openvino-python PATH] [--threads 2] [--rounds 7]
        [--only edit] [--quick]

The protocol and the environments of the peers are those of compare_inference.py: each peer in a process of its own, the
same GGUF file, token ids and threads, greedy, end tokens ignored. Ratios are to the same engine without speculation.

* "verify 8 tokens against 1": the time of a step that computes 8 tokens of one sequence with their logits, at context
  128, over that of one with 1 token. 1 would be free, 8 useless.
* "summarise", "edit", "code": tokens per second after the first, of answers about texts of Python's standard library,
  without and with prompt lookup of at most 8 tokens. "poem" has no text to copy from, but greedy answers of small
  models come to repeat themselves; at temperature 1 they do not, which shows what it costs where it does not pay.

pyengine's answers with and without speculation must be the same tokens; others keep no such promise. A table goes to
stdout, and as its last line the ratios as JSON. The record is appended to
bench/results/compare_speculation.jsonl, unless --quick.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from arguments import parse_comparison  # noqa: E402
from probes import Probes  # noqa: E402
from rounds import Row, Worker, commit, machine, progress, quartiles, run_row, table  # noqa: E402
from speculation_inputs import CONVERSATIONS  # noqa: E402

RESULTS = HERE / "results/compare_speculation.jsonl"
NUM_WARM = 2
NUM_TOKENS = 128
NUM_PROPOSED = 8
CONTEXT = 128
VERIFY = "verify 8 tokens against 1"
LOOKUP = " + lookup"


def main() -> None:
    args = parse_comparison(__doc__)
    inputs = encode_inputs(args.model)
    probe = Probes(args.threads)
    with ExitStack() as stack:
        workers = start_workers(stack, args)
        check_answers(workers, inputs, args)
        rows = measure(workers, inputs, probe, args)
        counts = {worker.name: worker("speculation") for worker in workers if is_own(worker, LOOKUP)}
    report(rows, workers, counts, args)


def encode_inputs(model: Path) -> dict[str, list[list[int]]]:
    """Workload -> prompts as token ids."""
    from pyengine.infer.source import open_source

    source = open_source(model)
    tokenizer, template = source.tokenizer(), source.chat_template()
    if template is None:
        sys.exit(f"{model}: expected a model with a chat template")
    return {
        name: [
            tokenizer.encode(template.render(messages, add_generation_prompt=True), add_special_tokens=False)
            for messages in conversations
        ]
        for name, conversations in CONVERSATIONS.items()
    }


def start_workers(stack: ExitStack, args: argparse.Namespace) -> list[Worker]:
    """Each engine without and with speculation."""
    own = {"PYTHONPATH": str(HERE.parent)}
    commands: list[tuple[str, str, str, list[str], dict[str, str]]] = []
    for mode in ("exact", "bf16", "fast"):
        options = [f"mode={mode}", "kv_dtype=bfloat16"]
        commands += [
            (f"pyengine {mode}", sys.executable, "pyengine_peer", options, own),
            (f"pyengine {mode}{LOOKUP}", sys.executable, "pyengine_peer", [*options, "speculation=prompt_lookup"], own),
        ]
    number = f"num_speculative_tokens={NUM_PROPOSED}"
    if args.llama_python:
        commands += [
            ("llama.cpp", args.llama_python, "llama_cpp_peer", [], {}),
            (f"llama.cpp{LOOKUP}", args.llama_python, "llama_cpp_lookup_peer", [number], {}),
        ]
    if args.openvino_python:
        commands += [
            ("OpenVINO", args.openvino_python, "openvino_peer", [], {}),
            (f"OpenVINO{LOOKUP}", args.openvino_python, "openvino_peer", ["prompt_lookup=true", number], {}),
        ]
    workers = []
    for name, python, script, options, environment in commands:
        command = [python, str(HERE / f"peers/{script}.py"), "--model", str(args.model), "--threads", str(args.threads)]
        for option in options:
            command += ["--option", option]
        workers.append(stack.enter_context(Worker(name, command, environment)))
        progress(f"{name}: {workers[-1].info}")
    return workers


def is_own(worker: Worker, end: str = "") -> bool:
    return worker.name.startswith("pyengine") and worker.name.endswith(end)


def check_answers(workers: list[Worker], inputs: dict[str, list[list[int]]], args: argparse.Namespace) -> None:
    """Ends the program unless speculation leaves pyengine's tokens as they are."""
    by_name = {worker.name: worker for worker in workers}
    names = [name for name in inputs if re.search(args.only, name)]
    for name in names:
        for prompt in inputs[name][: 1 if args.quick else None]:
            for mode in ("exact", "bf16", "fast"):
                plain, lookup = (
                    by_name[f"pyengine {mode}{end}"]("answer", prompt=prompt, num_tokens=NUM_TOKENS)
                    for end in ("", LOOKUP)
                )
                if plain != lookup:
                    sys.exit(f"{name}: pyengine {mode} gives other tokens with speculation")
    progress(f"same tokens with and without speculation: {', '.join(names)}")


def measure(
    workers: list[Worker], inputs: dict[str, list[list[int]]], probe: Probes, args: argparse.Namespace
) -> list[Row]:
    """All workloads. Every call of a worker takes the next prompt, the same one for all in a round."""
    num_tokens = 32 if args.quick else NUM_TOKENS
    calls = dict.fromkeys((worker.name for worker in workers), 0)

    def verify(worker: Worker) -> float:
        prompt = inputs["code"][0][:CONTEXT]
        times = [float(worker("verify", prompt=prompt, num_rows=n, num_steps=num_tokens // 4)) for n in (1, 8)]
        return times[1] / times[0]

    def decode(prompts: list[list[int]], **options: float) -> Callable[[Worker], float]:
        def call(worker: Worker) -> float:
            calls[worker.name] += 1
            prompt = prompts[calls[worker.name] % len(prompts)]
            return num_tokens / float(worker("decode", prompts=[prompt], num_steps=num_tokens, **options))

        return call

    can_verify = [worker for worker in workers if LOOKUP not in worker.name and worker.name != "OpenVINO"]
    workloads: list[tuple[str, str, list[Worker], Callable[[Worker], float]]] = [(VERIFY, "steps", can_verify, verify)]
    workloads += [(name, "tok/s", workers, decode(prompts)) for name, prompts in inputs.items()]
    own = [worker for worker in workers if is_own(worker)]
    workloads.append(("poem at temperature 1", "tok/s", own, decode(inputs["poem"], temperature=1.0)))
    rows = []
    for name, unit, peers, call in workloads:
        if not re.search(args.only, name):
            continue
        for worker in peers:
            for _ in range(1 if args.quick else NUM_WARM):
                call(worker)
        rows.append(Row(name, unit))
        run_row(rows[-1], peers, call, probe, args.rounds, max_move=args.max_move)
    return rows


def gains(row: Row) -> dict[str, tuple[float, float, float]]:
    """Engine -> speed with speculation over that without, round by round: median, first and third quartile."""
    out = {}
    for name in row.values:
        if name.endswith(LOOKUP):
            engine = name.removesuffix(LOOKUP)
            ratios = [a / b for a, b in zip(row.values[name], row.values[engine], strict=True)]
            out[engine] = (statistics.median(ratios), *quartiles(ratios))
    return out


def report(rows: list[Row], workers: list[Worker], counts: dict[str, Any], args: argparse.Namespace) -> None:
    print(table(rows, "llama.cpp" if args.llama_python else "pyengine exact"))
    for row in rows:
        for engine, gain in gains(row).items():
            print("{}: {} with prompt lookup {:.2f}x [{:.2f}, {:.2f}] of without".format(row.name, engine, *gain))
    for name, count in counts.items():
        print(f"{name}: {count}")
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(HERE.parent),
        "machine": machine(),
        "model": args.model.name,
        "threads": args.threads,
        "max_probe_move": args.max_move,
        "peers": {worker.name: worker.info for worker in workers},
        "speculation": counts,
        "rows": [vars(row) for row in rows],
    }
    summary: dict[str, Any] = {"bench": "compare_speculation", "commit": record["commit"], "threads": args.threads}
    summary["median"] = {
        row.name: {name: round(statistics.median(values), 3) for name, values in row.values.items()} for row in rows
    }
    summary["gain"] = {
        row.name: {engine: round(gain[0], 3) for engine, gain in gains(row).items()} for row in rows if gains(row)
    }
    record["summary"] = summary
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    main()
