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


class Routed(NamedTuple):
    """How the tokens of each group were routed."""

    logits: torch.Tensor  # float32 [G, S, E]
    expert_index: torch.Tensor  # [G, S, K], best first
    gate: torch.Tensor  # float32 [G, S, K], the probability of each choice, not normalised
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


def gated(wide, up):
    """OpenMoE's three factors: wide's first half, swish of its second, and up."""
    first, gate = wide.chunk(2, dim=-1)
    return first * F.silu(gate) * up


def route(logits, top_k, capacity):
    """Gives the choices of each group's tokens places in the experts: all first choices, then all second ones.

    Args: logits, float32 [G, S, E]; top_k; capacity, places of an expert in a group, or None for enough.
    """
    probs = logits.softmax(-1)
    # A stable sort, not topk: equal probabilities, such as padding has, go to the lower expert.
    gate, expert_index = (x[..., :top_k] for x in probs.sort(dim=-1, descending=True, stable=True))
    if capacity is None:
        return Routed(logits, expert_index, gate, torch.ones_like(expert_index, dtype=torch.bool))
    queue = expert_index.transpose(1, 2).flatten(1)  # [G, K*S], in order of precedence
    earlier = F.one_hot(queue, logits.shape[-1]).cumsum(1).gather(2, queue[..., None])[..., 0] - 1
    kept = (earlier < capacity).unflatten(1, (top_k, -1)).transpose(1, 2)
    return Routed(logits, expert_index, gate, kept)


class OpenMoeRMSNorm(nn.Module):
    """Division by the root mean square (arXiv:1910.07467) in float32: [..., d] to the same in the activations' type."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
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
    """Causal, [b, t, d] to [b, t, d], without the factor 1/sqrt(head_dim), which the query's initialiser has."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.layer = (config.num_attention_heads, config.head_dim), layer
        d_model, d_inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = OpenMoeLinear(d_model, d_inner, truncated=False, divisor=math.sqrt(config.head_dim))
        self.k_proj = OpenMoeLinear(d_model, d_inner, truncated=False)
        self.v_proj = OpenMoeLinear(d_model, d_inner, truncated=False)
        self.o_proj = OpenMoeLinear(d_inner, d_model, truncated=False)

    def forward(self, x, rows, cache):
        query, key, value = (f(x).unflatten(-1, self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (y.transpose(1, 2) for y in (rotate(query, rows), rotate(key, rows), value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        weights = (query @ key.transpose(2, 3) + rows.masked).softmax(-1)  # [b, h, t, s]
        return self.o_proj((weights @ value).transpose(1, 2).flatten(2))


class OpenMoeMLP(nn.Module):
    """The gated block of every token, [b, t, d] to [b, t, d]; see `gated`."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = OpenMoeLinear(config.hidden_size, 2 * config.intermediate_size)
        self.up_proj = OpenMoeLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = OpenMoeLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class OpenMoeExperts(nn.Module):
    """The gated blocks of a layer's experts: [n, d] to [n, d] by the one asked for."""

    def __init__(self, config):
        super().__init__()
        stack, d_model, d_ff = config.num_experts, config.hidden_size, config.intermediate_size
        self.wi_gate = nn.Parameter(torch.empty(stack, d_model, 2 * d_ff))
        self.wi_up = nn.Parameter(torch.empty(stack, d_model, d_ff))
        self.wo = nn.Parameter(torch.empty(stack, d_ff, d_model))

    def forward(self, x, expert):
        wi_gate, wi_up, wo = (kernels[expert].to(x.dtype) for kernels in (self.wi_gate, self.wi_up, self.wo))
        return gated(x @ wi_gate, x @ wi_up) @ wo


class OpenMoeSparseMLP(nn.Module):
    """Experts (arXiv:2202.08906): [b, t, d] to float32 [b, t, d] and Routed.

    Zeroed padding reaches the router, asks for experts 0 and 1 and takes places there, as in training.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = OpenMoeExperts(config)

    def forward(self, x, generating):
        tokens = x.flatten(0, 1)
        size, capacity = self.groups_of(len(tokens), generating)
        logits = F.linear(tokens.float(), self.gate_weight.float()).unflatten(0, (-1, size))
        routed = route(logits, self.config.router_topk, capacity)
        expert_index, gate, kept = (y.flatten(0, 1) for y in routed[1:])  # [G*S, K]
        summed = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in range(self.config.num_experts):
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
        drops = self.training or config.router_drop_tks
        if generating or not drops or num_tokens % size or (multiple and num_tokens % multiple):
            return num_tokens, None
        factor = config.router_capacity_factor_train if self.training else config.router_capacity_factor_eval
        return size, max(round(factor * size / config.num_experts), config.router_min_capacity)


def load_balancing_loss(routed):
    """E times the sum over experts of the share of tokens that ask for it and its mean probability; K at best.

    Of Routed, a scalar (arXiv:2101.03961, equation 4).
    """
    num_experts = routed.logits.shape[-1]
    asked = F.one_hot(routed.expert_index, num_experts).sum(2).float().mean(1)  # [G, E]
    return num_experts * (asked * routed.logits.softmax(-1).mean(1)).sum(-1).mean()
