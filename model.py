"""ResFormer, SVFormer and the six systems that their paper sets them against, in one file.
"Value Residual Learning For Alleviating Attention Concentration In Transformers", arXiv 2410.17897

What is special about this model:
- The block is Llama's: RMSNorm before each half, rotary positions, SwiGLU, no biases, no dropout,
  untied embeddings. Parameters carry the names of Hugging Face's Llama.
- One class, `Attention`, holds all variants but DenseFormer, which is in GPT.hidden_states. A layer
  is handed the keys and values of the layer below and those of layer 1; owns_k and owns_v say which
  layers have their own.
- The KV cache allocates the tensors that the variant needs and no others.
- GPT.from_pretrained reads a Llama of Hugging Face, so that what is said of attention can be looked
  at in a model that people use.

Layers are counted from 1, as in the paper. In shapes, B is the batch, T the new tokens, S the
cached and the new ones, C the width (n_embd), nh the query heads, nkv the key/value
heads, hs the head size, V the vocabulary, L the number of layers.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# -------------------------------------------------------------------------------------------------
# Configuration

VARIANTS = ("vanilla", "crosslayer", "resformer", "svformer", "neutreno", "denseformer", "gqa",
            "cla")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. A mistake is a ValueError that begins with the field's name."""
    vocab_size: int = 257
    block_size: int = 128  # the longest context, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_kv_head: int | None = None  # gqa: key/value heads; None: half of n_head
    n_embd: int = 64  # the width
    n_ffn: int | None = None  # hidden size of the SwiGLU; None: 3.5 x n_embd
    attention: str = "resformer"  # one of VARIANTS, or several joined with "+"
    value_residual: str = "fixed"  # resformer: fixed, learnable or plus, see GPT.value_lambdas
    value_lambda: tuple = (0.5, 0.5)  # resformer: the weights of V_1 and V_n
    residual_layers: tuple | None = None  # resformer: layers that mix V_1 in; None: all above 1
    neutreno_lambda: float | None = None  # None: 0.4, or 0.2 on top of resformer
    init: str = "scaled"  # scaled or paper, see GPT.init_weights
    rope_theta: float = 10_000.0  # base of the rotary positions
    norm_eps: float = 1e-5  # what RMSNorm adds to the mean square

    def __post_init__(self):
        check_config(self)  # the last function of this file

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
        return max(1, self.n_head // 2) if self.n_kv_head is None else self.n_kv_head

    @property
    def ffn_size(self) -> int:
        return self.n_embd * 7 // 2 if self.n_ffn is None else self.n_ffn

    @property
    def neutreno_weight(self) -> float:
        usual = 0.2 if "resformer" in self.variants else 0.4
        return usual if self.neutreno_lambda is None else self.neutreno_lambda


def owns_k(config: GPTConfig, n: int) -> bool:
    """Does layer n compute and cache keys of its own?"""
    # CLA, arXiv 2405.12981: every second layer reuses K and V of the layer below it.
    return "cla" not in config.variants or n % 2 == 1


def owns_v(config: GPTConfig, n: int) -> bool:
    """Does layer n compute and cache values of its own?"""
    # SVFormer, arXiv 2410.17897: U_n = A_n V_1. Only the first layer has values.
    return owns_k(config, n) and ("svformer" not in config.variants or n == 1)


def mixes_v1(config: GPTConfig, n: int) -> bool:
    """Does layer n mix V_1 into its own values?"""
    # ResFormer, arXiv 2410.17897, eq. 4: all above the first, or those of residual_layers.
    if "resformer" not in config.variants or n == 1:
        return False
    return owns_v(config, n) if config.residual_layers is None else n in config.residual_layers


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
        """x (B, T, C) -> what attention adds to it, (B, T, C), and this layer's K and V: its own,
        or those that it was handed.

        rope: cos and sin, (T, hs / 2). mask: (T, S), True where a query sees a key, or None where
        none is needed (see the call of attention). below and first: the K and V, (B, nkv, S, hs)
        each, of the layer below and of layer 1; in layer 1 None. lambdas: this layer's weights of
        V_1 and V_n, or None. cache: a KVCache to append to, or None.
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
        # GQA, arXiv 2305.13245: query head i reads key/value head i // groups. For one query torch
        # reads them in place where it can. For more, K and V are repeated: not every GPU has a
        # memory-saving kernel for grouped heads.
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
            more = c.neutreno_weight * (v1[:, :, -T:] - v[:, :, -T:])  # (B, nkv, T, hs)
            u = u + more.repeat_interleave(groups, dim=1)  # (B, nh, T, hs)
        return self.o_proj(u.transpose(1, 2).flatten(2)), (k, v)


def rotary_table(start: int, T: int, head_dim: int, theta: float, like: torch.Tensor):
    """cos and sin, each (T, hs / 2), of the angles by which positions start .. start + T - 1 turn
    their queries and keys: position x theta^(-2j / hs) for pair j. RoFormer, arXiv 2104.09864."""
    # In float32 at least: bfloat16 cannot tell position 257 from 256.
    dtype = torch.promote_types(like.dtype, torch.float32)
    position = torch.arange(start, start + T, dtype=dtype, device=like.device)  # (T,)
    j = torch.arange(head_dim // 2, dtype=dtype, device=like.device)  # (hs / 2,)
    angle = torch.outer(position, theta ** (-2 * j / head_dim))  # (T, hs / 2)
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
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config, n)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
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
# The model


class GPT(nn.Module):
    """The language model: `logits, loss = model(idx, targets)`, `logits, _ = model(idx)`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        seed = torch.randint(2**31, ()).item()  # follows torch.manual_seed
        layers = range(1, config.n_layer + 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, n) for n in layers)
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if "denseformer" in config.variants:
            # At first only the output of block n counts: 0 .. 0 1.
            self.depth_weights = nn.ParameterList(torch.eye(n + 1)[n].clone() for n in layers)
        self.mixing = [n for n in layers if mixes_v1(config, n)]
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
            if p.dim() < 2:
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

    @classmethod
    def from_pretrained(cls, name: str):
        """A Llama of Hugging Face (its name there, or a folder) or of a .gguf file, as a GPT in
        float32. OSError if it isn't there, ImportError for lack of transformers, ValueError if
        this class cannot express that model."""
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ImportError("pretrained models need transformers 5: pip install transformers, "
                              "for a .gguf file also gguf and accelerate") from None
        source = pretrained_source(name)
        llama = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model = cls(llama_config(llama.config))
        # Where embeddings are tied, lm_head's are among these too.
        weights = {key.removeprefix("model."): p for key, p in llama.state_dict().items()}
        other = sorted(weights.keys() ^ model.state_dict().keys())
        require(not other, f"{name} has other weights than this model: {', '.join(other[:3])}")
        model.load_state_dict(weights)
        # In case a check is missing: both must give the same logits for a few random tokens.
        T = min(64, model.config.block_size)
        stream = torch.Generator().manual_seed(0)
        idx = torch.randint(model.config.vocab_size, (1, T), generator=stream)
        with torch.no_grad():
            off = (model(idx)[0] - llama(idx).logits).abs().max().item()
        require(off < 0.01, f"{name}: logits differ by {off:.2g} from those of transformers")
        return model

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
        rope = rotary_table(past, T, self.config.head_dim, self.config.rope_theta, like=x)
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
        """idx (B, T) int64 -> (logits (B, T, V), loss). The loss is None without targets; with
        targets (B, T) int64 it is the mean cross-entropy in nats per token. Targets of -100 do not
        count; if none counts, it is NaN. A cache is for use under torch.no_grad.

        ValueError if there are too many tokens, or if targets have another shape than idx.
        """
        logits = self.lm_head(self.hidden_states(idx, cache))  # (B, T, V)
        if targets is None:
            return logits, None
        require(targets.shape == idx.shape, f"targets {tuple(targets.shape)} must have the shape "
                                            f"of idx, {tuple(idx.shape)}")
        # The softmax in float32 at least: 16 bits, as under autocast, are too few for it.
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(exact.flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()  # not inference_mode, whose tensors cannot be trained on
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None, use_cache=True):
        """Continues idx (B, T) int64; yields the next tokens (B,) as soon as they are drawn.

        temperature and top_k: see `draw`; ValueError, at the first token, if they are out of range
        or idx is empty. A seed fixes the text. use_cache=False: the same text but for rounding,
        slowly. When the window of block_size tokens is full, its last half is read again from
        position 0; a longer prompt is cut likewise."""
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


def pretrained_source(name: str) -> dict:
    """What transformers' from_pretrained is to be given; a model's own code is never run."""
    source = dict(pretrained_model_name_or_path=name, trust_remote_code=False)
    if name.endswith(".gguf"):
        path = Path(name)
        source |= dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    return source


def llama_config(c) -> GPTConfig:
    """A configuration of transformers as one of ours; ValueError if the two models differ."""
    rope = getattr(c, "rope_parameters", None) or {}
    needed = ("rms_norm_eps", "hidden_act", "num_key_value_heads", "intermediate_size")
    require("rope_theta" in rope and all(hasattr(c, name) for name in needed),
            f"{c.model_type} is no Llama, or transformers is older than 5")
    require(rope["rope_type"] == "default", f"rope scaling of type {rope['rope_type']}")
    require(c.hidden_act == "silu", f"hidden_act {c.hidden_act}: SwiGLU has silu")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    require(head_dim * c.num_attention_heads == c.hidden_size,
            f"head_dim {head_dim} is not hidden_size / num_attention_heads")
    window = getattr(c, "sliding_window", None) or c.max_position_embeddings
    require(window >= c.max_position_embeddings,
            f"sliding_window {window} is shorter than {c.max_position_embeddings} tokens")
    grouped = c.num_key_value_heads < c.num_attention_heads
    return GPTConfig(vocab_size=c.vocab_size, block_size=c.max_position_embeddings,
                     n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
                     n_kv_head=c.num_key_value_heads if grouped else None,
                     n_embd=c.hidden_size, n_ffn=c.intermediate_size,
                     attention="gqa" if grouped else "vanilla",
                     rope_theta=rope["rope_theta"], norm_eps=c.rms_norm_eps)


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
    # The largest becomes 0, so that a tiny temperature cannot make it infinite.
    p = ((logits - logits[:, :1]) / temperature).softmax(dim=1)
    drawn = torch.multinomial(p, 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]


# -------------------------------------------------------------------------------------------------
# What a configuration may not be

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


def check_config(c: GPTConfig):
    """ValueError that begins with the field's name, if no such model can be built or the field
    would have no effect."""
    said = f"attention '{c.attention}'"
    for name in c.variants:
        require(name in VARIANTS, f"{said}: choose from {', '.join(VARIANTS)}, or join some of "
                                  "them with '+'")
        require(c.variants.count(name) == 1, f"{said}: {name} stands in it more than once")
        others, why = CLASHES.get(name, ((), ""))
        joined = set(c.variants) - {name}
        require(joined.isdisjoint(others), f"{said}: {why}")
    for name, variant in USED_BY.items():
        require(variant in c.variants or getattr(c, name) == getattr(GPTConfig, name),
                f"{name} is for {variant}, not for {c.attention}")
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn"):
        size = getattr(c, name)
        require(size is None or size >= 1, f"{name} must be at least 1, not {size}")
    require(c.n_embd % (2 * c.n_head) == 0,
            f"n_embd ({c.n_embd}) must be n_head ({c.n_head}) x an even head size")
    require(c.n_head % c.kv_heads == 0,
            f"n_kv_head ({c.kv_heads}, by default half of n_head) must divide n_head ({c.n_head})")
    require(c.value_residual in ("fixed", "learnable", "plus"),
            f"value_residual must be fixed, learnable or plus, not {c.value_residual!r}")
    require(isinstance(c.value_lambda, (tuple, list)) and len(c.value_lambda) == 2,
            f"value_lambda must be two numbers, not {c.value_lambda}")
    require(c.init in ("scaled", "paper"), f"init must be scaled or paper, not {c.init}")
    for n in c.residual_layers or ():
        require(1 < n <= c.n_layer and owns_v(c, n),
                f"residual_layers: there is no layer {n} that has values of its own to mix with "
                "layer 1's")
