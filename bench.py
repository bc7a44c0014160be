"""The comparison: every system trained on the same tokens in the same order; then its loss, KV
cache, attention, a task and its speed side by side.

    python bench.py                      ten systems x three seeds, one to two hours on two cores
    python bench.py --quick              the same tables in 5 minutes, too noisy to conclude from
    python bench.py --variants vanilla resformer "resformer --value_lambda 2 1" --name lambda
    python bench.py --size 82M --parts cache --contexts 2048 65536
    python bench.py --show assets/results.jsonl --name main        what was measured before

The first variant is what the others are compared with, seed by seed: a pair has the same data in
the same order, and the same initial weights where both have them. A difference is given with its
95% interval. Every run is a line in out/bench/results.jsonl; what is there is not measured again.
"""

import ast
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from model import DECODING, USED_BY, GPT, GPTConfig, KVCache, rotate
from prepare_data import UserError, flag, one_line_errors, parse_flags
from train import (WORLD, TrainConfig, catch_signals, check, compiled, load_data, make_model,
                   make_optimizers, model_config, pick_device, pick_dtype, train, windows)

os.environ["MPLBACKEND"] = "agg"  # figures are files, no windows
try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

SYSTEMS = ("vanilla", "crosslayer", "resformer", "svformer", "neutreno", "denseformer", "gqa",
           "cla", "svformer+gqa", "cla+gqa")
PARTS = ("loss", "cache", "speed")
QUICK = dict(name="quick", seeds=(1,), max_steps=80, warmup_steps=20, eval_every=20,
             eval_tokens=16384, questions=400, rounds=3)

# What a variant may set for itself: its model and its optimizer. Everything else is shared, so that
# a pair of runs differs in nothing but the variant.
OWN_FLAGS = {f.name for f in fields(GPTConfig)} - {"vocab_size", "block_size"}
OWN_FLAGS |= {"size", "optimizer", "lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"}
# Flags that a record leaves out: where the files are, and those of the machine, since it holds the
# device and dtype that they came to.
UNRECORDED = {"out_dir", "resume", "overwrite", "device", "dtype", "compile"}


@dataclass
class BenchConfig(TrainConfig):
    variants: tuple = flag(SYSTEMS, "what to compare, the first with all others: names as in "
                           "--attention, or in quotes a name and flags of its own", nargs="+",
                           type=str, group="comparison")
    seeds: tuple = flag((1, 2, 3), "each variant is trained once with each", nargs="+", type=int)
    parts: tuple = flag(PARTS, "what to measure; loss includes attention and the task", nargs="+",
                        type=str, choices=PARTS)
    questions: int = flag(4000, "questions of the task")
    contexts: tuple = flag((128, 4096), "tokens in the cache; decoding is timed at the largest",
                           nargs="+", type=int)
    decode_batch: int = flag(8, "speed: sequences that are decoded at once")
    rounds: int = flag(9, "speed: how often each variant is timed, in turns with the first")
    start_token: bool = flag(False, "show attention with an end-of-text before each sequence")
    quick: bool = flag(False, "one seed, 80 steps: minutes, and noise")
    name: str = flag("main", "the experiment that the results belong to")
    show: str | None = flag(None, "print and draw the results in this file, measure nothing",
                            type=str)
    fresh: bool = flag(False, "measure anew what other code has measured")
    out_dir: str = flag("out/bench", "the folder of results.jsonl, the figures and the runs")
    attention: str = "vanilla"  # no flags here: --variants and --seeds are, and runs are resumed
    seed: int = 1
    resume: bool = True
    overwrite: bool = False


def list_runs(config: BenchConfig) -> list[tuple[str, TrainConfig]]:
    """(variant, how it is trained), the first seed's first. Raises UserError before any work."""
    for name in ("variants", "seeds", "contexts"):
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise UserError(f"--{name} has a value twice")
    if min(*config.contexts, config.decode_batch, config.rounds, config.questions) < 1:
        raise UserError("--contexts, --decode_batch, --rounds and --questions must be at least 1")
    if config.name != Path(config.name).name or not config.name.strip():
        raise UserError(f"--name {config.name!r} can't be a part of a file's name")
    runs = []
    for seed in config.seeds:
        for variant in config.variants:
            try:
                own, given = parse_flags(TrainConfig, __doc__, ["--attention", *variant.split()])
                if not given <= OWN_FLAGS:
                    raise UserError(f"--{min(given - OWN_FLAGS)} is for all variants alike: give "
                                    "it outside the quotes")
                if own.attention != variant.split()[0]:
                    raise UserError("the name of the variant comes first, and once")
                flags = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
                for name, user in USED_BY.items():
                    if user not in own.attention.split("+"):
                        del flags[name]  # the variant does not use it
                flags |= {name: getattr(own, name) for name in given}
                run = TrainConfig(**flags | dict(seed=seed))
                check(run)
            except UserError as error:
                raise UserError(f"--variants {variant}: {error}") from None
            runs.append((variant, run))
    return runs


# -------------------------------------------------------------------------------------------------
# Records


def fingerprint() -> str:
    """Of the code that makes the numbers, model.py and train.py, whatever its comments say."""
    digest = hashlib.sha256()
    for file in ("model.py", "train.py"):
        tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant("")  # a docstring
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


def read_records(path: Path) -> list[dict]:
    """The lines of a results file. A line that a kill has cut is skipped."""
    records = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for i, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if line.strip():
                print(f"{path}, line {i} is cut or broken, and skipped", file=sys.stderr)
            continue
        keys = {"name", "kind", "variant", "flags", "date", "code"}
        if not isinstance(record, dict) or not keys <= set(record):
            raise UserError(f"{path}, line {i} isn't what bench.py writes: move the file away")
        records.append(record)
    return records


def write_record(path: Path, record: dict):
    """Appends a line in one write, so that two benches can share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with open(path, "ab", buffering=0) as f:
        if f.tell() > 0 and not path.read_bytes().endswith(b"\n"):  # a kill has cut the last line
            line = b"\n" + line
        f.write(line)


# -------------------------------------------------------------------------------------------------
# Attention, by layer

# name in a record: (what it is, in a table; digits)
MEASURES = {
    "entropy": ("entropy of token importance, nats", 2),
    "top": ("share of the most important token", 3),
    "first": ("attention to the first token", 3),
    "value_norm": ("first token's value norm / the others'", 2),
    "hidden_norm": ("first token's hidden norm / the others'", 2),
    "similarity": ("cosine of two tokens' hidden states", 3),
    "eigenvalue": ("largest eigenvalue of the values", 2),
    "rank": ("effective rank of the values", 1),
}


@torch.no_grad()
def look_at_attention(model: GPT, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    """MEASURES of each layer (L,) and "importance" (L, T), means over the sequences idx (B, T)."""
    seen = []  # what describe says, sequence by sequence and layer by layer

    def after_block(block, inputs, outputs):
        x, rope, _, _, _, k1, *_ = inputs  # as in Block.forward
        hidden, k, v = outputs
        A = attention_matrix(block.self_attn, block.input_layernorm(x), rope, k1, k)
        values = v[0].transpose(0, 1).flatten(1)  # (T, nkv * hs)
        # On the CPU, because MPS has no eigenvalues.
        seen.append(describe(A.cpu(), values.cpu(), hidden[0].cpu()))

    hooks = [block.register_forward_hook(after_block) for block in model.layers]
    for sequence in idx.split(1):  # one at a time: attention is nh x T x T numbers
        model.hidden_states(sequence)
    for hook in hooks:
        hook.remove()
    means = {}
    for name in seen[0]:
        layers = torch.stack([layer[name] for layer in seen])  # (B L,), the importance (B L, T)
        means[name] = layers.unflatten(0, (len(idx), -1)).mean(dim=0)
    return means


def attention_matrix(attention, x, rope, k1, k) -> torch.Tensor:
    """A_n (T, T) for x (1, T, C), the mean over heads; crosslayer: a token's keys of both layers
    added up."""
    c, T = attention.config, x.size(1)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    if "crosslayer" in c.variants and attention.n > 1:
        k = torch.cat((k1, k), dim=2)  # (1, nkv, 2 T, hs)
        future = torch.cat((future, future), dim=1)  # (T, 2 T)
    q = rotate(attention.split_heads(attention.q_proj(x)), *rope)  # (1, nh, T, hs)
    k = k.repeat_interleave(c.n_head // c.n_kv_head, dim=1)  # (1, nh, T or 2 T, hs)
    scores = q @ k.transpose(2, 3) / math.sqrt(c.head_dim)  # (1, nh, T, T or 2 T)
    A = scores.masked_fill(future, -math.inf).softmax(dim=3)[0].mean(dim=0)  # (T, T or 2 T)
    return A.unflatten(1, (-1, T)).sum(dim=1)


def describe(A: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> dict:
    """MEASURES and "importance" of a layer. A (T queries, T keys) is the mean over heads; values
    (T, nkv * hs) are those that attention uses, V_n mixed with V_1 where it is; hidden (T, C).

    The attention that a token gets, averaged over queries, is its importance (arXiv 2410.17897,
    eq. 11). "eigenvalue" is the largest of (1/T) sum v v^T (eq. 12); it grows with the values'
    norm, so "rank" is the fair form: exp of the entropy of the spectrum divided by its sum."""
    T = len(A)
    importance = A.mean(dim=0)  # (T,), sums to 1
    value_norms, hidden_norms = values.norm(dim=1), hidden.norm(dim=1)  # (T,)
    directions = F.normalize(hidden, dim=1)  # (T, C)
    cosines = directions @ directions.T  # (T, T), with 1 on the diagonal
    spectrum = torch.linalg.eigvalsh(values.T @ values / T).clamp(min=0)  # (nkv * hs,)
    share = spectrum / spectrum.sum()
    return dict(importance=importance,
                entropy=torch.special.entr(importance).sum(),  # of -p ln p, in nats
                top=importance.max(),
                first=A[1:, 0].mean(),  # what the queries after the first pay to it
                value_norm=value_norms[0] / value_norms[1:].mean(),
                hidden_norm=hidden_norms[0] / hidden_norms[1:].mean(),
                similarity=(cosines.sum() - T) / (T * (T - 1)),
                eigenvalue=spectrum.max(),
                rank=torch.special.entr(share).sum().exp())


def even(T: int, width: int) -> dict:
    """What describe says where each query attends evenly to the tokens so far, and values and
    hidden states have random directions and one size; without the eigenvalue, which depends on
    that size."""
    tokens_so_far = torch.arange(1, T + 1)[:, None]
    A = torch.ones(T, T, dtype=torch.float64).tril() / tokens_so_far
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((T, width)))
    found = {name: x.numpy() for name, x in describe(A, values, values).items()}
    del found["eigenvalue"]
    return found | dict(value_norm=1.0, hidden_norm=1.0, similarity=0.0)


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
    batches = np.array_split(places, math.ceil(questions / 8))
    right = 0
    for batch in tqdm(batches, desc="task", leave=False, delay=30, mininterval=10):  # (B, 4)
        where = batch[:, :, None] + np.arange(context + n)  # (B, 4, context + n)
        where[:, :, :context] = where[:, :1, :context]  # the first is real, all have its context
        ids = torch.from_numpy(data[where].astype(np.int64)).to(device).flatten(0, 1)
        x = model.hidden_states(ids[:, :-1])[:, context - 1:]  # (4 B, n, C)
        logits = model.lm_head(x).float().flatten(0, 1)  # (4 B n, V)
        losses = F.cross_entropy(logits, ids[:, context:].flatten(), reduction="none")
        likeliest = losses.view(-1, 4, n).sum(dim=2).argmin(dim=1)  # (B,)
        right += (likeliest == 0).sum().item()
    return right / questions


def measure_run(run: TrainConfig, questions: int, title: str) -> dict:
    """Trains a model; what a record says of it."""
    signals = catch_signals()  # in training they end in a checkpoint, after it at once
    model, history = train(run, signals, title, verbose=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signals:
        print(f"stopped in {title}, saved; the same command goes on", file=sys.stderr)
        sys.exit(128 + signals[0])
    seconds = sum(r["seconds"] for r in history)  # of the steps, without the evaluations
    print(f"{title}: {history[-1]['val_loss']:.4f} nats per token, {seconds:.0f} s",
          file=sys.stderr)

    model.requires_grad_(False)
    c, device = model.config, model.lm_head.weight.device
    _, data, meta = load_data(run)
    record = dict(params=model.num_params(),
                  seconds=round(seconds, 1),
                  val_curve=[(r["step"], r["val_loss"]) for r in history if "val_loss" in r],
                  train_curve=[round(r["loss"], 4) for r in history],
                  bits_per_byte=history[-1]["bits_per_byte"],
                  task=task_accuracy(model, data, questions, device),
                  cache_bytes=model.kv_bytes_per_token(),
                  value_width=c.n_kv_head * c.head_dim,
                  value_lambdas=[[n, *map(float, pair)]
                                 for n, pair in model.value_lambdas().items()])
    starts = np.linspace(0, len(data) - c.block_size - 1, 64).astype(np.int64)
    texts, _ = windows(data, starts, c.block_size, device)  # (64, T)
    started = F.pad(texts[:, :-1], (1, 0), value=meta["vocab_size"] - 1)  # after an end-of-text
    five_digits = np.vectorize(lambda number: float(f"{number:.5g}"))
    for kind, idx in (("attention", texts), ("attention_start", started)):
        look = look_at_attention(model, idx)
        record[kind] = {name: five_digits(x.numpy()).tolist() for name, x in look.items()}
    return record


# -------------------------------------------------------------------------------------------------
# Speed


def speed_tasks(run: TrainConfig, config: BenchConfig, vocab_size: int, device) -> dict:
    """{what is timed: (a function that does it, its tokens)}"""
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


def measure_speed(runs: list, config: BenchConfig, device) -> dict:
    """{variant: {task: [tokens per second, ratio to the first variant's]}}, timed in turns."""
    _, _, meta = load_data(config)
    first = speed_tasks(runs[0][1], config, meta["vocab_size"], device)
    found = {}
    for variant, run in tqdm(runs, desc="speed"):
        tasks = speed_tasks(run, config, meta["vocab_size"], device)
        found[variant] = {}
        for name, (function, tokens) in tasks.items():
            rounds = [(timed(first[name][0], device), timed(function, device))
                      for _ in range(config.rounds + 1)]
            firsts, own = np.transpose(rounds[1:])  # the first round warms up
            rate = tokens / np.median(own)
            ratio = np.median(firsts / own)
            found[variant][name] = [round(rate, 1), round(ratio, 3)]
        del tasks, function  # a cache may be most of the memory
    return found


def timed(function, device) -> float:
    """The seconds that function() takes, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------
# Tables of runs: {variant: [a record for each seed]}, the first variant first.

# Student's t, two-sided 95%, by the number of seeds: few seeds make a wide interval.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23}


def with_numbers(record: dict, start_token: bool) -> dict:
    """A run's record, and in it what is compared, by name; "attention" is the kind asked for."""
    flags, curve = record["flags"], record["train_curve"]
    step_tokens = flags["batch_size"] * flags["grad_accum"] * flags["block_size"]
    n = max(1, len(curve) // 20)  # smoothed over a twentieth of the steps
    smooth = np.convolve(curve, np.full(n, 1 / n), "valid")
    attention = record["attention_start"] if start_token else record["attention"]
    deeper = {}
    for measure in MEASURES:
        layers = attention[measure]
        deeper[measure] = np.mean(layers[len(layers) // 2:])
    return record | deeper | dict(seed=flags["seed"],
                                  validation=record["val_curve"][-1][1],
                                  training=smooth[-1],
                                  accuracy=100 * record["task"],
                                  smooth=smooth,
                                  tokens=step_tokens * np.arange(n, len(curve) + 1),  # so far
                                  attention=attention)


def pair_up(runs: list, first: list) -> list[tuple]:
    """(a run, the first variant's of the same seed), for each seed that both have."""
    return [(r, f) for r in runs for f in first if r["seed"] == f["seed"]]


def interval(values: list[float]) -> float:
    """Half the 95% interval of the mean of at least two values."""
    t = T95.get(len(values), 2.20)  # a little too wide for more than 12
    return t * np.std(values, ddof=1) / math.sqrt(len(values))


def mean_and_gap(runs: list, pairs: list, number: str, digits: int) -> str:
    """The mean over seeds; then the mean difference within the pairs and its 95% interval."""
    text = f"{np.mean([r[number] for r in runs]):.{digits}f}"
    differences = [r[number] - f[number] for r, f in pairs]
    if differences:
        text += f" {np.mean(differences):+.{digits}f}"
    if len(differences) > 1:
        text += f" ±{interval(differences):.{digits}f}"
    return text


def tokens_saved(record: dict, other: dict) -> float:
    """The share of its training that a run can do without to reach the other's last validation
    loss, interpolated between the evaluations; NaN if it doesn't reach it."""
    steps, losses = np.array(record["val_curve"]).T
    best = np.minimum.accumulate(losses)
    # np.interp wants rising x, so the falling losses are negated.
    goal = -other["val_curve"][-1][1]
    return 1 - np.interp(goal, -best, steps, right=math.nan) / steps[-1]


def fewer_tokens(pairs: list[tuple]) -> str:
    """The mean share that is saved; or how many of the seeds reach the first variant's loss."""
    saved = [tokens_saved(r, f) for r, f in pairs if len(r["val_curve"]) > 1]
    reached = sum(np.isfinite(saved))
    if reached < len(saved):
        return f"reached {reached}/{len(saved)}"
    return f"{np.mean(saved):.0%}" if saved else ""


def labels(variants) -> list[str]:
    """Short and different, however alike the variants are: "1 vanilla", "2 resformer"."""
    return [f"{i} {variant.split()[0]}" for i, variant in enumerate(variants, start=1)]


def print_table(title: str, rows: dict, bottom: dict):
    """rows: {variant: {header: cell}}; bottom: {label: {header: cell}}. Columns that do not fit on
    the terminal go into a further table. A variant's flags, too long for a column, stand below."""
    names = labels(rows)
    cells = [*rows.values(), *bottom.values()]
    first = column("variant", [*names, *bottom], str.ljust)
    tables, room = [], 0  # lists of columns; what is left of the terminal's width
    for header in cells[0]:
        new = column(header, [row[header] for row in cells], str.rjust)
        if len(new[0]) + 3 > room:
            tables.append([first])
            room = shutil.get_terminal_size((100, 24)).columns - len(first[0]) - 4
        tables[-1].append(new)
        room -= len(new[0]) + 3
    print(f"\n{title}")
    for columns in tables:
        print()
        for line in zip(*columns):
            print(f"| {' | '.join(line)} |")
    for name, variant in zip(names, rows):
        if len(variant.split()) > 1:
            print(f"{name}: {variant}")


def column(header: str, cells: list[str], adjust) -> list[str]:
    width = max(map(len, (header, *cells)))
    return [adjust(cell, width) for cell in (header, "-" * width, *cells)]


def print_results(table: dict, start_token: bool):
    (name, first), *_ = table.items()
    one = first[0]
    losses, attention = {}, {}
    for variant, runs in table.items():
        pairs = [] if runs is first else pair_up(runs, first)
        params, cache_bytes = runs[0]["params"], runs[0]["cache_bytes"]
        losses[variant] = {"seeds": f"{len(runs)}",
                           "validation loss": mean_and_gap(runs, pairs, "validation", 4),
                           "training loss": mean_and_gap(runs, pairs, "training", 4),
                           "fewer tokens": fewer_tokens(pairs),
                           "task": mean_and_gap(runs, pairs, "accuracy", 1),
                           "parameters": f"{params:,}",
                           "KV cache": f"{cache_bytes:,.0f}",
                           "share": f"{cache_bytes / one['cache_bytes']:.0%}"}
        attention[variant] = {measure: mean_and_gap(runs, pairs, measure, digits)
                              for measure, (_, digits) in MEASURES.items()}
    T, width = one["flags"]["block_size"], one["value_width"]
    baseline = even(T, width)
    even_row = {measure: f"{baseline[measure]:.{digits}f}" if measure in baseline else ""
                for measure, (_, digits) in MEASURES.items()}

    minus = f"mean, minus {name.split()[0]}'s ± its 95% interval"
    print_table(f"After {one['tokens'][-1]:,} tokens; {minus}.\nLoss in nats per token; task: % "
                "right of four, chance 25; KV cache in bytes per token, float32", losses, {})
    start = ", end-of-text first" if start_token else ""
    print_table(f"Attention in the deeper half of the layers{start}; {minus}", attention,
                {"even / random": even_row})
    print()
    for measure, (meaning, _) in MEASURES.items():
        print(f"{measure}: {meaning}")
    widths = {runs[0]["value_width"] for runs in table.values()}
    for other in sorted(widths - {width}):  # gqa's
        print(f"rank of random values, {other} wide, not {width}: {even(T, other)['rank']:.1f}")


def print_speed(record: dict):
    rows = {}
    for variant, tasks in record["speed"].items():
        rows[variant] = {task: f"{ratio:.2f} ({rate:,.0f})"
                         for task, (rate, ratio) in tasks.items()}
    print_table(f"Speed over the first variant's (tokens per second) on {record['machine']}",
                rows, {})


def print_caches(runs: list, contexts: tuple):
    # One token, without storage; the vocabulary does not matter.
    sizes = {variant: KVCache(model_config(run, vocab_size=257), 1, 1, "meta").nbytes
             for variant, run in runs}
    name, whole = next(iter(sizes.items()))
    rows = {}
    for variant, n in sizes.items():
        rows[variant] = {"per token": f"{n:,}",
                         f"of {name.split()[0]}'s": f"{n / whole:.0%}"}
        for context in contexts:
            rows[variant][f"{context:,} tokens"] = f"{n * context / 2**20:,.1f}"
    print_table("KV cache in float32: bytes per token, then MiB for one sequence", rows, {})


# -------------------------------------------------------------------------------------------------
# Figures of a table of runs

# Of Okabe and Ito, for the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw(table: dict, name: str, folder: Path):
    """<name>-cache.png, -loss.png, -attention.png and -heat.png in folder."""
    if pyplot is None:
        print("\nno figures: pip install matplotlib, then start this again")
        return
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.rc("figure.constrained_layout", use=True)
    pyplot.rc("axes", prop_cycle=pyplot.cycler(color=COLOURS))
    table = dict(zip(labels(table), table.values()))
    for what, draw_one in (("cache", draw_cache), ("loss", draw_loss),
                           ("attention", draw_attention), ("heat", draw_heat)):
        draw_one(table)
        pyplot.savefig(folder / f"{name}-{what}.png", dpi=110)
        pyplot.close()
    print(f"\nfigures: {name}-cache.png, -loss.png, -attention.png and -heat.png in {folder}")
    if len(table) > 5:
        print("Attention is drawn for the first five variants, heat for two: see --variants.")


def draw_band(ax, x, curves, label):
    """The mean of the seeds' curves, and around it the range of all of them."""
    ax.plot(x, np.mean(curves, axis=0), label=label)
    ax.fill_between(x, np.min(curves, axis=0), np.max(curves, axis=0), alpha=0.15, linewidth=0)


def draw_cache(table):
    figure, ax = pyplot.subplots(figsize=(9, 4.5))
    name, first = next(iter(table.items()))
    taken = []  # caches that are drawn
    for i, (variant, runs) in enumerate(table.items()):
        x = runs[0]["cache_bytes"]
        beside = x * (1 + 0.02 * taken.count(x))  # so that equal caches don't hide each other
        taken.append(x)
        differences = [r["validation"] - f["validation"] for r, f in pair_up(runs, first)]
        error = interval(differences) if len(differences) > 1 else None
        ax.errorbar(beside, np.mean(differences), error, fmt="o" if i < len(COLOURS) else "s",
                    capsize=4, label=variant)
    ax.set_xlim(0, 1.05 * ax.get_xlim()[1])
    ax.set(xlabel="KV cache, bytes per token in float32 (lower is better; equal ones side by side)",
           ylabel=f"validation loss minus {name.split()[1]}'s,\nnats per token (lower is better)")
    figure.legend(loc="outside right upper")


def draw_loss(table):
    (name, first), *others = table.items()
    panels = max(1, math.ceil(len(others) / 5))
    _, axes = pyplot.subplots(1, panels, figsize=(9, 4.5), sharey=True, squeeze=False)
    for i, (variant, runs) in enumerate(others):
        curves = [r["smooth"] - f["smooth"] for r, f in pair_up(runs, first)]
        if curves:
            draw_band(axes[0, i // 5], runs[0]["tokens"] / 1e6, curves, variant)
    for ax in axes[0]:
        ax.axhline(0, color="black", linewidth=0.8, label=name)
        ax.set(xlabel="million tokens")
        ax.legend()
    axes[0, 0].set(ylabel=f"training loss minus {name.split()[1]}'s,\n"
                          "nats per token (lower is better)")


def draw_attention(table):
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7))
    one = next(iter(table.values()))[0]
    baseline = even(one["flags"]["block_size"], one["value_width"])
    for ax, measure in zip(axes.flat, ("entropy", "first", "value_norm", "rank")):
        for variant, runs in list(table.items())[:5]:  # more in one panel can't be told apart
            layers = [r["attention"][measure] for r in runs]
            draw_band(ax, np.arange(len(layers[0])) + 1, layers, variant)
        ax.axhline(baseline[measure], color="black", linestyle=":", label="even, random")
        ax.set(title=MEASURES[measure][0], xlabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=6)


def draw_heat(table):
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for ax, (variant, runs) in zip(axes, table.items()):
        importance = np.mean([r["attention"]["importance"] for r in runs], axis=0)  # (L, T)
        L, T = importance.shape
        # Early tokens are seen by more queries: even attention is what to compare with.
        image = ax.imshow(importance / even(T, 1)["importance"], aspect="auto", cmap="PuOr_r",
                          norm="log", vmin=1 / 8, vmax=8, extent=(0.5, T + 0.5, L + 0.5, 0.5))
        ax.set(title=variant, xlabel="position of the token that is attended to")
    axes[0].set(ylabel="layer")
    bar = figure.colorbar(image, ax=axes, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], format="{x:g}",
                          extend="both", label="importance / that of even attention")
    bar.minorticks_off()


# -------------------------------------------------------------------------------------------------
# What is measured, and what is shown


def measure_all(config: BenchConfig) -> list[dict]:
    """Measures what config asks for; returns its records."""
    runs = list_runs(config)
    first_seed = runs[:len(config.variants)]  # each variant once
    device = pick_device(config.device)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    dtype = str(pick_dtype(config, device)).removeprefix("torch.")
    about = dict(device=device.type, dtype=dtype, date=time.strftime("%Y-%m-%d"),
                 torch=torch.__version__, machine=machine, code=fingerprint())
    records = []
    if "cache" in config.parts:
        print_caches(first_seed, config.contexts)
    if "loss" in config.parts:
        records += measure_runs(config, runs, about)
    if "speed" in config.parts:
        variant, run = first_seed[0]
        asked = dict(name=config.name, kind="speed", variant=variant, flags=recorded_flags(run),
                     variants=config.variants, contexts=config.contexts, rounds=config.rounds,
                     decode_batch=config.decode_batch)
        speed = measure_speed(first_seed, config, device)
        record = asked | about | dict(speed=speed)
        write_record(Path(config.out_dir, "results.jsonl"), record)
        records.append(record)
    return records


def recorded_flags(run: TrainConfig) -> dict:
    return {name: value for name, value in asdict(run).items() if name not in UNRECORDED}


def measure_runs(config: BenchConfig, runs: list, about: dict) -> list[dict]:
    """The records of runs. What is in results.jsonl is not measured again, whatever experiment it
    belongs to: the newest record by today's code counts, or, without --fresh, by other code."""
    path, code = Path(config.out_dir, "results.jsonl"), about["code"]
    records, used, reused = read_records(path), [], []
    _, _, meta = load_data(config)
    for i, (variant, run) in enumerate(runs, start=1):
        same = dict(kind="run", flags=recorded_flags(run), data_sha256=meta["sha256"],
                    device=about["device"], dtype=about["dtype"])
        key = hashlib.sha256(json.dumps([same, code]).encode()).hexdigest()
        same = json.loads(json.dumps(same))  # as in the file, where tuples are lists
        same["questions"] = config.questions  # asked after training, so no part of the key
        found = [r for r in records if same.items() <= r.items()]
        todays = [r for r in found if r["code"] == code]
        if todays or config.fresh:
            found = todays
        label = dict(name=config.name, variant=variant)
        if found:
            record = found[-1] | label
            reused.append(record)
        else:
            run.out_dir = f"{config.out_dir}/{key[:12]}"
            title = f"run {i} of {len(runs)}: {variant}, seed {run.seed}"
            numbers = measure_run(run, config.questions, title)
            record = label | same | about | numbers
        if record not in records:  # new, or new under this name
            write_record(path, record)
            records.append(record)
        used.append(record)

    dates = ", ".join(sorted({r["date"] for r in reused}))
    outdated = sum(r["code"] != code for r in reused)
    if reused:
        print(f"reused {len(reused)} of {len(used)} runs, of {dates}")
    if outdated:
        print(f"WARNING: {outdated} of them were made by other code than today's model.py and "
              "train.py; --fresh measures them anew")
    return used


def settings(record: dict) -> dict:
    """All that makes a run another one."""
    keys = ("data_sha256", "device", "dtype", "questions")
    return record["flags"] | {key: record[key] for key in keys}


def comparable(run: dict, other: dict) -> bool:
    """Are two runs a pair, which differs in nothing but what the variants set for themselves?"""
    own = {"attention", "seed", *USED_BY}
    own |= set(re.findall(r"--(\w+)", f"{run['variant']} {other['variant']}"))
    mine, others = settings(run), settings(other)
    return all(mine[key] == others.get(key) for key in mine if key not in own)


def show(records: list[dict], config: BenchConfig):
    """Prints and draws the runs of config.variants, against the first of them, and the newest
    speeds. Each of the settings that the first has been run with has tables of its own."""
    runs = [with_numbers(r, config.start_token) for r in records if r["kind"] == "run"]
    firsts = []  # one run of the first variant in each of the settings
    for run in runs:
        if run["variant"] == config.variants[0] and not any(comparable(run, f) for f in firsts):
            firsts.append(run)
    if runs and not firsts:
        print(f"\nno runs of {config.variants[0]}")
    for i, first in enumerate(firsts, start=1):
        name = config.name
        if len(firsts) > 1:
            name = f"{config.name}-{i}"
            differing = [f"{key} {value}" for key, value in settings(first).items()
                         if key != "seed" and any(settings(f).get(key) != value for f in firsts)]
            print(f"\n{name}: {', '.join(differing)}")
        table = {}
        for variant in config.variants:
            found = [r for r in runs if r["variant"] == variant and comparable(r, first)]
            # Of a seed's runs the newest counts; all have the flags of the newest.
            seeds = {r["seed"]: r for r in found
                     if r["flags"] | dict(seed=0) == found[-1]["flags"] | dict(seed=0)}
            if seeds:
                table[variant] = list(seeds.values())
            else:
                print(f"\nno runs of {variant}")
        if len({r["code"] for seeds in table.values() for r in seeds}) > 1:
            print("\nWARNING: these runs were made by different versions of the code")
        print_results(table, config.start_token)
        draw(table, name, Path(config.out_dir))
    speeds = [r for r in records if r["kind"] == "speed"]
    if speeds:
        print_speed(speeds[-1])


def show_file(config: BenchConfig, given: set):
    """--show: all runs and the newest speeds of each experiment, or of one, from the file alone."""
    path = Path(config.show)
    if not path.is_file():
        raise UserError(f"--show {path}: there is no such file")
    experiments = {}
    for r in read_records(path):
        experiments.setdefault(r["name"], []).append(r)
    names = list(experiments) or [config.name]
    if "name" in given:
        names = [config.name]
    for name in names:
        if name not in experiments:
            raise UserError(f"--name {name}: {path} has {', '.join(experiments) or 'no records'}")
        records = experiments[name]
        variants = tuple(dict.fromkeys(r["variant"] for r in records if r["kind"] == "run"))
        if "variants" in given:
            if not set(config.variants) <= set(variants):
                raise UserError(f"--variants: {name} in {path} has {', '.join(variants)}")
            variants = config.variants
        if len(names) > 1:
            print(f"\n== {name}")
        show(records, replace(config, name=name, variants=variants))


def main():
    config, given = parse_flags(BenchConfig, __doc__)
    if config.show is not None:
        return show_file(config, given)
    if config.quick:
        config = replace(config, **{k: v for k, v in QUICK.items() if k not in given})
    if WORLD > 1:
        raise UserError("bench.py measures on one process: start it without torchrun")
    show(measure_all(config), config)


if __name__ == "__main__":
    with one_line_errors():
        main()
