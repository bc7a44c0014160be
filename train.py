"""Train any of the systems, by default a small ResFormer on Python's own sources, on this machine.

    python train.py                                     in minutes, on a laptop's CPU
    python train.py --attention svformer --seed 2       any variant, or several: svformer+gqa
    python train.py --attention svformer --seed 2 --resume      the same, from where it stopped
    torchrun --standalone --nproc_per_node=2 train.py   one run on several processes or GPUs

A run lives in a folder named after its flags: ckpt.pt, and log.jsonl, one readable line a step.
A stopped run goes on from its last evaluation; with the same flags, on a CPU, to the same bits.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import GPT, VARIANTS, GPTConfig, mixes_v1
from prepare_data import (DataConfig, UserError, check_values, flag, get_tokenizer, load,
                          one_line_errors, parse_flags, prepare, replace_file)

# Which process this is, of how many, if torchrun has started it.
RANK, WORLD = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass
class TrainConfig:
    attention: str = flag("resformer", f"{', '.join(VARIANTS)}, or several joined with +",
                          group="model")
    n_layer: int = flag(GPTConfig.n_layer, "layers", at_least=1)
    n_head: int = flag(GPTConfig.n_head, "query heads", at_least=1)
    n_kv_head: int | None = flag(None, "gqa: key/value heads (n_head / 2)", type=int, at_least=1)
    n_embd: int = flag(GPTConfig.n_embd, "width", at_least=1)
    n_ffn: int | None = flag(None, "SwiGLU's hidden size (3.5 x n_embd)", type=int, at_least=1)
    block_size: int = flag(GPTConfig.block_size, "context, in tokens", at_least=1)
    value_residual: str = flag("fixed", "resformer: how V_1 and V_n are weighted",
                               choices=("fixed", "learnable", "plus"))
    value_lambda: tuple = flag((0.5, 0.5), "resformer: weights of V_1, V_n", nargs=2, type=float)
    residual_layers: tuple | None = flag(None, "resformer: layers that mix V_1 in (2 and above)",
                                         nargs="+", type=int)
    neutreno_lambda: float | None = flag(None, "neutreno: weight of V_1 - V_n (0.4, with resformer "
                                         "0.2)", type=float)
    init: str = flag("scaled", "initial weights: to each matrix's scale, or the paper's N(0, 0.02)",
                     choices=("scaled", "paper"))

    dataset: str = flag("stdlib", "what prepare_data.py wrote: a name under data/, or a path",
                        group="data")
    batch_size: int = flag(16, "sequences in a forward pass, over all processes", at_least=1)
    grad_accum: int = flag(1, "forward passes whose gradients make one step", at_least=1)

    max_steps: int = flag(900, "steps of training", group="optimization", at_least=1)
    lr: float = flag(8e-3, "highest learning rate", at_least=0)
    min_lr: float | None = flag(None, "last learning rate (lr / 10)", type=float, at_least=0)
    warmup_steps: int = flag(50, "steps in which the learning rate rises to lr", at_least=0)
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices", at_least=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: don't clip", at_least=0)
    seed: int = flag(1, "fixes the initial weights and the order of the data", at_least=0)

    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is",
                       group="machine")
    dtype: str = flag("auto", "of products; auto: 16 bits on CUDA, else float32",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag("auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"))

    eval_every: int = flag(100, "steps between two evaluations; a checkpoint follows each",
                           group="evaluation and files", at_least=1)
    eval_tokens: int = flag(131072, "validation tokens in an evaluation", at_least=1)
    out_dir: str | None = flag(None, "the run's folder (out/, named after the flags)", type=str)
    resume: bool = flag(False, "go on from the checkpoint in the run's folder, if there is one")
    overwrite: bool = flag(False, "start anew in a folder that holds a run, which is deleted")


# Flags of the machine and the folder; these and FREE may differ when a run is resumed. Another
# max_steps changes the learning rates that are left.
PLACE = ("device", "dtype", "compile", "out_dir", "resume", "overwrite")
FREE = ("max_steps", "eval_every", "eval_tokens")


def check(config: TrainConfig):
    """Raises UserError for flags that no run could have, before any work."""
    check_values(config)
    if config.batch_size % WORLD != 0:
        raise UserError(f"--batch_size {config.batch_size} must divide by the {WORLD} processes")
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run, --overwrite starts anew: choose one")
    model_config(config)


def model_config(config: TrainConfig, vocab_size: int = 257) -> GPTConfig:
    """The model of a run: each field of GPTConfig that is also a flag."""
    # Matrix units like multiples of 64; GPT-2's 50,257 becomes 50,304 with ids that never occur.
    size = vocab_size if vocab_size < 1000 else math.ceil(vocab_size / 64) * 64
    flags = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    try:
        return GPTConfig(vocab_size=size, **flags)
    except ValueError as error:
        raise UserError(f"--{error}") from None


# -------------------------------------------------------------------------------------------------
# The training loop


def train(config: TrainConfig, verbose: bool = True):
    """Trains a model in its folder; returns the model and its history, a dict for each step:
    step, loss (nats per token), lr and seconds, after an evaluation also val_loss, bits_per_byte.

    ckpt.pt and log.jsonl are replaced after each evaluation. verbose=False prints nothing but the
    progress. Raises UserError, also when a loss is not finite: then only the log is written."""
    check(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config, device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train_data, val_data, meta = load_data(config)
    torch.manual_seed(config.seed)
    model = GPT(model_config(config, meta["vocab_size"])).to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    history = restore(config, meta, model, optimizer, scaler)
    begin(config, history)
    if compiles(config, device):
        torch.compiler.reset()  # after 8 models in one process it would compile no more
        model.compile()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step_tokens = config.grad_accum * config.batch_size * config.block_size
    bar = tqdm(range(len(history), config.max_steps), initial=len(history), total=config.max_steps,
               disable=RANK > 0, unit="step", mininterval=0.1 if sys.stderr.isatty() else 30)
    verbose = verbose and RANK == 0
    if verbose:
        bar.write(f"{config.attention}: {model.num_params():,} parameters on {device}, "
                  f"{step_tokens:,} tokens a step, run in {run_folder(config)}")
    if verbose and config.resume and not history:
        bar.write("--resume: the folder holds no checkpoint yet, so this starts at step 1")
    for step in bar:
        start = time.perf_counter()

        # The gradients of the whole batch, micro-batch by micro-batch.
        loss = torch.zeros((), device=device)
        for starts in batch_starts(config, step, len(train_data)):
            x, y = windows(train_data, starts[RANK::WORLD], config.block_size, device)
            with autocast:
                _, micro_loss = model(x, y)
            # The loss is a mean over micro-batches and processes; the gradients of all add up.
            micro_loss = micro_loss / (config.grad_accum * WORLD)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        sum_over_processes([loss, *(p.grad for p in model.parameters())])

        # The update. The scaler leaves out gradients that overflow in float16, and scales less.
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # The log; now and then an evaluation and a checkpoint.
        record = dict(step=step + 1, loss=loss.item(), lr=lr, seconds=time.perf_counter() - start)
        history.append(record)
        bar.set_postfix_str(f"loss {record['loss']:.3f}, "
                            f"{step_tokens / record['seconds']:,.0f} tokens/s", refresh=False)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.max_steps:
            with autocast:
                val_loss = evaluate(model, val_data, config, device)
            bits = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
            record |= dict(val_loss=val_loss, bits_per_byte=bits)
            if verbose:
                bar.write(f"step {step + 1}: validation loss {val_loss:.4f} nats per token, "
                          f"{bits:.4f} bits per byte")
        check_finite(config, history)
        if "val_loss" in record:
            save(config, meta, model, optimizer, scaler, history)
    return model, history


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


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, whose weight decay is for matrices only. The loop sets the learning rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=config.weight_decay),
                              dict(params=vectors, weight_decay=0.0)],
                             betas=(0.9, 0.95), eps=1e-8, fused=True)


def last_rate(config: TrainConfig) -> float:
    return config.lr / 10 if config.min_lr is None else config.min_lr


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up to lr, then half a cosine down to min_lr; step counts from 0."""
    low, high = last_rate(config), config.lr
    if step < config.warmup_steps:
        return high * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@torch.no_grad()
def evaluate(model, data, config: TrainConfig, device) -> float:
    """Mean loss, in nats per token, over windows evenly spread over data: each time the same, for
    the same eval_tokens, block_size and batch_size."""
    n = max(1, min(config.eval_tokens, len(data) - 1) // config.block_size)
    if n > config.batch_size:
        n -= n % config.batch_size  # batches of one shape, so that nothing compiles anew
    starts = np.linspace(0, len(data) - config.block_size - 1, n).astype(np.int64)
    total = torch.zeros((), device=device)
    for i in range(0, n, config.batch_size):
        mine = starts[i:i + config.batch_size][RANK::WORLD]
        if len(mine) > 0:
            _, loss = model(*windows(data, mine, config.block_size, device))
            total += loss * len(mine)
    sum_over_processes([total])
    return total.item() / n


# -------------------------------------------------------------------------------------------------
# Devices, processes


def pick_device(name: str) -> torch.device:
    """The device of --device; auto takes the fastest there is. UserError if it can't be used."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None else accelerator.type
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: one GPU for each process
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What --dtype means on this device."""
    if device.type == "mps" and config.dtype in ("bfloat16", "float16"):
        # There torch's causal attention in 16 bits lets a token see later ones.
        raise UserError(f"--dtype {config.dtype}: on MPS only float32 works")
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type != "cuda":
        return torch.float32
    # Cards before Ampere emulate bfloat16, slowly.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """What --compile means on this device."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def sum_over_processes(tensors: list[torch.Tensor]):
    """Replaces each tensor by its sum over all processes."""
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


# -------------------------------------------------------------------------------------------------
# The run's folder: checkpoint and log


def run_folder(config: TrainConfig) -> Path:
    """--out_dir, or out/<attention> followed by the flags that make it another run."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    name = config.attention
    # A step is the same, in however many forward passes it is made.
    flags = asdict(config) | dict(batch_size=config.batch_size * config.grad_accum)
    for f in fields(TrainConfig):
        value = flags[f.name]
        if value != f.default and f.name not in (*PLACE, *FREE, "attention", "grad_accum"):
            words = value if isinstance(value, tuple) else (value,)
            words = [f"{word:g}" if isinstance(word, float) else str(word) for word in words]
            # Of a data set's path only the last part can be a part of a folder's name.
            name += "-" + "_".join([f.name, *(Path(word).name for word in words)])
    return Path("out", name)


def load_checkpoint(path: Path) -> dict:
    """What `save` wrote, on the CPU. Tensors and plain values only: a stranger's file can't run
    code."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} isn't there: train first, or give the run's --out_dir") from None
    except Exception as error:  # torch.load raises many kinds for broken and foreign files
        raise UserError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from None
    if not isinstance(ckpt, dict) or "model_config" not in ckpt:
        raise UserError(f"{path} is not a checkpoint of train.py")
    return ckpt


def load_run(folder: Path):
    """The model of a run, in float32 on the CPU, and its tokenizer. UserError if there is none."""
    ckpt = load_checkpoint(folder / "ckpt.pt")
    model = GPT(GPTConfig(**ckpt["model_config"]))
    model.load_state_dict(ckpt["model"])
    return model, get_tokenizer(ckpt["tokenizer"])


def begin(config: TrainConfig, history: list[dict]):
    """Makes the run's folder, and a log of the steps so far. If there are none, the checkpoint that
    --overwrite gives up is deleted."""
    if RANK == 0:
        if not history:
            (run_folder(config) / "ckpt.pt").unlink(missing_ok=True)
        (run_folder(config) / "log.jsonl").unlink(missing_ok=True)
        write_log(config, history)


def write_log(config: TrainConfig, history: list[dict]):
    """Replaces the run's log. If the new one does not start with the old one's lines, the old one
    is another run's, and that is a UserError."""
    path = run_folder(config) / "log.jsonl"
    log = "".join(json.dumps(record) + "\n" for record in history)
    if path.exists() and not log.startswith(path.read_text()):
        raise UserError(f"{path} is of another run that writes into this folder, and is kept: give "
                        "each run an --out_dir of its own")
    with replace_file(path) as f:
        f.write(log.encode())


def check_finite(config: TrainConfig, history: list[dict]):
    """UserError if the last step's loss is not finite. The log then tells how it came to that."""
    last = history[-1]
    if not math.isfinite(last["loss"] + last.get("val_loss", 0.0)):
        if RANK == 0:
            write_log(config, history)
        raise UserError(f"step {last['step']}: the loss is not finite: try a lower --lr; a "
                        "checkpoint, if there is one, is as it was")


def save(config: TrainConfig, meta, model, optimizer, scaler, history):
    """Replaces the run's log and checkpoint, each as a whole."""
    if RANK > 0:
        return
    write_log(config, history)
    with replace_file(run_folder(config) / "ckpt.pt") as f:
        torch.save(dict(model=model.state_dict(),
                        model_config=asdict(model.config),
                        tokenizer=meta["tokenizer"],
                        optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict(),  # empty unless the run is in float16
                        history=history,  # its length is the step to go on with
                        config=asdict(config),
                        data_sha256=meta["sha256"]), f)


def identity(config: TrainConfig) -> dict:
    """What a resumed run must share, whichever way it was said: defaults are worked out, and a
    step's sequences are those of all its forward passes."""
    c = model_config(config)
    flags = {f.name: getattr(config, f.name) for f in fields(TrainConfig)
             if f.name not in (*PLACE, *FREE, "dataset", "batch_size", "grad_accum")}
    flags["batch_size times --grad_accum"] = config.batch_size * config.grad_accum
    return flags | dict(min_lr=last_rate(config), n_kv_head=c.kv_heads, n_ffn=c.ffn_size,
                        neutreno_lambda=c.neutreno_weight,
                        residual_layers=[n for n in range(1, c.n_layer + 1) if mixes_v1(c, n)])


def restore(config: TrainConfig, meta, model, optimizer, scaler) -> list[dict]:
    """Loads the run's checkpoint, if there is one, and returns its history. UserError without
    --resume, or if it is another run's. A flag that is newer than the run has its default there.
    All processes read it: several machines need a disk that all of them see."""
    folder = run_folder(config)
    if config.overwrite or not (folder / "ckpt.pt").exists():
        return []
    if not config.resume:
        raise UserError(f"{folder} holds a run: --resume goes on with it, --overwrite deletes it, "
                        "--out_dir takes another folder")
    ckpt = load_checkpoint(folder / "ckpt.pt")
    if ckpt["data_sha256"] != meta["sha256"]:
        raise UserError(f"--dataset {config.dataset} is not what the run in {folder} has read")
    known = {f.name for f in fields(TrainConfig)} & ckpt["config"].keys()
    then = identity(TrainConfig(**{name: ckpt["config"][name] for name in known}))
    for name, value in identity(config).items():
        if value != then[name]:
            raise UserError(f"--{name} is {value}, but the run in {folder} has {then[name]}")
    if len(ckpt["history"]) > config.max_steps:
        raise UserError(f"--max_steps {config.max_steps}: the run in {folder} has "
                        f"{len(ckpt['history'])} steps")
    model.load_state_dict(ckpt["model"])
    optimizer.load_state_dict(ckpt["optimizer"])
    if ckpt["scaler"]:
        scaler.load_state_dict(ckpt["scaler"])
    return ckpt["history"]


def report(config: TrainConfig, model: GPT, history: list[dict]):
    """Prints the result of a run: its loss, and its KV cache next to vanilla's."""
    c, last = model.config, history[-1]
    cache, vanilla = model.kv_bytes_per_token(), 2 * c.n_layer * c.n_embd * 4
    print(f"{c.attention}: validation loss {last['val_loss']:.4f} nats per token, "
          f"{last['bits_per_byte']:.4f} bits per byte\n"
          f"KV cache: {cache:,} bytes per token in float32, {cache / vanilla:.0%} of vanilla's\n"
          f'Its text: python sample.py --out_dir "{run_folder(config)}"')


if __name__ == "__main__":
    with one_line_errors("stopped; --resume, not --overwrite, goes on from the last evaluation"):
        config, _ = parse_flags(TrainConfig, __doc__)
        try:
            model, history = train(config)
        finally:
            if WORLD > 1 and dist.is_initialized():
                dist.destroy_process_group()
        if RANK == 0:
            report(config, model, history)
