"""A layer on a mesh equals the layer on one device: outputs and all gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from experts.compute import Placed, apply_experts
from experts.kinds import get_kind
from routing.plan import Plan
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import AxisRules
from sharding.transport import TRANSPORTS, local

WIDTH, HIDDEN, EXPERTS, K = 8, 12, 5, 2
MESHES = [MeshConfig(), MeshConfig(expert=4), MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(data=4, tensor=2)]


def compute(params, x, plan):
    banks = {"mlp": Placed(params["mlp"], 0, EXPERTS), "identity": Placed({}, EXPERTS, 1)}
    return apply_experts(banks, x, plan, block_size=4)


def inputs(rows: int, skewed: bool):
    rng = np.random.default_rng(0)
    params = {"mlp": get_kind("mlp").init(jax.random.key(0), EXPERTS, WIDTH, HIDDEN, jnp.float32)}
    slot = np.stack([rng.permutation(EXPERTS + 2)[:K] for _ in range(rows)]).astype(np.int32)
    if skewed:
        slot[: rows // 2] = [0, EXPERTS + 1]  # the devices of the first rows overflow, the others do not
    weight = np.where(slot <= EXPERTS, rng.uniform(0.1, 1, slot.shape), 0).astype(np.float32)
    return (
        params,
        jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.float32),
        Plan(jnp.asarray(slot), jnp.asarray(weight)),
    )


def gradients(layer, params, x, plan):
    def loss(params, x, weight):
        return (layer(params, x, Plan(plan.slot, weight)) * jnp.cos(jnp.arange(WIDTH))).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, plan.weight)


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("skewed", [False, True])
def test_local_equals_one_device(config, skewed):
    params, x, plan = inputs(128, skewed)
    layer = local(make_mesh(config), AxisRules(), compute)
    assert_close(jax.jit(layer)(params, x, plan), compute(params, x, plan))
    sharded, single = gradients(layer, params, x, plan), gradients(compute, params, x, plan)
    jax.tree.map(lambda a, b: assert_close(a, b, scale=10), sharded, single)


def test_rows_stay_where_they_are():
    params, x, plan = inputs(64, False)
    mesh, rules = make_mesh(MeshConfig(expert=2)), AxisRules()
    y = jax.jit(local(mesh, rules, compute))(params, x, plan)
    assert y.sharding.is_equivalent_to(rules.sharding(mesh, "rows", None), 2)


def test_one_device():
    params, x, plan = inputs(7, True)
    layer = TRANSPORTS["local"](make_mesh(MeshConfig(), jax.devices()[:1]), AxisRules(), compute)
    assert_close(layer(params, x, plan), compute(params, x, plan))


def test_uneven_rows_name_both_numbers():
    params, x, plan = inputs(13, False)
    with pytest.raises(ValueError, match="13 rows .* 8 devices .* such as 8 or 16"):
        local(make_mesh(), AxisRules(), compute)(params, x, plan)
