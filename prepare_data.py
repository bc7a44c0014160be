"""Text in, token ids out.

    python prepare_data.py                        Python's standard library, from this machine
    python prepare_data.py shakespeare            tiny Shakespeare, a download of 1.1 MB
    python prepare_data.py fineweb --shards 10    FineWeb in GPT-2's tokens, 0.2 GB a shard
    python prepare_data.py PATH                   a text file, or a folder of them

writes data/<name>/train.bin and val.bin, token ids as uint16 and nothing else, and meta.json: the
tokenizer, its vocabulary, tokens and bytes of text, where the text is from and its SHA-256.
The first part of this file is what all scripts share: flags, errors, files.
"""

import argparse
import codecs
import hashlib
import json
import os
import re
import signal
import sys
import sysconfig
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"  # stands between two documents
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"


class UserError(Exception):
    """A mistake that the user can mend: a script prints its one line and exits with status 2."""


@contextmanager
def one_line_errors():
    """Around a script: what the user can mend, Ctrl-C and SIGTERM end in one line."""
    def terminated(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except BrokenPipeError:  # who reads our output, `head` say, has enough
        os._exit(141)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        kind = "" if isinstance(error, (UserError, OSError)) else "out of memory: "
        line = str(error).splitlines()[0]  # torch goes on for a page when memory runs out
        print(f"{Path(sys.argv[0]).name}: {kind}{line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command starts again, from what "
              "is complete", file=sys.stderr)
        sys.exit(128 + (error.args or (signal.SIGINT,))[0])


def flag(default, help: str, **options):
    """A dataclass field that is also a command-line flag; options are argparse's."""
    return field(default=default, metadata={"help": help, **options})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_flags(cls, description: str, argv=None):
    """The command line as (an instance of the dataclass cls, the names of the flags given)."""
    parser = Parser(description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        options = dict(f.metadata)
        if not options:  # a field that is no flag
            continue
        if f.default is False:
            options["action"] = "store_true"
        else:
            options.setdefault("type", type(f.default))
            options["help"] += "" if f.default is None else f" (default: {f.default!r})"
        parser.add_argument(f.name if options.get("nargs") == "?" else f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return cls(**given), set(given)


@contextmanager
def replace_file(path: Path):
    """A binary file to write, beside path; renamed to path once it is whole and on the disk."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of a full disk
        why = error if isinstance(error, OSError) else "is the disk full?"
        raise UserError(f"{path} can't be written, and is as it was: {why}") from None
    finally:
        part.unlink(missing_ok=True)


def pick_device(name: str):
    """The torch.device of --device; auto takes the fastest there is."""
    import torch  # here and below only, so that preparing data doesn't wait for it

    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path: Path, device="cpu") -> dict:
    """What train.py saved. Tensors and plain values only: a stranger's file can't run code."""
    import torch

    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} isn't there: train first, or give the run's --out_dir") from None
    except Exception as error:  # torch.load raises many kinds for broken and foreign files
        raise UserError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from None
    keys = {"model", "model_config", "tokenizer", "optimizers", "step", "config", "data_sha256"}
    if not isinstance(ckpt, dict) or set(ckpt) != keys:
        raise UserError(f"{path} is not a checkpoint of train.py")
    return ckpt


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"byte": the 256 bytes and end-of-text, 257 ids. "gpt2": GPT-2's 50,257, downloaded once."""
    if name == "byte":
        return tiktoken.Encoding(
            "byte", pat_str=r"(?s:.){1,512}", special_tokens={END_OF_TEXT: 256},
            mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(f"GPT-2's vocabulary can't be had ({type(error).__name__}): go online, "
                        "set TIKTOKEN_CACHE_DIR to a folder with it, or use --tokenizer byte"
                        ) from None


def stream_text(tokenizer, ids):
    """The text of token ids, piece by piece: a character comes when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if i < tokenizer.eot_token:  # END_OF_TEXT and ids that pad the vocabulary have no text
            yield decoder.decode(tokenizer.decode_single_token_bytes(i))
    yield decoder.decode(b"", final=True)


# GPT-2's tokens never reach from a visible character into the white space behind it: text that is
# cut there gives the same tokens as in one piece.
CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # greedy: up to the last such place


def read_pieces(path: Path, start: int, end: int, size: int = 1 << 20):
    """Yields the text in bytes start .. end of a UTF-8 file, in pieces of about size bytes."""
    decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
    with open(path, "rb") as f:
        f.seek(start)
        for left in range(end - start, 0, -size):
            text += decoder.decode(f.read(min(size, left)), final=left <= size)
            cut = CUT.match(text) if left > size else None
            n = cut.end() if cut else len(text)
            yield text[:n]
            text = text[n:]


def write_tokens(out, documents, tokenizer, sha256, desc: str) -> tuple[int, int]:
    """Tokenizes documents [(path, start, end)] into the file out; returns (tokens, bytes of text).

    All cores encode pieces of text at once. Only a few pieces are in memory at any time.
    """
    def pieces():
        for i, document in enumerate(documents):
            if i > 0:
                yield None
            yield from read_pieces(*document)

    def encode(text):
        if text is None:  # between two documents
            return np.array([tokenizer.eot_token])
        return tokenizer.encode_to_numpy(text, disallowed_special=())

    tokens, n_bytes, stream, cores = 0, 0, pieces(), os.cpu_count() or 1
    total = sum(end - start for _, start, end in documents)
    with (ThreadPoolExecutor(cores) as pool,
          tqdm(desc=desc, total=total, unit="B", unit_scale=True) as bar):
        while batch := list(islice(stream, 2 * cores)):
            for text, ids in zip(batch, pool.map(encode, batch)):
                data = (text or "").encode()
                sha256.update(data)
                out.write(ids.astype(np.uint16).tobytes())
                tokens, n_bytes = tokens + len(ids), n_bytes + len(data)
                bar.update(len(data))
    return tokens, n_bytes


def is_text(path: Path) -> bool:
    """Is there text in this file: UTF-8, without zero bytes, and ours to read?"""
    try:
        pieces = read_pieces(path, 0, path.stat().st_size)
        return path.stat().st_size > 0 and not any("\0" in text for text in pieces)
    except (UnicodeDecodeError, PermissionError):
        return False


def walk(folder: Path, skip=()) -> list[Path]:
    """The files in a folder, sorted; hidden ones and those in folders named in skip left out."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and not any(
        part.startswith(".") or part in skip for part in p.relative_to(folder).parts)]


def stdlib_files() -> list[Path]:
    """The sources of Python's standard library on this machine, without tests and packages."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return [p for p in walk(Path(sysconfig.get_path("stdlib")), skip) if p.suffix == ".py"]


def split(files: list[Path]):
    """Documents (path, start, end) for training, and for validation: every tenth file (the last
    one, if there are fewer than ten), or the last 10% of the bytes of a single file."""
    if len(files) > 1:
        documents = [(p, 0, p.stat().st_size) for p in files]
        n = min(10, len(files))
        return [d for i, d in enumerate(documents, 1) if i % n], documents[n - 1::n]
    size = files[0].stat().st_size
    cut = size * 9 // 10
    with open(files[0], "rb") as f:
        f.seek(cut)  # then on to the next byte that begins a character
        cut += next((i for i, byte in enumerate(f.read(4)) if byte & 0xC0 != 0x80), 0)
    return [(files[0], 0, cut)], [(files[0], cut, size)]


def download(url: str, path: Path):
    """Streams url to path, through path.part: a download that broke goes on where it stopped."""
    part = path.with_name(path.name + ".part")
    # The last byte is read again: asking for the bytes behind a whole file would be an error.
    have = max(0, part.stat().st_size - 1) if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.length is None:
                raise OSError("the server doesn't say how long it is")
            have = have if response.status == 206 else 0  # 200: the server sends all of it again
            total = have + response.length
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as f, tqdm(desc=path.name, total=total, initial=have, unit="B",
                                             unit_scale=True) as bar:
                f.truncate(have)
                while data := response.read(1 << 20):
                    bar.update(f.write(data))
        if part.stat().st_size < total:
            raise OSError("the download ended early")
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error!r}; run this again to go on") from None
    os.replace(part, path)


def read_ids(f):
    """Yields the uint16 ids in a file in parts: a memmap read through would fill the memory."""
    while len(ids := np.fromfile(f, dtype=np.uint16, count=1 << 24)):
        yield ids


def copy_shards(out, shards, tokenizer, sha256, desc: str) -> tuple[int, int]:
    """Copies the uint16 ids of shards, which 256 int32 (20240520, 1, how many, 0 ...) precede,
    into the file out, downloading those that aren't there; returns (tokens, bytes of text)."""
    tokens, n_bytes, lengths = 0, 0, np.zeros(1 << 16, dtype=np.int64)
    for i in range(tokenizer.eot_token):  # END_OF_TEXT has no text
        lengths[i] = len(tokenizer.decode_single_token_bytes(i))
    for path in tqdm(shards, desc=desc, unit="shard"):
        if not path.exists():
            download(FINEWEB_URL + path.name, path)
        with open(path, "rb") as f:
            magic, version, n = np.frombuffer(f.read(1024).ljust(12), dtype="<i4")[:3]
            if (magic, version, path.stat().st_size) != (20240520, 1, 1024 + 2 * n):
                path.unlink()
                raise UserError(f"{path.name} was no shard of tokens: wrong header or size; "
                                "deleted")
            for ids in read_ids(f):
                sha256.update(ids)
                out.write(ids)
                tokens += len(ids)
                n_bytes += int(np.bincount(ids, minlength=1 << 16) @ lengths)
    return tokens, n_bytes


@dataclass
class DataConfig:
    dataset: str = flag("stdlib", "stdlib, shakespeare, fineweb, or the path of a text file or of "
                        "a folder", nargs="?")
    tokenizer: str | None = flag(None, "byte or gpt2 (default: gpt2 for fineweb, else byte); the "
                                 "other one writes data/<name>-gpt2", type=str,
                                 choices=("byte", "gpt2"))
    shards: int = flag(1, "fineweb: training shards, 100M tokens each")


def prepare(config: DataConfig) -> Path:
    """Writes a dataset and returns its folder; raises UserError."""
    dataset, path = config.dataset, Path(config.dataset)
    name, usual = dataset, "gpt2" if dataset == "fineweb" else "byte"
    if dataset == "fineweb" and config.tokenizer == "byte":
        raise UserError("--tokenizer byte: fineweb comes in GPT-2's tokens")
    if config.shards < 1:
        raise UserError(f"--shards must be at least 1, not {config.shards}")
    if dataset not in ("stdlib", "shakespeare", "fineweb"):
        if not path.exists():
            raise UserError(f"{dataset}: no such path, nor stdlib, shakespeare or fineweb")
        path = path.resolve()
        name = path.name if path.is_dir() else path.stem
    source, tokenizer = str(path), get_tokenizer(config.tokenizer or usual)
    out = Path("data", name if tokenizer.name == usual else f"{name}-{tokenizer.name}")
    if (out / "meta.json").exists() and read_meta(out)["source"] != source:
        raise UserError(f"{out} holds data from elsewhere: delete or move it first")

    if dataset == "fineweb":
        train = [out / f"fineweb_train_{i:06d}.bin" for i in range(1, config.shards + 1)]
        inputs, write = (train, [out / "fineweb_val_000000.bin"]), copy_shards
    else:
        if dataset == "shakespeare":
            path = out / "input.txt"
            if not path.exists():
                download(SHAKESPEARE_URL, path)
            if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
                path.unlink()
                raise UserError(f"{SHAKESPEARE_URL} isn't tiny Shakespeare: its SHA-256 differs")
        files = stdlib_files() if dataset == "stdlib" else walk(path) if path.is_dir() else [path]
        texts = [p for p in files if is_text(p)]
        if not texts:
            raise UserError(f"{path}: there is no UTF-8 text in it")
        print(f"{name}: {len(texts)} files of UTF-8 text, {len(files) - len(texts)} left out")
        inputs, write = split(texts), write_tokens

    sha256 = hashlib.sha256()
    meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, source=source)
    out.mkdir(parents=True, exist_ok=True)
    for part, documents in zip(("train", "val"), inputs):
        with replace_file(out / f"{part}.bin") as f:
            tokens, n_bytes = write(f, documents, tokenizer, sha256, desc=part)
        meta |= {f"{part}_tokens": tokens, f"{part}_bytes": n_bytes}
    with replace_file(out / "meta.json") as f:
        f.write(json.dumps(meta | dict(sha256=sha256.hexdigest()), indent=1).encode())
    return out


def read_meta(folder: Path) -> dict:
    keys = "tokenizer vocab_size source sha256 train_tokens val_tokens train_bytes val_bytes"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        return {key: meta[key] for key in keys.split()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'meta.json'}: {error!r}; delete the folder, prepare it again")


def load(dataset: str):
    """(train ids, val ids, meta): two read-only uint16 arrays on disk, and what meta.json says.

    dataset is a name under data/, or the path of a folder. UserError if the three don't agree.
    """
    folder = next((p for p in (Path("data", dataset), Path(dataset)) if p.is_dir()), None)
    if folder is None:
        raise UserError(f"dataset '{dataset}' isn't there yet: python prepare_data.py {dataset}")
    meta, arrays = read_meta(folder), []
    for part in ("train", "val"):
        path, n = folder / f"{part}.bin", meta[f"{part}_tokens"]
        if not path.is_file() or path.stat().st_size != 2 * n or n == 0:
            raise UserError(f"{path} should be {n} tokens, says meta.json, and is not; prepare "
                            "the data again")
        arrays.append(np.memmap(path, dtype=np.uint16, mode="r"))
        with open(path, "rb") as f:
            largest = max(ids.max() for ids in read_ids(f))
        if largest >= meta["vocab_size"]:
            raise UserError(f"{path}: token id {largest} is outside the vocabulary of "
                            f"{meta['vocab_size']}; prepare the data again")
    return *arrays, meta


if __name__ == "__main__":
    with one_line_errors():
        config, _ = parse_flags(DataConfig, __doc__)
        folder = prepare(config)
        _, _, meta = load(str(folder))
        print(f"{folder}: {meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} "
              f"for validation, {meta['tokenizer']} tokenizer")
