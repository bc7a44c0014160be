"""The comparison: every system trained on the same tokens in the same order; then its loss, KV
cache, attention, a task and its speed side by side.

    python bench.py                      ten systems x three seeds, one to two hours on two cores
    python bench.py --quick              the same tables in 5 minutes, too noisy to conclude from
    python bench.py --variants vanilla resformer "resformer --value_lambda 2 1" --out_dir out/lambda
    python bench.py --size 82M --parts cache --contexts 2048 65536
    python bench.py --show out/bench     what was measured before

One folder is one experiment: results.jsonl, a line a run, and the figures. Its runs share every
flag but the variant's own and the seed. The same command again measures only what is missing.
The first variant is what the others are compared with, seed by seed: a pair has the same data in
the same order, and the same initial weights where both have them. A difference is given with its
95% interval.
"""

import ast
import hashlib
import inspect
import json
import math
import platform
import shutil
import time
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from model import DECODING, USED_BY, VARIANTS, GPT, GPTConfig, KVCache
from prepare_data import UserError, flag, one_line_errors, parse_flags
from train import (PLACE, WORLD, TrainConfig, check, compile_model, load_data, make_optimizers,
                   model_config, pick_device, pick_dtype, train, windows)

SYSTEMS = (*VARIANTS, "svformer+gqa", "cla+gqa")
PARTS = ("loss", "cache", "speed")
QUICK = dict(out_dir="out/quick", seeds=(1,), max_steps=80, warmup_steps=20, eval_every=20,
             eval_tokens=16384, questions=400, rounds=3)

# What a variant may set for itself: its model and its optimizer. All else is shared.
OWN_FLAGS = {f.name for f in fields(GPTConfig)} - {"vocab_size", "block_size"}
OWN_FLAGS |= {"size", "optimizer", "lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"}


@dataclass
class BenchConfig(TrainConfig):
    variants: tuple = flag(SYSTEMS, "what to compare, the first with all others: names as in "
                           "--attention, or in quotes a name and flags of its own", nargs="+",
                           group="comparison")
    seeds: tuple = flag((1, 2, 3), "each variant is trained once with each", nargs="+", at_least=0)
    parts: tuple = flag(PARTS, "what to measure; loss includes attention and the task", nargs="+",
                        choices=PARTS)
    questions: int = flag(4000, "questions of the task", at_least=1)
    contexts: tuple = flag((128, 4096), "tokens in the cache; decoding is timed at the largest",
                           nargs="+", at_least=1)
    decode_batch: int = flag(8, "speed: sequences that are decoded at once", at_least=1)
    rounds: int = flag(9, "speed: timings of each variant, in turns with the first", at_least=1)
    quick: bool = flag(False, "one seed, 80 steps, in out/quick: minutes, and noise")
    show: str | None = flag(None, "print and draw what this folder holds, measure nothing")
    out_dir: str = flag("out/bench", "the folder of the experiment")
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
    "entropy": ("entropy of token importance, nats", 2),
    "importance": ("importance of the first token", 3),
    "first": ("attention to the first token", 3),
    "first_head": ("the same, in the head that pays it most", 3),
    "value_norm": ("first token's value norm / the others'", 2),
    "hidden_norm": ("first token's hidden norm / the others'", 2),
    "eigenvalue": ("largest eigenvalue of the values", 2),
    "rank": ("effective rank of the values", 1),
}


class Watch(TorchFunctionMode):
    """While it is active, keeps what each call of scaled_dot_product_attention is given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.calls.append(args)  # q, keys, values
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def look_at_attention(model: GPT, idx: torch.Tensor, triggers: list) -> dict[str, torch.Tensor]:
    """MEASURES of each layer (L,), means over the sequences idx (B, T). Attention to the first
    token is that of all queries but itself and backcopy's triggers."""
    c, T = model.config, idx.size(1)
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    seen = []  # what describe says, sequence by sequence and layer by layer
    hidden = []
    hooks = [block.register_forward_hook(lambda block, inputs, outputs: hidden.append(outputs[0]))
             for block in model.layers]
    for sequence in idx.split(1):  # one at a time: attention is nh x T x T numbers
        hidden.clear()
        queries = [t > 0 and token not in triggers for t, token in enumerate(sequence[0].tolist())]
        with Watch() as watch:
            model.hidden_states(sequence)
        for (q, keys, values), x in zip(watch.calls, hidden):
            scores = q @ keys.transpose(2, 3) / math.sqrt(c.head_dim)  # (1, nh, T, T or 2 T)
            both = scores.unflatten(3, (-1, T))  # crosslayer's keys are those of two layers
            A = both.masked_fill(future[:, None], -math.inf).flatten(3).softmax(dim=3)
            A = A.unflatten(3, (-1, T)).sum(dim=3)[0]  # (nh, T, T)
            own = values[0, ::c.n_head // c.kv_heads, -T:]  # (nkv, T, hs), each once
            # On the CPU, because MPS has no eigenvalues.
            values = own.transpose(0, 1).flatten(1)  # (T, nkv * hs)
            seen.append(describe(A.cpu(), values.cpu(), x[0].cpu(), queries))
    for hook in hooks:
        hook.remove()
    means = {}
    for name in MEASURES:
        layers = torch.stack([layer[name] for layer in seen])  # (B L,)
        means[name] = layers.unflatten(0, (len(idx), -1)).mean(dim=0)
    return means


def describe(A: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor, queries: list) -> dict:
    """MEASURES of a layer: A (nh, T queries, T keys); values (T, nkv * hs), those that attention
    uses, V_n mixed with V_1 where it is; hidden (T, C), what the block gives; queries: T booleans,
    whether a query's attention to the first token counts.

    The attention that a token gets, averaged over heads and queries, is its importance (arXiv
    2410.17897, eq. 11). "eigenvalue" is the largest of (1/T) sum v v^T (eq. 12), which grows with
    the values' norm. "rank" does not: exp of the entropy of the spectrum's shares."""
    importance = A.mean(dim=(0, 1))  # (T,), sums to 1
    first = A[:, queries, 0].mean(dim=1)  # (nh,)
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


def even(T: int, width: int) -> dict:
    """MEASURES of a layer whose queries attend evenly to all tokens up to their own, with values
    and hidden states of random directions and equal norms."""
    A = torch.ones(1, T, T, dtype=torch.float64).tril() / torch.arange(1, T + 1)[:, None]
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((T, width)))
    values = F.normalize(values, dim=1)
    return describe(A, values, values, [False] + [True] * (T - 1))


# -------------------------------------------------------------------------------------------------
# One run: training, then what can be seen in the trained model


@torch.no_grad()
def task_accuracy(model: GPT, data: np.ndarray, questions: int, device, start_id) -> float:
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
        inputs = ids[:, :-1]  # (4 B, context + n - 1)
        if start_id is not None:
            inputs = F.pad(inputs, (1, 0), value=start_id)
        x = model.hidden_states(inputs)[:, -n:]  # (4 B, n, C)
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
    start_id = meta["vocab_size"] - 1 if run.start_token else None
    texts, _ = windows(data, starts, c.block_size, device, start_id)  # (64, T)
    last = history[-max(1, len(history) // 20):]  # a twentieth of the steps
    return dict(
        params=model.num_params(),
        cache_bytes=model.kv_bytes_per_token(),  # per token, in float32
        value_width=c.kv_heads * c.head_dim,
        seconds=round(sum(r["seconds"] for r in history), 1),  # of the steps alone
        val_curve=[(r["step"], r["val_loss"]) for r in history if "val_loss" in r],
        train_loss=float(np.mean([r["loss"] for r in last])),
        bits_per_byte=history[-1]["bits_per_byte"],
        task=task_accuracy(model, data, questions, device, start_id),
        attention={name: [float(f"{x:.5g}") for x in layers] for name, layers in
                   look_at_attention(model, texts, meta.get("triggers", [])).items()},
        value_lambdas={n: [float(l1), float(l2)] for n, (l1, l2) in model.value_lambdas().items()},
        data_sha256=meta["sha256"])


def fingerprint() -> str:
    """Of the code that makes the numbers: model.py, train.py and this file's measures, whatever
    their comments, docstrings and messages say."""
    here, digest = Path(__file__), hashlib.sha256()
    texts = [here.with_name(name).read_text(encoding="utf-8") for name in ("model.py", "train.py")]
    texts += map(inspect.getsource, (look_at_attention, describe, task_accuracy, measure_run))
    for tree in map(ast.parse, texts):
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant("")  # a docstring
            elif isinstance(node, ast.JoinedStr):
                node.values = []  # a message
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("UserError", "flag"):
                node.args = node.args[:1] if ast.unparse(node.func) == "flag" else []
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


# -------------------------------------------------------------------------------------------------
# Speed


def speed_tasks(run: TrainConfig, config: BenchConfig, vocab_size: int, device) -> dict:
    """{what is timed: (a function that does it, its tokens)}"""
    model, dtype = GPT(model_config(run, vocab_size)).to(device), pick_dtype(run, device)
    optimizers = make_optimizers(model, run)
    compile_model(model, run, device)
    batch = torch.randint(vocab_size, (2, run.batch_size, run.block_size), device=device)

    def train_step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = model(*batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    context, n = max(config.contexts), config.decode_batch
    decoder = GPT(model.config).to(device, dtype)
    token = torch.zeros(n, 1, dtype=torch.long, device=device)
    cache = KVCache(model.config, n, context + 16, device, dtype)
    for store in (*cache.k.values(), *cache.v.values()):
        store.normal_()  # memory that was never written may read faster, or hold NaN

    @torch.no_grad()
    def decode_16():
        cache.length = context
        with sdpa_kernel(DECODING):
            for _ in range(16):
                decoder(token, cache=cache)

    return {"training": (train_step, batch[0].numel()),
            f"decoding at {context:,}": (decode_16, 16 * n)}


def print_speed(runs: dict, config: BenchConfig, device):
    """Times each variant in turns with the first, and prints the ratio and tokens per second."""
    _, _, meta = load_data(config)
    name, run = next(iter(runs.items()))
    first = speed_tasks(run, config, meta["vocab_size"], device)
    rows = {}
    for variant, run in tqdm(runs.items(), desc="speed"):
        tasks = speed_tasks(run, config, meta["vocab_size"], device)
        rows[variant] = {}
        for task, (function, tokens) in tasks.items():
            rounds = [(timed(first[task][0], device), timed(function, device))
                      for _ in range(config.rounds + 1)]
            firsts, own = np.transpose(rounds[1:])  # seconds; the first round warms up
            rate, ratio = tokens / np.median(own), np.median(firsts / own)
            rows[variant][task] = f"{ratio:.2f} ({rate:,.0f})"
        del tasks, function  # a cache may be most of the memory
    print_table(f"Speed over {name}'s (tokens per second) on {machine_name(device)}", rows)


def machine_name(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def timed(function, device) -> float:
    """The seconds that function() takes, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------
# Tables of runs: {variant: {seed: record}}, the first variant first.

# Student's t, two-sided 95%, by the number of seeds: few seeds make a wide interval.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23}


def interval(values: list[float]) -> float:
    """Half the 95% interval of the mean of at least two values."""
    t = T95.get(len(values), 2.20)  # a little too wide for more than 12
    return t * np.std(values, ddof=1) / math.sqrt(len(values))


def differences(runs: dict, first: dict, number) -> list:
    """number(a run) minus number(the first variant's), for each seed that both have."""
    return [number(runs[seed]) - number(first[seed]) for seed in runs if seed in first]


def cell(runs: dict, first: dict, number, digits: int) -> str:
    """The mean over seeds; then the mean difference from the first and its 95% interval."""
    text = f"{np.mean([number(record) for record in runs.values()]):.{digits}f}"
    gaps = differences(runs, first, number)
    if gaps and runs is not first:
        text += f" {np.mean(gaps):+.{digits}f}"
        if len(gaps) > 1:
            text += f" ±{interval(gaps):.{digits}f}"
    return text


def deeper_half(record: dict, measure: str) -> float:
    """A measure's mean over the deeper half of the layers; of the importance the largest, as the
    paper gives it."""
    layers = record["attention"][measure]
    return max(layers) if measure == "importance" else np.mean(layers[len(layers) // 2:])


def print_table(title: str, rows: dict):
    """rows: {variant: {header: cell}}, the headers of all rows alike."""
    lines = [["variant", *next(iter(rows.values()))]]
    lines += [[name, *row.values()] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for line in lines:
        print(f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths))} |")


def print_results(table: dict):
    name, first = next(iter(table.items()))
    one = next(iter(first.values()))
    flags, steps = one["flags"], [step for step, _ in one["val_curve"]]
    shown = np.linspace(0, len(steps) - 1, 5).astype(int)  # five evaluations, the last among them
    losses, curves, layer_1, deeper = {}, {}, {}, {}
    for variant, runs in table.items():
        record = next(iter(runs.values()))
        losses[variant] = {
            "seeds": f"{len(runs)}",
            "validation loss": cell(runs, first, lambda r: r["val_curve"][-1][1], 4),
            "training loss": cell(runs, first, lambda r: r["train_loss"], 4),
            "task": cell(runs, first, lambda r: 100 * r["task"], 1),
            "parameters": f"{record['params']:,}",
            "KV cache": f"{record['cache_bytes']:,}",
            "share": f"{record['cache_bytes'] / one['cache_bytes']:.0%}"}
        curves[variant] = {
            f"step {steps[i]:,}": cell(runs, first, lambda r: r["val_curve"][i][1], 4)
            for i in shown}
        layer_1[variant], deeper[variant] = {}, {}
        for measure, (_, digits) in MEASURES.items():
            layer_1[variant][measure] = cell(runs, first, lambda r: r["attention"][measure][0],
                                             digits)
            deeper[variant][measure] = cell(runs, first, lambda r: deeper_half(r, measure), digits)
    baseline = even(flags["block_size"], one["value_width"])
    layer_1["even, random"] = {measure: f"{baseline[measure]:.{digits}f}"
                               for measure, (_, digits) in MEASURES.items()}
    layer_1["even, random"]["eigenvalue"] = ""  # it depends on the values' size

    tokens = steps[-1] * flags["batch_size"] * flags["grad_accum"] * flags["block_size"]
    minus = f"mean, then minus {name}'s ± its 95% interval"
    print_table(f"After {tokens:,} tokens; {minus}.\nLoss in nats per token; task: % right of "
                "four, chance 25; KV cache in bytes per token, float32", losses)
    print_table(f"Validation loss as training goes on; {minus}", curves)
    print_table(f"Attention in layer 1; {minus}", layer_1)
    print_table("Attention in the deeper half of the layers (mean; for importance, the largest of "
                f"all layers); {minus}", deeper)
    print("\n" + "\n".join(f"{name}: {meaning}" for name, (meaning, _) in MEASURES.items()))
    for variant, runs in table.items():
        layers = next(iter(runs.values()))["value_lambdas"]
        if layers and ("--value_residual" in variant or flags["value_residual"] != "fixed"):
            print(f"\n{variant}: weights of V_1 and V_n by layer, means over the seeds")
            for n in layers:
                l1, l2 = np.mean([record["value_lambdas"][n] for record in runs.values()], axis=0)
                print(f"layer {n}: {l1:.2f} {l2:.2f}")


def print_caches(runs: dict, contexts: tuple):
    # One token, without storage; the vocabulary does not matter.
    sizes = {variant: KVCache(model_config(run, vocab_size=257), 1, 1, "meta").nbytes
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

MARKERS = "osD^vP*XhpdH<>8"
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "gold", "navy", "lime", "tan",
          "teal")


def draw(table: dict, folder: Path):
    """loss.png and attention.png in folder."""
    try:
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno figures: pip install matplotlib, then start this again")
        return
    # In every figure a system has its own colour and marker. Where it comes with several sets of
    # flags, those after the first have darker shades and other markers.
    style = {}
    for i, system in enumerate(dict.fromkeys([*SYSTEMS, *(name.split()[0] for name in table)])):
        color = np.array(to_rgb(COLORS[i % len(COLORS)]))
        variants = [variant for variant in table if variant.split()[0] == system]
        for k, variant in enumerate(variants):
            style[variant] = dict(color=color * (1 - 0.8 * k / len(variants)), markersize=5,
                                  marker=MARKERS[(i + k) % len(MARKERS)])
    loss = Figure(figsize=(12, 6), layout="constrained")
    draw_loss(*loss.subplots(1, 2), table, style)
    loss.savefig(folder / "loss.png")
    attention = Figure(figsize=(12, 8), layout="constrained")
    draw_attention(attention, table, style)
    attention.savefig(folder / "attention.png")
    print(f"\nfigures: {folder}/loss.png and {folder}/attention.png")


def draw_loss(left, right, table: dict, style: dict):
    """The final loss against the KV cache; the loss against steps: both minus the first's."""
    name, first = next(iter(table.items()))
    one = next(iter(first.values()))
    steps = [step for step, _ in one["val_curve"]]
    points, ends, sizes = {}, {}, []
    for variant, runs in table.items():
        gaps = differences(runs, first, lambda r: np.array(r["val_curve"])[:, 1])
        if not gaps:
            print(f"\nnot drawn, no seed in common with {name}: {variant}")
            continue
        size = next(iter(runs.values()))["cache_bytes"]
        x = size + 0.02 * one["cache_bytes"] * sizes.count(size)  # equal ones stand side by side
        sizes.append(size)
        last = [curve[-1] for curve in gaps]
        error = interval(last) if len(last) > 1 else None
        left.errorbar(x, np.mean(last), error, capsize=4, **style[variant])
        draw_seeds(right, steps, np.array(gaps), style[variant])
        points[variant], ends[variant] = (x, np.mean(last)), (steps[-1], np.mean(last))
    left.set(xlabel="KV cache, bytes per token in float32 (equal ones side by side)",
             ylabel=f"validation loss minus {name}'s, nats per token (lower is better)")
    right.set(xlabel="steps (thin: each seed, thick: their mean)")
    for ax, labelled in ((left, points), (right, ends)):
        label_points(ax, labelled, style)


def draw_attention(figure, table: dict, style: dict):
    """Four of MEASURES by layer."""
    first = next(iter(table.values()))
    one = next(iter(first.values()))
    baseline = even(one["flags"]["block_size"], one["value_width"])
    measures = ("entropy", "first", "value_norm", "hidden_norm")
    for ax, measure in zip(figure.subplots(2, 2).flat, measures):
        for variant, runs in table.items():
            layers = np.array([record["attention"][measure] for record in runs.values()])
            draw_seeds(ax, range(1, layers.shape[1] + 1), layers, style[variant], label=variant)
        ax.axhline(baseline[measure], color="black", linestyle=":", label="even, random")
        ax.set(title=MEASURES[measure][0], xlabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
    ncols = max(1, 120 // (8 + max(map(len, table))))  # 120 letters fit side by side
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=ncols)


def draw_seeds(ax, x, curves: np.ndarray, style: dict, label=None):
    """The curve of each seed, thin, and their mean."""
    ax.plot(x, curves.T, color=style["color"], linewidth=0.5, alpha=0.4)
    ax.plot(x, curves.mean(axis=0), label=label, **style)


def label_points(ax, points: dict, style: dict):
    """Writes each variant to the right of its point and joins the two with a line; labels that
    would overlap are pushed apart."""
    share = min(0.7, 0.013 * max(map(len, points)))  # of the axis, for the longest label
    width = max(x for x, _ in points.values()) / (0.94 - share)
    ax.set_xlim(0, width)
    gap = 0.04 * np.ptp(ax.get_ylim())
    labels = sorted(([x + 0.05 * width, y, name] for name, (x, y) in points.items()),
                    key=lambda label: label[1])
    for _ in range(100):
        for low, high in combinations(labels, 2):
            overlap = gap - (high[1] - low[1])
            if abs(high[0] - low[0]) < (share + 0.05) * width and overlap > 0:
                low[1] -= overlap / 2
                high[1] += overlap / 2
    for x, y, name in labels:
        color = style[name]["color"]
        ax.annotate(name, points[name], (x, y), va="center", fontsize=8, color=color,
                    arrowprops=dict(arrowstyle="-", color=color, linewidth=0.5, relpos=(0, 0.5)))


# -------------------------------------------------------------------------------------------------
# What is measured, and what is shown


def read_records(folder: Path) -> list[dict]:
    """The runs in a folder's results.jsonl; UserError that names a line that can't be read."""
    path, records = folder / "results.jsonl", []
    for i, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            record = json.loads(line)
            record["flags"], record["variant"], record["seed"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {i} can't be read: delete it") from None
        records.append(record)
    return records


def measure(runs: dict, config: BenchConfig, device):
    """Trains and measures the runs that the folder lacks, a line in results.jsonl for each.
    UserError if the folder holds an experiment with other flags or data."""
    folder = Path(config.out_dir)
    about = dict(code=fingerprint(), date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
                 machine=machine_name(device))
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
    if records and records[0]["data_sha256"] != data_sha256:
        raise UserError(f"--dataset {config.dataset} is not what the runs in {folder} have read: "
                        "choose another --out_dir, or --overwrite")
    # An unfinished run is gone on with only by the same code, with the same flags and data.
    key = json.dumps([shared, about["code"], data_sha256])
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
        except UserError as error:  # a loss that is not finite: the others go on
            print(f"not measured: {error}")
            continue
        record = dict(variant=variant, seed=seed, flags=shared) | about | numbers
        with open(folder / "results.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        shutil.rmtree(out_dir)


def show(folder: Path, variants: tuple | None):
    """Prints the variants (None: all) against the first of them, and draws all that the folder
    holds. Needs no data and trains nothing. UserError if there is nothing to show."""
    table = {}  # {variant: {seed: record}}
    for record in read_records(folder):
        table.setdefault(record["variant"], {})[record["seed"]] = record
    shown = {variant: table[variant] for variant in variants or table if variant in table}
    if not shown:
        raise UserError(f"{folder}/results.jsonl has no runs to show")
    missing = [variant for variant in variants or () if variant not in table]
    if missing:
        print(f"no runs of {', '.join(missing)} in {folder}")
    if len({record["code"] for runs in table.values() for record in runs.values()}) > 1:
        print("\nWARNING: these runs were made by different versions of the code or of Python")
    print_results(shown)
    draw(table, folder)


def main():
    config, given = parse_flags(BenchConfig, __doc__)
    if WORLD > 1:
        raise UserError("bench.py measures on one process: start it without torchrun")
    if config.show is not None:
        show(Path(config.show), config.variants if "variants" in given else None)
        return
    if config.quick:
        config = replace(config, **{k: v for k, v in QUICK.items() if k not in given})
    runs, device = list_runs(config), pick_device(config.device)
    if "cache" in config.parts:
        print_caches(runs, config.contexts)
    if "loss" in config.parts:
        measure(runs, config, device)
        show(Path(config.out_dir), config.variants)
    if "speed" in config.parts:
        print_speed(runs, config, device)


if __name__ == "__main__":
    with one_line_errors("stopped; the same command goes on, if without --overwrite"):
        main()
