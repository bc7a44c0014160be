"""Tests. The model is compared with `reference_sequence`, a slow float64 version of the equations
in loops over layers and heads; the scripts run on small data in temporary folders.

    pip install pytest && pytest -q
"""

import hashlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import bench
import prepare_data
import sample
import train
from model import GPT, USED_BY, VARIANTS, GPTConfig, KVCache, draw, pretrained_source
from prepare_data import DataConfig, UserError, get_tokenizer, prepare
from train import TrainConfig

HERE = Path(__file__).parent
torch.set_num_threads(1)  # everything here is tiny
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start too

COMBINATIONS = ["svformer+gqa", "svformer+cla", "cla+gqa", "resformer+neutreno", "neutreno+gqa",
                "svformer+denseformer", "crosslayer+cla", "crosslayer+gqa+denseformer",
                "resformer+neutreno+denseformer+cla+gqa"]
ABLATIONS = {
    "on 3 and 5": dict(attention="resformer", residual_layers=(5, 3, 5), value_lambda=(0.3, 0.9)),
    "learnable": dict(attention="resformer+denseformer", value_residual="learnable",
                      residual_layers=(2, 4)),
    "plus": dict(attention="resformer+gqa", value_residual="plus"),
    "plus with cla": dict(attention="resformer+cla", value_residual="plus"),
    "none": dict(attention="resformer", residual_layers=()),
    "neutreno 0.7": dict(attention="neutreno", neutreno_lambda=0.7),
    "theta and eps": dict(attention="gqa", n_kv_head=1, rope_theta=100_000.0, norm_eps=0.1),
}
EVERY = [*VARIANTS, *COMBINATIONS, *ABLATIONS]


def tiny_config(attention, **changes):
    settings = dict(vocab_size=37, block_size=32, n_layer=5, n_head=4, n_embd=32, n_ffn=20,
                    attention=attention)
    return GPTConfig(**(settings | ABLATIONS.get(attention, {}) | changes))


def tiny_model(attention, dtype=torch.float64, **changes):
    """A model whose numbers are all random and large, so that no term hides behind another."""
    torch.manual_seed(0)
    model = GPT(tiny_config(attention, **changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def tokens(B=2, T=24, seed=1):
    return torch.randint(37, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- the reference: the equations, and nothing clever -------------------------------------------


def reference_norm(c, x, w):
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + c.norm_eps) * w


def reference_rope(c, x):  # (T, hs)
    """Turns a pair, number j and number j + hs / 2, at position t by t x theta^(-2j / hs)."""
    T, hs = x.shape
    pairs = torch.complex(x[:, :hs // 2], x[:, hs // 2:])
    j = torch.arange(hs // 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), c.rope_theta ** (-2 * j / hs))
    turned = pairs * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), dim=1)


def reference_lambdas(c, P, n):
    """The weights of V_1 and V_n in layer n, counted from 1; None if it doesn't mix them."""
    own_values = range(3, c.n_layer + 1, 2) if "cla" in c.attention else range(2, c.n_layer + 1)
    layers = sorted(set(own_values if c.residual_layers is None else c.residual_layers))
    if "resformer" not in c.attention or n not in layers:
        return None
    if c.value_residual == "fixed":
        return c.value_lambda
    l1, l2 = P["value_l1"], P["value_l2"]
    if c.value_residual == "plus":
        l1 = P["value_total"] * torch.exp(l1) / torch.exp(l1).sum()
    return l1[layers.index(n)], l2[layers.index(n)]


def reference_sequence(c, P, idx, watch=None):
    """One sequence (T,) -> logits (T, V), from the parameters P by name. watch, if given, becomes
    a list with each layer's (A_n of each head, V_n of each key/value head, hidden states)."""
    names, T, hs = c.attention.split("+"), len(idx), c.n_embd // c.n_head
    kv_heads = (c.n_kv_head or c.n_head // 2) if "gqa" in names else c.n_head
    neutreno = c.neutreno_lambda or (0.2 if "resformer" in names else 0.4)
    hidden = P["embed_tokens.weight"][idx]
    outputs, K, V = [hidden], {}, {}
    for n in range(1, c.n_layer + 1):
        def W(name):
            return P[f"layers.{n - 1}.{name}.weight"]

        def heads(name):  # (T, hs) each
            return (x @ W(f"self_attn.{name}").T).split(hs, dim=1)

        x = reference_norm(c, hidden, W("input_layernorm"))
        if "cla" in names and n % 2 == 0:
            K[n], V[n] = K[n - 1], V[n - 1]
        else:
            K[n] = [reference_rope(c, k) for k in heads("k_proj")]
            V[n] = V[1] if "svformer" in names and n > 1 else heads("v_proj")
            if lambdas := reference_lambdas(c, P, n):
                l1, l2 = lambdas
                V[n] = [l1 * first + l2 * own for first, own in zip(V[1], V[n])]
        U, attention = [], []
        for h, q in enumerate(heads("q_proj")):
            g = h * kv_heads // c.n_head  # the key/value head of query head h
            k, v = K[n][g], V[n][g]
            if "crosslayer" in names and n > 1:
                k, v = torch.cat((K[1][g], k)), torch.cat((V[1][g], v))
            scores = reference_rope(c, q) @ k.T / math.sqrt(hs)
            future = (torch.arange(len(k)) % T)[None, :] > torch.arange(T)[:, None]
            A = torch.softmax(scores.masked_fill(future, -math.inf), dim=1)
            attention.append(sum(A.split(T, dim=1)))
            u = A @ v
            if "neutreno" in names and n > 1:
                u = u + neutreno * (V[1][g] - V[n][g])
            U.append(u)
        hidden = hidden + torch.cat(U, dim=1) @ W("self_attn.o_proj").T
        x = reference_norm(c, hidden, W("post_attention_layernorm"))
        gate = x @ W("mlp.gate_proj").T
        swish = gate / (1 + torch.exp(-gate))
        hidden = hidden + (swish * (x @ W("mlp.up_proj").T)) @ W("mlp.down_proj").T
        if watch is not None:
            watch.append((attention, V[n], hidden))
        if "denseformer" in names:
            outputs.append(hidden)
            hidden = sum(P[f"depth_weights.{n - 1}"][i] * outputs[i] for i in range(n + 1))
    return reference_norm(c, hidden, P["norm.weight"]) @ P["lm_head.weight"].T


@pytest.mark.parametrize("attention", EVERY)
def test_logits_loss_and_gradients_equal_the_reference(attention):
    model, idx, targets = tiny_model(attention), tokens(T=11), tokens(T=11, seed=2)
    P = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    targets[0, ::3] = -100  # these do not count
    expected = torch.stack([reference_sequence(model.config, P, row) for row in idx])
    log_p = expected.log_softmax(dim=-1).gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    expected_loss = -log_p[targets != -100].mean()
    expected_loss.backward()

    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    assert model(idx)[1] is None
    loss.backward()
    assert abs(loss.item() - expected_loss.item()) < 1e-9
    for name, p in model.named_parameters():
        assert p.grad is not None, name  # no parameter without a use
        torch.testing.assert_close(p.grad, P[name].grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("attention", EVERY)
def test_decoding_with_the_cache_equals_the_full_pass(attention):
    """And so no token sees a later one: in pieces, the later ones aren't there yet."""
    model, idx = tiny_model(attention), tokens(T=29)
    cache = KVCache(model.config, 2, 29, dtype=torch.float64)
    pieces = [model(piece, cache=cache)[0] for piece in idx.split([7, 1, 1, 9, 2, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx)[0], rtol=0, atol=1e-9)
    assert cache.length == 29


def test_the_loss_is_in_float32_under_autocast_and_in_a_model_of_16_bits():
    model, idx, targets = tiny_model("vanilla", torch.float32), tokens(), tokens(seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(idx, targets)
    for logits, loss in (under_autocast, model.bfloat16()(idx, targets)):
        expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("n_layer", [1, 4, 5])
@pytest.mark.parametrize("attention", [*VARIANTS, *COMBINATIONS])
def test_cache_holds_what_the_formula_says(attention, n_layer):
    config = tiny_config(attention, n_layer=n_layer)
    own_keys = math.ceil(n_layer / 2) if "cla" in attention else n_layer  # layers that have some
    own_values = 1 if "svformer" in attention else own_keys
    h = (2 if "gqa" in attention else 4) * 8  # key/value heads x head size
    a_token = (own_keys + own_values) * h * 2  # two bytes a number
    cache = KVCache(config, batch_size=3, max_len=11, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 11 * a_token
    assert GPT(config).kv_bytes_per_token(torch.bfloat16) == a_token


def test_variants_of_one_seed_start_alike_from_normal_distributions():
    models = []
    for changes in ({}, dict(attention="svformer"), dict(init="paper")):
        torch.manual_seed(3)
        config = tiny_config(**dict(attention="vanilla", n_embd=256, n_ffn=512) | changes)
        models.append(GPT(config).state_dict())
    p, svformer, paper = models
    for name, same in svformer.items():
        assert torch.equal(p[name], same), name
    assert not torch.equal(p["layers.1.mlp.up_proj.weight"], p["layers.2.mlp.up_proj.weight"])
    for name, std in (("layers.1.self_attn.q_proj", 1 / 16), ("layers.1.mlp.up_proj", 1 / 16),
                      ("layers.1.self_attn.o_proj", 1 / 16 / math.sqrt(10)), ("lm_head", 1 / 16),
                      ("layers.1.mlp.down_proj", 1 / math.sqrt(512 * 10)), ("embed_tokens", 1)):
        drawn = paper[f"{name}.weight"] / 0.02  # the same numbers, all of one size
        assert drawn.std().item() == pytest.approx(1, rel=0.03), name
        torch.testing.assert_close(p[f"{name}.weight"], drawn * std)


def test_learned_weights_and_defaults_start_where_they_should():
    learned = GPT(tiny_config("learnable", value_lambda=(0.25, 0.75)))
    assert learned.value_l1.tolist() == [0.25] * 2 and learned.value_l2.tolist() == [0.75] * 2
    for pair in GPT(tiny_config("plus with cla")).value_lambdas().values():  # of V_1, of V_n
        assert [x.item() for x in pair] == pytest.approx([1, 0.5])
    assert GPT(tiny_config("denseformer")).depth_weights[2].tolist() == [0, 0, 0, 1]
    assert tiny_config("gqa", n_head=1).kv_heads == 1
    assert replace(tiny_config("gqa"), attention="vanilla").kv_heads == 4
    assert train.model_config(TrainConfig(), vocab_size=50257).vocab_size == 50304
    papers_82m = GPTConfig(vocab_size=50304, block_size=2048, n_layer=8, n_head=8, n_embd=512,
                           attention="vanilla")
    assert GPT(papers_82m).num_params() == 81_928_704


def test_every_field_of_the_model_is_a_flag_with_the_same_default():
    own = {"vocab_size", "rope_theta", "norm_eps"}  # the data's; a pretrained model's
    for f in fields(GPTConfig):
        assert f.name in own or getattr(TrainConfig, f.name) == f.default, f.name
    # A flag of one variant's is compared with the reference where a row of ABLATIONS sets it.
    assert USED_BY.keys() <= {name for row in ABLATIONS.values() for name in row}


@pytest.mark.parametrize("changes", [  # the first field of each is the one to be named
    dict(n_embd=36), dict(n_kv_head=3, attention="gqa"), dict(n_kv_head=2), dict(init="xavier"),
    dict(attention="resnet"), dict(attention="vanilla+gqa"), dict(attention="gqa+gqa"),
    dict(n_kv_head=0, attention="gqa"), dict(n_ffn=0), dict(n_head=0), dict(vocab_size=0),
    dict(attention="resformer+svformer"), dict(attention="svformer+neutreno"),
    dict(attention="crosslayer+resformer"), dict(attention="crosslayer+svformer"),
    dict(attention="neutreno+crosslayer"), dict(residual_layers=(1,)),
    dict(residual_layers=(5, 6)), dict(residual_layers=(3, 4), attention="resformer+cla"),
    dict(residual_layers=(2,), attention="svformer"), dict(value_residual="learned"),
    dict(value_residual="plus", attention="gqa"), dict(value_lambda=0.5),
    dict(value_lambda=(1, 2, 3)), dict(value_lambda=(2, 1), attention="vanilla"),
    dict(neutreno_lambda=3.0, attention="svformer")])
def test_a_bad_config_is_refused_by_the_name_of_its_field(changes):
    with pytest.raises(ValueError, match=f"^{list(changes)[0]}"):
        tiny_config(**dict(attention="resformer") | changes)


def test_grouped_heads_are_repeated_for_all_but_a_single_query():
    """A card without a kernel for grouped heads would hold T x T scores otherwise."""
    model, idx = tiny_model("gqa"), tokens()
    cache = KVCache(model.config, 2, 25, dtype=torch.float64)
    for piece, shape, grouped in ((idx, (2, 4, 24, 8), False), (idx[:, :1], (2, 2, 25, 8), True)):
        with patch.object(F, "scaled_dot_product_attention",
                          wraps=F.scaled_dot_product_attention) as attention:
            model(piece, cache=cache)
        q, k, v = attention.call_args.args
        assert k.shape == v.shape == shape
        assert attention.call_args.kwargs["enable_gqa"] == grouped


def generate(model, idx, n, **options):
    return torch.stack(list(model.generate(idx, n, **options)), dim=1)


@pytest.mark.parametrize("attention", ["crosslayer", "svformer+cla+gqa"])
def test_greedy_text_is_the_argmax_in_a_sliding_window(attention):
    model, prompt = tiny_model(attention), tokens(T=5)
    text, start = prompt, 0
    for end in range(5, 55):  # 32 fit: the window slides more than once
        if end - start > 32:
            start = end - 16
        best = model(text[:, start:])[0][:, -1:].argmax(dim=-1)
        text = torch.cat((text, best), dim=1)
    expected = text[:, 5:]
    assert torch.equal(generate(model, prompt, 50, temperature=0), expected)
    assert torch.equal(generate(model, prompt, 50, temperature=0, use_cache=False), expected)
    assert torch.equal(generate(model, prompt, 50, top_k=1, seed=5), expected)


def test_a_seed_fixes_the_text():
    model, prompt = tiny_model("svformer"), tokens(B=3, T=4)
    first = generate(model, prompt, 50, seed=7)
    torch.manual_seed(99)  # the generator is its own: the global one has no say
    assert torch.equal(generate(model, prompt, 50, seed=7), first)
    assert torch.equal(generate(model, prompt, 50, seed=7, use_cache=False), first)
    assert not torch.equal(generate(model, prompt, 50, seed=8), first)
    token = next(model.generate(prompt, 1, seed=2**62))[:, None]
    model(token, token)[1].backward()  # drawn tokens can be trained on


def test_text_is_generated_without_cudnns_attention():
    model, seen, enabled = tiny_model("vanilla"), [], torch.backends.cuda.cudnn_sdp_enabled
    model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(enabled()))
    for _ in model.generate(tokens(), 3):
        assert enabled()  # as it was, for whoever asked for a token
    assert seen == [False] * 3


def test_draw_follows_the_softmax_of_the_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(1)
    got = torch.bincount(draw(logits, 0.7, 3, generator), minlength=4) / 20_000
    expected = torch.softmax(torch.tensor([2.0, 1.0, 0.5]) / 0.7, dim=0)
    torch.testing.assert_close(got[:3], expected, rtol=0, atol=0.015)
    assert got[3] == 0
    everything = torch.bincount(draw(logits, 50.0, None, generator), minlength=4) / 20_000
    assert everything.min() > 0.2
    ties = draw(torch.zeros(50, 4), 1.0, 2, generator)
    assert len(set(ties.tolist())) == 2  # not more than top_k
    for temperature in (0, 1e-30):
        assert draw(logits[:50] * 1e4, temperature, 9).eq(0).all()


def test_what_a_model_cannot_do_is_refused():
    model, idx = tiny_model("svformer"), tokens()
    with pytest.raises(ValueError, match="^33 tokens: block_size or max_len allows 32"):
        model(tokens(T=33))
    for wrong, said in ((tokens(T=9), "^9 tokens: .* 8$"), (tokens(B=3, T=8), "differ in batch")):
        with pytest.raises(ValueError, match=said):
            model(wrong, cache=KVCache(model.config, 2, 8))
    for bad in (dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0),
                dict(idx=tokens(T=0))):
        with pytest.raises(ValueError, match=f"^{list(bad)[0]}"):
            next(model.generate(**dict(idx=idx, max_new_tokens=9) | bad))
    with pytest.raises(ValueError, match=r"^targets \(24, 2\) must have the shape of idx, \(2, 24"):
        model(idx, idx.T)  # as many, but not the same ones


def test_streamed_text_keeps_characters_whole():
    tokenizer, text = get_tokenizer("byte"), "naïve → 漢字 🙂"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.n_vocab == 257
    pieces = list(prepare_data.stream_text(tokenizer, ids + [256, 300]))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and "漢" in pieces
    assert "".join(prepare_data.stream_text(tokenizer, ids[:-1])).endswith("\ufffd")


# ---- data ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    """Writes a text, or bytes, into a file whose folder need not exist."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def contents(folder):
    """All files and folders in it."""
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


@pytest.mark.parametrize("text", ["To be,\r\nor not to be?\n" * 3000, "漢" * 1001, "x" * 20])
def test_a_file_is_split_at_nine_tenths_of_its_characters(folder, text):
    write("my text.txt", text)
    out = prepare(DataConfig("my text.txt"))
    train_ids, val_ids, meta = prepare_data.load("my text")
    cut = len(text) * 9 // 10
    assert out == Path("data/my text") and bytes([*train_ids]) == text[:cut].encode()
    assert bytes([*val_ids]) == text[cut:].encode()
    ids = train_ids.tobytes() + val_ids.tobytes()
    assert meta["sha256"] == hashlib.sha256(ids).hexdigest()
    assert (meta["train_tokens"], meta["val_bytes"]) == (len(train_ids), len(val_ids))
    assert prepare_data.load(str(out))[2] == meta


def test_a_folder_is_split_by_documents(folder, capsys):
    texts = {f"src/d{i % 3}/{i:02}.txt": f"document {i} <|endoftext|>" * (i + 1)
             for i in range(25)}
    left_out = {"src/binary": "\0\1", "src/latin1": b"un \xe9t\xe9"}
    hidden = {"src/empty": "", "src/.hidden": "no", "src/.git/file": "no"}  # not even counted
    for name, text in (texts | left_out | hidden).items():
        write(name, text)

    def documents(ids):
        parts = np.split(ids, np.flatnonzero(ids == 256))
        return [bytes(part[part < 256].astype(np.uint8)).decode() for part in parts]

    prepare(DataConfig("src"))
    said = capsys.readouterr().out.replace(os.sep, "/")
    assert "src: 25 files of UTF-8 text, 2 left out" in said
    assert "src/binary (binary)" in said and "src/latin1 (byte 3 is no UTF-8)" in said
    train_ids, val_ids, meta = prepare_data.load("src")
    order = [texts[name] for name in sorted(texts)]
    training = order[:9] + order[10:19] + order[20:]
    assert documents(train_ids) == training and documents(val_ids) == [order[9], order[19]]
    assert meta["train_bytes"] == len("".join(training))

    write("two/1.txt", "to train on")
    write("two/2.txt", "to validate on")
    prepare(DataConfig("two"))
    assert documents(prepare_data.load("two")[1]) == ["to validate on"]
    # What was written into the folder before is none of its texts.
    first, second = (prepare_data.load(str(prepare(DataConfig("."))))[2] for _ in range(2))
    assert first == second


def test_stdlib_is_this_pythons_and_the_same_each_time(folder, monkeypatch):
    def names():
        return [path.name for path in prepare_data.find_texts("stdlib", Path("data/stdlib"))]

    assert "argparse.py" in names()
    for name in ("json/e.py", "a.py", "b.txt", "test/c.py", "site-packages/d.py"):
        write(f"tests/lib/{name}", f"# {name}\n" * 100)
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda _: str(folder / "tests/lib"))
    assert names() == ["a.py", "e.py"]
    for _ in range(2):  # what a first run of train.py prepares by itself; the second finds it
        _, _, meta = train.load_data(TrainConfig())
        assert meta["source"] == "stdlib" and meta["train_tokens"] == 100 * len("# a.py\n")
        monkeypatch.setattr(train, "prepare", None)


@pytest.fixture
def web(folder, monkeypatch):
    """A folder that stands for the web. Tests delete a file in it to show that it isn't fetched
    again."""
    monkeypatch.setattr(prepare_data, "FINEWEB_URL", (folder / "web").as_uri() + "/")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", (folder / "web/input.txt").as_uri())
    return folder / "web"


def test_values_that_no_flag_takes_are_refused_when_data_is_prepared_too(folder):
    for changes in (dict(shards=0), dict(shards=1.5), dict(tokenizer="word")):
        with pytest.raises(UserError, match=f"^--{list(changes)[0]} must be"):
            prepare(DataConfig("fineweb", **changes))


def test_gpt2_tokens(folder):
    try:
        tokenizer = get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    text = "def naïve(x_1):\n\t\treturn 42  # <|endoftext|> don't!?\n" * 50
    write("code.txt", text)
    prepare(DataConfig("code.txt", tokenizer="gpt2"))
    train_ids, val_ids, meta = prepare_data.load("code-gpt2")
    assert tokenizer.decode([*train_ids, *val_ids]) == text
    assert meta["vocab_size"] == 50257 and tokenizer.eot_token not in train_ids


def test_gpt2_without_its_files_says_what_to_do(monkeypatch):
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", Mock(side_effect=ConnectionError))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer byte"):
        get_tokenizer("gpt2")


def test_shakespeare_is_downloaded_once_and_checked(folder, web, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    with pytest.raises(UserError, match="input.txt.*run this again"):
        prepare(DataConfig("shakespeare"))
    write(web / "input.txt", b"<html>not found</html>")
    with pytest.raises(UserError, match="SHA-256"):
        prepare(DataConfig("shakespeare"))
    write(web / "input.txt", text)
    assert not list(Path("data/shakespeare").iterdir())
    prepare(DataConfig("shakespeare"))
    (web / "input.txt").unlink()
    prepare(DataConfig("shakespeare"))
    assert bytes([*prepare_data.load("shakespeare")[0]]) == text[:len(text) * 9 // 10]


def shard(ids):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + np.asarray(ids, dtype="<u2").tobytes()


def test_fineweb_is_whole_shards_and_goes_on_with_those_that_are_there(folder, web, monkeypatch):
    byte = get_tokenizer("byte")
    byte.name = "gpt2"  # GPT-2's own would be another download
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: byte)
    config, first = DataConfig("fineweb", shards=2), web / "fineweb_train_000001.bin"
    good = shard([1, 2])  # 4 bytes each of magic number, version, count
    for wrong in (b"!" + good[1:], good[:4] + b"!" + good[5:], good[:-2], good + b"!", b""):
        write(first, wrong)
        with pytest.raises(UserError, match="no shard of tokens"):
            prepare(config)
        assert not list(Path("data/fineweb").iterdir())

    ids = [np.arange(257), np.arange(100), np.arange(200)]  # 256 is end-of-text
    write(first, shard(ids[0]))
    write(web / "fineweb_train_000002.bin", shard(ids[1]))
    with pytest.raises(UserError, match="run this again"):  # no validation shard yet
        prepare(config)
    assert not Path("data/fineweb/meta.json").exists()
    first.unlink()
    write(web / "fineweb_val_000000.bin", shard(ids[2]))
    prepare(config)
    train_ids, val_ids, meta = prepare_data.load("fineweb")
    assert np.array_equal(train_ids, np.concatenate(ids[:2])) and np.array_equal(val_ids, ids[2])
    assert meta["train_bytes"] == np.count_nonzero(train_ids != 256)


# ---- training -----------------------------------------------------------------------------------

SMALL = TrainConfig(dataset="text", n_layer=4, n_head=2, n_embd=16, block_size=32, batch_size=6,
                    max_steps=12, eval_every=4, eval_tokens=512, warmup_steps=2, device="cpu",
                    out_dir="run")


@pytest.fixture
def small_run(folder):
    """A config that trains in a second, on 40 kB of text."""
    write("text.txt", "".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    prepare(DataConfig("text.txt"))
    return SMALL


def as_flags(config):
    return [f"--{name}={value}" for name, value in vars(config).items()
            if value != getattr(TrainConfig, name)]


def run(config):
    return train.train(config, verbose=False)[1]


def losses(history):
    """All the losses of training and validation."""
    return [record[key] for record in history for key in ("loss", "val_loss") if key in record]


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def state(folder):
    """What a run has come to: all in its checkpoint but times and flags."""
    ckpt = train.load_checkpoint(Path(folder, "ckpt.pt"))
    return ckpt["model"], ckpt["optimizer"]["state"], ckpt["scaler"], losses(ckpt["history"])


def fresh_model_and_batches(config):
    """The model that a run on the text starts with; a function step -> all its x, all its y."""
    data = prepare_data.load("text")[0].astype(np.int64)

    def batch(step):
        shape = config.grad_accum, config.batch_size
        starts = np.random.default_rng((config.seed, step)).integers(0, len(data) - 32, shape)
        ids = torch.tensor(np.stack([data[start:start + 33] for start in starts.flat]))
        return ids[:, :-1], ids[:, 1:]

    torch.manual_seed(config.seed)
    return GPT(train.model_config(config, 257)), batch


def at_step(monkeypatch, step, action):
    """From now on, when a run comes to a step (0, 1, ...), it does the action first."""
    learning_rate = train.learning_rate

    def patched(config, now):
        if now == step:
            action()
        return learning_rate(config, now)

    monkeypatch.setattr(train, "learning_rate", patched)


def stop(*_):
    raise KeyboardInterrupt  # as if killed


def cut_save(obj, f):
    f.write(b"half a checkpoint")
    stop()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close(small_run, dtype):
    config = replace(small_run, lr=1e-2)
    exact, rounded = run(config), run(replace(config, dtype=dtype, out_dir="rounded"))
    assert rounded[-1]["val_loss"] == pytest.approx(exact[-1]["val_loss"], rel=0.02)
    assert rounded[-1]["val_loss"] != exact[-1]["val_loss"]


# The scale alone makes a gradient overflow; or one is infinite, as if another process's was.
@pytest.mark.parametrize("init_scale, factor", [(2.0**125, 1.0), (2.0**8, math.inf)])
def test_a_float16_step_that_overflows_is_left_out(small_run, monkeypatch, init_scale, factor):
    sum_over = train.sum_over_processes

    def overflow(tensors):
        if len(tensors) > 1:
            tensors[3] *= factor  # a gradient; the first is the loss
        sum_over(tensors)

    monkeypatch.setattr(train, "sum_over_processes", overflow)
    monkeypatch.setattr(torch.amp, "GradScaler",
                        partial(torch.amp.GradScaler, init_scale=init_scale))
    config = replace(small_run, dtype="float16", max_steps=1)
    run(config)
    weights, _, scaler, _ = state("run")
    start, _ = fresh_model_and_batches(config)
    torch.testing.assert_close(weights, start.state_dict(), rtol=0, atol=0)
    assert scaler["scale"] == init_scale / 2


def test_learning_rate_rises_then_follows_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate(config, step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 6 / 8)) / 2)
    assert rates[12] == rates[13] == pytest.approx(0.2)
    assert train.learning_rate(replace(config, min_lr=None), 12) == pytest.approx(0.1)
    assert train.learning_rate(replace(config, warmup_steps=20), 12) == pytest.approx(13 / 20)


def test_a_new_variants_scalar_starts_as_it_was_made_and_is_trained():
    model = tiny_model("vanilla", torch.float32)
    model.gain = torch.nn.Parameter(torch.tensor(0.3))
    model.init_weights(0)
    assert model.gain.item() == np.float32(0.3)
    groups = train.make_optimizer(model, TrainConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_steps_are_adamws_on_the_whole_batch_with_clipping_and_without_decay_of_vectors(small_run):
    config = replace(small_run, attention="denseformer", batch_size=2, grad_accum=3, max_steps=3,
                     eval_every=2, lr=1e-2, grad_clip=0.3, weight_decay=0.5)
    history = run(config)
    model, batch = fresh_model_and_batches(config)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.5),
                                   dict(params=vectors, weight_decay=0)], betas=(0.9, 0.95))
    for step, lr in enumerate((5e-3, 1e-2, 1e-2)):
        model.zero_grad()
        _, loss = model(*batch(step))
        loss.backward()
        assert history[step]["step"] == step + 1
        assert history[step]["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3) > 0.3
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    torch.testing.assert_close(state("run")[0], model.state_dict(), rtol=0, atol=1e-4)


def test_the_last_evaluation_is_of_the_model_that_is_saved(small_run):
    history = run(replace(small_run, max_steps=3, eval_every=2))
    assert ["val_loss" in record for record in history] == [False, True, True]
    model, _ = train.load_run(Path("run"))
    val_loss = train.evaluate(model, prepare_data.load("text")[1], small_run, torch.device("cpu"))
    assert history[-1]["val_loss"] == val_loss
    assert history[-1]["bits_per_byte"] == pytest.approx(val_loss / math.log(2))


@pytest.mark.parametrize("eval_tokens, n", [(512, 12), (96, 3), (10**9, 108), (1, 1)])
def test_evaluation_is_the_mean_over_windows_evenly_spread(small_run, eval_tokens, n):
    config = replace(small_run, eval_tokens=eval_tokens)
    data = prepare_data.load("text")[1].astype(np.int64)[:3500]
    model = tiny_model("vanilla", torch.float32, vocab_size=257)
    got = train.evaluate(model, data, config, torch.device("cpu"))
    starts = np.arange(n) * (len(data) - 33) // max(1, n - 1)  # of 16 that fit, whole batches
    text = torch.tensor(data[starts[:, None] + np.arange(33)])
    _, expected = model(text[:, :-1], text[:, 1:])
    assert got == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(dtype="bfloat16"), dict(dtype="float16"),
                                     dict(attention="svformer+gqa"), dict(value_residual="plus")])
def test_killed_anywhere_and_resumed_it_is_bit_identical(small_run, monkeypatch, changes):
    config = replace(small_run, eval_every=3, **changes)
    run(config)
    killed = replace(config, out_dir="killed", resume=True)
    for place in (1, 4, 8, 11):  # the checkpoints come after steps 3, 6, 9 and 12
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            at_step(context, place, stop)
            run(killed)
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(torch, "save", cut_save)
            run(killed)
        if place > 3:
            steps = train.load_checkpoint(Path("killed/ckpt.pt"))["history"]
            assert len(steps) == place // 3 * 3 and read_log("killed")[:len(steps)] == steps
    history = run(killed)
    torch.testing.assert_close(state("killed"), state("run"), rtol=0, atol=0)
    assert history == read_log("killed") and not list(Path("killed").glob("*.part"))
    assert run(killed) == history  # complete: nothing is trained


@pytest.mark.parametrize("changes", [
    dict(lr=1.0), dict(min_lr=0.1), dict(weight_decay=0.9), dict(grad_clip=2.0), dict(seed=5),
    dict(warmup_steps=3), dict(batch_size=3), dict(n_layer=5), dict(attention="cla"),
    dict(block_size=16), dict(value_lambda=(2, 1)), dict(residual_layers=(2,)), dict(n_ffn=8),
    dict(init="paper")])
def test_a_run_is_not_resumed_with_flags_that_make_it_another(small_run, changes):
    run(replace(small_run, max_steps=1))
    with pytest.raises(UserError, match=f"^--{list(changes)[0]} .*is .*, but the run in run has"):
        run(replace(small_run, resume=True, **changes))


def test_a_resumed_run_may_say_the_same_in_other_words_and_change_evaluation_and_length(small_run):
    run(small_run)
    same = dict(batch_size=3, grad_accum=2, lr=8e-3, min_lr=8e-4, residual_layers=(4, 3, 2),
                n_ffn=56, neutreno_lambda=None)
    changed = dict(max_steps=14, eval_every=3, eval_tokens=64, dtype="bfloat16")
    assert len(run(replace(small_run, resume=True, **same, **changed))) == 14
    ckpt = torch.load("run/ckpt.pt")
    del ckpt["config"]["init"], ckpt["config"]["max_steps"]  # as if these flags were newer
    torch.save(ckpt, "run/ckpt.pt")
    assert len(run(replace(small_run, max_steps=15, resume=True))) == 15


def test_overwrite_deletes_the_old_run_so_that_resume_never_goes_on_with_it(
        small_run, monkeypatch, capsys):
    run(small_run)
    other = replace(small_run, seed=5)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        at_step(context, 2, stop)
        run(replace(other, overwrite=True))
    assert not Path("run/ckpt.pt").exists() and read_log("run") == []
    _, resumed = train.train(replace(other, resume=True))
    assert "no checkpoint yet, so this starts at step 1" in capsys.readouterr().out
    assert losses(resumed) == losses(run(replace(other, out_dir="other")))


def test_a_run_stops_before_it_replaces_another_that_was_started_in_its_folder(
        small_run, monkeypatch):
    short = replace(small_run, overwrite=True, max_steps=2)
    with monkeypatch.context() as context:
        at_step(context, 6, lambda: run(short))  # after the first evaluation, before the second
        with pytest.raises(UserError, match="log.jsonl is of another run"):
            run(small_run)
    assert len(train.load_checkpoint(Path("run/ckpt.pt"))["history"]) == len(read_log("run")) == 2


@pytest.mark.parametrize("changes", [
    dict(compile=False), dict(dtype="int8"), dict(init="xavier"), dict(lr=np.float64(1e-2)),
    dict(value_lambda=(np.float64(1), 1.0)), dict(seed=None), dict(out_dir=Path("x")),
    dict(eval_every=0), dict(n_head=0), dict(lr=math.inf), dict(warmup_steps=0.05),
    dict(max_steps=1e3), dict(lr="1e-3"), dict(n_layer=True), dict(resume=1), dict(lr=(1e-3,)),
    dict(residual_layers=3), dict(residual_layers=[2, 3]), dict(value_lambda=(math.nan, 1.0)),
    dict(neutreno_lambda=math.inf)])
def test_values_that_no_flag_takes_are_refused_before_any_work(small_run, changes):
    before = contents(".")
    with pytest.raises(UserError, match=f"^--{list(changes)[0]} must be"):
        run(replace(small_run, **changes))
    assert contents(".") == before


@pytest.mark.parametrize("flags, folder", [
    ("", "out/resformer"), ("--max_steps 5 --device cpu --resume", "out/resformer"),
    ("--value_lambda 2 1 --grad_clip 0.5", "out/resformer-value_lambda_2_1-grad_clip_0.5"),
    ("--attention cla+gqa --n_layer 4 --dataset some/folder --lr 0.002",
     "out/cla+gqa-n_layer_4-dataset_folder-lr_0.002"),
    ("--init paper", "out/resformer-init_paper"), ("--out_dir x --seed 3", "x"),
    ("--batch_size 8 --grad_accum 2", "out/resformer"),
    ("--grad_accum 2", "out/resformer-batch_size_32")])
def test_a_runs_folder_is_named_after_what_makes_it_another_run(flags, folder):
    config, _ = prepare_data.parse_flags(TrainConfig, "", flags.split())
    assert train.run_folder(config).as_posix() == folder


@pytest.mark.parametrize("attention, dtype", [
    ("resformer+neutreno+denseformer", "bfloat16"), ("crosslayer+cla", "float16"),
    ("svformer+gqa", "float32")])
def test_the_model_compiles_into_one_graph_each_way(small_run, monkeypatch, attention, dtype):
    config = replace(small_run, attention=attention, dtype=dtype, n_layer=2, grad_accum=2,
                     max_steps=4, eval_every=1)
    expected, graphs = run(config), CompileCounterWithBackend("aot_eager")
    counted = partial(torch.compile, backend=graphs, fullgraph=True)
    monkeypatch.setattr(torch, "compile", counted)
    # Outside tests torch allows 8 recompilations; with 2 a third graph is seen.
    with torch._dynamo.config.patch(recompile_limit=2):
        history = run(replace(config, compile="on", out_dir="compiled"))
    assert graphs.frame_count == 2  # training and evaluation
    assert losses(history) == pytest.approx(losses(expected), rel=1e-3)


@pytest.mark.parametrize("found, rank, expected", [
    (torch.device("cuda"), 1, "cuda:1"), (torch.device("mps"), 0, "mps"), (None, 0, "cpu")])
def test_auto_takes_the_accelerator_and_each_process_a_gpu_of_its_own(
        monkeypatch, found, rank, expected):
    for place, name in ((torch.cuda, "set_device"), (torch, "set_float32_matmul_precision"),
                        (torch, "zeros")):
        monkeypatch.setattr(place, name, Mock())
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setenv("LOCAL_RANK", str(rank))  # torchrun's
    assert str(train.pick_device("auto")) == expected


def test_sixteen_bits_and_compilation_are_for_cuda_unless_asked_for(monkeypatch):
    def dtype(device, **flags):
        return train.pick_dtype(TrainConfig(**flags), torch.device(device))

    assert dtype("cpu") == dtype("mps") == torch.float32
    assert dtype("cpu", dtype="float16") == torch.float16
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert dtype("cuda") == expected
    with pytest.raises(UserError, match="--dtype bfloat16: on MPS"):
        dtype("mps", dtype="bfloat16")
    for choice, device, expected in (("auto", "cpu", False), ("auto", "cuda", True),
                                     ("off", "cuda", False), ("on", "cpu", True)):
        assert train.compiles(TrainConfig(compile=choice), torch.device(device)) == expected


def test_two_processes_go_on_with_a_run_of_one_and_give_its_losses(small_run):
    # 5 windows: 3 for one process, 2 for the other.
    config = replace(small_run, grad_accum=2, eval_tokens=160)
    run(config)
    shutil.copytree("run", "both")
    one = run(replace(config, max_steps=16, resume=True))
    words = [*as_flags(replace(config, max_steps=16, out_dir="both")), "--resume"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", str(HERE / "train.py"), *words],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(read_log("both")) == pytest.approx(losses(one), abs=1e-5)
    assert done.stdout.count("nats per token") == 2  # each line once: an evaluation, the end


def test_without_torchrun_there_is_one_process_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = runpy.run_path(str(HERE / "train.py"))
    assert (names["RANK"], names["WORLD"]) == (0, 1)


def test_the_batch_must_divide_by_the_processes(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(UserError, match="--batch_size 5 must divide by the 2 processes"):
        train.check(TrainConfig(batch_size=5))


def test_a_loss_that_is_not_finite_stops_at_once_and_leaves_the_checkpoint(small_run, monkeypatch):
    with pytest.raises(UserError, match="step 3: the loss is not finite: try a lower --lr"):
        run(replace(small_run, attention="vanilla", lr=1e30, warmup_steps=0))
    assert [math.isfinite(record["loss"]) for record in read_log("run")] == [True, True, False]
    run(replace(small_run, max_steps=4))
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *_: math.inf)
    with pytest.raises(UserError, match="step 8: the loss is not finite"):
        run(replace(small_run, resume=True))
    assert Path("run/ckpt.pt").read_bytes() == before


def test_two_writers_of_a_file_do_not_see_each_other(folder):
    path = Path("some/file")
    with prepare_data.replace_file(path) as first:
        first.write(b"one")
        with prepare_data.replace_file(path) as second:
            second.write(b"the other")
        assert path.read_bytes() == b"the other"
    assert path.read_bytes() == b"one" and contents("some") == {path: b"one"}


# ---- bench.py -----------------------------------------------------------------------------------


def measures_by_numpy(attention_of_heads, values, hidden):
    """MEASURES of a layer, from each head's A_n (T, T) and values (T, hs), and hidden (T, C)."""
    A, T = np.mean([a.numpy() for a in attention_of_heads], axis=0), len(hidden)
    p = [sum(A[i, j] for i in range(T)) / A.sum() for j in range(T)]
    firsts = [np.mean([a[i, 0] for i in range(1, T)]) for a in attention_of_heads]
    v = np.concatenate([x.numpy() for x in values], axis=1)
    v_norms, h_norms = (np.sqrt((x * x).sum(axis=1)) for x in (v, hidden.numpy()))
    spectrum = np.linalg.svd(v, compute_uv=False) ** 2 / T
    share = spectrum[spectrum > 1e-9] / spectrum.sum()
    return [-sum(x * math.log(x) for x in p), p[0], np.mean(firsts), max(firsts),
            v_norms[0] / v_norms[1:].mean(), h_norms[0] / h_norms[1:].mean(),
            spectrum.max(), math.exp(-sum(x * math.log(x) for x in share))]


@pytest.mark.parametrize("attention", [*VARIANTS, "crosslayer+gqa+denseformer", "plus with cla"])
def test_what_bench_sees_in_attention_is_what_numpy_says(attention):
    model, idx, each = tiny_model(attention), tokens(B=3, T=20), []
    got = bench.look_at_attention(model, idx)
    for sequence in idx:
        watch, parameters = [], {name: p.detach() for name, p in model.named_parameters()}
        reference_sequence(model.config, parameters, sequence, watch)
        each.append([measures_by_numpy(*layer) for layer in watch])
    expected = np.mean(each, axis=0)  # (L, 8)
    for i, name in enumerate(bench.MEASURES):
        np.testing.assert_allclose(got[name], expected[:, i], rtol=1e-4, err_msg=name)
    assert not any(m._forward_hooks for m in model.modules())


def test_even_attention_is_what_zero_queries_give():
    model = tiny_model("vanilla")
    for block in model.layers:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    got, expected = bench.look_at_attention(model, tokens(T=20)), bench.even(20)
    for name in ("entropy", "first"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)


def test_the_task_asks_which_of_four_continuations_is_the_likeliest():
    model = tiny_model("svformer", torch.float32)
    data = np.random.default_rng(1).integers(0, 37, 500).astype(np.uint16)
    got = bench.task_accuracy(model, data, 70, torch.device("cpu"))
    right = 0
    for places in np.random.default_rng(0).integers(0, 500 - 12, (70, 4)):
        context, scores = list(data[places[0]:places[0] + 8]), []
        for place in places:
            ids = context + list(data[place + 8:place + 12])
            logits = model(torch.tensor([[int(i) for i in ids]]))[0][0].detach().double()
            p = torch.softmax(logits, dim=-1)
            scores.append(sum(math.log(p[t - 1, int(ids[t])]) for t in range(-4, 0)))
        right += scores[0] == max(scores)
    assert got == right / 70


def test_gaps_are_paired_by_seed_with_students_interval():
    first = {1: 1.0, 2: 2.0, 3: 3.0}
    # Student's t for three pairs; seed 9 has no partner.
    spread = 4.303 * np.std([0.1, 0.3, 0.5], ddof=1) / math.sqrt(3)
    mean = np.mean([3.5, 1.1, 2.3, 100])
    got = bench.cell({3: 3.5, 1: 1.1, 2: 2.3, 9: 100.0}, first, float, 3)
    assert got == f"{mean:.3f} +0.300 ±{spread:.3f}"
    assert bench.cell(first, first, float, 1) == "2.0"
    assert bench.cell({1: 0.5}, first, float, 1) == "0.5 -0.5"
    assert bench.cell({8: 0.5}, first, float, 1) == "0.5"


def test_the_interval_of_sixteen_values_and_more_is_students_with_15_degrees():
    for n, t in ((2, 12.71), (16, 2.131), (17, 2.131)):
        values = np.random.default_rng(n).standard_normal(n)
        expected = t * values.std(ddof=1) / math.sqrt(n)
        assert bench.interval(values) == pytest.approx(expected, rel=1e-3)


def test_the_deeper_half_is_a_mean_but_importance_the_largest():
    record = dict(attention=dict(rank=[1, 2, 3, 6], importance=[9, 2, 3, 6]))
    assert bench.deeper_half(record, "rank") == 4.5
    assert bench.deeper_half(record, "importance") == 9


@pytest.fixture
def small_bench(small_run, monkeypatch, capsys):
    """Calls bench.py's main in this process, for seconds of training if --show or --look don't
    stand before it; returns what it prints."""
    words = ("--dataset text --n_layer 2 --n_head 2 --n_embd 16 --block_size 32 --batch_size 6 "
             "--max_steps 6 --eval_every 2 --eval_tokens 256 --warmup_steps 2 --device cpu "
             "--contexts 3 --questions 40 --out_dir b").split()

    def call(*more):
        trains = more[0] not in ("--show", "--look")
        monkeypatch.setattr(sys, "argv", ["bench.py", *(words if trains else []), *more])
        bench.main()
        return capsys.readouterr().out
    return call


ASKED = ("--variants", "vanilla", "resformer --value_residual learnable --lr 1e-2",
         "svformer+gqa", "--seeds", "3", "4", "--residual_layers", "2")


def test_bench_trains_as_train_does_and_prints_paired_differences(small_bench):
    printed = small_bench(*ASKED)
    assert "parameters on" not in printed  # what train.py says of a run
    runs = bench.read_records(Path("b"))
    assert [(r["variant"].split()[0], r["seed"]) for r in runs] == [
        (a, seed) for seed in (3, 4) for a in ("vanilla", "resformer", "svformer+gqa")]
    assert [step for step, _ in runs[0]["val_curve"]] == [2, 4, 6]
    assert not any(Path("b/runs").iterdir())
    # 2 layers, 2 heads of 8 numbers; svformer+gqa: 2 + 1 tensors, one head.
    assert [r["cache_bytes"] for r in runs[:3]] == [4 * 4 * 16, 4 * 4 * 16, 4 * 3 * 8]
    again = replace(SMALL, n_layer=2, max_steps=6, eval_every=2, eval_tokens=256, seed=3, lr=1e-2,
                    value_residual="learnable")
    history = run(again)
    assert history[-1]["val_loss"] == runs[1]["val_curve"][-1][1]
    assert history[-1]["loss"] == pytest.approx(runs[1]["train_loss"])
    assert runs[0]["compile"] is False and "1 threads" in runs[0]["machine"]

    last = [r["val_curve"][-1][1] for r in runs]
    gaps = [last[1] - last[0], last[4] - last[3]]
    gap = f"{np.mean(gaps):+.4f} ±{bench.interval(gaps):.4f}"
    assert printed.count(gap) == 2  # at the end of training, and as the last of the evaluations
    weights = np.mean([r["value_lambdas"]["2"] for r in (runs[1], runs[4])], axis=0)
    assert "layer 2: {:.2f} {:.2f}".format(*weights) in printed
    assert "2 layers, width 16, 6 steps, 0.0M tokens of text" in printed and "| 38%" in printed


def test_bench_measures_a_run_once_and_shows_it_without_data(small_bench, monkeypatch):
    printed = small_bench(*ASKED)
    monkeypatch.setattr(bench, "train", None)  # whoever calls it fails
    asked = (*ASKED, "--parts", "loss")
    shown = small_bench(*asked)
    assert shown in printed
    shutil.rmtree("data")
    assert small_bench("--show", "b") == shown
    assert "| svformer+gqa " in small_bench("--show", "b", "--variants", "svformer+gqa", "vanilla")
    assert "no runs of cla in b" in small_bench("--show", "b", "--variants", "vanilla", "cla")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "no figures: pip install matplotlib" in small_bench("--show", "b")


def test_a_folder_takes_runs_of_the_same_flags_and_data_only(small_bench):
    asked = ("--variants", "vanilla", "--seeds", "1", "--parts", "loss")
    small_bench(*asked)
    with pytest.raises(UserError, match="--weight_decay is 0.2, but b holds runs with 0.1: choose"):
        small_bench(*asked, "--weight_decay", "0.2")
    with pytest.raises(UserError, match="--dtype is torch.bfloat16, but b holds"):
        small_bench(*asked, "--dtype", "bfloat16")
    write("text.txt", "another text\n" * 2000)
    prepare(DataConfig("text.txt"))
    with pytest.raises(UserError, match="--dataset text is not what the runs in b have read"):
        small_bench(*asked)
    small_bench(*asked, "--weight_decay", "0.2", "--overwrite")  # begins anew
    assert [r["flags"]["weight_decay"] for r in bench.read_records(Path("b"))] == [0.2]


def test_runs_that_were_made_differently_are_told(small_bench):
    asked = ("--variants", "vanilla", "gqa", "--seeds", "1", "--parts", "loss")
    assert "WARNING" not in small_bench(*asked)
    first, second = bench.read_records(Path("b"))
    for name, other in (("code", "edited"), ("machine", "another CPU"), ("compile", True),
                        ("torch", "1.0")):
        write("b/results.jsonl", f"{json.dumps(first)}\n{json.dumps(second | {name: other})}\n")
        told = [line for line in small_bench("--show", "b").splitlines() if "WARNING" in line]
        assert [line.split()[1] for line in told] == [name]


def test_the_code_of_a_record_is_the_text_of_three_scripts(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, **how: path.name)
    expected = hashlib.sha256(b"model.pytrain.pybench.py").hexdigest()[:12]
    assert bench.about(torch.device("cpu"))["code"] == expected


def test_an_unfinished_run_goes_on_but_never_as_another(small_bench, monkeypatch):
    asked = ("--seeds", "1", "--parts", "loss", "--variants", "vanilla", "--eval_every", "1")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        at_step(context, 4, stop)
        small_bench(*asked)
    shutil.copytree("b", "c")
    with patch.object(train, "learning_rate", wraps=train.learning_rate) as steps:
        small_bench(*asked, "--out_dir", "c")
    assert steps.call_count == 2  # of six
    with patch.object(train, "learning_rate", wraps=train.learning_rate) as steps:
        small_bench(*asked, "--max_steps", "5")
    assert steps.call_count == 5


def test_a_run_whose_loss_is_not_finite_does_not_stop_the_others(small_bench):
    bad = "vanilla --lr 1e30 --warmup_steps 0"
    printed = small_bench("--seeds", "1", "--parts", "loss", "--variants", "vanilla", bad, "gqa")
    assert "not measured: step 2: the loss is not finite" in printed
    assert [r["variant"] for r in bench.read_records(Path("b"))] == ["vanilla", "gqa"]


@pytest.fixture
def drawn(monkeypatch):
    """Calls a function; returns {a figure file's name: the matplotlib figure saved in it}."""
    figures = pytest.importorskip("matplotlib.figure", reason="figures need matplotlib")

    def call(function, *words):
        with patch.object(figures.Figure, "savefig", autospec=True) as saved:
            function(*words)
        return {call.args[1].name: call.args[0] for call in saved.call_args_list}
    return call


def final_gaps(runs, name, seeds):
    """Validation loss minus vanilla's at each evaluation, (seeds, evaluations)."""
    curves = {(r["variant"], r["seed"]): np.array(r["val_curve"])[:, 1] for r in runs}
    return np.array([curves[name, seed] - curves["vanilla", seed] for seed in seeds])


def test_the_figures_of_the_loss(small_bench, drawn):
    names = ("vanilla", "resformer", "svformer")
    small_bench("--variants", *names, "--parts", "loss", "--seeds", "1", "2")
    assert Path("b/loss.png").read_bytes()[1:4] == b"PNG"
    left, right = drawn(small_bench, "--show", "b")["loss.png"].axes
    gaps = {name: final_gaps(bench.read_records(Path("b")), name, (1, 2)) for name in names}
    ends = {name: gap[:, -1].mean() for name, gap in gaps.items()}
    # A row a variant: the smallest cache first, then the lowest loss. 3 of 4 tensors are 75%.
    rows = ["svformer", *sorted(names[:2], key=ends.get)]
    words = [label.get_text() for label in left.get_yticklabels()]
    assert words == [f"{name}  {75 if name == 'svformer' else 100}%" for name in rows]
    means = [bar.lines[0].get_xydata()[0] for bar in left.containers]
    np.testing.assert_allclose(means, [[ends[name], y] for y, name in enumerate(rows)])
    assert "2 layers, width 16, 6 steps" in left.figure.get_suptitle()
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == sorted(names, key=ends.get, reverse=True)
    lines = {line.get_label(): line for line in right.lines}
    for name in names:
        np.testing.assert_allclose(lines[name].get_ydata(), gaps[name].mean(axis=0))
        bar = left.containers[rows.index(name)].lines[0]
        assert lines[name].get_color() == bar.get_color()  # in both panels
    assert len(right.lines) == 9  # three means, six seeds
    assert right.get_xlim()[1] == 6 and right.get_ylabel()


def test_a_figure_compares_with_the_first_variant_of_the_command(small_bench, drawn):
    asked = ("--parts", "loss", "--seeds", "1", "--variants")
    small_bench(*asked, "resformer")
    left, _ = drawn(small_bench, *asked, "vanilla", "resformer")["loss.png"].axes
    assert "minus vanilla's" in left.get_xlabel()
    assert drawn(small_bench, "--show", "b", "--variants", "vanilla") == {}  # all of them, or none


def test_a_variant_with_few_common_seeds_says_so_and_one_seed_has_no_bar(small_bench, drawn):
    asked = ("--parts", "loss", "--variants")
    small_bench(*asked, "vanilla", "cla", "--seeds", "1")
    small_bench(*asked, "gqa", "--seeds", "2")
    left, _ = drawn(small_bench, "--show", "b")["loss.png"].axes
    assert len(left.containers) == 2 and not any(bar.has_xerr for bar in left.containers)
    assert "no seed in common with vanilla: gqa" in small_bench("--show", "b")
    small_bench(*asked, "vanilla", "--seeds", "2")  # now gqa has one that is in common
    left, _ = drawn(small_bench, "--show", "b")["loss.png"].axes
    assert {label.get_text() for label in left.get_yticklabels()} == {
        "vanilla  100%", "cla (1 of 2 seeds)  50%", "gqa (1 of 2 seeds)  50%"}


def test_colors_are_those_of_the_systems_and_no_two_are_alike():
    many = ["vanilla", "svformer", "resformer --lr 1", "resformer --lr 2", "resformer+neutreno"]
    colors = bench.pick_colors(many)
    assert len(set(colors.values())) == 5
    usual = bench.pick_colors(bench.SYSTEMS)
    assert colors["svformer"] == usual["svformer"]
    assert colors["resformer --lr 1"] == usual["resformer"]  # as there is none without flags
    assert bench.pick_colors([*many, "resformer"])["resformer"] == usual["resformer"]
    assert len(set(bench.pick_colors([*bench.SYSTEMS, "a new one"]).values())) == 11


def test_the_figure_of_attention_by_layer(small_bench, drawn):
    small_bench("--variants", "vanilla", "svformer", "--parts", "loss", "--seeds", "1", "2")
    figure = drawn(small_bench, "--show", "b")["attention.png"]
    layers = np.array([r["attention"]["first"] for r in bench.read_records(Path("b"))
                       if r["variant"] == "svformer"])
    ax = figure.axes[1]
    assert ax.get_title() == bench.MEASURES["first"][0]
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["svformer, 2 seeds"].get_ydata(), layers.mean(axis=0))
    assert lines["svformer, 2 seeds"].get_xdata().tolist() == [1, 2]
    [label] = ax.texts
    assert label.get_text() == "each query even over its past"
    assert label.xy[1] == bench.even(32)["first"]


def test_several_folders_are_one_table_and_one_figure(small_bench, drawn):
    asked = ("--parts", "loss", "--seeds", "1", "2", "--variants")
    small_bench(*asked, "vanilla", "svformer", "gqa", "--out_dir", "e/a")
    small_bench(*asked, "vanilla", "gqa", "--out_dir", "e/b", "--lr", "1e-2", "--eval_every", "3")
    small_bench(*asked, "cla", "gqa", "--out_dir", "e/without_vanilla")
    write("e/README.md", "no experiment")
    words = ("--show", *sorted(map(str, Path("e").iterdir())), "--variants", "vanilla", "svformer",
             "gqa")
    printed = small_bench(*words)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["experiment", "-" * 10, "e/a", "e/b"]
    for place in ("e/README.md", "e/without_vanilla"):
        assert f"passed over: {place}\n" in printed
    gaps = final_gaps(bench.read_records(Path("e/b")), "gqa", (1, 2))[:, -1]
    assert f"|                 | {np.mean(gaps):+.4f} ±{bench.interval(gaps):.4f} |" in printed
    assert Path("e/overview.png").exists()
    [ax] = drawn(small_bench, *words)["overview.png"].axes
    assert len(ax.containers) == 3  # two of a, one of b
    assert ax.containers[2].lines[0].get_xdata()[0] == pytest.approx(np.mean(gaps))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[0].startswith("a, 2 seeds\n")
    assert "lr 0.01" in labels[1] and "eval" not in labels[1]
    with pytest.raises(UserError, match="in none of these folders are runs of cla and another"):
        small_bench("--show", "e/a", "e/b", "--variants", "cla", "gqa")


# ---- a look into trained models -----------------------------------------------------------------


def test_a_look_reads_each_text_with_each_run_layer_by_layer(small_run, small_bench):
    for attention in ("vanilla", "svformer"):
        run(replace(small_run, attention=attention, out_dir=attention, max_steps=1))
    printed = small_bench("--look", "vanilla", "svformer", "--text", "text.txt", __file__)
    assert printed.count("in 4 windows of 32 tokens") == 4 and "| 4     |" in printed
    model, tokenizer = train.load_run(Path("svformer"))
    ids = np.array(tokenizer.encode(Path("text.txt").read_text()))
    starts = [0, (len(ids) - 33) // 3, (len(ids) - 33) * 2 // 3, len(ids) - 33]
    x = torch.tensor(np.stack([ids[start:start + 33] for start in starts]))
    record = bench.read_records(Path("out/look"))[2]
    assert record["variant"] == "svformer on text.txt"
    assert record["attention"] == bench.look_at_attention(model, x[:, :-1])
    assert record["loss"] == pytest.approx(model(x[:, :-1], x[:, 1:])[1].item(), rel=1e-5)
    assert small_bench("--show", "out/look") == printed
    small_bench("--look", "vanilla", "--block_size", "16", "--out_dir", "short")
    assert bench.read_records(Path("short"))[0]["flags"]["block_size"] == 16


def test_a_look_beyond_a_models_context_is_refused(small_bench):
    with patch.object(bench, "open_model", lambda name: (tiny_model("vanilla"), None)):
        with pytest.raises(UserError, match="--block_size 256: x.gguf reads at most 32"):
            small_bench("--look", "x.gguf")


def test_labels_name_what_differs_also_by_a_flag_that_is_gone():
    records = {name: bench.read_records(HERE / "assets" / name)[0] for name in ("muon", "main")}
    assert bench.what_differs(records["muon"]) == "optimizer muon, lr 0.016"
    assert bench.what_differs(records["main"]) == "the defaults"
    assert bench.describe_run(records["main"]).startswith("8 layers, width 64, 900 steps, 1.8M")
    wide = records["main"] | dict(variant="vanilla --n_embd 96")
    assert bench.describe_run(wide).startswith("8 layers, width 96")


SHAPES = {  # of a tiny Llama
    "all heads": {}, "two key/value heads": dict(num_key_value_heads=2),
    "one key/value head": dict(num_key_value_heads=1, rms_norm_eps=1e-6,
                               rope_parameters=dict(rope_type="default", rope_theta=100_000.0)),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True)}


@pytest.fixture
def save_llama(folder):
    """Saves a tiny random model of a class of transformers; returns its folder."""
    transformers = pytest.importorskip("transformers", reason="pretrained models need transformers")

    def save(kind="Llama", **changes):
        settings = dict(vocab_size=37, hidden_size=32, intermediate_size=20, num_hidden_layers=3,
                        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
        torch.manual_seed(1)
        config = getattr(transformers, f"{kind}Config")(**settings | changes)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        model.save_pretrained("llama")
        return "llama"
    return save


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pretrained_llama_gives_the_logits_loss_text_and_attention_of_transformers(
        save_llama, monkeypatch, shape):
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama
    name, idx = save_llama(**SHAPES[shape]), tokens(T=20)
    model = GPT.from_pretrained(name).double()
    # Their norms, angles and softmax are in float32 whatever the model is in; here in float64.
    double = ModuleType("torch")
    vars(double).update(vars(torch), float=torch.float64, float32=torch.float64)
    monkeypatch.setattr(modeling_llama, "torch", double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    llama = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager",
                                                 dtype=torch.float64)
    expected = llama(idx, labels=idx, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(model(idx)[0], expected.logits, rtol=0, atol=1e-9)
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-9)
    text = llama.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20,
                          do_sample=False, eos_token_id=None)
    assert torch.equal(generate(model, idx, 20, temperature=0), text[:, 20:])

    got = bench.look_at_attention(model, idx)
    for n, A in enumerate(expected.attentions):  # (B, nh, T, T)
        importance = A.double().mean(dim=(1, 2))  # (B, T)
        entropy = -(importance * importance.log()).nansum(dim=1).mean().item()
        assert got["first"][n] == pytest.approx(A[:, :, 1:, 0].mean().item(), rel=1e-4)
        assert got["importance"][n] == pytest.approx(importance[:, 0].mean().item(), rel=1e-4)
        assert got["entropy"][n] == pytest.approx(entropy, rel=1e-4)
    norms = expected.hidden_states[2].norm(dim=2)  # of block 2; the last one's are normalized
    ratio = (norms[:, 0] / norms[:, 1:].mean(dim=1)).mean().item()
    assert got["hidden_norm"][1] == pytest.approx(ratio, rel=1e-4)


LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize("kind, changes, said", [
    ("Llama", dict(rope_parameters=LLAMA3), "rope scaling of type llama3"),
    ("Llama", dict(attention_bias=True), "layers.0.self_attn.k_proj.bias"),
    ("Llama", dict(mlp_bias=True), "layers.0.mlp.down_proj.bias"),
    ("Llama", dict(hidden_act="gelu"), "hidden_act gelu"),
    ("Llama", dict(head_dim=16), "head_dim 16"),
    ("Mistral", dict(sliding_window=32), "sliding_window 32"),
    ("Qwen3", dict(head_dim=8), "layers.0.self_attn.k_norm.weight"),
    ("Granite", dict(logits_scaling=2.0), "logits differ by"),
    ("GPTNeoX", {}, "gpt_neox is no Llama"), ("Gemma2", dict(head_dim=8), "gemma2 is no Llama")])
def test_a_model_that_this_one_cannot_express_is_refused_by_name(save_llama, kind, changes, said):
    name = save_llama(kind, **changes)
    with pytest.raises(ValueError, match=said):
        GPT.from_pretrained(name)
    with pytest.raises(UserError, match=f"--look llama is .*{said}"):  # and bench.py says so
        bench.open_model(name)


def test_a_sliding_window_that_is_never_left_is_none(save_llama):
    assert GPT.from_pretrained(save_llama("Mistral", sliding_window=64)).config.block_size == 64


def test_without_transformers_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--look x.gguf is .*pip install transformers.*gguf"):
        bench.open_model("x.gguf")


def test_a_gguf_file_is_its_folder_and_its_name():
    assert pretrained_source("some/folder/x.gguf") == dict(
        pretrained_model_name_or_path=Path("some/folder"), gguf_file="x.gguf",
        trust_remote_code=False)  # no code that comes with a model is run
    assert pretrained_source("owner/name") == dict(
        pretrained_model_name_or_path="owner/name", trust_remote_code=False)


# ---- the scripts and README's commands, as a user types them -------------------------------------


@pytest.fixture
def script(capfd, monkeypatch):
    """Runs a script in this process; returns (exit status, stdout, stderr)."""

    def call(name, *flags):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [str(HERE / name), *flags])
        status = 0
        try:
            runpy.run_path(str(HERE / name), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return status, *capfd.readouterr()
    return call


def test_from_data_to_text(folder, script):
    write("text.txt", "To be, or not to be: that is the question.\n" * 500)
    assert "19,350 tokens for training" in script("prepare_data.py", "text.txt")[1]
    flags = (*as_flags(SMALL), "--attention=svformer", "--out_dir=my run")
    status, out, _ = script("train.py", *flags, "--max_steps=5")
    assert status == 0 and "nats per token" in out and "62% of vanilla's" in out
    assert "parameters on cpu, 192 tokens a step, run in my run" in out
    assert 'sample.py --out_dir "my run"' in out  # can be pasted
    assert script("train.py", *flags, "--max_steps=7", "--resume")[0] == 0
    assert len(read_log("my run")) == 7

    flags = ("--out_dir=my run", "--max_new_tokens=40", "--num_samples=2", "--seed=3",
             "--device=cpu")
    _, expected, error = script("sample.py", *flags, "--prompt=To bé")
    assert expected.count("To bé") == 2 and "\n" + "-" * 80 in expected
    assert "320 bytes of KV cache per token" in error  # (4 + 1) x 16 numbers x 4 bytes
    without = script("sample.py", *flags, "--prompt=To bé", "--no_cache")
    assert without[1] == expected and "no KV cache" in without[2]
    write("prompt.txt", "To bé")
    assert script("sample.py", *flags, "--prompt=FILE:prompt.txt")[1] == expected
    assert "prompt has" not in script("sample.py", *flags, f"--prompt={'x' * 32}")[2]
    too_long = script("sample.py", *flags, f"--prompt={'x' * 33}")[2]
    assert "prompt has 33 tokens: the model reads the last 16" in too_long


def test_no_two_texts_of_neighbouring_seeds_are_the_same(small_run, script):
    run(replace(small_run, max_steps=1))
    texts = []
    for seed in (1, 2):
        _, out, _ = script("sample.py", "--out_dir=run", "--num_samples=3", f"--seed={seed}",
                           "--max_new_tokens=20", "--temperature=1", "--device=cpu")
        texts += out.split("-" * 80)[:3]
    assert len(set(texts)) == 6


def test_what_a_terminal_cannot_show_is_replaced(folder, script):
    write("漢字.txt", "漢" * 1000)
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    status, out, _ = script("prepare_data.py", "漢字.txt")
    assert status == 0 and "?" in out


def test_only_a_mistake_and_ctrl_c_become_a_line(small_run, script, monkeypatch):
    stopped = "stopped; --resume, not --overwrite, goes on from the last evaluation"
    for error, status, line in ((UserError("a\nb"), 2, "a"), (KeyboardInterrupt, 130, stopped)):
        monkeypatch.setattr(torch.optim, "AdamW", Mock(side_effect=error))
        ended, _, said = script("train.py", *as_flags(small_run))
        assert (ended, said) == (status, f"train.py: {line}\n")
    monkeypatch.setattr(torch.optim, "AdamW", Mock(side_effect=RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        script("train.py", *as_flags(small_run))


# Lines of a shell, and words that must be in the one line that comes; the folder is broken_things.
BAD_INPUTS = [line.split(" -> ") for line in """
prepare_data.py nowhere -> nowhere is no file or folder
prepare_data.py short.txt -> too short
prepare_data.py elsewhere/text.txt -> data/text holds data from elsewhere
prepare_data.py ./stdlib/../stdlib -> 'stdlib' cannot be the name
prepare_data.py fineweb --tokenizer byte -> --tokenizer
prepare_data.py fineweb --shards 0 -> --shards
train.py --attention resnet -> --attention 'resnet': choose from
train.py --n_embd 0 -> --n_embd must be a finite number of at least 1
train.py --dataset nothing -> --dataset nothing isn't there yet
train.py --dataset odd -> train.bin should be
train.py --dataset no_val -> val.bin should be
train.py --block_size 1000000 -> --block_size 1000000 must be less than
train.py --lr nan -> --lr must be a finite number of at least 0
train.py --device tpu -> --device tpu
train.py --device cuda:99 -> --device cuda:99
train.py --resume --overwrite -> choose one
train.py --out_dir text.txt -> text.txt
train.py --out_dir run -> run holds a run: --resume goes on with it, --overwrite deletes it
train.py --resume --out_dir run --max_steps 1 -> --max_steps 1: the run in run has 2 steps
train.py --resume --out_dir run --dataset other -> --dataset other is not what the run
train.py --resume --out_dir bomb -> bomb/ckpt.pt can't be read
train.py --resume --out_dir list -> list/ckpt.pt is not a checkpoint of train.py
sample.py --out_dir nowhere -> nowhere/ckpt.pt isn't there
sample.py --out_dir run --prompt FILE:nowhere -> nowhere
sample.py --out_dir run --prompt FILE:empty.txt -> --prompt has no text
train.py --dataset torn -> meta.json has no tokenizer of type str
prepare_data.py torn.txt -> data/torn holds data from elsewhere
train.py --dataset no_bytes -> meta.json has no val_bytes of type int
train.py --dataset foreign -> train.bin has token 300, which a vocabulary of 257 does not have
sample.py --out_dir run --top_k 0 --prompt d -> --top_k
bench.py --variants resnet -> --variants resnet: --attention 'resnet': choose from
bench.py --questions 0 -> --questions
bench.py --text text.txt -> --text
bench.py --variants vanilla 'resformer --seed 7' -> --seed is for all variants alike
bench.py --n_layer 10 --variants vanilla 'svformer --residual_layers 9' -> residual_layers is for
bench.py --seed 7 -> --seed
bench.py --variants vanilla svformer --value_lambda 2 1 -> --value_lambda is for resformer, which
show nowhere -> nowhere/results.jsonl has no runs of any
show torn -> torn/results.jsonl, line 1 can't be read
show torn --parts cache -> --parts has no effect beside --show
look run --seeds 1 -> --seeds has no effect beside --look
look run --text nowhere.txt -> nowhere.txt
look run --text short.txt -> --text short.txt: 19 tokens
look run --text text.txt elsewhere/text.txt -> there are two of 'run on text.txt'
look run --out_dir experiment -> experiment holds the runs of an experiment
bench.py --overwrite --out_dir torn --dataset nothing -> --dataset nothing isn't there
""".strip().splitlines()]


@pytest.fixture(scope="module")
def broken_things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schöne Daten")  # with a space, and not ASCII
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for name in ("text", "other"):
            write(f"{name}.txt", f"a line of {name}\n" * 500)
            prepare(DataConfig(f"{name}.txt"))
        write("empty.txt", "")
        write("torn.txt", "a text whose data set was cut\n" * 99)
        write("short.txt", "x" * 19)
        write("torn/results.jsonl", '{"variant": "van')  # killed in a write
        write("experiment/results.jsonl", '{"val_curve": []}')
        write("elsewhere/text.txt", "another text of the same name\n" * 99)
        write("stdlib/a.py", "# not Python's\n" * 99)
        for name in ("odd", "no_val", "torn", "no_bytes", "foreign"):
            shutil.copytree("data/text", f"data/{name}")
        ids = Path("data/text/train.bin").read_bytes()
        meta = Path("data/text/meta.json").read_bytes()
        write("data/odd/train.bin", ids[:-1])
        write("data/foreign/train.bin", ids[:-2] + (300).to_bytes(2, "little"))
        Path("data/no_val/val.bin").unlink()
        write("data/torn/meta.json", meta[:-9])
        write("data/no_bytes/meta.json", meta.replace(b"val_bytes", b"val_words"))
        run(replace(SMALL, max_steps=2))
        Path("list").mkdir()
        torch.save([1, 2], "list/ckpt.pt")
        write("bomb/ckpt.pt", "cos\nmkdir\n(S'exploded'\ntR.")  # a pickle that makes a folder
    return folder


@pytest.mark.parametrize("line, words", BAD_INPUTS, ids=lambda value: value[:60])
def test_a_mistake_ends_in_one_line_and_changes_nothing(broken_things, monkeypatch, script, line,
                                                        words):
    monkeypatch.chdir(broken_things)
    name, *flags = shlex.split(line)
    small = []
    if name in ("show", "look"):
        name, flags = "bench.py", [f"--{name}", *flags]
    elif name in ("train.py", "bench.py"):  # for all that the line doesn't say
        small = as_flags(replace(SMALL, out_dir=None))
    if small and name == "bench.py":
        small.append("--variants=vanilla")
    before = contents(broken_things)
    status, out, error = script(name, *small, *flags)
    assert status == 2 and error.count("\n") == 1 and error.startswith(f"{name}: "), error
    assert words in error.replace(os.sep, "/")
    if "prompt" in line:
        assert out == ""  # nothing is printed before the mistake
    assert contents(broken_things) == before


def readme(kind):
    """The fenced blocks of a kind in README.md."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_readme_quotes_the_code_as_it_is():
    quotations = [block for block in readme("python") if "lambdas" in block]
    assert len(quotations) == 1
    assert quotations[0] in (HERE / "model.py").read_text(encoding="utf-8")


def test_readmes_commands_are_such_as_the_scripts_take(folder, monkeypatch, capsys):
    scripts = {"train.py": (TrainConfig, train.check), "sample.py": (sample.SampleConfig, None),
               "bench.py": (bench.BenchConfig, bench.list_runs),
               "prepare_data.py": (DataConfig, None)}
    shutil.copytree(HERE / "assets", "assets")
    lines = "".join(readme("sh")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    commands = [words[1:] for words in commands if words[:1] == ["python"] and words[1] != "-m"]
    assert len(commands) >= 12
    prepared = {"stdlib"}  # the names of data sets that are there when a reader comes to a command
    for name, *flags in commands:
        cls, check = scripts[name]
        config, _ = prepare_data.parse_flags(cls, "", flags)
        if name == "prepare_data.py":
            prepared.add(Path(config.dataset).stem + ("-gpt2" if config.tokenizer else ""))
        assert name in ("prepare_data.py", "sample.py") or config.dataset in prepared
        if check is not None:
            check(config)
        if "--show" in flags or "cache" in flags:  # nothing is trained: it can be run here
            monkeypatch.setattr(sys, "argv", [name, *flags])
            bench.main()
            # SVFormer's row: (8 + 1) x 512 x 4 bytes a token, of 16 x 512 x 4; MiB of 2,048 tokens.
            expected = "18,432    | 56%          | 36.00" if "cache" in flags else "95% interval"
            assert expected in capsys.readouterr().out
