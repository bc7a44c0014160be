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
import os
import shlex
import subprocess
import sys
import sysconfig
import urllib.request
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
def one_line_errors():
    """Around a script: a mistake, a full machine and Ctrl-C end in one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what this terminal cannot show becomes a "?"
            stream.reconfigure(errors="replace")
    try:
        yield
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has closed the pipe
        os._exit(141)
    except (UserError, OSError) as error:
        fail(str(error) or type(error).__name__)
    except MemoryError:
        fail("out of memory")
    except RuntimeError as error:
        # What torch says on CUDA and MPS, on Linux and on Windows when there is no memory left.
        said = ("out of memory", "can't allocate memory", "not enough memory")
        if not any(words in str(error) for words in said):
            raise
        fail(f"out of memory: {error}")
    except KeyboardInterrupt:
        fail("interrupted; run it again, finished files are kept", status=130)


def fail(message: str, status: int = 2):
    print(f"{Path(sys.argv[0]).name}: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(status)


def command(*words) -> str:
    """The words as a command line that can be pasted into this system's shell."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def flag(default, help: str, **options):
    """A dataclass field that is also a command-line flag. group=NAME begins a group in --help;
    other options are argparse's."""
    return field(default=default, metadata=dict(help=help, **options))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_flags(cls, description: str, argv=None):
    """The command line as (an instance of the dataclass cls, the names of the flags given)."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for f in fields(cls):
        if not f.metadata:  # a field that is no flag
            continue
        options = dict(f.metadata)
        if "group" in options:
            group = parser.add_argument_group(options.pop("group"))
        if f.default is False:
            options["action"] = "store_true"
        elif "type" not in options:
            options["type"] = type(f.default)
        if f.default not in (None, False):
            shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            options["help"] += f" (default: {shown!r})" if shown == "\n" else f" (default: {shown})"
        positional = options.get("nargs") == "?"
        group.add_argument(f.name if positional else f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
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
    except OSError as error:
        raise UserError(f"{path} can't be written, and is as it was: {error}") from None
    except RuntimeError as error:
        if "inline_container" not in str(error):  # what torch.save makes of a full disk
            raise
        raise UserError(f"{path} can't be written, and is as it was: is the disk full?") from None
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT = "<|endoftext|>"  # stands between two documents


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"byte": the 256 bytes and end-of-text, 257 ids. "gpt2": GPT-2's 50,257, downloaded once."""
    if name == "byte":
        return tiktoken.Encoding(
            "byte", pat_str=r"(?s:.){1,512}", special_tokens={END_OF_TEXT: 256},
            mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(f"GPT-2's vocabulary can't be loaded ({type(error).__name__}): go online, "
                        "set TIKTOKEN_CACHE_DIR to a folder with it, or use --tokenizer byte"
                        ) from None


def stream_text(tokenizer, ids):
    """The text of token ids, piece by piece: a character comes when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if i < tokenizer.eot_token:  # END_OF_TEXT and ids that pad the vocabulary have no text
            yield decoder.decode(tokenizer.decode_single_token_bytes(i))
    yield decoder.decode(b"", final=True)


# -------------------------------------------------------------------------------------------------
# Sources of text

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"


def download(url: str, path: Path):
    """Fetches url into path; a download that broke starts anew. UserError if it can't be had."""
    chunks = []
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            size = response.length  # bytes; None if the server doesn't say
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    chunks.append(chunk)
                    bar.update(len(chunk))
        if size is not None and sum(map(len, chunks)) < size:
            raise OSError("the download ended early")
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error!r}; run this again") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as f:
        f.writelines(chunks)


def read_text(path: Path) -> str | None:
    """The text of a UTF-8 file. None if it is no such file, is empty, or may not be read."""
    try:
        text = path.read_bytes().decode("utf-8") if path.is_file() else ""
    except (UnicodeDecodeError, PermissionError):
        return None
    return None if text == "" or "\0" in text else text


def walk(folder: Path, skip=()) -> list[Path]:
    """The files below a folder, sorted, and folders that may not be entered. Hidden ones are left
    out, and folders with a name in skip."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=lambda e: found.append(Path(e.filename))):
        folders[:] = [name for name in folders if name[0] != "." and name not in skip]
        found += [Path(parent, name) for name in files if name[0] != "."]
    return sorted(found)


def stdlib_files() -> list[Path]:
    """The sources of Python's standard library on this machine, without tests and packages."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return [p for p in walk(Path(sysconfig.get_path("stdlib")), skip) if p.suffix == ".py"]


def split_texts(files: list[Path]):
    """Texts for training and texts for validation, which is every tenth file (the last one, if
    there are fewer than ten), or the last tenth of the characters of a single file."""
    if len(files) == 1:
        text = read_text(files[0])
        if len(text) < 20:
            raise UserError(f"{files[0]}: the text is too short to train and validate on")
        cut = len(text) * 9 // 10
        return [text[:cut]], [text[cut:]]
    n = min(10, len(files))
    validation = files[n - 1::n]
    training = list(files)
    del training[n - 1::n]
    return map(read_text, training), map(read_text, validation)  # read one at a time, when needed


def encode_texts(texts, tokenizer):
    """Yields (ids, bytes of text) of each text, with an end-of-text before all but the first."""
    for i, text in enumerate(texts):
        if i > 0:
            yield np.array([tokenizer.eot_token]), 0
        yield tokenizer.encode_to_numpy(text, disallowed_special=()), len(text.encode())


def read_shards(paths, tokenizer):
    """Yields (ids, bytes of text) of each shard of FineWeb, which is downloaded if need be: 256
    int32, the first of which are 20240520, 1, and how many ids follow, then the ids as uint16."""
    lengths = [len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.eot_token)]
    lengths = np.array([*lengths, 0])  # bytes of each token; END_OF_TEXT, the last, has none
    for path in paths:
        if not path.exists():
            download(FINEWEB_URL + path.name, path)
        data = path.read_bytes()
        header = np.frombuffer(data[:1024].ljust(1024), dtype="<i4")
        ids = np.frombuffer(data[1024:len(data) // 2 * 2], dtype="<u2")
        if tuple(header[:3]) != (20240520, 1, len(ids)) or len(data) % 2:
            path.unlink()
            raise UserError(f"{path.name} was no shard of tokens, and is deleted: run this again")
        if ids.max(initial=0) >= tokenizer.n_vocab:
            raise UserError(f"{path}: token id {ids.max()} is outside the vocabulary of "
                            f"{tokenizer.n_vocab}")
        yield ids, int(np.bincount(ids, minlength=tokenizer.n_vocab) @ lengths)


# -------------------------------------------------------------------------------------------------
# Preparing and loading a data set


@dataclass
class DataConfig:
    dataset: str = flag("stdlib", "stdlib, shakespeare, fineweb, or the path of a text file or of "
                        "a folder", nargs="?")
    tokenizer: str | None = flag(None, "byte or gpt2 (default: gpt2 for fineweb, else byte); the "
                                 "other one writes data/<name>-gpt2", choices=("byte", "gpt2"),
                                 type=str)
    shards: int = flag(1, "fineweb: training shards, 100M tokens each")


def prepare(config: DataConfig) -> Path:
    """Writes a data set and returns its folder. UserError if that can't be done."""
    dataset, path = config.dataset, Path(config.dataset)
    if dataset == "fineweb" and config.tokenizer == "byte":
        raise UserError("--tokenizer byte: fineweb comes in GPT-2's tokens")
    if config.shards < 1:
        raise UserError(f"--shards must be at least 1, not {config.shards}")
    name, source = dataset, dataset
    if dataset not in ("stdlib", "shakespeare", "fineweb"):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{dataset} is no file or folder, nor stdlib, shakespeare or fineweb")
        path = path.resolve()
        source, name = str(path), path.name if path.is_dir() else path.stem
    usual = "gpt2" if dataset == "fineweb" else "byte"
    tokenizer = get_tokenizer(config.tokenizer or usual)
    out = Path("data", name if tokenizer.name == usual else f"{name}-{tokenizer.name}")
    if dataset != name and name in ("", "stdlib", "shakespeare", "fineweb"):
        raise UserError(f"{dataset}: '{name}' cannot be the name of a data set of yours: rename it")
    if source == str(out.resolve()):
        raise UserError(f"{dataset} is where its own data would go: move the text elsewhere")
    if (out / "meta.json").exists() and read_meta(out)["source"] != source:
        raise UserError(f"{out} holds data from elsewhere: delete or move it first")

    if dataset == "fineweb":
        shards = [out / f"fineweb_train_{i:06d}.bin" for i in range(1, config.shards + 1)]
        train = read_shards(shards, tokenizer)
        val = read_shards([out / "fineweb_val_000000.bin"], tokenizer)
    else:
        train_texts, val_texts = split_texts(find_texts(dataset, path, out))
        train, val = encode_texts(train_texts, tokenizer), encode_texts(val_texts, tokenizer)
    meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, source=source)
    write_dataset(out, train, val, meta)
    return out


def find_texts(dataset: str, path: Path, out: Path) -> list[Path]:
    """The files with the text of a data set. UserError if there is none."""
    if dataset == "stdlib":
        files = stdlib_files()
    elif dataset == "shakespeare":
        files = [out / "input.txt"]
        if not files[0].exists():
            download(SHAKESPEARE_URL, files[0])
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
            files[0].unlink()
            raise UserError(f"{SHAKESPEARE_URL} isn't tiny Shakespeare: its SHA-256 differs")
    else:
        files = walk(path) if path.is_dir() else [path]
    texts = [p for p in files if read_text(p) is not None]
    if not texts:
        raise UserError(f"{path}: there is no UTF-8 text in it")
    print(f"{dataset}: {len(texts)} files of UTF-8 text, {len(files) - len(texts)} left out")
    return texts


def write_dataset(out: Path, train, val, meta: dict):
    """Writes train.bin, val.bin and meta.json from the (ids, bytes of text) of train and val."""
    sha256 = hashlib.sha256()
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(out / "val.bin") as val_file, replace_file(out / "train.bin") as train_file:
        for part, f, pieces in (("train", train_file, train), ("val", val_file, val)):
            meta[f"{part}_tokens"] = meta[f"{part}_bytes"] = 0
            for ids, n_bytes in tqdm(pieces, desc=part, unit=" pieces"):
                data = ids.astype("<u2").tobytes()
                f.write(data)
                sha256.update(data)
                meta[f"{part}_tokens"] += len(ids)
                meta[f"{part}_bytes"] += n_bytes
        # An old meta.json must never describe new ids.
        (out / "meta.json").unlink(missing_ok=True)
    with replace_file(out / "meta.json") as f:
        f.write(json.dumps(meta | dict(sha256=sha256.hexdigest()), indent=1).encode())


def read_meta(folder: Path) -> dict:
    keys = ("tokenizer", "vocab_size", "source", "sha256", "train_tokens", "val_tokens",
            "train_bytes", "val_bytes")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        return {key: meta[key] for key in keys}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'meta.json'}: {error!r}; delete this file, prepare the data "
                        "again")


def load(dataset: str):
    """(train ids, val ids, meta): two read-only uint16 arrays on disk, and what meta.json says.

    dataset is a name under data/, or the path of a folder. UserError if it isn't there or isn't
    whole."""
    folder = Path("data", dataset)
    if not folder.is_dir():
        folder = Path(dataset)
    if not (folder / "meta.json").is_file():
        words = ["python", "prepare_data.py", dataset.removesuffix("-gpt2")]
        if dataset.endswith("-gpt2"):
            words += ["--tokenizer", "gpt2"]
        raise UserError(f"--dataset {dataset} isn't there yet: {command(*words)} prepares it and "
                        "prints its name")
    meta = read_meta(folder)
    arrays = []
    for part in ("train", "val"):
        path, n = folder / f"{part}.bin", meta[f"{part}_tokens"]
        if not path.is_file() or path.stat().st_size != 2 * n or n == 0:
            raise UserError(f"{path} should be {n} tokens, says meta.json, and is not; prepare "
                            "the data again")
        arrays.append(np.memmap(path, dtype=np.uint16, mode="r"))
    return *arrays, meta


if __name__ == "__main__":
    with one_line_errors():
        config, _ = parse_flags(DataConfig, __doc__)
        folder = prepare(config)
        meta = read_meta(folder)
        print(f"{folder}: {meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} "
              f"for validation, {meta['tokenizer']} tokenizer")
