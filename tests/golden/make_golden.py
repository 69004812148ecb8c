#!/usr/bin/env python3
"""Tiny random models of each Mixture-of-Experts family and their golden numbers, made by transformers.

    python make_golden.py all                    every folder beside this script, from nothing
    python make_golden.py family mixtral olmoe   only the named folders
    python make_golden.py check DIR ORIGINAL     does transformers read DIR, and is it ORIGINAL's model bit by bit?
    python make_golden.py big DIR                a Mixtral of about 1 GB in several files, for memory tests

README.md beside this script tells what the folders hold.
"""

TORCH = "2.15.0"
TRANSFORMERS = "5.24.0"
SAFETENSORS = "0.8.0"
NUMPY = "2.4.6"
# pip install torch==2.15.0 --index-url https://download.pytorch.org/whl/cpu   (or PyPI's)
# pip install transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6

import argparse
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent

BATCH, SEQUENCE, VOCABULARY = 3, 12, 96
BLOCK_BATCH = 2  # the block alone sees [2, 12, D]
MARGIN = 1e-4  # between the last chosen score and the next one, for every token of every golden input

FINETUNE = {
    "steps": 20, "batch": 4, "sequence": SEQUENCE, "learning_rate": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8,
    "weight_decay": 0.01,
}

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
MLA = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10, num_key_value_heads=4)

# Chosen so that every switch of the semantics stands both ways in some family: see README.md.
FAMILIES = {
    "mixtral": dict(
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=12, sliding_window=6, router_aux_loss_coef=0.02,
    ),
    "qwen2_moe": dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=6, shared_expert_intermediate_size=20,
        intermediate_size=24, norm_topk_prob=False, tie_word_embeddings=True, rope_parameters=LLAMA3,
        router_aux_loss_coef=0.02,
    ),
    "qwen3_moe": dict(
        num_experts=8, num_experts_per_tok=4, moe_intermediate_size=6, intermediate_size=24, head_dim=12,
        norm_topk_prob=True, rope_parameters=YARN, max_position_embeddings=1024, router_aux_loss_coef=0.05,
    ),
    "olmoe": dict(
        num_experts=8, num_experts_per_tok=2, intermediate_size=6, norm_topk_prob=False, clip_qkv=1.5,
        rope_parameters=LINEAR,
    ),
    "deepseek_v2": dict(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=6, intermediate_size=24, n_shared_experts=2,
        first_k_dense_replace=1, n_group=4, topk_group=2, topk_method="group_limited_greedy",
        routed_scaling_factor=1.5, q_lora_rank=None, **MLA,
    ),
    "deepseek_v3": dict(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=10, intermediate_size=24, n_shared_experts=1,
        first_k_dense_replace=1, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
        q_lora_rank=16, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, max_position_embeddings=1024,
        num_mtp_layers=0, **MLA,
    ),
    "gpt_oss": dict(
        num_local_experts=8, num_experts_per_tok=4, intermediate_size=10, head_dim=8, sliding_window=6,
        swiglu_limit=2.5,
    ),
}
# Kinds of rope that no family above has: logits of mixtral's weights with these changes to its config. A tiny
# max_position_embeddings, or `dynamic` would be the ordinary rope. head_dim is spelled out, for transformers 5.24
# fails on Mixtral's default of None with dynamic and yarn.
MIXTRAL_ROPES = {"dynamic": dict(rope_parameters=DYNAMIC, max_position_embeddings=8, head_dim=8)}


# ---------------------------------------------------------------- torch, set up the same everywhere


def load_libraries():
    """Imports torch and transformers late, for --help and `big` need neither."""
    global torch, transformers, save_file, safe_open
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, found, pinned in [
        ("torch", torch.__version__.split("+")[0], TORCH),
        ("transformers", transformers.__version__, TRANSFORMERS),
    ]:
        if found != pinned:
            print(f"warning: {name} is {found}, the files were made with {pinned}", file=sys.stderr)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def save_golden(folder, tensors, facts):
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "golden.safetensors")
    facts = {name: None if value == math.inf else value for name, value in facts.items()}  # all experts chosen
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, **facts}
    (folder / "golden.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read_tensors(folder):
    """All tensors of a model folder, one file or several, under the names in the files."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index = json.loads(index.read_text())
        files = sorted(set(index["weight_map"].values()))
    else:
        index, files = None, ["model.safetensors"]
    tensors = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():
                if name in tensors:
                    raise SystemExit(f"{name} stands in two files of {folder}")
                if index and index["weight_map"].get(name) != file:
                    raise SystemExit(f"the index of {folder} does not say that {name} is in {file}")
                tensors[name] = opened.get_tensor(name)
    if index:
        for name in index["weight_map"]:
            if name not in tensors:
                raise SystemExit(f"the index of {folder} names {name}, which no file holds")
        size = sum(tensor.nbytes for tensor in tensors.values())
        if index["metadata"].get("total_size") != size:
            raise SystemExit(f"the index of {folder} tells {index['metadata']} but the tensors take {size} bytes")
    return tensors


# ---------------------------------------------------------------- models


def make_config(family, **overrides):
    classes = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    settings = {**COMMON, **FAMILIES[family], **overrides}
    return classes[family](**settings, attn_implementation="eager", experts_implementation="eager")


def make_model(config, seed):
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    randomize(model, seed)
    return model.eval()


def randomize(model, seed):
    """Values with which nothing is degenerate: routers prefer, biases and norms are not what they start as."""
    random = generator(seed)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    values = [*model.named_parameters(), *(b for b in model.named_buffers() if "correction_bias" in b[0])]
    with torch.no_grad():
        for name, value in sorted(values):
            if name in tied:
                continue
            if "norm" in name and name.endswith("weight"):
                mean, deviation = 1.0, 0.2
            elif re.search(r"(mlp\.gate|router)\.weight$", name):
                mean, deviation = 0.0, 0.3
            elif "embed_tokens" in name:
                mean, deviation = 0.0, 0.5
            elif "correction_bias" in name:
                mean, deviation = 0.0, 0.1
            elif name.endswith("sinks"):
                mean, deviation = 0.0, 1.0
            else:
                mean, deviation = 0.0, 0.2
            value.copy_(torch.randn(value.shape, generator=random) * deviation + mean)


def routers(model):
    """(layer, router module) of each MoE layer."""
    found = []
    for layer, decoder in enumerate(model.model.layers):
        router = getattr(decoder.mlp, "gate", None) or getattr(decoder.mlp, "router", None)
        if router is not None:
            found.append((layer, router))
    return found


def choice_margin(config, router, logits):
    """The least distance between a chosen and the next unchosen score, of experts and of groups."""
    logits, family = logits.detach().float(), config.model_type
    count = config.num_experts_per_tok
    if family == "gpt_oss":
        scores = logits
    elif family == "deepseek_v3":
        scores = logits.sigmoid() + router.e_score_correction_bias
    else:
        scores = logits.softmax(-1)
    margins = []

    def gap(values, chosen):
        ordered = values.sort(-1, descending=True).values
        if chosen < values.shape[-1]:
            margins.append((ordered[:, chosen - 1] - ordered[:, chosen]).min().item())

    grouped = family == "deepseek_v3" or getattr(config, "topk_method", None) == "group_limited_greedy"
    if grouped:
        by_group = scores.view(scores.shape[0], config.n_group, -1)
        best = by_group.topk(2, -1).values.sum(-1) if family == "deepseek_v3" else by_group.max(-1).values
        gap(best, config.topk_group)
        kept = torch.zeros_like(best).scatter_(1, best.topk(config.topk_group, -1).indices, 1.0).bool()
        scores = by_group.masked_fill(~kept.unsqueeze(-1), -10.0).flatten(1)
    gap(scores, count)
    return min(margins, default=math.inf)


class RecordRouters:
    """Keeps each MoE layer's router logits of the forwards inside `with`, and their least margin."""

    def __init__(self, model):
        self.model, self.logits, self.margin = model, {}, math.inf

    def __enter__(self):
        def keep(layer):
            def hook(router, _inputs, outputs):
                logits = outputs[0].detach().reshape(-1, outputs[0].shape[-1])
                self.logits[layer] = logits.clone()
                self.margin = min(self.margin, choice_margin(self.model.config, router, logits))

            return hook

        self.handles = [router.register_forward_hook(keep(layer)) for layer, router in routers(self.model)]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def draw_until_clear(model, draw, seed, others=(), tries=200):
    """The first drawn ids whose routing is clear everywhere, in the `others` forwards of them too."""
    for attempt in range(tries):
        ids = draw(generator(seed + attempt))
        with torch.no_grad(), RecordRouters(model) as record:
            model(ids)
        margin = record.margin
        for other_model, options in others:
            with torch.no_grad(), RecordRouters(other_model) as other_record:
                other_model(ids, **options)
            margin = min(margin, other_record.margin)
        if margin > MARGIN:
            return ids, record
    raise SystemExit("no data without near ties: change the seed")


def draw_ids(batch, sequence):
    return lambda random: torch.randint(0, VOCABULARY, (batch, sequence), generator=random)


def draw_chains(batch, sequence):
    """Each id follows from the one before it, so that a model which learns rightly gets better in a few steps."""

    def draw(random):
        ids = [torch.randint(0, VOCABULARY, (batch,), generator=random)]
        for _ in range(sequence - 1):
            ids.append((5 * ids[-1] + 7) % VOCABULARY)
        return torch.stack(ids, 1)

    return draw


# ---------------------------------------------------------------- names


def expert_names(family):
    return ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")


def hub_names(family, tensors):
    """Names and tensors of a block in memory (experts fused) to those of a hub file (one by one)."""
    gate, up, down = expert_names(family)
    result = {}
    for name, value in tensors.items():
        if family != "gpt_oss" and name == "experts.gate_up_proj":
            for expert, row in enumerate(value):
                first, second = row.chunk(2, 0)
                result[f"experts.{expert}.{gate}.weight"] = first
                result[f"experts.{expert}.{up}.weight"] = second
        elif family != "gpt_oss" and name == "experts.down_proj":
            for expert, row in enumerate(value):
                result[f"experts.{expert}.{down}.weight"] = row
        else:
            result[name] = value
    return result


def block_prefix(model):
    layer = routers(model)[-1][0]
    return f"model.layers.{layer}." + ("block_sparse_moe" if model.config.model_type == "mixtral" else "mlp")


# ---------------------------------------------------------------- golden numbers


def whole_model(model, seed):
    """Logits, losses and router logits of the whole model."""
    family = model.config.model_type
    ropes = mixtral_ropes(model) if family == "mixtral" else {}
    others = [(model, {"attention_mask": padding_mask()}), *((other, {}) for other, _ in ropes.values())]
    ids, record = draw_until_clear(model, draw_ids(BATCH, SEQUENCE), seed, others)
    golden, facts = {"ids": ids}, {"margin": record.margin}
    with torch.no_grad():
        golden["logits"] = model(ids).logits
        golden["loss.ce"] = model(ids, labels=ids).loss.reshape(1)
        for layer, logits in record.logits.items():
            golden[f"router.logits.{layer}"] = logits
        if not family.startswith("deepseek"):
            golden.update(pooled_losses(model, ids))
        for kind, (other, changes) in ropes.items():
            golden[f"rope.{kind}.logits"] = other(ids).logits
            facts.setdefault("rope", {})[kind] = changes
    return golden, facts


def padding_mask():
    """[B, S], 1 on tokens and 0 on the padding at the right, rows of different lengths."""
    lengths = torch.tensor([SEQUENCE - 3, SEQUENCE, SEQUENCE - 7])
    return (torch.arange(SEQUENCE) < lengths[:, None]).long()


def pooled_losses(model, ids):
    """The load balancing loss pooled over layers, without and with padding on the right."""
    whole = model(ids, labels=ids, output_router_logits=True)
    mask = padding_mask()
    labels = ids.masked_fill(mask == 0, -100)
    masked = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    return {
        "loss.aux": whole.aux_loss.reshape(1),
        "loss.total": whole.loss.reshape(1),
        "mask": mask,
        "masked.loss.aux": masked.aux_loss.reshape(1),
        "masked.loss.ce": model(ids, attention_mask=mask, labels=labels).loss.reshape(1),
        "masked.loss.total": masked.loss.reshape(1),
    }


def block_alone(model, seed):
    """Forward and backward of the last layer's MoE block, called on its own."""
    config, family = model.config, model.config.model_type
    layer, router = routers(model)[-1]
    block = model.model.layers[layer].mlp
    for attempt in range(200):
        random = generator(seed + attempt)
        value = torch.randn(BLOCK_BATCH, SEQUENCE, config.hidden_size, generator=random)
        grad_output = torch.randn(value.shape, generator=random)
        logits, weights, experts = router(value.reshape(-1, config.hidden_size))
        margin = choice_margin(config, router, logits)
        if margin > MARGIN:
            break
    else:
        raise SystemExit("no block input without near ties: change the seed")
    value.requires_grad_(True)
    output = block(value)
    output = output[0] if isinstance(output, tuple) else output
    parameters = dict(block.named_parameters())
    grads = torch.autograd.grad(output, [value, *parameters.values()], grad_output)
    order = experts.argsort(-1)  # in order of the expert, since transformers' own order is not defined everywhere
    flat = lambda tensor: tensor.reshape(-1, config.hidden_size)
    golden = {
        "block.input": flat(value),
        "block.output": flat(output),
        "block.grad_output": flat(grad_output),
        "block.grad_input": flat(grads[0]),
        "block.router_logits": logits,
        "block.experts": experts.gather(-1, order),
        "block.probs": weights.gather(-1, order),
    }
    for name, grad in hub_names(family, dict(zip(parameters, grads[1:]))).items():
        golden[f"block.grad.{name}"] = grad
    return golden, {"block.prefix": block_prefix(model), "block.margin": margin}


def finetune(model, seed):
    """Twenty AdamW steps, with and without the auxiliary loss, on the same batches."""
    import copy

    rules = dict(lr=FINETUNE["learning_rate"], betas=tuple(FINETUNE["betas"]), eps=FINETUNE["eps"],
                 weight_decay=FINETUNE["weight_decay"])
    runs = {name: copy.deepcopy(model).train() for name in ("losses", "losses_without_aux")}
    optimizers = {name: torch.optim.AdamW(run.parameters(), **rules) for name, run in runs.items()}
    draw = draw_chains(FINETUNE["batch"], FINETUNE["sequence"])
    batches, losses, margin = [], {name: [] for name in runs}, math.inf
    for step in range(FINETUNE["steps"]):
        for attempt in range(1000):  # a batch whose routing is clear in both runs at this step
            ids = draw(generator(seed + 1000 * step + attempt))
            clear = math.inf
            for run in runs.values():
                with torch.no_grad(), RecordRouters(run) as record:
                    run(ids)
                clear = min(clear, record.margin)
            if clear > MARGIN:
                break
        else:
            raise SystemExit("no batch without near ties: change the seed")
        margin = min(margin, clear)
        batches.append(ids)
        for name, run in runs.items():
            loss = run(ids, labels=ids, output_router_logits=name == "losses").loss
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.detach())
    golden = {f"finetune.{name}": torch.stack(values) for name, values in losses.items()}
    golden["finetune.ids"] = torch.stack(batches)
    return golden, {"finetune": FINETUNE, "finetune.margin": margin}


def mixtral_ropes(model):
    """{kind: (model of the same weights with another rope, what its config has)} for kinds that no family has."""
    models = {}
    for kind, changes in MIXTRAL_ROPES.items():
        other = make_model(make_config("mixtral", **changes), 0)
        other.load_state_dict(model.state_dict())
        models[kind] = other, changes
    return models


def config_of_version_4(config):
    """The same facts as most files on the hub have them: rope_theta and rope_scaling, torch_dtype."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        rope["type"] = rope.pop("rope_type")
        old["rope_scaling"] = rope
    old["torch_dtype"] = old.pop("dtype", "float32")
    old["transformers_version"] = "4.46.0"
    return old


def write_config_of_version_4(model, folder, golden):
    """Writes config_v4.json, once transformers has read it and given the same logits."""
    old = config_of_version_4(json.loads((folder / "config.json").read_text()))
    text = json.dumps(old, indent=2, sort_keys=True) + "\n"
    (folder / "config_v4.json").write_text(text)
    config = type(model.config).from_pretrained(folder / "config_v4.json")
    config._attn_implementation = config._experts_implementation = "eager"
    again = make_model(config, 0)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(golden["ids"]).logits, golden["logits"]), "config_v4.json is another model"


# ---------------------------------------------------------------- folders


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_model(model, folder, **options):
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_family(family, root):
    folder = fresh(root / family)
    seed = 1000 * (1 + list(FAMILIES).index(family))
    model = make_model(make_config(family), seed)
    save_model(model, folder)
    golden, facts = whole_model(model, seed + 1)
    block, block_facts = block_alone(model, seed + 2)
    golden.update(block)
    facts.update(block_facts)
    check_block_names(model, folder)
    if family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        trained, finetune_facts = finetune(model, 10**6 * (1 + list(FAMILIES).index(family)))
        golden.update(trained)
        facts.update(finetune_facts)
    write_config_of_version_4(model, folder, golden)
    save_golden(folder, golden, {"family": family, **facts})


def check_block_names(model, folder):
    """Our names of the block's gradients are those in the file, with the same values and shapes."""
    prefix, layer = block_prefix(model), routers(model)[-1][0]
    block = model.model.layers[layer].mlp
    ours = hub_names(model.config.model_type, {**dict(block.named_parameters()), **dict(block.named_buffers())})
    theirs = read_tensors(folder)
    theirs = {name[len(prefix) + 1:]: value for name, value in theirs.items() if name.startswith(prefix + ".")}
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def load_family(family, root, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        root / family, attn_implementation="eager", experts_implementation="eager", **options
    ).eval()


def small_mixtral(folder, **options):
    """One model for both folders below, and its logits.

    F = D/2, so that gate_up_proj is square: a reader that guesses the layout from the shape is found out.
    """
    config = make_config("mixtral", num_hidden_layers=1, num_local_experts=4, intermediate_size=16)
    model = make_model(config, 51)
    save_model(model, folder, **options)
    ids, record = draw_until_clear(model, draw_ids(BATCH, SEQUENCE), 52)
    with torch.no_grad():
        golden = {"ids": ids, "logits": model(ids).logits}
    save_golden(folder, golden, {"family": "mixtral", "margin": record.margin})


def make_mixtral_sharded(root):
    """A Mixtral in several files and an index."""
    folder = fresh(root / "mixtral_sharded")
    small_mixtral(folder, max_shard_size="24KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def make_mixtral_fused(root):
    """The same Mixtral under the names that transformers 5 has in memory."""
    folder = fresh(root / "mixtral_fused")
    small_mixtral(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_tensors(folder)


def make_qwen3_moe_bf16(root):
    """qwen3_moe/ in bf16, with the logits that its weights give in f32."""
    folder = fresh(root / "qwen3_moe_bf16")
    save_model(load_family("qwen3_moe", root).to(torch.bfloat16), folder)
    model = load_family("qwen3_moe_bf16", root, dtype=torch.float32)
    ids, record = draw_until_clear(model, draw_ids(BATCH, SEQUENCE), 77)
    with torch.no_grad():
        golden = {"ids": ids, "logits": model(ids).logits}
    save_golden(folder, golden, {"family": "qwen3_moe", "margin": record.margin})


def write_quantized(folder, config, tensors, quantization):
    config = config.to_diff_dict()
    config.update({
        "architectures": [transformers.AutoModelForCausalLM._model_mapping[type_of(config)].__name__],
        "dtype": "bfloat16", "quantization_config": quantization,
    })
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def type_of(config):
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[config["model_type"]]


def make_gpt_oss_mxfp4(root):
    """GPT-OSS as the hub has it: experts in MXFP4 blocks of 32 with E8M0 scales, all else in bf16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = fresh(root / "gpt_oss_mxfp4")
    config = make_config(
        "gpt_oss", num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, intermediate_size=64,
        layer_types=["full_attention"],
    )
    model = make_model(config, 31).to(torch.bfloat16)
    tensors, dequantised, random = {}, {}, generator(32)
    for name, value in model.state_dict().items():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            experts, inside, outside = value.shape  # [E, in, out] in memory, blocks along `in`
            blocks = torch.randint(0, 256, (experts, outside, inside // 32, 16), generator=random, dtype=torch.uint8)
            scales = torch.randint(121, 126, (experts, outside, inside // 32), generator=random, dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            plain = convert_moe_packed_tensors(blocks, scales)  # bf16, which holds every value exactly
            exact = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert plain.shape == value.shape and torch.equal(plain.float(), exact)
            dequantised[f"dequantised.{name}"] = plain
        else:
            tensors[name] = value
    write_quantized(folder, config, tensors, {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
    })
    plain_model = make_model(config, 0)
    state = {name: value.float() for name, value in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    state.update({name.removeprefix("dequantised."): value.float() for name, value in dequantised.items()})
    plain_model.load_state_dict(state)
    ids, record = draw_until_clear(plain_model, draw_ids(BATCH, SEQUENCE), 33)
    with torch.no_grad():
        logits = plain_model(ids).logits
    theirs = load_family("gpt_oss_mxfp4", root, dtype=torch.float32,
                         quantization_config=transformers.Mxfp4Config(dequantize=True))
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, logits, atol=1e-5), "transformers dequantises otherwise"
    save_golden(folder, {"ids": ids, "logits": logits, **dequantised},
                {"family": "gpt_oss", "margin": record.margin})


FP8_BLOCK = 128


def fp8_blocks(matrix):
    """(F8_E4M3 matrix, f32 scale of each 128x128 block), as DeepSeek's own files have them."""
    rows, columns = (math.ceil(size / FP8_BLOCK) for size in matrix.shape)
    scales = torch.empty(rows, columns)
    quantized = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            block = (slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK), slice(column * FP8_BLOCK, (column + 1) * FP8_BLOCK))
            scales[row, column] = matrix[block].abs().max() / 448.0
            quantized[block] = (matrix[block] / scales[row, column]).to(torch.float8_e4m3fn)
    return quantized, scales


def from_fp8_blocks(quantized, scales):
    """DeepSeek's own rule: a block is 128x128, the last ones may be smaller."""
    rows, columns = quantized.shape
    wide = scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return quantized.float() * wide


def make_deepseek_v3_fp8(root):
    """DeepSeek-V3 as the hub has it: matrices in F8_E4M3 with weight_scale_inv, all else in bf16."""
    folder = fresh(root / "deepseek_v3_fp8")
    config = make_config(
        "deepseek_v3", hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=2, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=136, num_attention_heads=2, num_key_value_heads=2,
    )
    plain_folder = folder / "plain"
    save_model(make_model(config, 41), plain_folder)
    tensors, dequantised, state = {}, {}, {}
    for name, value in read_tensors(plain_folder).items():
        if re.search(r"_proj(_with_mqa)?\.weight$", name):
            # scale one half, so that the blocks of a matrix have unlike scales
            value[: value.shape[0] // 2] *= 3.0
            value[:, value.shape[1] - value.shape[1] // 8:] *= 0.25
            quantized, scales = fp8_blocks(value)
            tensors[name], tensors[f"{name}_scale_inv"] = quantized, scales
            state[name] = dequantised[f"dequantised.{name}"] = from_fp8_blocks(quantized, scales)
        else:
            tensors[name] = value if "correction_bias" in name else value.to(torch.bfloat16)
            state[name] = tensors[name].float()
    write_quantized(folder, config, tensors, {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    })
    save_file(state, plain_folder / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain_folder, attn_implementation="eager", experts_implementation="eager").eval()
    ids, record = draw_until_clear(model, draw_ids(BATCH, SEQUENCE), 42)
    with torch.no_grad():
        golden = {"ids": ids, "logits": model(ids).logits, **dequantised}
    shutil.rmtree(plain_folder)
    save_golden(folder, golden, {"family": "deepseek_v3", "margin": record.margin})


VARIANTS = {
    "mixtral_sharded": make_mixtral_sharded,
    "mixtral_fused": make_mixtral_fused,
    "qwen3_moe_bf16": make_qwen3_moe_bf16,
    "gpt_oss_mxfp4": make_gpt_oss_mxfp4,
    "deepseek_v3_fp8": make_deepseek_v3_fp8,
}


def make_folders(names, root):
    load_libraries()
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        if name in FAMILIES:
            make_family(name, root)
        else:
            VARIANTS[name](root)
        size = sum(file.stat().st_size for file in (root / name).rglob("*") if file.is_file())
        print(f"{name}: {size} bytes", flush=True)


# ---------------------------------------------------------------- check


class Complaints(logging.Handler):
    """Every warning of transformers' loggers and of Python, as text."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(f"{record.name}: {record.getMessage()}")


def check(folder, original, tensors_only):
    """Exits with what is wrong, or says that nothing is."""
    load_libraries()
    transformers.utils.logging.disable_progress_bar()
    wrong = []
    if not tensors_only:
        complaints = Complaints()
        logger = logging.getLogger("transformers")
        logger.addHandler(complaints)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
        wrong += [f"transformers warns: {text}" for text in complaints.texts]
        wrong += [f"Python warns: {warning.message}" for warning in caught]
        wrong += [f"{kind}: {value}" for kind, value in info.items() if value]
    ours, theirs = read_tensors(folder), read_tensors(original)
    wrong += [f"{name} is not in {folder}" for name in sorted(theirs.keys() - ours.keys())]
    wrong += [f"{name} is not in {original}" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            wrong.append(f"{name}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
        elif not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            wrong.append(f"{name}: other values")
    ours, theirs = (json.loads((where / "config.json").read_text()) for where in (folder, original))
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key, "nothing"), theirs.get(key, "nothing")
        if a != b:
            wrong.append(f"config.json, {key}: {a} against {b}")
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{folder} is {original}, and transformers reads it" if not tensors_only else f"{folder} is {original}")


# ---------------------------------------------------------------- big


def big(folder, layers, experts, hidden, intermediate, vocabulary, seed):
    """A Mixtral in bf16, one file a layer, written by chunks: numpy only, some 100 MB of memory."""
    import numpy

    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = hidden // 64, max(1, hidden // 256)
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_local_experts": experts, "num_experts_per_tok": 2,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": vocabulary,
        "router_aux_loss_coef": 0.02, "attention_dropout": 0.0, "output_router_logits": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def layer_shapes(layer):
        prefix = f"model.layers.{layer}."
        kv = kv_heads * 64
        shapes = {
            prefix + "self_attn.q_proj.weight": [hidden, hidden], prefix + "self_attn.k_proj.weight": [kv, hidden],
            prefix + "self_attn.v_proj.weight": [kv, hidden], prefix + "self_attn.o_proj.weight": [hidden, hidden],
            prefix + "input_layernorm.weight": [hidden], prefix + "post_attention_layernorm.weight": [hidden],
            prefix + "block_sparse_moe.gate.weight": [experts, hidden],
        }
        for expert in range(experts):
            for name, shape in [("w1", [intermediate, hidden]), ("w2", [hidden, intermediate]),
                                ("w3", [intermediate, hidden])]:
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        return shapes

    files = [layer_shapes(layer) for layer in range(layers)]
    files.append({"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden],
                  "lm_head.weight": [vocabulary, hidden]})
    random = numpy.random.default_rng(seed)
    weight_map, total = {}, 0
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shapes.items():
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        total += offset
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                left, norm = math.prod(shape), "norm" in name
                while left:
                    count = min(left, 1 << 20)
                    values = random.standard_normal(count, dtype=numpy.float32) * numpy.float32(0.02)
                    values += numpy.float32(norm)
                    opened.write((values.view(numpy.uint32) >> 16).astype("<u2").tobytes())  # bf16, towards zero
                    left -= count
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{folder}: {total} bytes of tensors in {len(files)} files")


# ---------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = [*FAMILIES, *VARIANTS]
    command = commands.add_parser("all", help="make every folder")
    command.add_argument("--root", type=Path, default=HERE, help="where the folders go (default: beside this script)")
    command = commands.add_parser("family", help="make some folders")
    command.add_argument("names", nargs="+", choices=every)
    command.add_argument("--root", type=Path, default=HERE)
    command = commands.add_parser("check", help="is DIR a model that transformers reads, and the same as ORIGINAL?")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("original", type=Path, metavar="ORIGINAL")
    command.add_argument("--tensors-only", action="store_true",
                         help="do not load the model (for quantised files, which transformers warns of on a CPU)")
    command = commands.add_parser("big", help="make a Mixtral of about 1 GB")
    command.add_argument("folder", type=Path, metavar="DIR")
    for option, value in [("layers", 4), ("experts", 16), ("hidden", 1024), ("intermediate", 2560),
                          ("vocabulary", 4096), ("seed", 0)]:
        command.add_argument(f"--{option}", type=int, default=value, help=f"default {value}")
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command == "all":
        make_folders(every, options["root"])
    elif command == "family":
        make_folders(options["names"], options["root"])
    elif command == "check":
        check(**options)
    else:
        big(**options)


if __name__ == "__main__":
    main()
