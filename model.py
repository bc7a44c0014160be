"""ResFormer, SVFormer and the five systems that their paper compares them with, in one file.
"Value Residual Learning For Alleviating Attention Concentration In Transformers", arXiv 2410.17897

What is special about this model:
- The block is Llama's: RMSNorm before each half, rotary positions, SwiGLU, no biases, no dropout,
  untied embeddings. Parameters carry the names of Hugging Face's Llama.
- One class, `Attention`, is all the systems. Layers talk through a dict with the keys and values
  used last: a layer that computes its own replaces them, a layer that shares leaves them there.
- The KV cache allocates what the variant needs and nothing else: the savings are real bytes.

In shapes: B batch, T tokens, S tokens so far with those in the cache, C width (n_embd), nh query
heads, nkv key/value heads, hs head size, V vocabulary, L layers.
"""

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

VARIANTS = ("vanilla", "resformer", "svformer", "neutreno", "denseformer", "gqa", "cla")


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, naming the field, if it can't be built."""
    vocab_size: int = 257
    block_size: int = 128  # the longest context, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_kv_head: int | None = None  # key/value heads; None: n_head, or half of it with gqa
    n_embd: int = 64
    n_ffn: int | None = None  # hidden width of the SwiGLU; None: 3.5 x n_embd
    attention: str = "resformer"  # one of VARIANTS, or several joined with "+"
    value_residual: str = "fixed"  # resformer: fixed, learnable or plus, see GPT.value_lambdas
    value_lambda: tuple[float, float] = (0.5, 0.5)  # resformer: the weights of V_1 and V_n
    residual_layers: tuple[int, ...] | None = None  # resformer: some of 2 .. n_layer; None: all
    neutreno_lambda: float = 0.4  # neutreno: the strength of V_1 - V_n

    def __post_init__(self):
        names, which = str(self.attention).split("+"), f"attention '{self.attention}'"
        require(set(names) <= set(VARIANTS) and len(names) == len(set(names)),
                f"{which}: choose from {', '.join(VARIANTS)}, or join some, once each, with '+'")
        require(names == ["vanilla"] or "vanilla" not in names,
                f"{which}: vanilla means that nothing changes; leave it out")
        require("svformer" not in names or not {"resformer", "neutreno"} & set(names),
                f"{which}: svformer has no V_n that resformer or neutreno could mix with V_1")
        for name in "vocab_size block_size n_layer n_head n_kv_head n_embd n_ffn".split():
            value = getattr(self, name)
            optional = value is None and name in ("n_kv_head", "n_ffn")
            require(optional or type(value) is int and value > 0,
                    f"{name} must be a whole number of at least 1, not {value!r}")
        self.n_ffn = self.n_ffn or self.n_embd * 7 // 2
        self.n_kv_head = self.n_kv_head or max(1, self.n_head // (2 if "gqa" in names else 1))
        require(self.n_embd % (2 * self.n_head) == 0,
                f"n_embd ({self.n_embd}) must be n_head ({self.n_head}) x an even head size")
        require(self.n_head == self.n_kv_head or
                "gqa" in names and self.n_head % self.n_kv_head == 0,
                f"n_kv_head ({self.n_kv_head}) must divide n_head ({self.n_head}); it is for gqa")
        require(self.value_residual in ("fixed", "learnable", "plus"),
                f"value_residual must be fixed, learnable or plus, not {self.value_residual!r}")
        self.value_lambda = tuple(map(float, self.value_lambda))
        require(len(self.value_lambda) == 2 and all(map(math.isfinite, self.value_lambda)),
                f"value_lambda must be two finite numbers, not {self.value_lambda}")
        require(math.isfinite(self.neutreno_lambda), "neutreno_lambda must be a finite number")
        self.variants = set(names)
        self.head_dim = self.n_embd // self.n_head
        for n in self.residual_layers or ():
            require(1 < n <= self.n_layer and Attention.owned(self, n - 1)[1],
                    f"residual_layers: layer {n} has no values of its own to mix with the first's")


def rotary_table(start: int, T: int, head_dim: int, like: torch.Tensor):
    """cos and sin, each (T, hs), of the rotary embedding at positions start .. start + T - 1. As
    in Llama j turns with j + hs/2, by position x 10000^(-2j/hs). `rotate` wants -sin first."""
    # In float32 at least: bfloat16 cannot tell position 257 from 256.
    exact = dict(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    frequency = 10000.0 ** (torch.arange(0, head_dim, 2, **exact) / -head_dim)  # (hs / 2,)
    position = torch.arange(start, start + T, **exact)  # (T,)
    angle = torch.outer(position, torch.cat((-frequency, frequency)))  # (T, hs)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, nh, T, hs), each pair (a, b) in it turned into (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)  # roll: (a, b) -> (b, a)


class Attention(nn.Module):
    """Causal self-attention of layer n = layer + 1, for every variant.

    A_n = softmax(Q_n K_n^T / sqrt(hs)), causally masked; U_n is what the heads hand to o_proj.
    Only DenseFormer is elsewhere: it mixes the outputs of blocks, see GPT.hidden_states.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.owns_k, self.owns_v = self.owned(config, layer)
        kv_width = config.n_kv_head * config.head_dim  # GQA: fewer heads here than for queries
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if self.owns_k:
            self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        if self.owns_v:
            self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    @staticmethod
    def owned(config: GPTConfig, layer: int) -> tuple[bool, bool]:
        """Whether this layer computes and caches keys of its own, and values of its own."""
        # CLA, arXiv 2405.12981: every second layer reuses K and V of the layer below it.
        owns_k = not ("cla" in config.variants and layer % 2 == 1)
        # SVFormer, arXiv 2410.17897: U_n = A_n V_1. Only the first layer has values.
        owns_v = owns_k and not ("svformer" in config.variants and layer > 0)
        return owns_k, owns_v

    def forward(self, x, rope, mask, kv, cache=None):
        """x (B, T, C) -> (B, T, C).

        rope: cos and sin, (T, hs). mask: (T, S), or None for plain causal masking. kv: the layer
        below's keys "k" and values "v", (B, nkv, S, hs), the first layer's values "v1" of the T
        tokens at hand, and GPT.value_lambdas(). cache: a KVCache to append to.
        """
        c, (B, T, C) = self.config, x.shape
        heads = (B, T, -1, c.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), *rope)  # (B, nh, T, hs)
        if self.owns_k:
            k = rotate(self.k_proj(x).view(heads).transpose(1, 2), *rope)  # (B, nkv, T, hs)
            kv["k"] = k if cache is None else cache.append(cache.k[self.layer], k)
        if self.owns_v:
            v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, nkv, T, hs)
            if self.layer == 0:
                kv["v1"] = v
            elif self.layer + 1 in kv["lambdas"]:  # arXiv 2410.17897: U_n = A_n (l1 V_1 + l2 V_n)
                l1, l2 = kv["lambdas"][self.layer + 1]
                v = l1 * kv["v1"] + l2 * v  # cached as this sum, so decoding costs nothing more
            kv["v"] = v if cache is None else cache.append(cache.v[self.layer], v)
        # GQA, arXiv 2305.13245: query head i reads key/value head i // groups.
        groups = c.n_head // c.n_kv_head
        u = F.scaled_dot_product_attention(
            q, kv["k"], kv["v"], attn_mask=mask, is_causal=mask is None and T > 1,
            enable_gqa=groups > 1)  # (B, nh, T, hs)
        if "neutreno" in c.variants and self.layer > 0:  # arXiv 2312.00751: A_n V_n + l(V_1 - V_n)
            gap = (kv["v1"] - kv["v"][:, :, -T:]).unsqueeze(2)  # (B, nkv, 1, T, hs)
            u = (u.unflatten(1, (-1, groups)) + c.neutreno_lambda * gap).flatten(1, 2)
        return self.o_proj(u.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then the SwiGLU down(silu(gate(x)) * up(x)), each added to x, (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, hidden = config.n_embd, config.n_ffn
        self.input_layernorm = nn.RMSNorm(C, eps=1e-5)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(C, eps=1e-5)
        self.mlp = nn.ModuleDict(dict(gate_proj=nn.Linear(C, hidden, bias=False),
                                      up_proj=nn.Linear(C, hidden, bias=False),
                                      down_proj=nn.Linear(hidden, C, bias=False)))

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        y, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class KVCache:
    """Keys and values of the tokens read so far. Lists k and v hold, for each layer, a tensor
    (batch_size, nkv, max_len, hs) of the model's dtype, or None if the layer uses another's."""

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device=None, dtype=None):
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        owned = [Attention.owned(config, layer) for layer in range(config.n_layer)]
        self.k = [torch.empty(shape, device=device, dtype=dtype) if k else None for k, _ in owned]
        self.v = [torch.empty(shape, device=device, dtype=dtype) if v else None for _, v in owned]
        self.nbytes = sum(t.nbytes for t in self.k + self.v if t is not None)
        self.max_len = max_len
        self.length = 0  # tokens read so far; GPT.hidden_states moves it on

    def append(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Writes new (B, nkv, T, hs) behind what store holds; returns a view of all S tokens."""
        end = self.length + new.size(2)
        store[:, :, self.length:end] = new
        return store[:, :, :end]


class GPT(nn.Module):
    """The language model: `model(idx)` gives logits, `model(idx, targets)` the loss as well."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        seed = torch.randint(2**31, ()).item()  # follows torch.manual_seed
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if "denseformer" in config.variants:  # for the embedding and n outputs: 0 ... 0 1 at first
            self.depth_weights = nn.ParameterList(
                torch.eye(layer + 2)[-1].clone() for layer in range(config.n_layer))
        every = range(2, config.n_layer + 1) if "resformer" in config.variants else ()
        self.mixing = [n for n in every if Attention.owned(config, n - 1)[1]
                       and n in (config.residual_layers or every)]
        if self.mixing and config.value_residual != "fixed":
            l1, l2 = (torch.full((len(self.mixing),), start) for start in config.value_lambda)
            self.value_l1, self.value_l2 = nn.Parameter(l1), nn.Parameter(l2)
            if config.value_residual == "plus":
                self.value_total = nn.Parameter(torch.full((1,), float(len(self.mixing))))
        self.init_weights(seed)

    def value_lambdas(self) -> dict:
        """ResFormer's {n: (l1, l2)}, the weights of V_1 and V_n in each layer n that mixes them.

        fixed: value_lambda. learnable: scalars that start there. plus, from later versions of the
        paper: a softmax over value_l1 shares out value_total, at first 1 a layer, as l1.
        """
        if self.config.value_residual == "fixed" or not self.mixing:
            return dict.fromkeys(self.mixing, self.config.value_lambda)
        plus = self.config.value_residual == "plus"
        l1 = self.value_total * self.value_l1.softmax(dim=0) if plus else self.value_l1
        return dict(zip(self.mixing, zip(l1, self.value_l2)))

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Matrices from N(0, 0.02), as in GPT-2 N(0, 0.02 / sqrt(2L)) for o_proj and down_proj,
        each from a stream named after it: two variants of one seed share what both have."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                stream = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                branches = 2 * self.config.n_layer if "o_proj" in name or "down" in name else 1
                p.copy_(torch.randn(p.shape, generator=stream) * (0.02 / math.sqrt(branches)))

    def hidden_states(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx (B, T) -> what lm_head reads, (B, T, C); appends T tokens to the cache, if any."""
        T = idx.size(1)
        past, limit = (cache.length, cache.max_len) if cache else (0, self.config.block_size)
        require(past + T <= limit, f"{past + T} tokens exceed block_size or max_len, {limit}")
        x = self.embed_tokens(idx)  # (B, T, C)
        rope = rotary_table(past, T, self.config.head_dim, like=x)
        mask = None
        if past > 0 and T > 1:  # token t of a later chunk sees the tokens 0 .. past + t
            mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)
        kv, outputs = {"lambdas": self.value_lambdas()}, [x]
        for layer, block in enumerate(self.layers):
            x = block(x, rope, mask, kv, cache)
            if "denseformer" in self.config.variants:  # arXiv 2402.02622: sum over i, a_{n,i} X_i
                outputs.append(x)
                x = sum(a * X for a, X in zip(self.depth_weights[layer], outputs))
        if cache:
            cache.length += T
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None, max_logits=2**25):
        """idx (B, T) int64 -> logits (B, T, V) and, with targets (B, T), the mean cross-entropy in
        nats a token, else None. With more than max_logits numbers in them, logits is None and the
        loss made in eighths, to hold one at a time. ValueError: over block_size or max_len."""
        x = self.hidden_states(idx, cache)
        if targets is None or targets.numel() * self.config.vocab_size <= max_logits:
            logits = self.lm_head(x)
            return logits, (None if targets is None else
                            F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        parts = zip(x.flatten(0, 1).chunk(8), targets.flatten().chunk(8))
        losses = [checkpoint(lambda x, y: F.cross_entropy(self.lm_head(x), y, reduction="sum"),
                             *part, use_reentrant=False) for part in parts]
        return None, sum(losses) / targets.numel()

    def load_state_dict(self, state_dict, *args, **kwargs):
        """nn.Module's, which also takes the names with Hugging Face's prefix, `model.`."""
        named = {name.removeprefix("model."): p for name, p in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, cache=True):
        """Continues idx (B, T), yielding the next tokens (B,) int64 as soon as they are drawn.

        temperature 0 takes the likeliest token; top_k draws from the k likeliest; a seed fixes the
        text. When the window of block_size tokens is full it slides: its last half is read again,
        from position 0, and so is a longer prompt's. cache: False reads the whole window for each
        token, the same text slowly; or a KVCache to use. ValueError for a bad argument.
        """
        require(idx.dim() == 2 and idx.size(1) > 0, f"idx {tuple(idx.shape)} isn't (B, T), T > 0")
        require(0 <= temperature < math.inf, f"temperature must be 0 or more, not {temperature}")
        require(top_k is None or top_k > 0, f"top_k must be at least 1, not {top_k}")
        full = self.config.block_size
        if cache is True:
            longest = min(full, idx.size(1) + max_new_tokens)
            cache = KVCache(self.config, idx.size(0), longest, idx.device, self.norm.weight.dtype)
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        window, read = idx, 0  # read: how many tokens of the window are in the cache
        for _ in range(max_new_tokens):
            if window.size(1) > full:
                window, read = window[:, -((full + 1) // 2):], 0
            if cache:
                cache.length = read
            x = self.hidden_states(window[:, read:], cache or None)
            read = window.size(1) if cache else 0
            logits = self.lm_head(x[:, -1]).float()  # (B, V)
            if top_k is not None and top_k < logits.size(1):
                logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
            if temperature == 0:
                token = logits.argmax(dim=1, keepdim=True)  # (B, 1)
            else:
                chances = (logits / temperature).softmax(dim=1)
                token = torch.multinomial(chances, 1, generator=generator)
            window = torch.cat((window, token), dim=1)
            yield token[:, 0]

    def num_params(self) -> int:
        """Numbers to learn, the 2 V C of embed_tokens and lm_head among them."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on a token, 6 N + 12 L T C (PaLM, arXiv 2204.02311):
        N numbers in matrix products; QK^T and AV over T = block_size tokens, causal or not."""
        c, look_up = self.config, self.embed_tokens.weight.numel()
        N = sum(p.numel() for p in self.parameters() if p.dim() > 1) - look_up
        return 6 * N + 12 * c.n_layer * c.block_size * c.n_embd

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of KV cache a token, n_kv_head x hs numbers for each K and V that a layer owns."""
        return KVCache(self.config, 1, 1, "meta", dtype).nbytes  # meta: tensors without storage
