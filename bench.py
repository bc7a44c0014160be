"""The comparison: every system trained on the same tokens in the same order; its loss, KV cache,
speed and attention concentration side by side.

    python bench.py                      nine systems x three seeds, 75 minutes on two CPU cores
    python bench.py --quick              the same tables in 5 minutes, too noisy to conclude from
    python bench.py --variants vanilla resformer --n_layer 16          any flag of train.py
    python bench.py --variants vanilla resformer "resformer --value_lambda 2 1"    a variant's own
    python bench.py --variants vanilla svformer --block_size 64 256 --lr 1e-3 4e-3     a sweep

The first variant is what the others are compared with, seed by seed: a pair has the same data in
the same order, and the same initial weights where both have them. Each measurement is a line in
out/bench/results.jsonl; what is there is not done again, so a bench that was stopped goes on.
"""

import itertools
import json
import math
import platform
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import USED_BY, GPT, GPTConfig, KVCache, rotate
from prepare_data import UserError, flag, one_line_errors, parse_flags
from train import (WORLD, TrainConfig, catch_signals, check, compiled, load_data, make_model,
                   make_optimizers, model_config, pick_device, pick_dtype, train, windows)

QUICK = dict(seeds=(1,), max_steps=80, warmup_steps=20, eval_every=20, eval_tokens=16384,
             rounds=3)
PAPER_CACHES = (("82M", 2048, torch.float32), ("82M", 65536, torch.bfloat16),
                ("468M", 2048, torch.float32), ("468M", 65536, torch.bfloat16))
PARTS = ("loss", "cache", "speed")


@dataclass
class BenchConfig(TrainConfig):
    variants: tuple = flag(("vanilla", "resformer", "svformer", "neutreno", "denseformer", "gqa",
                            "cla", "svformer+gqa", "cla+gqa"), "what to compare, the first with "
                           "all others; names as in train.py, or in quotes a name and flags of "
                           "its own", nargs="+", type=str)
    seeds: tuple = flag((1, 2, 3), "each variant is trained once with each", nargs="+", type=int)
    block_size: tuple = flag((128,), "context in tokens, or several; --batch_size is the first "
                             "one's, the others get as many tokens a step", nargs="+", type=int)
    lr: tuple = flag((4e-3,), "highest learning rate, or several", nargs="+", type=float)
    parts: tuple = flag(PARTS, "what to measure; loss includes attention concentration", nargs="+",
                        type=str, choices=PARTS)
    contexts: tuple = flag((128, 4096), "speed: tokens in the cache while decoding", nargs="+",
                           type=int)
    decode_batch: int = flag(8, "speed: sequences that are decoded at once")
    rounds: int = flag(15, "speed: turns, of which the median is taken")
    quick: bool = flag(False, "one seed, 80 steps, 3 turns: minutes, and noise")
    out_dir: str = flag("out/bench", "the folder of results.jsonl, the figures and the runs")
    attention: str = "vanilla"  # these four are no flags here: variants, seeds, always, never
    seed: int = 1
    resume: bool = True
    overwrite: bool = False


def list_runs(config: BenchConfig) -> list[tuple]:
    """All runs, the first seed's first, as (block_size, lr, variant, the run's TrainConfig).
    Raises UserError before any work."""
    for name in ("variants", "seeds", "block_size", "lr", "contexts"):
        if len(set(values := getattr(config, name))) < len(values):
            raise UserError(f"--{name} has a value twice: {' '.join(map(str, values))}")
    if min(*config.contexts, config.decode_batch, config.rounds) < 1:
        raise UserError("--contexts, --decode_batch and --rounds must be at least 1")
    shared, runs = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}, []
    for seed, block_size, lr, variant in itertools.product(
            config.seeds, config.block_size, config.lr, config.variants):
        batch_size = max(1, config.batch_size * config.block_size[0] // max(1, block_size))
        try:
            own, names = parse_flags(TrainConfig, __doc__, ["--attention", *variant.split()])
            flags = shared | dict(seed=seed, block_size=block_size, lr=lr, batch_size=batch_size)
            for name, user in USED_BY.items():  # shared flags reach the variants that use them
                if user not in own.attention.split("+"):
                    flags[name] = getattr(TrainConfig, name)
            run = TrainConfig(**flags | {name: getattr(own, name) for name in names})
            check(run)
        except UserError as error:
            raise UserError(str(error).replace("--attention", "--variants")) from None
        runs.append((block_size, lr, variant, run))
    return runs


class Results(dict):
    """results.jsonl as {name: record}. A name holds all that a measurement depends on."""

    def __init__(self, folder: Path, device: torch.device, data_sha256: str):
        info = Path("/proc/cpuinfo")
        cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
        machine = (torch.cuda.get_device_name(device) if device.type == "cuda" else
                   f"{cpu[1] if cpu else platform.machine()}, {torch.get_num_threads()} threads")
        self.path, self.about = folder / "results.jsonl", dict(
            date=time.strftime("%Y-%m-%d"), torch=torch.__version__, machine=machine,
            python=platform.python_version(), data_sha256=data_sha256)
        try:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            super().__init__({record["name"]: record for record in map(json.loads, lines)})
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.path} isn't what bench.py writes: move it away") from None

    def name(self, part: str, run: TrainConfig, **settings) -> str:
        text = json.dumps([part, self.flags(run), settings, self.about["data_sha256"]])
        return f"{part}-{run.attention}-{run.seed}-{zlib.crc32(text.encode()):08x}"

    def flags(self, run: TrainConfig) -> dict:
        return {k: v for k, v in asdict(run).items()
                if k not in ("out_dir", "resume", "overwrite")}

    def once(self, measure, part: str, run: TrainConfig, **settings) -> dict:
        """The record of this name; if there is none yet, of what measure() returns."""
        name = self.name(part, run, **settings)
        if name not in self:
            record = dict(name=name, **self.about, flags=self.flags(run), **settings, **measure())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as f:
                print(json.dumps(record), file=f)
            self[name] = json.loads(json.dumps(record))
        return self[name]


# ---- loss and attention concentration -----------------------------------------------------------


@torch.no_grad()
def concentration(model: GPT, idx: torch.Tensor) -> dict[str, list[float]]:
    """How much attention concentrates, per layer, as means over the sequences idx (B, T):

    entropy: of token importance, in nats. A layer's attention, averaged over heads, summed over
        queries and normalised over keys, says how important each token is (the paper's eq. 11);
        at most ln T, and low where a few tokens have it all.
    sink: the attention that the queries after the first pay to the first token.
    value_drain: norm of the first token's value, as attention uses it, over the others' mean norm.
    hidden_drain: the same of the hidden states after the block.
    similarity: mean cosine similarity of two positions' hidden states after the block.
    """
    found = {name: [] for name in MEASURES[1:]}

    def drain(x):  # (B, T, numbers)
        norms = x.norm(dim=-1)
        return (norms[:, 0] / norms[:, 1:].mean(dim=1)).mean().item()

    def after_attention(attention, inputs, outputs):
        x, rope, _, _, _, k1, _, _, _ = inputs
        _, k, v = outputs
        c, T = attention.config, x.size(1)
        crosslayer = "crosslayer" in c.variants and attention.n > 1
        k = torch.cat((k1, k), dim=2) if crosslayer else k
        q = rotate(attention.split_heads(attention.q_proj(x)), *rope)
        k = k.repeat_interleave(c.n_head // c.n_kv_head, dim=1)  # (B, nh, T or 2 T, hs)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        future = future.repeat(1, k.size(2) // T)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)).masked_fill(future, -math.inf)
        A = scores.softmax(dim=-1).mean(dim=1)  # (B, T queries, T or 2 T keys)
        A = A.unflatten(-1, (-1, T)).sum(dim=2)  # crosslayer: a token's keys of both layers
        importance = A.sum(dim=1) / T  # (B, T), sums to 1
        found["entropy"].append(torch.special.entr(importance).sum(dim=-1).mean().item())
        found["sink"].append(A[:, 1:, 0].mean().item())
        found["value_drain"].append(drain(v.transpose(1, 2).flatten(2)))

    def after_block(_, inputs, outputs):
        x = outputs[0]
        found["hidden_drain"].append(drain(x))
        T, total = x.size(1), F.normalize(x, dim=-1).sum(dim=1)  # (B, C)
        # |sum of T unit vectors|^2 is T, plus the cosines of all T (T - 1) ordered pairs.
        cosines = (total.square().sum(dim=-1) - T) / (T * (T - 1))
        found["similarity"].append(cosines.mean().item())

    hooks = [block.self_attn.register_forward_hook(after_attention) for block in model.layers]
    hooks += [block.register_forward_hook(after_block) for block in model.layers]
    model(idx)
    for hook in hooks:
        hook.remove()
    return found


def trained(run: TrainConfig, val_data, device: torch.device, title: str, signals: list) -> dict:
    """Trains, then looks at 64 validation windows with what was learned."""
    start = time.perf_counter()
    model, history = train(run, signals, title, verbose=False)
    if signals:
        print(f"stopped in {title}, saved; the same command goes on", file=sys.stderr)
        sys.exit(128 + signals[0])
    seconds = time.perf_counter() - start
    # One window at a time: (nh, T, T) numbers are enough at T = 2,048.
    starts = np.linspace(0, len(val_data) - run.block_size - 1, 64).astype(np.int64)
    each = [concentration(model, windows(val_data, start, run.block_size, device)[0])
            for start in starts[:, None]]
    curve = [(record["step"], record["val_loss"]) for record in history if "val_loss" in record]
    print(f"{title}: {curve[-1][1]:.4f} nats per token, {seconds:.0f} s", file=sys.stderr)
    return dict(params=model.num_params(), seconds=round(seconds, 1), val_loss=curve[-1][1],
                tokens=len(history) * run.batch_size * run.grad_accum * run.block_size,
                bits_per_byte=history[-1]["bits_per_byte"], val_curve=curve,
                train_curve=[round(record["loss"], 4) for record in history],
                value_lambdas=[[n, float(l1), float(l2)]
                               for n, (l1, l2) in model.value_lambdas().items()],
                concentration={name: np.mean([e[name] for e in each], axis=0).tolist()
                               for name in each[0]})


def measure_losses(runs: list, results: Results, val_data, device) -> dict:
    """{(block_size, lr): {variant: [a record for each seed]}}"""
    tables, signals = {}, catch_signals()
    for i, (block_size, lr, variant, run) in enumerate(runs, 1):
        title = (f"run {i} of {len(runs)}: {variant}, seed {run.seed}, block_size {block_size}, "
                 f"lr {lr:g}")
        folder = str(results.path.parent / results.name("loss", run))
        record = results.once(lambda: trained(replace(run, out_dir=folder), val_data, device,
                                              title, signals), "loss", run)
        table = tables.setdefault((block_size, lr), {})
        table.setdefault(variant, []).append(record)
    return tables


# ---- KV cache and speed -------------------------------------------------------------------------


@torch.inference_mode()
def decode(model: GPT, cache: KVCache, n: int):
    """Reads n tokens a sequence, one after the other, behind what is in the cache."""
    token = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=cache.k[1].device)
    for _ in range(n):
        token = model(token, cache=cache)[0].argmax(dim=-1)  # (B, 1)


def cache_by_formula(c: GPTConfig) -> int:
    """Numbers a token: (layers with keys + layers with values) x key/value heads x head size."""
    keys = math.ceil(c.n_layer / 2) if "cla" in c.variants else c.n_layer
    values = 1 if "svformer" in c.variants else keys
    return (keys + values) * c.n_kv_head * c.head_dim


def measure_cache(run: TrainConfig, vocab_size: int, device: torch.device) -> dict:
    """{which cache: [bytes by the formula, bytes of its tensors]}: a token of one that decoding
    fills to the end, then the caches of the paper's sizes, allocated only."""
    c = model_config(run, vocab_size)
    cache = KVCache(c, 1, c.block_size, device)
    decode(GPT(c).to(device), cache, c.block_size)
    found = {"a token": [4 * cache_by_formula(c), cache.nbytes / cache.length]}
    for size, T, dtype in PAPER_CACHES:
        shape = replace(run, size=size, n_layer=None, n_head=None, n_embd=None, n_ffn=None)
        c = model_config(shape, vocab_size)
        try:
            measured = KVCache(c, 1, T, device, dtype).nbytes
        except RuntimeError:  # this machine hasn't so much memory
            measured = math.nan
        found[f"{size} {T:,} {'fp32' if dtype == torch.float32 else 'bf16'}"] = [
            T * cache_by_formula(c) * dtype.itemsize, measured]
    return found


def in_turns(tasks: list, device: torch.device, rounds: int) -> np.ndarray:
    """Seconds of each task, (rounds, tasks), called one after the other: a, b, c, a, b, c."""
    def seconds(task):
        start = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [[seconds(task) for task in tasks] for _ in range(rounds + 1)]
    return np.array(times[1:])  # the first turn warms up


def speed_tasks(run: TrainConfig, config: BenchConfig, vocab_size: int, device) -> dict:
    """{what is timed: (a function that does it, its tokens, its work)}, work being floating-point
    operations in training, and in decoding the bytes of weights and cache that have to be read."""
    model, dtype = make_model(run, vocab_size, device), pick_dtype(run, device)
    fast_model, optimizers = compiled(model, run, device), make_optimizers(model, run)
    batch = torch.randint(vocab_size, (2, run.batch_size, run.block_size), device=device)

    def train_step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = fast_model(*batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    tokens, c = batch[0].numel(), model.config
    tasks = {"training": (train_step, tokens, tokens * model.flops_per_token())}
    decoder = GPT(c).to(device, dtype)
    weights = (decoder.num_params() - decoder.embed_tokens.weight.numel()) * dtype.itemsize
    for context in config.contexts:
        cache = KVCache(c, config.decode_batch, context + 16, device, dtype)
        for store in (*cache.k.values(), *cache.v.values()):
            store.normal_()
        # Every layer reads keys and values, its own or another layer's: sharing them makes the
        # cache smaller, but not what is read.
        numbers = config.decode_batch * context * 2 * c.n_layer * c.n_kv_head * c.head_dim

        def decode_16(cache=cache, context=context):
            cache.length = context
            decode(decoder, cache, 16)

        tasks[f"decoding at {context:,}"] = (decode_16, config.decode_batch * 16,
                                             16 * (weights + numbers * dtype.itemsize))
    return tasks


def measure_speeds(runs: list, config: BenchConfig, vocab_size: int, device) -> dict:
    """{variant: {task: [tokens a second, as a ratio to the first variant's, work a second as a
    share of the machine's best at it: a large matrix product, or reading a large matrix]}}"""
    dtype, n = pick_dtype(runs[0][-1], device), 8192 if device.type == "cuda" else 2048
    square, large = (torch.randn(shape, device=device).to(dtype)
                     for shape in ((n, n), (2**14, 2**12)))
    best = {"training": (lambda: square @ square, 2 * n**3),
            "decoding": (lambda: large @ large[0], large.nbytes)}
    first, found = speed_tasks(runs[0][-1], config, vocab_size, device), {}
    for *_, variant, run in tqdm(runs, desc="speed", unit="variant", disable=None):
        found[variant] = row = {}
        for task, (function, tokens, work) in speed_tasks(run, config, vocab_size, device).items():
            limit, limit_work = best[task.split()[0]]
            a, b, c = in_turns([first[task][0], function, limit], device, config.rounds).T
            row[task] = [tokens / median(b), median(a / b), median(work * c / (limit_work * b))]
    return found


# ---- what came out ------------------------------------------------------------------------------

MEASURES = ("loss", "entropy", "sink", "value_drain", "hidden_drain", "similarity")

# The paper's claims: (claim, measure, variant, the variant it is set against, sign of the gap).
CLAIMS = (("a", "loss", "resformer", "vanilla", -1), ("a", "loss", "resformer", "denseformer", -1),
          ("a", "loss", "resformer", "neutreno", -1), ("b", "loss", "svformer", "gqa", -1),
          ("b", "loss", "svformer", "cla", -1), ("d", "entropy", "resformer", "vanilla", 1),
          ("d", "sink", "resformer", "vanilla", -1),
          ("d", "value_drain", "resformer", "vanilla", 1))

# Student's t, two-sided 95%, for 2, 3, ... seeds: few seeds make a wide interval.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def by_seed(records: list[dict], measure: str) -> np.ndarray:
    """The validation loss, or a concentration measure's mean over the layers' deeper half."""
    if measure == "loss":
        return np.array([record["val_loss"] for record in records])
    layers = np.array([record["concentration"][measure] for record in records])
    return layers[:, layers.shape[1] // 2:].mean(axis=1)


def standard_error(gaps: np.ndarray) -> float:
    return gaps.std(ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan


def spread(gaps: np.ndarray, digits: int = 4) -> str:
    return f"{gaps.mean():+.{digits}f}" + (
        f" ± {standard_error(gaps):.{digits}f}" if len(gaps) > 1 else "")


def verdict(gaps: np.ndarray, sign: int) -> str:
    if len(gaps) == 1:
        return "one seed can't tell"
    if abs(gaps.mean()) <= T95[min(len(gaps), 10) - 2] * standard_error(gaps):
        return "not distinguishable"
    return "holds" if gaps.mean() * sign > 0 else "does not hold at this scale"


def tokens_saved(record: dict, other: dict) -> float:
    """The share of its training that a run can do without to reach the other's last validation
    loss, from straight lines between the evaluations; NaN if it doesn't reach it."""
    steps, losses = np.array(record["val_curve"]).T
    best = np.minimum.accumulate(losses)
    return 1 - np.interp(-other["val_loss"], -best, steps, right=math.nan) / steps[-1]


def print_table(title: str, header: list, rows: list):
    print(f"\n{title}\n")
    widths = [max(len(str(cell)) for cell in column) for column in zip(header, *rows)]
    widths[0] = min(widths[0], max(12, 120 - 4 - sum(width + 3 for width in widths[1:])))
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (str(cell).rjust(width) for cell, width in zip(row, widths))
        # Of a variant too long for 120 columns the end is shown: its flags tell it apart.
        print("|", " | ".join([first.strip()[-widths[0]:].ljust(widths[0]), *others]), "|")


def print_losses(config: BenchConfig, tables: dict):
    first, *others = config.variants
    for (block_size, lr), table in tables.items():
        losses, attention = [], []
        for variant, records in table.items():
            gaps = [by_seed(records, m) - by_seed(table[first], m) for m in MEASURES]
            means = [by_seed(records, m).mean() for m in MEASURES]
            saved = np.mean([tokens_saved(a, b) for a, b in zip(records, table[first])])
            fewer = "not by all" if math.isnan(saved) else f"{saved:.0%}"
            if variant == first or len(records[0]["val_curve"]) == 1:  # one point is no curve
                fewer = ""
            losses.append([variant, f"{records[0]['params']:,}", f"{means[0]:.4f}",
                           "" if variant == first else spread(gaps[0]), fewer])
            attention.append([variant] + [
                f"{mean:.{3 - (mean >= 1)}f}"
                + f" {spread(gap, 3)}".replace(" ± ", "±") * (variant != first)
                for mean, gap in zip(means[1:], gaps[1:])])
        where = (f"block_size {block_size}, lr {lr:g}, {len(records)} seeds"
                 + ", --quick: noisy" * config.quick)
        print_table(f"Validation loss in nats per token, {records[0]['tokens']:,} tokens; {where}",
                    ["variant", "params", "loss", f"minus {first}'s", "fewer tokens"], losses)
        print_table(f"Attention in the deeper half of the layers, and minus {first}'s; {where}",
                    ["variant", *MEASURES[1:]], attention)
        print()
        for claim, measure, a, b, sign in CLAIMS:
            if {a, b} <= set(table):
                gaps = by_seed(table[a], measure) - by_seed(table[b], measure)
                print(f"{claim}. {a}'s {measure} is {'above' if sign > 0 else 'below'} {b}'s: "
                      f"{spread(gaps)}, {verdict(gaps, sign)}")
        for variant, records in table.items():
            if records[0]["flags"]["value_residual"] != "fixed" and records[0]["value_lambdas"]:
                pairs = np.mean([record["value_lambdas"] for record in records], axis=0)
                print_table(f"{variant} came to these weights of V_1 and V_n",
                            ["layer", "V_1", "V_n"],
                            [[f"{n:.0f}", f"{l1:.3f}", f"{l2:.3f}"] for n, l1, l2 in pairs])
    for variant in others if len(tables) > 1 else ():
        gaps = {key: spread(by_seed(table[variant], "loss") - by_seed(table[first], "loss"))
                for key, table in tables.items()}
        print_table(f"Loss of {variant} minus {first}'s, by block_size and lr",
                    ["", *config.lr], [[b, *(gaps[b, lr] for lr in config.lr)]
                                       for b in config.block_size])


def draw(variants, table: dict, folder: Path):
    """loss.png, relative training loss, and concentration.png, from {variant: [record, ...]}."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("\nno figures: pip install matplotlib, then start this again")
        return
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (variant, records) in enumerate(table.items()):
        curves = [np.subtract(a["train_curve"], b["train_curve"])
                  for a, b in zip(records, table[variants[0]])]
        n = len(curves[0]) // 20 + 1  # smoothed over a twentieth, the wild start cut off
        smooth = np.array([np.convolve(c, np.full(n, 1 / n), "valid")[2 * n:] for c in curves])
        steps = np.arange(smooth.shape[1]) + 3 * n
        ax.plot(steps, smooth.mean(axis=0), f"C{i}", label=variant)
        ax.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=f"C{i}", alpha=0.15)
    ax.set(xlabel="step", ylabel=f"training loss minus {variants[0]}'s, nats per token")
    ax.legend(ncols=3)
    figure.savefig(folder / "loss.png", dpi=120)
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.5), layout="constrained")
    for ax, measure in zip(axes, MEASURES[1:]):
        for i, (variant, records) in enumerate(table.items()):
            layers = np.mean([record["concentration"][measure] for record in records], axis=0)
            ax.plot(np.arange(1, len(layers) + 1), layers, f"C{i}", label=variant)
        ax.set(title=measure, xlabel="layer")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=9)
    figure.savefig(folder / "concentration.png", dpi=120)
    plt.close("all")
    print(f"\nfigures: {folder / 'loss.png'} and {folder / 'concentration.png'}")


def main():
    config, given = parse_flags(BenchConfig, __doc__)
    if config.quick:
        config = replace(config, **{k: v for k, v in QUICK.items() if k not in given})
    if WORLD > 1:
        raise UserError("bench.py measures on one process: start it without torchrun")
    runs, device = list_runs(config), pick_device(config.device)
    _, val_data, meta = load_data(runs[0][-1])
    results = Results(Path(config.out_dir), device, meta["sha256"])
    one_each = runs[:len(config.variants)]  # of the first seed, block_size and lr
    if "loss" in config.parts:
        tables = measure_losses(runs, results, val_data, device)
        print_losses(config, tables)
        draw(config.variants, next(iter(tables.values())), results.path.parent)
    settings = dict(variants=config.variants)
    if "cache" in config.parts:
        caches = results.once(lambda: {variant: measure_cache(run, meta["vocab_size"], device)
                                       for *_, variant, run in one_each}, "cache", runs[0][-1],
                              **settings)
        first = caches[config.variants[0]]["a token"][1]
        rows = [[variant, f"{caches[variant]['a token'][1] / first:.0%}"] + [
                    " / ".join(f"{n if which == 'a token' else n / 2**20:,.0f}" for n in pair)
                    for which, pair in caches[variant].items()] for variant in config.variants]
        print_table("KV cache by the formula / of the tensors: bytes a token in fp32, then MiB",
                    ["variant", f"of {config.variants[0]}", *caches[config.variants[0]]], rows)
    if "speed" in config.parts:
        settings |= dict(contexts=config.contexts, batch=config.decode_batch, rounds=config.rounds)
        speeds = results.once(lambda: measure_speeds(one_each, config, meta["vocab_size"], device),
                              "speed", runs[0][-1], **settings)
        print_table(f"Speed over {config.variants[0]}'s (tokens/s, share of the machine's best); "
                    f"decoding: {config.decode_batch} sequences",
                    ["variant", *speeds[config.variants[0]]],
                    [[variant] + [f"{ratio:.2f} ({rate:,.0f}, {share:.0%})"
                                  for rate, ratio, share in speeds[variant].values()]
                     for variant in config.variants])


if __name__ == "__main__":
    with one_line_errors():
        main()
