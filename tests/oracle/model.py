"""The model in NumPy float64, straight from a checkpoint: Hugging Face tensor names, config.json fields.

It shares no code, no layout and no name with the library: weights are [out, in], rotary pairs are complex
numbers, heads, tokens and experts are loops. Slow and obvious on purpose.
"""

import math
from types import SimpleNamespace

import numpy as np

LATENT_EPS = 1e-6  # of the two norms inside MLA, whatever rms_norm_eps says


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mscale(factor, m):
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def frequencies(c):
    """Angular frequency of each rotary pair."""
    dim, yarn, out = c["qk_rope_head_dim"], c.get("rope_scaling"), []
    for pair in range(dim // 2):
        freq = c["rope_theta"] ** (-2 * pair / dim)
        if yarn:
            length = yarn["original_max_position_embeddings"]
            # The pair that makes `beta` turns within the original length.
            at = [
                dim * math.log(length / (2 * math.pi * yarn[beta])) / (2 * math.log(c["rope_theta"]))
                for beta in ("beta_fast", "beta_slow")
            ]
            low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dim - 1)
            ramp = min(max((pair - low) / (high - low if high != low else 1e-3), 0.0), 1.0)
            freq = freq * (1 - ramp) + freq / yarn["factor"] * ramp
        out.append(freq)
    return np.array(out)


def rotate(x, position, c):
    """x [r] at one position; entries 2i and 2i + 1 are one complex number."""
    z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies(c))
    if yarn := c.get("rope_scaling"):
        z = z * mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"])
    return np.stack([z.real, z.imag], -1).reshape(-1)


def attention_scale(c):
    scale = (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
    if yarn := c.get("rope_scaling"):
        scale *= mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    return scale


def attention(w, c, x, positions, segments):
    """MLA over one sequence x [t, d]; `w` gives tensors by their name below self_attn."""
    n, r, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    heads, rank, length = c["num_attention_heads"], c["kv_lora_rank"], len(x)
    if c["q_lora_rank"]:
        q = rms(x @ w("q_a_proj").T, w("q_a_layernorm"), LATENT_EPS) @ w("q_b_proj").T
    else:
        q = x @ w("q_proj").T
    compressed = x @ w("kv_a_proj_with_mqa").T
    kv = rms(compressed[:, :rank], w("kv_a_layernorm"), LATENT_EPS) @ w("kv_b_proj").T
    k_rope = np.stack([rotate(compressed[t, rank:], positions[t], c) for t in range(length)])
    out = np.zeros((length, heads * v))
    for h in range(heads):
        q_h = q[:, h * (n + r) : (h + 1) * (n + r)]
        k_h, v_h = np.split(kv[:, h * (n + v) : (h + 1) * (n + v)], [n], axis=1)
        q_rope = np.stack([rotate(q_h[t, n:], positions[t], c) for t in range(length)])
        score = (q_h[:, :n] @ k_h.T + q_rope @ k_rope.T) * attention_scale(c)
        for t in range(length):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            out[t, h * v : (h + 1) * v] = softmax(score[t, seen]) @ v_h[seen]
    return out @ w("o_proj").T


def gate(weight, bias, c, x):
    """One token x [d] -> (expert ids, gating values, affinities)."""
    logits = weight @ x
    sigmoid = c["scoring_func"] == "sigmoid"
    s = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
    choice = s + bias if sigmoid else s
    groups = np.split(np.arange(len(s)), c["n_group"])
    best_of_group = [np.sort(choice[g])[::-1][: 2 if sigmoid else 1].sum() for g in groups]
    kept = np.argsort(best_of_group)[::-1][: c["topk_group"]]
    allowed = np.concatenate([groups[g] for g in kept])
    ids = allowed[np.argsort(choice[allowed])[::-1][: c["num_experts_per_tok"]]]
    values = s[ids]
    if c["norm_topk_prob"]:
        values = values / values.sum()
    return ids, values * c["routed_scaling_factor"], s


def ffn(w, prefix, x):
    return (silu(x @ w(prefix + "gate_proj").T) * (x @ w(prefix + "up_proj").T)) @ w(prefix + "down_proj").T


def moe(w, c, x, counts):
    """Shared and routed experts over one sequence; adds its routing to `counts`. Returns (y, affinities)."""
    y = ffn(w, "shared_experts.", x) if c["n_shared_experts"] else np.zeros_like(x)
    bias = w("gate.e_score_correction_bias") if c["scoring_func"] == "sigmoid" else 0.0
    affinity = []
    for t in range(len(x)):
        ids, values, s = gate(w("gate"), bias, c, x[t])
        affinity.append(s)
        for e, value in zip(ids, values, strict=True):
            y[t] += value * ffn(w, f"experts.{e}.", x[t])
            counts[e] += 1
    return y, np.array(affinity)


def sequence_loss(affinity, k):
    """Equations 17-20 for one sequence and layer: affinities [t, e], without alpha."""
    length, e = affinity.shape
    f = np.zeros(e)
    for row in affinity:
        f[np.argsort(row)[::-1][:k]] += e / (k * length)
    return (f * (affinity / affinity.sum(-1, keepdims=True)).mean(0)).sum()


def block(tensors, c, layer, x, positions, segments):
    """One block over one sequence. Returns (y, load of its experts, sequence-wise loss)."""
    prefix, eps = f"model.layers.{layer}.", c["rms_norm_eps"]

    def below(part):
        def get(name):
            full = prefix + part + name
            return tensors[full] if full.endswith("_bias") else tensors[full + ".weight"]

        return get

    h = rms(x, below("")("input_layernorm"), eps)
    x = x + attention(below("self_attn."), c, h, positions, segments)
    h = rms(x, below("")("post_attention_layernorm"), eps)
    if layer < c["first_k_dense_replace"]:
        return x + ffn(below("mlp."), "", h), None, 0.0
    counts = np.zeros(c["n_routed_experts"], int)
    y, affinity = moe(below("mlp."), c, h, counts)
    return x + y, counts, sequence_loss(affinity, c["num_experts_per_tok"])


def forward(tensors, c, tokens, positions=None, segments=None):
    """The whole model on tokens [b, t].

    Returns hidden (after the final norm) and logits [b, t, ...], mtp (list of logits per depth, [b, t, v]; rows
    past the end of the sequence are zeros), counts [layer, e], seq_loss (mean over sequences, sum over layers).
    """
    tensors = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    embed, eps = tensors["model.embed_tokens.weight"], c["rms_norm_eps"]
    head = embed if c.get("tie_word_embeddings") else tensors["lm_head.weight"]
    n_layers, depth = c["num_hidden_layers"], c.get("num_nextn_predict_layers") or 0
    moe_layers = list(range(c["first_k_dense_replace"], n_layers + depth))
    total = {layer: np.zeros(c["n_routed_experts"], int) for layer in moe_layers}
    out = SimpleNamespace(hidden=[], logits=[], mtp=[[] for _ in range(depth)], seq_loss=0.0)
    for i, ids in enumerate(tokens):
        pos = np.arange(len(ids)) if positions is None else positions[i]
        seg = np.zeros(len(ids), int) if segments is None else segments[i]
        x = embed[ids]

        def run(layer, x, pos=pos, seg=seg):
            y, counts, loss = block(tensors, c, layer, x, pos[: len(x)], seg[: len(x)])
            if counts is not None:
                total[layer] += counts
            out.seq_loss += loss / len(tokens)
            return y

        for layer in range(n_layers):
            x = run(layer, x)
        h = rms(x, tensors["model.norm.weight"], eps)
        out.hidden.append(h)
        out.logits.append(h @ head.T)
        for k in range(depth):
            p = f"model.layers.{n_layers + k}."
            # Position i of depth k joins its state with the embedding of token i + k + 1; the last has none.
            h = h[:-1]
            e = embed[ids[k + 1 :]]
            joined = np.concatenate(
                [rms(e, tensors[p + "enorm.weight"], eps), rms(h, tensors[p + "hnorm.weight"], eps)], axis=-1
            )
            h = run(n_layers + k, joined @ tensors[p + "eh_proj.weight"].T)
            logits = rms(h, tensors[p + "shared_head.norm.weight"], eps) @ head.T
            out.mtp[k].append(np.pad(logits, ((0, k + 1), (0, 0))))
    for name in ("hidden", "logits"):
        setattr(out, name, np.array(getattr(out, name)))
    out.mtp = [np.array(m) for m in out.mtp]
    out.counts = np.array([total[layer] for layer in moe_layers])
    return out
