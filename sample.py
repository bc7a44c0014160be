"""Text out of a checkpoint, as it is made.

    python sample.py --prompt "def " --num_samples 3
    python sample.py --out_dir out/svformer --prompt FILE:story.txt
    python sample.py --no_cache               the same text but for rounding, slowly
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prepare_data import UserError, flag, one_line_errors, parse_flags, stream_text
from train import load_run, pick_device, pick_dtype


@dataclass
class SampleConfig:
    out_dir: str = flag("out/resformer", "the folder of the run", group="model")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the fastest there is")
    dtype: str = flag("float32", "of weights and cache", choices=("float32", "bfloat16"))
    no_cache: bool = flag(False, "work without the KV cache")
    prompt: str = flag("\n", "what the text starts with; FILE:path reads a file", group="text")
    num_samples: int = flag(1, "how many texts", at_least=1)
    max_new_tokens: int = flag(400, "tokens to make for each", at_least=1)
    temperature: float = flag(0.8, "0 takes the likeliest token; higher is more varied", at_least=0)
    top_k: int = flag(200, "draw from this many of the likeliest tokens", at_least=1)
    seed: int = flag(1, "fixes the texts", at_least=0)


def main():
    config, _ = parse_flags(SampleConfig, __doc__)
    device = pick_device(config.device)
    dtype = pick_dtype(config, device)
    model, tokenizer = load_run(Path(config.out_dir))
    model.to(device, dtype)
    prompt = config.prompt
    if prompt.startswith("FILE:"):
        prompt = Path(prompt.removeprefix("FILE:")).read_bytes().decode("utf-8", errors="replace")
    ids = tokenizer.encode(prompt, disallowed_special=())
    if not ids:
        raise UserError("--prompt has no text in it")
    window = model.config.block_size
    if len(ids) > window:
        print(f"the prompt has {len(ids)} tokens: the model reads the last {(window + 1) // 2}",
              file=sys.stderr)
    idx = torch.tensor([ids], device=device)  # (1, T)

    start = time.perf_counter()
    for i in range(config.num_samples):
        stream = np.random.SeedSequence((config.seed, i))  # no two texts of any two seeds share it
        tokens = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k,
                                stream.generate_state(1).item(), use_cache=not config.no_cache)
        print(prompt, end="")
        for text in stream_text(tokenizer, map(int, tokens)):
            print(text, end="", flush=True)
        print("\n" + "-" * 80)
    rate = config.num_samples * config.max_new_tokens / (time.perf_counter() - start)
    cache = f"{model.kv_bytes_per_token(dtype):,} bytes of KV cache per token"
    print(f"{rate:,.0f} tokens/s, {'no KV cache' if config.no_cache else cache}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
