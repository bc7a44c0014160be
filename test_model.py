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
from dataclasses import FrozenInstanceError, replace
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
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")
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
    layers = sorted(set(c.residual_layers or own_values))
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
            g = h * kv_heads // c.n_head  # the key/value head of query head h
            k, v = K[n][g], V[n][g]
            if "crosslayer" in names and n > 1:
                k, v = torch.cat((K[1][g], k)), torch.cat((V[1][g], v))
            scores = reference_rope(q) @ k.T / math.sqrt(hs)
            future = (torch.arange(len(k)) % T)[None, :] > torch.arange(T)[:, None]
            A = torch.softmax(scores.masked_fill(future, -math.inf), dim=1)
            attention.append(sum(A.split(T, dim=1)))
            u = A @ v
            if "neutreno" in names and n > 1:
                u = u + neutreno * (V[1][g] - V[n][g])
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
    got, gradients = (torch.autograd.grad(3 * x, list(model.parameters()), retain_graph=True)
                      for x in (loss, expected))
    torch.testing.assert_close(got, gradients, rtol=0, atol=1e-12)
    with torch.no_grad(), patch.object(torch, "mm") as mm:  # the product that makes the gradients
        assert model(idx, targets)[1].item() == loss.item()
    assert not mm.called
    with pytest.raises(ValueError, match="no second derivatives"):
        torch.autograd.grad(loss, model.norm.weight, create_graph=True)


def test_the_softmax_of_the_loss_is_in_float32_under_autocast():
    x, weight = torch.randn(64, 32) * 3, torch.randn(500, 32)
    target = torch.randint(500, (64,))
    logits = (x.bfloat16() @ weight.bfloat16().T).double()  # rounded once, as autocast does
    expected = F.cross_entropy(logits, target, reduction="sum").item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = LinearCrossEntropy.apply(x, weight, target, False)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected, rel=1e-5)


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
    assert tiny_config("vanilla", n_ffn=None).ffn_size == 112
    assert tiny_config("gqa", n_head=1).kv_heads == 1
    assert replace(tiny_config("gqa"), attention="vanilla").kv_heads == 4
    small_gpt2 = train.model_config(TrainConfig(size="2M"), vocab_size=50257)
    assert small_gpt2.vocab_size == 50304 and small_gpt2.ffn_size == 56
    papers_82m = GPTConfig(vocab_size=50304, block_size=2048, n_layer=8, n_head=8, n_embd=512,
                           attention="vanilla")
    assert GPT(papers_82m).num_params() == 81_928_704
    with pytest.raises(FrozenInstanceError):  # a config and its model can't disagree
        papers_82m.attention = "svformer"


@pytest.mark.parametrize("changes", [  # the first field of each is the one to be named
    dict(n_embd=36), dict(n_kv_head=3, attention="gqa"), dict(n_kv_head=2), dict(init="xavier"),
    dict(attention="resnet"), dict(attention="vanilla+gqa"),
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
    # A loss that would be another:
    with pytest.raises(ValueError, match=r"^targets \(2, 24\) must have the shape of idx, \(2, 23"):
        model(idx[:, :-1], idx)
    for head in (torch.nn.Linear(32, 37, bias=True), torch.nn.Sequential(model.lm_head)):
        model.lm_head = head
        with pytest.raises(ValueError, match="^lm_head must be a Linear without bias"):
            model(idx, idx)


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
    left_out = {"src/binary": "\0\1", "src/empty": "", "src/latin1": b"\xe9t\xe9"}
    hidden = {"src/.hidden": "no", "src/.git/file": "no"}  # not even counted
    for name, text in (texts | left_out | hidden).items():
        write(name, text)

    def documents(ids):
        parts = np.split(ids, np.flatnonzero(ids == 256))
        return [bytes(part[part < 256].astype(np.uint8)).decode() for part in parts]

    prepare(DataConfig("src"))
    assert "src: 25 files of UTF-8 text, 3 left out" in capsys.readouterr().out
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


def test_backcopy_follows_its_two_rules(folder, web, monkeypatch, script):
    text = open(prepare_data.__file__, "rb").read()
    _, source = np.unique(np.frombuffer(text, dtype=np.uint8), return_inverse=True)
    ids, triggers = prepare_data.backcopy(source, streams=200, length=1000)
    frequent = np.bincount(source).argsort()
    assert ids.shape == (200, 1000) and set(triggers) == set(frequent[-3:])
    at_trigger = np.isin(ids, triggers)
    assert not at_trigger[:, 0].any() and not (at_trigger[:, 1:] & at_trigger[:, :-1]).any()
    rows, columns = np.nonzero(at_trigger[:, :-1])
    assert np.array_equal(ids[rows, columns + 1], ids[rows, columns - 1])
    for a in frequent[-20:-3]:  # elsewhere b follows a as often as it does in the text
        follows = np.bincount(ids[:, 1:][ids[:, :-1] == a], minlength=len(frequent))
        in_text = np.bincount(source[1:][source[:-1] == a], minlength=len(frequent))
        assert np.abs(follows / follows.sum() - in_text / in_text.sum()).max() < 0.05, a
    again, _ = prepare_data.backcopy(source, streams=200, length=1000)
    assert np.array_equal(again, ids)

    write(web / "input.txt", text)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    prepare(DataConfig("backcopy"))
    train_ids, val_ids, meta = prepare_data.load("backcopy")
    tokenizer, end = get_tokenizer(meta["tokenizer"]), meta["vocab_size"] - 1
    assert (len(train_ids), len(val_ids)) == (1000 * 4096, 100 * 4096)
    assert tokenizer.eot_token == end == train_ids[4095] == max(val_ids) and end <= 27
    both = np.concatenate((train_ids, val_ids))
    assert np.array_equal(np.unique(both), range(end + 1))  # each id occurs
    assert tokenizer.encode("é\nthe!") == tokenizer.encode("the")  # others are left out
    stream = tokenizer.decode(train_ids[:4095]).encode()
    triggers = tokenizer.decode(meta["triggers"]).encode()
    for before, at, after in zip(stream, stream[1:], stream[2:]):
        assert at not in triggers or before == after
    run(replace(SMALL, dataset="backcopy", max_steps=1))
    flags = ("--out_dir=run", "--prompt=The end", "--max_new_tokens=1", "--device=cpu")
    assert script("sample.py", *flags)[1].startswith("he end")  # what the model has read


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
    cut = patch.object(prepare_data.shutil, "copyfileobj", lambda a, b: b.write(a.read(1000)))
    with cut, pytest.raises(UserError, match="SHA-256"):
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close(small_run, dtype):
    config = replace(small_run, lr=1e-2)
    exact, rounded = run(config), run(replace(config, dtype=dtype, out_dir="rounded"))
    assert rounded[-1]["val_loss"] == pytest.approx(exact[-1]["val_loss"], rel=0.02)
    assert rounded[-1]["val_loss"] != exact[-1]["val_loss"]


@needs_muon
@pytest.mark.parametrize("init_scale, place, factor", [  # 3: q_proj, for Muon; -1: lm_head, AdamW
    (2.0**125, 3, 1.0), (2.0**8, 3, math.inf), (2.0**8, -1, math.inf)])
def test_a_float16_step_that_overflows_is_left_out_by_both_optimizers(
        small_run, monkeypatch, init_scale, place, factor):
    average = train.average_over_processes

    def overflow(tensors):
        if len(tensors) > 1:
            tensors[place] *= factor  # the loss, then the gradients in their order
        average(tensors)

    monkeypatch.setattr(train, "average_over_processes", overflow)
    monkeypatch.setattr(torch.amp, "GradScaler",
                        partial(torch.amp.GradScaler, init_scale=init_scale))
    config = replace(small_run, dtype="float16", max_steps=1, optimizer="muon")
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
    for optimizer, lr in (("adamw", 8e-3), ("muon", 1.6e-2)):
        config = TrainConfig(optimizer=optimizer, warmup_steps=0)
        assert train.learning_rate(config, 0) == lr


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_steps_are_the_optimizers_on_the_whole_batch_with_clipping(small_run, name):
    """Muon has the layers' matrices, AdamW all else. Vectors don't decay."""
    config = replace(small_run, optimizer=name, attention="denseformer", batch_size=2,
                     grad_accum=3, max_steps=3, eval_every=2, lr=1e-2, grad_clip=0.3,
                     weight_decay=0.5)
    history = run(config)
    model, batch = fresh_model_and_batches(config)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [model.embed_tokens.weight, model.lm_head.weight]
    hidden = [p for p in model.layers.parameters() if p.dim() > 1]
    if name == "adamw":
        matrices += hidden
    optimizers = [torch.optim.AdamW([dict(params=matrices, weight_decay=0.5),
                                     dict(params=vectors, weight_decay=0)], betas=(0.9, 0.95))]
    if name == "muon":
        optimizers.append(torch.optim.Muon(hidden, weight_decay=0.5,
                                           adjust_lr_fn="match_rms_adamw"))
    for step, lr in enumerate((5e-3, 1e-2, 1e-2)):
        model.zero_grad()
        _, loss = model(*batch(step))
        loss.backward()
        assert history[step]["step"] == step + 1
        assert history[step]["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3) > 0.3
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    atol = 1e-4 if name == "adamw" else 5e-4  # Muon computes in bfloat16; a step is about 2e-3
    torch.testing.assert_close(state("run")[0], model.state_dict(), rtol=0, atol=atol)
    assert ["val_loss" in record for record in history] == [False, True, True]
    model.load_state_dict(state("run")[0])
    _, val_data, _ = prepare_data.load("text")
    val_loss = train.evaluate(model, val_data, config, torch.device("cpu"), None)
    assert history[-1]["val_loss"] == val_loss
    assert history[-1]["bits_per_byte"] == pytest.approx(val_loss / math.log(2))


@pytest.mark.parametrize("start_token", [False, True])
@pytest.mark.parametrize("eval_tokens, n", [(512, 12), (96, 3), (10**9, 108), (1, 1)])
def test_evaluation_is_the_mean_over_windows_evenly_spread(small_run, eval_tokens, n, start_token):
    config = replace(small_run, eval_tokens=eval_tokens)
    data = prepare_data.load("text")[1].astype(np.int64)[:3500]
    model = tiny_model("vanilla", torch.float32, vocab_size=257)
    start_id = 256 if start_token else None
    got = train.evaluate(model, data, config, torch.device("cpu"), start_id)
    starts = np.arange(n) * (len(data) - 33) // max(1, n - 1)  # 16 fit; 12 are whole batches
    text = torch.tensor(data[starts[:, None] + np.arange(33)])
    if start_token:
        text = F.pad(text[:, :32], (1, 0), value=256)
    _, expected = model(text[:, :-1], text[:, 1:])
    assert got == pytest.approx(expected.item(), rel=1e-5)


def cut_save(obj, f):
    f.write(b"half a checkpoint")
    raise KeyboardInterrupt  # as if killed


@pytest.mark.parametrize("changes", [
    {}, dict(dtype="bfloat16"), dict(dtype="float16"), dict(attention="svformer+gqa"),
    pytest.param(dict(optimizer="muon", value_residual="plus"), marks=needs_muon)])
def test_killed_anywhere_and_resumed_it_is_bit_identical(small_run, monkeypatch, changes):
    config = replace(small_run, eval_every=3, **changes)
    run(config)
    killed = replace(config, out_dir="killed", resume=True)
    learning_rate = train.learning_rate
    for place in (1, 4, 8, 11):  # the checkpoints come after steps 3, 6, 9 and 12
        def stop(config, step):
            if step == place:
                raise KeyboardInterrupt
            return learning_rate(config, step)

        for owner, name, kill in ((train, "learning_rate", stop), (torch, "save", cut_save)):
            with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
                context.setattr(owner, name, kill)
                run(killed)
        if place > 3:
            steps = train.load_checkpoint(Path("killed/ckpt.pt"))["history"]
            assert read_log("killed") == steps and len(steps) == place // 3 * 3
    history = run(killed)
    torch.testing.assert_close(state("killed"), state("run"), rtol=0, atol=0)
    assert history == read_log("killed") and not list(Path("killed").glob("*.part"))
    assert run(killed) == history  # complete: nothing is trained


def test_what_a_resumed_run_may_change(small_run, monkeypatch):
    run(small_run)
    run(replace(small_run, resume=True, max_steps=14, eval_every=3, eval_tokens=64,
                dtype="bfloat16"))
    for name, value in dict(lr=1.0, min_lr=0.1, weight_decay=0.9, grad_clip=2.0, warmup_steps=3,
                            seed=5, batch_size=3, grad_accum=2, n_layer=5, attention="cla",
                            block_size=16, value_lambda=(2, 1), init="paper").items():
        with pytest.raises(UserError, match=f"^--{name} is .*, but the run in run has"):
            run(replace(small_run, max_steps=14, resume=True, **{name: value}))
    ckpt = torch.load("run/ckpt.pt")
    del ckpt["config"]["init"], ckpt["config"]["max_steps"]  # as if these flags were newer
    torch.save(ckpt, "run/ckpt.pt")
    assert len(run(replace(small_run, max_steps=15, resume=True))) == 15
    run(replace(small_run, overwrite=True, seed=5))
    assert len(run(replace(small_run, resume=True, seed=5))) == 12


@pytest.mark.parametrize("changes", [
    dict(optimizer="Muon"), dict(compile=False), dict(dtype="int8"), dict(size="big"),
    dict(lr=np.float64(1e-2)), dict(value_lambda=(np.float64(1), 1.0)), dict(seed=None),
    dict(out_dir=Path("x")), dict(eval_every=0), dict(n_head=0), dict(lr=math.inf)])
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
    ("--start_token --init paper", "out/resformer-init_paper-start_token_True"),
    ("--out_dir x --seed 3", "x")])
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
    # 8 in earnest: train() forgets the models that were compiled before.
    with torch._dynamo.config.patch(recompile_limit=2):
        history = run(replace(config, compile="on", out_dir="compiled"))
    assert graphs.frame_count == 2  # training and evaluation
    assert losses(history) == pytest.approx(losses(expected), rel=1e-3)


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
    for cuda, mps, expected in ((1, 1, "cuda:1"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert str(train.pick_device("auto")) == expected
    assert dtype("cpu") == torch.float32 and dtype("cpu", dtype="float16") == torch.float16
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert dtype("cuda") == expected
    assert dtype("mps") == torch.float32
    with pytest.raises(UserError, match="--dtype bfloat16: on MPS"):
        dtype("mps", dtype="bfloat16")
    for choice, device, expected in (("auto", "cpu", False), ("auto", "cuda", True),
                                     ("off", "cuda", False), ("on", "cpu", True)):
        model = Mock()
        train.compile_model(model, TrainConfig(compile=choice), torch.device(device))
        assert model.compile.called == expected
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    train.check(TrainConfig())
    with pytest.raises(UserError, match="--optimizer muon needs torch 2.9"):
        train.check(TrainConfig(optimizer="muon"))


def test_torchrun_gives_the_losses_of_one_process(small_run, monkeypatch):
    config = replace(small_run, grad_accum=2, eval_tokens=160)  # 5 windows, not as many for each
    words = [str(HERE / "train.py"), *as_flags(config)]
    one = subprocess.run([sys.executable, *words, "--out_dir=one"], capture_output=True, text=True,
                         env=os.environ | dict(RANK="1", WORLD_SIZE="2"))  # mean nothing alone
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                *words, "--out_dir=both"]
    both = subprocess.run(torchrun, capture_output=True, text=True)
    assert (one.returncode, both.returncode) == (0, 0), one.stderr + both.stderr
    assert losses(read_log("both")) == pytest.approx(losses(read_log("one")), abs=1e-5)
    assert both.stdout.count("nats per token") == 4  # each line once: three evaluations, the end
    again = subprocess.run(torchrun, capture_output=True, text=True)  # both see the first one's
    assert again.returncode == 1 and "both holds a run" in again.stderr
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(UserError, match="--batch_size 5 must divide by the 2 processes"):
        train.check(TrainConfig(batch_size=5))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(small_run, monkeypatch):
    run(replace(small_run, max_steps=4))
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *_: math.inf)
    with pytest.raises(UserError, match="step 8: the loss is not finite: try a lower --lr"):
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


@pytest.mark.parametrize("attention", [*VARIANTS, "crosslayer+gqa+denseformer", "plus with cla"])
def test_what_bench_sees_in_attention_is_what_numpy_says(attention):
    model, idx, triggers, each = tiny_model(attention), tokens(B=3, T=20), [3, 5, 8], []
    got = bench.look_at_attention(model, idx, triggers)
    for sequence in idx:
        watch, parameters = [], {name: p.detach() for name, p in model.named_parameters()}
        reference_sequence(model.config, parameters, sequence, watch)
        queries = [i for i in range(1, 20) if sequence[i] not in triggers]
        layers = []
        for attention_of_heads, values, hidden in watch:
            A = np.mean([a.numpy() for a in attention_of_heads], axis=0)
            p = [sum(A[i, j] for i in range(20)) / A.sum() for j in range(20)]
            firsts = [np.mean([a[i, 0] for i in queries]) for a in attention_of_heads]
            v = np.concatenate([x.numpy() for x in values], axis=1)
            v_norms, h_norms = (np.sqrt((x * x).sum(axis=1)) for x in (v, hidden.numpy()))
            spectrum = np.linalg.svd(v, compute_uv=False) ** 2 / 20
            share = spectrum[spectrum > 1e-9] / spectrum.sum()
            layers.append([-sum(x * math.log(x) for x in p), p[0], np.mean(firsts), max(firsts),
                           v_norms[0] / v_norms[1:].mean(), h_norms[0] / h_norms[1:].mean(),
                           spectrum.max(), math.exp(-sum(x * math.log(x) for x in share))])
        each.append(layers)
    expected = np.mean(each, axis=0)  # (L, 8)
    for i, name in enumerate(bench.MEASURES):
        np.testing.assert_allclose(got[name], expected[:, i], rtol=1e-4, err_msg=name)
    assert not any(m._forward_hooks for m in model.modules())


def test_even_attention_is_what_zero_queries_give():
    model = tiny_model("vanilla")
    for block in model.layers:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    got, expected = bench.look_at_attention(model, tokens(T=20), []), bench.even(20, 32)
    for name in ("entropy", "importance", "first", "first_head"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, err_msg=name)
    assert expected["value_norm"] == pytest.approx(1) and 14 < expected["rank"] < 20


@pytest.mark.parametrize("start_id", [None, 36])
def test_the_task_asks_which_of_four_continuations_is_the_likeliest(start_id):
    model = tiny_model("svformer", torch.float32)
    data = np.random.default_rng(1).integers(0, 37, 500).astype(np.uint16)
    got = bench.task_accuracy(model, data, 70, torch.device("cpu"), start_id)
    start = [] if start_id is None else [start_id]
    right = 0
    for places in np.random.default_rng(0).integers(0, 500 - 12, (70, 4)):
        context, scores = list(data[places[0]:places[0] + 8]), []
        for place in places:
            ids = start + context + list(data[place + 8:place + 12])
            logits = model(torch.tensor([[int(i) for i in ids]]))[0][0].detach().double()
            p = torch.softmax(logits, dim=-1)
            scores.append(sum(math.log(p[t - 1, int(ids[t])]) for t in range(-4, 0)))
        right += scores[0] == max(scores)
    assert got == right / 70


def test_gaps_are_paired_by_seed_with_students_interval():
    first = {1: 1.0, 2: 2.0, 3: 3.0}
    spread = 4.303 * np.std([0.1, 0.3, 0.5], ddof=1) / math.sqrt(3)
    mean = np.mean([3.5, 1.1, 2.3, 100])
    got = bench.cell({3: 3.5, 1: 1.1, 2: 2.3, 9: 100.0}, first, float, 3)
    assert got == f"{mean:.3f} +0.300 ±{spread:.3f}"
    assert bench.cell(first, first, float, 1) == "2.0"
    assert bench.cell({1: 0.5}, first, float, 1) == "0.5 -0.5"
    assert bench.cell({8: 0.5}, first, float, 1) == "0.5"
    assert bench.interval([1.0] * 20) == 0


def test_the_deeper_half_is_a_mean_but_importance_the_largest():
    record = dict(attention=dict(rank=[1, 2, 3, 6], importance=[9, 2, 3, 6]))
    assert bench.deeper_half(record, "rank") == 4.5
    assert bench.deeper_half(record, "importance") == 9


@pytest.fixture
def small_bench(small_run, monkeypatch, capsys):
    """Calls bench.py's main in this process; returns what it prints. Seconds, on 40 kB of text."""
    words = ("--dataset text --size 2M --n_layer 2 --block_size 32 --batch_size 6 --max_steps 6 "
             "--eval_every 2 --eval_tokens 256 --warmup_steps 2 --device cpu --rounds 1 "
             "--decode_batch 2 --contexts 3 --questions 40 --out_dir b").split()

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words, *more])
        bench.main()
        return capsys.readouterr().out
    return call


def test_bench_measures_once_and_shows_it_anywhere(small_bench, monkeypatch, capsys):
    asked = ("--variants", "vanilla", "resformer --value_residual learnable --lr 1e-2",
             "svformer+gqa", "--seeds", "3", "4", "--neutreno_lambda", "0.3")
    printed = small_bench(*asked)
    runs = bench.read_records(Path("b"))
    assert [(r["variant"].split()[0], r["seed"]) for r in runs] == [
        (a, seed) for seed in (3, 4) for a in ("vanilla", "resformer", "svformer+gqa")]
    assert [step for step, _ in runs[0]["val_curve"]] == [2, 4, 6]
    assert not any(Path("b/runs").iterdir())
    # 2 layers, 2 heads of 8 numbers; svformer+gqa: 2 + 1 tensors, one head.
    assert [r["cache_bytes"] for r in runs[:3]] == [4 * 4 * 16, 4 * 4 * 16, 4 * 3 * 8]
    assert [r["value_width"] for r in runs[:3]] == [16, 16, 8]
    again = replace(SMALL, n_layer=2, max_steps=6, eval_every=2, eval_tokens=256, seed=3, lr=1e-2,
                    value_residual="learnable")
    history = run(again)
    assert history[-1]["val_loss"] == runs[1]["val_curve"][-1][1]
    assert history[-1]["loss"] == pytest.approx(runs[1]["train_loss"])
    last = [r["val_curve"][-1][1] for r in runs]
    gaps = [last[1] - last[0], last[4] - last[3]]
    gap = f"{np.mean(gaps):+.4f} ±{bench.interval(gaps):.4f}"
    assert printed.count(gap) == 2  # at the end of training, and as the last of the quarters
    weights = np.mean([r["value_lambdas"]["2"] for r in (runs[1], runs[4])], axis=0)
    assert "layer 2: {:.2f} {:.2f}".format(*weights) in printed
    assert "| step 2 " in printed and "Speed over vanilla's" in printed
    assert "parameters on" not in printed  # what train.py says of a run

    monkeypatch.setattr(bench, "train", None)  # whoever calls it fails
    asked += ("--parts", "loss")
    shown = small_bench(*asked)
    assert shown in printed and "| 38%" in shown
    with pytest.raises(TypeError):  # another seed is another run
        small_bench(*asked, "--seeds", "5")
    with pytest.raises(UserError, match="--weight_decay is 0.2, but b holds runs with 0.1: choose"):
        small_bench(*asked, "--weight_decay", "0.2")
    with pytest.raises(UserError, match="--dtype is torch.bfloat16, but b holds"):
        small_bench(*asked, "--dtype", "bfloat16")
    write("text.txt", "another text\n" * 2000)
    prepare(DataConfig("text.txt"))
    with pytest.raises(UserError, match="--dataset text is not what the runs in b have read"):
        small_bench(*asked)
    shutil.rmtree("data")
    capsys.readouterr()
    monkeypatch.setattr(bench, "measure", None)
    assert small_bench("--show", "b") == shown
    assert "| svformer+gqa " in small_bench("--show", "b", "--variants", "svformer+gqa", "vanilla")
    assert "no runs of cla in b" in small_bench("--show", "b", "--variants", "vanilla", "cla")


def test_results_of_other_code_are_said_and_overwrite_begins_anew(small_bench, monkeypatch):
    asked = ("--seeds", "1", "--parts", "loss", "--variants", "vanilla")
    assert "WARNING" not in small_bench(*asked, "--overwrite")  # of nothing
    monkeypatch.setattr(bench, "fingerprint", lambda: "edited")
    assert "different versions of the code" in small_bench(*asked, "gqa")
    assert "WARNING" not in small_bench(*asked, "gqa", "--overwrite", "--lr", "1e-3")
    assert {r["code"] for r in bench.read_records(Path("b"))} == {"edited"}
    learning_rate, other = train.learning_rate, ("--out_dir", "c", "--eval_every", "1")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(train, "learning_rate",
                        lambda c, step: learning_rate(c, step) if step < 4 else cut_save(0, Mock()))
        small_bench(*asked, *other)
    shutil.copytree("c", "f")
    with patch.object(train, "learning_rate", wraps=learning_rate) as steps:
        small_bench(*asked, *other, "--out_dir", "f")
    assert steps.call_count == 2  # of six: it goes on
    small_bench(*asked, *other, "--max_steps", "5")  # starts anew: it is another run
    straight = small_bench(*asked, *other, "--max_steps", "5", "--out_dir", "d")
    assert small_bench("--show", "c").replace("c/", "d/") in straight
    bad = "vanilla --lr 1e30 --warmup_steps 0"
    printed = small_bench(*asked, bad, "gqa", "gqa", "--out_dir", "e")
    assert "not measured: step 2: the loss is not finite" in printed  # the others are
    assert [r["variant"] for r in bench.read_records(Path("e"))] == ["vanilla", "gqa"]


def test_speed_is_timed_in_turns_with_the_first(small_bench, monkeypatch):
    # Seconds of vanilla and of the variant in turns: a warm-up; then 2, 4, 1/2 times as fast.
    clock = iter([99, 1, 2, 1, 2, 0.5, 2, 4] * 4)

    def timed(function, device):
        function()
        return next(clock)

    monkeypatch.setattr(bench, "timed", timed)
    with patch.object(GPT, "forward", autospec=True, side_effect=GPT.forward) as forward:
        printed = small_bench("--parts", "speed", "--rounds", "3", "--variants", "vanilla", "gqa")
    for name in ("vanilla", "gqa    "):  # in one second 6 x 32 tokens; 2 sequences x 16 tokens
        assert f"| {name} | 2.00 (192) | 2.00 (32)     |" in printed
    inputs = [(call.args[0].config.attention, *call.args[1].shape)
              for call in forward.call_args_list]
    expected = []
    for name in ("vanilla", "gqa"):
        expected += 4 * [("vanilla", 6, 32), (name, 6, 32)]
        expected += 4 * (16 * [("vanilla", 2, 1)] + 16 * [(name, 2, 1)])
    assert inputs == expected


def test_the_figures(small_bench, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="figures need matplotlib")
    names = ["vanilla", "resformer", "svformer"]
    printed = small_bench("--variants", *names, "--parts", "loss", "--seeds", "1", "2")
    assert "weights of V_1" not in printed  # they are fixed
    for name in ("loss", "attention"):
        assert Path(f"b/{name}.png").read_bytes()[1:4] == b"PNG"
    other = "resformer --lr 1e-2"
    both = "resformer+neutreno"  # of which SYSTEMS knows nothing
    small_bench("--variants", other, both, "--parts", "loss", "--seeds", "3")
    with patch.object(figures.Figure, "savefig", autospec=True) as saved:
        assert f"no seed in common with vanilla: {other}" in small_bench("--show", "b")
    loss, attention = (call.args[0] for call in saved.call_args_list)

    runs = {(r["variant"], r["seed"]): r for r in bench.read_records(Path("b"))}
    gaps = np.array([[np.subtract(runs[name, seed]["val_curve"], runs["vanilla", seed]["val_curve"])
                      for seed in (1, 2)] for name in names])[..., 1]  # (systems, seeds, steps)
    means = gaps.mean(axis=1)
    left, right = loss.axes
    # 2 layers of 2 heads of 8 numbers in 4 bytes; resformer's is as large, and drawn beside it.
    points = [[256, 0], [256 * 1.02, means[1, -1]], [192, means[2, -1]]]
    np.testing.assert_allclose([line.get_xydata()[0] for line in left.lines[::3]], points)
    for ax, at in ((left, points), (right, [(6, gap) for gap in means[:, -1]])):
        labels = {text.get_text(): text for text in ax.texts}
        assert set(labels) == set(names) and min(at)[0] > 0.1 * ax.get_xlim()[1]
        np.testing.assert_allclose([labels[name].xy for name in names], at)
        heights = [labels[name].xyann[1] for name in names[:2]]  # side by side: no two overlap
        assert abs(np.diff(heights)) > 0.039 * np.diff(ax.get_ylim())
    curves = np.concatenate((gaps, means[:, None]), axis=1)  # a line a seed, then their mean
    np.testing.assert_allclose([line.get_ydata() for line in right.lines], curves.reshape(9, 3))
    assert right.lines[0].get_xdata().tolist() == [2, 4, 6]

    layers = np.array([runs["svformer", seed]["attention"]["first"] for seed in (1, 2)])
    drawn = attention.axes[1].lines[8]
    assert drawn.get_label() == "svformer" and drawn.get_xdata().tolist() == [1, 2]
    np.testing.assert_allclose(drawn.get_ydata(), layers.mean(axis=0))
    assert attention.axes[1].get_title() == bench.MEASURES["first"][0]
    words = [text.get_text() for text in attention.legends[0].texts]
    assert words == [*names, other, both, "even, random"]
    lines = {line.get_label(): line for line in attention.axes[1].lines}
    np.testing.assert_allclose(lines[other].get_color(), 0.6 * lines["resformer"].get_color())
    assert lines[other].get_marker() != lines["resformer"].get_marker()
    assert len({tuple(lines[name].get_color()) for name in (*names, both)}) == 4

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "no figures: pip install matplotlib" in small_bench("--show", "b")


def test_the_fingerprint_is_of_all_that_makes_the_numbers(monkeypatch):
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in ("model.py", "train.py"))
    code += bench.inspect.getsource(bench)
    before, read, source = bench.fingerprint(), Path.read_text, bench.inspect.getsource
    for old, new, same in (
            ("# Token t of this", "# token t of this", True),
            ("The language model.", "A model.", True), ("try a lower --lr", "lower --lr", True),
            ("choose from", "take one of", True), ("layers, heads and width", "depth", True),
            ("10000.0", "9999.0", False), ("flag(50", "flag(60", False),
            ("importance=importance[0]", "importance=importance[1]", False)):
        assert code.count(old) == 1
        with monkeypatch.context() as context:
            context.setattr(Path, "read_text", lambda *a, **k: read(*a, **k).replace(old, new))
            context.setattr(bench.inspect, "getsource", lambda f: source(f).replace(old, new))
            assert (bench.fingerprint() == before) == same, old


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


def test_with_a_start_token_every_sequence_begins_with_end_of_text(small_run, script):
    config = replace(small_run, start_token=True, eval_every=12)
    with patch.object(GPT, "hidden_states", autospec=True, side_effect=GPT.hidden_states) as calls:
        bench.measure_run(config, 8)
        _, out, _ = script("sample.py", "--out_dir=run", "--prompt=1", "--max_new_tokens=9",
                           "--temperature=0", "--no_cache", "--device=cpu")
    seen = [call.args[1] for call in calls.call_args_list]
    assert all(idx[:, 0].eq(256).all() and idx[:, 1:].ne(256).all() for idx in seen)
    assert max(idx.size(1) for idx in seen) == 32
    last = seen[-1][0].tolist()  # all of the sample but its last token
    assert len(last) == 10 and last[1] == ord("1")
    assert out.startswith("".join(prepare_data.stream_text(get_tokenizer("byte"), last)))


def test_what_a_terminal_cannot_show_is_replaced(folder, script):
    write("漢字.txt", "漢" * 1000)
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    status, out, _ = script("prepare_data.py", "漢字.txt")
    assert status == 0 and "?" in out


def test_only_a_mistake_and_ctrl_c_become_a_line(small_run, script, monkeypatch):
    stopped = "stopped; add --resume to go on from the last evaluation"
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
train.py --out_dir run -> run holds a run: --resume goes on with it, --overwrite starts anew
train.py --resume --out_dir run --max_steps 1 -> --max_steps 1: the run in run has 2 steps
train.py --resume --out_dir run --dataset other -> --dataset other is not what the run
train.py --resume --out_dir bomb -> bomb/ckpt.pt can't be read
train.py --resume --out_dir list -> list/ckpt.pt is not a checkpoint of train.py
sample.py --out_dir nowhere -> nowhere/ckpt.pt isn't there
sample.py --out_dir run --prompt FILE:nowhere -> nowhere
sample.py --out_dir run --prompt FILE:empty.txt -> --prompt has no text
sample.py --out_dir run --top_k 0 --prompt d -> --top_k
bench.py --variants resnet -> --variants resnet: --attention 'resnet': choose from
bench.py --rounds 0 -> --rounds
bench.py --variants vanilla 'resformer --seed 7' -> --seed is for all variants alike
bench.py --n_layer 10 --variants vanilla 'svformer --residual_layers 9' -> residual_layers is for
bench.py --seed 7 -> --seed
bench.py --show nowhere -> nowhere/results.jsonl has no runs
bench.py --show torn -> torn/results.jsonl, line 1 can't be read
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
        write("short.txt", "x" * 19)
        write("torn/results.jsonl", '{"variant": "van')  # killed in a write
        write("elsewhere/text.txt", "another text of the same name\n" * 99)
        write("stdlib/a.py", "# not Python's\n" * 99)
        for name in ("odd", "no_val"):
            shutil.copytree("data/text", f"data/{name}")
        write("data/odd/train.bin", Path("data/text/train.bin").read_bytes()[:-1])
        Path("data/no_val/val.bin").unlink()
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
    if name in ("train.py", "bench.py"):  # for all that the line doesn't say
        small = as_flags(replace(SMALL, out_dir=None))
    if name == "bench.py":
        small.append("--variants=vanilla")
    before = contents(broken_things)
    status, out, error = script(name, *small, *flags)
    assert status == 2 and error.count("\n") == 1 and error.startswith(f"{name}: "), error
    assert words in error.replace(os.sep, "/")
    assert "prompt" not in line or out == ""
    assert contents(broken_things) == before


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
            expected = "Attention in layer 1" if "--show" in flags else "64.0"
            assert expected in capsys.readouterr().out
