"""Train any of the systems, by default a small ResFormer on Python's own sources, on this machine.

    python train.py                                     in minutes, on a laptop's CPU
    python train.py --attention svformer --seed 2       any variant, or several: svformer+gqa
    python train.py --resume                            go on where it stopped
    torchrun --standalone --nproc_per_node=2 train.py   one run on several processes or GPUs

A run lives in its folder, out/<attention> unless --out_dir says otherwise: ckpt.pt, log.jsonl.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig
from prepare_data import (DataConfig, UserError, flag, get_tokenizer, load, load_checkpoint,
                          one_line_errors, parse_flags, pick_device, prepare, replace_file,
                          stream_text)

# The paper's sizes (its Table 4) and a small one; the SwiGLU is 3.5 times as wide as the model.
SIZES = {
    "small": dict(n_layer=8, n_head=4, n_embd=64),
    "2M": dict(n_layer=4, n_head=2, n_embd=16),
    "82M": dict(n_layer=8, n_head=8, n_embd=512),
    "180M": dict(n_layer=12, n_head=12, n_embd=768),
    "468M": dict(n_layer=24, n_head=16, n_embd=1024),
}

# Dense bf16 operations a second, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12}

# Set by torchrun: which process this is, of how many.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def layer_numbers(text: str) -> tuple[int, ...]:
    """"2,6-8" -> (2, 6, 7, 8); raises ValueError."""
    ends = [part.partition("-") for part in text.split(",")]
    ranges = [range(int(first), int(last or first) + 1)[:1000] for first, _, last in ends]
    if not all(ranges):
        raise ValueError("a range without a layer")
    return tuple(n for numbers in ranges for n in numbers)


@dataclass
class TrainConfig:
    attention: str = flag("resformer", "vanilla, resformer, svformer, neutreno, denseformer, gqa, "
                          "cla, or several joined with +")
    size: str = flag("small", "layers, heads and width of the model", choices=tuple(SIZES))
    n_layer: int | None = flag(None, "layers, instead of the size's", type=int)
    n_head: int | None = flag(None, "query heads, instead of the size's", type=int)
    n_kv_head: int | None = flag(None, "gqa: key/value heads (default: half of n_head)", type=int)
    n_embd: int | None = flag(None, "width, instead of the size's", type=int)
    n_ffn: int | None = flag(None, "hidden width of the SwiGLU (default: 3.5 x n_embd)", type=int)
    value_residual: str = flag("fixed", "resformer: weights of V_1 and V_n that are value_lambda; "
                               "learnable, from there; or plus, weights of V_1 that share a "
                               "learnable total", choices=("fixed", "learnable", "plus"))
    value_lambda: tuple = flag((0.5, 0.5), "resformer: weights of V_1 and V_n", nargs=2,
                               type=float)
    residual_layers: tuple | None = flag(None, "resformer: layers that mix V_1 in, such as 6-8 or "
                                         "2,5-8 (default: all after the first)",
                                         type=layer_numbers)
    neutreno_lambda: float = flag(0.4, "neutreno: weight of V_1 - V_n")
    dataset: str = flag("stdlib", "what prepare_data.py wrote: a name under data/ or a path")
    block_size: int = flag(128, "context, in tokens")
    batch_size: int = flag(16, "sequences in a forward pass, over all processes")
    grad_accum: int = flag(1, "forward passes in a step")
    max_steps: int = flag(900, "steps of training")
    optimizer: str = flag("adamw", "adamw; or muon for the layers' matrices, adamw for the rest",
                          choices=("adamw", "muon"))
    lr: float = flag(4e-3, "highest learning rate")
    min_lr: float | None = flag(None, "last learning rate (default: a tenth of lr)", type=float)
    warmup_steps: int = flag(50, "steps in which the learning rate rises to lr")
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices; vectors have none")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: don't clip")
    seed: int = flag(1, "fixes the initial weights and the order of the data")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    dtype: str = flag("auto", "float32 or bfloat16 (mixed precision); auto is bfloat16 on CUDA",
                      choices=("auto", "float32", "bfloat16"))
    compile: str = flag("auto", "torch.compile: on or off; auto is on for CUDA",
                        choices=("auto", "on", "off"))
    eval_every: int = flag(100, "steps between two evaluations; a checkpoint follows each")
    eval_tokens: int = flag(131072, "validation tokens in an evaluation, always the same ones")
    out_dir: str | None = flag(None, "the run's folder (default: out/<attention>)", type=str)
    resume: bool = flag(False, "go on from the checkpoint in out_dir, if there is one")


# Changing one of these in the middle would make it another run.
FIXED = ("attention", "size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn",
         "value_residual", "value_lambda", "residual_layers", "neutreno_lambda", "block_size",
         "batch_size", "grad_accum", "optimizer", "seed")


def check(config: TrainConfig):
    for names, low in (("block_size batch_size grad_accum max_steps eval_every eval_tokens", 1),
                       ("lr min_lr warmup_steps weight_decay grad_clip seed", 0)):
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not low <= value < math.inf:
                raise UserError(f"--{name} must be at least {low}, not {value}")
    if config.seed >= 2**62:
        raise UserError(f"--seed must be less than 2^62, not {config.seed}")
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch 2.9, this is {torch.__version__}")
    c = model_config(config, vocab_size=257)  # a shape that can't be is refused before any work
    if c.n_layer * c.n_embd * (2 * c.n_embd + 3 * c.n_ffn) > 1e11:
        raise UserError("--n_layer, --n_embd, --n_ffn: more than 1e11 numbers are no one GPU's")


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    given = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    given = SIZES[config.size] | {name: v for name, v in given.items() if v is not None}
    # Matrix units like multiples of 64; GPT-2's 50,257 becomes 50,304 with ids that never occur.
    given["vocab_size"] = vocab_size if vocab_size < 1000 else math.ceil(vocab_size / 64) * 64
    try:
        return GPTConfig(**given)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def run_folder(config: TrainConfig) -> Path:
    return Path(config.out_dir or f"out/{config.attention}")


def load_data(config: TrainConfig) -> tuple:
    """prepare_data.load's (train ids, val ids, meta); the default data is prepared if need be."""
    if config.dataset == "stdlib" and not Path("data/stdlib/meta.json").exists() and RANK == 0:
        prepare(DataConfig())
    if WORLD > 1:
        dist.barrier()
    return load(config.dataset)


def windows(data: np.ndarray, starts: np.ndarray, block_size: int, device) -> tuple:
    """Inputs and targets, each (len(starts), block_size) int64: the text from starts on."""
    ids = data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    ids = torch.from_numpy(ids).to(device)
    return ids[:, :-1], ids[:, 1:]


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What --dtype means on this device."""
    if config.dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, config.dtype)


def build(config: TrainConfig, vocab_size: int, device: torch.device) -> tuple:
    """(the model that owns the weights, the same one compiled where config says so, its
    optimizers, the autocast context that it runs in)"""
    torch.manual_seed(config.seed)
    cuda = device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32
    raw_model = GPT(model_config(config, vocab_size)).to(device)
    hidden, matrices, vectors = [], [], []
    for name, p in raw_model.named_parameters():
        muon = config.optimizer == "muon" and name.startswith("layers.")
        (vectors if p.dim() == 1 else hidden if muon else matrices).append(p)
    optimizers = [torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if hidden:  # scaled so that AdamW's lr and weight_decay suit it too (arXiv 2502.16982)
        optimizers.append(torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    if compiled := config.compile == "on" or (config.compile == "auto" and cuda):
        torch.compiler.reset()  # after 8 models in one process it would compile no more
    bf16 = precision(config, device) == torch.bfloat16
    return (raw_model, torch.compile(raw_model) if compiled else raw_model, optimizers,
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16))


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up to lr, then half a cosine down to min_lr; step counts from 0."""
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (config.lr - low) * (1 + math.cos(math.pi * done)) / 2


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(model, data, config: TrainConfig, device) -> float:
    """Mean loss, in nats a token, over windows evenly spread over data: each time the same."""
    n = max(1, min(config.eval_tokens, len(data) - 1) // config.block_size)
    if n > config.batch_size:
        n -= n % config.batch_size  # batches of one shape, so that nothing compiles anew
    starts = np.linspace(0, len(data) - config.block_size - 1, n).astype(np.int64)
    total = torch.zeros((), device=device)
    for i in range(0, n, config.batch_size):
        mine = starts[i:i + config.batch_size][RANK::WORLD]
        if len(mine) > 0:
            total += model(*windows(data, mine, config.block_size, device))[1] * len(mine)
    loss = sum_over_processes(total).item() / n
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: try a lower --lr; the last checkpoint is "
                        "as it was")
    return loss


def lock_folder(folder: Path):
    """Makes folder; returns an open file in it that one process can have, until it closes it or
    ends by whatever means. UserError if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait for it, or choose another "
                        "--out_dir") from None
    except (ImportError, OSError):
        pass  # Windows and some network drives have no such locks
    return lock


def restore(out: Path, config: TrainConfig, meta: dict, model, optimizers, device) -> list[dict]:
    """Brings model and optimizers to where the run in out has come, if there is one, and returns
    its history up to there. UserError if that run is another one, or broken."""
    if not (out / "ckpt.pt").exists():
        return []
    ckpt = load_checkpoint(out / "ckpt.pt", device)
    try:
        for name in FIXED:
            if getattr(config, name) != ckpt["config"][name]:
                raise UserError(f"--{name} is {getattr(config, name)}, but the run in {out} has "
                                f"{ckpt['config'][name]}")
        if ckpt["data_sha256"] != meta["sha256"]:
            raise UserError(f"--dataset {config.dataset} is not what the run in {out} has read")
        model.load_state_dict(ckpt["model"])
        for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        lines = (out / "log.jsonl").read_text().splitlines()
        return [json.loads(lines[i]) for i in range(ckpt["step"])]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the run in {out} can't be resumed, its ckpt.pt or log.jsonl is broken: "
                        f"{error!r:.200}") from None


@contextmanager
def caught_signals():
    """A list that SIGINT and SIGTERM are put into instead of ending us; a second one does that."""
    arrived = []

    def handler(number, frame):
        if arrived:
            os._exit(128 + number)
        arrived.append(number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


def report(model: GPT, tokenizer: str, last: dict, out: Path):
    """Prints what a run came to: its loss, its KV cache next to vanilla's, a sample of text."""
    c = model.config
    cache, vanilla = model.kv_bytes_per_token(), 2 * c.n_layer * c.n_embd * 4
    print(f"{c.attention}: validation loss {last['val_loss']:.4f} nats a token, "
          f"{last['bits_per_byte']:.4f} bits a byte\n"
          f"KV cache: {cache:,} bytes a token in float32, {cache / vanilla:.0%} of vanilla's")
    try:
        tokenizer = get_tokenizer(tokenizer)
    except UserError as error:  # a run on a machine without network has succeeded all the same
        print(f"No sample of it: {error}")
        return
    prompt = torch.tensor([tokenizer.encode("\n")], device=model.lm_head.weight.device)
    ids = [int(token) for token in model.generate(prompt, 300, temperature=0.8, top_k=50, seed=1)]
    print(f"A sample of it (more: python sample.py --out_dir {out}):\n{'-' * 80}\n"
          f"{''.join(stream_text(tokenizer, ids))}")


def train(config: TrainConfig, show: bool = True, bar: tqdm | None = None) -> list[dict]:
    """Trains a model in config.out_dir and returns its history, the lines of log.jsonl: for each
    step its number, loss (nats a token), lr and seconds, after an evaluation also val_loss and
    bits_per_byte. show=False prints nothing; a bar, if given, moves on by 1 a step.

    The batch of a step depends on (seed, step) alone: variants with one seed see the same data in
    the same order, a resumed run goes on exactly, the number of processes changes nothing. Raises
    UserError, and SystemExit(128 + signal) after SIGINT or SIGTERM, when all is saved.
    """
    check(config)
    device = pick_device(config.device)
    out = run_folder(config)
    if (out / "ckpt.pt").exists() and not config.resume:
        raise UserError(f"{out} holds a run already: go on with it by --resume, choose another "
                        "--out_dir, or delete it")
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train_data, val_data, meta = load_data(config)
    if min(len(train_data), len(val_data)) <= config.block_size or config.batch_size < WORLD:
        raise UserError(f"--block_size {config.block_size} must be less than the "
                        f"{len(train_data)} and {len(val_data)} tokens of {config.dataset}, "
                        f"--batch_size {config.batch_size} not less than the {WORLD} processes")

    raw_model, model, optimizers, autocast = build(config, meta["vocab_size"], device)
    parameters = list(raw_model.parameters())
    lock = lock_folder(out) if RANK == 0 else open(os.devnull)
    try:
        history = restore(out, config, meta, raw_model, optimizers, device)
    except UserError:
        lock.close()
        raise
    first = len(history)

    def save(step):
        with replace_file(out / "ckpt.pt") as f:
            torch.save(dict(model=raw_model.state_dict(), step=step, config=asdict(config),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers],
                            model_config=asdict(raw_model.config), data_sha256=meta["sha256"],
                            tokenizer=meta["tokenizer"]), f)

    if WORLD > 1:
        model = DistributedDataParallel(model)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((WORLD * rate for name, rate in PEAK_FLOPS.items() if name in gpu), 0)
    flops, batch_shape = raw_model.flops_per_token(), (config.grad_accum, config.batch_size)
    if show and RANK == 0:
        print(f"{config.attention}: {raw_model.num_params():,} parameters on {device}, "
              f"{math.prod(batch_shape) * config.block_size:,} tokens a step, run in {out}")

    if RANK == 0:
        with replace_file(out / "log.jsonl") as f:
            f.writelines(json.dumps(record).encode() + b"\n" for record in history)
    log = open(out / "log.jsonl" if RANK == 0 else os.devnull, "a")
    again = "the same command" if bar else f"python train.py --resume --out_dir {out}"
    bar = nullcontext(bar) if bar else tqdm(
        total=config.max_steps, initial=first, unit="step",
        disable=None if show and RANK == 0 else True)  # None: only on a terminal
    with lock, log, bar as bar, caught_signals() as signals:
        for step in range(first, config.max_steps):
            start = time.perf_counter()
            rng = np.random.default_rng((config.seed, step))
            batches = rng.integers(0, len(train_data) - config.block_size, batch_shape)
            total = torch.zeros((), device=device)
            for i, batch in enumerate(batches):
                mine = batch[RANK::WORLD]
                share = len(mine) / batches.size  # of the step's sequences, however unequal
                late = WORLD > 1 and i < config.grad_accum - 1  # DDP need not exchange these yet
                with model.no_sync() if late else nullcontext():
                    with autocast:
                        _, loss = model(*windows(train_data, mine, config.block_size, device))
                    (loss * share * WORLD).backward()  # DDP divides the sum by WORLD
                total += loss.detach() * share
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            stop = torch.tensor(float(len(signals)), device=device)
            loss, stop = sum_over_processes(torch.stack((total, stop))).tolist()
            if not math.isfinite(loss + norm.item()):
                raise UserError(f"step {step + 1}: the loss is {loss}, the norm of its gradient "
                                f"{norm}: try a lower --lr; the last checkpoint is as it was")
            lr = learning_rate(config, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            seconds = time.perf_counter() - start

            record = dict(step=step + 1, loss=loss, lr=lr, seconds=seconds)
            rate = batches.size * config.block_size / seconds  # tokens a second
            used = f", {rate * flops / peak:.0%} of peak" if peak else ""
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s{used}", refresh=False)
            bar.update()
            if (step + 1) % config.eval_every == 0 or step + 1 == config.max_steps:
                with autocast:
                    val_loss = evaluate(model, val_data, config, device)
                record["val_loss"] = val_loss
                record["bits_per_byte"] = (
                    val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"])
                if show and RANK == 0:
                    bar.write(f"step {step + 1}: validation loss {val_loss:.4f} nats a token, "
                              f"{record['bits_per_byte']:.4f} bits a byte")
            history.append(record)
            print(json.dumps(record), file=log, flush=True)
            if ("val_loss" in record or stop) and RANK == 0:
                save(step + 1)
            if stop:
                if RANK == 0:
                    print(f"\nstopped after step {step + 1}, saved; to go on: {again}",
                          file=sys.stderr)
                raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    if WORLD > 1:
        dist.destroy_process_group()
    last = next((record for record in reversed(history) if "val_loss" in record), None)
    if show and RANK == 0 and last:
        report(raw_model, meta["tokenizer"], last, out)
    return history


if __name__ == "__main__":
    with one_line_errors():
        config, given = parse_flags(TrainConfig, __doc__)
        ckpt = run_folder(config) / "ckpt.pt"
        if config.resume and ckpt.exists():  # the flags that the run began with, then today's
            try:
                saved = TrainConfig(**load_checkpoint(ckpt)["config"])
                config = replace(saved, **{name: getattr(config, name) for name in given})
                check(config)
            except TypeError as error:
                raise UserError(f"{ckpt}: its config is broken: {error}") from None
        train(config)
