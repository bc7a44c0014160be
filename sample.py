"""Text out of a checkpoint, as it is made.

    python sample.py --prompt "def " --num_samples 3
    python sample.py --out_dir out/svformer --prompt FILE:story.txt
    echo "import os" | python sample.py --prompt -
    python sample.py --no_cache               reads all text again for every token, to compare
"""

import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig
from prepare_data import (UserError, flag, get_tokenizer, one_line_errors, parse_flags,
                          stream_text)
from train import load_checkpoint, pick_device, pick_dtype


@dataclass
class SampleConfig:
    out_dir: str = flag("out/resformer", "the folder of the run", group="model")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    dtype: str = flag("float32", "of weights and cache", choices=("float32", "bfloat16"))
    no_cache: bool = flag(False, "work without the KV cache")
    prompt: str = flag("\n", "what the text starts with; FILE:path reads a file, - standard input",
                       group="text")
    num_samples: int = flag(1, "how many texts")
    max_new_tokens: int = flag(400, "tokens to make for each")
    temperature: float = flag(0.8, "0 takes the likeliest token; higher is more varied")
    top_k: int = flag(200, "draw from this many of the likeliest tokens")
    seed: int = flag(1, "fixes the texts")


def read_prompt(prompt: str) -> str:
    try:
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
        if prompt == "-":  # UTF-8, whatever the locale says
            return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
        return prompt
    except UnicodeDecodeError:
        raise UserError(f"--prompt {prompt} is not UTF-8 text") from None


def load_model(path: Path, device, dtype) -> tuple:
    """The model of a checkpoint, and its tokenizer. UserError if it is broken."""
    ckpt = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**ckpt["model_config"]))
        model.load_state_dict(ckpt["model"])
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} doesn't hold the model of its config: {error}") from None
    return model.to(device, dtype), get_tokenizer(ckpt["tokenizer"])


def main():
    config, _ = parse_flags(SampleConfig, __doc__)
    if config.num_samples < 1:
        raise UserError(f"--num_samples must be at least 1, not {config.num_samples}")
    device = pick_device(config.device)
    dtype = pick_dtype(config, device)
    model, tokenizer = load_model(Path(config.out_dir, "ckpt.pt"), device, dtype)
    ids = tokenizer.encode(read_prompt(config.prompt), disallowed_special=())
    if not ids:
        raise UserError("--prompt has no text")
    idx = torch.tensor([ids], device=device)  # (1, T)

    start = time.perf_counter()
    for i in range(config.num_samples):
        try:
            tokens = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k,
                                    config.seed + i, use_cache=not config.no_cache)
        except ValueError as error:  # begins with the argument's name
            raise UserError(f"--{error}") from None
        print(tokenizer.decode(ids), end="")
        for text in stream_text(tokenizer, map(int, tokens)):
            print(text, end="", flush=True)
        print("\n" + "-" * 80)
    rate = config.num_samples * config.max_new_tokens / (time.perf_counter() - start)
    cache = f"{model.kv_bytes_per_token(dtype):,} bytes of KV cache per token"
    print(f"{rate:,.0f} tokens/s, {'no KV cache' if config.no_cache else cache}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
