"""Text in, token ids out.

    python prepare_data.py                        Python's standard library, from this machine
    python prepare_data.py shakespeare            tiny Shakespeare, a download of 1.1 MB
    python prepare_data.py fineweb --shards 10    FineWeb in GPT-2's tokens, 0.2 GB a shard
    python prepare_data.py PATH                   a text file, or a folder of them

writes data/<name>/train.bin and val.bin, token ids as uint16 and nothing else, and meta.json: the
tokenizer, its vocabulary, tokens and bytes of text, where the text is from, the ids' SHA-256.
The first part of this file is what all scripts share: errors, flags, files.
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import urllib.request
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from http.client import HTTPException
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# What all scripts share


class UserError(Exception):
    """A mistake that the user can fix: a script prints its one line and exits with status 2."""


@contextmanager
def one_line_errors(interrupted: str = "interrupted"):
    """Around a script: a mistake and Ctrl-C end in one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what this terminal cannot show becomes a "?"
            stream.reconfigure(errors="replace")
    try:
        yield
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has closed the pipe
        os._exit(141)
    except (UserError, OSError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        line = interrupted if stopped else str(error).partition("\n")[0]
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(130 if stopped else 2)


def flag(default, help: str, **options):
    """A dataclass field that is also a command-line flag. group=NAME begins a group in --help,
    at_least=N is its lowest value; other options are argparse's."""
    words = default if isinstance(default, tuple) else (default,)
    if default is False:
        options["action"] = "store_true"
    elif default is None:
        options.setdefault("type", str)
    else:
        options.setdefault("type", type(words[0]))
        help += f" (default: {' '.join(map(str, words))})".replace("\n", r"\n")
    return field(default=default, metadata=dict(help=help, **options))


def parse_flags(cls, description: str, argv=None):
    """The command line as (an instance of the dataclass cls, the names of the flags given)."""
    # Without a usage, argparse's own errors are one line too. A flag that isn't given has no value.
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for f in fields(cls):
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        if "help" not in f.metadata:  # it is no flag
            continue
        options = {k: v for k, v in f.metadata.items() if k not in ("group", "at_least")}
        positional = options.get("nargs") == "?"
        group.add_argument(f.name if positional else f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    config = cls(**given)
    check_values(config)
    return config, set(given)


def check_values(config):
    """UserError if a field of config has a value that its flag does not take: of another type (an
    int is a float too), none of its choices, no finite number, or too low a one."""
    for f in fields(config):
        value, low = getattr(config, f.name), f.metadata.get("at_least", -math.inf)
        if "help" not in f.metadata or (value is None and f.default is None):
            continue  # it is no flag, or has no value
        kind, several = f.metadata.get("type", bool), f.metadata.get("nargs", "?") != "?"
        if isinstance(value, tuple) != several:
            raise UserError(f"--{f.name} must be {'a tuple' if several else 'one value'}, "
                            f"not {value!r}")
        for item in value if several else (value,):
            if type(item) not in ((int, float) if kind is float else (kind,)):
                raise UserError(f"--{f.name} must be of type {kind.__name__}, not {item!r}")
            if item not in f.metadata.get("choices", (item,)):
                raise UserError(f"--{f.name} must be one of {f.metadata['choices']}, not {item!r}")
            if kind in (int, float) and not (low <= item and math.isfinite(item)):
                raise UserError(f"--{f.name} must be a finite number of at least {low}, not {item}")


@contextmanager
def replace_file(path: Path):
    """A binary file to write, beside path under a name of its own; renamed to path once whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "wb") as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"byte": the 256 bytes and end-of-text, 257 ids. "gpt2": 50,257 ids, downloaded once."""
    if name == "byte":
        return tiktoken.Encoding(
            name, pat_str="(?s:.){1,512}",  # pieces, because a long one takes long to encode
            special_tokens={"<|endoftext|>": 256},
            mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(f"the vocabulary of {name} isn't here ({type(error).__name__}): go online, "
                        "set TIKTOKEN_CACHE_DIR to its folder, or use --tokenizer byte") from None


def stream_text(tokenizer, ids):
    """The text of token ids, piece by piece: a character comes when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if i < tokenizer.eot_token:  # end-of-text and ids that pad the vocabulary have no text
            yield decoder.decode(tokenizer.decode_single_token_bytes(i))
    yield decoder.decode(b"", final=True)


# -------------------------------------------------------------------------------------------------
# Sources: downloads, files of text

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"


def fetch(url: str, path: Path) -> Path:
    """Downloads url to path, unless path is there, and returns path. UserError if it can't."""
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response, replace_file(path) as f:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(response, "read", size, desc=path.name) as body:
                shutil.copyfileobj(body, f)
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error!r}; run this again") from None
    return path


def read_shards(paths: list[Path]):
    """Yields the token ids of each shard of FineWeb, downloaded if need be: 256 int32, of which the
    first are 20240520, 1, and how many ids follow, then the ids as uint16."""
    for path in paths:
        data = fetch(FINEWEB_URL + path.name, path).read_bytes()
        header = np.frombuffer(data[:12].ljust(12), dtype="<i4")
        if header.tolist() != [20240520, 1, (len(data) - 1024) / 2]:
            path.unlink()
            raise UserError(f"{path} was no shard of tokens, and is deleted: run this again")
        yield np.frombuffer(data[1024:], dtype="<u2")


def find_texts(dataset: str, out: Path) -> list[Path]:
    """The files of a data set, sorted, without hidden ones and what an earlier run wrote to out."""
    top, pattern, left_out = Path(dataset), "*", set()
    if dataset == "stdlib":  # this Python's own sources, without tests and packages
        top, pattern = Path(sysconfig.get_path("stdlib")), "*.py"
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    elif dataset == "shakespeare":
        top = fetch(SHAKESPEARE_URL, out / "shakespeare.txt")
        if hashlib.sha256(top.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
            top.unlink()
            raise UserError(f"{SHAKESPEARE_URL} isn't tiny Shakespeare: its SHA-256 differs")
    if top.is_file():
        return [top]
    return [path for path in sorted(top.rglob(pattern))
            if path.is_file() and out.resolve() not in path.resolve().parents
            and not any(name.startswith(".") or name in left_out
                        for name in path.relative_to(top).parts)]


def read_texts(dataset: str, files: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to train and to validate on. Files that are no UTF-8 text are left out and counted,
    the first three by name.
    Every tenth text is for validation (the last one, if there are fewer than ten), or the last
    tenth of the characters of a single one. UserError if there is too little text."""
    texts, left_out = [], []
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            left_out.append(f"{path} (byte {error.start} is no UTF-8)")
            continue
        if "\0" in text:
            left_out.append(f"{path} (binary)")
        elif text:
            texts.append(text)
    print(f"{dataset}: {len(texts)} files of UTF-8 text, {len(left_out)} left out")
    for line in left_out[:3]:
        print(f"left out: {line}")
    if sum(map(len, texts)) < 20:
        raise UserError(f"{dataset}: no UTF-8 text in it, or too short to train and validate on")
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        return [texts[0][:cut]], [texts[0][cut:]]
    n = min(10, len(texts))
    val = texts[n - 1::n]
    del texts[n - 1::n]
    return texts, val


def encode(texts: list[str], tokenizer):
    """Yields the token ids of each text, with an end-of-text between two."""
    for i, text in enumerate(texts):
        if i > 0:
            yield np.array([tokenizer.eot_token])
        yield tokenizer.encode_to_numpy(text, disallowed_special=())


# -------------------------------------------------------------------------------------------------
# Preparing and loading a data set

NAMED = ("stdlib", "shakespeare", "fineweb")


@dataclass
class DataConfig:
    dataset: str = flag("stdlib", f"{', '.join(NAMED)} or a path", nargs="?")
    tokenizer: str | None = flag(None, "byte or gpt2 (default: gpt2 for fineweb, else byte); a "
                                 "text in gpt2 is data/<name>-gpt2", choices=("byte", "gpt2"))
    shards: int = flag(1, "fineweb: training shards, 100M tokens each", at_least=1)


def prepare(config: DataConfig) -> Path:
    """Writes a data set and returns its folder. UserError if that can't be done."""
    check_values(config)
    name = source = dataset = config.dataset
    if dataset not in NAMED:
        path = Path(dataset).resolve()
        if not path.exists():
            raise UserError(f"{dataset} is no file or folder, nor {', '.join(NAMED)}")
        name = path.name if path.is_dir() else path.stem
        source = str(path)
        if name in NAMED:
            raise UserError(f"'{name}' cannot be the name of a data set of yours: rename {dataset}")
    usual = "gpt2" if dataset == "fineweb" else "byte"
    tokens = config.tokenizer or usual
    if tokens != usual:
        if dataset == "fineweb":
            raise UserError("--tokenizer byte: fineweb comes in GPT-2's tokens")
        name += f"-{tokens}"
    out, tokenizer = Path("data", name), get_tokenizer(tokens)
    meta = out / "meta.json"
    if meta.exists() and read_meta(meta).get("source") != source:
        raise UserError(f"{out} holds data from elsewhere: delete or move it first")

    if dataset == "fineweb":
        shards = [out / f"fineweb_train_{i:06d}.bin" for i in range(1, config.shards + 1)]
        train = read_shards(shards)
        val = read_shards([out / "fineweb_val_000000.bin"])
    else:
        texts = read_texts(dataset, find_texts(dataset, out))
        train, val = (encode(part, tokenizer) for part in texts)
    write_dataset(out, tokenizer, train, val, source)
    return out


def write_dataset(out: Path, tokenizer, train, val, source: str):
    """Writes train.bin and val.bin, each from pieces of token ids, and meta.json."""
    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.eot_token))
    n_bytes = [*map(len, tokens), 0]  # of each token; end-of-text, the last, has no text
    meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, source=source)
    sha256 = hashlib.sha256()
    with replace_file(out / "val.bin") as val_file, replace_file(out / "train.bin") as train_file:
        for part, f, pieces in (("train", train_file, train), ("val", val_file, val)):
            meta |= {f"{part}_tokens": 0, f"{part}_bytes": 0}
            for ids in tqdm(pieces, desc=part, unit=" pieces"):
                data = ids.astype("<u2").tobytes()
                f.write(data)
                sha256.update(data)
                meta[f"{part}_tokens"] += len(ids)
                meta[f"{part}_bytes"] += int(np.bincount(ids, minlength=len(n_bytes)) @ n_bytes)
        (out / "meta.json").unlink(missing_ok=True)  # an old one must never describe new ids
    meta["sha256"] = sha256.hexdigest()
    with replace_file(out / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    print(f"{out}: {meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} for "
          f"validation, of {meta['vocab_size']:,} different ones")


# What a training run reads of meta.json.
META = dict(tokenizer=str, vocab_size=int, train_tokens=int, val_tokens=int, val_bytes=int,
            sha256=str)


def read_meta(path: Path) -> dict:
    """What a meta.json says: nothing, if it is cut."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return {}


def load(dataset: str):
    """(train ids, val ids, meta) of a name under data/, or of a folder: two read-only uint16 arrays
    on disk, and what meta.json says. UserError if they aren't there or aren't whole."""
    folder = Path("data", dataset)
    if not folder.is_dir():
        folder = Path(dataset)
    path = folder / "meta.json"
    if not path.is_file():
        raise UserError(f"--dataset {dataset} isn't there yet: prepare_data.py makes it")
    meta = read_meta(path)
    for name, kind in META.items():
        if type(meta.get(name)) is not kind:
            raise UserError(f"{path} has no {name} of type {kind.__name__}: delete {folder}, and "
                            "prepare the data again")
    arrays = []
    for part in ("train", "val"):
        path, n = folder / f"{part}.bin", meta[f"{part}_tokens"]
        if not path.is_file() or path.stat().st_size != 2 * n or n == 0:
            raise UserError(f"{path} should be {n} tokens, and is not: prepare the data again")
        arrays.append(np.memmap(path, dtype=np.uint16, mode="r"))
        if arrays[-1].max() >= meta["vocab_size"]:
            raise UserError(f"{path} has token {arrays[-1].max()}, which a vocabulary of "
                            f"{meta['vocab_size']} does not have: prepare the data again")
    return *arrays, meta


if __name__ == "__main__":
    with one_line_errors("interrupted; run it again, finished downloads are kept"):
        config, _ = parse_flags(DataConfig, __doc__)
        prepare(config)
