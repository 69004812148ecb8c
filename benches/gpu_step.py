#!/usr/bin/env python3
"""Runs the gpu_step bench beside PyTorch, shape by shape, and prints a table of training steps.

usage: gpu_step.py BENCH PEER [--ranks N] [--repeats R] [--shapes I,J] [--variants NAME,NAME] [--steps S] [--backends libtorch,cuda]

BENCH is the program that `cargo bench -p burn-fsep-benches --features libtorch,nccl --bench gpu_step --no-run` builds; PEER a
script for torchrun that takes the same options and prints one line of JSON. Ranks have a GPU each. Same model, sizes, types and routing
on all sides; skewed routing is prepared before the clock starts. All take turns, of R repeats (2 by default) the median step
of the fastest counts; the last columns are how much faster than PyTorch and than our own static expert parallelism.
"""

import argparse
import json
import subprocess
import sys

SHAPES = [  # name, options of both sides
    ("Mixtral-like, skewed", "--layers 3 --hidden 4096 --ffn 4096 --experts 8 --topk 2 --routing skewed"),
    ("Mixtral-like, even", "--layers 3 --hidden 4096 --ffn 4096 --experts 8 --topk 2 --routing balanced"),
    ("Mixtral, skewed", "--layers 2 --hidden 4096 --ffn 14336 --experts 8 --topk 2 --routing skewed"),
    ("Mixtral, even", "--layers 2 --hidden 4096 --ffn 14336 --experts 8 --topk 2 --routing balanced"),
    ("OLMoE, by the routers", "--layers 4 --hidden 2048 --ffn 1024 --experts 64 --topk 8 --routing natural"),
    ("OLMoE, skewed", "--layers 4 --hidden 2048 --ffn 1024 --experts 64 --topk 8 --routing skewed --exponent 0.6"),
]

VARIANTS = {  # options of ours
    "static": ["--static-ep"],
    "static-by-assignment": ["--static-ep", "--token-rows", "by-assignment"],
    "static-chunks": ["--static-ep", "--token-chunks", "2"],
    "by-assignment": ["--token-rows", "by-assignment"],
    "data-parallel": ["--expert-parallel-size", "1"],
    "fsep": [],
    "counted": ["--token-rows", "counted"],
    "kept": ["--kept-layers", "1000"],
    "ctas8": ["--kept-layers", "1000", "--background-ctas", "8"],
    "ctas16": ["--kept-layers", "1000", "--background-ctas", "16"],
    "chunks2": ["--kept-layers", "1000", "--token-chunks", "2"],
    "chunks4": ["--kept-layers", "1000", "--token-chunks", "4"],
    "all": ["--kept-layers", "1000", "--token-chunks", "2", "--background-ctas", "16"],
}

LIMIT = 180


def last_line(command):
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": (result.stderr.strip().splitlines() or ["nothing printed"])[-1]}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("bench")
    parser.add_argument("peer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shapes", default=",".join(str(i) for i in range(len(SHAPES))))
    parser.add_argument("--variants", default="static,fsep,kept,chunks2,all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--backends", default="libtorch")
    args = parser.parse_args()
    for name, options in (SHAPES[int(i)] for i in args.shapes.split(",")):
        options = [*options.split(), "--steps", str(args.steps)]
        sides = {"pytorch": ["torchrun", "--nproc-per-node", str(args.ranks), args.peer, *options]}
        for backend in args.backends.split(","):
            for variant in args.variants.split(","):
                of_backend = [] if backend == "libtorch" else ["--backend", backend]
                side = variant if backend == "libtorch" else f"{variant} on {backend}"
                sides[side] = [args.bench, "--ranks", str(args.ranks), *options, *VARIANTS[variant], *of_backend]
        best = {}
        for _ in range(args.repeats):
            for side, command in sides.items():
                line = last_line(command)
                if "step_ms" not in line:
                    print(f"  {side}: {line.get('error', line)}", flush=True)
                elif side not in best or line["step_ms"] < best[side]["step_ms"]:
                    best[side] = line
        print(f"{name}; {args.ranks} ranks", flush=True)
        for side, line in best.items():
            ratios = [f"{best[of]['step_ms'] / line['step_ms']:.3f}x {of}" for of in ("pytorch", "static") if of in best]
            balance = f"max/mean {line.get('imbalance', 0):.3f}, static {line.get('imbalance_static', line.get('static_max_over_mean', 0)):.3f}"
            print(f"  {side:28}{line['step_ms']:9.2f} ms {line['tokens_per_s']:10.0f} tokens/s  {balance}  {'  '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
