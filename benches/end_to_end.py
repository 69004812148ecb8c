#!/usr/bin/env python3
"""Trains moe-lm end to end under static expert parallelism and under FSEP with the planner, and prints the speeds side by side.

    cargo build --release -p burn-fsep --features cli -p moe-lm
    benches/end_to_end.py --moe-lm target/release/moe-lm --launcher target/release/fsep-launch --ranks 8 --text FILE...

Ranks are processes that fsep-launch starts, exchange over TCP (unless --comm says otherwise) and have --cores-per-rank cores of their own.
Both sides train the same model on the same text, without an auxiliary loss, from the same seed and with as many tokens a rank;
they take turns, and each repeat begins with the other one. Their losses are compared step by step: they have to agree.

Routing is what the routers do (natural), forced shares of one step of the paper's trace (skewed; with an expert a rank, static
expert parallelism has a max/mean of 1.87 there, 1.88 being the mean over all steps of the trace), and forced equal shares
(even), where there is nothing to win and the ratio shows what FSEP costs.

Regime. On CPUs a restored expert costs time of the cores that compute. In a layer and step a rank takes in, and sends, 3 * C * P
parameters (restores in forward and backward, gradients' reshard; C slots, P = 3 * D * F), and computes 6 * P flop for each of its
T * K assignments. The ratio of the two depends on T * K / C alone, the assignments of a slot: with 50 GFLOP/s and 1 GB/s
a core, 2,000 keep the transfers below a tenth of the experts' time, and 4,096 below a twentieth. (GPUs hide transfers behind
compute; the paper has 8,192 to 16,384.) The rest of the step must be small, too: F several times D, short contexts. The
defaults are of this kind.

Options after `--` go to moe-lm, on both sides: `-- --no-prefetch`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Layer 2, step 1 of the paper's run (32 ranks, 8 experts), all ranks together.
PAPER_SHARES = "0.0971,0.2338,0.1101,0.1209,0.1697,0.0639,0.0619,0.1426"
SIDES = ("static EP", "FSEP")


def pin(cores_per_rank, command):
    """In a rank's process: takes the rank's cores and becomes the command."""
    rank, cores = int(os.environ["LOCAL_RANK"]), sorted(os.sched_getaffinity(0))
    if cores_per_rank:
        os.sched_setaffinity(0, cores[rank * cores_per_rank : (rank + 1) * cores_per_rank])
    for variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(max(1, cores_per_rank))
    os.execv(command[0], command)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe-lm", type=Path, required=True, help="the program moe-lm")
    parser.add_argument("--launcher", type=Path, required=True, help="the program fsep-launch")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--cores-per-rank", type=int, default=1, help="0 pins nothing: to try this script, not to measure")
    parser.add_argument("--comm", default="process", help="process, or nccl (with `--backend libtorch ... -- --device cuda`)")
    parser.add_argument("--backend", default="flex", help="flex or libtorch")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="default: moe-lm's, sources in cargo's folder")
    parser.add_argument("--cases", default="natural,skewed,even")
    parser.add_argument("--shares", default=PAPER_SHARES, help="of the skewed case, one an expert")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9, help="of each run, warm-up included")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank in a step")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--slots", type=int, help="of a rank under FSEP [default: just enough for all experts, plus one]")
    parser.add_argument("--loss-tolerance", type=float, default=1e-3, help="largest relative difference of the sides' losses; more in bf16")
    parser.add_argument("options", nargs="*", help="further options of moe-lm, after `--`")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if args.ranks * args.cores_per_rank > cores:
        parser.error(f"{args.ranks} ranks with {args.cores_per_rank} core(s) each need more cores than the {cores} there are")
    if args.tokens % args.context:
        parser.error("--tokens must be a multiple of --context")
    if not 0 <= args.warm_up < args.steps:
        parser.error("--warm-up must leave steps to count")
    unknown = set(args.cases.split(",")) - {"natural", "skewed", "even"}
    if unknown:
        parser.error(f"--cases: {', '.join(sorted(unknown))} is none of natural, skewed and even")
    if "skewed" in args.cases and len(args.shares.split(",")) != args.experts:
        parser.error(f"--shares must have {args.experts} numbers, one an expert")
    for program in (args.moe_lm, args.launcher):
        if not os.access(program, os.X_OK):
            parser.error(f"{program} is no program; build it as --help says")
    return args


def run(args, case, side, folder):
    """The rows of metrics.jsonl of one training."""
    job = [str(args.moe_lm.resolve()), "--comm", args.comm, "--backend", args.backend, "--out", str(folder)]
    sizes = {"steps": args.steps, "context": args.context, "batch": args.ranks * args.tokens // args.context}
    sizes |= {"layers": args.layers, "hidden": args.hidden, "ffn": args.ffn, "experts": args.experts, "top-k": args.top_k}
    sizes |= {"valid-batches": 1, "sample": 1}
    for name, value in sizes.items():
        job += [f"--{name}", str(value)]
    if args.text:
        job += ["--text", *(str(file.resolve()) for file in args.text)]
    if case != "natural":
        job += ["--force-shares", args.shares if case == "skewed" else ",".join([str(1 / args.experts)] * args.experts)]
    if side == "static EP":
        job += ["--planner", "static"]
    elif args.slots:
        job += ["--slots", str(args.slots)]
    pinned = [sys.executable, str(Path(__file__).resolve()), "--pin", str(args.cores_per_rank), *job, *args.options]
    command = [str(args.launcher.resolve()), "--ranks", str(args.ranks), "--", *pinned]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"{result.stdout}\nfailed with exit code {result.returncode}: {' '.join(command)}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def speed(args, rows):
    """Tokens a second after the warm-up."""
    rows = rows[args.warm_up :]
    return len(rows) / sum(1 / row["tokens_per_second"] for row in rows)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def verdict(case, ratio, static_imbalance, imbalance):
    """What was wanted of a case, and whether it was met."""
    wanted = []
    if case == "even":
        wanted.append(("at least 0.95x", ratio >= 0.95))
    elif static_imbalance >= 1.7:
        wanted.append(("at least 1.5x", ratio >= 1.5))
    if case != "even":
        wanted.append(("imbalance at most 1.05", imbalance <= 1.05))
    return ", ".join(f"{text}: {'met' if met else 'MISSED'}" for text, met in wanted)


def cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "unknown CPU"
    return f"{name}, {os.cpu_count()} CPUs"


def main():
    if len(sys.argv) > 3 and sys.argv[1] == "--pin":
        pin(int(sys.argv[2]), sys.argv[3:])
    args = parse()
    cases = args.cases.split(",")
    cores = f"with {args.cores_per_rank} core(s) each" if args.cores_per_rank else "that share all cores"
    print(f"{cpu()}; {args.ranks} ranks {cores}, {args.backend}, --comm {args.comm} {' '.join(args.options)}")
    print(
        f"{args.tokens} tokens a rank, D={args.hidden} F={args.ffn} E={args.experts} K={args.top_k}, {args.layers} layers, "
        f"context {args.context}; {args.steps - args.warm_up} steps after {args.warm_up} of warm-up, {args.repeats} runs",
        flush=True,
    )
    runs = {(case, side): [] for case in cases for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for case in cases:
                for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                    rows = run(args, case, side, Path(folder) / f"{case}-{side[:4]}-{repeat}")
                    runs[case, side].append(rows)
                    print(f"  {case:8} {side:10}{speed(args, rows):9.0f} tokens/s", file=sys.stderr, flush=True)
    counted = lambda all_rows: [row for rows in all_rows for row in rows[args.warm_up :]]
    print(f"\n{'':9}{'static EP':>20}{'FSEP + planner':>20}{'ratio':>8}   max/mean of tokens a rank    worst difference")
    print(f"{'routing':9}{'tokens/s':>20}{'tokens/s':>20}{'':>8}   static  planned  worst step    of a loss")
    for case in cases:
        static, fsep = runs[case, SIDES[0]], runs[case, SIDES[1]]
        speeds = [[speed(args, rows) for rows in side] for side in (static, fsep)]
        ratio = mean(speeds[1]) / mean(speeds[0])
        before = mean(row["imbalance"] for row in counted(static))
        after = mean(row["imbalance"] for row in counted(fsep))
        worst = max(row["imbalance_max"] for row in counted(fsep))
        pairs = [(a["loss"], b["loss"]) for ours, theirs in zip(static, fsep) for a, b in zip(ours, theirs, strict=True)]
        difference = max(abs(a - b) / a for a, b in pairs)
        print(
            f"{case:9}{', '.join(f'{s:.0f}' for s in speeds[0]):>20}{', '.join(f'{s:.0f}' for s in speeds[1]):>20}{ratio:7.2f}x"
            f"{before:9.3f}{after:9.3f}{worst:12.3f}{difference:17.1e}   {verdict(case, ratio, before, after)}"
        )
        if not difference <= args.loss_tolerance:
            sys.exit(f"{case}: the two sides do not train the same model")


if __name__ == "__main__":
    main()
