"""The comparison: every system trained on the same tokens in the same order; then its loss, KV
cache, attention, a task and its speed side by side.

    python bench.py                      ten systems x three seeds, two hours on two cores
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
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from model import DECODING, USED_BY, GPT, KVCache, rotate
from prepare_data import UserError, flag, one_line_errors, parse_flags
from train import (WORLD, TrainConfig, catch_signals, check, compiled, load_data, make_model,
                   make_optimizers, model_config, pick_device, pick_dtype, train, windows)

SYSTEMS = ("vanilla", "crosslayer", "resformer", "svformer", "neutreno", "denseformer", "gqa",
           "cla", "svformer+gqa", "cla+gqa")
PARTS = ("loss", "cache", "speed")
QUICK = dict(name="quick", seeds=(1,), max_steps=80, warmup_steps=20, eval_every=20,
             eval_tokens=16384, questions=400, rounds=3)

# What a variant may set for itself: its model and its optimizer. Everything else is shared, so that
# a pair of runs differs in nothing but the variant.
OWN_FLAGS = {"attention", "size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn",
             "value_residual", "value_lambda", "residual_layers", "neutreno_lambda", "optimizer",
             "lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"}
# Flags that a record leaves out: where the files are; and it has the device and dtype by name.
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


def list_runs(config: BenchConfig) -> list[TrainConfig]:
    """All runs, the first seed's first. Raises UserError before any work."""
    for name in ("variants", "seeds", "contexts"):
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise UserError(f"--{name} has a value twice")
    if min(*config.contexts, config.decode_batch, config.rounds, config.questions) < 1:
        raise UserError("--contexts, --decode_batch, --rounds and --questions must be at least 1")
    shared = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    runs = []
    for seed in config.seeds:
        for variant in config.variants:
            try:
                own, given = parse_flags(TrainConfig, __doc__, ["--attention", *variant.split()])
                if not given <= OWN_FLAGS:
                    raise UserError(f"--{sorted(given - OWN_FLAGS)[0]} is for all variants alike: "
                                    "give it outside the quotes")
                flags = shared | dict(seed=seed)
                for name, user in USED_BY.items():  # only for the variants that use them
                    if user not in own.attention.split("+"):
                        flags[name] = getattr(TrainConfig, name)
                run = TrainConfig(**flags | {name: getattr(own, name) for name in given})
                check(run)
            except UserError as error:
                raise UserError(f"--variants {variant}: {error}") from None
            runs.append(run)
    return runs


# -------------------------------------------------------------------------------------------------
# Records


def fingerprint() -> str:
    """Of the code that makes the numbers, model.py and train.py, whatever its comments say."""
    digest = hashlib.sha256()
    for file in ("model.py", "train.py"):
        tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and ast.get_docstring(node) is not None:
                node.body[0].value = ast.Constant("")
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


RECORD = {"name", "kind", "variant", "flags", "date", "code"}  # what every record has


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
        if not isinstance(record, dict) or not RECORD <= set(record):
            raise UserError(f"{path}, line {i} isn't what bench.py writes: move the file away")
        records.append(record)
    return records


def write_record(path: Path, record: dict):
    """Appends a line in one write, so that two benches can share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as f:
        line = json.dumps(record).encode() + b"\n"
        if f.tell() > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":  # a kill has cut the last line
                line = b"\n" + line
        f.write(line)


class Results:
    """What results.jsonl holds, and what is put into it."""

    def __init__(self, config: BenchConfig, device: torch.device):
        self.path = Path(config.out_dir, "results.jsonl")
        self.name, self.fresh = config.name, config.fresh
        self.records = read_records(self.path)
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            machine = torch.cuda.get_device_name(device)
        self.about = dict(date=time.strftime("%Y-%m-%d"), torch=torch.__version__, machine=machine,
                          code=fingerprint())
        self.used, self.reused, self.outdated = [], [], 0

    def find(self, same: dict) -> dict | None:
        """The newest record in which all of same stands, whatever experiment it belongs to; by
        today's code if there is one, else, without --fresh, by other code."""
        found = [record for record in self.records if same.items() <= record.items()]
        for record in reversed(found):
            if record["code"] == self.about["code"]:
                return record
        if self.fresh or not found:
            return None
        self.outdated += 1
        return found[-1]

    def once(self, kind: str, variant: str, flags: dict, measure, **settings):
        """Puts the record of this measurement into self.used: the one that there is, or a new one
        with what measure() returns."""
        same = json.loads(json.dumps(dict(kind=kind, flags=flags, **settings)))
        record = self.find(same)
        if record is None:
            record = dict(name=self.name, variant=variant) | same | self.about | measure()
        else:
            self.reused.append(record["date"])
            record = record | dict(name=self.name, variant=variant)
        if record not in self.records:  # new, or new under this name
            write_record(self.path, record)
            self.records.append(record)
        self.used.append(record)

    def say_what_was_reused(self):
        if self.reused:
            dates = " and ".join(sorted({min(self.reused), max(self.reused)}))
            print(f"reused {len(self.reused)} of {len(self.used)} measurements, of {dates}")
        if self.outdated:
            print(f"WARNING: {self.outdated} of them were made by other code than today's model.py "
                  "and train.py; --fresh measures them anew")


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
def look_at_attention(model: GPT, idx: torch.Tensor) -> dict[str, list]:
    """MEASURES for each layer, as means over the sequences idx (B, T), and "importance" (L, T)."""
    layers = []

    def after_attention(attention, inputs, outputs):
        x, rope, k1 = inputs[0], inputs[1], inputs[5]
        _, k, v = outputs
        A = attention_matrix(attention, x, rope, k1, k)
        layers.append(describe_attention(A, v.transpose(1, 2).flatten(2)))

    def after_block(_, inputs, outputs):
        layers[-1] |= describe_hidden_states(outputs[0])

    hooks = [block.self_attn.register_forward_hook(after_attention) for block in model.layers]
    hooks += [block.register_forward_hook(after_block) for block in model.layers]
    model.hidden_states(idx)
    for hook in hooks:
        hook.remove()
    return {name: [layer[name] for layer in layers] for name in layers[0]}


def describe_attention(A: torch.Tensor, values: torch.Tensor) -> dict:
    """A (B, T queries, T keys) is the mean over heads; values (B, T, nkv * hs) are those that
    attention uses, V_n mixed with V_1 where it is.

    The attention that a token gets, averaged over queries, is its importance (arXiv 2410.17897,
    eq. 11). "eigenvalue" is the largest of (1/T) sum v v^T (eq. 12); it grows with the values'
    norm, so "rank" is the fair form: exp of the entropy of the spectrum divided by its sum."""
    importance = A.mean(dim=1)  # (B, T), sums to 1
    moment = values.transpose(1, 2) @ values / values.size(1)
    spectrum = torch.linalg.eigvalsh(moment.float().cpu()).clamp(min=0)  # (B, nkv * hs)
    share = spectrum / spectrum.sum(dim=-1, keepdim=True)
    return dict(importance=importance.mean(dim=0).tolist(),
                entropy=entropy(importance).mean().item(),
                top=importance.max(dim=-1).values.mean().item(),
                first=A[:, 1:, 0].mean().item(),  # what the queries after the first pay to it
                value_norm=first_over_others(values),
                eigenvalue=spectrum.max(dim=-1).values.mean().item(),
                rank=entropy(share).exp().mean().item())


def describe_hidden_states(x: torch.Tensor) -> dict:  # (B, T, C)
    T = x.size(1)
    total = F.normalize(x, dim=-1).sum(dim=1)  # (B, C)
    # |sum of T unit vectors|^2 is T, plus the cosines of all T (T - 1) ordered pairs.
    cosines = (total.square().sum(dim=-1) - T) / (T * (T - 1))
    return dict(hidden_norm=first_over_others(x), similarity=cosines.mean().item())


def entropy(p: torch.Tensor) -> torch.Tensor:
    """In nats, over the last dimension."""
    return torch.special.entr(p).sum(dim=-1)


def first_over_others(x: torch.Tensor) -> float:
    """(B, T, numbers): the first token's norm over the mean of the others'."""
    norms = x.norm(dim=-1)
    return (norms[:, 0] / norms[:, 1:].mean(dim=1)).mean().item()


def attention_matrix(attention, x, rope, k1, k) -> torch.Tensor:
    """A_n (B, T, T), the mean over heads; crosslayer: a token's keys of both layers added up."""
    c, T = attention.config, x.size(1)
    if "crosslayer" in c.variants and attention.n > 1:
        k = torch.cat((k1, k), dim=2)
    q = rotate(attention.split_heads(attention.q_proj(x)), *rope)  # (B, nh, T, hs)
    k = k.repeat_interleave(c.n_head // c.n_kv_head, dim=1)  # (B, nh, T or 2 T, hs)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    future = future.repeat(1, k.size(2) // T)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)).masked_fill(future, -math.inf)
    A = scores.softmax(dim=-1).mean(dim=1)
    return A.unflatten(-1, (-1, T)).sum(dim=2)


def even_attention(T: int) -> np.ndarray:
    """(T queries, T keys): each query attends evenly to the tokens so far."""
    return np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]


def even(T: int, width: int) -> dict[str, float]:
    """MEASURES where attention is even over the tokens so far and values have random directions."""
    A = torch.from_numpy(even_attention(T))
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((T, width)))
    found = describe_attention(A[None], values[None])
    del found["eigenvalue"]  # it depends on the size of the values
    return found | dict(value_norm=1.0, hidden_norm=1.0, similarity=0.0)


# -------------------------------------------------------------------------------------------------
# One run: training, then what can be seen in the trained model


@torch.no_grad()
def task_accuracy(model: GPT, data: np.ndarray, questions: int, device) -> float:
    """A stand-in for downstream tasks: of a context's real continuation and three from elsewhere in
    the text, is the real one the likeliest? Chance is 1/4; where one of the three is the same text,
    the answer counts as right. The questions are the same for all."""
    T, V = model.config.block_size, model.config.vocab_size
    context, n = max(1, T // 4), max(1, T // 8)  # tokens
    places = np.random.default_rng(0).integers(0, len(data) - context - n, (questions, 4))
    right = 0
    at_once = max(1, min(32, 2**27 // (4 * n * V)))  # questions, their logits in 0.5 GiB
    for start in range(0, questions, at_once):
        part = places[start:start + at_once]  # (B, 4)
        ids = data[part[:, :, None] + np.arange(context + n)].astype(np.int64)
        ids[:, 1:, :context] = ids[:, :1, :context]  # the first is real, all have its context
        ids = torch.from_numpy(ids).to(device).flatten(0, 1)  # (4 B, context + n)
        x = model.hidden_states(ids[:, :-1])[:, context - 1:]  # (4 B, n, C)
        log_p = model.lm_head(x).float().log_softmax(dim=-1)  # (4 B, n, V)
        likelihood = log_p.gather(2, ids[:, context:, None]).sum(dim=(1, 2)).view(-1, 4)
        right += (likelihood.argmax(dim=1) == 0).sum().item()
    return right / questions


def rounded(numbers: np.ndarray) -> list:
    """To five significant digits."""
    return np.vectorize(lambda x: float(f"{x:.5g}"))(numbers).tolist()


def look_at_texts(model: GPT, data, meta, device, start_token: bool) -> dict[str, list]:
    """look_at_attention, averaged over 64 sequences; start_token: an end-of-text before each."""
    T, looks = model.config.block_size, []
    for start in np.linspace(0, len(data) - T - 1, 64).astype(np.int64):
        # One at a time: attention is nh x T x T numbers.
        idx, _ = windows(data, start[None], T, device)
        if start_token:
            end_of_text = torch.full_like(idx[:, :1], meta["vocab_size"] - 1)
            idx = torch.cat((end_of_text, idx[:, :-1]), dim=1)
        looks.append(look_at_attention(model, idx))
    return {name: rounded(np.mean([look[name] for look in looks], axis=0)) for name in looks[0]}


def measure_run(run: TrainConfig, questions: int, data, meta, device, title, signals) -> dict:
    """Trains a model; what a record says of it."""
    model, history = train(run, signals, title, verbose=False)
    if signals:
        print(f"stopped in {title}, saved; the same command goes on", file=sys.stderr)
        sys.exit(128 + signals[0])
    seconds = sum(r["seconds"] for r in history)  # of the steps, without the evaluations
    curve = [(r["step"], r["val_loss"]) for r in history if "val_loss" in r]
    print(f"{title}: {curve[-1][1]:.4f} nats per token, {seconds:.0f} s", file=sys.stderr)
    lambdas = [[n, float(l1), float(l2)] for n, (l1, l2) in model.value_lambdas().items()]
    return dict(params=model.num_params(),
                seconds=round(seconds, 1),
                val_curve=curve,
                train_curve=[round(r["loss"], 4) for r in history],
                bits_per_byte=history[-1]["bits_per_byte"],
                task=task_accuracy(model, data, questions, device),
                cache_bytes=model.kv_bytes_per_token(),
                value_width=model.config.n_kv_head * model.config.head_dim,
                value_lambdas=lambdas,
                attention=look_at_texts(model, data, meta, device, start_token=False),
                attention_start=look_at_texts(model, data, meta, device, start_token=True))


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

    decoder = GPT(model.config).to(device, dtype)
    token = torch.zeros(config.decode_batch, 1, dtype=torch.long, device=device)
    cache = KVCache(model.config, config.decode_batch, max(config.contexts) + 16, device, dtype)
    for store in (*cache.k.values(), *cache.v.values()):
        store.normal_()

    @torch.no_grad()
    def decode_16():
        cache.length = max(config.contexts)
        with sdpa_kernel(DECODING):
            for _ in range(16):
                decoder(token, cache=cache)

    return {"training": (train_step, batch[0].numel()),
            f"decoding at {max(config.contexts):,}": (decode_16, config.decode_batch * 16)}


def measure_speed(runs, config: BenchConfig, vocab_size: int, device) -> dict:
    """{variant: {task: [tokens per second, ratio to the first variant's]}}, timed in turns."""
    first = speed_tasks(runs[0], config, vocab_size, device)
    found = {}
    for variant, run in zip(config.variants, tqdm(runs, desc="speed", disable=None)):
        tasks = speed_tasks(run, config, vocab_size, device)
        found[variant] = {}
        for name, (function, tokens) in tasks.items():
            seconds = timed_in_turns(first[name][0], function, config.rounds, device)
            ratios = [a / b for a, b in seconds]
            rate = tokens / median(b for _, b in seconds)
            found[variant][name] = [round(rate, 1), round(median(ratios), 3)]
        del tasks, function  # a cache may be most of the memory
    return dict(speed=found)


def timed_in_turns(first, second, rounds: int, device) -> list:
    """(seconds of first, seconds of second) of each round, after one that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        turn = []
        for f in (first, second):
            start = time.perf_counter()
            f()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            turn.append(time.perf_counter() - start)
        seconds.append(turn)
    return seconds[1:]


# -------------------------------------------------------------------------------------------------
# Tables

# Student's t, two-sided 95%, for 2, 3, ... seeds: few seeds make a wide interval.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)


def validation(record) -> float:
    return record["val_curve"][-1][1]


def training(record) -> float:
    """The mean of the last twentieth of the steps."""
    curve = record["train_curve"]
    return float(np.mean(curve[-max(1, len(curve) // 20):]))


def task_percent(record) -> float:
    return 100 * record["task"]


def tokens_per_step(flags: dict) -> int:
    return flags["batch_size"] * flags["grad_accum"] * flags["block_size"]


def deeper_half(measure: str, start_token: bool):
    kind = "attention_start" if start_token else "attention"

    def mean(record):
        layers = record[kind][measure]
        return float(np.mean(layers[len(layers) // 2:]))
    return mean


def tokens_saved(record: dict, other: dict) -> float:
    """The share of its training that a run can do without to reach the other's last validation
    loss, interpolated between the evaluations; NaN if it doesn't reach it."""
    steps, losses = np.array(record["val_curve"]).T
    best = np.minimum.accumulate(losses)
    # np.interp wants rising x, so the falling losses are negated.
    return 1 - np.interp(-validation(other), -best, steps, right=math.nan) / steps[-1]


def interval(values) -> float:
    """Half the 95% interval of the mean; NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    return T95[min(n, len(T95) + 1) - 2] * float(np.std(values, ddof=1)) / math.sqrt(n)


def gaps(records: dict, first: dict, measure) -> list[float]:
    """A variant's measure minus the first variant's, of each seed that both have."""
    return [measure(r) - measure(first[seed]) for seed, r in records.items() if seed in first]


def mean_and_gap(records: dict, first: dict, measure, digits: int) -> str:
    """The mean over seeds; then the mean difference from the first variant and its 95% interval."""
    text = f"{np.mean([measure(r) for r in records.values()]):.{digits}f}"
    differences = gaps(records, first, measure)
    if records is first or not differences:
        return text
    text += f" {np.mean(differences):+.{digits}f}"
    if len(differences) > 1:
        text += f" ±{interval(differences):.{digits}f}"
    return text


def fewer_tokens(records: dict, first: dict) -> str:
    saved = [tokens_saved(r, first[seed]) for seed, r in records.items()
             if seed in first and len(r["val_curve"]) > 1]
    if records is first or not saved:
        return ""
    return "not reached" if math.isnan(sum(saved)) else f"{np.mean(saved):.0%}"


def print_table(title: str, header: list, rows: list):
    """Columns that do not fit on the terminal go into a further table below."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    room = max(40, shutil.get_terminal_size((100, 24)).columns)
    columns = list(range(1, len(header)))
    print(f"\n{title}")
    while columns:
        shown = [columns.pop(0)]
        while columns and 4 + widths[0] + sum(widths[i] + 3 for i in (*shown, columns[0])) <= room:
            shown.append(columns.pop(0))
        print()
        for row in (header, ["-" * width for width in widths], *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [row[i].rjust(widths[i]) for i in shown]
            print("|", " | ".join(cells), "|")


def print_results(table: dict, start_token: bool):
    """Prints what {variant: {seed: record}} holds, the others against the first."""
    name, first = next(iter(table.items()))
    one = next(iter(first.values()))
    losses, attention = [], []
    for i, (variant, records) in enumerate(table.items(), start=1):
        label = f"{i} {variant.split()[0]}"  # its flags are too long for a column
        r = next(iter(records.values()))
        losses.append([label, f"{len(records)}",
                       mean_and_gap(records, first, validation, 4),
                       mean_and_gap(records, first, training, 4),
                       fewer_tokens(records, first),
                       mean_and_gap(records, first, task_percent, 1),
                       f"{r['params']:,}",
                       f"{r['cache_bytes']:,.0f}",
                       f"{r['cache_bytes'] / one['cache_bytes']:.0%}"])
        attention.append([label])
        for measure, (_, digits) in MEASURES.items():
            deeper = deeper_half(measure, start_token)
            attention[-1].append(mean_and_gap(records, first, deeper, digits))
    attention.append(["even / random"])
    baseline = even(one["flags"]["block_size"], one["value_width"])
    for measure, (_, digits) in MEASURES.items():
        known = measure in baseline
        attention[-1].append(f"{baseline[measure]:.{digits}f}" if known else "")

    minus = f"mean, minus {name.split()[0]}'s ± its 95% interval"
    tokens = one["flags"]["max_steps"] * tokens_per_step(one["flags"])
    print_table(f"After {tokens:,} tokens; {minus}.\nLoss in nats per token; task: % right of "
                "four, chance 25; KV cache in bytes per token, float32",
                ["variant", "seeds", "validation loss", "training loss", "fewer tokens", "task",
                 "parameters", "KV cache", "share"], losses)
    start = ", end-of-text first" if start_token else ""
    print_table(f"Attention in the deeper half of the layers{start}; {minus}",
                ["variant", *MEASURES], attention)
    print()
    for measure, (meaning, _) in MEASURES.items():
        print(f"{measure}: {meaning}")
    for (label, *_), variant in zip(losses, table):
        if len(variant.split()) > 1:
            print(f"{label}: {variant}")


# -------------------------------------------------------------------------------------------------
# Figures

# Of Okabe and Ito, for the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw(table: dict, name: str, folder: Path, start_token: bool):
    """<name>-cache.png, -loss.png, -attention.png and -heat.png in folder, each by a function of
    (pyplot, table, the kind of attention that it draws) that returns a figure."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("\nno figures: pip install matplotlib, then start this again")
        return
    folder.mkdir(parents=True, exist_ok=True)
    kind = "attention_start" if start_token else "attention"
    figures = dict(cache=draw_cache, loss=draw_loss, attention=draw_attention, heat=draw_heat)
    for what, draw_one in figures.items():
        figure = draw_one(pyplot, table, kind)
        figure.savefig(folder / f"{name}-{what}.png", dpi=110)
        pyplot.close(figure)
    print(f"\nfigures: {', '.join(f'{name}-{what}.png' for what in figures)} in {folder}")


def draw_band(ax, x, curves, colour, label):
    """The mean of the seeds' curves, and around it the range of all of them."""
    ax.plot(x, np.mean(curves, axis=0), color=colour, label=label)
    ax.fill_between(x, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.15,
                    linewidth=0)


def draw_cache(pyplot, table, kind):
    figure, ax = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    first = next(iter(table.values()))
    taken = []
    for i, (variant, records) in enumerate(table.items()):
        x = next(iter(records.values()))["cache_bytes"]
        beside = x * (1 + 0.02 * taken.count(x))  # so that equal caches don't hide each other
        taken.append(x)
        differences = gaps(records, first, validation)
        ax.errorbar(beside, np.mean(differences), interval(differences), fmt="os"[i // 5 % 2],
                    capsize=4, color=COLOURS[i % 5], label=variant)
    ax.set_xlim(0, None)
    ax.set(xlabel="KV cache, bytes per token in float32 (lower is better)",
           ylabel=f"validation loss minus {next(iter(table))}'s,\nnats per token (lower is better)")
    figure.legend(loc="outside right upper")
    return figure


def draw_loss(pyplot, table, kind):
    (name, first), *others = table.items()
    panels = max(1, math.ceil(len(others) / 5))
    figure, axes = pyplot.subplots(1, panels, figsize=(9, 4.5), layout="constrained", sharey=True,
                                   squeeze=False)
    for i, (variant, records) in enumerate(others):
        curves = gaps(records, first, lambda record: np.array(record["train_curve"]))
        if not curves:
            continue
        n = len(curves[0]) // 20 + 1  # smoothed over a twentieth of the steps
        curves = [np.convolve(curve, np.full(n, 1 / n), "valid") for curve in curves]
        steps = np.arange(len(curves[0])) + n
        tokens = steps * tokens_per_step(next(iter(records.values()))["flags"])
        draw_band(axes[0, i // 5], tokens / 1e6, curves, COLOURS[i % 5], variant)
    for ax in axes[0]:
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(xlabel="million tokens")
        if others:
            ax.legend()
    axes[0, 0].set(ylabel=f"training loss minus {name}'s,\nnats per token (lower is better)")
    return figure


def draw_attention(pyplot, table, kind):
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    record = next(iter(next(iter(table.values())).values()))
    baseline = even(record["flags"]["block_size"], record["value_width"])
    for ax, measure in zip(axes.flat, ("entropy", "first", "value_norm", "rank")):
        for colour, (variant, records) in zip(COLOURS, table.items()):  # at most five
            layers = [r[kind][measure] for r in records.values()]
            draw_band(ax, np.arange(len(layers[0])) + 1, layers, colour, variant)
        ax.axhline(baseline[measure], color="black", linestyle=":", label="even, random")
        ax.set(title=MEASURES[measure][0], xlabel="layer")
    axes[0, 0].legend()
    return figure


def draw_heat(pyplot, table, kind):
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for ax, (variant, records) in zip(axes, table.items()):
        importance = np.mean([r[kind]["importance"] for r in records.values()], axis=0)  # (L, T)
        L, T = importance.shape
        # Early tokens are seen by more queries: even attention is what to compare with.
        times = np.log2(importance / even_attention(T).mean(axis=0))
        image = ax.imshow(times, aspect="auto", cmap="PuOr_r", vmin=-3, vmax=3,
                          extent=(0.5, T + 0.5, L + 0.5, 0.5))
        ax.set(title=variant, xlabel="position of the token that is attended to")
    axes[0].set(ylabel="layer")
    bar = figure.colorbar(image, ax=axes, ticks=[-3, -2, -1, 0, 1, 2, 3], extend="both")
    bar.set_label("importance / that of even attention")
    bar.set_ticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    return figure


# -------------------------------------------------------------------------------------------------


def comparable(record: dict) -> str:
    """What two runs must have in common to be a pair, as text."""
    shared = {k: v for k, v in record["flags"].items() if k not in OWN_FLAGS | {"seed"}}
    return json.dumps([shared, *(record[k] for k in ("data_sha256", "device", "dtype",
                                                     "questions"))])


def show(records: list[dict], config: BenchConfig, variants):
    """Prints and draws what records hold of the variants, against the first of them."""
    tables = {}
    for r in records:
        if r["kind"] == "run" and r["variant"] in variants:
            empty = {variant: {} for variant in variants}
            table = tables.setdefault(comparable(r), empty)
            table[r["variant"]][r["flags"]["seed"]] = r  # of two, the newer
    for i, table in enumerate(tables.values(), start=1):
        missing = [variant for variant in variants if not table[variant]]
        if missing:
            print(f"\nno runs of {', '.join(missing)}")
        if variants[0] in missing:
            continue  # there is nothing to compare with
        table = {variant: found for variant, found in table.items() if found}
        if len({r["code"] for found in table.values() for r in found.values()}) > 1:
            print("\nWARNING: these runs were made by different versions of the code")
        print_results(table, config.start_token)
        name = config.name if len(tables) == 1 else f"{config.name}-{i}"
        draw(table, name, Path(config.out_dir), config.start_token)
    for r in records:
        if r["kind"] == "speed":
            print_speed(r)


def show_file(config: BenchConfig, given: set):
    """--show: the newest speeds and all runs of an experiment, from the file alone."""
    path = Path(config.show)
    if not path.is_file():
        raise UserError(f"--show {path}: there is no such file")
    everything = read_records(path)
    records = [r for r in everything if r["name"] == config.name]
    if not records:
        names = ", ".join(dict.fromkeys(r["name"] for r in everything))
        raise UserError(f"--name {config.name}: {path} has {names}")
    runs = [r for r in records if r["kind"] == "run"]
    speeds = [r for r in records if r["kind"] == "speed"]
    variants = measured = tuple(dict.fromkeys(r["variant"] for r in runs))
    if "variants" in given:
        variants = config.variants
        if not set(variants) <= set(measured):
            raise UserError(f"--variants: {config.name} in {path} has {', '.join(measured)}")
    show(runs + speeds[-1:], config, variants)


def print_speed(record: dict):
    rows = []
    for i, (variant, tasks) in enumerate(record["speed"].items(), start=1):
        cells = [f"{ratio:.2f} ({rate:,.0f})" for rate, ratio in tasks.values()]
        rows.append([f"{i} {variant.split()[0]}", *cells])
    print_table(f"Speed over the first variant's (tokens per second) on {record['machine']}",
                ["variant", *tasks], rows)


def print_caches(config: BenchConfig, runs: list[TrainConfig]):
    rows = []
    for i, run in enumerate(runs, start=1):
        # One token, without storage; the vocabulary does not matter.
        n = KVCache(model_config(run, vocab_size=257), 1, 1, "meta").nbytes
        if i == 1:
            whole = n
        mib = [f"{n * context / 2**20:,.1f}" for context in config.contexts]
        rows.append([f"{i} {run.attention}", f"{n:,}", f"{n / whole:.0%}", *mib])
    contexts = [f"{context:,} tokens" for context in config.contexts]
    print_table("KV cache in float32: bytes per token, then MiB for one sequence",
                ["variant", "per token", f"of {runs[0].attention}'s", *contexts], rows)


def measure_everything(config: BenchConfig, device: torch.device):
    """The parts that are asked for: the cache, then the speed, then the runs."""
    runs, results = list_runs(config), Results(config, device)
    n = len(config.variants)  # the first n runs are the first seed's
    dtype = str(pick_dtype(config, device)).removeprefix("torch.")
    where = dict(device=device.type, dtype=dtype)
    if "cache" in config.parts:
        print_caches(config, runs[:n])
    if {"loss", "speed"} & set(config.parts):
        _, val_data, meta = load_data(runs[0])

    if "speed" in config.parts:  # before signals are caught: Ctrl-C ends it
        settings = {k: getattr(config, k) for k in ("variants", "contexts", "rounds",
                                                    "decode_batch")}
        results.once("speed", config.variants[0], recorded_flags(runs[0]),
                     lambda: measure_speed(runs[:n], config, meta["vocab_size"], device),
                     machine=results.about["machine"], **settings, **where)

    if "loss" in config.parts:
        signals = catch_signals()
        for i, run in enumerate(runs):
            variant, flags = config.variants[i % n], recorded_flags(run)
            title = f"run {i + 1} of {len(runs)}: {variant}, seed {run.seed}"
            identity = json.dumps([flags, meta["sha256"], results.about["code"]])
            key = hashlib.sha256(identity.encode()).hexdigest()[:12]
            run = replace(run, out_dir=str(results.path.parent / key))
            results.once("run", variant, flags,
                         lambda: measure_run(run, config.questions, val_data, meta, device, title,
                                             signals),
                         data_sha256=meta["sha256"], questions=config.questions, **where)
            if signals:
                sys.exit(128 + signals[0])  # the record is written, the same command goes on
    results.say_what_was_reused()
    show(results.used, config, config.variants)


def recorded_flags(run: TrainConfig) -> dict:
    return {k: v for k, v in asdict(run).items() if k not in UNRECORDED}


def main():
    config, given = parse_flags(BenchConfig, __doc__)
    if config.show is not None:
        return show_file(config, given)
    if config.quick:
        config = replace(config, **{k: v for k, v in QUICK.items() if k not in given})
    if WORLD > 1:
        raise UserError("bench.py measures on one process: start it without torchrun")
    measure_everything(config, pick_device(config.device))


if __name__ == "__main__":
    with one_line_errors():
        main()
