#!/usr/bin/env python3
"""A finetuning step of OLMoE-1B-7B's own sizes by transformers, on one GPU: the peer of our own finetuning.

    python hf_finetune_step.py --layers 8 --batch 4 --seq 2048 --steps 12

Random weights and tokens, bf16 weights and AdamW states, scaled dot product attention (flash kernels where torch has
them), experts by `grouped_mm`, the pooled auxiliary loss, fused AdamW. With torchrun several ranks train one model by
FSDP2, a layer at a time; with --master-weights parameters, gradients and states are of single precision, products of
bf16. Measured is the whole step: forward, losses, backward, optimizer. Steps are timed by CUDA events and read once at
the end, so that nothing waits but transformers itself (it reads one number a forward, in
masking_utils.find_packed_sequence_indices). Prints one line of JSON.

Model FLOP of a step, from the sizes alone, so that it is comparable between programs:
    6 * T * N + 6 * layers * B * S^2 * D
T = B * S tokens; N = active matrix parameters = layers * (4 D^2 + D E + 3 K D F) + D V, with E experts, K of them
for each token, of width F (embeddings are looked up, not multiplied). The second term is causal attention: scores
and values are 4 S^2 D a sequence and layer, half of that is masked, times 3 for forward and backward.
"""

import argparse
import json
import os
import statistics
import time

OLMOE = {"hidden": 2048, "intermediate": 1024, "experts": 64, "top_k": 8, "heads": 16, "vocab": 50304}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12, help="timed steps, after the warm-up")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--experts-implementation", default="grouped_mm")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile(model), if that is the faster peer")
    parser.add_argument("--master-weights", action="store_true", help="parameters in f32, products in bf16")
    parser.add_argument("--text", help="a text whose bytes are the tokens, in place of random ones")
    parser.add_argument("--no-aux", action="store_true", help="without the auxiliary loss")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    for name, size in OLMOE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"OLMoE-1B-7B's is {size}")
    return parser.parse_args()


def active_parameters(options):
    d = options.hidden
    layer = 4 * d * d + d * options.experts + 3 * options.top_k * d * options.intermediate
    return options.layers * layer + d * options.vocab


def model_flop(options):
    tokens = options.batch * options.seq
    attention = options.layers * options.batch * options.seq**2 * options.hidden
    return 6 * tokens * active_parameters(options) + 6 * attention


def make_model(options):
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        num_experts=options.experts, num_experts_per_tok=options.top_k, max_position_embeddings=max(4096, options.seq),
        router_aux_loss_coef=0.01, use_cache=False, pad_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = OlmoeForCausalLM._from_config(
            config, dtype=torch.float32 if options.master_weights else torch.bfloat16, attn_implementation=options.attention,
            experts_implementation=options.experts_implementation,
        )
    found = (model.config._attn_implementation, model.config._experts_implementation)
    assert found == (options.attention, options.experts_implementation), found
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = model.train()
    if ranks() > 1 or options.master_weights:
        shard(model, options)
    return model


def ranks():
    return int(os.environ.get("WORLD_SIZE", "1"))


def shard(model, options):
    """FSDP2: each layer's parameters are gathered while the layer before computes."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29411")
        dist.init_process_group("nccl", rank=int(os.environ.get("RANK", "0")), world_size=ranks())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


class Clock:
    """Marks between steps; nothing waits for the device until all are made."""

    def __init__(self, device):
        import torch

        self.torch, self.cuda, self.marks = torch, device.startswith("cuda"), []

    def mark(self):
        if self.cuda:
            event = self.torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self):
        if self.cuda:
            self.torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:])]
        return [b - a for a, b in zip(self.marks, self.marks[1:])]


def run(options):
    import torch

    cuda = options.device.startswith("cuda")
    rank = int(os.environ.get("RANK", "0"))
    if cuda and ranks() > 1:
        torch.cuda.set_device(rank)
    model = make_model(options)
    forward = torch.compile(model) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    random = torch.Generator(options.device).manual_seed(options.seed + rank)
    total = options.warmup + options.steps
    batches = torch.randint(
        0, options.vocab, (total, options.batch, options.seq), generator=random, device=options.device
    )

    if options.text:
        with open(options.text, "rb") as file:
            text = torch.tensor(list(file.read()), device=options.device)
        starts = torch.randint(0, len(text) - options.seq + 1, (total, options.batch, 1), generator=random, device=options.device)
        batches = text[starts + torch.arange(options.seq, device=options.device)]

    def step(ids):
        loss = forward(input_ids=ids, labels=ids, output_router_logits=not options.no_aux, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    losses = [step(ids) for ids in batches[: options.warmup]]
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(options.device)
    clock.mark()
    for ids in batches[options.warmup:]:
        losses.append(step(ids))
        clock.mark()
    return model, clock.seconds(), torch.stack(losses).float().tolist()


def main():
    options = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    cuda = options.device.startswith("cuda")
    model, seconds, losses = run(options)
    tokens, flop = ranks() * options.batch * options.seq, ranks() * model_flop(options)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    median, best = statistics.median(seconds), min(seconds)
    print(json.dumps({
        "program": "transformers OlmoeForCausalLM",
        "ranks": ranks(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "options": vars(options),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": active_parameters(options),
        "model_flop_per_step": flop,
        "step_seconds": {"median": median, "best": best, "all": seconds},
        "tokens_per_second": {"median": tokens / median, "best": tokens / best},
        "model_flop_per_second": {"median": flop / median, "best": flop / best},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_memory_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "losses": losses,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }))


if __name__ == "__main__":
    main()
