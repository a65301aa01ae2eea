"""The names of a model's parameters, from its settings alone. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from openmoe.model.config import ModelConfig

_KERNELS = ("wi_0/kernel", "wi_1/kernel", "wo/kernel")


def parameter_names(config: ModelConfig) -> list[str]:
    """Returns T5X's names of all parameters, such as decoder/layers_3/mlp/wi_0/kernel, as the model declares them."""
    of_layers = [
        f"decoder/layers_{layer}/{name}" for layer in range(config.num_layers) for name in _of_layer(config, layer)
    ]
    return ["token_embedder/embedding", *of_layers, "decoder/decoder_norm/scale", "decoder/logits_dense/kernel"]


def _of_layer(config: ModelConfig, layer: int) -> Iterator[str]:
    yield "pre_self_attention_layer_norm/scale"
    yield from (f"self_attention/{name}/kernel" for name in ("query", "key", "value", "out"))
    if config.qk_norm:
        yield from ("self_attention/query_norm/scale", "self_attention/key_norm/scale")
    yield "pre_mlp_layer_norm/scale"
    if not config.is_moe_layer(layer):
        yield from (f"mlp/{kernel}" for kernel in _KERNELS)
        return
    yield from (f"mlp/expert/{kernel}" for kernel in _KERNELS)
    yield "mlp/router/router_weights/w/kernel"
    if config.router_bias_rate:
        yield "mlp/router/bias"
    if config.extra_mlp == "after":
        yield "pre_extra_mlp_layer_norm/scale"
    if config.extra_mlp != "none":
        yield from (f"extra_mlp/{kernel}" for kernel in _KERNELS)
