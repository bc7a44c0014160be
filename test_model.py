"""Tests. The model is compared with `reference_sequence`, a slow float64 version of the equations
in loops over layers and heads; the scripts run on small data elsewhere.

    pip install pytest && pytest -q
    SLOW=1 pytest -q        also what takes a minute: many kills, every variant compiled
"""

import hashlib
import http.server
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from model import GPT, VARIANTS, GPTConfig, KVCache, LinearCrossEntropy, draw
from prepare_data import DataConfig, UserError, get_tokenizer, prepare
from train import TrainConfig

HERE = Path(__file__).parent
torch.set_num_threads(1)  # everything here is tiny
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start too
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, limits or locks")
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes a minute; SLOW=1 runs it")

COMBINATIONS = ["svformer+gqa", "svformer+cla", "cla+gqa", "resformer+gqa", "resformer+neutreno",
                "resformer+denseformer", "resformer+cla", "neutreno+gqa", "svformer+denseformer",
                "crosslayer+cla", "crosslayer+gqa+denseformer",
                "resformer+neutreno+denseformer+cla+gqa"]
ABLATIONS = {
    "resformer 0.3 0.9": dict(attention="resformer", value_lambda=(0.3, 0.9)),
    "resformer on 3 and 5": dict(attention="resformer", residual_layers=(5, 3)),
    "learnable": dict(attention="resformer+neutreno", value_residual="learnable"),
    "learnable on 2 and 4": dict(attention="resformer+denseformer", value_residual="learnable",
                                 residual_layers=(2, 4)),
    "plus": dict(attention="resformer+gqa", value_residual="plus"),
    "plus on 3": dict(attention="resformer+cla", value_residual="plus", residual_layers=(3,)),
    "plus with cla": dict(attention="resformer+cla", value_residual="plus"),
    "neutreno 0.7": dict(attention="neutreno", neutreno_lambda=0.7),
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


def reference_norm(x, w):
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * w


def reference_rope(x):  # (T, hs)
    """Turns a pair, number j and number j + hs / 2, at position t by t x 10000^(-2j / hs)."""
    T, hs = x.shape
    pairs = torch.complex(x[:, :hs // 2], x[:, hs // 2:])
    j = torch.arange(hs // 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), 10000 ** (-2 * j / hs))
    turned = pairs * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), dim=1)


def reference_lambdas(c, P, n):
    """The weights of V_1 and V_n in layer n, counted from 1; None if it doesn't mix them."""
    own_values = range(3, c.n_layer + 1, 2) if "cla" in c.attention else range(2, c.n_layer + 1)
    layers = sorted(c.residual_layers or own_values)
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
    hidden = P["embed_tokens.weight"][idx]
    outputs, K, V = [hidden], {}, {}
    for n in range(1, c.n_layer + 1):
        def W(name):
            return P[f"layers.{n - 1}.{name}.weight"]

        def heads(name):  # (T, hs) each
            return (x @ W(f"self_attn.{name}").T).split(hs, dim=1)

        x = reference_norm(hidden, W("input_layernorm"))
        if "cla" in names and n % 2 == 0:
            K[n], V[n] = K[n - 1], V[n - 1]
        else:
            K[n] = [reference_rope(k) for k in heads("k_proj")]
            V[n] = V[1] if "svformer" in names and n > 1 else heads("v_proj")
            if lambdas := reference_lambdas(c, P, n):
                l1, l2 = lambdas
                V[n] = [l1 * first + l2 * own for first, own in zip(V[1], V[n])]
        U, attention = [], []
        for h, q in enumerate(heads("q_proj")):
            g = h * c.n_kv_head // c.n_head  # the key/value head of query head h
            k, v = K[n][g], V[n][g]
            if "crosslayer" in names and n > 1:
                k, v = torch.cat((K[1][g], k)), torch.cat((V[1][g], v))
            scores = reference_rope(q) @ k.T / math.sqrt(hs)
            future = (torch.arange(len(k)) % T)[None, :] > torch.arange(T)[:, None]
            A = torch.softmax(scores.masked_fill(future, -math.inf), dim=1)
            attention.append(sum(A.split(T, dim=1)))
            u = A @ v
            if "neutreno" in names and n > 1:
                u = u + c.neutreno_lambda * (V[1][g] - V[n][g])
            U.append(u)
        hidden = hidden + torch.cat(U, dim=1) @ W("self_attn.o_proj").T
        x = reference_norm(hidden, W("post_attention_layernorm"))
        gate = x @ W("mlp.gate_proj").T
        swish = gate / (1 + torch.exp(-gate))
        hidden = hidden + (swish * (x @ W("mlp.up_proj").T)) @ W("mlp.down_proj").T
        if watch is not None:
            watch.append((attention, V[n], hidden))
        if "denseformer" in names:
            outputs.append(hidden)
            hidden = sum(P[f"depth_weights.{n - 1}"][i] * outputs[i] for i in range(n + 1))
    return reference_norm(hidden, P["norm.weight"]) @ P["lm_head.weight"].T


@pytest.mark.parametrize("attention", EVERY)
def test_logits_loss_and_gradients_equal_the_reference(attention):
    model, idx, targets = tiny_model(attention), tokens(T=11), tokens(T=11, seed=2)
    P = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.stack([reference_sequence(model.config, P, row) for row in idx])
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()

    logits, nothing = model(idx)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    also_nothing, loss = model(idx, targets)
    assert nothing is None and also_nothing is None
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


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [48, 42, 2])  # 8 x 6 tokens, 7 x 6, 2 x 1
def test_the_loss_makes_an_eighth_of_the_logits_and_leaves_out_targets_of_minus_100(n):
    model, idx, targets = tiny_model("resformer"), tokens(T=n // 2), tokens(T=n // 2, seed=2)
    targets[0, ::3] = -100
    targets[1, 6:12] = -100  # where there are so many, a whole eighth
    expected = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    with patch.object(F, "linear", wraps=F.linear) as linear:
        _, loss = model(idx, targets)
    calls = [call.args for call in linear.call_args_list]
    rows = [len(x) for x, weight, *_ in calls if weight.shape == model.lm_head.weight.shape]
    assert sum(rows) == n and max(rows) == math.ceil(n / 8)
    assert abs(loss.item() - expected.item()) < 1e-12
    got, gradients = (torch.autograd.grad(3 * x, list(model.parameters()))
                      for x in (loss, expected))
    torch.testing.assert_close(got, gradients, rtol=0, atol=1e-12)
    with patch.object(torch, "mm", None):  # the product that makes the gradients
        with pytest.raises(TypeError):
            model(idx, targets)
        with torch.no_grad():
            assert model(idx, targets)[1].item() == loss.item()


def test_the_softmax_of_the_loss_is_in_float32_under_autocast():
    x, weight = torch.randn(64, 32) * 3, torch.randn(500, 32)
    target = torch.randint(500, (64,))
    logits = (x.bfloat16() @ weight.bfloat16().T).double()  # rounded once, as autocast does
    expected = F.cross_entropy(logits, target, reduction="sum").item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = LinearCrossEntropy.apply(x, weight, target, False)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected, rel=1e-5)


# ---- the KV cache and the parameters ------------------------------------------------------------


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


def test_the_papers_82m():
    model = GPT(GPTConfig(vocab_size=50304, block_size=2048, n_layer=8, n_head=8, n_embd=512,
                          attention="vanilla"))
    assert model.num_params() == 81_928_704
    # 6 operations a number in a product, without norms and look-ups; attention: 12 T C a layer,
    # and twice as much in the layers above the first of crosslayer, four of the tiny model's.
    N = 8 * (4 * 512 * 512 + 3 * 512 * 1792) + 50304 * 512
    assert model.flops_per_token() == 6 * N + 12 * 8 * 2048 * 512
    vanilla, crosslayer = (GPT(tiny_config(a)).flops_per_token() for a in ("vanilla", "crosslayer"))
    assert crosslayer - vanilla == 12 * 4 * 32 * 32


def test_variants_of_one_seed_start_alike_from_a_normal_distribution():
    models = {}
    for name in ("vanilla", "svformer"):
        torch.manual_seed(3)
        models[name] = GPT(tiny_config(name, n_embd=256, n_ffn=512)).state_dict()
    p = models["vanilla"]
    for name, same in models["svformer"].items():
        assert torch.equal(p[name], same), name
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert p[f"layers.1.{name}.weight"].std().item() == pytest.approx(0.02, rel=0.02), name
    assert not torch.equal(p["layers.1.mlp.up_proj.weight"], p["layers.2.mlp.up_proj.weight"])


def test_learned_weights_and_defaults_start_where_they_should():
    learned = GPT(tiny_config("learnable", value_lambda=(0.25, 0.75)))
    assert learned.value_l1.tolist() == [0.25] * 4 and learned.value_l2.tolist() == [0.75] * 4
    for name in ("plus", "plus with cla"):  # the weights of V_1 are 1 each, those of V_n 0.5
        for pair in GPT(tiny_config(name)).value_lambdas().values():
            assert [x.item() for x in pair] == pytest.approx([1, 0.5])
    assert GPT(tiny_config("denseformer")).depth_weights[2].tolist() == [0, 0, 0, 1]
    assert tiny_config("neutreno").neutreno_lambda == 0.4
    assert tiny_config("neutreno+resformer").neutreno_lambda == 0.2
    assert tiny_config("vanilla", n_ffn=None).n_ffn == 112 and tiny_config("gqa").n_kv_head == 2


@pytest.mark.parametrize("changes, begins", [
    (dict(n_layer=True), "n_layer must"), (dict(n_embd=None), "n_embd must"),
    (dict(n_ffn=0), "n_ffn must"),
    (dict(n_embd=36), "n_embd (36) must be n_head (4) x an even"),
    (dict(n_kv_head=3, attention="gqa"), "n_kv_head (3, by default half of n_head) must divide"),
    (dict(n_kv_head=2, attention="resformer"), "n_kv_head is for gqa, not for resformer"),
    (dict(attention=None), "attention 'None': choose from"),
    (dict(attention="cla+cla"), "attention 'cla+cla' has a name twice"),
    (dict(attention="vanilla+gqa"), "attention 'vanilla+gqa': vanilla means"),
    (dict(attention="resformer+svformer"), "attention 'resformer+svformer': svformer has no V_n"),
    (dict(attention="svformer+neutreno"), "attention 'svformer+neutreno': svformer has no V_n"),
    (dict(attention="crosslayer+resformer"), "attention 'crosslayer+resformer': crosslayer"),
    (dict(attention="crosslayer+svformer"), "attention 'crosslayer+svformer': crosslayer"),
    (dict(attention="neutreno+crosslayer"), "attention 'neutreno+crosslayer': crosslayer"),
    (dict(residual_layers=()), "residual_layers must name"),
    (dict(residual_layers=(1,)), "residual_layers: layer 1 has no values of its own"),
    (dict(residual_layers=(5, 6)), "residual_layers: there is no layer 6, n_layer is 5"),
    (dict(residual_layers=(3, 4), attention="resformer+cla"), "residual_layers: layer 4 has no"),
    (dict(value_residual="learned"), "value_residual must"),
    (dict(value_lambda=(1, math.nan)), "value_lambda must"),
    (dict(value_residual="plus", value_lambda=(1, 1)), "value_lambda is for fixed"),
    (dict(attention="vanilla", value_lambda=(2, 1)), "value_lambda is for resformer, not for van"),
    (dict(attention="gqa", value_residual="plus"), "value_residual is for resformer"),
    (dict(attention="svformer", residual_layers=(2,)), "residual_layers is for resformer"),
    (dict(attention="svformer", neutreno_lambda=3.0), "neutreno_lambda is for neutreno"),
    (dict(attention="neutreno", neutreno_lambda=math.inf), "neutreno_lambda must")])
def test_a_bad_config_is_refused_by_the_name_of_its_field(changes, begins):
    with pytest.raises(ValueError) as error:
        tiny_config(**({"attention": "resformer"} | changes))
    assert str(error.value).startswith(begins)


# ---- generation ---------------------------------------------------------------------------------


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


def test_a_seed_fixes_the_text_and_the_cache_that_is_given_is_used():
    model, prompt = tiny_model("svformer"), tokens(B=3, T=4)
    first = generate(model, prompt, 50, seed=7)
    torch.manual_seed(99)  # the generator is its own: the global one has no say
    assert torch.equal(generate(model, prompt, 50, seed=7), first)
    assert torch.equal(generate(model, prompt, 50, seed=7, use_cache=False), first)
    assert not torch.equal(generate(model, prompt, 50, seed=8), first)
    cache = KVCache(model.config, 3, 14, dtype=torch.float64)
    model(prompt, cache=cache)  # emptied first
    assert torch.equal(generate(model, prompt, 10, seed=7, cache=cache), first[:, :10])
    assert cache.length == 13  # the last token was drawn, not read
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
    for temperature in (0, 1e-10, 1e-45, 5e-324):  # any temperature, however small
        assert draw(logits[:50] * 1e4, temperature).eq(0).all()


@pytest.mark.parametrize("bad", [
    dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0), dict(seed=-1),
    dict(max_new_tokens=-1), dict(cache=KVCache(tiny_config("svformer"), 2, 5)),
    dict(cache=KVCache(tiny_config("svformer"), 2, 40), use_cache=False),
    dict(idx=torch.zeros(1, 0, dtype=torch.long)), dict(idx=tokens()[0]),
    dict(idx=tokens() + 30), dict(idx=-tokens())])
def test_generates_bad_arguments_are_named_at_the_call(bad):
    name = list(bad)[0]
    with pytest.raises(ValueError, match=f"^{name}"):
        tiny_model("svformer").generate(**(dict(idx=tokens(), max_new_tokens=9) | bad))


def test_an_input_that_does_not_fit_is_refused():
    model = tiny_model("svformer")
    with pytest.raises(ValueError, match="^idx has 33 tokens, more than block_size"):
        model(tokens(T=33))
    for idx, said in ((tokens(T=9), "exceed max_len"), (tokens(B=3, T=8), "is for 2 sequences")):
        with pytest.raises(ValueError, match=said):
            model(idx, cache=KVCache(model.config, 2, 8))


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
    """All files and folders in it, without what a run leaves that never began."""
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")
            if p.name != "lock" and "out" not in p.parts}


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
    left_out = {"src/binary": "\0\1", "src/empty": "", "src/latin1": b"\xe9t\xe9",
                "src/locked/file": "no"}
    hidden = {"src/.hidden": "no", "src/.git/file": "no"}  # not even counted
    for name, text in (texts | left_out | hidden).items():
        write(name, text)

    def documents(ids):
        parts = np.split(ids, np.flatnonzero(ids == 256))
        return [bytes(part[part < 256].astype(np.uint8)).decode() for part in parts]

    scandir = os.scandir

    def not_locked(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "may not be entered", str(path))
        return scandir(path)

    with patch.object(os, "scandir", not_locked):
        prepare(DataConfig("src"))
    assert "src: 25 files of UTF-8 text, 4 left out" in capsys.readouterr().out
    train_ids, val_ids, meta = prepare_data.load("src")
    order = [texts[name] for name in sorted(texts)]
    training = order[:9] + order[10:19] + order[20:]
    assert documents(train_ids) == training and documents(val_ids) == [order[9], order[19]]
    assert meta["train_bytes"] == len("".join(training))

    write("two/1.txt", "to train on")
    write("two/2.txt", "to validate on")
    prepare(DataConfig("two"))
    assert documents(prepare_data.load("two")[1]) == ["to validate on"]
    with patch.object(Path, "is_file", side_effect=PermissionError):
        assert prepare_data.read_text(Path("two/1.txt")) == ""


def test_stdlib_is_this_pythons_and_the_same_each_time(folder, monkeypatch):
    assert "argparse.py" in [p.name for p in prepare_data.find_texts("stdlib", None)]
    for name in ("json/e.py", "a.py", "b.txt", "test/c.py", "site-packages/d.py"):
        write(f"tests/lib/{name}", f"# {name}\n" * 100)
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda _: str(folder / "tests/lib"))
    assert [p.name for p in prepare_data.find_texts("stdlib", None)] == ["a.py", "e.py"]
    for _ in range(2):  # what a first run of train.py prepares by itself; the second finds it
        _, _, meta = train.load_data(TrainConfig())
        assert meta["source"] == "stdlib" and meta["train_tokens"] == 100 * len("# a.py\n")
        monkeypatch.setattr(train, "prepare", None)


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
    config = train.model_config(TrainConfig(size="2M"), meta["vocab_size"])
    assert config.vocab_size == 50304 and config.n_ffn == 56


def test_gpt2_without_its_files_says_what_to_do(monkeypatch):
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", Mock(side_effect=ConnectionError))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer byte"):
        get_tokenizer("gpt2")


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, of each only the first `limit` bytes."""
    limit = None

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[:self.limit])


@pytest.fixture
def web(folder, monkeypatch):
    """A folder with all there is to download. Tests delete a file in it to show that it isn't
    fetched again."""
    handler = partial(Server, directory=folder / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setattr(prepare_data, "FINEWEB_URL", url)
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url + "input.txt")
        yield folder / "web"
        httpd.shutdown()


def test_shakespeare_is_downloaded_once_and_checked(folder, web, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    with pytest.raises(UserError, match="404"):
        prepare(DataConfig("shakespeare"))
    write(web / "input.txt", b"<html>not found</html>")
    with pytest.raises(UserError, match="SHA-256"):
        prepare(DataConfig("shakespeare"))
    write(web / "input.txt", text)
    with patch.object(Server, "limit", 1000):
        with pytest.raises(UserError, match="the download ended early|IncompleteRead"):
            prepare(DataConfig("shakespeare"))
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
    for wrong in (b"!" + good[1:], good[:4] + b"!" + good[5:], good[:-2], good + b"!",
                  b"<html>nothing</html>\n\n", b""):
        write(first, wrong)
        with pytest.raises(UserError, match="no shard of tokens"):
            prepare(config)
        assert not list(Path("data/fineweb").iterdir())

    ids = [np.random.default_rng(i).integers(0, 257, 3000) for i in range(3)]
    ids[0][0] = 256
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

    write("data/fineweb/fineweb_train_000001.bin", shard([1, 2, 257]))
    with pytest.raises(UserError, match="token id 257 is outside the vocabulary of 257"):
        prepare(config)


# ---- training -----------------------------------------------------------------------------------

SMALL = TrainConfig(dataset="text", size="2M", block_size=32, batch_size=6, max_steps=12,
                    eval_every=4, eval_tokens=512, warmup_steps=2, device="cpu", out_dir="run")


@pytest.fixture
def small_run(folder):
    """A config that trains in a second, on 40 kB of text."""
    write("text.txt", "".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    prepare(DataConfig("text.txt"))
    return SMALL


def as_flags(config):
    return [f"--{name}={value}" for name, value in vars(config).items()
            if value != getattr(TrainConfig, name)]


def run(config, signals=()):
    return train.train(config, signals, verbose=False)[1]


def losses(history):
    """All the losses of training and validation."""
    return [record[key] for record in history for key in ("loss", "val_loss") if key in record]


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def state(folder):
    """What a run has come to: all in its checkpoint but times and flags."""
    ckpt = train.load_checkpoint(Path(folder, "ckpt.pt"))
    moments = [optimizer["state"] for optimizer in ckpt["optimizers"]]
    return ckpt["model"], moments, ckpt["scaler"], losses(ckpt["history"])


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


@pytest.mark.parametrize("attention", ["resformer", "crosslayer+denseformer", "svformer+gqa"])
def test_training_learns(small_run, attention):
    config = replace(small_run, attention=attention, max_steps=30, eval_every=12, lr=1e-2)
    model, history = train.train(config, verbose=False)
    assert [record["step"] for record in history] == list(range(1, 31))
    assert history[-1]["val_loss"] < history[0]["loss"] - 0.5
    assert history[-1]["bits_per_byte"] == pytest.approx(history[-1]["val_loss"] / math.log(2))
    assert history == read_log("run")
    assert [r["step"] for r in history if "val_loss" in r] == [12, 24, 30]
    saved = sample.load_model(Path("run/ckpt.pt"), "cpu", torch.float32)[0]
    assert torch.equal(saved(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close(small_run, dtype):
    config = replace(small_run, lr=1e-2)
    exact, rounded = run(config), run(replace(config, dtype=dtype, out_dir="rounded"))
    assert rounded[-1]["val_loss"] == pytest.approx(exact[-1]["val_loss"], rel=0.02)
    assert rounded[-1]["val_loss"] != exact[-1]["val_loss"]


def test_a_float16_step_that_overflows_is_left_out(small_run, monkeypatch):
    too_large = partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", too_large)
    run(replace(small_run, dtype="float16", max_steps=1))
    weights, _, scaler, _ = state("run")
    start, _ = fresh_model_and_batches(small_run)
    torch.testing.assert_close(weights, start.state_dict(), rtol=0, atol=0)
    assert scaler["scale"] == 2.0**59


def test_learning_rate_rises_then_follows_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate(config, step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 6 / 8)) / 2)
    assert rates[12] == rates[13] == pytest.approx(0.2)
    assert train.learning_rate(replace(config, min_lr=None), 12) == pytest.approx(0.1)
    assert train.learning_rate(replace(config, warmup_steps=20), 12) == pytest.approx(13 / 20)


def test_steps_are_adamw_on_the_whole_batch_with_clipping_and_no_decay_of_vectors(small_run):
    config = replace(small_run, attention="denseformer", batch_size=2, grad_accum=3, max_steps=3,
                     lr=1e-2, grad_clip=0.3, weight_decay=0.5)
    history = run(config)
    model, batch = fresh_model_and_batches(config)
    m = dict.fromkeys(model.parameters(), 0)
    v = dict(m)
    for step, lr in enumerate((5e-3, 1e-2, 1e-2)):
        model.zero_grad()
        _, loss = model(*batch(step))
        loss.backward()
        assert history[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
        assert norm > 0.3
        with torch.no_grad():
            for p in model.parameters():
                g = p.grad * 0.3 / norm
                m[p] = 0.9 * m[p] + 0.1 * g
                v[p] = 0.95 * v[p] + 0.05 * g * g
                p *= 1 - lr * (0.5 if p.dim() > 1 else 0)
                root = (v[p] / (1 - 0.95 ** (step + 1))).sqrt()
                p -= lr * m[p] / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
    torch.testing.assert_close(state("run")[0], model.state_dict(), rtol=0, atol=1e-4)


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


@needs_muon
def test_a_step_of_muon(small_run):
    """The layers' matrices move by 0.2 sqrt(longer side) lr times an orthogonal matrix, nearly.
    All else moves by AdamW, whose first step is lr times the gradient's sign. Vectors don't decay.
    """
    config = replace(small_run, optimizer="muon", value_residual="learnable", max_steps=1, lr=1e-2,
                     warmup_steps=0, grad_clip=0, weight_decay=20)
    run(config)
    model, batch = fresh_model_and_batches(config)
    model.double()(*batch(0))[1].backward()
    trained = state("run")[0]
    for name, p in model.named_parameters():
        moved = trained[name] - p.detach() * (1 - 1e-2 * (20 if p.dim() > 1 else 0))
        if p.dim() > 1 and name.startswith("layers."):
            size = torch.linalg.svdvals(moved) / (1e-2 * 0.2 * math.sqrt(max(p.shape)))
            # Rough, as Muon's iteration is, which leaves a direction without gradient alone.
            assert 0.6 < size.median() and size.max() < 1.4, (name, size)
            alike = -(moved * p.grad).sum() / torch.linalg.svdvals(p.grad).sum()
            assert alike == pytest.approx(1e-2 * 0.2 * math.sqrt(max(p.shape)), rel=0.3), name
        else:
            clear = p.grad.abs() > 1e-6
            expected = -1e-2 * p.grad.sign()[clear]
            torch.testing.assert_close(moved[clear], expected, rtol=0.02, atol=0, msg=name)


@pytest.mark.parametrize("eval_tokens, n", [(512, 12), (96, 3), (10**9, 108), (1, 1)])
def test_evaluation_is_the_mean_over_windows_evenly_spread(small_run, eval_tokens, n):
    config = replace(small_run, eval_tokens=eval_tokens)
    data = prepare_data.load("text")[1].astype(np.int64)[:3500]
    model = tiny_model("vanilla", torch.float32, vocab_size=257)
    got = train.evaluate(model, data, config, torch.device("cpu"))
    each = []
    for i in range(n):  # 512 tokens are 16 windows: 12 are whole batches of 6
        start = int(i * (len(data) - 33) / max(1, n - 1))
        text = torch.tensor(data[start:start + 33])[None]
        each.append(model(text[:, :-1], text[:, 1:])[1].item())
    assert got == pytest.approx(np.mean(each), abs=1e-6)


@pytest.mark.parametrize("changes", [
    {}, dict(dtype="bfloat16"), dict(dtype="float16"),
    pytest.param(dict(optimizer="muon", value_residual="plus"), marks=needs_muon)])
def test_stopped_after_each_step_and_resumed_it_is_bit_identical(small_run, changes):
    config = replace(small_run, **changes)
    run(config)
    stopped = replace(config, out_dir="stopped", resume=True)
    for steps in range(1, 12):
        assert len(run(stopped, signals=[signal.SIGTERM])) == steps
        with Path("stopped/log.jsonl").open("a") as log:
            log.write('{"step": 8, "lo')  # as if killed in a later step
    history = run(stopped)
    torch.testing.assert_close(state("stopped"), state("run"), rtol=0, atol=0)
    assert history == read_log("stopped")
    Path("stopped/log.jsonl").unlink()
    assert run(stopped) == history  # complete: nothing is trained


def test_what_a_resumed_run_may_change(small_run, capsys):
    run(small_run)
    again = replace(small_run, resume=True, n_layer=4, n_head=2, n_embd=16, size="small",
                    max_steps=14, eval_every=3, eval_tokens=64, dtype="bfloat16")
    train.train(again)
    train.train(again)
    said = capsys.readouterr().out
    before, after = (train.learning_rate(replace(small_run, max_steps=n), 12) for n in (12, 14))
    assert said.count("--max_steps 12 -> 14") == 1 and said.count("run is complete: 14 steps") == 1
    assert f"step 13 goes from {before:.2e} to {after:.2e}" in said
    run(replace(small_run, out_dir="short", max_steps=20), signals=[signal.SIGTERM])
    train.train(replace(small_run, out_dir="short", max_steps=1, resume=True))
    said = capsys.readouterr().out
    assert "short is complete: 1 steps" in said and "cosine" not in said
    for name, value in dict(lr=1.0, min_lr=0.1, weight_decay=0.9, grad_clip=2.0, warmup_steps=3,
                            seed=5, batch_size=3, grad_accum=2, n_layer=5, attention="cla",
                            block_size=16, value_lambda=(2, 1)).items():
        with pytest.raises(UserError, match=f"^--{name} is .*, but the run in run has"):
            run(replace(small_run, resume=True, **{name: value}))
    run(replace(small_run, overwrite=True, seed=5))
    assert len(run(replace(small_run, resume=True, seed=5))) == 12


@pytest.mark.parametrize("flags, folder", [
    ("", "out/resformer"), ("--max_steps 5 --device cpu --resume", "out/resformer"),
    ("--value_lambda 2 1 --grad_clip 0.5", "out/resformer-value_lambda_2_1-grad_clip_0.5"),
    ("--attention cla+gqa --n_layer 4 --dataset some/folder --lr 0.002",
     "out/cla+gqa-n_layer_4-dataset_folder-lr_0.002"),
    ("--out_dir x --seed 3", "x")])
def test_a_runs_folder_is_named_after_what_makes_it_another_run(flags, folder):
    config, _ = prepare_data.parse_flags(TrainConfig, "", flags.split())
    assert train.run_folder(config).as_posix() == folder


def test_it_trains_in_a_thread(small_run):
    with ThreadPoolExecutor() as pool:
        assert len(pool.submit(run, small_run).result()) == 12


@pytest.mark.parametrize("attention, dtype", [
    ("resformer+neutreno+denseformer", "bfloat16"),
    pytest.param("crosslayer+cla", "float16", marks=slow),
    *(pytest.param(name, "float32", marks=slow) for name in VARIANTS)])
def test_the_model_compiles_into_one_graph_each_way(small_run, monkeypatch, attention, dtype):
    config = replace(small_run, attention=attention, dtype=dtype, n_layer=2, grad_accum=2,
                     max_steps=4, eval_every=1)
    expected, graphs = run(config), CompileCounterWithBackend("aot_eager")
    counted = partial(torch.compile, backend=graphs, fullgraph=True)
    monkeypatch.setattr(torch, "compile", counted)
    # 8 in earnest: train() forgets the models that were compiled before.
    with torch._dynamo.config.patch(recompile_limit=2):
        history = run(replace(config, compile="on", out_dir="compiled"))
    assert graphs.frame_count == 3  # the trial, training and evaluation
    assert losses(history) == pytest.approx(losses(expected), rel=1e-3)


@slow
def test_under_distributed_data_parallel_it_is_one_graph_too():
    dist, graphs = train.dist, CompileCounterWithBackend("aot_eager")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.compiler.reset()
    model = tiny_model("svformer+gqa", torch.float32, n_layer=2)
    fast = train.DistributedDataParallel(torch.compile(model, backend=graphs, fullgraph=True))
    for _ in range(3):
        _, loss = fast(tokens(), tokens(seed=2))
        loss.backward()
    assert graphs.frame_count == 1
    del fast
    dist.destroy_process_group()


def test_where_nothing_compiles_auto_trains_uncompiled_and_on_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no Triton\nand a page")))
    with pytest.raises(UserError, match="--compile off: no Triton$"):
        train.compiled("model", TrainConfig(compile="on"), torch.device("cpu"))
    monkeypatch.setattr(torch, "zeros", Mock())  # a card that isn't there
    for choice, warns in (("auto", True), ("off", False)):
        config = TrainConfig(compile=choice)
        assert train.compiled("model", config, torch.device("cuda")) == "model"
        assert ("no Triton" in capsys.readouterr().err) == warns


def test_what_this_machine_has_is_asked(monkeypatch):
    def dtype(device, **flags):
        return train.pick_dtype(TrainConfig(**flags), torch.device(device))

    for place, name in ((torch.cuda, "set_device"), (torch, "set_float32_matmul_precision"),
                        (torch, "zeros")):
        monkeypatch.setattr(place, name, Mock())
    for name, rank, expected in (("cuda", 0, "cuda:0"), ("cuda:3", 0, "cuda:3"),
                                 ("cuda", 1, "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))  # of the processes that torchrun has started
        device = train.pick_device(name)
        torch.cuda.set_device.assert_called_with(device)
        assert str(device) == expected
    assert dtype("cpu") == torch.float32 and dtype("cpu", dtype="float16") == torch.float16
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert dtype("cuda") == expected
    assert dtype("mps") == torch.float32
    with pytest.raises(UserError, match="--dtype bfloat16: on MPS"):
        dtype("mps", dtype="bfloat16")
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    train.check(TrainConfig())
    with pytest.raises(UserError, match="--optimizer muon needs torch 2.9"):
        train.check(TrainConfig(optimizer="muon"))


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=slow)])
def test_torchrun_gives_the_losses_of_one_process(small_run, n):
    config = replace(small_run, grad_accum=2, eval_tokens=160)  # 5 windows, not as many for each
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={n}", str(HERE / "train.py"), *as_flags(config),
                           "--out_dir=both"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(read_log("both")) == pytest.approx(losses(run(config)), abs=1e-5)
    # And no function keeps a process group, whose threads could outlive the interpreter.
    assert torch.distributed.nn.functional.all_reduce.__defaults__[1] is None


def test_processes_that_disagree_are_refused(monkeypatch):
    def gather(states, mine):
        states[:] = mine, (3, "data")

    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    train.check_agreement(3, "data")
    with pytest.raises(UserError, match="different steps or data"):
        train.check_agreement(4, "data")
    with pytest.raises(UserError, match="--batch_size 5 must divide by the 2 processes"):
        train.check(TrainConfig(batch_size=5))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(small_run):
    run(replace(small_run, max_steps=4))
    ckpt = train.load_checkpoint(Path("run/ckpt.pt"))
    ckpt["model"]["lm_head.weight"][0, 0] = math.nan
    torch.save(ckpt, "run/ckpt.pt")
    before = Path("run/ckpt.pt").read_bytes()
    with pytest.raises(UserError, match="step 5: the loss is nan"):
        run(replace(small_run, resume=True))
    assert Path("run/ckpt.pt").read_bytes() == before


def test_off_a_terminal_a_line_comes_every_30_seconds(small_run, monkeypatch, capsys):
    monkeypatch.setattr(train.time, "monotonic", Mock(side_effect=range(0, 10_000, 11)))
    train.train(replace(small_run, eval_every=100), title="run 2 of 9")
    lines = [line for line in capsys.readouterr().err.splitlines() if "minutes left" in line]
    assert [line.split(",")[0] for line in lines] == [
        f"run 2 of 9: step {n} of 12" for n in (3, 6, 9, 12)]
    assert lines[0].endswith("1.6 minutes left")  # 33 seconds for 3 steps, 9 to come


# ---- bench.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [*VARIANTS, "crosslayer+gqa+denseformer", "plus with cla"])
def test_what_bench_sees_in_attention_is_what_numpy_says(attention):
    model, idx, each = tiny_model(attention), tokens(B=3, T=20), []
    got = bench.look_at_attention(model, idx)
    for sequence in idx:
        watch, parameters = [], {name: p.detach() for name, p in model.named_parameters()}
        reference_sequence(model.config, parameters, sequence, watch)
        layers = []
        for attention_of_heads, values, hidden in watch:
            A = np.mean([a.numpy() for a in attention_of_heads], axis=0)
            T = len(A)
            p = [sum(A[i, j] for i in range(T)) / A.sum() for j in range(T)]
            v = np.concatenate([x.numpy() for x in values], axis=1)
            h = hidden.numpy()
            v_norms, h_norms = np.sqrt((v * v).sum(axis=1)), np.sqrt((h * h).sum(axis=1))
            cosines = [h[i] @ h[j] / (h_norms[i] * h_norms[j])
                       for i in range(T) for j in range(T) if i != j]
            spectrum = np.linalg.svd(v, compute_uv=False) ** 2 / T
            share = spectrum[spectrum > 1e-9] / spectrum.sum()
            layers.append([-sum(x * math.log(x) for x in p), max(p),
                           np.mean([A[i, 0] for i in range(1, T)]),
                           v_norms[0] / v_norms[1:].mean(), h_norms[0] / h_norms[1:].mean(),
                           np.mean(cosines), spectrum.max(),
                           math.exp(-sum(x * math.log(x) for x in share)), *p])
        each.append(layers)
    expected = np.mean(each, axis=0)  # (L, 8 + T)
    for i, name in enumerate(bench.MEASURES):
        np.testing.assert_allclose(got[name], expected[:, i], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(got["importance"], expected[:, 8:], rtol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


def test_even_attention_is_what_zero_queries_give():
    model = tiny_model("vanilla")
    for block in model.layers:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    got, expected = bench.look_at_attention(model, tokens(T=20)), bench.even(20, 32)
    for name in ("entropy", "top", "first"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, err_msg=name)


def test_the_task_asks_which_of_four_continuations_is_the_likeliest():
    model = tiny_model("svformer", torch.float32)
    data = np.random.default_rng(1).integers(0, 37, 500).astype(np.uint16)
    got = bench.task_accuracy(model, data, 70, torch.device("cpu"))
    rng, right = np.random.default_rng(0), 0
    for size in (32, 32, 6):  # of 32 tokens an eighth is asked for, after a quarter
        for places in rng.integers(0, 500 - 12, (size, 4)):
            context, scores = list(data[places[0]:places[0] + 8]), []
            for place in places:
                ids = context + list(data[place + 8:place + 12])
                logits = model(torch.tensor([[int(i) for i in ids]]))[0][0].detach().double()
                p = torch.softmax(logits, dim=-1)
                scores.append(sum(math.log(p[t - 1, int(ids[t])]) for t in range(8, 12)))
            right += scores[0] == max(scores)
    assert got == right / 70


def test_what_is_compared_is_the_end_of_training_and_the_deeper_half_of_the_layers():
    layers = dict.fromkeys(bench.MEASURES, [1, 2, 3, 5])
    record = dict(flags=dict(batch_size=2, grad_accum=3, block_size=4, seed=7), task=0.25,
                  train_curve=[9.0] * 38 + [3.0, 2.0], val_curve=[[20, 5.0], [40, 4.0]],
                  attention=layers, attention_start=layers | dict(rank=[0, 0, 1, 2]))
    got = bench.with_numbers(record, start_token=False)
    assert (got["seed"], got["validation"], got["accuracy"], got["rank"]) == (7, 4.0, 25, 4)
    assert got["training"] == 2.5 and len(got["smooth"]) == 39  # of two steps each, of 40
    assert got["tokens"][0] == 2 * 24 and got["tokens"][-1] == 40 * 24
    assert bench.with_numbers(record, start_token=True)["rank"] == 1.5


def test_gaps_are_paired_by_seed_with_students_interval():
    first = [dict(seed=1, x=1.0), dict(seed=2, x=2.0), dict(seed=3, x=3.0)]

    def cell(runs, digits):  # runs: {seed: x}
        runs = [dict(seed=seed, x=x) for seed, x in runs.items()]
        return bench.mean_and_gap(runs, bench.pair_up(runs, first), "x", digits)

    spread = 4.303 * np.std([0.1, 0.3, 0.5], ddof=1) / math.sqrt(3)
    mean = np.mean([3.5, 1.1, 2.3, 100])
    assert cell({3: 3.5, 1: 1.1, 2: 2.3, 9: 100.0}, 3) == f"{mean:.3f} +0.300 ±{spread:.3f}"
    assert bench.mean_and_gap(first, [], "x", 1) == "2.0"
    assert cell({1: 0.5}, 1) == "0.5 -0.5" and cell({8: 0.5}, 1) == "0.5"
    assert bench.interval([1.0] * 20) == 0

    other = dict(val_curve=[[100, 3.0], [200, 2.0]])

    def saved(*losses):
        curve = [[50 * (i + 1), loss] for i, loss in enumerate(losses)]
        return bench.tokens_saved(dict(val_curve=curve), other)
    assert saved(3.0, 2.5, 1.5, 1.0) == pytest.approx(1 - 125 / 200)
    assert saved(3.0, 1.9, 2.6, 2.5) == pytest.approx(1 - (50 + 50 / 1.1) / 200)  # once is enough
    assert math.isnan(saved(3.0, 2.5, 2.2, 2.1))
    good, bad = [[[50, 3.0], [100, 2.0], [200, 1.0]], [[100, 3.0], [200, 2.5]]]
    pairs = [(dict(val_curve=curve), other) for curve in (good, good, bad)]
    assert bench.fewer_tokens(pairs[:2]) == "50%" and bench.fewer_tokens([]) == ""
    assert bench.fewer_tokens(pairs) == "reached 2/3"


@pytest.fixture
def small_bench(small_run, monkeypatch, capsys):
    """Calls bench.py's main in this process; returns what it prints. Seconds, on 40 kB of text."""
    words = ("--dataset text --size 2M --n_layer 2 --block_size 32 --batch_size 6 --max_steps 6 "
             "--eval_every 2 --eval_tokens 256 --warmup_steps 2 --device cpu --rounds 1 "
             "--decode_batch 2 --contexts 3 --questions 40 --out_dir b").split()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(bench, "catch_signals", lambda: caught)
    monkeypatch.setattr(bench, "draw", lambda *_: None)  # seconds; see the test of the figures
    caught.clear()

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words, *more])
        bench.main()
        return capsys.readouterr().out
    return call


caught = []  # the signals that bench.py sees
DRAW = bench.draw


def bench_records(kind="run"):
    return [r for r in bench.read_records(Path("b/results.jsonl")) if r["kind"] == kind]


def test_bench_measures_once_and_shows_it_anywhere(small_bench, monkeypatch, capsys, tmp_path):
    asked = ("--variants", "vanilla", "resformer --value_lambda 2 1 --lr 1e-2", "svformer+gqa",
             "--seeds", "3", "4", "--neutreno_lambda", "0.3")
    with patch.object(bench, "look_at_attention", wraps=bench.look_at_attention) as looks:
        printed = small_bench(*asked)
    runs = bench_records()
    assert [(r["variant"].split()[0], r["flags"]["seed"]) for r in runs] == [
        (a, seed) for seed in (3, 4) for a in ("vanilla", "resformer", "svformer+gqa")]
    assert runs[1]["flags"]["value_lambda"] == [2, 1] and runs[1]["flags"]["lr"] == 1e-2
    assert {r["flags"]["neutreno_lambda"] for r in runs} == {None}  # nobody uses it
    assert [step for step, _ in runs[0]["val_curve"]] == [2, 4, 6]
    assert np.shape(runs[0]["attention"]["importance"]) == (2, 32)
    texts, started = (call.args[1] for call in looks.call_args_list[:2])
    assert started[:, 0].eq(256).all() and torch.equal(started[:, 1:], texts[:, :-1])
    # 2 layers, 2 heads of 8 numbers; svformer+gqa: 2 + 1 tensors, one head.
    assert [r["cache_bytes"] for r in runs[:3]] == [4 * 4 * 16, 4 * 4 * 16, 4 * 3 * 8]
    # The record is enough to make the run again, and gives the same loss.
    flags = runs[1]["flags"] | dict(value_lambda=(2, 1), out_dir="again")
    assert run(TrainConfig(**flags))[-1]["val_loss"] == runs[1]["val_curve"][-1][1]
    losses = [r["val_curve"][-1][1] for r in runs]
    gaps = [losses[1] - losses[0], losses[4] - losses[3]]
    assert f"{np.mean(gaps):+.4f} ±{bench.interval(gaps):.4f}" in printed
    assert "2 resformer: resformer --value_lambda 2 1 --lr 1e-2" in printed
    assert "| 3 svformer+gqa |     2 |" in printed and "38% " in printed
    assert max(map(len, printed.splitlines())) <= 100

    monkeypatch.setattr(bench, "train", None)  # whoever calls it fails
    asked += ("--parts", "loss")
    assert "reused 6 of 6 runs, of 20" in small_bench(*asked)
    assert "reused" in small_bench(*asked, "--name", "again")
    written = Path("b/results.jsonl").read_bytes()
    small_bench(*asked)  # its first name again: there is nothing to add
    assert Path("b/results.jsonl").read_bytes() == written
    with pytest.raises(TypeError):  # another flag is another run
        small_bench(*asked, "--weight_decay", "0.2")
    with Path("b/results.jsonl").open("a") as f:
        f.write('{"name": "main", "ki')  # killed in a write
    shutil.rmtree("data")
    capsys.readouterr()
    monkeypatch.setattr(bench, "pick_device", None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--show", "b/results.jsonl", "--out_dir", "c"])
    bench.main()
    shown = capsys.readouterr()
    main, again = shown.out.split("\n== again\n")
    assert again in printed and main.removeprefix("\n== main\n").startswith(again)
    assert "is cut or broken" in shown.err
    for more, message in ((["--name", "other"], "--name other: b/results.jsonl has main, again"),
                          (["--variants", "vanila"], "--variants: main in .* has vanilla, resf")):
        with pytest.raises(UserError, match=message), monkeypatch.context() as context:
            context.setattr(sys, "argv", [*sys.argv, *more])
            bench.main()


def test_the_figures(small_bench, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    monkeypatch.setattr(bench, "draw", DRAW)
    small_bench("--variants", "vanilla", "resformer", "--seeds", "1", "--parts", "loss")
    for what in ("cache", "loss", "attention", "heat"):
        assert Path(f"b/main-{what}.png").read_bytes()[1:4] == b"PNG"


def test_results_of_other_code_are_said_and_fresh_measures_anew(small_bench, monkeypatch):
    asked = ("--variants", "vanilla", "--seeds", "1", "--parts", "loss")
    small_bench(*asked)
    monkeypatch.setattr(bench, "fingerprint", lambda: "edited")
    assert "WARNING: 1 of them were made by other code" in small_bench(*asked)
    assert len(bench_records()) == 1
    small_bench(*asked, "--fresh")
    assert len(bench_records()) == 2
    small_bench(*asked, "--dtype", "bfloat16")  # as what was trained in float32 is not
    assert len([p for p in Path("b").iterdir() if p.is_dir()]) == 3  # each was trained
    both = small_bench("--variants", "gqa", "vanilla", "--seeds", "1", "--parts", "loss")
    assert "2 vanilla" in both and "WARNING" not in both
    monkeypatch.setattr(bench, "fingerprint", lambda: "edited again")
    both = small_bench("--variants", "vanilla", "cla", "--seeds", "1", "--parts", "loss")
    assert "2 cla" in both and "different versions of the code" in both


def test_runs_that_are_no_pair_stand_in_tables_of_their_own(small_bench, monkeypatch, capsys):
    asked = ("--seeds", "1", "--parts", "loss", "--variants", "vanilla")
    small_bench(*asked, "resformer --lr 0.1")
    small_bench(*asked, "gqa", "--n_embd", "32", "--lr", "0.01")
    small_bench(*asked[2:], "--seeds", "2", "--n_embd", "32", "--lr", "0.01")
    show = ["bench.py", "--show", "b/results.jsonl"]
    monkeypatch.setattr(sys, "argv", show)
    bench.main()
    first, second = capsys.readouterr().out.split("\nmain-2: n_embd 32, lr 0.01\n")
    assert first.startswith("\nmain-1: n_embd None, lr 0.004\n\nno runs of gqa\n")
    assert "| 2 resformer |     1 |" in first
    assert "| 1 vanilla |     2 |" in second and "| 2 gqa     |     1 |" in second
    # A flag of one variant that is given to all: the newest counts, they are not averaged.
    for number in ("0.1", "0.2"):
        small_bench(*asked[2:], "neutreno", "--seeds", number[2:], "--neutreno_lambda", number)
    monkeypatch.setattr(sys, "argv", show)
    bench.main()
    assert "| 3 neutreno  |     1 |" in capsys.readouterr().out


def test_the_fingerprint_is_the_codes_without_its_comments(tmp_path, monkeypatch):
    for name in ("model.py", "train.py"):
        shutil.copy(HERE / name, tmp_path)
    before = bench.fingerprint()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    text = (tmp_path / "model.py").read_text(encoding="utf-8")
    for old, new, same in (("# Softmax in float32", "# softmax in float32", True),
                           ("The language model.", "A model.", True), ("10000.0", "9999.0", False)):
        assert text.count(old) == 1
        (tmp_path / "model.py").write_text(text.replace(old, new), encoding="utf-8")
        assert (bench.fingerprint() == before) == same


def test_a_results_file_survives_a_cut_line(folder):
    path = Path("r.jsonl")
    record = dict(name="main", kind="run", variant="vanilla", flags={}, date="", code="")
    path.write_text(json.dumps(record)[:-9])
    bench.write_record(path, record)
    assert bench.read_records(path) == [record]
    path.write_text("")
    with pytest.raises(UserError, match="no records"):
        bench.show_file(bench.BenchConfig(show="r.jsonl"), {"show"})


def test_a_signal_ends_all_of_bench_and_the_same_command_goes_on(small_bench, monkeypatch):
    asked = ("--variants", "vanilla", "gqa", "--seeds", "1", "--parts", "loss")
    caught.append(signal.SIGTERM)  # in the first run's training
    with pytest.raises(SystemExit):
        small_bench(*asked)
    assert not Path("b/results.jsonl").exists()
    caught.clear()
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # in the task
        context.setattr(bench, "catch_signals", train.catch_signals)
        context.setattr(bench, "task_accuracy", lambda *_: signal.raise_signal(signal.SIGINT))
        small_bench(*asked)
    assert not Path("b/results.jsonl").exists()
    small_bench(*asked)
    assert len(bench_records()) == 2


# ---- the scripts, as a user types them ----------------------------------------------------------


@pytest.fixture
def script(capfd, monkeypatch):
    """Runs a script in this process; returns (exit status, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(name, *flags):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *flags])
        status = 0
        try:
            runpy.run_path(str(HERE / name), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return status, *capfd.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_from_data_to_text(folder, script, monkeypatch):
    write("text.txt", "To be, or not to be: that is the question.\n" * 500)
    assert "19,350 tokens for training" in script("prepare_data.py", "text.txt")[1]
    flags = (*as_flags(SMALL), "--attention=svformer", "--out_dir=my run")
    status, out, _ = script("train.py", *flags, "--max_steps=5")
    assert status == 0 and "nats per token" in out and "62% of vanilla's" in out
    assert "python sample.py --out_dir 'my run'" in out or os.name == "nt"
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
    with open("prompt.txt", encoding="cp1252") as stdin:  # read as UTF-8 all the same
        monkeypatch.setattr(sys, "stdin", stdin)
        assert script("sample.py", *flags, "--prompt=-")[1] == expected


def test_what_a_terminal_cannot_show_is_replaced(folder, script):
    write("漢字.txt", "漢" * 1000)
    for encoding, name, *flags in (
            ("ascii", "prepare_data.py", "漢字.txt"),
            ("cp1252", "train.py", *as_flags(SMALL), "--dataset=漢字", "--out_dir=漢"),
            ("cp1252", "sample.py", "--out_dir=漢", "--prompt=漢", "--max_new_tokens=1",
             "--device=cpu")):
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
        status, out, _ = script(name, *flags)
        assert status == 0 and "?" in out


def test_a_run_without_gpt2s_vocabulary_succeeds(small_run, monkeypatch, capsys):
    monkeypatch.setattr(train, "get_tokenizer", Mock(side_effect=UserError("no vocabulary")))
    model, history = train.train(small_run)
    train.report(small_run, model, history)
    printed = capsys.readouterr().out
    assert f"{history[-1]['val_loss']:.4f} nats" in printed and "No sample" in printed


# The script, its flags, and words that must be in its one line; the folder is broken_things().
BAD_INPUTS = [line.split("|") for line in """
prepare_data.py|nowhere|nowhere is no file or folder
prepare_data.py|empty.txt|no UTF-8 text
prepare_data.py|one_byte.txt|too short
prepare_data.py|elsewhere/text.txt|data/text holds data from elsewhere
prepare_data.py|./stdlib/../stdlib|'stdlib' cannot be the name
prepare_data.py|data/text|is where its own data would go
prepare_data.py|fineweb --tokenizer byte|--tokenizer
prepare_data.py|fineweb --shards 0|--shards
prepare_data.py|--bogus|--bogus
train.py|--attention resnet|--attention 'resnet': choose from
train.py|--size 83M|--size
train.py|--n_layer 1.5|--n_layer
train.py|--dataset nothing|--dataset nothing isn't there yet: python prepare_data.py nothing
train.py|--dataset odd|train.bin should be
train.py|--dataset no_val|val.bin should be
train.py|--dataset text-gpt2|python prepare_data.py text --tokenizer gpt2 prepares it
train.py|--dataset no_json|meta.json
train.py|--dataset list_json|meta.json
train.py|--block_size 1000000|--block_size 1000000 must be less than
train.py|--lr nan|--lr must be a finite number of at least 0
train.py|--min_lr -1|--min_lr must be a finite number of at least 0
train.py|--seed 99999999999999999999999|--seed must be less than 2^62
train.py|--device tpu|--device tpu
train.py|--batch_size 100000000000|out of memory
train.py|--resume --overwrite|choose one
train.py|--out_dir text.txt|text.txt
train.py|--out_dir run|run holds a run: --resume goes on with it, --overwrite starts anew
train.py|--resume --out_dir run --max_steps 1|--max_steps 1: the run in run has 2 steps
train.py|--resume --out_dir run --dataset other|--dataset other is not what the run
train.py|--resume --out_dir bomb|bomb/ckpt.pt can't be read
train.py|--resume --out_dir list|list/ckpt.pt is not a checkpoint of train.py
train.py|--resume --out_dir version|not a checkpoint of train.py
train.py|--resume --out_dir config|config/ckpt.pt can't be resumed
train.py|--resume --out_dir shapes|shapes/ckpt.pt can't be resumed
train.py|--resume --out_dir optimizer|optimizer/ckpt.pt can't be resumed
sample.py|--out_dir nowhere|nowhere/ckpt.pt isn't there
sample.py|--out_dir shapes|shapes/ckpt.pt doesn't hold the model
sample.py|--out_dir run --prompt FILE:nowhere|nowhere
sample.py|--out_dir run --prompt FILE:latin1.txt|FILE:latin1.txt is not UTF-8
sample.py|--out_dir run --prompt FILE:empty.txt|--prompt has no text
sample.py|--out_dir run --num_samples 0|--num_samples
sample.py|--out_dir run --temperature -1 --prompt d|--temperature must be
bench.py|--variants resnet|--variants resnet: --attention 'resnet': choose from
bench.py|--variants gqa gqa|--variants has a value twice
bench.py|--rounds 0|--rounds
bench.py|--variants;vanilla;resformer --seed 7|--seed is for all variants alike
bench.py|--n_layer 10 --variants;vanilla;svformer --residual_layers 9|residual_layers is for
bench.py|--variants;resformer --attention gqa|the name of the variant comes first
bench.py|--name a/b|--name 'a/b'
bench.py|--show nowhere|--show nowhere
bench.py|--attention cla|--attention
bench.py|--out_dir strange|results.jsonl
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
        write("one_byte.txt", "a")
        write("latin1.txt", "schön".encode("latin-1"))
        write("elsewhere/text.txt", "another text of the same name\n" * 99)
        write("stdlib/a.py", "# not Python's\n" * 99)
        write("strange/results.jsonl", '{"nom": 1}\n')
        for name in ("odd", "no_val", "no_json", "list_json"):
            shutil.copytree("data/text", f"data/{name}")
        write("data/odd/train.bin", Path("data/text/train.bin").read_bytes()[:-1])
        Path("data/no_val/val.bin").unlink()
        write("data/no_json/meta.json", "{'tokens'")
        write("data/list_json/meta.json", "[1]")

        run(replace(SMALL, max_steps=2))
        ckpt = train.load_checkpoint(Path("run/ckpt.pt"))
        weights = ckpt["model"] | {"layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
        for name, broken in dict(
                list=[1, 2], version={key: ckpt[key] for key in ckpt if key != "scaler"},
                config=ckpt | dict(config=dict(ckpt["config"], flavour=1)),
                shapes=ckpt | dict(model=weights),
                optimizer=ckpt | dict(optimizers=[dict(state={}, param_groups=[])])).items():
            Path(name).mkdir()
            torch.save(broken, f"{name}/ckpt.pt")
        write("bomb/ckpt.pt", "cos\nmkdir\n(S'exploded'\ntR.")  # a pickle that makes a folder
    return folder


@pytest.mark.parametrize("name, flags, words", BAD_INPUTS, ids=lambda value: value[:60])
def test_a_mistake_ends_in_one_line_and_changes_nothing(broken_things, monkeypatch, script, name,
                                                        flags, words):
    monkeypatch.chdir(broken_things)
    small = []
    if name in ("train.py", "bench.py"):  # for all that the row doesn't say
        small = as_flags(replace(SMALL, out_dir=None))
    if name == "bench.py":
        small.append("--variants=vanilla")
    flags, *quoted = flags.split(";")  # behind a semicolon stands what a shell would quote
    before = contents(broken_things)
    status, out, error = script(name, *small, *flags.split(), *quoted)
    assert status == 2 and error.count("\n") == 1 and error.startswith(f"{name}: "), error
    assert words in error.replace(os.sep, "/")
    assert "prompt" not in flags or out == ""
    assert contents(broken_things) == before


@pytest.mark.parametrize("error, line", [
    (RuntimeError("CUDA out of memory. Tried to\nallocate"), "out of memory: CUDA out of memory."),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: Default"),
    (MemoryError(), "out of memory"), (OSError(), "OSError"), (UserError("a\nb"), "a"),
    (AttributeError("module 'torch._C' has no attribute '_cuda_setDevice'"), "--device: this"),
    (AttributeError("module 'torch' has no attribute 'x'"), None),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    (ZeroDivisionError("a fault"), None)])
def test_only_mistakes_and_full_machines_become_a_line(error, line, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x/train.py"])
    with pytest.raises(SystemExit if line else type(error)) as ended:
        with prepare_data.one_line_errors():
            raise error
    printed = capfd.readouterr().err
    if line:
        assert ended.value.code == 2 and printed.startswith(f"train.py: {line}")
        assert printed.count("\n") == 1


# ---- README -------------------------------------------------------------------------------------


def readme(kind):
    """The fenced blocks of a kind in README.md."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_readme_quotes_the_code_as_it_is():
    quotations = [block for block in readme("python") if "self.v_proj" in block]
    assert len(quotations) == 1
    assert quotations[0] in (HERE / "model.py").read_text(encoding="utf-8")


def test_readmes_commands_are_such_as_the_scripts_take(folder, monkeypatch, capsys):
    scripts = {"train.py": (TrainConfig, train.check), "sample.py": (sample.SampleConfig, None),
               "bench.py": (bench.BenchConfig, bench.list_runs),
               "prepare_data.py": (DataConfig, None)}
    shutil.copytree(HERE / "assets", "assets")
    monkeypatch.setattr(bench, "draw", lambda *_: None)
    lines = "".join(readme("sh")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    commands = [words[1:] for words in commands if words[:1] == ["python"] and words[1] != "-m"]
    assert len(commands) >= 12
    for name, *flags in commands:
        cls, check = scripts[name]
        config, _ = prepare_data.parse_flags(cls, "", flags)
        if check is not None:
            check(config)
        if "--show" in flags or "cache" in flags:  # nothing is trained: it can be run here
            monkeypatch.setattr(sys, "argv", [name, *flags])
            bench.main()
            expected = "Attention in the deeper half" if "--show" in flags else "64.0"
            assert expected in capsys.readouterr().out


# ---- faults: full disks, signals, kills ---------------------------------------------------------


@posix
def test_a_full_disk_leaves_what_was_there(small_run, folder):
    import resource  # a limit on the size of files: a write fails as it does on a full disk

    def full_at(n_bytes, call, *args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            with pytest.raises((UserError, OSError)) as error:
                call(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return str(error.value)

    run(replace(small_run, max_steps=4))
    before, log = Path("run/ckpt.pt").read_bytes(), Path("run/log.jsonl").stat().st_size
    said = full_at(len(before) // 2, run, replace(small_run, resume=True))
    assert "ckpt.pt can't be written, and is as it was" in said
    assert "too large" in full_at(log + 100, run, replace(small_run, resume=True, eval_every=99))
    assert Path("run/ckpt.pt").read_bytes() == before and not list(folder.rglob("*.part"))
    assert len(run(replace(small_run, resume=True))) == 12
    data = contents("data/text")
    assert "train.bin can't be written" in full_at(10_000, prepare, DataConfig("text.txt"))
    assert contents("data/text") == data


@posix
def test_a_folder_has_one_owner_and_is_free_after_a_crash_or_an_error(small_run, monkeypatch):
    Path("run").mkdir()
    with open("run/lock", "a") as lock:  # closed by the system when its process ends
        train.lock_file(lock, "run")
        with pytest.raises(UserError, match="in use .* --out_dir"):
            run(small_run)
        assert [p.name for p in Path("run").iterdir()] == ["lock"]
    with patch.object(train, "learning_rate", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt) as kept:
            run(small_run)
    assert len(run(small_run)) == 12 and kept


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("max_steps, stops_after", [(4, 3), (2, 2)])
def test_a_signal_saves_and_says_how_to_go_on(small_run, script, monkeypatch, capfd, number,
                                              max_steps, stops_after):
    # The fixture script puts the handlers of signals back.
    evaluate = train.evaluate

    def interrupted(*args):  # in the evaluation after step 2, which may be the last
        monkeypatch.setattr(train, "evaluate", evaluate)
        signal.raise_signal(number)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    flags = as_flags(replace(small_run, eval_every=2, max_steps=max_steps, out_dir="a run"))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--overwrite"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process at once
    printed = capfd.readouterr()
    assert ended.value.code == 128 + number and "KV cache" not in printed.out  # no report
    again = prepare_data.command("python", "train.py", *flags, "--resume")
    said = f"stopped after step {stops_after}, saved; to go on: {again}"
    assert printed.err.splitlines()[-1] == said
    history = train.load_checkpoint(Path("a run/ckpt.pt"))["history"]
    assert len(history) == len(read_log("a run")) == stops_after


def train_to_be_killed(config, seed):
    """In a process of its own, with a disk that is slow at random: most kills hit a write."""
    rng, fsync, rename = np.random.default_rng(seed), os.fsync, os.replace
    os.fsync = lambda fd: (time.sleep(rng.uniform(0, 0.02)), fsync(fd))
    os.replace = lambda a, b: (time.sleep(rng.uniform(0, 0.02)), rename(a, b))
    torch.set_num_threads(1)
    train.train(config, verbose=False)


@posix
@pytest.mark.parametrize("kills", [2, pytest.param(42, marks=slow)])
def test_killed_anywhere_it_goes_on_to_the_same_bits(small_run, monkeypatch, kills):
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # the fork server imports this file once, for all
    config = replace(small_run, max_steps=10 + 2 * kills, eval_every=1, attention="svformer+gqa")
    run(config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_model"])
    config, part = replace(config, out_dir="killed", resume=True), Path("killed/ckpt.pt.part")
    rng = np.random.default_rng(0)
    for i in range(kills + 1):  # the last one is left to end by itself
        part.unlink(missing_ok=True)
        process = context.Process(target=train_to_be_killed, args=(config, i))
        process.start()
        if i < kills:
            while process.is_alive() and not part.exists():  # wait for a write
                time.sleep(0.002)
            process.join(rng.uniform(0, 0.03))
            process.kill()
        process.join()
    assert process.exitcode == 0
    torch.testing.assert_close(state("killed"), state("run"), rtol=0, atol=0)
