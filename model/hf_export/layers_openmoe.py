"""The parts of OpenMoE in PyTorch: attention, gated blocks, routing. What they are for: modeling_openmoe.py.

Axes: b rows, t positions, s positions of the cache, d hidden, h heads, k head_dim; G groups, S tokens of a group,
K choices, E experts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

MASKED = -1e10
LEAST_SUM = 1e-18  # of a token's scores, to divide by: those of a sigmoid may all be 0


class Routed(NamedTuple):
    """How the tokens of each group were routed."""

    logits: torch.Tensor  # float32 [G, S, E]
    shares: torch.Tensor  # float32 [G, S, E], each token's scores, summing to 1
    asks: torch.Tensor  # bool [G, S], whether a token asks at all
    expert_index: torch.Tensor  # [G, S, K], best first; E where a token asks for none
    gate: torch.Tensor  # float32 [G, S, K], weight of each choice's answer
    kept: torch.Tensor  # bool [G, S, K], whether the expert had a place left


class Rows(NamedTuple):
    """Where the positions at hand stand in their rows, and what they see there."""

    sin: torch.Tensor  # [b, t, 1, k/2]
    cos: torch.Tensor
    real: torch.Tensor  # bool [b, t, 1], whether it is more than padding
    masked: torch.Tensor  # [b, 1, t, s], 0 where it sees, MASKED where it does not


def rotate(x, rows):
    """Rotary position embedding of [b, t, h, k], first half with second half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * rows.cos - second * rows.sin, second * rows.cos + first * rows.sin], dim=-1)


def gated(wide, up, ffn):
    """OpenMoE's three factors: wide's first half, swish of its second, and up; swiglu's two: swish of wide, and up."""
    if ffn == "swiglu":
        return F.silu(wide) * up
    first, gate = wide.chunk(2, dim=-1)
    return first * F.silu(gate) * up


def gate_width(config, d_ff):
    """Columns of `wide` in `gated`."""
    return d_ff if config.ffn == "swiglu" else 2 * d_ff


def route(logits, bias, asks, capacity, config):
    """Lets tokens choose experts, and gives a group's choices places: to all first ones, then to all second ones.

    Args: logits, float32 [G, S, E]; bias, [E], of the choice, or None; asks, bool [G, S]; capacity, places of an expert
    in a group, or None for enough.
    """
    num_experts, top_k = config.num_experts, config.router_topk
    is_sigmoid = config.router_scores == "sigmoid"
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=LEAST_SUM) if is_sigmoid else scores
    ranking = scores if bias is None else scores + bias.float()
    # A stable sort, not topk: equal scores, such as padding has, go to the lower expert.
    expert_index = ranking.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    gate = scores.gather(-1, expert_index)
    if config.router_renormalize_gates:
        gate = gate / gate.sum(-1, keepdim=True).clamp(min=LEAST_SUM)
    expert_index = expert_index.masked_fill(~asks[..., None], num_experts)
    kept = asks[..., None].expand_as(expert_index)
    if capacity is not None:
        queue = expert_index.transpose(1, 2).flatten(1)  # [G, K*S], in order of precedence
        earlier = F.one_hot(queue, num_experts + 1).cumsum(1).gather(2, queue[..., None])[..., 0] - 1
        kept = kept & (earlier < capacity).unflatten(1, (top_k, -1)).transpose(1, 2)
    return Routed(logits, shares, asks, expert_index, gate, kept)


class OpenMoeRMSNorm(nn.Module):
    """Division by the root mean square (arXiv:1910.07467) in float32: [..., d] to the same in the activations' type."""

    def __init__(self, config, width=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width or config.hidden_size))
        self.epsilon = config.rms_norm_eps
        self.dtype = getattr(torch, config.activation_dtype)

    def forward(self, x):
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(self.dtype) * self.weight.to(self.dtype)


class OpenMoeLinear(nn.Linear):
    """[..., d_in] to [..., d_out] without bias, in the type of x; `truncated` and `divisor` say how it is drawn."""

    def __init__(self, d_in, d_out, truncated=True, divisor=1.0):
        super().__init__(d_in, d_out, bias=False)
        self.truncated, self.divisor = truncated, divisor

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class OpenMoeAttention(nn.Module):
    """Causal, [b, t, d] to [b, t, d]; the factor 1/sqrt(head_dim) is in the query's initialiser, or beside its norm."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.layer = (config.num_attention_heads, config.head_dim), layer
        d_model, d_inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = OpenMoeLinear(d_model, d_inner, truncated=False, divisor=math.sqrt(config.head_dim))
        self.k_proj = OpenMoeLinear(d_model, d_inner, truncated=False)
        self.v_proj = OpenMoeLinear(d_model, d_inner, truncated=False)
        self.o_proj = OpenMoeLinear(d_inner, d_model, truncated=False)
        self.q_norm = OpenMoeRMSNorm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = OpenMoeRMSNorm(config, config.head_dim) if config.qk_norm else None

    def forward(self, x, rows, cache):
        query, key, value = (f(x).unflatten(-1, self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            root = torch.tensor(math.sqrt(self.heads[1]), dtype=query.dtype)  # rounded as JAX's
            query, key = self.q_norm(query) / root, self.k_norm(key)
        query, key, value = (y.transpose(1, 2) for y in (rotate(query, rows), rotate(key, rows), value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        weights = (query @ key.transpose(2, 3) + rows.masked).softmax(-1)  # [b, h, t, s]
        return self.o_proj((weights @ value).transpose(1, 2).flatten(2))


class OpenMoeMLP(nn.Module):
    """The gated block of every token, [b, t, d] to [b, t, d]; see `gated`."""

    def __init__(self, config):
        super().__init__()
        self.ffn = config.ffn
        self.gate_proj = OpenMoeLinear(config.hidden_size, gate_width(config, config.intermediate_size))
        self.up_proj = OpenMoeLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = OpenMoeLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.ffn))


class OpenMoeExperts(nn.Module):
    """The gated blocks of a layer's experts: [n, d] to [n, d] by the one asked for."""

    def __init__(self, config):
        super().__init__()
        self.ffn = config.ffn
        stack, d_model, d_ff = config.num_experts, config.hidden_size, config.expert_width
        self.wi_gate = nn.Parameter(torch.empty(stack, d_model, gate_width(config, d_ff)))
        self.wi_up = nn.Parameter(torch.empty(stack, d_model, d_ff))
        self.wo = nn.Parameter(torch.empty(stack, d_ff, d_model))

    def forward(self, x, expert):
        wi_gate, wi_up, wo = (kernels[expert].to(x.dtype) for kernels in (self.wi_gate, self.wi_up, self.wo))
        return gated(x @ wi_gate, x @ wi_up, self.ffn) @ wo


class OpenMoeSparseMLP(nn.Module):
    """Experts (arXiv:2202.08906): [b, t, d] to float32 [b, t, d] and Routed.

    With `router_takes_padding`, zeroed padding asks for experts 0 and 1 and takes places there, as in training.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        # No parameter: what moves it in training is the experts' load, not a gradient. Here it stays as it is.
        self.register_buffer("gate_bias", torch.zeros(config.num_experts) if config.router_bias_rate else None)
        self.experts = OpenMoeExperts(config)

    def forward(self, x, real, generating):
        tokens = x.flatten(0, 1)
        size, capacity = self.groups_of(len(tokens), generating)
        logits = F.linear(tokens.float(), self.gate_weight.float()).unflatten(0, (-1, size))
        asks = torch.ones_like(real) if self.config.router_takes_padding else real
        routed = route(logits, self.gate_bias, asks.reshape(logits.shape[:2]), capacity, self.config)
        expert_index, gate, kept = (y.flatten(0, 1) for y in routed[3:])  # [G*S, K]
        summed = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in expert_index[kept].unique().tolist():
            token, choice = torch.where(kept & (expert_index == expert))
            answers = self.experts(tokens[token], expert).float() * gate[token, choice, None]
            summed = summed.index_add(0, token, answers)
        return summed.view(x.shape), routed

    def groups_of(self, num_tokens, generating):
        """Returns the tokens of a group and the places of an expert in it; None if nothing is dropped."""
        config, size = self.config, self.config.group_size
        multiple = config.num_experts * config.t5x_expert_copies
        if multiple and num_tokens % multiple == 0:  # the original's rule: openmoe.model.counts.groups_of
            num_groups = max(num_tokens // size, multiple)
            while num_tokens % num_groups or num_groups % multiple:
                num_groups += 1
            size = num_tokens // num_groups
        if generating or num_tokens % size or (multiple and num_tokens % multiple):
            return num_tokens, None
        if config.router_dropless or not (self.training or config.router_drop_tks):
            return size, None
        factor = config.router_capacity_factor_train if self.training else config.router_capacity_factor_eval
        asked = size * (config.router_topk if config.router_capacity_counts_topk else 1)
        return size, max(round(factor * asked / config.num_experts), config.router_min_capacity)


def load_balancing_loss(routed):
    """E times the sum over experts of the share of tokens that ask for it and its mean share of scores; K at best.

    Of Routed, a scalar (arXiv:2101.03961, equation 4): the mean over groups, each counting by its tokens that ask.
    """
    num_experts, asks = routed.logits.shape[-1], routed.asks.float()
    asked = F.one_hot(routed.expert_index, num_experts + 1)[..., :-1].sum(2).float()  # [G, S, E]
    shares = (asks[..., None] * routed.shares).sum(1) / asks.sum(1, keepdim=True).clamp(min=1)  # [G, E]
    return num_experts * (asked.sum(1) * shares).sum() / asks.sum().clamp(min=1)


def router_z_loss(routed):
    """Mean squared logarithm of the softmax's denominator, a scalar (arXiv:2202.08906, equation 5)."""
    asks = routed.asks.float()
    return (asks * routed.logits.logsumexp(-1).square()).sum() / asks.sum().clamp(min=1)
