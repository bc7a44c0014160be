"""Train any of the systems, by default a small ResFormer on Python's own sources, on this machine.

    python train.py                                     in minutes, on a laptop's CPU
    python train.py --attention svformer --seed 2       any variant, or several: svformer+gqa
    python train.py --attention svformer --seed 2 --resume      the same, from where it stopped
    torchrun --standalone --nproc_per_node=2 train.py   one run on several processes or GPUs

A run lives in a folder named after its flags: ckpt.pt, and log.jsonl, a line a step for people.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  before a process group exists, see process_group
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, VARIANTS, GPTConfig
from prepare_data import (DataConfig, UserError, command, flag, get_tokenizer, load,
                          one_line_errors, parse_flags, prepare, replace_file, stream_text)

# The paper's sizes (its Table 4) and a small one; the SwiGLU is 3.5 times as wide as the model.
SIZES = {
    "small": dict(n_layer=8, n_head=4, n_embd=64),
    "2M": dict(n_layer=4, n_head=2, n_embd=16),
    "82M": dict(n_layer=8, n_head=8, n_embd=512),
    "180M": dict(n_layer=12, n_head=12, n_embd=768),
    "468M": dict(n_layer=24, n_head=16, n_embd=1024),
}

# Set by torchrun: which process this is, of how many.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class TrainConfig:
    attention: str = flag("resformer", f"{', '.join(VARIANTS)}, or several joined with +",
                          group="model")
    size: str = flag("small", "layers, heads and width of the model", choices=tuple(SIZES))
    n_layer: int | None = flag(None, "layers, instead of the size's", type=int)
    n_head: int | None = flag(None, "query heads, instead of the size's", type=int)
    n_kv_head: int | None = flag(None, "gqa: key/value heads (default: half of n_head)", type=int)
    n_embd: int | None = flag(None, "width, instead of the size's", type=int)
    n_ffn: int | None = flag(None, "hidden size of the SwiGLU (default: 3.5 x n_embd)", type=int)
    block_size: int = flag(128, "context, in tokens")
    value_residual: str = flag("fixed", "resformer: fixed keeps value_lambda; learnable trains two "
                               "weights a layer from there; plus trains a total of V_1 and how the "
                               "layers share it", choices=("fixed", "learnable", "plus"))
    value_lambda: tuple = flag((0.5, 0.5), "resformer: weights of V_1 and V_n", nargs=2,
                               type=float)
    residual_layers: tuple | None = flag(None, "resformer: layers that mix V_1 in, such as 6 7 8 "
                                         "(default: all after the first)", nargs="+", type=int)
    neutreno_lambda: float | None = flag(None, "neutreno: weight of V_1 - V_n (default: 0.4, or "
                                         "0.2 on top of resformer)", type=float)

    dataset: str = flag("stdlib", "what prepare_data.py wrote: a name under data/, or a path",
                        group="data")
    batch_size: int = flag(16, "sequences in a forward pass, over all processes")
    grad_accum: int = flag(1, "batches whose gradients make one step: it sees grad_accum x "
                           "batch_size sequences in the memory of batch_size")

    max_steps: int = flag(900, "steps of training", group="optimization")
    optimizer: str = flag("adamw", "adamw; or muon for the layers' matrices, adamw for the rest",
                          choices=("adamw", "muon"))
    lr: float = flag(4e-3, "highest learning rate")
    min_lr: float | None = flag(None, "last learning rate (default: a tenth of lr)", type=float)
    warmup_steps: int = flag(50, "steps in which the learning rate rises to lr")
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices; vectors have none")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: don't clip")
    seed: int = flag(1, "fixes the initial weights and the order of the data")

    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is",
                       group="machine")
    dtype: str = flag("auto", "of the products (mixed precision); auto is bfloat16 on CUDA, "
                      "float16 on cards without it, float32 elsewhere",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag("auto", "torch.compile: on or off; auto is on for CUDA where it works",
                        choices=("auto", "on", "off"))

    eval_every: int = flag(100, "steps between two evaluations; a checkpoint follows each",
                           group="evaluation and files")
    eval_tokens: int = flag(131072, "validation tokens in an evaluation, always the same ones")
    out_dir: str | None = flag(None, "the run's folder (default: out/ and the flags that make it "
                               "another run)", type=str)
    resume: bool = flag(False, "go on from the checkpoint in the run's folder, if there is one")
    overwrite: bool = flag(False, "start anew in a folder that holds a run, whose checkpoint is "
                           "replaced at the first evaluation")


# Flags that may differ when a run is resumed; all others make it another run.
FREE = ("max_steps", "device", "dtype", "compile", "eval_every", "eval_tokens", "out_dir",
        "resume", "overwrite")

AT_LEAST = dict(block_size=1, batch_size=1, grad_accum=1, max_steps=1, lr=0, min_lr=0,
                warmup_steps=0, weight_decay=0, grad_clip=0, seed=0, eval_every=1, eval_tokens=1)


def check(config: TrainConfig):
    """Raises UserError for flags that no run could have, before any work."""
    for name, low in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name} must be a finite number of at least {low}, not {value}")
    if config.seed >= 2**62:
        raise UserError(f"--seed must be less than 2^62, not {config.seed}")
    if config.batch_size % WORLD != 0:
        raise UserError(f"--batch_size {config.batch_size} must divide by the {WORLD} processes")
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch 2.9, this is {torch.__version__}")
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run, --overwrite deletes it: choose one")
    model_config(config, vocab_size=257)


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The shape of the model, from --size and the flags that change it."""
    # Matrix units like multiples of 64; GPT-2's 50,257 becomes 50,304 with ids that never occur.
    shape = dict(vocab_size=vocab_size if vocab_size < 1000 else math.ceil(vocab_size / 64) * 64)
    shape |= SIZES[config.size]
    for f in fields(GPTConfig):
        if f.name != "vocab_size" and getattr(config, f.name) is not None:
            shape[f.name] = getattr(config, f.name)
    try:
        return GPTConfig(**shape)
    except ValueError as error:
        raise UserError(f"--{error}") from None


# -------------------------------------------------------------------------------------------------
# Data, model, optimizers


def load_data(config: TrainConfig) -> tuple:
    """prepare_data.load's (train ids, val ids, meta); the default data is prepared if need be."""
    if config.dataset == "stdlib" and not Path("data/stdlib/meta.json").exists() and RANK == 0:
        prepare(DataConfig())
    if WORLD > 1:
        dist.barrier()
    train_data, val_data, meta = load(config.dataset)
    if min(len(train_data), len(val_data)) <= config.block_size:
        raise UserError(f"--block_size {config.block_size} must be less than the {len(train_data)} "
                        f"and {len(val_data)} tokens of {config.dataset}")
    return train_data, val_data, meta


def batch_starts(config: TrainConfig, step: int, n_tokens: int) -> np.ndarray:
    """Where the sequences of a step (0, 1, ...) start, (grad_accum, batch_size).

    They depend on the seed and the step alone: variants of one seed see the same data in the same
    order, a resumed run goes on exactly, and the number of processes changes nothing."""
    rng = np.random.default_rng((config.seed, step))
    return rng.integers(0, n_tokens - config.block_size, (config.grad_accum, config.batch_size))


def windows(data: np.ndarray, starts: np.ndarray, block_size: int, device) -> tuple:
    """Inputs and targets, each (len(starts), block_size) int64: the text from starts on."""
    ids = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    if device.type == "cuda":  # from pinned memory, so that the copy does not hold up the program
        ids = ids.pin_memory().to(device, non_blocking=True)
    else:
        ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


def make_model(config: TrainConfig, vocab_size: int, device: torch.device) -> GPT:
    torch.manual_seed(config.seed)
    return GPT(model_config(config, vocab_size)).to(device)


def compiled(model: GPT, config: TrainConfig, device: torch.device):
    """The model, compiled where --compile says so."""
    if config.compile == "off" or config.compile == "auto" and device.type != "cuda":
        return model
    torch.compiler.reset()  # after 8 models in one process it would compile no more
    try:  # a trial: Triton, a C compiler and a card of 7.0 or newer may be missing
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:
        why = str(error).splitlines()[0]
        if config.compile == "on":
            raise UserError(f"--compile on does not work here, use --compile off: {why}") from None
        print(f"training without torch.compile, which does not work here: {why}", file=sys.stderr)
        return model
    return torch.compile(model)


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with --optimizer muon, Muon for the layers' matrices and AdamW for the rest."""
    matrices, vectors, hidden = [], [], []
    for name, p in model.named_parameters():
        if p.dim() == 1:
            vectors.append(p)
        elif config.optimizer == "muon" and name.startswith("layers."):
            hidden.append(p)
        else:
            matrices.append(p)
    optimizers = [torch.optim.AdamW(
        [dict(params=matrices, weight_decay=config.weight_decay),
         dict(params=vectors, weight_decay=0.0)],
        lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if hidden:  # scaled so that AdamW's lr and weight_decay suit it too (arXiv 2502.16982)
        optimizers.append(torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up to lr, then half a cosine down to min_lr; step counts from 0."""
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@torch.no_grad()
def evaluate(model, data, config: TrainConfig, device) -> float:
    """Mean loss, in nats per token, over windows evenly spread over data: each time the same."""
    n = max(1, min(config.eval_tokens, len(data) - 1) // config.block_size)
    if n > config.batch_size:
        n -= n % config.batch_size  # batches of one shape, so that nothing compiles anew
    starts = np.linspace(0, len(data) - config.block_size - 1, n).astype(np.int64)
    total = 0.0
    for i in range(0, n, config.batch_size):
        mine = starts[i:i + config.batch_size][RANK::WORLD]
        if len(mine) > 0:
            _, loss = model(*windows(data, mine, config.block_size, device))
            total += loss * len(mine)
    [mean] = mean_over_processes(device, total * WORLD / n)  # x WORLD: a sum over processes
    if not math.isfinite(mean):
        raise UserError(f"the validation loss is {mean}: try a lower --lr; the last checkpoint is "
                        "as it was")
    return mean


def train(config: TrainConfig, signals=(), title: str = "", verbose: bool = True):
    """Trains a model in its folder; returns the model and its history, a dict for each step:
    step, loss (nats per token), lr and seconds, after an evaluation also val_loss, bits_per_byte.

    As soon as there is something in the list signals, the run is saved and returned as it is.
    title labels the progress; verbose=False prints nothing but that. Raises UserError."""
    check(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config, device)
    with process_group(device):
        train_data, val_data, meta = load_data(config)
        model = make_model(config, meta["vocab_size"], device)
        optimizers = make_optimizers(model, config)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        run = Run(config, meta, model, optimizers, scaler, title, verbose)
        with run.opened(device):
            fast_model = compiled(model, config, device)
            training_model = DistributedDataParallel(fast_model) if WORLD > 1 else fast_model
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            for step in range(len(run.history), config.max_steps):
                start = time.perf_counter()

                # The gradients of the whole batch, micro-batch by micro-batch.
                loss = torch.zeros((), device=device)
                for i, starts in enumerate(batch_starts(config, step, len(train_data)), start=1):
                    x, y = windows(train_data, starts[RANK::WORLD], config.block_size, device)
                    if WORLD > 1:  # the processes exchange gradients once, in the last pass
                        training_model.require_backward_grad_sync = i == config.grad_accum
                    with autocast:
                        _, micro_loss = training_model(x, y)
                    # Gradients add up over micro-batches, but the loss is a mean over all of them.
                    micro_loss = micro_loss / config.grad_accum
                    scaler.scale(micro_loss).backward()
                    loss += micro_loss.detach()

                # The update.
                loss, stop = mean_over_processes(device, loss, len(signals))
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(),
                                                      config.grad_clip or math.inf).item()
                overflow = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
                if not math.isfinite(loss + norm) and not overflow:
                    raise UserError(f"step {step + 1}: the loss is {loss}, its gradient's norm "
                                    f"{norm}: try a lower --lr; the last checkpoint is as it was")
                lr = learning_rate(config, step)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    if not overflow:  # float16 does now and then: that step is left out
                        optimizer.step()
                    optimizer.zero_grad()
                scaler.update()

                # The log; now and then, or when asked to stop, an evaluation and a checkpoint.
                record = dict(step=step + 1, loss=loss, lr=lr, seconds=time.perf_counter() - start)
                evaluated = (step + 1) % config.eval_every == 0 or step + 1 == config.max_steps
                if evaluated:
                    with autocast:
                        record["val_loss"] = evaluate(fast_model, val_data, config, device)
                    bits = record["val_loss"] / math.log(2)
                    record["bits_per_byte"] = bits * meta["val_tokens"] / meta["val_bytes"]
                run.history.append(record)
                if evaluated or stop:
                    run.save()
                run.log(record)
                if stop:
                    break
        del training_model  # see process_group
    return model, run.history


# -------------------------------------------------------------------------------------------------
# What the loop calls by name: devices, processes, signals, checkpoints, progress


def pick_device(name: str) -> torch.device:
    """The device of --device; auto takes the fastest there is. UserError if it can't be used."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: one GPU for each process
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # before anything else touches a GPU
            torch.set_float32_matmul_precision("high")  # TF32
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What --dtype means on this device."""
    if device.type == "mps" and config.dtype in ("bfloat16", "float16"):
        # torch's causal attention in bfloat16 on MPS lets a token see later ones.
        raise UserError(f"--dtype {config.dtype}: on MPS only float32 works")
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type != "cuda":
        return torch.float32
    # Cards before Ampere emulate bfloat16, slowly.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


@contextmanager
def process_group(device: torch.device):
    """Connects the processes that torchrun has started, if it has.

    Nothing may keep the group alive after this: its threads could wait for ever for an interpreter
    that waits for them, or abort the process at its exit. So torch.distributed.nn, whose functions
    take a group that exists as a default argument, is imported above, before there is one, and
    train() deletes its DistributedDataParallel before the end.
    """
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if WORLD > 1:
            dist.destroy_process_group()


def mean_over_processes(device: torch.device, *values) -> list[float]:
    """Each of the values, tensors or numbers, averaged over all processes."""
    means = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) / WORLD
                         for value in values])
    if WORLD > 1:
        dist.all_reduce(means)
    return means.tolist()


def catch_signals() -> list[int]:
    """From now on Ctrl-C and SIGTERM go into the list that is returned, so that train() can finish
    its step and save; a second one ends the process at once."""
    arrived = []

    def handler(number, frame):
        arrived.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return arrived


def run_folder(config: TrainConfig) -> Path:
    """--out_dir, or out/<attention> followed by the flags that make it another run."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    name = config.attention
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        if value != f.default and f.name not in FREE + ("attention",):
            words = value if isinstance(value, tuple) else (value,)
            words = [f"{word:g}" if isinstance(word, float) else str(word) for word in words]
            # Of a data set's path only the last part can be a part of a folder's name.
            name += "-" + "_".join([f.name, *(Path(word).name for word in words)])
    return Path("out", name)


def load_checkpoint(path: Path, device="cpu") -> dict:
    """What Run.save wrote. Tensors and plain values only: a stranger's file can't run code."""
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} isn't there: train first, or give the run's --out_dir") from None
    except Exception as error:  # torch.load raises many kinds for broken and foreign files
        raise UserError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from None
    keys = {"model", "model_config", "tokenizer", "optimizers", "scaler", "history", "config",
            "data_sha256"}
    if not isinstance(ckpt, dict) or set(ckpt) != keys:
        raise UserError(f"{path} is not a checkpoint of train.py")
    return ckpt


class Run:
    """The folder of a run, its checkpoint and log, and the progress that a person sees."""

    def __init__(self, config, meta, model, optimizers, scaler, title, verbose):
        self.config, self.meta = config, meta
        self.model, self.optimizers, self.scaler = model, optimizers, scaler
        self.title, self.verbose = title, verbose
        self.folder = run_folder(config)
        self.tokens = config.grad_accum * config.batch_size * config.block_size  # in a step
        self.history = []

    @contextmanager
    def opened(self, device):
        """Keeps other processes out of the folder, goes on from its checkpoint if --resume says so,
        and shows progress until the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a") as lock:
            if RANK == 0:
                lock_file(lock, self.folder)
            self.restore(device)
            check_agreement(len(self.history), self.meta["sha256"])
            if RANK == 0:
                with replace_file(self.folder / "log.jsonl") as f:
                    f.writelines(json.dumps(r).encode() + b"\n" for r in self.history)
            self.began = self.last_line = time.monotonic()
            hidden = None if RANK == 0 else True  # None: shown on a terminal only
            self.bar = tqdm(total=self.config.max_steps, initial=len(self.history), unit="step",
                            desc=self.title or None, disable=hidden)
            with self.bar:
                self.first = len(self.history)
                if self.first == self.config.max_steps:
                    self.say(f"{self.folder} is complete: {self.first} steps")
                else:
                    self.say(f"{self.config.attention}: {self.model.num_params():,} parameters on "
                             f"{device}, {self.tokens:,} tokens a step, run in {self.folder}")
                yield

    def restore(self, device):
        """Loads the checkpoint in the folder, if there is one. UserError without --resume, if it is
        another run's, or if it is broken."""
        path = self.folder / "ckpt.pt"
        if not path.exists():
            return
        if self.config.overwrite:
            return  # the first save replaces it
        if not self.config.resume:
            raise UserError(f"{self.folder} holds a run: --resume goes on with it, --overwrite "
                            "starts anew")
        ckpt = load_checkpoint(path, device)
        try:
            self.check_same_run(ckpt)
            self.model.load_state_dict(ckpt["model"])
            for optimizer, state in zip(self.optimizers, ckpt["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if ckpt["scaler"]:  # empty unless the run was in float16
                self.scaler.load_state_dict(ckpt["scaler"])
            self.history = list(ckpt["history"])
            before = TrainConfig(**ckpt["config"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path} can't be resumed, it is broken: {error!r:.200}") from None
        n, max_steps = len(self.history), self.config.max_steps
        if n > max_steps:
            raise UserError(f"--max_steps {max_steps}: the run in {self.folder} has {n} steps")
        if RANK == 0 and n < max_steps and max_steps != before.max_steps:
            rates = [learning_rate(c, n) for c in (before, self.config)]
            print(f"--max_steps {before.max_steps} -> {max_steps} moves the end of the "
                  f"cosine: the learning rate of step {n + 1} goes from {rates[0]:.2e} to "
                  f"{rates[1]:.2e}")

    def check_same_run(self, ckpt):
        """UserError if the flags that make another run aren't those that the run began with. The
        model's are compared as a shape: --size small is --n_layer 8 --n_head 4 --n_embd 64."""
        if ckpt["data_sha256"] != self.meta["sha256"]:
            raise UserError(f"--dataset {self.config.dataset} is not what the run in {self.folder} "
                            "has read")
        now, then = asdict(self.config), dict(ckpt["config"])
        for name in ("size", "dataset", *FREE):
            del now[name]
        now |= asdict(self.model.config)
        then |= ckpt["model_config"]
        for name, value in now.items():
            if value != then[name]:
                raise UserError(f"--{name} is {value}, but the run in {self.folder} has "
                                f"{then[name]}")

    def save(self):
        if RANK > 0:
            return
        with replace_file(self.folder / "ckpt.pt") as f:
            torch.save(dict(model=self.model.state_dict(), model_config=asdict(self.model.config),
                            optimizers=[o.state_dict() for o in self.optimizers],
                            scaler=self.scaler.state_dict(), history=self.history,
                            config=asdict(self.config), data_sha256=self.meta["sha256"],
                            tokenizer=self.meta["tokenizer"]), f)

    def log(self, record: dict):
        """Puts a step into log.jsonl and on the screen: as a bar on a terminal, elsewhere (a batch
        queue, a notebook, nohup) as a line every 30 seconds."""
        if RANK > 0:
            return
        with open(self.folder / "log.jsonl", "a") as f:
            print(json.dumps(record), file=f)
        c, step, now = self.config, record["step"], time.monotonic()
        text = f"loss {record['loss']:.3f}, {self.tokens / record['seconds']:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and now - self.last_line >= 30:
            self.last_line = now
            left = (now - self.began) / (step - self.first) * (c.max_steps - step)
            label = f"{self.title}: " if self.title else ""
            print(f"{label}step {step} of {c.max_steps}, {text}, {left / 60:.1f} minutes left",
                  file=sys.stderr, flush=True)
        if "val_loss" in record:
            self.say(f"step {step}: validation loss {record['val_loss']:.4f} nats per token, "
                     f"{record['bits_per_byte']:.4f} bits per byte")

    def say(self, text: str):
        if self.verbose and RANK == 0:
            self.bar.write(text)
            sys.stdout.flush()


def lock_file(lock, folder: Path):
    """Locks an open file until it closes. UserError if another process has it."""
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait for it, or choose another "
                        "--out_dir") from None
    except (ImportError, OSError):
        pass  # Windows and some network drives have no such locks


def check_agreement(step: int, sha256: str):
    """UserError if the processes don't start from the same step and data."""
    if WORLD > 1:
        states = [None] * WORLD
        dist.all_gather_object(states, (step, sha256))
        if len(set(states)) > 1:
            raise UserError("the processes start from different steps or data: all of them must "
                            "see the same --out_dir and --dataset")


def report(config: TrainConfig, model: GPT, history: list[dict]):
    """Prints the result of a run: its loss, its KV cache next to vanilla's, a sample of text."""
    c = model.config
    last = history[-1]
    if "val_loss" not in last:  # stopped here by a signal, then completed by a smaller --max_steps
        print(f"{c.attention}: not evaluated after step {last['step']}")
        return
    cache, vanilla = model.kv_bytes_per_token(), 2 * c.n_layer * c.n_embd * 4
    print(f"{c.attention}: validation loss {last['val_loss']:.4f} nats per token, "
          f"{last['bits_per_byte']:.4f} bits per byte\n"
          f"KV cache: {cache:,} bytes per token in float32, {cache / vanilla:.0%} of vanilla's")
    more = command("python", "sample.py", "--out_dir", run_folder(config))
    try:
        tokenizer = get_tokenizer(load(config.dataset)[2]["tokenizer"])
    except UserError as error:  # a run on a machine without network has succeeded all the same
        print(f"No sample of its text: {error}")
        return
    prompt = torch.tensor([tokenizer.encode("\n")], device=model.lm_head.weight.device)
    ids = [int(token) for token in model.generate(prompt, 300, temperature=0.8, top_k=50, seed=1)]
    print(f"A sample of its text (more: {more}):\n{'-' * 80}\n"
          f"{''.join(stream_text(tokenizer, ids))}")


def main():
    config, _ = parse_flags(TrainConfig, __doc__)
    signals = catch_signals()
    model, history = train(config, signals)
    if signals or len(history) < config.max_steps:
        if RANK == 0:
            words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
            start = ["python"] if WORLD == 1 else ["torchrun", "--standalone",
                                                   f"--nproc_per_node={WORLD}"]
            print(f"\nstopped after step {len(history)}, saved; to go on: "
                  f"{command(*start, *words, '--resume')}", file=sys.stderr)
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    if RANK == 0:
        report(config, model, history)


if __name__ == "__main__":
    with one_line_errors():
        main()
