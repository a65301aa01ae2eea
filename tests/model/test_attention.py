"""The fused kernels against the reference, as far as a CPU goes; tests/tpu compiles the TPU's."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from openmoe.model import attention, sharding
from openmoe.model.config import PRESETS, ExecutionConfig

# Two rows: three packed segments that end within a tile of 128 and padding; one row full to its end.
SEGMENTS = np.zeros((2, 256), np.int32)
SEGMENTS[0, :100], SEGMENTS[0, 100:130], SEGMENTS[0, 130:200] = 1, 2, 3
SEGMENTS[1] = 1

AUTO, REFERENCE = ExecutionConfig(), ExecutionConfig(attention="reference")


def inputs(dtype="float32", heads=2, head_dim=128, rows=SEGMENTS):
    """Queries, keys, values, and weights of a sum over the result, which are 0 at padding, as a loss's are."""
    shape = (*rows.shape, heads, head_dim)
    query, key, value, weights = np.random.default_rng(0).standard_normal((4, *shape))
    arrays = (query / np.sqrt(head_dim), key, value, weights * (rows > 0)[..., None, None])
    return [jnp.asarray(x, dtype) for x in arrays]


def result_and_gradients(attend, segments, query, key, value, weights):
    """What attention gives at real positions, and the gradients of a loss on it."""

    def loss(query, key, value):
        y = attend(query, key, value, segments)
        return jnp.sum((weights * y).astype(jnp.float32)), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return {"y": y * (segments > 0)[..., None, None]} | dict(zip("qkv", gradients, strict=True))


def reference(query, key, value, segments):
    return attention.masked_attention(query, key, value, attention.visible(segments))


def splash(query, key, value, segments):
    return attention.splash_attention(query, key, value, segments, interpret=True)


def assert_close(found, expected):
    for name, x in found.items():
        x, y = (np.asarray(array, "float32") for array in (x, expected[name]))
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_position_sees_those_not_later_of_its_segment_and_padding_sees_nothing():
    target_ids = np.asarray([[5, 1, 7, 1, 0]])
    segment_ids = np.asarray([[1, 1, 2, 2, 2]])
    segments = attention.segments_of(target_ids, segment_ids)
    assert segments.tolist() == [[1, 1, 2, 2, 0]]
    assert attention.visible(segments)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]


def test_padding_attends_to_all_positions_equally_in_the_reference():
    query, key, value, _ = inputs(rows=SEGMENTS[:1, 160:240])
    y = attention.attend(
        query, key, value, SEGMENTS[:1, 160:240], implementation="reference", mesh=sharding.make_mesh(data=8)
    )
    np.testing.assert_allclose(y[0, 40:], np.broadcast_to(value.mean(axis=1), (40, 2, 128)), atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "changes", "row_len", "tensor", "implementation"),
    [
        ("tpu", {}, 2048, 4, "splash"),
        ("tpu", {"dtype": "float32", "head_dim": 64}, 640, 1, "splash"),
        ("tpu", {}, 2000, 1, "reference"),
        ("tpu", {}, 2048, 16, "reference"),
        ("gpu", {}, 2048, 4, "cudnn"),
        ("cuda", {"head_dim": 72}, 2000, 1, "cudnn"),
        ("gpu", {"dtype": "float32"}, 2048, 1, "reference"),
        ("gpu", {"head_dim": 136}, 2048, 1, "reference"),
        ("gpu", {"head_dim": 60}, 2048, 1, "reference"),
        ("gpu", {}, 2047, 1, "reference"),
        ("gpu", {}, 2048, 16, "reference"),
        ("cpu", {}, 2048, 1, "reference"),
        ("rocm", {}, 2048, 1, "reference"),
    ],
)
def test_the_platform_and_the_shapes_choose_the_implementation(platform, changes, row_len, tensor, implementation):
    config = replace(PRESETS["openmoe-8b"], **changes)  # 24 heads of 128 in bfloat16
    assert attention.implementation_for(platform, config, AUTO, row_len=row_len, tensor=tensor) == implementation
    assert attention.implementation_for(platform, config, REFERENCE, row_len=row_len, tensor=tensor) == "reference"


@pytest.mark.parametrize(("row_len", "head_dim"), [(128, 128), (256, 64)])
def test_interpreted_splash_equals_the_reference_at_real_positions(row_len, head_dim):
    rows = SEGMENTS[:, 256 - row_len :]
    arrays = inputs(head_dim=head_dim, rows=rows)
    found, expected = (result_and_gradients(f, rows, *arrays) for f in (splash, reference))
    assert_close(found, expected)


def test_in_bfloat16_splash_is_nearer_to_float32_than_the_reference_is():
    rows = SEGMENTS[:, :128]
    rounded = inputs("bfloat16", rows=rows)
    exact = result_and_gradients(reference, rows, *(x.astype("float32") for x in rounded))

    def errors(attend):
        found = result_and_gradients(attend, rows, *rounded)
        return {name: jnp.linalg.norm(found[name] - x) / jnp.linalg.norm(x) for name, x in exact.items()}

    of_splash, of_reference = errors(splash), errors(reference)
    assert all(of_splash[name] < of_reference[name] for name in "yqkv")
    assert max(of_splash.values()) < 0.004


def test_splash_divided_by_rows_and_heads_equals_the_undivided_reference():
    rows = np.tile(SEGMENTS[:, 128:], (2, 1))
    arrays = inputs(rows=rows, head_dim=32)
    mesh = sharding.make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    divided = functools.partial(attention.attend, implementation="splash", mesh=mesh)
    found, expected = (result_and_gradients(f, rows, *arrays) for f in (divided, reference))
    assert_close(found, expected)


def test_the_arguments_given_to_cudnn_mean_what_the_reference_computes():
    arrays = inputs()
    plain = functools.partial(attention.cudnn_attention, implementation="xla")
    found, expected = (result_and_gradients(f, SEGMENTS, *arrays) for f in (plain, reference))
    assert_close(found, expected)


@pytest.fixture
def as_if_cudnn_were_there(monkeypatch):
    """JAX asks for cuDNN's version before it lowers a call to it; what is lowered does not depend on the answer."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)


@pytest.mark.usefixtures("as_if_cudnn_were_there")
def test_forward_and_backward_lower_to_cudnn_calls_for_a_gpu():
    mesh = sharding.make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    rows = np.tile(SEGMENTS, (2, 1))
    cudnn = functools.partial(attention.attend, implementation="cudnn", mesh=mesh)

    def step(*arrays):
        return result_and_gradients(cudnn, rows, *arrays)

    text = jax.jit(step).trace(*inputs("bfloat16", rows=rows)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "tensor<1x256x1x128xbf16>" in text  # one row and one head on each of eight devices
    assert "\\22mask_type\\22: \\22CAUSAL\\22" in text
    assert "\\22fmha_scale\\22: 1.0" in text
