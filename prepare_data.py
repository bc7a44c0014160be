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
    except AttributeError as error:
        if "_cuda_setDevice" not in str(error):  # what torch.cuda.set_device lacks without CUDA
            raise
        fail("--device: this torch is built without CUDA")
    except KeyboardInterrupt:
        fail("interrupted; run it again, finished files are kept", status=130)


def fail(message: str, status: int = 2):
    print(f"{Path(sys.argv[0]).name}: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(status)


def command(*words) -> str:
    """The words as a command line that can be pasted into this system's shell."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([str(word) for word in words])


def flag(default, help: str, **options):
    """A dataclass field that is also a command-line flag. group=NAME begins a group in --help;
    other options are argparse's."""
    if default is False:
        options["action"] = "store_true"
    elif default is not None:
        options.setdefault("type", type(default))
        words = default if isinstance(default, tuple) else (default,)
        help += f" (default: {' '.join(map(str, words))})".replace("\n", r"\n")
    return field(default=default, metadata=dict(help=help, **options))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_flags(cls, description: str, argv=None):
    """The command line as (an instance of the dataclass cls, the names of the flags given)."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for f in [f for f in fields(cls) if f.metadata]:  # the others are no flags
        options = dict(f.metadata)
        if "group" in options:
            group = parser.add_argument_group(options.pop("group"))
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
    path.parent.mkdir(parents=True, exist_ok=True)
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


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"byte": the 256 bytes and end-of-text, 257 ids. "gpt2": GPT-2's 50,257, downloaded once."""
    if name == "byte":
        return tiktoken.Encoding(
            "byte", pat_str=r"(?s:.){1,512}", special_tokens={"<|endoftext|>": 256},
            mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(f"GPT-2's vocabulary isn't here ({type(error).__name__}): go online, set "
                        "TIKTOKEN_CACHE_DIR to its folder, or use --tokenizer byte") from None


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
        with urllib.request.urlopen(url, timeout=30) as response:
            with tqdm.wrapattr(response, "read", response.length, desc=path.name) as body:
                chunks = list(iter(lambda: body.read(1 << 20), b""))
            if response.length:  # bytes that are still to come
                raise OSError("the download ended early")
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error!r}; run this again") from None
    with replace_file(path) as f:
        f.writelines(chunks)
    return path


def read_shards(paths, n_vocab: int):
    """Yields the token ids of each shard of FineWeb, downloaded if need be: 256 int32, of which the
    first are 20240520, 1, and how many ids follow, then the ids as uint16."""
    for path in paths:
        data = fetch(FINEWEB_URL + path.name, path).read_bytes()
        header = np.frombuffer(data[:12].ljust(12), dtype="<i4")
        if header.tolist() != [20240520, 1, (len(data) - 1024) / 2]:
            path.unlink()
            raise UserError(f"{path} was no shard of tokens, and is deleted: run this again")
        ids = np.frombuffer(data[1024:], dtype="<u2")
        if ids.max(initial=0) >= n_vocab:
            raise UserError(f"{path}: token id {ids.max()} is outside the vocabulary of {n_vocab}")
        yield ids


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; "" if it is no such file, holds a zero byte, or may not be read."""
    try:
        text = path.read_bytes().decode("utf-8") if path.is_file() else ""
    except (UnicodeDecodeError, PermissionError):
        return ""
    return "" if "\0" in text else text


def find_texts(dataset: str, out: Path) -> list[Path]:
    """The files with the text of a data set, sorted. Hidden ones in a folder are passed over, files
    without UTF-8 text are left out and counted. UserError if there is too little text."""
    top, suffix, skip = Path(dataset), "", set()
    if dataset == "stdlib":  # this Python's own sources, without tests and packages
        top, suffix = Path(sysconfig.get_path("stdlib")), ".py"
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    elif dataset == "shakespeare":
        top = fetch(SHAKESPEARE_URL, out / "input.txt")
        if hashlib.sha256(top.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
            top.unlink()
            raise UserError(f"{SHAKESPEARE_URL} isn't tiny Shakespeare: its SHA-256 differs")
    found = []
    # os.walk reports what it can't list, a single file or a folder that may not be entered: such
    # a path is itself among those found.
    for parent, folders, files in os.walk(top, onerror=lambda e: found.append(Path(e.filename))):
        folders[:] = [name for name in folders if name[0] != "." and name not in skip]
        found += [Path(parent, name) for name in files if name[0] != "." and name.endswith(suffix)]
    lengths = {p: len(read_text(p)) for p in sorted(found)}
    if sum(lengths.values()) < 20:
        raise UserError(f"{dataset}: no UTF-8 text in it, or too short to train and validate on")
    texts = [p for p in lengths if lengths[p] > 0]
    print(f"{dataset}: {len(texts)} files of UTF-8 text, {len(found) - len(texts)} left out")
    return texts


def encode_texts(files: list[Path], part: str, tokenizer):
    """Yields the token ids of the texts for "train" or "val", with an end-of-text between two.
    Every tenth file is for validation (the last one, if there are fewer than ten), or the last
    tenth of the characters of a single file."""
    if len(files) == 1:
        text = read_text(files[0])
        cut = len(text) * 9 // 10
        texts = [text[:cut] if part == "train" else text[cut:]]
    else:
        n = min(10, len(files))
        chosen = [p for i, p in enumerate(files, start=1) if (i % n == 0) == (part == "val")]
        texts = map(read_text, chosen)  # one at a time, when it is needed
    for i, text in enumerate(texts):
        if i > 0:
            yield np.array([tokenizer.eot_token])
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())
        yield from np.array_split(ids, 1 + len(ids) // 10**7)  # smaller pieces need less memory


# -------------------------------------------------------------------------------------------------
# Preparing and loading a data set


@dataclass
class DataConfig:
    dataset: str = flag("stdlib", "stdlib, shakespeare, fineweb or a path, see above", nargs="?")
    tokenizer: str | None = flag(None, "byte or gpt2 (default: gpt2 for fineweb, else byte); the "
                                 "other one writes data/<name>-gpt2", choices=("byte", "gpt2"))
    shards: int = flag(1, "fineweb: training shards, 100M tokens each")


def prepare(config: DataConfig) -> Path:
    """Writes a data set and returns its folder. UserError if that can't be done."""
    dataset = config.dataset
    if dataset == "fineweb" and config.tokenizer == "byte":
        raise UserError("--tokenizer byte: fineweb comes in GPT-2's tokens")
    if config.shards < 1:
        raise UserError(f"--shards must be at least 1, not {config.shards}")
    named = ("stdlib", "shakespeare", "fineweb")
    name = source = dataset
    if dataset not in named:
        if not Path(dataset).exists():
            raise UserError(f"{dataset} is no file or folder, nor {', '.join(named)}")
        path = Path(dataset).resolve()
        name, source = path.name if path.is_dir() else path.stem, str(path)
        if name in ("", *named):
            raise UserError(f"'{name}' cannot be the name of a data set of yours: rename {dataset}")
    usual = "gpt2" if dataset == "fineweb" else "byte"
    tokenizer = get_tokenizer(config.tokenizer or usual)
    out = Path("data", name if tokenizer.name == usual else f"{name}-{tokenizer.name}")
    if source == str(out.resolve()):
        raise UserError(f"{dataset} is where its own data would go: move the text elsewhere")
    if (out / "meta.json").exists() and read_meta(out)["source"] != source:
        raise UserError(f"{out} holds data from elsewhere: delete or move it first")

    if dataset == "fineweb":
        shards = [out / f"fineweb_train_{i:06d}.bin" for i in range(1, config.shards + 1)]
        train = read_shards(shards, tokenizer.n_vocab)
        val = read_shards([out / "fineweb_val_000000.bin"], tokenizer.n_vocab)
    else:
        files = find_texts(dataset, out)
        train, val = (encode_texts(files, part, tokenizer) for part in ("train", "val"))
    write_dataset(out, source, tokenizer, train, val)
    return out


def write_dataset(out: Path, source: str, tokenizer, train, val):
    """Writes train.bin and val.bin, each from pieces of token ids, and meta.json."""
    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.eot_token))
    n_bytes = [*map(len, tokens), 0]  # of each token; end-of-text, the last, has no text
    meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, source=source)
    sha256 = hashlib.sha256()
    with replace_file(out / "val.bin") as val_file, replace_file(out / "train.bin") as train_file:
        for part, f, pieces in (("train", train_file, train), ("val", val_file, val)):
            counts = np.zeros(tokenizer.n_vocab, dtype=np.int64)  # of each id
            for ids in tqdm(pieces, desc=part, unit=" pieces"):
                data = ids.astype("<u2").tobytes()
                f.write(data)
                sha256.update(data)
                counts += np.bincount(ids, minlength=tokenizer.n_vocab)
            meta |= {f"{part}_tokens": int(counts.sum()), f"{part}_bytes": int(counts @ n_bytes)}
        (out / "meta.json").unlink(missing_ok=True)  # an old one must never describe new ids
    with replace_file(out / "meta.json") as f:
        f.write(json.dumps(meta | dict(sha256=sha256.hexdigest()), indent=1).encode())


def read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    keys = ("tokenizer", "vocab_size", "source", "train_tokens", "train_bytes", "val_tokens",
            "val_bytes", "sha256")
    try:
        meta = json.loads(path.read_bytes())
        return {key: meta[key] for key in keys}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: {error!r}; delete it, prepare the data again") from None


def load(dataset: str):
    """(train ids, val ids, meta) of a name under data/, or of a folder: two read-only uint16 arrays
    on disk, and what meta.json says. UserError if they aren't there or aren't whole."""
    folder = Path("data", dataset)
    if not folder.is_dir():
        folder = Path(dataset)
    if not (folder / "meta.json").is_file():
        name = dataset.removesuffix("-gpt2")
        other = [] if name == dataset else ["--tokenizer", "gpt2"]
        raise UserError(f"--dataset {dataset} isn't there yet: "
                        f"{command('python', 'prepare_data.py', name, *other)} prepares it")
    meta = read_meta(folder)
    arrays = []
    for part in ("train", "val"):
        path, n = folder / f"{part}.bin", meta[f"{part}_tokens"]
        if not path.is_file() or path.stat().st_size != 2 * n or n == 0:
            raise UserError(f"{path} should be {n} tokens, and is not: prepare the data again")
        arrays.append(np.memmap(path, dtype=np.uint16, mode="r"))
    return *arrays, meta


if __name__ == "__main__":
    with one_line_errors():
        config, _ = parse_flags(DataConfig, __doc__)
        folder = prepare(config)
        meta = read_meta(folder)
        print(f"{folder}: {meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} "
              f"for validation, {meta['tokenizer']} tokenizer")
