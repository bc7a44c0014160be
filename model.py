"""ResFormer, SVFormer and the six systems that their paper sets them against, in one file.
"Value Residual Learning For Alleviating Attention Concentration In Transformers", arXiv 2410.17897

What is special about this model:
- The block is Llama's: RMSNorm before each half, rotary positions, SwiGLU, no biases, no dropout,
  untied embeddings. Parameters carry the names of Hugging Face's Llama.
- One class, `Attention`, holds all the variants. A layer is handed the keys and values of the layer
  below and those of layer 1. It uses them, or computes its own, as its variant says.
- The KV cache allocates the tensors that the variant needs and no others.
- The loss never holds all logits, whatever the size of the vocabulary.

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

# Fields of GPTConfig that one variant uses. The others refuse any value but the default.
USED_BY = {"n_kv_head": "gqa", "value_residual": "resformer", "value_lambda": "resformer",
           "residual_layers": "resformer", "neutreno_lambda": "neutreno"}


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


@dataclass
class GPTConfig:
    """The shape of a model. A mistake is a ValueError that begins with the field's name."""
    vocab_size: int = 257
    block_size: int = 128  # the longest context, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_kv_head: int | None = None  # key/value heads; None: n_head, or half of it with gqa
    n_embd: int = 64
    n_ffn: int | None = None  # hidden size of the SwiGLU; None: 3.5 x n_embd
    attention: str = "resformer"  # one of VARIANTS, or several joined with "+"
    value_residual: str = "fixed"  # resformer: fixed, learnable or plus, see GPT.value_lambdas
    value_lambda: tuple = (0.5, 0.5)  # resformer: the weights of V_1 and V_n
    residual_layers: tuple | None = None  # resformer: layers that mix V_1 in; None: 2 .. n_layer
    neutreno_lambda: float | None = None  # None: 0.4, or 0.2 on top of resformer

    def __post_init__(self):
        self.check_attention()
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd",
                     "n_ffn"):
            value = getattr(self, name)
            if value is None and name in ("n_kv_head", "n_ffn"):
                continue  # filled in below
            require(type(value) is int and value > 0,
                    f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_kv_head is None:
            self.n_kv_head = max(1, self.n_head // 2) if "gqa" in self.variants else self.n_head
        if self.n_ffn is None:
            self.n_ffn = self.n_embd * 7 // 2
        require(self.n_embd % (2 * self.n_head) == 0,
                f"n_embd ({self.n_embd}) must be n_head ({self.n_head}) x an even head size")
        require(self.n_head % self.n_kv_head == 0,
                f"n_kv_head ({self.n_kv_head}, by default half of n_head) must divide n_head "
                f"({self.n_head})")
        self.head_dim = self.n_embd // self.n_head
        self.check_residuals()

    def check_attention(self):
        names = str(self.attention).split("+")
        self.variants = set(names)
        said = f"attention '{self.attention}'"
        require(self.variants <= set(VARIANTS),
                f"{said}: choose from {', '.join(VARIANTS)}, or join some of them with '+'")
        require(len(self.variants) == len(names), f"{said} has a name twice")
        require(names == ["vanilla"] or "vanilla" not in names,
                f"{said}: vanilla means that nothing changes; leave it out")
        require("svformer" not in names or not {"resformer", "neutreno"} & self.variants,
                f"{said}: svformer has no V_n that resformer or neutreno could mix with V_1")
        require("crosslayer" not in names or
                not {"resformer", "svformer", "neutreno"} & self.variants,
                f"{said}: crosslayer attends to V_1 itself; nothing is left to mix in")

    def check_residuals(self):
        self.value_lambda = tuple(self.value_lambda)
        for name, variant in USED_BY.items():
            # n_kv_head has been filled in by now, the others are as they were given.
            unused = self.n_head if name == "n_kv_head" else getattr(GPTConfig, name)
            require(variant in self.variants or getattr(self, name) == unused,
                    f"{name} is for {variant}, not for {self.attention}")
        require(self.value_residual in ("fixed", "learnable", "plus"),
                f"value_residual must be fixed, learnable or plus, not {self.value_residual!r}")
        require(len(self.value_lambda) == 2 and all(map(math.isfinite, self.value_lambda)),
                f"value_lambda must be two finite numbers, not {self.value_lambda}")
        require(self.value_residual != "plus" or self.value_lambda == (0.5, 0.5),
                "value_lambda is for fixed and learnable residuals; plus has a start of its own")
        require(self.residual_layers is None or len(self.residual_layers) > 0,
                "residual_layers must name at least one layer")
        for n in self.residual_layers or ():
            require(n in range(1, self.n_layer + 1),
                    f"residual_layers: there is no layer {n}, n_layer is {self.n_layer}")
            require(n > 1 and owns_v(self, n),
                    f"residual_layers: layer {n} has no values of its own to mix with layer 1's")
        if self.neutreno_lambda is None and "neutreno" in self.variants:
            self.neutreno_lambda = 0.2 if "resformer" in self.variants else 0.4
        require(self.neutreno_lambda is None or math.isfinite(self.neutreno_lambda),
                f"neutreno_lambda must be a finite number, not {self.neutreno_lambda}")


def owns_k(config: GPTConfig, n: int) -> bool:
    """Does layer n compute and cache keys of its own?"""
    # CLA, arXiv 2405.12981: every second layer reuses K and V of the layer below it.
    return "cla" not in config.variants or n % 2 == 1


def owns_v(config: GPTConfig, n: int) -> bool:
    """Does layer n compute and cache values of its own?"""
    # SVFormer, arXiv 2410.17897: U_n = A_n V_1. Only the first layer has values.
    return owns_k(config, n) and ("svformer" not in config.variants or n == 1)


def mixes_v(config: GPTConfig, n: int) -> bool:
    """Does layer n mix V_1 into its own values? ResFormer, arXiv 2410.17897."""
    chosen = config.residual_layers is None or n in config.residual_layers
    return "resformer" in config.variants and n > 1 and owns_v(config, n) and chosen


# -------------------------------------------------------------------------------------------------
# The block


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


class Attention(nn.Module):
    """Causal self-attention of layer n, for every variant.

    A_n = softmax(Q_n K_n^T / sqrt(hs)) under the causal mask. U_n is what the heads hand to o_proj.
    Only DenseFormer is elsewhere: it mixes the outputs of blocks, see GPT.hidden_states.
    """

    def __init__(self, config: GPTConfig, n: int):
        super().__init__()
        self.config = config
        self.n = n
        C, kv_width = config.n_embd, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(C, C, bias=False)
        if owns_k(config, n):
            self.k_proj = nn.Linear(C, kv_width, bias=False)
        if owns_v(config, n):
            self.v_proj = nn.Linear(C, kv_width, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, heads, T, hs)

    def forward(self, x, rope, mask, k, v, k1, v1, lambdas, cache):
        """x (B, T, C) -> what attention adds to it, (B, T, C), and the K and V that it attended to.

        rope: cos and sin, (T, hs / 2). mask: (T, S), True where a query sees a key, or None where
        the plain causal mask will do. k, v: what the layer below attended to, (B, nkv, S, hs).
        k1, v1: what layer 1 attended to. lambdas: this layer's weights of V_1 and V_n, or None.
        cache: a KVCache to append to, or None.
        """
        c, n, T = self.config, self.n, x.size(1)
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
        # GQA, arXiv 2305.13245: query head i reads key/value head i // groups.
        groups = c.n_head // c.n_kv_head
        u = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None and T > 1,
            enable_gqa=groups > 1)  # (B, nh, T, hs)
        if "neutreno" in c.variants and n > 1:
            # NeuTRENO, arXiv 2312.00751: U_n = A_n V_n + l (V_1 - V_n)
            gap = (v1 - v)[:, :, -T:].repeat_interleave(groups, dim=1)  # (B, nh, T, hs)
            u = u + c.neutreno_lambda * gap
        return self.o_proj(u.transpose(1, 2).flatten(2)), k, v


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C). Shazeer, arXiv 2002.05202."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)

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

    def forward(self, x, rope, mask, k, v, k1, v1, lambdas, cache):
        """x (B, T, C) -> x (B, T, C), K, V. The arguments are those of Attention.forward."""
        u, k, v = self.self_attn(self.input_layernorm(x), rope, mask, k, v, k1, v1, lambdas, cache)
        x = x + u
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, k, v


class KVCache:
    """Keys and values of the tokens read so far. k and v hold, for each layer n that owns them, a
    tensor (batch_size, nkv, max_len, hs) of the model's dtype."""

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device=None, dtype=None):
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k, self.v = {}, {}
        for n in range(1, config.n_layer + 1):
            if owns_k(config, n):
                self.k[n] = torch.empty(shape, device=device, dtype=dtype)
            if owns_v(config, n):
                self.v[n] = torch.empty(shape, device=device, dtype=dtype)
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
# The loss and the choice of a token


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the tokens' cross-entropies, in nats, from x (N, C), weight (V, C), targets (N,).

    All logits at once, (N, V), would be most of a training step's memory. But the gradient of a
    cross-entropy with respect to its logits, softmax minus one-hot, is known in the forward pass.
    So an eighth of the logits is made, turned into its share of the gradients, and forgotten.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        total = 0.0
        grad_x, grad_weight = [], torch.zeros_like(weight) if with_gradients else None
        chunk = math.ceil(len(x) / 8)
        for x_part, target in zip(x.split(chunk), targets.split(chunk)):
            logits = F.linear(x_part, weight)  # (N / 8, V)
            # Softmax in float32 at least, also where autocast made the logits in 16 bits.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_p = logits.log_softmax(dim=-1)
            total = total + F.nll_loss(log_p, target, reduction="sum")  # leaves out -100
            if with_gradients:
                grad = log_p.exp_()  # softmax
                grad[torch.arange(len(grad)), target.clamp(min=0)] -= 1.0  # minus one-hot
                grad.masked_fill_((target == -100)[:, None], 0.0)
                grad = grad.to(weight.dtype)
                grad_x.append(torch.mm(grad, weight))
                grad_weight += torch.mm(grad.T, x_part)
        if with_gradients:
            ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_total, grad_weight * grad_total, None, None


# Attention while text is generated: any of torch's kernels but cuDNN's, which plans each new length
# afresh, 0.4 s a time.
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def draw(logits, temperature=1.0, top_k=None, generator=None) -> torch.Tensor:
    """logits (B, V) -> one token a row, (B,): the likeliest at temperature 0, else a random draw
    from softmax(logits / temperature), if top_k is given among the top_k likeliest."""
    if temperature == 0:
        return logits.argmax(dim=1)
    ids = None
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(1)), dim=1)  # (B, top_k) each
    # The largest becomes 0, so that the smallest temperature overflows nothing.
    logits = (logits.float() - logits.max(dim=1, keepdim=True).values) / max(temperature, 1e-30)
    drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)  # (B, 1)
    return drawn[:, 0] if ids is None else ids.gather(1, drawn)[:, 0]


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
            self.depth_weights = nn.ParameterList()
            for n in layers:
                a = torch.zeros(n + 1)
                a[n] = 1.0  # at first only the output of block n counts
                self.depth_weights.append(a)
        self.mixing = [n for n in layers if mixes_v(config, n)]
        if self.mixing and config.value_residual != "fixed":
            l1, l2 = config.value_lambda
            self.value_l1 = nn.Parameter(torch.full((len(self.mixing),), l1))
            self.value_l2 = nn.Parameter(torch.full((len(self.mixing),), l2))
            if config.value_residual == "plus":
                self.value_total = nn.Parameter(torch.full((1,), float(len(self.mixing))))
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Every matrix from N(0, 0.02), as the authors' code has it. Each comes from a stream named
        after it, so that two variants of one seed share what they both have."""
        # GPT-2's 0.02 / sqrt(2 L) for o_proj and down_proj is no better here: the loss with 0.02
        # less the loss with that, default run, three paired seeds, mean and 95% interval:
        # resformer -0.017 +- 0.030, vanilla +0.006 +- 0.066 nats per token.
        for name, p in self.named_parameters():
            if p.dim() > 1:
                stream = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                p.copy_(0.02 * torch.randn(p.shape, generator=stream))

    def value_lambdas(self) -> dict:
        """ResFormer's {n: (l1, l2)}, the weights of V_1 and V_n in each layer n that mixes them.

        fixed: value_lambda. learnable: scalars that start there. plus, from the paper's later
        versions: l1_n is value_total, at first 1 a layer, shared out by a softmax over value_l1.
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
        if cache is None:
            require(T <= self.config.block_size, f"idx has {T} tokens, more than block_size")
        else:
            require(past + T <= cache.max_len, f"idx and cache: {past} + {T} exceed max_len")
            require(len(idx) == cache.batch_size, f"cache is for {cache.batch_size} sequences")
        x = self.embed_tokens(idx)  # (B, T, C)
        rope = rotary_table(past, T, self.config.head_dim, like=x)
        mask = None
        if (past > 0 and T > 1) or "crosslayer" in self.config.variants:
            # Token t of this piece sees the tokens 0 .. past + t.
            mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)
        lambdas = self.value_lambdas()
        k = v = k1 = v1 = None
        outputs = [x]
        for n, block in enumerate(self.layers, start=1):
            x, k, v = block(x, rope, mask, k, v, k1, v1, lambdas.get(n), cache)
            if n == 1:
                k1, v1 = k, v
            if "denseformer" in self.config.variants:
                # DenseFormer, arXiv 2402.02622: X_n = sum over i = 0 .. n of a_{n,i} X_i
                outputs.append(x)
                x = sum(a * X for a, X in zip(self.depth_weights[n - 1], outputs))
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> (logits (B, T, V), None); with targets (B, T), (None, the mean
        cross-entropy in nats per token), where targets of -100 do not count. ValueError if the
        tokens exceed block_size or, with a cache, its max_len."""
        x = self.hidden_states(idx, cache)
        if targets is None:
            return self.lm_head(x), None
        total = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                         torch.is_grad_enabled())
        return None, total / (targets != -100).sum()

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, use_cache=True,
                 cache=None):
        """Continues idx (B, T) int64; yields the next tokens (B,) as soon as they are drawn.

        temperature and top_k: see `draw`. A seed fixes the text. cache: a KVCache to use, emptied
        first; without one, one is made, unless use_cache is False: the same text, slowly. When the
        window of block_size tokens is full, its last half is read again from position 0, and a
        longer prompt is cut likewise. A bad argument is a ValueError that begins with its name.
        """
        V, full = self.config.vocab_size, self.config.block_size
        require(idx.dim() == 2 and idx.numel() > 0, f"idx has shape {tuple(idx.shape)}, not (B, T)")
        require(0 <= idx.min() and idx.max() < V, f"idx has tokens outside a vocabulary of {V}")
        require(max_new_tokens >= 0, f"max_new_tokens must be at least 0, not {max_new_tokens}")
        require(0 <= temperature < math.inf, f"temperature must be 0 or more, not {temperature}")
        require(top_k is None or top_k > 0, f"top_k must be at least 1, not {top_k}")
        require(seed is None or 0 <= seed < 2**63, f"seed must be in 0 .. 2^63 - 1, not {seed}")
        require(use_cache or cache is None, "cache is given, but use_cache is False")
        longest = min(full, idx.size(1) + max_new_tokens)
        if use_cache and cache is None:
            cache = KVCache(self.config, idx.size(0), longest, idx.device, self.norm.weight.dtype)
        require(cache is None or cache.batch_size == idx.size(0) and cache.max_len >= longest,
                f"cache must be for {idx.size(0)} sequences of {longest} tokens or more")
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        return self.next_tokens(idx, max_new_tokens, temperature, top_k, generator, cache)

    @torch.no_grad()  # not inference_mode, whose tensors cannot be trained on
    def next_tokens(self, window, max_new_tokens, temperature, top_k, generator, cache):
        # Not compiled: S grows with each token, and every new shape would be compiled anew.
        full, cached = self.config.block_size, 0  # cached: tokens of the window in the cache
        for _ in range(max_new_tokens):
            if window.size(1) > full:
                window, cached = window[:, -((full + 1) // 2):], 0
            if cache is not None:
                cache.length = cached
            with sdpa_kernel(DECODING):
                x = self.hidden_states(window[:, cached:], cache)  # (B, T, C)
            if cache is not None:
                cached = cache.length
            token = draw(self.lm_head(x[:, -1]), temperature, top_k, generator)  # (B,)
            window = torch.cat((window, token[:, None]), dim=1)
            yield token

    def num_params(self) -> int:
        """Trainable parameters, the 2 V C of embed_tokens and lm_head among them."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on a token, 6 N + 12 T C a layer (PaLM, arXiv
        2204.02311), N being the numbers in matrix products; the rest is Q K^T and A V over T =
        block_size tokens, causal or not, and over twice as many above the first of crosslayer."""
        c = self.config
        N = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        N -= self.embed_tokens.weight.numel()  # a look-up, no product
        attentions = 2 * c.n_layer - 1 if "crosslayer" in c.variants else c.n_layer
        return 6 * N + 12 * attentions * c.block_size * c.n_embd

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of KV cache per token: nkv x hs numbers for each K and V that a layer owns."""
        return KVCache(self.config, 1, 1, "meta", dtype).nbytes  # meta: tensors without storage
