"""ResFormer, SVFormer and the six systems that their paper sets them against, in one file.
"Value Residual Learning For Alleviating Attention Concentration In Transformers", arXiv 2410.17897

What is special about this model:
- The block is Llama's: RMSNorm before each half, rotary positions, SwiGLU, no biases, no dropout,
  untied embeddings. Parameters carry the names of Hugging Face's Llama.
- One class, `Attention`, holds all variants but DenseFormer, which is in GPT.hidden_states. A layer
  is handed the keys and values of the layer below and those of layer 1; owns_k and owns_v say which
  layers have their own.
- The KV cache allocates the tensors that the variant needs and no others.
- The loss makes the logits an eighth of the tokens at a time, so that they never fill the memory.

Layers are counted from 1, as in the paper. In shapes, B is the batch, T the new tokens, S the
cached and the new ones, C the width (n_embd), nh the query heads, nkv the key/value
heads, hs the head size, V the vocabulary, L the number of layers.
"""

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# -------------------------------------------------------------------------------------------------
# Configuration

VARIANTS = ("vanilla", "crosslayer", "resformer", "svformer", "neutreno", "denseformer", "gqa",
            "cla")

# What a variant cannot be joined with, and why.
CLASHES = {
    "vanilla": (VARIANTS, "vanilla means that nothing changes"),
    "svformer": (("resformer", "neutreno"), "svformer has no V_n to mix with V_1"),
    "crosslayer": (("resformer", "svformer", "neutreno"), "crosslayer attends to V_1 itself"),
}

# Fields of GPTConfig that one variant uses. The others refuse any value but the default.
USED_BY = {"n_kv_head": "gqa", "value_residual": "resformer", "value_lambda": "resformer",
           "residual_layers": "resformer", "neutreno_lambda": "neutreno"}


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. A mistake is a ValueError that begins with the field's name."""
    vocab_size: int = 257
    block_size: int = 128  # the longest context, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_kv_head: int | None = None  # gqa: key/value heads; None: half of n_head
    n_embd: int = 64
    n_ffn: int | None = None  # hidden size of the SwiGLU; None: 3.5 x n_embd
    attention: str = "resformer"  # one of VARIANTS, or several joined with "+"
    value_residual: str = "fixed"  # resformer: fixed, learnable or plus, see GPT.value_lambdas
    value_lambda: tuple = (0.5, 0.5)  # resformer: the weights of V_1 and V_n
    residual_layers: tuple | None = None  # resformer: layers that mix V_1 in; None: 2 .. n_layer
    neutreno_lambda: float | None = None  # None: 0.4, or 0.2 on top of resformer
    init: str = "scaled"  # scaled or paper, see GPT.init_weights

    def __post_init__(self):
        said = f"attention '{self.attention}'"
        for name in self.variants:
            require(name in VARIANTS, f"{said}: choose from {', '.join(VARIANTS)}, or join some "
                                      "of them with '+'")
            others, why = CLASHES.get(name, ((), ""))
            require(not (set(others) - {name}) & set(self.variants), f"{said}: {why}")
        for name, variant in USED_BY.items():
            require(variant in self.variants or getattr(self, name) == getattr(GPTConfig, name),
                    f"{name} is for {variant}, not for {self.attention}")
        require(self.n_embd % (2 * self.n_head) == 0,
                f"n_embd ({self.n_embd}) must be n_head ({self.n_head}) x an even head size")
        require(self.n_head % self.kv_heads == 0,
                f"n_kv_head ({self.kv_heads}, by default half of n_head) must divide n_head "
                f"({self.n_head})")
        require(self.value_residual in ("fixed", "learnable", "plus"),
                f"value_residual must be fixed, learnable or plus, not {self.value_residual!r}")
        require(isinstance(self.value_lambda, (tuple, list)) and len(self.value_lambda) == 2,
                f"value_lambda must be two numbers, not {self.value_lambda}")
        require(self.init in ("scaled", "paper"), f"init must be scaled or paper, not {self.init}")
        for n in self.residual_layers or ():
            require(1 < n <= self.n_layer and owns_v(self, n),
                    f"residual_layers: there is no layer {n} that has values of its own to mix "
                    "with layer 1's")

    @property
    def variants(self) -> list[str]:
        return self.attention.split("+")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        if "gqa" not in self.variants:
            return self.n_head
        return self.n_kv_head or max(1, self.n_head // 2)

    @property
    def ffn_size(self) -> int:
        return self.n_ffn or self.n_embd * 7 // 2


def owns_k(config: GPTConfig, n: int) -> bool:
    """Does layer n compute and cache keys of its own?"""
    # CLA, arXiv 2405.12981: every second layer reuses K and V of the layer below it.
    return "cla" not in config.variants or n % 2 == 1


def owns_v(config: GPTConfig, n: int) -> bool:
    """Does layer n compute and cache values of its own?"""
    # SVFormer, arXiv 2410.17897: U_n = A_n V_1. Only the first layer has values.
    return owns_k(config, n) and ("svformer" not in config.variants or n == 1)


# -------------------------------------------------------------------------------------------------
# The block


class Attention(nn.Module):
    """Causal self-attention of layer n, for every variant.

    A_n = softmax(Q_n K_n^T / sqrt(hs)) under the causal mask. U_n is what the heads hand to o_proj.
    """

    def __init__(self, config: GPTConfig, n: int):
        super().__init__()
        self.config = config
        self.n = n
        C, kv_width = config.n_embd, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(C, C, bias=False)
        if owns_k(config, n):
            self.k_proj = nn.Linear(C, kv_width, bias=False)
        if owns_v(config, n):
            self.v_proj = nn.Linear(C, kv_width, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, heads, T, hs)

    def forward(self, x, rope, mask, below, first, lambdas, cache):
        """x (B, T, C) -> what attention adds to it, (B, T, C), and the K and V that it attended to.

        rope: cos and sin, (T, hs / 2). mask: (T, S), True where a query sees a key, or None, see
        below. below, first: the K and V, each (B, nkv, S, hs), that the layer below and layer 1
        attended to. lambdas: this layer's weights of V_1 and V_n, or None. cache: a KVCache to
        append to, or None.
        """
        c, n, T = self.config, self.n, x.size(1)
        k, v = below
        k1, v1 = first
        q = rotate(self.split_heads(self.q_proj(x)), *rope)  # (B, nh, T, hs)
        if owns_k(c, n):
            k = rotate(self.split_heads(self.k_proj(x)), *rope)  # (B, nkv, T, hs)
            if cache is not None:
                k = cache.append(cache.k[n], k)  # (B, nkv, S, hs)
        if owns_v(c, n):
            v = self.split_heads(self.v_proj(x))  # (B, nkv, T, hs)
            if lambdas is not None:
                # ResFormer, arXiv 2410.17897, eq. 4: U_n = A_n (l1 V_1 + l2 V_n). The sum is what
                # is cached, so that decoding needs V_1 of the newest tokens only.
                l1, l2 = lambdas
                v = l1 * v1[:, :, -T:] + l2 * v
            if cache is not None:
                v = cache.append(cache.v[n], v)  # (B, nkv, S, hs)

        keys, values = k, v
        if "crosslayer" in c.variants and n > 1:
            # arXiv 2410.17897, eq. 2: U_n = softmax(Q_n [K_1; K_n]^T / sqrt(hs)) [V_1; V_n]
            keys = torch.cat((k1, k), dim=2)  # (B, nkv, 2 S, hs)
            values = torch.cat((v1, v), dim=2)
            mask = torch.cat((mask, mask), dim=1)  # (T, 2 S)
        # GQA, arXiv 2305.13245: query head i reads key/value head i // groups. One query reads them
        # in place. For more, K and V are repeated: not every GPU has a memory-saving kernel for
        # grouped heads.
        groups = c.n_head // c.kv_heads
        if groups > 1 and T > 1:
            keys = keys.repeat_interleave(groups, dim=1)  # (B, nh, S, hs)
            values = values.repeat_interleave(groups, dim=1)
        # No mask is needed for one query, which sees all S keys, or with an empty cache, where
        # is_causal is right. is_causal aligns to the first key, so several new tokens after cached
        # ones need a mask.
        u = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=T > 1 and mask is None,
            enable_gqa=groups > 1 and T == 1)  # (B, nh, T, hs)
        if "neutreno" in c.variants and n > 1:
            # NeuTRENO, arXiv 2312.00751: U_n = A_n V_n + l (V_1 - V_n)
            usual = 0.2 if "resformer" in c.variants else 0.4
            l = usual if c.neutreno_lambda is None else c.neutreno_lambda
            u = u + l * (v1 - v)[:, :, -T:].repeat_interleave(groups, dim=1)  # (B, nh, T, hs)
        return self.o_proj(u.transpose(1, 2).flatten(2)), (k, v)


def rotary_table(start: int, T: int, head_dim: int, like: torch.Tensor):
    """cos and sin, each (T, hs / 2), of the angles by which positions start .. start + T - 1 turn
    their queries and keys: position x 10000^(-2j / hs) for pair j. RoFormer, arXiv 2104.09864."""
    # In float32 at least: bfloat16 cannot tell position 257 from 256.
    dtype = torch.promote_types(like.dtype, torch.float32)
    position = torch.arange(start, start + T, dtype=dtype, device=like.device)  # (T,)
    j = torch.arange(head_dim // 2, dtype=dtype, device=like.device)  # (hs / 2,)
    angle = torch.outer(position, 10000.0 ** (-2 * j / head_dim))  # (T, hs / 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (a, b) of x (B, nh, T, hs); as in Llama, a is in the first half of hs and b
    in the second."""
    a, b = x.chunk(2, dim=-1)  # (B, nh, T, hs / 2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C). Shazeer, arXiv 2002.05202."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then SwiGLU, each behind a norm and added to x."""

    def __init__(self, config: GPTConfig, n: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.self_attn = Attention(config, n)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = SwiGLU(config)

    def forward(self, x, *context):
        """x (B, T, C) -> x (B, T, C), (K, V). The context is what Attention.forward reads."""
        u, kv = self.self_attn(self.input_layernorm(x), *context)
        x = x + u
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, kv


class KVCache:
    """Keys and values of the tokens read so far. k and v hold, for each layer n that owns them, a
    tensor (batch_size, nkv, max_len, hs) of the model's dtype."""

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device=None, dtype=None):
        shape = (batch_size, config.kv_heads, max_len, config.head_dim)
        like = dict(device=device, dtype=dtype)
        layers = range(1, config.n_layer + 1)
        self.k = {n: torch.empty(shape, **like) for n in layers if owns_k(config, n)}
        self.v = {n: torch.empty(shape, **like) for n in layers if owns_v(config, n)}
        self.nbytes = sum(t.nbytes for t in (*self.k.values(), *self.v.values()))
        self.batch_size = batch_size
        self.max_len = max_len
        self.length = 0  # tokens read so far; hidden_states advances it, 0 empties the cache

    def append(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Writes new (B, nkv, T, hs) behind what store holds; returns a view of all S tokens."""
        end = self.length + new.size(2)
        store[:, :, self.length:end] = new
        return store[:, :, :end]


# -------------------------------------------------------------------------------------------------
# The loss


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the tokens' cross-entropies, in nats, from x (N, C), weight (V, C), targets (N,).
    Full logits (N, V) would take most of a step's memory. Their gradient is softmax minus one-hot,
    so forward computes it at once, N / 8 tokens at a time, and backward only scales it."""

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        total, grad_x, grad_weight = 0.0, [], torch.zeros_like(weight)
        n = math.ceil(len(x) / 8)
        for part, target in zip(x.split(n), targets.split(n)):
            logits = F.linear(part, weight)  # (N / 8, V), in 16 bits under autocast
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
            total = total + F.nll_loss(log_p, target, reduction="sum")  # leaves out -100
            if with_gradients:
                counts = (target != -100).to(log_p.dtype)[:, None]  # (N / 8, 1)
                grad = log_p.exp_().mul_(counts)  # softmax, then minus one-hot
                grad = grad.scatter_add_(1, target.clamp(min=0)[:, None], -counts).to(weight.dtype)
                grad_x.append(torch.mm(grad, weight))
                grad_weight += torch.mm(grad.T, part)
        if with_gradients:
            ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        # The gradients are numbers by now. once_differentiable would let create_graph=True pass.
        require(not torch.is_grad_enabled(), "the loss has no second derivatives")
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_total, grad_weight * grad_total, None, None


# -------------------------------------------------------------------------------------------------
# The model


class GPT(nn.Module):
    """The language model. `model(idx)` gives (logits, None), `model(idx, targets)` (None, loss)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        seed = torch.randint(2**31, ()).item()  # follows torch.manual_seed
        layers = range(1, config.n_layer + 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, n) for n in layers)
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if "denseformer" in config.variants:
            # At first only the output of block n counts: 0 .. 0 1.
            self.depth_weights = nn.ParameterList(torch.eye(n + 1)[n].clone() for n in layers)
        self.mixing = []  # ResFormer: the layers that mix V_1 into their own values
        if "resformer" in config.variants:
            own = [n for n in layers if n > 1 and owns_v(config, n)]
            self.mixing = sorted(set(config.residual_layers or own))
        if self.mixing and config.value_residual != "fixed":
            l1, l2 = config.value_lambda
            self.value_l1 = nn.Parameter(torch.full((len(self.mixing),), float(l1)))
            self.value_l2 = nn.Parameter(torch.full((len(self.mixing),), float(l2)))
            if config.value_residual == "plus":
                self.value_total = nn.Parameter(torch.full((1,), float(len(self.mixing))))
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Matrices from a normal distribution around 0. scaled: with a variance of 1 / fan_in, for
        o_proj and down_proj 1 / (2 L fan_in), for the embeddings 1. paper: with a standard
        deviation of 0.02, as the authors' code has it for widths of 512 and more. Each comes from
        a stream named after it, so that two variants of one seed share what they both have."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                continue  # norms and the weights of residuals start as they were made
            std = p.size(1) ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            if name == "embed_tokens.weight":
                std = 1.0
            if self.config.init == "paper":
                std = 0.02
            stream = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            p.copy_(std * torch.randn(p.shape, generator=stream))

    def value_lambdas(self) -> dict:
        """ResFormer's {n: (l1, l2)}, the weights of V_1 and V_n in each layer n that mixes them.

        fixed: value_lambda. learnable: scalars that start there. plus, from the paper's later
        versions: l1_n is value_total, at first 1 a layer, shared out by a softmax over value_l1;
        only l2_n starts as value_lambda says.
        """
        if self.config.value_residual == "fixed" or not self.mixing:
            return dict.fromkeys(self.mixing, self.config.value_lambda)
        l1 = self.value_l1
        if self.config.value_residual == "plus":
            l1 = self.value_total * l1.softmax(dim=0)
        return {n: (l1[i], self.value_l2[i]) for i, n in enumerate(self.mixing)}

    def hidden_states(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx (B, T) -> what lm_head reads, (B, T, C). Appends T tokens to the cache, if given."""
        T = idx.size(1)
        past = 0 if cache is None else cache.length
        limit = self.config.block_size if cache is None else cache.max_len
        require(past + T <= limit, f"{past + T} tokens: block_size or max_len allows {limit}")
        require(cache is None or len(idx) == cache.batch_size, "idx and cache differ in batch size")
        x = self.embed_tokens(idx)  # (B, T, C)
        rope = rotary_table(past, T, self.config.head_dim, like=x)
        mask = None
        if (past > 0 and T > 1) or "crosslayer" in self.config.variants:
            # Token t of this piece sees the tokens 0 .. past + t.
            mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)
        lambdas = self.value_lambdas()
        kv = first = (None, None)
        outputs = [x]
        for n, block in enumerate(self.layers, start=1):
            x, kv = block(x, rope, mask, kv, first, lambdas.get(n), cache)
            if n == 1:
                first = kv
            if "denseformer" in self.config.variants:
                # DenseFormer, arXiv 2402.02622: block n + 1 reads Y_n = sum over i = 0 .. n of
                # a_{n,i} X_i, where X_0 is the embedding and X_i what block i gives.
                outputs.append(x)
                x = sum(a * X for a, X in zip(self.depth_weights[n - 1], outputs))
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> (logits (B, T, V), None); with targets (B, T), (None, the mean
        cross-entropy in nats per token), where targets of -100 do not count; NaN if none counts.

        A cache is for use under torch.no_grad. The loss reads lm_head.weight and calls no hooks of
        lm_head. ValueError if there are too many tokens, if targets have another shape than idx,
        or for a loss if lm_head is no plain Linear without bias.
        """
        x = self.hidden_states(idx, cache)
        if targets is None:
            return self.lm_head(x), None
        require(targets.shape == idx.shape, f"targets {tuple(targets.shape)} must have the shape "
                                            f"of idx, {tuple(idx.shape)}")
        require(type(self.lm_head) is nn.Linear and self.lm_head.bias is None,
                "lm_head must be a Linear without bias: the loss reads its weight alone")
        total = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                         torch.is_grad_enabled())
        return None, total / (targets != -100).sum()

    @torch.no_grad()  # not inference_mode, whose tensors cannot be trained on
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, use_cache=True):
        """Continues idx (B, T) int64; yields the next tokens (B,) as soon as they are drawn.

        temperature and top_k: see `draw`; ValueError, at the first token, if they are out of range
        or idx is empty. A seed fixes the text. use_cache=False: the same text, slowly. When the
        window of block_size tokens is full, its last half is read again from position 0; a longer
        prompt is cut likewise."""
        require(idx.size(1) > 0, "idx must hold at least one token")
        require(temperature >= 0, f"temperature must be 0 or more, not {temperature}")
        require(top_k is None or top_k > 0, f"top_k must be at least 1, not {top_k}")
        full = self.config.block_size
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        cache = KVCache(self.config, len(idx), min(full, idx.size(1) + max_new_tokens),
                        idx.device, self.norm.weight.dtype)
        window = idx
        for _ in range(max_new_tokens):
            if window.size(1) > full:
                window = window[:, -((full + 1) // 2):]
                cache.length = 0
            if not use_cache:
                cache.length = 0
            with sdpa_kernel(DECODING):
                x = self.hidden_states(window[:, cache.length:], cache)  # (B, T, C)
            token = draw(self.lm_head(x[:, -1]), temperature, top_k, generator)  # (B,)
            window = torch.cat((window, token[:, None]), dim=1)
            yield token

    def num_params(self) -> int:
        """The number of parameters, the 2 V C of embed_tokens and lm_head among them."""
        return sum(p.numel() for p in self.parameters())

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of KV cache per token: nkv x hs numbers for each K and V that a layer owns."""
        return KVCache(self.config, 1, 1, "meta", dtype).nbytes  # meta: tensors without storage


# Attention while text is generated: any of torch's kernels but cuDNN's, which makes a new plan for
# each new length.
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def draw(logits, temperature=1.0, top_k=None, generator=None) -> torch.Tensor:
    """logits (B, V) -> one token a row, (B,): the likeliest at temperature 0, else a random draw
    from softmax(logits / temperature), if top_k is given among the top_k likeliest."""
    if temperature == 0:
        return logits.argmax(dim=1)
    k = logits.size(1) if top_k is None else min(top_k, logits.size(1))
    logits, ids = logits.float().topk(k, dim=1)  # (B, k) each, the largest first
    p = ((logits - logits[:, :1]) / temperature).softmax(dim=1)
    drawn = torch.multinomial(p, 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]
