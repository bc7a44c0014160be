"""Tests. The model is compared with `reference`, a slow float64 version of the equations, in loops
over layers, heads and pairs of numbers; the scripts are run on small data in temporary folders.

    pip install pytest && pytest -q
"""

import hashlib
import http.server
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import prepare_data
import sample
import train
from model import GPT, VARIANTS, GPTConfig, KVCache
from prepare_data import DataConfig, UserError, get_tokenizer, prepare
from train import TrainConfig

HERE = Path(__file__).parent
torch.set_num_threads(1)  # everything here is tiny
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start too
COMBINATIONS = ["svformer+gqa", "svformer+cla", "cla+gqa", "resformer+gqa", "resformer+neutreno",
                "resformer+denseformer", "resformer+cla", "neutreno+gqa", "svformer+denseformer",
                "resformer+neutreno+denseformer+cla+gqa"]
ABLATIONS = {
    "resformer on 3 and 5": dict(attention="resformer", residual_layers=(5, 3)),
    "learnable": dict(attention="resformer+neutreno", value_residual="learnable"),
    "learnable on 2 and 4": dict(attention="resformer+denseformer", value_residual="learnable",
                                 residual_layers=(2, 4)),
    "plus": dict(attention="resformer+gqa", value_residual="plus"),
    "plus on 3": dict(attention="resformer+cla", value_residual="plus", residual_layers=(3,)),
    "plus with cla": dict(attention="resformer+cla", value_residual="plus"),
}
EVERY = [*VARIANTS, *COMBINATIONS, *ABLATIONS]


def tiny_config(attention, **changes):
    settings = dict(vocab_size=37, block_size=32, n_layer=5, n_head=4, n_embd=32, n_ffn=20,
                    attention=attention, value_lambda=(0.3, 0.9), neutreno_lambda=0.4)
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
            scores = reference_rope(q[:, h * hs:(h + 1) * hs]) @ K[n][g].T / math.sqrt(hs)
            future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
            A = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
            attention.append(A)
            u = A @ V[n][g]
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
    model, idx, targets = tiny_model(attention), tokens(seed=1), tokens(seed=2)
    P = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.stack([reference_sequence(model.config, P, row) for row in idx])
    probability = torch.softmax(expected, dim=-1)
    expected_loss = 0
    for b in range(idx.size(0)):
        for t in range(idx.size(1)):
            surprise = -torch.log(probability[b, t, targets[b, t]])
            expected_loss = expected_loss + surprise / idx.numel()
    expected_loss.backward()

    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-9)
    _, loss = model(idx, targets)
    loss.backward()
    assert abs(loss.item() - expected_loss.item()) < 1e-9
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, P[name].grad, rtol=0, atol=1e-9, msg=name)


def test_a_loss_in_parts_is_the_loss():
    model, sizes = tiny_model("resformer"), []
    model.lm_head.register_forward_hook(lambda _, inputs, out: sizes.append(out.numel()))
    for n in (48, 42, 2):  # in eighths, in seven parts, in two
        idx, targets = tokens(T=n // 2, seed=1), tokens(T=n // 2, seed=2)
        logits, whole = model(idx, targets, max_logits=n * 37)
        expected = torch.autograd.grad(whole, list(model.parameters()))
        sizes.clear()
        none, loss = model(idx, targets, max_logits=n * 37 - 1)
        assert sum(sizes) == logits.numel() and max(sizes) == -(-n // 8) * 37 and none is None
        torch.testing.assert_close(loss, whole, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.float()(idx, targets, max_logits=0)[1]
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(whole.item(), rel=0.01)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("attention", EVERY)
def test_decoding_with_the_cache_equals_the_full_pass(attention, dtype, tolerance):
    # In float32 with the weights that training starts from, in float64 with large ones.
    model = tiny_model(attention) if dtype == torch.float64 else GPT(tiny_config(attention))
    idx = tokens(T=29)
    cache = KVCache(model.config, 2, 29, dtype=dtype)
    pieces, start = [], 0
    for T in (7, 1, 1, 9, 2, 1, 8):
        pieces.append(model(idx[:, start:start + T], cache=cache)[0])
        start += T
        assert cache.length == start
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx)[0], rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="max_len"):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize("attention", EVERY)
def test_a_later_token_changes_nothing_before_it(attention):
    model, idx = tiny_model(attention, torch.float32), tokens()
    changed = idx.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 37
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13], after[:, 13])


# ---- the KV cache and the parameters ------------------------------------------------------------

KV_NUMBERS = {  # design: numbers a token, in units of h = n_kv_head x head size
    "vanilla": lambda L: 2 * L, "resformer": lambda L: 2 * L, "neutreno": lambda L: 2 * L,
    "denseformer": lambda L: 2 * L, "gqa": lambda L: 2 * L, "resformer+gqa": lambda L: 2 * L,
    "svformer": lambda L: L + 1, "svformer+gqa": lambda L: L + 1,
    "cla": lambda L: 2 * math.ceil(L / 2), "cla+gqa": lambda L: 2 * math.ceil(L / 2),
    "svformer+cla": lambda L: math.ceil(L / 2) + 1}


@pytest.mark.parametrize("n_layer", [1, 4, 5])
@pytest.mark.parametrize("attention", KV_NUMBERS)
def test_cache_holds_what_the_formula_says(attention, n_layer):
    config = tiny_config(attention, n_layer=n_layer)
    h = (2 if "gqa" in attention else 4) * 8
    cache = KVCache(config, batch_size=3, max_len=11, dtype=torch.bfloat16)
    a_token = KV_NUMBERS[attention](n_layer) * h * 2
    assert cache.nbytes == 3 * 11 * a_token
    assert GPT(config).kv_bytes_per_token(torch.bfloat16) == a_token
    held = {t.untyped_storage().data_ptr() for t in cache.k + cache.v if t is not None}
    assert len(held) == sum(t is not None for t in cache.k + cache.v)


def test_svformer_at_24_layers_holds_52_percent():
    svformer, vanilla = (KVCache(tiny_config(name, n_layer=24), 1, 8).nbytes
                         for name in ("svformer", "vanilla"))
    assert round(100 * svformer / vanilla) == 52


@pytest.mark.parametrize("attention", EVERY)
def test_parameters_are_those_that_the_layers_own(attention):
    config = tiny_config(attention)
    names = config.attention.split("+")
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    for i in range(5):
        shares_both = "cla" in names and i in (1, 3)
        shares_v = shares_both or ("svformer" in names and i > 0)
        parts = ["input_layernorm", "post_attention_layernorm", "self_attn.q_proj",
                 "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        parts += [] if shares_both else ["self_attn.k_proj"]
        parts += [] if shares_v else ["self_attn.v_proj"]
        expected |= {f"layers.{i}.{part}.weight" for part in parts}
        expected |= {f"depth_weights.{i}"} if "denseformer" in names else set()
    if config.value_residual != "fixed":
        expected |= {"value_l1", "value_l2"}
        expected |= {"value_total"} if config.value_residual == "plus" else set()
    state = GPT(config).state_dict()
    assert set(state) == expected
    if "gqa" in names:
        assert state["layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    if "denseformer" in names:
        assert [len(state[f"depth_weights.{i}"]) for i in range(5)] == [2, 3, 4, 5, 6]
        assert state["depth_weights.2"].tolist() == [0, 0, 0, 1]


def test_the_papers_82m():
    config = GPTConfig(vocab_size=50304, block_size=2048, n_layer=8, n_head=8, n_embd=512,
                       attention="vanilla")
    model = GPT(config)
    assert model.num_params() == 81_928_704
    # 6 operations a number in a product, without norms and look-ups; attention: 12 L T C
    N = 8 * (4 * 512 * 512 + 3 * 512 * 1792) + 50304 * 512
    assert model.flops_per_token() == 6 * N + 12 * 8 * 2048 * 512


@pytest.mark.parametrize("prefix", ["", "model."])
def test_state_dict_loads_with_and_without_prefix(prefix):
    source, target = tiny_model("resformer+denseformer"), GPT(tiny_config("resformer+denseformer"))
    state = {(prefix if name != "lm_head.weight" else "") + name: p
             for name, p in source.state_dict().items()}
    target.double().load_state_dict(state)
    assert torch.equal(target(tokens())[0], source(tokens())[0])


@pytest.mark.parametrize("attention, reaches", [("resformer", True), ("svformer", True),
                                                ("neutreno", True), ("vanilla", False)])
def test_first_layers_values_learn_from_the_layers_above(attention, reaches):
    model = tiny_model(attention)
    with torch.no_grad():  # what layer 1's own attention says is unheard: only V_1 gets out
        model.layers[0].self_attn.o_proj.weight.zero_()
    model(tokens(), tokens(seed=2))[1].backward()
    gradient = model.layers[0].self_attn.v_proj.weight.grad
    assert (gradient.abs().max().item() > 1e-6) == reaches


def test_learned_value_residuals_start_where_they_should():
    """learnable at value_lambda; plus with V_1's weights at 1 each, whatever value_lambda says."""
    def start(value_residual, **changes):
        model = GPT(GPTConfig(n_layer=6, attention="resformer", value_residual=value_residual,
                              value_lambda=(0.25, 0.75), **changes)).requires_grad_(False)
        return {n: [float(x) for x in pair] for n, pair in model.value_lambdas().items()}

    assert start("fixed") == start("learnable") == {n: [0.25, 0.75] for n in range(2, 7)}
    for layers, changes in ((range(2, 7), {}), ((3, 6), dict(residual_layers=(6, 3)))):
        plus = start("plus", **changes)
        assert list(plus) == list(layers)
        assert all(pair == pytest.approx([1, 0.75]) for pair in plus.values())


def test_variants_of_one_seed_start_alike():
    models = {}
    for name in ("vanilla", "svformer"):
        torch.manual_seed(3)
        models[name] = GPT(tiny_config(name, n_embd=256, n_ffn=512)).state_dict()
    for name, p in models["svformer"].items():
        assert torch.equal(p, models["vanilla"][name]), name
    p = models["vanilla"]
    assert p["layers.1.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    small = 0.02 / math.sqrt(2 * 5)
    assert p["layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(small, rel=0.02)
    assert not torch.equal(p["layers.1.mlp.up_proj.weight"], p["layers.2.mlp.up_proj.weight"])


@pytest.mark.parametrize("attention", VARIANTS)
def test_bfloat16_autocast_is_close(attention):
    model = tiny_model(attention, torch.float32)
    exact = model(tokens(), tokens(seed=2))[1].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens(), tokens(seed=2))[1].item() == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("field, changes", [
    ("vocab_size", dict(vocab_size=0)), ("block_size", dict(block_size=-1)),
    ("n_layer", dict(n_layer=2.0)), ("n_layer", dict(n_layer=True)), ("n_head", dict(n_head="4")),
    ("n_head", dict(n_head=0)), ("n_embd", dict(n_embd=30)), ("n_embd", dict(n_embd=12)),
    ("n_embd", dict(n_embd=None)), ("n_ffn", dict(n_ffn=0)), ("n_kv_head", dict(n_kv_head=0)),
    ("n_kv_head", dict(n_kv_head=3, attention="gqa")), ("n_kv_head", dict(n_kv_head=2)),
    ("attention", dict(attention="resnet")), ("attention", dict(attention="")),
    ("attention", dict(attention=None)), ("attention", dict(attention="cla+cla")),
    ("attention", dict(attention="vanilla+gqa")),
    ("attention", dict(attention="resformer+svformer")),
    ("attention", dict(attention="svformer+neutreno")), ("attention", dict(attention="gqa+")),
    ("residual_layers", dict(residual_layers=(1,))),
    ("residual_layers", dict(residual_layers=(6,))),
    ("residual_layers", dict(residual_layers=(3, 4), attention="resformer+cla")),
    ("value_residual", dict(value_residual="learned")),
    ("value_lambda", dict(value_lambda=(1.0,))),
    ("value_lambda", dict(value_lambda=(1, math.nan))),
    ("neutreno_lambda", dict(neutreno_lambda=math.inf))])
def test_a_bad_config_is_refused_by_the_name_of_its_field(field, changes):
    with pytest.raises(ValueError, match=f"^{field}\\b"):
        tiny_config(**({"attention": "vanilla"} | changes))


def test_gqa_halves_the_key_value_heads():
    assert tiny_config("gqa").n_kv_head == 2
    assert tiny_config("svformer+gqa", n_kv_head=1).n_kv_head == 1
    assert tiny_config("vanilla").n_kv_head == 4


def test_the_readme_points_at_the_lines_of_the_variants():
    code = (HERE / "model.py").read_text().splitlines()
    needles = {"vanilla": "scaled_dot_product", "gqa": "2305.13245", "cla": "2405.12981",
               "resformer": "l1 V_1 + l2 V_n", "svformer": "U_n = A_n V_1",
               "neutreno": "2312.00751",
               "denseformer": "2402.02622"}
    readme = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` .*\(model\.py#L(\d+)\)", readme, re.M)
    assert {name for name, _ in rows} == set(VARIANTS)
    for name, line in rows:
        assert needles[name] in code[int(line) - 1], name


# ---- generation ---------------------------------------------------------------------------------


def generate(model, idx, n, **options):
    return torch.stack(list(model.generate(idx, n, **options)), dim=1)


@pytest.mark.parametrize("attention", ["resformer", "svformer", "cla+gqa"])
def test_greedy_text_is_the_argmax_in_a_sliding_window(attention):
    model, prompt = tiny_model(attention), tokens(T=5)
    window, expected = prompt, []
    for _ in range(70):  # 32 fit: the window slides more than once
        if window.size(1) > 32:
            window = window[:, -16:]
        best = model(window)[0][:, -1].argmax(dim=-1)
        expected.append(best)
        window = torch.cat((window, best[:, None]), dim=1)
    expected = torch.stack(expected, dim=1)
    assert torch.equal(generate(model, prompt, 70, temperature=0), expected)
    assert torch.equal(generate(model, prompt, 70, temperature=0, cache=False), expected)
    assert torch.equal(generate(model, prompt, 70, top_k=1, seed=5), expected)


def test_a_seed_fixes_the_text_and_top_k_narrows_it():
    model, prompt = tiny_model("svformer"), tokens(B=3, T=4)
    first = generate(model, prompt, 50, seed=7)
    torch.manual_seed(99)  # the generator is its own: the global one has no say
    assert torch.equal(generate(model, prompt, 50, seed=7), first)
    assert torch.equal(generate(model, prompt, 50, seed=7, cache=False), first)
    assert not torch.equal(generate(model, prompt, 50, seed=8), first)
    best_two = model(prompt)[0][:, -1].topk(2).indices
    for seed in range(20):
        drawn = generate(model, prompt, 1, top_k=2, seed=seed, temperature=5.0)
        assert (drawn == best_two).any(dim=1).all()


def test_the_cache_that_is_given_is_used_and_bad_arguments_are_refused():
    model = tiny_model("svformer")
    cache = KVCache(model.config, 2, 32, dtype=torch.float64)
    generate(model, tokens(T=6), 10, cache=cache)
    assert cache.length == 15  # the last token was drawn, not read
    for name, options in (("temperature", dict(temperature=-1)), ("top_k", dict(top_k=0)),
                          ("temperature", dict(temperature=math.nan))):
        with pytest.raises(ValueError, match=name):
            generate(model, tokens(), 1, **options)
    with pytest.raises(ValueError, match="idx"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="block_size"):
        model(tokens(T=33))


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


@pytest.mark.parametrize("text", ["To be, or not to be?\n" * 3000, "漢" * 1001])
def test_a_file_is_split_at_nine_tenths(folder, text):
    data = text.encode()
    (folder / "my text.txt").write_bytes(data)
    out = prepare(DataConfig("my text.txt"))
    train_ids, val_ids, meta = prepare_data.load("my text")
    assert out == Path("data/my text") and bytes([*train_ids, *val_ids]) == data
    assert 0 <= len(train_ids) - len(data) * 9 // 10 <= 2  # moves on to a whole character:
    assert bytes(train_ids.astype(np.uint8)).decode() in text  # 2,702 of 3,003 bytes are not
    assert meta["sha256"] == hashlib.sha256(data).hexdigest()
    assert (meta["train_tokens"], meta["val_bytes"]) == (len(train_ids), len(val_ids))


def test_a_name_is_taken_by_what_came_first(folder):
    for name in ("stdlib.txt", "other/stdlib.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"This is {name}. " * 20)
    prepare(DataConfig("stdlib.txt"))  # a file of the user's, whatever its name
    before = read_bin("data/stdlib/train.bin")
    assert bytes([*before]).startswith(b"This is stdlib.txt.")
    for other in ("other/stdlib.txt", "stdlib"):
        with pytest.raises(UserError, match="data/stdlib holds data from elsewhere"):
            prepare(DataConfig(other))
    assert np.array_equal(read_bin("data/stdlib/train.bin"), before)


def test_a_folder_is_split_by_documents(folder):
    texts = {f"src/d{i % 3}/{i:02}.txt": f"document {i} <|endoftext|>" * (i + 1)
             for i in range(25)}
    texts |= {"src/.hidden": "no", "src/binary": "\0\1", "src/empty": ""}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "src/latin1").write_bytes(b"\xe9t\xe9")
    (folder / "src/loop").symlink_to(folder / "src")
    prepare(DataConfig("src"))
    train_ids, val_ids, meta = prepare_data.load("src")

    def documents(ids):
        parts = np.split(ids, np.flatnonzero(ids == 256))
        return [bytes(part[part < 256].astype(np.uint8)).decode() for part in parts]

    order = [texts[name] for name in sorted(texts) if "/d" in name]
    assert documents(val_ids) == [order[9], order[19]]
    assert documents(train_ids) == [t for i, t in enumerate(order) if i not in (9, 19)]
    assert meta["train_bytes"] == sum(len(t) for i, t in enumerate(order) if i not in (9, 19))


def test_stdlib_is_this_pythons_and_the_same_each_time(folder):
    files = prepare_data.stdlib_files()
    assert files == prepare_data.stdlib_files() and any(p.name == "argparse.py" for p in files)
    assert not any({"test", "tests", "site-packages"} & set(p.parts[3:]) for p in files)
    prepare(DataConfig())
    assert prepare_data.load("stdlib")[2]["train_bytes"] > 5_000_000


def test_gpt2_tokens_do_not_depend_on_the_pieces(folder, monkeypatch):
    try:
        tokenizer = get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)
    words = ["a", "don't", "42", "!?", "naïve", "x_1"]
    text = ""
    for _ in range(3000):
        text += words[rng.integers(6)] + "".join(rng.choice([" ", "\n", "\t"], rng.integers(1, 9)))
    (folder / "code.txt").write_text(text)
    for size in (50, 300):
        pieces = list(prepare_data.read_pieces(Path("code.txt"), 0, len(text.encode()), size))
        assert len(pieces) > 50 and "".join(pieces) == text
        ids = [i for piece in pieces for i in tokenizer.encode_ordinary(piece)]
        assert ids == tokenizer.encode_ordinary(text)
    prepare(DataConfig("code.txt", tokenizer="gpt2"))
    train_ids, val_ids, meta = prepare_data.load("code-gpt2")
    assert tokenizer.decode([*train_ids, *val_ids]) == text
    assert meta["vocab_size"] == 50257
    config = train.model_config(TrainConfig(size="2M"), meta["vocab_size"])
    assert config.vocab_size == 50304 and config.n_ffn == 56


def test_gpt2_without_its_files_says_what_to_do(monkeypatch):
    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer byte"):
        get_tokenizer("gpt2")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, parts of them if `ranges`; hangs up after `limit` bytes of an answer."""
    files, ranges, limit, requests = {}, True, None, []

    def do_GET(self):
        body = self.files[self.path.strip("/")]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.requests.append((self.path.strip("/"), asked and int(asked[1])))
        if asked and self.ranges and int(asked[1]) < len(body):
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            body = body[first:last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/"
    monkeypatch.setattr(prepare_data, "FINEWEB_URL", url)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url + "input.txt")
    Server.files, Server.ranges, Server.limit, Server.requests = {}, True, None, []
    yield Server
    httpd.shutdown()
    httpd.server_close()


def test_shakespeare_is_downloaded_once_and_checked(folder, server, monkeypatch):
    server.files["input.txt"] = b"<html>not found</html>"
    with pytest.raises(UserError, match="SHA-256"):
        prepare(DataConfig("shakespeare"))
    assert not [p for p in folder.rglob("*") if p.is_file()]
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50
    server.files["input.txt"] = text
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    prepare(DataConfig("shakespeare"))
    prepare(DataConfig("shakespeare"))
    assert len(server.requests) == 2
    assert bytes([*read_bin("data/shakespeare/train.bin")]) == text[:len(text) * 9 // 10]


def shard(ids, magic=20240520, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids, dtype="<u2").tobytes()


@pytest.fixture
def no_gpt2(monkeypatch):
    """The byte tokenizer in the place of GPT-2's, which would be a download of its own."""
    byte = get_tokenizer("byte")
    byte.name = "gpt2"
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: byte)


@pytest.mark.parametrize("ranges", [True, False])
def test_fineweb_goes_on_where_a_download_broke(folder, server, no_gpt2, ranges):
    ids = [np.random.default_rng(i).integers(0, 257, 3000) for i in range(3)]
    server.files = {"fineweb_train_000001.bin": shard(ids[0]),
                    "fineweb_train_000002.bin": shard(ids[1]),
                    "fineweb_val_000000.bin": shard(ids[2])}
    server.ranges, server.limit = ranges, 2500  # of the 7,024 bytes of a shard
    for attempt in range(12):
        try:
            prepare(DataConfig("fineweb", shards=2))
            break
        except UserError as error:
            assert "run this again to go on" in str(error)
            assert not Path("data/fineweb/meta.json").exists()
            if not ranges:  # each try starts from the beginning: only a whole answer helps
                server.limit = None
    train_ids, val_ids, meta = prepare_data.load("fineweb")
    assert np.array_equal(train_ids, np.concatenate(ids[:2])) and np.array_equal(val_ids, ids[2])
    assert meta["train_bytes"] == np.count_nonzero(train_ids != 256)
    firsts = [first for name, first in server.requests if name == "fineweb_train_000001.bin"]
    assert firsts == ([0, 2499, 4998] if ranges else [0, 2499])
    n = len(server.requests)
    Path("data/fineweb/fineweb_train_000003.bin.part").write_bytes(shard(ids[2]))  # not renamed
    server.files["fineweb_train_000003.bin"] = shard(ids[2])
    prepare(DataConfig("fineweb", shards=3))  # a further shard, and only that
    assert server.requests[n:] == [("fineweb_train_000003.bin", 7023)]
    assert len(prepare_data.load("fineweb")[0]) == 9000


@pytest.mark.parametrize("body", [shard([1, 2], magic=1), shard([1, 2], count=3), b"<html>", b""])
def test_a_wrong_shard_is_refused(folder, server, no_gpt2, body):
    server.files["fineweb_train_000001.bin"] = body
    with pytest.raises(UserError, match="wrong header or size"):
        prepare(DataConfig("fineweb"))
    assert not list(Path("data/fineweb").iterdir())


def test_a_shard_of_another_vocabulary_is_refused(folder, server, no_gpt2):
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        server.files[name] = shard([1, 2, 60000])
    prepare(DataConfig("fineweb"))
    with pytest.raises(UserError, match="token id 60000 is outside the vocabulary"):
        prepare_data.load("fineweb")


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture
def small_run(folder):
    """A config that trains in a second, on 40 kB of text."""
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    prepare(DataConfig("text.txt"))
    return TrainConfig(dataset="text", size="2M", block_size=32, batch_size=6, max_steps=12,
                       eval_every=4, eval_tokens=512, warmup_steps=2, device="cpu", out_dir="run")


def run(config):
    return train.train(config, show=False)


@pytest.mark.parametrize("attention", [*VARIANTS, "svformer+gqa"])
def test_training_learns(small_run, attention):
    history = run(replace(small_run, attention=attention, max_steps=30, lr=1e-2))
    assert [record["step"] for record in history] == list(range(1, 31))
    assert history[-1]["val_loss"] < history[0]["loss"] - 0.5
    assert history[-1]["bits_per_byte"] == pytest.approx(history[-1]["val_loss"] / math.log(2))
    assert history == [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    rounded = run(replace(small_run, attention=attention, max_steps=30, lr=1e-2, dtype="bfloat16",
                          out_dir="bf16"))
    assert rounded[-1]["val_loss"] == pytest.approx(history[-1]["val_loss"], rel=0.01)
    assert rounded[-1]["val_loss"] != history[-1]["val_loss"]


def test_learning_rate_rises_then_follows_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate(config, step) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.6)  # half-way down
    assert rates[10] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 6 / 8)) / 2)
    assert rates[12] == pytest.approx(0.2)
    assert train.learning_rate(replace(config, min_lr=None), 12) == pytest.approx(0.1)


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


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True)["model"] for path in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


muon = pytest.param(signal.SIGINT, dict(optimizer="muon", value_residual="plus"), id="muon",
                    marks=needs_muon)


@pytest.mark.parametrize("number, changes", [(signal.SIGTERM, {}), (signal.SIGINT, {}), muon])
def test_stopped_and_resumed_is_bit_identical(small_run, monkeypatch, number, changes, capsys):
    config = replace(small_run, **changes)
    losses = [record["loss"] for record in run(config)]
    rate, config = train.learning_rate, replace(config, out_dir="stopped")

    def stop_in_step_6(config, step):
        if step == 5:
            os.kill(os.getpid(), number)
        return rate(config, step)

    monkeypatch.setattr(train, "learning_rate", stop_in_step_6)
    with pytest.raises(SystemExit) as stopped:
        run(config)
    assert stopped.value.code == 128 + number
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(train, "learning_rate", rate)
    Path("stopped/log.jsonl").open("a").write('{"step": 8, "lo')  # as if killed in a later step
    history = run(replace(config, resume=True))
    assert [record["loss"] for record in history] == losses
    assert same_weights("run/ckpt.pt", "stopped/ckpt.pt")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_every_variant_reads_the_same_batches(small_run, monkeypatch):
    seen, windows = {}, train.windows
    for attention in ("vanilla", "svformer"):
        seen[attention] = []

        def spy(data, starts, *rest):
            seen[attention].append(starts.copy())
            return windows(data, starts, *rest)

        monkeypatch.setattr(train, "windows", spy)
        run(replace(small_run, attention=attention, out_dir=attention))
    assert len(seen["vanilla"]) == 12 + 3 * 2  # an evaluation of 512 tokens: 2 batches of 6
    assert all(map(np.array_equal, seen["vanilla"], seen["svformer"]))
    train_batches = {tuple(b) for b in seen["vanilla"] if len(b) == 6}
    assert len(train_batches) >= 12


def test_every_model_of_a_process_is_compiled(monkeypatch):
    compiled, torch_compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: torch_compile(model, backend=backend))
    for i in range(10):
        config = TrainConfig(compile="on", size="2M", n_layer=1, attention=VARIANTS[i % 7])
        _, model, _, _ = train.build(config, 257, torch.device("cpu"))
        model(tokens(), tokens())
        assert len(compiled) == i + 1


def test_gradient_accumulation_is_a_larger_batch(small_run):
    whole = run(replace(small_run, batch_size=6, grad_accum=1, max_steps=4))
    parts = run(replace(small_run, batch_size=2, grad_accum=3, max_steps=4, out_dir="parts"))
    for a, b in zip(whole, parts):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_torchrun_gives_the_losses_of_one_process(small_run, folder):
    config = replace(small_run, out_dir="alone")
    expected = run(config)
    flags = [f"--{name}={getattr(config, name)}" for name in (
        "dataset", "size", "block_size", "batch_size", "max_steps", "eval_every", "eval_tokens",
        "warmup_steps", "device")]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", str(HERE / "train.py"), *flags, "--out_dir=both"],
                   check=True, capture_output=True)
    lines = [json.loads(line) for line in Path("both/log.jsonl").read_text().splitlines()]
    assert len(lines) == len(expected) == 12
    for a, b in zip(lines, expected):
        for key in {"loss", "val_loss"} & set(b):
            assert a[key] == pytest.approx(b[key], abs=1e-5)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(small_run, monkeypatch):
    run(replace(small_run, max_steps=4))
    before = Path("run/ckpt.pt").read_bytes()
    forward = GPT.forward

    def broken(self, *args):
        with torch.no_grad():
            self.layers[1].mlp.up_proj.weight[0, 0] = math.nan
        return forward(self, *args)

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(UserError, match="step 5: the loss is nan"):
        run(replace(small_run, resume=True))
    assert Path("run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=0), "--batch_size"), (dict(lr=math.nan), "--lr"), (dict(lr=-1), "--lr"),
    (dict(max_steps=0), "--max_steps"), (dict(eval_every=0), "--eval_every"),
    (dict(grad_clip=-1.0), "--grad_clip"), (dict(attention="resnet"), "--attention"),
    (dict(n_head=3), "--n_embd"), (dict(n_kv_head=1), "--n_kv_head"),
    (dict(device="tpu"), "--device"), (dict(block_size=100_000), "--block_size"),
    (dict(dataset="nothing"), "prepare_data.py nothing"),
    (dict(out_dir="run"), "--resume"), (dict(out_dir="run", resume=True, seed=2), "--seed"),
    (dict(out_dir="run", resume=True, attention="cla"), "--attention")])
def test_mistakes_are_named_and_change_nothing(small_run, changes, message):
    run(replace(small_run, max_steps=1))
    before = {p: p.read_bytes() for p in Path().rglob("*.*")}
    with pytest.raises(UserError, match=message):
        run(replace(small_run, **({"out_dir": "other"} | changes)))
    assert {p: p.read_bytes() for p in Path().rglob("*.*")} == before


def test_data_that_disagrees_with_its_meta_is_refused(small_run):
    path, meta_path = Path("data/text/train.bin"), Path("data/text/meta.json")
    good = path.read_bytes()
    for bad in (good[:-1], good[:-2], b"", good[:-2] + b"\xff\xff"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="train.bin"):
            run(small_run)
    path.write_bytes(good)
    meta_path.write_text("{")
    with pytest.raises(UserError, match="meta.json"):
        run(small_run)
    assert not Path("run").exists()


def test_a_run_without_gpt2s_vocabulary_succeeds(small_run, monkeypatch, capsys):
    def offline(name):
        raise UserError("no vocabulary")

    monkeypatch.setattr(train, "get_tokenizer", offline)
    history = train.train(small_run)
    printed = capsys.readouterr().out
    assert f"{history[-1]['val_loss']:.4f} nats" in printed and "No sample" in printed


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_strangers_checkpoint_runs_no_code(folder):
    Path("ckpt.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(UserError, match="ckpt.pt"):
        prepare_data.load_checkpoint(Path("ckpt.pt"))
    assert not Path("exploded").exists()


def test_a_checkpoint_that_is_broken_or_of_another_shape_is_refused(small_run):
    run(small_run)
    path = Path("run/ckpt.pt")
    good, ckpt = path.read_bytes(), torch.load("run/ckpt.pt", weights_only=True)
    for bad in (b"", good[:1000], good[:-1000], b"x" * 1000):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="ckpt.pt"):
            sample.load_model(path, "cpu", torch.float32)
        with pytest.raises(UserError, match="ckpt.pt"):
            run(replace(small_run, resume=True))
    for changes in (dict(n_embd=32), dict(n_layer=-1), dict(bogus=1)):
        torch.save(dict(ckpt, model_config=ckpt["model_config"] | changes), path)
        with pytest.raises(UserError, match="config"):
            sample.load_model(path, "cpu", torch.float32)
    for other in ({"model": {}}, [1], dict(ckpt, more=1)):
        torch.save(other, path)
        with pytest.raises(UserError, match="not a checkpoint of train.py"):
            prepare_data.load_checkpoint(path)


def test_command_lines_from_data_to_text(folder):
    """prepare_data, train, resume and sample as a user types them, mistakes included."""
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 500)

    def script(name, *flags, text=None):
        return subprocess.run([sys.executable, str(HERE / name), *flags], input=text,
                              capture_output=True, text=True, encoding="utf-8")

    done = script("prepare_data.py", "text.txt")
    assert done.returncode == 0 and "19,350 tokens for training" in done.stdout, done.stderr
    small = ("--dataset=text", "--size=2M", "--block_size=32", "--batch_size=4",
             "--eval_tokens=256")
    done = script("train.py", *small, "--max_steps=5", "--attention=svformer")
    assert done.returncode == 0, done.stderr
    assert "nats a token" in done.stdout and "62% of vanilla's" in done.stdout
    again = script("train.py", *small, "--attention=svformer")
    assert again.returncode == 2 and "--resume" in again.stderr and again.stderr.count("\n") == 1
    done = script("train.py", "--attention=svformer", "--resume", "--max_steps=7")
    assert done.returncode == 0, done.stderr
    assert len(Path("out/svformer/log.jsonl").read_text().splitlines()) == 7
    done = script("train.py", "--attention=svformer", "--resume")  # nothing is left to do
    assert done.returncode == 0 and "nats a token" in done.stdout, done.stderr

    flags = ("--out_dir=out/svformer", "--max_new_tokens=40", "--num_samples=2", "--seed=3")
    with_cache = script("sample.py", *flags, "--prompt=To be")
    without = script("sample.py", *flags, "--prompt=To be", "--no_cache")
    piped = script("sample.py", *flags, "--prompt=-", text="To be")
    (folder / "prompt.txt").write_text("To be")
    from_file = script("sample.py", *flags, "--prompt=FILE:prompt.txt")
    assert with_cache.returncode == 0 and with_cache.stdout.count("To be") >= 2, with_cache.stderr
    assert with_cache.stdout == without.stdout == piped.stdout == from_file.stdout
    # 32 tokens x (4 + 1) x 16 numbers x 4 bytes
    assert "10,240 bytes" in with_cache.stderr and "no KV cache" in without.stderr


# ---- bench.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", EVERY)
def test_concentration_is_what_numpy_says(attention):
    model, idx = tiny_model(attention), tokens(B=3, T=20)
    got, each = bench.concentration(model, idx), []
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
            layers.append([-sum(x * math.log(x) for x in p),
                           np.mean([A[i, 0] for i in range(1, T)]),
                           v_norms[0] / v_norms[1:].mean(), h_norms[0] / h_norms[1:].mean(),
                           np.mean(cosines)])
        each.append(layers)
    expected = np.mean(each, axis=0)  # (L, 5)
    names = ["entropy", "sink", "value_drain", "hidden_drain", "similarity"]
    assert list(got) == names
    for i, name in enumerate(names):
        np.testing.assert_allclose(got[name], expected[:, i], rtol=1e-9, err_msg=name)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture
def small_bench(small_run, monkeypatch, capsys):
    """Calls bench.py's main in this process; returns what it prints. Seconds, on 40 kB of text."""
    flags = ("dataset=text size=2M block_size=32 batch_size=6 max_steps=6 eval_every=2 "
             "eval_tokens=256 warmup_steps=2 device=cpu rounds=1 decode_batch=2 out_dir=b").split()

    def call(*more):
        words = [word for f in flags for word in (f"--{f}".split("="))]
        monkeypatch.setattr(sys, "argv", ["bench.py", *words, "--contexts", "3", "9", *more])
        bench.main()
        return capsys.readouterr().out
    return call


def bench_records(part):
    lines = Path("b/results.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["name"].startswith(part)]


def test_speed_is_work_by_the_machines_best(monkeypatch):
    """With times of 4 s for the first variant, 2 s for the other and 1 s for the ceiling."""
    monkeypatch.setattr(bench, "in_turns", lambda tasks, device, rounds: np.array([[4., 2., 1.]]))
    config = bench.BenchConfig(variants=("vanilla", "cla"), contexts=(9,), decode_batch=2,
                               device="cpu", size="2M", block_size=(32,), batch_size=6, seeds=(1,))
    found = bench.measure_speeds(bench.list_runs(config), config, 257, torch.device("cpu"))["cla"]
    # 4 layers of width 16, SwiGLU of 56, of which 2 have keys and values; vocabulary 257.
    weights = 4 * (2 * 256 + 3 * 16 * 56) + 2 * 2 * 256 + 257 * 16
    flops = 6 * 32 * (6 * weights + 12 * 4 * 32 * 16)
    assert found["training"] == [96, 2, pytest.approx(flops / 2 / (2 * 2048**3))]
    # 9 RMSNorms; 2 sequences of 9 tokens, whose keys and values each of the 4 layers reads.
    read = 16 * 4 * (weights + 9 * 16 + 2 * 9 * 4 * 2 * 16)
    assert found["decoding at 9"] == [16, 2, pytest.approx(read / 2 / (4 * 2**26))]


def test_bench_measures_once_and_says_what_it_measured(small_bench, monkeypatch):
    asked = ("--variants", "vanilla", "resformer", "svformer+gqa", "cla", "--seeds", "3", "4")
    printed = small_bench(*asked)
    runs = bench_records("loss")
    assert [(r["flags"]["attention"], r["flags"]["seed"]) for r in runs] == [
        (a, seed) for seed in (3, 4) for a in ("vanilla", "resformer", "svformer+gqa", "cla")]
    for record in runs:
        assert record["tokens"] == 6 * 6 * 32 and len(record["train_curve"]) == 6
        assert [step for step, _ in record["val_curve"]] == [2, 4, 6]
        assert record["val_curve"][-1][1] == record["val_loss"]
        assert {len(layers) for layers in record["concentration"].values()} == {4}
        assert {"date", "torch", "machine", "data_sha256"} <= set(record)
        # The record is enough to make the run again, and gives the same loss.
    flags = runs[1]["flags"] | dict(value_lambda=(0.5, 0.5), out_dir="again")
    assert run(TrainConfig(**flags))[-1]["val_loss"] == runs[1]["val_loss"]

    gaps = [runs[i + 1]["val_loss"] - runs[i]["val_loss"] for i in (0, 4)]
    spread = f"{np.mean(gaps):+.4f} ± {abs(gaps[0] - gaps[1]) / 2:.4f}"  # standard error of two
    assert re.search(rf"^\| resformer .*{re.escape(spread)}", printed, re.M), printed
    assert f"resformer's loss is below vanilla's: {spread}" in printed

    cache = bench_records("cache")[0]
    # 4 layers, 2 heads of 8 numbers; svformer+gqa: 4 + 1 layers, one head; cla: 2 + 2 layers.
    for variant, numbers in (("vanilla", 8 * 16), ("svformer+gqa", 5 * 8), ("cla", 4 * 16)):
        assert cache[variant]["a token"] == [4 * numbers, 4 * numbers]
    h82, h468 = 8 * 64, 16 * 64
    assert cache["vanilla"]["82M 2,048 fp32"] == [2048 * 2 * 8 * h82 * 4] * 2
    assert cache["cla"]["468M 65,536 bf16"] == [65536 * 24 * h468 * 2] * 2
    assert cache["svformer+gqa"]["468M 2,048 fp32"] == [2048 * 25 * h468 // 2 * 4] * 2
    speed = bench_records("speed")[0]
    assert set(speed["cla"]) == {"training", "decoding at 3", "decoding at 9"}
    assert max(map(len, printed.splitlines())) <= 120
    assert all(share > 0 for task in speed["cla"].values() for share in task[2:])

    monkeypatch.setattr(bench, "train", None)  # whoever calls them fails
    monkeypatch.setattr(bench, "measure_cache", None)
    monkeypatch.setattr(bench, "measure_speeds", None)
    lines = Path("b/results.jsonl").read_text()
    assert small_bench(*asked) == printed and Path("b/results.jsonl").read_text() == lines
    with pytest.raises(TypeError):  # another flag is another run
        small_bench(*asked, "--weight_decay", "0.2")


def test_bench_goes_on_where_it_was_stopped(small_bench, monkeypatch):
    asked = ("--variants", "vanilla", "gqa", "--seeds", "1", "--parts", "loss")
    whole = small_bench(*asked)
    records = {r["name"]: r for r in bench_records("loss")}
    for path in Path("b").glob("*/ckpt.pt"):
        path.unlink()
    Path("b/results.jsonl").unlink()

    evaluate, count = train.evaluate, []

    def stopped(*args):
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", stopped)
    with pytest.raises(SystemExit):
        small_bench(*asked)
    assert len(bench_records("loss")) == 1  # the second run was stopped in its middle
    assert small_bench(*asked) == whole and len(count) == 6
    for record in bench_records("loss"):
        for key in ("val_curve", "train_curve", "concentration"):
            assert record[key] == records[record["name"]][key]


def test_bench_sweeps_with_the_same_tokens_a_step(small_bench):
    printed = small_bench("--variants", "vanilla", "svformer", "--seeds", "1", "--parts", "loss",
                          "--block_size", "32", "16", "64", "--lr", "1e-3", "1e-2")
    runs = bench_records("loss")
    assert [(r["flags"]["block_size"], r["flags"]["batch_size"]) for r in runs[::4]] == [
        (32, 6), (16, 12), (64, 3)]
    assert {r["tokens"] for r in runs} == {6 * 6 * 32}
    pairs = {(r["flags"]["block_size"], r["flags"]["lr"], r["flags"]["attention"]): r["val_loss"]
             for r in runs}
    table = printed[printed.index("by block_size and lr"):]
    for size in (32, 16, 64):
        gaps = [pairs[size, lr, "svformer"] - pairs[size, lr, "vanilla"] for lr in (1e-3, 1e-2)]
        assert re.search(rf"\| {size} \| +{gaps[0]:+.4f} \| +{gaps[1]:+.4f} \|".replace("+", "[+]")
                         .replace(" [+]", " +"), table), (size, gaps, table)


def test_bench_variants_with_flags_of_their_own(small_bench):
    asked = ("vanilla", "resformer", "resformer --value_lambda 2 1 --lr 1e-2",
             "resformer --value_residual plus --residual_layers 3-4")
    printed = small_bench("--seeds", "1", "2", "--parts", "loss", "--eval_every", "6",
                          "--variants", *asked)
    runs = bench_records("loss")
    assert [r["flags"]["value_lambda"] for r in runs[:4]] == [[.5, .5], [.5, .5], [2, 1], [.5, .5]]
    assert [r["flags"]["lr"] for r in runs[:4]] == [4e-3, 4e-3, 1e-2, 4e-3]
    assert len({r["val_loss"] for r in runs[:4]}) == 4
    assert max(map(len, printed.splitlines())) <= 120
    gap = np.mean([runs[i + 2]["val_loss"] - runs[i]["val_loss"] for i in (0, 4)])
    row = rf"^\| resformer --value_lambda 2 1 --lr 1e-2 .*{re.escape(f'{gap:+.4f}')} ±[0-9. ]+\| +\|$"
    assert re.search(row, printed, re.M), printed
    assert runs[2]["value_lambdas"] == [[n, 2, 1] for n in (2, 3, 4)]
    came_to = np.mean([r["value_lambdas"] for r in (runs[3], runs[7])], axis=0)
    assert came_to[:, 0].tolist() == [3, 4] and 0 < abs(came_to[0, 1] - 1) < 0.1
    for n, l1, l2 in came_to:
        assert re.search(rf"^\| {n:.0f} +\| {l1:.3f} \| {l2:.3f} \|", printed, re.M), printed


def test_tokens_saved_and_verdicts():
    other = dict(val_loss=2.0, val_curve=[[100, 3.0], [200, 2.0]])

    def saved(*losses):
        curve = [[50 * (i + 1), loss] for i, loss in enumerate(losses)]
        return bench.tokens_saved(dict(val_curve=curve), other)
    assert saved(3.0, 2.5, 1.5, 1.0) == pytest.approx(1 - 125 / 200)
    assert saved(3.0, 2.1, 2.4, 2.0) == pytest.approx(0)
    assert saved(3.0, 1.9, 2.6, 2.5) == pytest.approx(1 - (50 + 50 / 1.1) / 200)  # once is enough
    assert math.isnan(saved(3.0, 2.5, 2.2, 2.1))

    verdict = bench.verdict
    # Three differences, mean -0.02, standard deviation s: the 95% interval is 4.303 s / sqrt(3).
    for s, said in ((0.0078, "holds"), (0.0083, "not distinguishable")):
        assert verdict(np.array([-0.02 - s, -0.02, -0.02 + s]), -1) == said
    assert verdict(np.array([0.01, 0.011]), -1) == "does not hold at this scale"
    assert verdict(np.array([-1.0]), -1) == "one seed can't tell"


def test_bench_quick_is_quick_unless_told_otherwise(small_bench, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "list_runs", lambda config: seen.append(config) or [])
    monkeypatch.setattr(bench, "load_data", lambda run: 1 / 0)
    with pytest.raises(IndexError):
        small_bench("--quick")
    assert seen[0].seeds == (1,) and seen[0].max_steps == 6 and seen[0].rounds == 1


# ---- faults: wrong input, full disks, signals, many processes -----------------------------------

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes a minute; SLOW=1 runs it")

# What is in the folder: good data (text), a finished run (run) and, each broken in its own way,
# data in data/<name>, checkpoints in <name>/ckpt.pt, texts. Then the script, its flags and a word
# that must be in its one line.
BAD_INPUTS = [line.split("|") for line in """
prepare_data.py|nowhere|no such path
prepare_data.py|empty.txt|no UTF-8 text
prepare_data.py|latin1.txt|no UTF-8 text
prepare_data.py|half.txt|no UTF-8 text
prepare_data.py|zero.bin|no UTF-8 text
prepare_data.py|empty_folder|no UTF-8 text
prepare_data.py|binaries|no UTF-8 text
prepare_data.py|loop|no such path
prepare_data.py|/dev/zero|no UTF-8 text
prepare_data.py|elsewhere/text.txt|from elsewhere
prepare_data.py|text.txt --tokenizer gpt3|--tokenizer
prepare_data.py|fineweb --tokenizer byte|--tokenizer
prepare_data.py|fineweb --shards 0|--shards
prepare_data.py|fineweb --shards -3|--shards
prepare_data.py|fineweb --shards nan|--shards
prepare_data.py|text.txt other.txt|other.txt
prepare_data.py|--bogus|--bogus
train.py|--attention resnet|--attention
train.py|--attention vanilla+gqa|--attention
train.py|--attention resformer+svformer|--attention
train.py|--attention cla+cla|--attention
train.py|--attention|--attention
train.py|--size 83M|--size
train.py|--n_layer 0|--n_layer
train.py|--n_layer -1|--n_layer
train.py|--n_layer 1.5|--n_layer
train.py|--n_layer 1000000000|--n_layer
train.py|--n_embd 1000000000|--n_embd
train.py|--n_embd 63|--n_embd
train.py|--n_head 0|--n_head
train.py|--n_head 7|n_head (7)
train.py|--n_ffn 0|--n_ffn
train.py|--n_kv_head 2 --n_head 4|gqa
train.py|--attention gqa --n_head 4 --n_embd 64 --n_kv_head 3|--n_kv_head
train.py|--value_lambda 1|--value_lambda
train.py|--value_lambda nan 1|--value_lambda
train.py|--neutreno_lambda inf|neutreno_lambda
train.py|--value_residual learned|--value_residual
train.py|--residual_layers 9|residual_layers
train.py|--residual_layers 1-3|residual_layers
train.py|--residual_layers 3-2|--residual_layers
train.py|--residual_layers 2-6-8|--residual_layers
train.py|--residual_layers 2-99999999999|residual_layers
train.py|--attention svformer --residual_layers 4|residual_layers
train.py|--optimizer sgd|--optimizer
train.py|--dataset nothing|nothing
train.py|--dataset odd|train.bin
train.py|--dataset outside|vocabulary
train.py|--dataset no_val|val.bin
train.py|--dataset no_json|meta.json
train.py|--dataset list_json|meta.json
train.py|--dataset less|train.bin
train.py|--dataset short|--block_size
train.py|--block_size 0|--block_size
train.py|--block_size 1000000|--block_size
train.py|--batch_size -2|--batch_size
train.py|--grad_accum 0|--grad_accum
train.py|--max_steps 0|--max_steps
train.py|--max_steps ten|--max_steps
train.py|--lr nan|--lr
train.py|--lr -1e-3|--lr
train.py|--min_lr -1|--min_lr
train.py|--warmup_steps -1|--warmup_steps
train.py|--weight_decay inf|--weight_decay
train.py|--grad_clip -1|--grad_clip
train.py|--seed -1|--seed
train.py|--seed 99999999999999999999999|--seed
train.py|--device tpu|--device
train.py|--device cuda:99|--device
train.py|--dtype float16|--dtype
train.py|--compile maybe|--compile
train.py|--eval_every 0|--eval_every
train.py|--eval_tokens -1|--eval_tokens
train.py|--out_dir run|--resume
train.py|--out_dir text.txt|text.txt
train.py|--resume --out_dir run --seed 5|--seed
train.py|--resume --out_dir run --attention cla|--attention
train.py|--resume --out_dir run --dataset other|--dataset
train.py|--resume --out_dir bomb|bomb
train.py|--resume --out_dir truncated|truncated
train.py|--resume --out_dir flipped|flipped
train.py|--resume --out_dir empty|empty
train.py|--resume --out_dir list|not a checkpoint
train.py|--resume --out_dir version|not a checkpoint
train.py|--resume --out_dir config|config
train.py|--resume --out_dir shapes|shapes
train.py|--resume --out_dir words|words
train.py|--resume --out_dir optimizer|optimizer
train.py|--resume --out_dir no_log|no_log
sample.py|--out_dir nowhere|nowhere
sample.py|--out_dir bomb|bomb
sample.py|--out_dir truncated|truncated
sample.py|--out_dir flipped|flipped
sample.py|--out_dir empty|empty
sample.py|--out_dir list|not a checkpoint
sample.py|--out_dir version|not a checkpoint
sample.py|--out_dir shapes|shapes
sample.py|--out_dir words|words
sample.py|--out_dir terabyte|larger than the file
sample.py|--out_dir run --prompt FILE:nowhere|nowhere
sample.py|--out_dir run --prompt FILE:latin1.txt|UTF-8
sample.py|--out_dir run --prompt FILE:binaries|binaries
sample.py|--out_dir run --prompt FILE:empty.txt|--prompt
sample.py|--out_dir run --num_samples 0|--num_samples
sample.py|--out_dir run --max_new_tokens -1|--max_new_tokens
sample.py|--out_dir run --temperature -1|--temperature
sample.py|--out_dir run --temperature nan|--temperature
sample.py|--out_dir run --top_k 0|--top_k
sample.py|--out_dir run --top_k many|--top_k
sample.py|--out_dir run --seed 99999999999999999999999|--seed
sample.py|--out_dir run --device tpu|--device
sample.py|--out_dir run --dtype int8|--dtype
bench.py|--variants resnet|--variants
bench.py|--variants gqa gqa|--variants
bench.py|--variants gqa --n_kv_head 3|n_kv_head
bench.py|--variants --seeds|--variants
bench.py|--variants|--variants
bench.py|--seeds 1 1|--seeds
bench.py|--seeds -1|--seed
bench.py|--rounds 0|--rounds
bench.py|--contexts 16 0|--contexts
bench.py|--decode_batch 0|--decode_batch
bench.py|--lr 1e-3 nan|--lr
bench.py|--block_size 32 0|--block_size
bench.py|--parts los|--parts
bench.py|--attention cla|--attention
bench.py|--resume|--resume
bench.py|--seed 1|--seed
sample.py|--out_dir run --prompt=|--prompt
sample.py|--bogus|--bogus
bench.py|--dataset nothing|nothing
bench.py|--out_dir strange|results.jsonl
""".strip().splitlines()]


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schöne Daten")  # with a space, and not ASCII
    old = os.getcwd()
    os.chdir(folder)
    for name in ("text", "other"):
        Path(f"{name}.txt").write_text(f"a line of {name}\n" * 500)
        prepare(DataConfig(f"{name}.txt"))
    Path("short.txt").write_text("few words")
    prepare(DataConfig("short.txt"))
    run(TrainConfig(dataset="text", size="2M", block_size=32, batch_size=2, max_steps=2,
                    eval_tokens=64, device="cpu", out_dir="run"))

    for name in ("empty_folder", "binaries", "elsewhere", "strange"):
        Path(name).mkdir()
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes("schön".encode("latin-1"))
    Path("half.txt").write_bytes("Texte coupé".encode()[:-1])  # in the middle of a character
    Path("zero.bin").write_bytes(b"text\0text")
    Path("binaries/a.bin").write_bytes(bytes(range(256)))
    Path("elsewhere/text.txt").write_text("another text of the same name\n" * 99)
    Path("loop").symlink_to("loop")
    Path("strange/results.jsonl").write_text('{"nom": 1}\n')

    for name in ("odd", "outside", "no_val", "no_json", "list_json", "less"):
        shutil.copytree("data/text", f"data/{name}")
    good = Path("data/text/train.bin").read_bytes()
    Path("data/odd/train.bin").write_bytes(good[:-1])
    Path("data/less/train.bin").write_bytes(good[:-2])
    Path("data/outside/train.bin").write_bytes(good[:-2] + b"\xff\xff")
    Path("data/no_val/val.bin").unlink()
    Path("data/no_json/meta.json").write_text("{'tokens'")
    Path("data/list_json/meta.json").write_text("[1]")

    good, ckpt = Path("run/ckpt.pt").read_bytes(), torch.load("run/ckpt.pt", weights_only=True)
    for name in ("truncated", "flipped", "empty", "bomb", "list", "version", "config", "shapes",
                 "words", "optimizer", "no_log", "terabyte"):
        shutil.copytree("run", name)
    Path("truncated/ckpt.pt").write_bytes(good[:-5000])
    Path("flipped/ckpt.pt").write_bytes(good[:900] + bytes([good[900] ^ 64]) + good[901:])
    Path("empty/ckpt.pt").write_bytes(b"")
    Path("bomb/ckpt.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    Path("no_log/log.jsonl").write_text("")
    torch.save([1, 2], "list/ckpt.pt")
    torch.save({k: v for k, v in ckpt.items() if k != "model_config"}, "version/ckpt.pt")
    torch.save(ckpt | dict(config=dict(ckpt["config"], flavour=1)), "config/ckpt.pt")
    name = "layers.0.mlp.up_proj.weight"
    torch.save(ckpt | dict(model=ckpt["model"] | {name: torch.zeros(3, 3)}), "shapes/ckpt.pt")
    torch.save(ckpt | dict(model=ckpt["model"] | {name: "zeros"}), "words/ckpt.pt")
    torch.save(ckpt | dict(optimizers=[dict(state={}, param_groups=[])]), "optimizer/ckpt.pt")
    huge = ckpt["model_config"] | dict(n_embd=1 << 18, n_ffn=1 << 19)
    torch.save(ckpt | dict(model_config=huge), "terabyte/ckpt.pt")
    os.chdir(old)
    return folder


def refused(capfd, script, *flags):
    """Runs a script in this process, with exit status 2 and one line, which is returned."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [script, *flags])
        try:
            runpy.run_path(str(HERE / script), run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    error = capfd.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    return error


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")
            if p.name != "lock"}


@pytest.mark.parametrize("script, flags, word", BAD_INPUTS, ids=lambda value: value[:60])
def test_bad_input_ends_in_one_line_and_changes_nothing(bad_folder, monkeypatch, capfd, script,
                                                        flags, word):
    monkeypatch.chdir(bad_folder)
    flags = flags.split()
    if script in ("train.py", "bench.py") and "--resume" not in flags:  # small, if it matters
        usual = dict(dataset="text", size="2M", block_size=32, batch_size=2, max_steps=2)
        for name, value in usual.items():
            flags += [] if f"--{name}" in flags else [f"--{name}", str(value)]
        if script == "bench.py" and "--variants" not in flags:
            flags += ["--variants", "vanilla"]
    before = contents(bad_folder)
    error = refused(capfd, script, *flags)
    assert error.startswith(f"{script}: ") and word in error
    assert contents(bad_folder) == before


SMALL = ("--dataset=text", "--size=2M", "--block_size=32", "--batch_size=2", "--eval_tokens=64",
         "--device=cpu")


def test_too_large_a_batch_says_so_and_blocks_nothing(small_run, capfd):
    flags = ("--dataset", "text", "--size", "2M", "--block_size", "32", "--max_steps", "2")
    assert "out of memory" in refused(capfd, "train.py", *flags, "--batch_size", "100000000000")
    assert len(run(replace(small_run, attention="resformer", out_dir=None))) == 12


@contextmanager
def full_disk(n_bytes):
    """No file can grow over so many bytes: write fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(small_run, folder, capfd):
    run(replace(small_run, max_steps=4))
    before = Path("run/ckpt.pt").read_bytes()
    with full_disk(len(before) // 2):  # the checkpoint doesn't fit
        with pytest.raises(UserError, match="ckpt.pt can't be written, and is as it was"):
            run(replace(small_run, resume=True))
    assert Path("run/ckpt.pt").read_bytes() == before
    flags = ("--resume", "--out_dir=run", "--max_steps=12", "--eval_every=100")
    with full_disk(Path("run/log.jsonl").stat().st_size + 100):  # the log doesn't
        assert "File too large" in refused(capfd, "train.py", *flags)
    assert Path("run/ckpt.pt").read_bytes() == before and not list(folder.rglob("*.part"))
    assert [r["step"] for r in run(replace(small_run, resume=True))] == list(range(1, 13))

    data = {p: p.read_bytes() for p in Path("data/text").iterdir()}
    with full_disk(10_000):
        with pytest.raises(UserError, match="train.bin can't be written, .*too large"):
            prepare(DataConfig("text.txt"))
    assert {p: p.read_bytes() for p in Path("data/text").iterdir()} == data


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(small_run, capfd):
    Path("locked").mkdir(mode=0o500)
    assert "locked" in refused(capfd, "train.py", *SMALL, "--out_dir=locked/run")


def test_a_folder_has_one_owner_and_a_crashed_one_does_not_block_it(small_run):
    code = ("import sys, pathlib; sys.path.insert(0, sys.argv[1]); import train; "
            "lock = train.lock_folder(pathlib.Path('run')); print('mine', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code, str(HERE)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"mine\n"
        for config in (small_run, replace(small_run, resume=True)):
            with pytest.raises(UserError, match="in use .* --out_dir"):
                run(config)
        assert [p.name for p in Path("run").iterdir()] == ["lock"]
        owner.kill()
    run(small_run)
    with pytest.raises(UserError, match="--seed") as kept:  # its frames live on, as in a notebook
        run(replace(small_run, resume=True, seed=9))
    assert len(run(replace(small_run, resume=True, max_steps=13))) == 13 and kept


@pytest.mark.parametrize("stage, number", [
    ("data", signal.SIGINT), ("data", signal.SIGTERM), ("training", signal.SIGINT),
    ("evaluation", signal.SIGTERM)])
def test_a_signal_ends_a_script_in_one_line(small_run, folder, stage, number):
    """And what it leaves behind is whole: nothing, or a checkpoint."""
    if stage == "data":
        Path("big.txt").write_text("one line of a large text\n" * 4_000_000)
        flags, sign = ["prepare_data.py", "big.txt"], Path("data/big/train.bin.part")
    else:
        flags = ["train.py", *SMALL, "--max_steps=100000", "--out_dir=r"]
        sign = Path("r/log.jsonl")
        if stage == "evaluation":
            flags += ["--eval_every=1", "--eval_tokens=4000"]
    process = subprocess.Popen(
        [sys.executable, str(HERE / flags[0]), *flags[1:]], stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # a shell's background job would ignore SIGINT, and its child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (sign.exists() and sign.stat().st_size > 500):
        assert process.poll() is None
    process.send_signal(number)
    error = process.communicate()[1].decode().splitlines()
    assert process.returncode == 128 + number
    assert "Traceback" not in "".join(error)
    assert ("again" if stage == "data" else "--resume") in error[-1]
    assert not list(folder.rglob("*.part")) and not Path("data/big/train.bin").exists()
    if stage != "data":
        ckpt = torch.load("r/ckpt.pt", weights_only=True)
        assert ckpt["step"] == len(Path("r/log.jsonl").read_text().splitlines())


def test_a_second_signal_leaves_at_once(small_run):
    code = """if True:
        import sys, time
        sys.path.insert(0, sys.argv[1])
        import train
        with train.caught_signals() as signals:
            print("ready", flush=True)
            while not signals:
                time.sleep(0.01)
            print("first", flush=True)
            while True:
                time.sleep(0.01)"""
    with subprocess.Popen([sys.executable, "-c", code, str(HERE)],
                          stdout=subprocess.PIPE) as process:
        for word in (b"ready\n", b"first\n"):
            assert process.stdout.readline() == word
            process.send_signal(signal.SIGINT)
        assert process.wait() == 130


@pytest.mark.parametrize("answer, message", [
    ("silent", "timed out"), ("endless", "how long"), ("error", "404"), ("cut", "early"),
    ("nonsense", "run this again")])
def test_downloads_that_fail_say_so(folder, server, monkeypatch, answer, message):
    def do_GET(self):
        if answer == "silent":
            time.sleep(1)
        elif answer == "error":
            self.send_error(404)
        elif answer == "nonsense":
            self.wfile.write(b"SSH-2.0-server\r\n")
        else:
            self.send_response(200)
            if answer == "cut":
                self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 50)

    monkeypatch.setattr(server, "do_GET", do_GET)
    urlopen = prepare_data.urllib.request.urlopen
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen",
                        lambda request, timeout: urlopen(request, timeout=timeout / 100))
    with pytest.raises(UserError, match=message):
        prepare(DataConfig("shakespeare"))
    assert not Path("data/shakespeare/input.txt").exists()


def test_a_download_is_followed_elsewhere(folder, server, monkeypatch):
    text, do_GET = b"text behind a redirection\n" * 100, server.do_GET
    server.files["moved.txt"] = text

    def redirected(self):
        if self.path == "/moved.txt":
            return do_GET(self)
        self.send_response(302)
        self.send_header("Location", "/moved.txt")
        self.end_headers()

    monkeypatch.setattr(server, "do_GET", redirected)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    assert prepare(DataConfig("shakespeare")) == Path("data/shakespeare")


# ---- the same, at length: SLOW=1 python -m pytest -k slow ---------------------------------------


def train_to_be_killed(config, seed):
    """In a process of its own, with a disk that is slow at random: most kills hit a write."""
    rng, fsync, rename = np.random.default_rng(seed), os.fsync, os.replace
    os.fsync = lambda fd: (time.sleep(rng.uniform(0, 0.02)), fsync(fd))
    os.replace = lambda a, b: (time.sleep(rng.uniform(0, 0.02)), rename(a, b))
    torch.set_num_threads(1)
    train.train(config, show=False)


@slow
def test_slow_killed_anywhere_it_goes_on_to_the_same_bits(small_run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # the fork server imports this file once, for all
    config = replace(small_run, max_steps=100, eval_every=1, attention="svformer+gqa")
    run(config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_model"])
    config, kills, cut = replace(config, out_dir="killed", resume=True), 0, 0
    rng = np.random.default_rng(0)
    while True:
        process = context.Process(target=train_to_be_killed, args=(config, kills))
        part = Path("killed/ckpt.pt.part")
        part.unlink(missing_ok=True)
        process.start()
        while kills % 2 and process.is_alive() and not part.exists():  # wait for a write
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.03) if kills % 2 else rng.uniform(0.1, 0.6))
        if kills == 42:
            process.join()
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
        cut += part.exists()
    print(f"{kills} kills, {cut} of them in the middle of a checkpoint's write")
    assert kills >= 40 and cut >= 5
    assert same_weights("run/ckpt.pt", "killed/ckpt.pt")
    logs = [[json.loads(line) for line in Path(f"{out}/log.jsonl").read_text().splitlines()]
            for out in ("run", "killed")]
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["loss"], a["val_loss"]) == (b["step"], b["loss"], b["val_loss"])


def torchrun(n, *flags):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             f"--nproc_per_node={n}", str(HERE / "train.py"), *flags],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@slow
def test_slow_three_processes_then_two_are_one(small_run):
    config = replace(small_run, batch_size=6, eval_tokens=64, eval_every=10)
    flags = [*SMALL, "--batch_size=6", "--warmup_steps=2", "--eval_every=10", "--out_dir=many"]
    for n, steps in ((3, 30), (2, 60)):
        assert torchrun(n, *flags, f"--max_steps={steps}", "--resume").wait() == 0
        expected = run(replace(config, max_steps=steps, out_dir="one", resume=True))
        lines = Path("many/log.jsonl").read_text().splitlines()
        for line, record in zip(lines, expected, strict=True):
            assert json.loads(line)["loss"] == pytest.approx(record["loss"], abs=1e-5)


@slow
def test_slow_a_dead_rank_ends_the_others(small_run):
    process = torchrun(3, *SMALL, "--batch_size=6", "--max_steps=1000000", "--out_dir=many")
    while not (Path("many/log.jsonl").exists() and Path("many/ckpt.pt").exists()):
        assert process.poll() is None
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = [int(pid) for pid in ranks.stdout.split()]
    os.kill(ranks[-1], signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    step = torch.load("many/ckpt.pt", weights_only=True)["step"]
    history = run(TrainConfig(**torch.load("many/ckpt.pt", weights_only=True)["config"]
                              | dict(resume=True, max_steps=step + 1)))
    assert [record["step"] for record in history] == list(range(1, step + 2))


def memory():
    """Megabytes that this process holds, and its open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))


@slow
def test_slow_a_hundred_runs_in_one_process_take_no_more_than_twenty(small_bench):
    seeds = list(map(str, range(1, 51)))
    flags = ("--variants", "vanilla", "svformer", "--parts", "loss", "--max_steps", "2", "--seeds")
    small_bench(*flags, *seeds[:10])
    megabytes, files = memory()
    small_bench(*flags, *seeds)
    after, files_after = memory()
    assert len(bench_records("loss")) == 100
    print(f"20 runs: {megabytes:.0f} MB, {files} files; 100 runs: {after:.0f} MB, {files_after}")
    assert after < megabytes + 30 and files_after <= files


@slow
def test_slow_a_long_text_takes_no_more_memory(capsys):
    model, before = tiny_model("svformer", torch.float32, block_size=256, n_layer=2), None
    for i, token in enumerate(model.generate(tokens(1, 8), 20_000, seed=1)):
        if i == 1000:
            before = memory()[0]
    assert i == 19_999 and memory()[0] < before + 10
