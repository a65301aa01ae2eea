"""Experts without capacity: every choice of every token is answered (MegaBlocks, arXiv:2211.15841).

A device sorts its tokens' choices by expert and sends them along the mesh's `expert` axis to where their experts
are; those sort what arrives by expert, multiply each expert's rows by its own kernels, and send the answers back:

    sort -> send -> sort -> grouped products -> unsort -> send back -> unsort

Nothing is dropped, however unevenly experts are chosen: arrays have room for the worst case, that all choices of all
devices meet on one. With a single device along the axis that is no more than the choices themselves, and nothing is
exchanged. All moves are gathers, in both directions of the derivative, and sums have one order: results repeat bit by
bit. JAX cannot run `ragged_all_to_all` on CPU; its substitute is chosen when a program is compiled for one.

Axes: n tokens of the device, K = top_k, d d_model, m = n * K choices of the device; p devices along the axis,
E experts, e = E / p experts of the device, r rows at them (m for one device, else p * m); [a, b] one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from openmoe.model import sharding
from openmoe.model.gather import gather_rows
from openmoe.model.grouped import grouped_product
from openmoe.model.layers import GatedWeights, Multiply
from openmoe.model.routing import choices_per_expert


def dropless_answers(
    tokens: Array,
    expert_index: Array,
    asks: Array,
    experts: GatedWeights,
    *,
    num_experts: int,
    mlp: Callable[[Array, GatedWeights, Multiply], Array],
    axis: str = "expert",
) -> Array:
    """Answers each choice of one device's tokens, inside a `shard_map`.

    Args:
      tokens: [n, d].
      expert_index: int32[n, K].
      asks: bool[n, K]; a choice that does not ask is not computed, and its answer is zero.
      experts: this device's e experts, or its slice of their inner width.
      num_experts: E.
      mlp: maps rows [r, d] by the experts' kernels to [r, d], with multiply(rows, kernels) for each of its products.
      axis: of the mesh, along which experts are divided.

    Returns:
      [n, K, d], in the type of tokens.
    """
    tokens, *_ = sharding.varying_alike(
        tokens, *experts
    )  # sums its gradient over slices of experts here, where rows are few
    top_k = expert_index.shape[1]
    expert_index = jnp.where(asks, expert_index, num_experts)
    counts = choices_per_expert(expert_index, num_experts)  # int32[E]
    order, place = _sorted(expert_index.reshape(-1), num_experts)  # of m choices
    chosen = gather_rows(tokens, order // top_k, place.reshape(-1, top_k))  # [m, d]
    if jax.lax.axis_size(axis) == 1:
        answers = mlp(chosen, experts, _multiply(counts, chosen.shape[0]))
    else:
        answers = _answers_from_afar(chosen, counts, experts, mlp, axis)
    return gather_rows(answers, place.reshape(-1, top_k), order[:, None])


def _answers_from_afar(
    chosen: Array,
    counts: Array,
    experts: GatedWeights,
    mlp: Callable[[Array, GatedWeights, Multiply], Array],
    axis: str,
) -> Array:
    """Answers rows [m, d], sorted by expert, of which int32[E] go to each expert."""
    num_devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    all_counts = jax.lax.all_gather(counts, axis).reshape(num_devices, num_devices, -1)  # [from, to, e]
    sent = jnp.sum(all_counts, axis=2)  # [from, to]
    start = jnp.cumsum(sent, axis=1) - sent
    traffic = Traffic(sent[me], start[me], sent[:, me], start[:, me])
    arrived = send(chosen, traffic, axis)  # [p*m, d]

    arriving = all_counts[:, me]  # [from, e], and sorted by e
    slot = jnp.arange(chosen.shape[0])[:, None]
    expert = jnp.sum(slot >= jnp.cumsum(arriving, axis=1)[:, None], axis=2)  # [p, m]; e where a slot is empty
    order, place = _sorted(expert.reshape(-1), arriving.shape[1])
    rows = gather_rows(arrived, order, place[:, None])
    answers = mlp(rows, experts, _multiply(jnp.sum(arriving, axis=0), chosen.shape[0]))
    return send_back(gather_rows(answers, place, order[:, None]), traffic, axis)


def _multiply(group_sizes: Array, balanced_rows: int) -> Multiply:
    def multiply(rows: Array, kernels: Array) -> Array:
        return grouped_product(*sharding.varying_alike(rows, kernels, group_sizes), balanced_rows)

    return multiply


def _sorted(key: Array, num_keys: int) -> tuple[Array, Array]:
    """Returns which of the keys int32[m] goes to each place, and the place of each; m stands for none.

    Keys from num_keys on have no place.
    """
    order = jnp.argsort(key, stable=True)
    has_place = key < num_keys
    taken = jnp.arange(key.size) < jnp.sum(has_place)
    return jnp.where(taken, order, key.size), jnp.where(has_place, jnp.argsort(order), key.size)


class Traffic(NamedTuple):
    """How many rows this device exchanges with each of the p devices, and where they lie before they are sent."""

    sent: Array  # int32[p], its own to them
    start: Array  # int32[p], where those begin
    received: Array  # int32[p], theirs to it
    their_start: Array  # int32[p], where those begin, on them


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: Array, traffic: Traffic, axis: str) -> Array:
    """Sends rows [m, d] to their devices; returns [p * m, d], where those from device i begin at i * m, then zeros."""
    num_devices, num_rows = jax.lax.axis_size(axis), rows.shape[0]

    def padded(rows: Array, traffic: Traffic) -> Array:
        slot = jnp.arange(num_rows)
        source = jnp.where(slot < traffic.sent[:, None], traffic.start[:, None] + slot, num_rows)  # [p, m]
        apart = rows.at[source].get(mode="fill", fill_value=0)
        return jax.lax.all_to_all(apart, axis, 0, 0, tiled=True).reshape(-1, rows.shape[1])

    def ragged(rows: Array, traffic: Traffic) -> Array:
        room = sharding.zeros((num_devices * num_rows, rows.shape[1]), rows)
        target = jnp.full_like(traffic.start, num_rows) * jax.lax.axis_index(axis)
        return jax.lax.ragged_all_to_all(
            rows, room, traffic.start, traffic.sent, target, traffic.received, axis_name=axis
        )

    return jax.lax.platform_dependent(rows, traffic, cpu=padded, default=ragged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: Array, traffic: Traffic, axis: str) -> Array:
    """Sends rows [p * m, d] back to where `send` had them from, [m, d], with zeros beyond those."""
    num_devices = jax.lax.axis_size(axis)
    num_rows = rows.shape[0] // num_devices

    def padded(rows: Array, traffic: Traffic) -> Array:
        apart = jax.lax.all_to_all(rows.reshape(num_devices, num_rows, -1), axis, 0, 0, tiled=True)
        end = traffic.start + traffic.sent
        row = jnp.arange(num_rows)
        device = jnp.sum(row[:, None] >= end, axis=1)
        source = jnp.where(row < end[-1], device * num_rows + row - traffic.start[device], num_devices * num_rows)
        return apart.reshape(rows.shape).at[source].get(mode="fill", fill_value=0)

    def ragged(rows: Array, traffic: Traffic) -> Array:
        room = sharding.zeros((num_rows, rows.shape[1]), rows)
        start = jnp.arange(num_devices) * num_rows
        return jax.lax.ragged_all_to_all(
            rows, room, start, traffic.received, traffic.their_start, traffic.sent, axis_name=axis
        )

    return jax.lax.platform_dependent(rows, traffic, cpu=padded, default=ragged)


send.defvjp(
    lambda rows, traffic, axis: (send(rows, traffic, axis), traffic),
    lambda axis, traffic, cotangent: (send_back(cotangent, traffic, axis), None),
)
send_back.defvjp(
    lambda rows, traffic, axis: (send_back(rows, traffic, axis), traffic),
    lambda axis, traffic, cotangent: (send(cotangent, traffic, axis), None),
)
