"""The comparison: every system trained on the same tokens in the same order; then its loss, KV
cache, attention and a task side by side. And a look into the attention of any trained model.

    python bench.py                      ten systems x three seeds, one to two hours on two cores
    python bench.py --variants vanilla resformer "resformer --value_lambda 2 1" --out_dir out/lambda
    python bench.py --parts cache --contexts 2048 65536
    python bench.py --seeds 1 --max_steps 100 --out_dir out/short      minutes, and noise
    python bench.py --show out/bench     what was measured before; several folders: one table
    python bench.py --look out/resformer HuggingFaceTB/SmolLM2-135M    attention, layer by layer

One folder is one experiment: results.jsonl, a line a run, and the figures. Its runs share every
flag but the variant's own and the seed. The same command again measures only what is missing.
The first variant is what the others are compared with, seed by seed: a pair has the same data in
the same order, and the same initial weights where both have them. A difference is given with its
95% interval.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import textwrap
import time
from dataclasses import dataclass, field, fields, replace
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT, USED_BY, VARIANTS, GPTConfig, KVCache, pretrained_source
from prepare_data import UserError, flag, one_line_errors, parse_flags, replace_file
from train import (PLACE, WORLD, TrainConfig, check, compiles, load_checkpoint, load_data,
                   load_run, model_config, pick_device, pick_dtype, train, windows)

SYSTEMS = (*VARIANTS, "svformer+gqa", "cla+gqa")
PARTS = ("loss", "cache")

# What a variant may set for itself: its model and its optimizer. All else is shared.
OWN_FLAGS = {f.name for f in fields(GPTConfig)} - {"vocab_size", "block_size"}
OWN_FLAGS |= {"lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"}

# What --show and --look read; any other flag beside them would be ignored, and is refused.
BESIDE = {"show": {"variants"}, "look": {"text", "block_size", "device", "out_dir"}}


@dataclass
class BenchConfig(TrainConfig):
    variants: tuple = flag(SYSTEMS, "what to compare, the first with all others: names as in "
                           "--attention, or in quotes a name and flags of its own", nargs="+",
                           group="comparison")
    seeds: tuple = flag((1, 2, 3), "each variant is trained once with each", nargs="+", at_least=0)
    parts: tuple = flag(PARTS, "what to measure; loss includes attention and the task", nargs="+",
                        choices=PARTS)
    questions: int = flag(4000, "questions of the task", at_least=1)
    contexts: tuple = flag((128, 4096), "tokens in the cache", nargs="+", at_least=1)
    show: tuple | None = flag(None, "measure nothing: print and draw what this folder holds (with "
                              "--variants: print), or of several --variants in one table, and "
                              "overview.png beside them", nargs="+")
    look: tuple | None = flag(None, "train nothing, look into these models: folders of runs, names "
                              "on Hugging Face, .gguf files; replaces an earlier look", nargs="+")
    text: tuple | None = flag(None, "look: files that the models read (this Python's argparse.py), "
                              "in windows of --block_size tokens (256)", nargs="+")
    out_dir: str = flag("out/bench", "the folder of the experiment; for --look out/look")
    overwrite: bool = flag(False, "begin the folder anew")
    # No flags here: --variants and --seeds replace two, and unfinished runs are always resumed.
    attention: str = field(default="vanilla", metadata=dict(group="model"))
    seed: int = 1
    resume: bool = True


def list_runs(config: BenchConfig) -> dict[str, TrainConfig]:
    """{variant: how it is trained}, whatever the seed. Raises UserError before any work."""
    runs = {}
    for variant in config.variants:
        try:
            own, given = parse_flags(TrainConfig, __doc__, ["--attention", *variant.split()])
            if not given <= OWN_FLAGS:
                raise UserError(f"--{min(given - OWN_FLAGS)} is for all variants alike: give it "
                                "outside the quotes")
            users = (None, *own.attention.split("+"))  # None: a flag that every variant uses
            shared = {f.name: getattr(config, f.name) for f in fields(TrainConfig)
                      if f.name not in given and USED_BY.get(f.name) in users}
            runs[variant] = replace(own, **shared | dict(overwrite=False))
            check(runs[variant])
        except UserError as error:
            raise UserError(f"--variants {variant}: {error}") from None
    return runs


# -------------------------------------------------------------------------------------------------
# Attention, by layer

# name in a record: (what it is, in a table; digits)
MEASURES = {
    "entropy": ("entropy of the tokens' shares of attention, nats", 2),
    "importance": ("importance of the first token", 3),
    "first": ("attention to the first token", 3),
    "first_head": ("the same, in the head that pays it most", 3),
    "value_norm": ("first token's value norm / the others'", 2),
    "hidden_norm": ("first token's hidden norm / the others'", 2),
    "eigenvalue": ("largest eigenvalue of the values", 2),
    "rank": ("effective rank of the values", 1),
}


@torch.no_grad()
def look_at_attention(model: GPT, idx: torch.Tensor) -> dict[str, list[float]]:
    """MEASURES of each layer, to five digits: means over the sequences idx (B, T)."""
    c, T = model.config, idx.size(1)
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    seen = []  # what describe says, sequence by sequence and layer by layer
    hidden = []
    hooks = [block.register_forward_hook(lambda block, inputs, outputs: hidden.append(outputs[0]))
             for block in model.layers]
    for sequence in idx.split(1):
        hidden.clear()
        with patch.object(F, "scaled_dot_product_attention",
                          wraps=F.scaled_dot_product_attention) as attention:
            model.hidden_states(sequence)
        for call, x in zip(attention.call_args_list, hidden):
            q, keys, values = (tensor[0] for tensor in call.args)  # (nh, T or 2 T, hs) each
            importance = torch.zeros_like(q[0, :, 0])  # (T,)
            first = []
            for h in range(c.n_head):  # one at a time: all would be nh x T x T numbers
                scores = q[h] @ keys[h].T / math.sqrt(c.head_dim)
                both = scores.unflatten(1, (-1, T))  # crosslayer's keys are those of two layers
                A = both.masked_fill(future[:, None], -math.inf).flatten(1).softmax(dim=1)
                A = A.unflatten(1, (-1, T)).sum(dim=1)  # (T queries, T keys)
                importance += A.mean(dim=0) / c.n_head
                first.append(A[1:, 0].mean())
            own = values[::c.n_head // c.kv_heads, -T:]  # (nkv, T, hs), each once
            values = own.transpose(0, 1).flatten(1)  # (T, nkv * hs)
            # On the CPU, because MPS has no eigenvalues.
            seen.append(describe(importance.cpu(), torch.stack(first).cpu(), values.cpu(),
                                 x[0].cpu()))
    for hook in hooks:
        hook.remove()
    means = {}
    for name in MEASURES:
        layers = torch.stack([layer[name] for layer in seen]).unflatten(0, (len(idx), -1))  # (B, L)
        means[name] = [float(f"{x:.5g}") for x in layers.mean(dim=0)]
    return means


def describe(importance: torch.Tensor, first: torch.Tensor, values: torch.Tensor,
             hidden: torch.Tensor) -> dict:
    """MEASURES of a layer. importance (T,): the attention that each token gets, averaged over heads
    and queries (arXiv 2410.17897, eq. 11). first (nh,): what each head's queries after the first
    pay the first token. values (T, nkv * hs): those that attention uses, V_n mixed with V_1 where
    it is. hidden (T, C): what the block gives.

    "eigenvalue" is the largest of (1/T) sum v v^T (eq. 12), which grows with the values' norm.
    "rank" does not: exp of the entropy of the spectrum's shares."""
    value_norms, hidden_norms = values.norm(dim=1), hidden.norm(dim=1)  # (T,)
    spectrum = torch.linalg.eigvalsh(values.T @ values / len(values)).clamp(min=0)  # (nkv * hs,)
    share = spectrum / spectrum.sum()
    return dict(entropy=torch.special.entr(importance).sum(),  # of -p ln p
                importance=importance[0],
                first=first.mean(),
                first_head=first.max(),
                value_norm=value_norms[0] / value_norms[1:].mean(),
                hidden_norm=hidden_norms[0] / hidden_norms[1:].mean(),
                eigenvalue=spectrum.max(),
                rank=torch.special.entr(share).sum().exp())


def even(T: int) -> dict:
    """What is drawn of MEASURES if each query attends evenly to all tokens up to its own, and the
    first token's norms are like the others'."""
    A = torch.ones(T, T, dtype=torch.float64).tril() / torch.arange(1, T + 1)[:, None]
    return dict(entropy=torch.special.entr(A.mean(dim=0)).sum().item(),
                first=A[1:, 0].mean().item(), value_norm=1.0, hidden_norm=1.0)


# -------------------------------------------------------------------------------------------------
# One run: training, then what can be seen in the trained model


@torch.no_grad()
def task_accuracy(model: GPT, data: np.ndarray, questions: int, device) -> float:
    """A stand-in for downstream tasks: of a context's real continuation and three from elsewhere in
    the text, is the real one the likeliest? Chance is 1/4; where one of the three is the same text,
    the answer counts as right. The questions are the same for all."""
    T = model.config.block_size
    context, n = max(1, T // 4), max(1, T // 8)  # tokens
    places = np.random.default_rng(0).integers(0, len(data) - context - n, (questions, 4))
    right = 0
    for batch in np.array_split(places, math.ceil(questions / 8)):  # (B, 4)
        where = batch[:, :, None] + np.arange(context + n)  # (B, 4, context + n)
        where[:, :, :context] = where[:, :1, :context]  # the first is real, all have its context
        ids = torch.from_numpy(data[where].astype(np.int64)).to(device).flatten(0, 1)
        x = model.hidden_states(ids[:, :-1])[:, -n:]  # (4 B, n, C)
        logits = model.lm_head(x).float().flatten(0, 1)  # (4 B n, V)
        losses = F.cross_entropy(logits, ids[:, context:].flatten(), reduction="none")
        likeliest = losses.view(-1, 4, n).sum(dim=2).argmin(dim=1)  # (B,)
        right += (likeliest == 0).sum().item()
    return right / questions


def measure_run(run: TrainConfig, questions: int) -> dict:
    """Trains a model; returns what a record says of it."""
    model, history = train(run, verbose=False)
    model.requires_grad_(False)
    c, device = model.config, model.lm_head.weight.device
    _, data, meta = load_data(run)
    starts = np.linspace(0, len(data) - c.block_size - 1, 64).astype(np.int64)
    texts, _ = windows(data, starts, c.block_size, device)  # (64, T)
    last = history[-max(1, len(history) // 20):]  # a twentieth of the steps
    return dict(
        params=model.num_params(),
        cache_bytes=model.kv_bytes_per_token(),  # per token, in float32
        seconds=round(sum(r["seconds"] for r in history), 1),  # of the steps alone
        val_curve=[(r["step"], r["val_loss"]) for r in history if "val_loss" in r],
        train_loss=float(np.mean([r["loss"] for r in last])),
        bits_per_byte=history[-1]["bits_per_byte"],
        task=task_accuracy(model, data, questions, device),
        attention=look_at_attention(model, texts),
        value_lambdas={n: [float(l1), float(l2)] for n, (l1, l2) in model.value_lambdas().items()},
        data_sha256=meta["sha256"])


def about(device: torch.device) -> dict:
    """What a record says of its making. code: the SHA-256 of the scripts that make the numbers."""
    scripts = [Path(__file__).with_name(name) for name in ("model.py", "train.py", "bench.py")]
    code = "".join(script.read_text(encoding="utf-8") for script in scripts)
    return dict(code=hashlib.sha256(code.encode()).hexdigest()[:12], machine=machine_name(device),
                torch=torch.__version__, date=time.strftime("%Y-%m-%d"))


def machine_name(device: torch.device) -> str:
    """The GPU's name; or the CPU's, its vector instructions and the number of threads: other CPUs
    give other last digits, and in the end other losses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu, linux = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", linux.read_text()) if linux.exists() else []
    threads = torch.get_num_threads()
    return f"{(names or [cpu])[0]}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


# -------------------------------------------------------------------------------------------------
# Tables of runs: {variant: {seed: record}}, the first variant first.

# Student's t, two-sided 95%, for 2, 3, ... seeds: few seeds make a wide interval.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def first_of(table: dict):
    """A table's first variant, a variant's first record."""
    return next(iter(table.values()))


def interval(values: list[float]) -> float:
    """Half the 95% interval of the mean of at least two values; a little too wide for over 16."""
    t = T95[min(len(values), len(T95) + 1) - 2]
    return t * np.std(values, ddof=1) / math.sqrt(len(values))


def differences(runs: dict, first: dict, number) -> list:
    """number(a run) minus number(the first variant's), for each seed that both have."""
    return [number(runs[seed]) - number(first[seed]) for seed in runs if seed in first]


def with_interval(gaps: list[float], digits: int) -> str:
    """The mean of differences, and if there are several its 95% interval."""
    text = f"{np.mean(gaps):+.{digits}f}"
    return text if len(gaps) == 1 else f"{text} ±{interval(gaps):.{digits}f}"


def cell(runs: dict, first: dict, number, digits: int) -> str:
    """The mean over seeds; then the mean difference from the first and its 95% interval."""
    text = f"{np.mean([number(record) for record in runs.values()]):.{digits}f}"
    gaps = differences(runs, first, number)
    if gaps and runs is not first:
        text += f" {with_interval(gaps, digits)}"
    return text


def last_loss(record: dict) -> float:
    """The validation loss at the end of training."""
    return record["val_curve"][-1][1]


def deeper_half(record: dict, measure: str) -> float:
    """A measure's mean over the deeper half of the layers; of the importance the largest, as the
    paper gives it."""
    layers = record["attention"][measure]
    return max(layers) if measure == "importance" else np.mean(layers[len(layers) // 2:])


def print_table(title: str, rows: dict, corner: str = "variant"):
    """rows: {the row's name: {header: cell}}, the headers of all rows alike."""
    lines = [[corner, *first_of(rows)]]
    lines += [[str(name), *row.values()] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for line in lines:
        print(f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths))} |")


def print_results(table: dict):
    name, first = next(iter(table.items()))
    one = first_of(first)
    steps = [step for step, _ in one["val_curve"]]
    shown = np.linspace(0, len(steps) - 1, 5).astype(int)  # five evaluations, the last among them
    losses, curves, deeper = {}, {}, {}
    for variant, runs in table.items():
        record = first_of(runs)
        losses[variant] = {
            "seeds": f"{len(runs)}",
            "validation loss": cell(runs, first, last_loss, 4),
            "training loss": cell(runs, first, lambda r: r["train_loss"], 4),
            "task": cell(runs, first, lambda r: 100 * r["task"], 1),
            "parameters": f"{record['params']:,}",
            "KV cache": f"{record['cache_bytes']:,}",
            "share": f"{record['cache_bytes'] / one['cache_bytes']:.0%}"}
        curves[variant] = {
            f"step {steps[i]:,}": cell(runs, first, lambda r: r["val_curve"][i][1], 4)
            for i in shown}
        deeper[variant] = {
            measure: cell(runs, first, lambda r: deeper_half(r, measure), digits)
            for measure, (_, digits) in MEASURES.items()}
    minus = f"mean, then minus {name}'s ± its 95% interval"
    print_table(f"{describe_run(one)}; {minus}.\nLoss in nats per token; task: % right of four, "
                "chance 25; KV cache in bytes per token, float32", losses)
    print_table(f"Validation loss as training goes on; {minus}", curves)
    print_table("Attention in the deeper half of the layers (mean; for importance, the largest of "
                f"all layers); {minus}", deeper)
    for variant, runs in table.items():
        layers = first_of(runs)["value_lambdas"]
        if layers and ("--value_residual" in variant or one["flags"]["value_residual"] != "fixed"):
            print(f"\n{variant}: weights of V_1 and V_n by layer, means over the seeds")
            for n in layers:
                l1, l2 = np.mean([record["value_lambdas"][n] for record in runs.values()], axis=0)
                print(f"layer {n}: {l1:.2f} {l2:.2f}")


def describe_run(record: dict) -> str:
    """What was trained, in words."""
    flags, steps = record["flags"], record["val_curve"][-1][0]
    tokens = steps * flags["batch_size"] * flags["grad_accum"] * flags["block_size"]
    own = record["variant"].split()  # a flag of its own is not among those that all share
    width = own[own.index("--n_embd") + 1] if "--n_embd" in own else flags["n_embd"]
    return (f"{len(record['attention']['rank'])} layers, width {width}, {steps:,} steps, "
            f"{tokens / 1e6:.1f}M tokens of {flags['dataset']}")


def what_differs(record: dict) -> str:
    """The flags of an experiment that are not today's defaults."""
    usual = {f.name: f.default for f in fields(BenchConfig)}
    words = [f"{name} {value}" for name, value in record["flags"].items()
             if name not in ("eval_every", "eval_tokens", "questions", "device", "dtype")
             and value is not None and json.dumps(value) != json.dumps(usual.get(name))]
    return ", ".join(words) or "the defaults"


def print_look(table: dict):
    """A table for each model and text: MEASURES of each layer."""
    for name, runs in table.items():
        [record] = runs.values()
        rows = {}
        for n in range(1, len(record["attention"]["rank"]) + 1):
            rows[n] = {measure: f"{record['attention'][measure][n - 1]:.{digits}f}"
                       for measure, (_, digits) in MEASURES.items()}
        print_table(f"{name}: {record['loss']:.3f} nats per token in {WINDOWS} windows of "
                    f"{record['flags']['block_size']} tokens", rows, "layer")


def print_caches(runs: dict, contexts: tuple):
    # One token, without storage.
    sizes = {variant: KVCache(model_config(run), 1, 1, "meta").nbytes
             for variant, run in runs.items()}
    name, whole = next(iter(sizes.items()))
    rows = {}
    for variant, n in sizes.items():
        rows[variant] = {"per token": f"{n:,}", f"of {name}'s": f"{n / whole:.0%}"}
        for context in contexts:
            rows[variant][f"{context:,} tokens"] = f"{n * context / 2**20:,.2f}"
    print_table("KV cache in float32: bytes per token, then MiB for one sequence", rows)


# -------------------------------------------------------------------------------------------------
# Figures

# Okabe and Ito's, then Tol's: colour-blind readers tell them apart too.
COLORS = {"vanilla": "black", "crosslayer": "#56b4e9", "resformer": "#0072b2",
          "svformer": "#d55e00", "neutreno": "#cc79a7", "denseformer": "#009e73",
          "gqa": "#e69f00", "cla": "#999933", "svformer+gqa": "#882255", "cla+gqa": "#332288"}
MORE_COLORS = ("#ddcc77", "#44aa99", "#aa4499", "#888888", "#661100")


def new_figure(title: str, lines: int):
    """A figure as high as so many lines, whose letters can be read at the width of a page."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["font.size"] = 12
    figure = Figure(figsize=(13, 3.5 + 0.35 * lines), layout="constrained")
    figure.suptitle(title)
    return figure


def pick_colors(variants) -> dict:
    """{variant: colour}. A system of COLORS has its own in all figures (if it is there only with
    flags, the first of them has it), others get what is left."""
    first = {}
    for variant in sorted(variants, key=lambda variant: "--" in variant):  # without flags first
        first.setdefault(variant.split()[0], variant)
    colors = {first[name]: color for name, color in COLORS.items() if name in first}
    free = cycle([color for color in (*COLORS.values(), *MORE_COLORS)
                  if color not in colors.values()])
    return {variant: colors.get(variant) or next(free) for variant in variants}


def draw_dots(ax, labels: list, dots: list):
    """A row a label, with dots of (row, the differences of all seeds, colour): each seed's small,
    the mean with its interval."""
    for y, gaps, color in dots:
        bar = interval(gaps) if len(gaps) > 1 else None
        ax.plot(gaps, [y] * len(gaps), ".", color=color, alpha=0.3)
        ax.errorbar(np.mean(gaps), y, xerr=bar, fmt="o", capsize=4, color=color)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.locator_params(axis="x", nbins=4)


def draw_loss(table: dict):
    """Left, a row a variant: its loss minus the first's, and its share of the cache. Right: the
    same against steps."""
    name, first = next(iter(table.items()))
    one = first_of(first)
    gaps, share, words = {}, {}, {}  # gaps: {variant: (seeds, evaluations)}
    for variant, runs in table.items():
        curves = differences(runs, first, lambda r: np.array(r["val_curve"])[:, 1])
        if not curves:
            print(f"\nnot drawn, no seed in common with {name}: {variant}")
            continue
        gaps[variant] = np.array(curves)
        share[variant] = first_of(runs)["cache_bytes"] / one["cache_bytes"]
        some = f" ({len(curves)} of {len(first)} seeds)" if len(curves) < len(first) else ""
        words[variant] = textwrap.fill(variant + some, 28, break_on_hyphens=False)
    colors, minus = pick_colors(gaps), f"loss minus {name}'s, nats per token"
    figure = new_figure(f"{describe_run(one)}, {len(first)} seed{'s' * (len(first) > 1)}",
                        len("\n".join(words.values()).splitlines()))
    left, right = figure.subplots(1, 2)

    by_loss = sorted(gaps, key=lambda variant: gaps[variant][:, -1].mean())
    rows = sorted(by_loss, key=share.get)  # of equal caches the best comes first
    draw_dots(left, [f"{words[variant]}  {share[variant]:.0%}" for variant in rows],
              [(y, gaps[variant][:, -1], colors[variant]) for y, variant in enumerate(rows)])
    left.set(title="after the last step", ylabel=f"%: of {name}'s KV cache",
             xlabel=f"{minus}\n(left is better; dots: seeds, bars: 95% intervals)")

    steps = [step for step, _ in one["val_curve"]]
    for variant in reversed(by_loss):  # the legend has the order of the last values
        if len(gaps) <= 5:
            right.plot(steps, gaps[variant].T, color=colors[variant], linewidth=0.5, alpha=0.4)
        right.plot(steps, gaps[variant].mean(axis=0), ".-", color=colors[variant],
                   label=words[variant])
    right.set(title="as training goes on", xlabel="steps", xlim=(0, steps[-1]), ylabel=minus)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def draw_attention(table: dict):
    """Four of MEASURES by layer, of runs or of models that were looked into."""
    one = first_of(first_of(table))
    T, colors = one["flags"]["block_size"], pick_colors(table)
    figure = new_figure(describe_run(one) if "val_curve" in one else
                        f"by layer, in {WINDOWS} windows of {T} tokens", lines=16)
    for ax, (measure, level) in zip(figure.subplots(2, 2).flat, even(T).items()):
        for variant, runs in table.items():
            seeds = np.array([record["attention"][measure] for record in runs.values()])
            layers = range(1, seeds.shape[1] + 1)
            if len(table) <= 3:
                ax.plot(layers, seeds.T, color=colors[variant], linewidth=0.5, alpha=0.4)
            some = f", {len(runs)} seeds" if len(runs) > 1 else ""
            ax.plot(layers, seeds.mean(axis=0), ".-", color=colors[variant], label=variant + some)
            if seeds.max() > 20:
                ax.set_yscale("log")
        ax.axhline(level, color="black", linestyle=":")
        words = "like the others" if "norm" in measure else "each query even over its past"
        ax.annotate(words, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        ax.set(title=MEASURES[measure][0], xlabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_overview(tables: dict):
    """A forest plot: a row an experiment, and in it a dot and its interval a variant."""
    name = next(iter(first_of(tables)))
    variants = list(dict.fromkeys(variant for table in tables.values() for variant in table))
    colors = pick_colors(variants)
    dots, labels = [], []
    common = os.path.commonpath([Path(folder).absolute().parent for folder in tables])
    for row, (folder, table) in enumerate(tables.items()):
        first = table[name]
        labels.append(f"{os.path.relpath(folder, common)}, {len(first)} seeds\n"
                      + textwrap.fill(what_differs(first_of(first)), 40))
        for i, variant in enumerate(variants[1:], start=1):
            gaps = differences(table.get(variant, {}), first, last_loss)
            if gaps:
                dots.append((row - 0.4 + 0.8 * i / len(variants), gaps, colors[variant]))
    figure = new_figure(f"Validation loss minus {name}'s, nats per token (left is better)",
                        len("\n".join(labels).splitlines()))
    ax = figure.subplots()
    draw_dots(ax, labels, dots)
    for variant in variants[1:]:
        ax.plot([], [], "o", color=colors[variant], label=variant)
    ax.set(xlabel="small dots: seeds; bars: 95% intervals of their mean")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def save_figures(folder: Path, figures: dict):
    """figures: {file's name: (function that draws it, its table)}."""
    try:
        for name, (function, table) in figures.items():
            function(table).savefig(folder / name)
            print(f"\nfigure: {folder / name}")
    except ImportError:
        print("\nno figures: pip install matplotlib, then start this again")


# -------------------------------------------------------------------------------------------------
# What is measured, and what is shown


def read_records(folder: Path) -> list[dict]:
    """The runs in a folder's results.jsonl; UserError that names a line that can't be read."""
    path, records = folder / "results.jsonl", []
    for i, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:  # a process was killed while it wrote it
            raise UserError(f"{path}, line {i} can't be read: delete it") from None
    return records


def read_table(folder: Path, variants: tuple | None) -> dict:
    """{variant: {seed: record}} of the variants (None: all) that the folder has, in their order."""
    table = {}
    for record in read_records(folder):
        table.setdefault(record["variant"], {})[record["seed"]] = record
    return {variant: table[variant] for variant in variants or table if variant in table}


def measure_missing(runs: dict, config: BenchConfig, device):
    """Trains and measures the runs that the folder lacks, a line in results.jsonl for each.
    UserError if the folder holds an experiment with other flags or data."""
    folder = Path(config.out_dir)
    making = about(device) | dict(compile=compiles(config, device))
    # Every flag that all runs of the folder share, as JSON gives it back: a tuple as a list.
    shared = {f.name: getattr(config, f.name) for f in fields(TrainConfig)
              if f.name not in (*PLACE, "attention", "seed")}
    shared |= dict(questions=config.questions, device=device.type,
                   dtype=str(pick_dtype(config, device)))
    shared = json.loads(json.dumps(shared))
    data_sha256 = load_data(config)[2]["sha256"]
    if config.overwrite:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        (folder / "results.jsonl").unlink(missing_ok=True)
    records = read_records(folder)
    before = records[0]["flags"] if records else shared
    for name, value in shared.items():
        # A flag that is newer than the runs had its default there.
        then = before.get(name, getattr(BenchConfig, name, None))
        if then != value:
            raise UserError(f"--{name} is {value}, but {folder} holds runs with {then}: choose "
                            "another --out_dir, or --overwrite")
    if records and records[0].get("data_sha256") != data_sha256:
        raise UserError(f"--dataset {config.dataset} is not what the runs in {folder} have read: "
                        "choose another --out_dir, or --overwrite")
    # An unfinished run is gone on with only by the same code, with the same flags and data.
    key = json.dumps([shared, making["code"], data_sha256])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    done = {(record["variant"], record["seed"]) for record in records}
    missing = [(variant, seed) for seed in dict.fromkeys(config.seeds) for variant in runs
               if (variant, seed) not in done]
    for i, (variant, seed) in enumerate(missing, start=1):
        print(f"run {i} of {len(missing)}: {variant}, seed {seed}", flush=True)
        out_dir = f"{folder}/runs/{key}-{variant.replace(' ', '_')}-{seed}"
        run = replace(runs[variant], seed=seed, out_dir=out_dir)
        try:
            numbers = measure_run(run, config.questions)
        except UserError as error:  # a loss that is not finite, most likely: the others go on
            print(f"not measured: {error}")
            continue
        record = dict(variant=variant, seed=seed, flags=shared) | making | numbers
        with open(folder / "results.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        shutil.rmtree(out_dir)


def show(folder: Path, variants: tuple | None, figures: bool):
    """Prints the variants (None: all) against the first of them, and may draw the same. Needs no
    data and trains nothing. UserError if there is nothing to show."""
    table = read_table(folder, variants)
    if not table:
        raise UserError(f"{folder}/results.jsonl has no runs of {', '.join(variants or ('any',))}")
    missing = [variant for variant in variants or () if variant not in table]
    if missing:
        print(f"no runs of {', '.join(missing)} in {folder}")
    records = [record for runs in table.values() for record in runs.values()]
    for name in ("code", "machine", "compile", "torch"):
        kinds = sorted({str(record.get(name)) for record in records})
        if len(kinds) > 1:
            print(f"\nWARNING: {name} is not the same for all of these runs: {' | '.join(kinds)}")
    drawn = {"attention.png": (draw_attention, table)}
    if "val_curve" in records[0]:
        print_results(table)
        drawn["loss.png"] = (draw_loss, table)
    else:
        print_look(table)
    print("\n" + "\n".join(f"{name}: {meaning}" for name, (meaning, _) in MEASURES.items()))
    if figures:
        save_figures(folder, drawn)


def show_overview(folders: list[Path], variants: tuple):
    """One table and one figure of several experiments: variants against the first of them. Passes
    over what is no experiment with the first and another."""
    name, tables, rows = variants[0], {}, {}
    for folder in folders:
        table = read_table(folder, variants) if folder.is_dir() else {}
        first, place = table.get(name), folder.as_posix()
        if not first or len(table) < 2 or "val_curve" not in first_of(first):
            print(f"passed over: {place}")
            continue
        tables[place] = table
        losses = [last_loss(record) for record in first.values()]
        rows[place] = {"seeds": f"{len(first)}", name: f"{np.mean(losses):.4f}"}
        for variant in variants[1:]:
            gaps = differences(table.get(variant, {}), first, last_loss)
            rows[place][variant] = with_interval(gaps, 4) if gaps else ""
    if not tables:
        raise UserError(f"--show: in none of these folders are runs of {name} and another variant")
    print_table(f"Validation loss, nats per token: {name}'s, then the others' minus it ± the 95% "
                "interval", rows, "experiment")
    save_figures(folders[0].parent, {"overview.png": (draw_overview, tables)})


# -------------------------------------------------------------------------------------------------
# A look into trained models

WINDOWS = 4  # of a text


def open_model(name: str):
    """(a model, a function text -> its tokens' ids) of a run's folder, or of what
    GPT.from_pretrained takes. UserError if there is none that can be read."""
    if Path(name, "ckpt.pt").exists():
        model, tokenizer = load_run(Path(name))
        return model, lambda text: tokenizer.encode(text, disallowed_special=())
    try:
        model = GPT.from_pretrained(name)
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(**pretrained_source(name))
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"--look {name} is no run of train.py: {error}") from None
    return model, lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def look(config: BenchConfig, folder: Path, T: int, device):
    """Reads each text with each model in WINDOWS windows of T tokens (at most what the runs among
    the models can read); a line in the folder's results.jsonl for each."""
    if any("val_curve" in record for record in read_records(folder)):
        raise UserError(f"--out_dir {folder} holds the runs of an experiment: choose another")
    for ckpt in (Path(name, "ckpt.pt") for name in config.look):
        if ckpt.exists():
            T = min(T, load_checkpoint(ckpt)["model_config"]["block_size"])
    records = {}
    for name in config.look:
        model, encode = open_model(name)  # one at a time is in memory
        if T > model.config.block_size:
            raise UserError(f"--block_size {T}: {name} reads at most {model.config.block_size}")
        model.to(device).requires_grad_(False)
        for text in config.text or (argparse.__file__,):
            ids = np.array(encode(Path(text).read_bytes().decode("utf-8", errors="replace")))
            if len(ids) <= T:
                raise UserError(f"--text {text}: {len(ids)} tokens of {name}'s are too few, "
                                f"--block_size {T} needs more")
            starts = np.linspace(0, len(ids) - T - 1, WINDOWS).astype(np.int64)
            x, y = windows(ids, starts, T, device)  # (WINDOWS, T) each
            losses = [model(*pair)[1].item() for pair in zip(x.split(1), y.split(1))]
            label = Path(name).stem if name.endswith(".gguf") else name
            label += f" on {Path(text).name}"
            if label in records:
                raise UserError(f"--look: there are two of '{label}'")
            records[label] = dict(variant=label, seed=0, flags=dict(block_size=T),
                                  loss=float(np.mean(losses)), **about(device),
                                  attention=look_at_attention(model, x))
    with replace_file(folder / "results.jsonl") as f:
        f.writelines(json.dumps(record).encode() + b"\n" for record in records.values())


def main():
    config, given = parse_flags(BenchConfig, __doc__)
    if WORLD > 1:
        raise UserError("bench.py measures on one process: start it without torchrun")
    for name, beside in BESIDE.items():
        ignored = given - beside - {name}
        if name in given and ignored:
            raise UserError(f"--{min(ignored)} has no effect beside --{name}")
    variants = config.variants if "variants" in given else None
    if config.show is not None:
        folders = [Path(folder) for folder in config.show]
        if len(folders) == 1:  # some of the variants: a table, but no other picture of the folder
            show(folders[0], variants, figures=variants is None)
        else:
            show_overview(folders, config.variants)
        return
    device = pick_device(config.device)
    if config.look is not None:
        folder = Path(config.out_dir if "out_dir" in given else "out/look")
        look(config, folder, config.block_size if "block_size" in given else 256, device)
        show(folder, None, figures=True)
        return
    if config.text is not None:
        raise UserError("--text is what --look reads: it has no effect without it")
    runs = list_runs(config)
    used = {name for run in runs.values() for name in run.attention.split("+")}
    for name in given & USED_BY.keys():
        if USED_BY[name] not in used:
            raise UserError(f"--{name} is for {USED_BY[name]}, which is not among the --variants")
    if "cache" in config.parts:
        print_caches(runs, config.contexts)
    if "loss" in config.parts:
        measure_missing(runs, config, device)
        show(Path(config.out_dir), config.variants, figures=True)


if __name__ == "__main__":
    with one_line_errors("stopped; training goes on with the same command without --overwrite"):
        main()
