"""Tests. The model is compared with `reference_sequence`, a slow float64 version of the equations
in loops over layers, heads and pairs of numbers; the scripts run on small data elsewhere.

    pip install pytest && pytest -q
    SLOW=1 pytest -q -k slow        faults at length: many kills, many processes
"""

import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import model as model_file
import prepare_data
import sample
import train
from model import GPT, VARIANTS, GPTConfig, KVCache, draw
from prepare_data import DataConfig, UserError, get_tokenizer, prepare
from train import TrainConfig

HERE = Path(__file__).parent
SLOW = "SLOW" in os.environ
torch.set_num_threads(1)  # everything here is tiny
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start too
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, limits or locks")
slow = pytest.mark.skipif(not SLOW, reason="takes a minute; SLOW=1 runs it")

COMBINATIONS = ["svformer+gqa", "svformer+cla", "cla+gqa", "resformer+gqa", "resformer+neutreno",
                "resformer+denseformer", "resformer+cla", "neutreno+gqa", "svformer+denseformer",
                "crosslayer+cla", "crosslayer+gqa+denseformer",
                "resformer+neutreno+denseformer+cla+gqa"]
ABLATIONS = {
    "resformer 0.3 0.9": dict(attention="resformer", value_lambda=(0.3, 0.9)),
    "resformer on 3 and 5": dict(attention="resformer", residual_layers=(5, 3)),
    "learnable": dict(attention="resformer+neutreno", value_residual="learnable",
                      value_lambda=(0.3, 0.9)),
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
    T, hs = x.shape
    position, columns = torch.arange(T, dtype=torch.float64), [None] * hs
    for j in range(hs // 2):
        angle = position * 10000 ** (-2 * j / hs)
        a, b = x[:, j], x[:, j + hs // 2]
        columns[j] = a * torch.cos(angle) - b * torch.sin(angle)
        columns[j + hs // 2] = b * torch.cos(angle) + a * torch.sin(angle)
    return torch.stack(columns, dim=1)


def reference_lambdas(c, P, n):
    """The weights of V_1 and V_n in layer n, counted from 1; None if it doesn't mix them."""
    layers = [m for m in range(2, c.n_layer + 1) if not ("cla" in c.attention and m % 2 == 0)]
    if c.residual_layers is not None:
        layers = sorted(c.residual_layers)
    if "resformer" not in c.attention or n not in layers:
        return None
    if c.value_residual == "fixed":
        return c.value_lambda
    i, l1, l2 = layers.index(n), P["value_l1"], P["value_l2"]
    if c.value_residual == "learnable":
        return l1[i], l2[i]
    return P["value_total"][0] * torch.exp(l1[i]) / torch.exp(l1).sum(), l2[i]


def reference_sequence(c, P, idx, watch=None):
    """One sequence (T,) -> logits (T, V), from the parameters P by name. watch, if given, becomes
    a list with each layer's (A_n of each head, V_n of each key/value head, hidden states)."""
    names, T, hs = c.attention.split("+"), len(idx), c.n_embd // c.n_head
    hidden = X0 = P["embed_tokens.weight"][idx]
    outputs, K, V = [X0], {}, {}
    for n in range(1, c.n_layer + 1):
        def W(name):
            return P[f"layers.{n - 1}.{name}.weight"]

        x = reference_norm(hidden, W("input_layernorm"))
        if "cla" in names and n % 2 == 0:
            K[n], V[n] = K[n - 1], V[n - 1]
        else:
            k = x @ W("self_attn.k_proj").T
            K[n] = [reference_rope(k[:, h * hs:(h + 1) * hs]) for h in range(c.n_kv_head)]
            if "svformer" in names and n > 1:
                V[n] = V[1]
            else:
                v = x @ W("self_attn.v_proj").T
                V[n] = [v[:, h * hs:(h + 1) * hs] for h in range(c.n_kv_head)]
                if lambdas := reference_lambdas(c, P, n):
                    l1, l2 = lambdas
                    V[n] = [l1 * first + l2 * own for first, own in zip(V[1], V[n])]
        q, U, attention = x @ W("self_attn.q_proj").T, [], []
        for h in range(c.n_head):
            g = h * c.n_kv_head // c.n_head  # the key/value head of query head h
            future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
            read = [(K[n][g], V[n][g])]
            if "crosslayer" in names and n > 1:
                read = [(K[1][g], V[1][g]), (K[n][g], V[n][g])]
            scores = [reference_rope(q[:, h * hs:(h + 1) * hs]) @ k.T / math.sqrt(hs)
                      for k, _ in read]
            scores = [torch.exp(s.masked_fill(future, -math.inf)) for s in scores]
            total = sum(s.sum(dim=-1, keepdim=True) for s in scores)
            A = [s / total for s in scores]
            attention.append(sum(A))
            u = sum(a @ v for a, (_, v) in zip(A, read))
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
    probability = torch.softmax(expected, dim=-1)
    expected_loss = 0
    for b in range(idx.size(0)):
        for t in range(idx.size(1)):
            surprise = -torch.log(probability[b, t, targets[b, t]])
            expected_loss = expected_loss + surprise / idx.numel()
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
    model, idx = tiny_model(attention), tokens(T=29)
    full, cache = model(idx)[0], KVCache(model.config, 2, 29, dtype=torch.float64)
    pieces, start = [], 0
    for T in (7, 1, 1, 9, 2, 1, 8):
        pieces.append(model(idx[:, start:start + T], cache=cache)[0])
        start += T
        assert cache.length == start
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-9)
    changed = idx.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 37  # changes nothing before it
    after = model(changed)[0]
    assert torch.equal(after[:, :13], full[:, :13]) and not torch.equal(after[:, 13], full[:, 13])


# ---- the loss -----------------------------------------------------------------------------------


def test_the_loss_leaves_out_targets_of_minus_100_and_makes_an_eighth_of_the_logits(monkeypatch):
    model, made, linear = tiny_model("resformer"), [], F.linear

    def spy(x, weight, *bias):
        if weight.shape == model.lm_head.weight.shape:
            made.append(len(x))
        return linear(x, weight, *bias)

    for n in (48, 42, 2):  # 8 x 6 tokens, 7 x 6, 2 x 1
        idx, targets = tokens(T=n // 2, seed=1), tokens(T=n // 2, seed=2)
        targets[0, ::3] = -100
        if n == 48:
            targets[1, 6:12] = -100  # a whole eighth
        expected = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
        gradients = torch.autograd.grad(3 * expected, list(model.parameters()))
        monkeypatch.setattr(model_file.F, "linear", spy)
        made.clear()
        _, loss = model(idx, targets)
        monkeypatch.undo()
        assert sum(made) == n and max(made) == -(-n // 8)
        assert abs(loss.item() - expected.item()) < 1e-12
        got = torch.autograd.grad(3 * loss, list(model.parameters()))
        torch.testing.assert_close(got, gradients, rtol=0, atol=1e-12)


def test_the_softmax_of_the_loss_is_in_float32_under_autocast():
    x, weight = torch.randn(64, 32) * 3, torch.randn(500, 32)
    target = torch.randint(500, (64,))
    logits = (x.bfloat16() @ weight.bfloat16().T).double()  # rounded once, as autocast does
    expected = F.cross_entropy(logits, target, reduction="sum").item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model_file.LinearCrossEntropy.apply(x, weight, target, False)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected, rel=1e-5)


def test_without_gradients_the_loss_makes_none(monkeypatch):
    model, expected = tiny_model("vanilla"), tiny_model("vanilla")(tokens(), tokens(seed=2))[1]
    monkeypatch.setattr(torch, "mm", None)  # whoever calls it fails
    with torch.no_grad():
        assert model(tokens(), tokens(seed=2))[1].item() == expected.item()
    with pytest.raises(TypeError):
        model(tokens(), tokens(seed=2))


# ---- the KV cache and the parameters ------------------------------------------------------------

KV_NUMBERS = {  # numbers per token, in units of h = n_kv_head x head size
    "vanilla": lambda L: 2 * L, "crosslayer": lambda L: 2 * L, "resformer": lambda L: 2 * L,
    "neutreno": lambda L: 2 * L, "denseformer": lambda L: 2 * L, "gqa": lambda L: 2 * L,
    "resformer+gqa": lambda L: 2 * L, "svformer": lambda L: L + 1, "svformer+gqa": lambda L: L + 1,
    "cla": lambda L: 2 * math.ceil(L / 2), "cla+gqa": lambda L: 2 * math.ceil(L / 2),
    "svformer+cla": lambda L: math.ceil(L / 2) + 1}


@pytest.mark.parametrize("n_layer", [1, 4, 5, 24])
@pytest.mark.parametrize("attention", KV_NUMBERS)
def test_cache_holds_what_the_formula_says(attention, n_layer):
    config = tiny_config(attention, n_layer=n_layer)
    h = (2 if "gqa" in attention else 4) * 8
    cache = KVCache(config, batch_size=3, max_len=11, dtype=torch.bfloat16)
    a_token = KV_NUMBERS[attention](n_layer) * h * 2
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


def test_learned_weights_start_where_they_should():
    def start(value_residual, **changes):
        model = GPT(GPTConfig(n_layer=6, attention="resformer", value_residual=value_residual,
                              **changes)).requires_grad_(False)
        return {n: [float(x) for x in pair] for n, pair in model.value_lambdas().items()}

    both = [start(kind, value_lambda=(0.25, 0.75)) for kind in ("fixed", "learnable")]
    assert both == [{n: [0.25, 0.75] for n in range(2, 7)}] * 2
    for layers, changes in ((range(2, 7), {}), ((3, 6), dict(residual_layers=(6, 3)))):
        plus = start("plus", **changes)  # V_1's weights at 1 each, V_n's at 0.5
        assert list(plus) == list(layers)
        assert all(pair == pytest.approx([1, 0.5]) for pair in plus.values())
    assert GPT(tiny_config("denseformer")).depth_weights[2].tolist() == [0, 0, 0, 1]
    assert tiny_config("neutreno").neutreno_lambda == 0.4
    assert tiny_config("neutreno+resformer").neutreno_lambda == 0.2


def test_variants_of_one_seed_start_alike():
    models = {}
    for name in ("vanilla", "svformer"):
        torch.manual_seed(3)
        models[name] = GPT(tiny_config(name, n_embd=256, n_ffn=512)).state_dict()
    for name, p in models["svformer"].items():
        assert torch.equal(p, models["vanilla"][name]), name
    p = models["vanilla"]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert p[f"layers.1.{name}.weight"].std().item() == pytest.approx(0.02, rel=0.02), name
    assert not torch.equal(p["layers.1.mlp.up_proj.weight"], p["layers.2.mlp.up_proj.weight"])
    assert tiny_config("vanilla", n_ffn=None).n_ffn == 112 and tiny_config("gqa").n_kv_head == 2


@pytest.mark.parametrize("changes, begins", [
    (dict(vocab_size=0), "vocab_size must"), (dict(n_layer=True), "n_layer must"),
    (dict(n_embd=None), "n_embd must"),
    (dict(n_embd=36), "n_embd (36) must be n_head (4) x an even"),
    (dict(n_ffn=0), "n_ffn must"),
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
    window, expected = prompt, []
    for _ in range(50):  # 32 fit: the window slides more than once
        if window.size(1) > 32:
            window = window[:, -16:]
        best = model(window)[0][:, -1].argmax(dim=-1)
        expected.append(best)
        window = torch.cat((window, best[:, None]), dim=1)
    expected = torch.stack(expected, dim=1)
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
    generate(model, prompt, 1, seed=2**62)
    model(first[:, :9], first[:, 1:10])[1].backward()  # drawn tokens can be trained on


def test_text_is_generated_without_cudnns_attention(monkeypatch):
    model, seen, hidden_states = tiny_model("vanilla"), [], GPT.hidden_states

    def spy(*args):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden_states(*args)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    for _ in model.generate(tokens(), 3):
        assert torch.backends.cuda.cudnn_sdp_enabled()  # as it was, for whoever asked for a token
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


@pytest.mark.parametrize("name, options", [
    ("temperature", dict(temperature=-1)), ("temperature", dict(temperature=math.nan)),
    ("top_k", dict(top_k=0)), ("seed", dict(seed=-1)), ("max_new_tokens", dict(max_new_tokens=-1)),
    ("cache", dict(cache=5)), ("cache", dict(cache=40, use_cache=False)),
    ("idx", dict(idx=torch.zeros(1, 0, dtype=torch.long))), ("idx", dict(idx=tokens()[0])),
    ("idx", dict(idx=tokens() + 30)), ("idx", dict(idx=-tokens()))])
def test_generates_bad_arguments_are_named_at_the_call(name, options):
    model = tiny_model("svformer")
    if "cache" in options:
        options = options | dict(cache=KVCache(model.config, 2, options["cache"]))
    with pytest.raises(ValueError, match=f"^{name}"):
        model.generate(**(dict(idx=tokens(), max_new_tokens=9) | options))


def test_too_long_an_input_is_refused():
    model = tiny_model("svformer")
    with pytest.raises(ValueError, match="^idx has 33 tokens, more than block_size"):
        model(tokens(T=33))
    with pytest.raises(ValueError, match="max_len"):
        model(tokens(T=9), cache=KVCache(model.config, 2, 8))


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


def read_bin(path):
    return np.fromfile(path, dtype=np.uint16)


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")
            if p.name != "lock"}


@pytest.mark.parametrize("text", ["To be,\r\nor not to be?\n" * 3000, "漢" * 1001, "x" * 20])
def test_a_file_is_split_at_nine_tenths_of_its_characters(folder, text):
    (folder / "my text.txt").write_bytes(text.encode())
    out = prepare(DataConfig("my text.txt"))
    train_ids, val_ids, meta = prepare_data.load("my text")
    cut = len(text) * 9 // 10
    assert out == Path("data/my text") and bytes([*train_ids]) == text[:cut].encode()
    assert bytes([*val_ids]) == text[cut:].encode()
    ids = train_ids.tobytes() + val_ids.tobytes()
    assert meta["sha256"] == hashlib.sha256(ids).hexdigest()
    assert (meta["train_tokens"], meta["val_bytes"]) == (len(train_ids), len(val_ids))
    assert prepare_data.load(str(out))[2] == meta


def test_a_folder_is_split_by_documents(folder, monkeypatch, capsys):
    texts = {f"src/d{i % 3}/{i:02}.txt": f"document {i} <|endoftext|>" * (i + 1)
             for i in range(25)}
    texts |= {"src/.hidden": "no", "src/binary": "\0\1", "src/empty": "", "src/forbidden": "no"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "src/latin1").write_bytes(b"\xe9t\xe9")
    (folder / "src/.git").mkdir()
    (folder / "src/.git/file").write_text("no")
    (folder / "src/locked").mkdir()
    is_file, scandir = Path.is_file, os.scandir

    def may_not_be_entered(path):
        if path.name == "forbidden":
            raise PermissionError(path)
        return is_file(path)

    def may_not_be_listed(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "forbidden", str(path))
        return scandir(path)

    monkeypatch.setattr(Path, "is_file", may_not_be_entered)
    monkeypatch.setattr(os, "scandir", may_not_be_listed)
    prepare(DataConfig("src"))
    # Left out: binary, empty, forbidden, latin1, locked. What is hidden is not even counted.
    assert "src: 25 files of UTF-8 text, 5 left out" in capsys.readouterr().out
    train_ids, val_ids, meta = prepare_data.load("src")

    def documents(ids):
        parts = np.split(ids, np.flatnonzero(ids == 256))
        return [bytes(part[part < 256].astype(np.uint8)).decode() for part in parts]

    order = [texts[name] for name in sorted(texts) if "/d" in name]
    assert documents(val_ids) == [order[9], order[19]]
    assert documents(train_ids) == [t for i, t in enumerate(order) if i not in (9, 19)]
    assert meta["train_bytes"] == sum(len(t) for i, t in enumerate(order) if i not in (9, 19))
    for name in list(texts)[:23]:  # two remain: one to train on, one to validate on
        (folder / name).unlink()
    prepare(DataConfig("src"))
    assert documents(prepare_data.load("src")[1]) == [texts[list(texts)[23]]]


def test_a_name_is_taken_by_what_came_first(folder):
    for name in ("mine.txt", "other/mine.txt", "stdlib/a.txt", "data/own/a.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"This is {name}. " * 20)
    prepare(DataConfig("mine.txt"))
    before = contents("data")
    for other, message in (("other/mine.txt", "holds data from elsewhere"),
                           ("./stdlib/../stdlib", "'stdlib' cannot be the name"),
                           ("data/own", "is where its own data would go")):
        with pytest.raises(UserError, match=message):
            prepare(DataConfig(other))
    assert contents("data") == before


def test_stdlib_is_this_pythons_and_the_same_each_time(folder, monkeypatch):
    files = prepare_data.find_texts("stdlib", None)
    assert files == prepare_data.find_texts("stdlib", None)
    assert any(p.name == "argparse.py" for p in files)
    assert {p.suffix for p in files} == {".py"}
    for name in ("tests/lib/a.py", "tests/lib/b.txt", "tests/lib/test/c.py",
                 "tests/lib/site-packages/d.py", "tests/lib/json/e.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n" * 100)
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda _: str(folder / "tests/lib"))
    assert [p.name for p in prepare_data.find_texts("stdlib", None)] == ["a.py", "e.py"]
    for _ in range(2):  # what a first run of train.py prepares by itself; the second finds it
        _, _, meta = train.load_data(TrainConfig())
        assert meta["source"] == "stdlib" and meta["train_tokens"] == 100 * len("# tests/lib/a.py ")
        monkeypatch.setattr(train, "prepare", None)


def test_gpt2_tokens(folder):
    try:
        tokenizer = get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    text = "def naïve(x_1):\n\t\treturn 42  # <|endoftext|> don't!?\n" * 50
    (folder / "code.txt").write_bytes(text.encode())
    prepare(DataConfig("code.txt", tokenizer="gpt2"))
    train_ids, val_ids, meta = prepare_data.load("code-gpt2")
    assert tokenizer.decode([*train_ids, *val_ids]) == text
    assert meta["vocab_size"] == 50257 and tokenizer.eot_token not in train_ids
    config = train.model_config(TrainConfig(size="2M"), meta["vocab_size"])
    assert config.vocab_size == 50304 and config.n_ffn == 56


def test_gpt2_without_its_files_says_what_to_do(monkeypatch):
    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer byte"):
        get_tokenizer("gpt2")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; of an answer only the first `limit` bytes."""
    files, limit, requests = {}, None, []

    def do_GET(self):
        self.requests.append(self.path.strip("/"))
        body = self.files.get(self.requests[-1])
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/"
    monkeypatch.setattr(prepare_data, "FINEWEB_URL", url)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url + "input.txt")
    Server.files, Server.limit, Server.requests = {}, None, []
    yield Server
    httpd.shutdown()
    httpd.server_close()


def test_shakespeare_is_downloaded_once_and_checked(folder, server, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    with pytest.raises(UserError, match="404"):
        prepare(DataConfig("shakespeare"))
    server.files["input.txt"] = b"<html>not found</html>"
    with pytest.raises(UserError, match="SHA-256"):
        prepare(DataConfig("shakespeare"))
    server.files["input.txt"], server.limit = text, 1000
    with pytest.raises(UserError, match="the download ended early|IncompleteRead"):
        prepare(DataConfig("shakespeare"))
    assert not [p for p in folder.rglob("*") if p.is_file()]
    server.limit = None
    prepare(DataConfig("shakespeare"))
    prepare(DataConfig("shakespeare"))
    assert len(server.requests) == 4
    assert bytes([*read_bin("data/shakespeare/train.bin")]) == text[:len(text) * 9 // 10]


def shard(ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids, dtype="<u2").tobytes()


@pytest.fixture
def no_gpt2(monkeypatch):
    """The byte tokenizer in the place of GPT-2's, which would be a download of its own."""
    byte = get_tokenizer("byte")
    byte.name = "gpt2"
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: byte)


def test_fineweb_goes_on_with_the_shards_that_are_there(folder, server, no_gpt2):
    ids = [np.random.default_rng(i).integers(0, 257, 3000) for i in range(3)]
    ids[0][0] = 256
    server.files = {f"fineweb_train_00000{i}.bin": shard(ids[i - 1]) for i in (1, 2)}
    with pytest.raises(UserError, match="run this again"):  # no validation shard yet
        prepare(DataConfig("fineweb", shards=2))
    assert not Path("data/fineweb/meta.json").exists()
    server.files["fineweb_val_000000.bin"] = shard(ids[2])
    prepare(DataConfig("fineweb", shards=2))
    assert server.requests.count("fineweb_train_000001.bin") == 1
    train_ids, val_ids, meta = prepare_data.load("fineweb")
    assert np.array_equal(train_ids, np.concatenate(ids[:2])) and np.array_equal(val_ids, ids[2])
    assert meta["train_bytes"] == np.count_nonzero(train_ids != 256)


@pytest.mark.parametrize("body", [shard([1, 2], magic=1), shard([1, 2], version=2),
                                  shard([1, 2], count=3), shard([1, 2]) + b"!",
                                  b"<html>nothing</html>\n\n", b""])
def test_a_wrong_shard_is_refused_and_deleted(folder, server, no_gpt2, body):
    server.files["fineweb_train_000001.bin"] = body
    with pytest.raises(UserError, match="no shard of tokens"):
        prepare(DataConfig("fineweb"))
    assert not list(Path("data/fineweb").iterdir())


def test_a_shard_of_another_vocabulary_is_refused(folder, server, no_gpt2):
    for largest in (256, 257):
        for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
            Path("data/fineweb", name).unlink(missing_ok=True)
            server.files[name] = shard([1, 2, largest])
        if largest == 256:
            prepare(DataConfig("fineweb"))
    with pytest.raises(UserError, match="token id 257 is outside the vocabulary of 257"):
        prepare(DataConfig("fineweb"))


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture
def small_run(folder):
    """A config that trains in a second, on 40 kB of text."""
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    prepare(DataConfig("text.txt"))
    return TrainConfig(dataset="text", size="2M", block_size=32, batch_size=6, max_steps=12,
                       eval_every=4, eval_tokens=512, warmup_steps=2, device="cpu", out_dir="run")


def run(config, signals=()):
    return train.train(config, signals, verbose=False)[1]


def losses(history):
    return [record["loss"] for record in history]


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True)["model"] for path in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@pytest.mark.parametrize("attention", ["resformer", "crosslayer+denseformer", "svformer+gqa"])
def test_training_learns(small_run, attention):
    config = replace(small_run, attention=attention, max_steps=30, eval_every=12, lr=1e-2)
    model, history = train.train(config, verbose=False)
    assert [record["step"] for record in history] == list(range(1, 31))
    assert history[-1]["val_loss"] < history[0]["loss"] - 0.5
    assert history[-1]["bits_per_byte"] == pytest.approx(history[-1]["val_loss"] / math.log(2))
    assert history == [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in history if "val_loss" in r] == [12, 24, 30]
    saved = sample.load_model(Path("run/ckpt.pt"), "cpu", torch.float32)[0]
    assert torch.equal(saved(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close_and_resumes_exactly(small_run, dtype):
    config = replace(small_run, dtype=dtype, lr=1e-2)
    exact, rounded = run(replace(config, dtype="float32", out_dir="exact")), run(config)
    assert rounded[-1]["val_loss"] == pytest.approx(exact[-1]["val_loss"], rel=0.02)
    assert rounded[-1]["val_loss"] != exact[-1]["val_loss"]
    run(replace(config, out_dir="stopped"), signals=[signal.SIGTERM])  # after one step
    run(replace(config, out_dir="stopped", resume=True))
    assert same_weights("run/ckpt.pt", "stopped/ckpt.pt")
    scaler = torch.load("run/ckpt.pt", weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "float16")


def test_a_float16_step_that_overflows_is_left_out(small_run, monkeypatch):
    grad_scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, enabled: grad_scaler(device, 2.0**60, enabled=enabled))
    model, history = train.train(replace(small_run, dtype="float16", max_steps=1), verbose=False)
    start = train.make_model(small_run, 257, torch.device("cpu"))
    assert math.isfinite(history[0]["val_loss"])
    assert all(map(torch.equal, model.parameters(), start.parameters()))
    assert torch.load("run/ckpt.pt", weights_only=True)["scaler"]["scale"] == 2.0**59


def test_learning_rate_rises_then_follows_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate(config, step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.6)  # half-way down
    assert rates[10] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 6 / 8)) / 2)
    assert rates[12] == rates[13] == pytest.approx(0.2)
    assert train.learning_rate(replace(config, min_lr=None), 12) == pytest.approx(0.1)
    assert train.learning_rate(replace(config, warmup_steps=20), 12) == pytest.approx(13 / 20)


def test_a_step_is_adamw_with_clipping_and_no_decay_of_vectors(small_run):
    config = replace(small_run, attention="denseformer", max_steps=3, warmup_steps=2, lr=1e-2,
                     grad_clip=0.3, weight_decay=0.5)
    history = run(config)
    data = read_bin("data/text/train.bin").astype(np.int64)
    torch.manual_seed(config.seed)
    model = GPT(train.model_config(config, 257))
    m, v = ({name: 0 for name, _ in model.named_parameters()} for _ in range(2))
    for step, lr in enumerate((5e-3, 1e-2, 1e-2)):
        starts = np.random.default_rng((config.seed, step)).integers(0, len(data) - 32, (1, 6))[0]
        model.zero_grad()
        loss = model(torch.tensor(np.stack([data[s:s + 32] for s in starts])),
                     torch.tensor(np.stack([data[s + 1:s + 33] for s in starts])))[1]
        loss.backward()
        assert history[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
        assert norm > 0.3
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad * 0.3 / norm
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.95 * v[name] + 0.05 * g * g
                p *= 1 - lr * (0.5 if p.dim() > 1 else 0)
                root = (v[name] / (1 - 0.95 ** (step + 1))).sqrt()
                p -= lr * m[name] / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
    trained = torch.load("run/ckpt.pt", weights_only=True)["model"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.detach(), rtol=0, atol=1e-4, msg=name)


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


@needs_muon
def test_a_step_of_muon(small_run):
    """The layers' matrices move by 0.2 sqrt(longer side) lr times an orthogonal matrix, nearly.
    All else moves by AdamW, whose first step is lr times the gradient's sign. Vectors don't decay.
    """
    config = replace(small_run, optimizer="muon", value_residual="learnable", max_steps=1, lr=1e-2,
                     warmup_steps=0, grad_clip=0, weight_decay=0.5)
    run(config)
    data = read_bin("data/text/train.bin").astype(np.int64)
    torch.manual_seed(config.seed)
    model = GPT(train.model_config(config, 257)).double()
    starts = np.random.default_rng((config.seed, 0)).integers(0, len(data) - 32, (1, 6))[0]
    model(torch.tensor(np.stack([data[s:s + 32] for s in starts])),
          torch.tensor(np.stack([data[s + 1:s + 33] for s in starts])))[1].backward()
    trained = torch.load("run/ckpt.pt", weights_only=True)["model"]
    for name, p in model.named_parameters():
        moved = trained[name] - p.detach() * (1 - 1e-2 * (0.5 if p.dim() > 1 else 0))
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
    data = read_bin("data/text/val.bin").astype(np.int64)[:3500]
    model = tiny_model("vanilla", torch.float32, vocab_size=257)
    got = train.evaluate(model, data, config, torch.device("cpu"))
    each = []
    for i in range(n):  # 512 tokens are 16 windows: 12 are whole batches of 6
        start = int(i * (len(data) - 33) / max(1, n - 1))
        text = torch.tensor(data[start:start + 33])[None]
        each.append(model(text[:, :-1], text[:, 1:])[1].item())
    assert got == pytest.approx(np.mean(each), abs=1e-6)


@posix
@pytest.mark.parametrize("changes", [
    {}, pytest.param(dict(optimizer="muon", attention="resformer", value_residual="plus"),
                     marks=needs_muon)])
def test_stopped_and_resumed_is_bit_identical(small_run, monkeypatch, changes):
    config = replace(small_run, **changes)
    expected, rate = losses(run(config)), train.learning_rate
    config, signals = replace(config, out_dir="stopped"), []

    def stop_in_step_6(config, step):
        if step == 5:
            signals.append(signal.SIGTERM)
        return rate(config, step)

    monkeypatch.setattr(train, "learning_rate", stop_in_step_6)
    assert len(run(config, signals)) == 7  # seen when the next step's loss is
    monkeypatch.setattr(train, "learning_rate", rate)
    with Path("stopped/log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')  # as if killed in a later step
    history = run(replace(config, resume=True))
    assert losses(history) == expected and same_weights("run/ckpt.pt", "stopped/ckpt.pt")
    assert history == [json.loads(r) for r in Path("stopped/log.jsonl").read_text().splitlines()]
    Path("stopped/log.jsonl").unlink()
    assert run(replace(config, resume=True)) == history  # complete: nothing is trained


def test_what_a_resumed_run_may_change(small_run, capsys):
    run(small_run)
    again = replace(small_run, resume=True, n_layer=4, n_head=2, n_embd=16, size="small",
                    max_steps=14, eval_every=3, eval_tokens=64, dtype="bfloat16")
    train.train(again)
    said = capsys.readouterr().out
    assert "--max_steps 12 -> 14" in said
    before, after = (train.learning_rate(replace(small_run, max_steps=n), 12) for n in (12, 14))
    assert f"step 13 goes from {before:.2e} to {after:.2e}" in said
    train.train(again)
    assert "run is complete: 14 steps" in capsys.readouterr().out
    run(replace(small_run, out_dir="short", max_steps=20), signals=[signal.SIGTERM])
    train.train(replace(small_run, out_dir="short", max_steps=1, resume=True))
    said = capsys.readouterr().out
    assert "short is complete: 1 steps" in said and "cosine" not in said
    with pytest.raises(UserError, match="^--max_steps 13: the run in run has 14 steps"):
        train.train(replace(again, max_steps=13))
    for name, value in dict(lr=1.0, min_lr=0.1, weight_decay=0.9, grad_clip=2.0, warmup_steps=3,
                            seed=5, batch_size=3, grad_accum=2, n_layer=5, attention="cla",
                            block_size=16, value_lambda=(2, 1)).items():
        with pytest.raises(UserError, match=f"^--{name} is .*, but the run in run has"):
            run(replace(small_run, resume=True, **{name: value}))
    with pytest.raises(UserError, match="--resume goes on with it, --overwrite starts anew"):
        run(small_run)
    assert len(run(replace(small_run, overwrite=True, seed=5))) == 12
    with pytest.raises(UserError, match="--seed"):
        run(replace(small_run, resume=True))


def test_a_runs_folder_is_named_after_what_makes_it_another_run():
    def name(**flags):
        return train.run_folder(TrainConfig(**flags)).as_posix()

    assert name() == name(max_steps=5, device="cpu", resume=True) == "out/resformer"
    flags = ["--value_lambda", "2", "1", "--grad_clip", "0.5"]
    assert train.run_folder(prepare_data.parse_flags(TrainConfig, "", flags)[0]).as_posix() == (
        "out/resformer-value_lambda_2_1-grad_clip_0.5")
    assert name(attention="cla+gqa", n_layer=4, dataset="some/folder", lr=0.002) == (
        "out/cla+gqa-n_layer_4-dataset_folder-lr_0.002")
    assert name(out_dir="x", seed=3) == "x"


def test_it_trains_in_a_thread_and_nothing_stays_locked_after_an_error(small_run, monkeypatch):
    histories = []
    thread = threading.Thread(target=lambda: histories.append(run(small_run)))
    thread.start()
    thread.join()
    assert len(histories[0]) == 12

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(train, "learning_rate", interrupted)
        run(replace(small_run, out_dir="other"))
    assert len(run(replace(small_run, out_dir="other", resume=True))) == 12 and kept


def test_gradient_accumulation_is_a_larger_batch(small_run):
    whole = run(replace(small_run, batch_size=6, grad_accum=1, max_steps=4))
    parts = run(replace(small_run, batch_size=2, grad_accum=3, max_steps=4, out_dir="parts"))
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)


@pytest.mark.parametrize("attention, dtype", [
    ("resformer+neutreno+denseformer", "bfloat16"),
    pytest.param("crosslayer+cla", "float16", marks=slow),
    *(pytest.param(name, "float32", marks=slow) for name in VARIANTS)])
def test_training_and_evaluation_compile_once_into_one_graph_each(small_run, monkeypatch,
                                                                  attention, dtype):
    graphs, torch_compile = [], torch.compile

    def aot_eager(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile",
                        lambda f: torch_compile(f, backend=aot_eager, fullgraph=True))
    config = replace(small_run, attention=attention, dtype=dtype, n_layer=2, grad_accum=2,
                     max_steps=4, eval_every=1)
    # 8 in earnest: train() forgets the models that were compiled before.
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled_history = run(replace(config, compile="on", out_dir="compiled"))
    assert len(graphs) == 3  # the trial, training and evaluation
    assert losses(compiled_history) == pytest.approx(losses(run(config)), rel=1e-3)


@slow
def test_under_distributed_data_parallel_it_is_one_graph_too(monkeypatch):
    dist, stats = train.dist, torch._dynamo.utils.counters["stats"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.compiler.reset()
    stats.clear()
    model = tiny_model("svformer+gqa", torch.float32, n_layer=2)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    wrapped = train.DistributedDataParallel(fast)
    for _ in range(3):
        _, loss = wrapped(tokens(), tokens(seed=2))
        loss.backward()
    assert stats["unique_graphs"] == 1
    del wrapped
    dist.destroy_process_group()


def test_where_nothing_compiles_auto_trains_uncompiled_and_on_says_so(monkeypatch, capsys):
    def broken(f):
        raise RuntimeError("no Triton\nand a page more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match="--compile off: no Triton$"):
        train.compiled("model", TrainConfig(compile="on"), torch.device("cpu"))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)  # a card that isn't there
    for config, warns in ((TrainConfig(), True), (TrainConfig(compile="off"), False)):
        assert train.compiled("model", config, torch.device("cuda")) == "model"
        assert ("no Triton" in capsys.readouterr().err) == warns


def test_what_this_machine_has_is_asked(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda kind: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    for name in ("cuda", "cuda:3"):
        train.pick_device(name)
    monkeypatch.setenv("LOCAL_RANK", "1")  # of the two processes that torchrun has started
    train.pick_device("cuda")
    assert chosen == ["cuda:0", "cuda:3", "cuda:1"]
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    train.check(TrainConfig())
    with pytest.raises(UserError, match="--optimizer muon needs torch 2.9"):
        train.check(TrainConfig(optimizer="muon"))


def test_the_dtype_of_a_device(monkeypatch):
    def dtype(device, **flags):
        return train.pick_dtype(TrainConfig(**flags), torch.device(device))

    assert dtype("cpu") == torch.float32 and dtype("cpu", dtype="float16") == torch.float16
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert dtype("cuda") == expected
    assert dtype("mps") == torch.float32
    with pytest.raises(UserError, match="--dtype bfloat16: on MPS"):
        dtype("mps", dtype="bfloat16")


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=slow)])
def test_torchrun_gives_the_losses_of_one_process(small_run, n):
    config = replace(small_run, grad_accum=2, eval_tokens=160)  # 5 windows, not as many for each
    expected, both = run(config), replace(config, out_dir="both")
    flags = [f"--{name}={value}" for name, value in vars(both).items()
             if value != getattr(TrainConfig, name)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={n}", str(HERE / "train.py"), *flags],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in Path("both/log.jsonl").read_text().splitlines()]
    assert len(lines) == len(expected) == 12
    for a, b in zip(lines, expected):
        for key in {"loss", "val_loss"} & set(b):
            assert a[key] == pytest.approx(b[key], abs=1e-5)
    # And no function keeps a process group, whose threads could outlive the interpreter.
    assert torch.distributed.nn.functional.all_reduce.__defaults__[1] is None


def test_processes_that_disagree_are_refused(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)

    def gather(states, mine):
        states[:] = [mine, (3, mine[1])]

    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    train.check_agreement(3, "data")
    with pytest.raises(UserError, match="different steps or data"):
        train.check_agreement(4, "data")
    with pytest.raises(UserError, match="--batch_size 5 must divide by the 2 processes"):
        train.check(TrainConfig(batch_size=5))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(small_run, monkeypatch):
    run(replace(small_run, max_steps=4))
    before, forward = Path("run/ckpt.pt").read_bytes(), GPT.forward

    def broken(self, *args):
        with torch.no_grad():
            self.layers[1].mlp.up_proj.weight[0, 0] = math.nan
        return forward(self, *args)

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(UserError, match="step 5: the loss is nan"):
        run(replace(small_run, resume=True))
    assert Path("run/ckpt.pt").read_bytes() == before


def test_off_a_terminal_a_line_comes_every_30_seconds(small_run, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 11))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
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
    printed = small_bench(*asked)
    runs = bench_records()
    assert [(r["variant"].split()[0], r["flags"]["seed"]) for r in runs] == [
        (a, seed) for seed in (3, 4) for a in ("vanilla", "resformer", "svformer+gqa")]
    assert runs[1]["flags"]["value_lambda"] == [2, 1] and runs[1]["flags"]["lr"] == 1e-2
    assert {r["flags"]["neutreno_lambda"] for r in runs} == {None}  # nobody uses it
    assert [step for step, _ in runs[0]["val_curve"]] == [2, 4, 6]
    assert np.shape(runs[0]["attention"]["importance"]) == (2, 32)
    assert runs[0]["attention"]["first"] != runs[0]["attention_start"]["first"]
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
    assert "reused 7 of 7 measurements, of 20" in small_bench(*asked)
    assert "reused" in small_bench(*asked, "--name", "again", "--parts", "loss")
    written = Path("b/results.jsonl").read_bytes()
    small_bench(*asked)  # its first name again: there is nothing to add
    assert Path("b/results.jsonl").read_bytes() == written
    with pytest.raises(TypeError):  # another flag is another run
        small_bench(*asked, "--weight_decay", "0.2", "--parts", "loss")
    with Path("b/results.jsonl").open("a") as f:
        f.write('{"name": "main", "ki')  # killed in a write
    shutil.rmtree("data")
    capsys.readouterr()
    monkeypatch.setattr(bench, "pick_device", None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--show", "b/results.jsonl", "--out_dir", "c"])
    bench.main()
    shown = capsys.readouterr()
    assert shown.out in printed and "is cut or broken" in shown.err
    for more, message in ((["--name", "other"], "--name other: b/results.jsonl has main, again"),
                          (["--variants", "vanila"], "--variants: main in .* has vanilla, resf")):
        with pytest.raises(UserError, match=message), monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*sys.argv, *more])
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
    assert "complete" not in small_bench(*asked, "--fresh") and len(bench_records()) == 2
    assert len([p for p in Path("b").iterdir() if p.is_dir()]) == 2  # trained once more
    both = small_bench("--variants", "gqa", "vanilla", "--seeds", "1", "--parts", "loss")
    assert "2 vanilla" in both and "WARNING" not in both
    monkeypatch.setattr(bench, "fingerprint", lambda: "edited again")
    both = small_bench("--variants", "vanilla", "cla", "--seeds", "1", "--parts", "loss")
    assert "2 cla" in both and "different versions of the code" in both


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


def test_a_signal_ends_all_of_bench_and_the_same_command_goes_on(small_bench, monkeypatch):
    asked = ("--variants", "vanilla", "gqa", "--seeds", "1", "--parts", "loss")
    caught.append(signal.SIGTERM)  # in the first run's training
    with pytest.raises(SystemExit):
        small_bench(*asked)
    assert not Path("b/results.jsonl").exists()
    caught.clear()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # in the task, of the last run
        patch.setattr(bench, "task_accuracy", lambda *_: caught.append(signal.SIGTERM) or 0.25)
        small_bench("--variants", "vanilla", *asked[3:])
    assert len(bench_records()) == 1
    caught.clear()
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


SMALL = ("--dataset=text", "--size=2M", "--block_size=32", "--batch_size=2", "--eval_tokens=64",
         "--device=cpu")


def test_from_data_to_text(folder, script, monkeypatch):
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 500)
    assert "19,350 tokens for training" in script("prepare_data.py", "text.txt")[1]
    flags = (*SMALL, "--attention=svformer", "--out_dir=my run")
    status, out, _ = script("train.py", *flags, "--max_steps=5")
    assert status == 0 and "nats per token" in out and "62% of vanilla's" in out
    assert "python sample.py --out_dir 'my run'" in out or os.name == "nt"
    status, _, error = script("train.py", *flags)
    assert status == 2 and "--resume" in error and error.count("\n") == 1
    assert script("train.py", *flags, "--max_steps=7", "--resume")[0] == 0
    assert len(Path("my run/log.jsonl").read_text().splitlines()) == 7

    flags = ("--out_dir=my run", "--max_new_tokens=40", "--num_samples=2", "--seed=3",
             "--device=cpu")
    (folder / "prompt.txt").write_text("To bé", encoding="utf-8")
    _, expected, error = script("sample.py", *flags, "--prompt=To bé")
    assert expected.count("To bé") == 2 and "\n" + "-" * 80 in expected
    assert "320 bytes of KV cache per token" in error  # (4 + 1) x 16 numbers x 4 bytes
    without = script("sample.py", *flags, "--prompt=To bé", "--no_cache")
    assert without[1] == expected and "no KV cache" in without[2]
    assert script("sample.py", *flags, "--prompt=FILE:prompt.txt")[1] == expected
    read, write = os.pipe()
    os.write(write, "To bé".encode())
    os.close(write)
    with open(read, encoding="cp1252") as stdin:  # UTF-8 all the same
        monkeypatch.setattr(sys, "stdin", stdin)
        assert script("sample.py", *flags, "--prompt=-")[1] == expected


def test_what_a_terminal_cannot_show_is_replaced(folder, script, monkeypatch):
    Path("漢字.txt").write_text("漢" * 1000, encoding="utf-8")
    for encoding, name, *flags in (
            ("ascii", "prepare_data.py", "漢字.txt"),
            ("cp1252", "train.py", "--dataset=漢字", "--out_dir=漢", "--max_steps=2", *SMALL[1:]),
            ("cp1252", "sample.py", "--out_dir=漢", "--prompt=漢", "--max_new_tokens=1",
             "--device=cpu")):
        with monkeypatch.context() as patch:
            terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            patch.setattr(sys, "stdout", terminal)
            assert script(name, *flags)[0] == 0
            terminal.flush()
            assert b"?" in terminal.buffer.getvalue()


def test_a_run_without_gpt2s_vocabulary_succeeds(small_run, monkeypatch, capsys):
    def offline(name):
        raise UserError("no vocabulary")

    monkeypatch.setattr(train, "get_tokenizer", offline)
    model, history = train.train(small_run)
    train.report(small_run, model, history)
    printed = capsys.readouterr().out
    assert f"{history[-1]['val_loss']:.4f} nats" in printed and "No sample" in printed


class Bomb:  # a stranger's checkpoint: code in it would make a folder
    def __reduce__(self):
        return os.mkdir, ("exploded",)


# The script, its flags, and words that must be in its one line; the folder is broken_things().
BAD_INPUTS = [line.split("|") for line in """
prepare_data.py|nowhere|nowhere is no file or folder
prepare_data.py|empty.txt|no UTF-8 text
prepare_data.py|one_byte.txt|too short
prepare_data.py|elsewhere/text.txt|from elsewhere
prepare_data.py|text.txt --tokenizer gpt3|--tokenizer
prepare_data.py|fineweb --tokenizer byte|--tokenizer
prepare_data.py|fineweb --shards 0|--shards
prepare_data.py|--bogus|--bogus
train.py|--attention resnet|--attention 'resnet': choose from
train.py|--size 83M|--size
train.py|--n_embd 63|--n_embd (63) must be
train.py|--n_layer 1.5|--n_layer
train.py|--dataset nothing|--dataset nothing isn't there yet: python prepare_data.py nothing
train.py|--dataset odd|train.bin should be
train.py|--dataset no_val|val.bin should be
train.py|--dataset text-gpt2|python prepare_data.py text --tokenizer gpt2 prepares it
train.py|--dataset no_json|meta.json
train.py|--dataset list_json|meta.json
train.py|--block_size 1000000|--block_size 1000000 must be less than
train.py|--batch_size -2|--batch_size must be a finite number of at least 1
train.py|--lr nan|--lr must be a finite number of at least 0
train.py|--min_lr -1|--min_lr must be a finite number of at least 0
train.py|--seed 99999999999999999999999|--seed must be less than 2^62
train.py|--device tpu|--device tpu
train.py|--batch_size 100000000000|out of memory
train.py|--dtype int8|--dtype
train.py|--resume --overwrite|choose one
train.py|--out_dir text.txt|text.txt
train.py|--resume --out_dir run --dataset other|--dataset other is not what the run
train.py|--resume --out_dir bomb|bomb/ckpt.pt can't be read
train.py|--resume --out_dir list|list/ckpt.pt is not a checkpoint of train.py
train.py|--resume --out_dir version|not a checkpoint of train.py
train.py|--resume --out_dir config|config/ckpt.pt can't be resumed
train.py|--resume --out_dir shapes|shapes/ckpt.pt can't be resumed
train.py|--resume --out_dir optimizer|optimizer/ckpt.pt can't be resumed
sample.py|--out_dir nowhere|nowhere/ckpt.pt isn't there
sample.py|--out_dir truncated|truncated/ckpt.pt can't be read
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
bench.py|--show nowhere|--show nowhere
bench.py|--attention cla|--attention
bench.py|--out_dir strange|results.jsonl
""".strip().splitlines()]


@pytest.fixture(scope="module")
def broken_things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schöne Daten")  # with a space, and not ASCII
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("text", "other"):
            Path(f"{name}.txt").write_text(f"a line of {name}\n" * 500)
            prepare(DataConfig(f"{name}.txt"))
        run(TrainConfig(dataset="text", size="2M", block_size=32, batch_size=2, max_steps=2,
                        eval_tokens=64, device="cpu", out_dir="run"))
        for name in ("elsewhere", "strange"):
            Path(name).mkdir()
        Path("empty.txt").touch()
        Path("one_byte.txt").write_text("a")
        Path("latin1.txt").write_bytes("schön".encode("latin-1"))
        Path("elsewhere/text.txt").write_text("another text of the same name\n" * 99)
        Path("strange/results.jsonl").write_text('{"nom": 1}\n')
        for name in ("odd", "no_val", "no_json", "list_json"):
            shutil.copytree("data/text", f"data/{name}")
        Path("data/odd/train.bin").write_bytes(Path("data/text/train.bin").read_bytes()[:-1])
        Path("data/no_val/val.bin").unlink()
        Path("data/no_json/meta.json").write_text("{'tokens'")
        Path("data/list_json/meta.json").write_text("[1]")

        good, ckpt = Path("run/ckpt.pt").read_bytes(), torch.load("run/ckpt.pt", weights_only=True)
        name = "layers.0.mlp.up_proj.weight"
        for folder_name, broken in dict(
                bomb=pickle.dumps(Bomb(), protocol=2), truncated=good[:-5000],
                list=[1, 2], version={k: v for k, v in ckpt.items() if k != "scaler"},
                config=ckpt | dict(config=dict(ckpt["config"], flavour=1)),
                shapes=ckpt | dict(model=ckpt["model"] | {name: torch.zeros(3, 3)}),
                optimizer=ckpt | dict(optimizers=[dict(state={}, param_groups=[])])).items():
            shutil.copytree("run", folder_name)
            if isinstance(broken, bytes):
                Path(folder_name, "ckpt.pt").write_bytes(broken)
            else:
                torch.save(broken, f"{folder_name}/ckpt.pt")
    return folder


@pytest.mark.parametrize("name, flags, words", BAD_INPUTS, ids=lambda value: value[:60])
def test_a_mistake_ends_in_one_line_and_changes_nothing(broken_things, monkeypatch, script, name,
                                                        flags, words):
    monkeypatch.chdir(broken_things)
    first, *quoted = flags.split(";")  # behind a semicolon stands what a shell would quote
    flags = first.split() + quoted
    if name in ("train.py", "bench.py"):  # small, if it matters
        usual = dict(dataset="text", size="2M", block_size=32, batch_size=2, max_steps=2,
                     device="cpu") | (dict(variants="vanilla") if name == "bench.py" else {})
        for flag, value in usual.items():
            flags += [] if f"--{flag}" in flags else [f"--{flag}", str(value)]
    before = contents(broken_things)
    status, out, error = script(name, *flags)
    assert status == 2 and error.count("\n") == 1 and error.startswith(f"{name}: "), error
    assert words in error.replace(os.sep, "/")
    assert "prompt" not in flags or out == ""
    after = contents(broken_things)
    shutil.rmtree(broken_things / "out", ignore_errors=True)  # the lock of a run that never began
    assert {p: data for p, data in after.items() if "out" not in p.parts} == before


@pytest.mark.parametrize("error, line", [
    (RuntimeError("CUDA out of memory. Tried to\nallocate"), "out of memory: CUDA out of memory."),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: Default"),
    (MemoryError(), "out of memory"), (OSError(), "OSError"), (UserError("a\nb"), "a"),
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
def test_a_folder_has_one_owner_and_a_crashed_one_does_not_block_it(small_run):
    Path("run").mkdir()
    with open("run/lock", "a") as lock:  # closed by the system when its process ends
        train.lock_file(lock, "run")
        for config in (small_run, replace(small_run, resume=True)):
            with pytest.raises(UserError, match="in use .* --out_dir"):
                run(config)
        assert [p.name for p in Path("run").iterdir()] == ["lock"]
    run(small_run)


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("max_steps, stops_after", [(4, 3), (2, 2)])
def test_a_signal_saves_and_says_how_to_go_on(small_run, script, monkeypatch, capfd, number,
                                              max_steps, stops_after):
    # The fixture script puts the handlers of signals back.
    evaluate, sent = train.evaluate, []

    def interrupted(*args):  # in the evaluation after step 2, which may be the last
        if not sent:
            signal.raise_signal(number)
            sent.append(number)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    flags = [*SMALL, "--eval_every=2", f"--max_steps={max_steps}", "--out_dir=a run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--overwrite"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process at once
    printed = capfd.readouterr()
    assert ended.value.code == 128 + number and "KV cache" not in printed.out  # no report
    again = prepare_data.command("python", "train.py", *flags, "--resume")
    said = f"stopped after step {stops_after}, saved; to go on: {again}"
    assert printed.err.splitlines()[-1] == said
    history = torch.load("a run/ckpt.pt", weights_only=True)["history"]
    assert len(history) == len(Path("a run/log.jsonl").read_text().splitlines()) == stops_after


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
    expected = run(config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_model"])
    config, part = replace(config, out_dir="killed", resume=True), Path("killed/ckpt.pt.part")
    rng = np.random.default_rng(0)
    for i in range(kills + 1):
        part.unlink(missing_ok=True)
        process = context.Process(target=train_to_be_killed, args=(config, i))
        process.start()
        if i < kills:
            while process.is_alive() and not part.exists():  # wait for a write
                time.sleep(0.002)
            process.join(rng.uniform(0, 0.03))
            process.kill()
        process.join()
    assert process.exitcode == 0 and same_weights("run/ckpt.pt", "killed/ckpt.pt")
    history = torch.load("killed/ckpt.pt", weights_only=True)["history"]
    assert [(r["loss"], r["val_loss"]) for r in history] == [
        (r["loss"], r["val_loss"]) for r in expected]
