"""Text out of a checkpoint, as it is made.

    python sample.py --prompt "def " --num_samples 3
    python sample.py --out_dir out/svformer --prompt FILE:story.txt
    echo "import os" | python sample.py --prompt -
    python sample.py --no_cache               reads all text again for every token, to compare
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig, KVCache
from prepare_data import (UserError, flag, get_tokenizer, load_checkpoint, one_line_errors,
                          parse_flags, pick_device, stream_text)


@dataclass
class SampleConfig:
    out_dir: str = flag("out/resformer", "the folder of the run")
    prompt: str = flag("\n", "what the text starts with; FILE:path reads a file, - standard input")
    num_samples: int = flag(1, "how many texts")
    max_new_tokens: int = flag(400, "tokens to make for each")
    temperature: float = flag(0.8, "0 takes the likeliest token; higher is more varied")
    top_k: int = flag(200, "draw from this many of the likeliest tokens")
    seed: int = flag(1, "fixes the texts")
    no_cache: bool = flag(False, "work without the KV cache")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    dtype: str = flag("float32", "of weights and cache", choices=("float32", "bfloat16"))


def read_prompt(prompt: str) -> str:
    try:
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
        return sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError:
        raise UserError(f"--prompt {prompt} is not UTF-8 text") from None


def load_model(path: Path, device, dtype) -> tuple[GPT, str]:
    """The model of a checkpoint, and the name of its tokenizer."""
    ckpt = load_checkpoint(path, device)
    try:
        c, tensors = GPTConfig(**ckpt["model_config"]), ckpt["model"].values()
        # Before a model is built: are there as many numbers in the file as this one has at least?
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors}
        if sum(held.values()) < c.n_embd * (2 * c.vocab_size + c.n_layer * 3 * c.n_ffn):
            raise ValueError("it is larger than the file")
        model = GPT(c)
        model.load_state_dict(ckpt["model"])
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} doesn't hold the model that its config describes: "
                        f"{str(error).splitlines()[0]}") from None
    return model.to(device, dtype), ckpt["tokenizer"]


def main():
    config, _ = parse_flags(SampleConfig, __doc__)
    if min(config.num_samples, config.max_new_tokens) < 1:
        raise UserError("--num_samples and --max_new_tokens must be at least 1")
    if not 0 <= config.seed < 2**62:
        raise UserError(f"--seed must be at least 0 and less than 2^62, not {config.seed}")
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    model, tokenizer = load_model(Path(config.out_dir, "ckpt.pt"), device, dtype)
    tokenizer = get_tokenizer(tokenizer)
    ids = tokenizer.encode(read_prompt(config.prompt), disallowed_special=())
    if not ids:
        raise UserError("--prompt has no text")
    idx = torch.tensor([ids], device=device)
    longest = min(model.config.block_size, len(ids) + config.max_new_tokens)
    cache = not config.no_cache and KVCache(model.config, 1, longest, device, dtype)

    start = time.perf_counter()
    for i in range(config.num_samples):
        tokens = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k,
                                seed=config.seed + i, cache=cache)
        print(tokenizer.decode(ids), end="")
        try:
            for text in stream_text(tokenizer, (int(token) for token in tokens)):
                print(text, end="", flush=True)
        except ValueError as error:  # generate's, which begins with the argument's name
            raise UserError(f"--{error}") from None
        print("\n" + "-" * 80)
    rate = config.num_samples * config.max_new_tokens / (time.perf_counter() - start)
    held = f"a KV cache of {cache.nbytes:,} bytes" if cache else "no KV cache"
    print(f"{rate:,.0f} tokens/s with {held}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
