"""Axis rules name mesh axes, and refuse to split two axes of an array over one."""

from __future__ import annotations

import dataclasses

import pytest
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES, MeshConfig, make_mesh
from sharding.rules import AxisRules


def test_specs():
    rules = AxisRules()
    assert rules.spec("rows", None) == P(("data", "fsdp", "expert"), None)
    assert rules.spec("experts", "embed", "hidden") == P("expert", "fsdp", "tensor")
    assert rules.spec() == P()
    assert AxisRules(embed=None).spec("rows", "embed") == P(("data", "fsdp", "expert"), None)


def test_colliding_axes_are_named():
    with pytest.raises(ValueError, match="'fsdp' would split both 'rows' and 'embed'"):
        AxisRules().spec("rows", "embed")
    with pytest.raises(ValueError, match="'tensor' would split both 'hidden' and 'hidden'"):
        AxisRules().spec("hidden", "hidden")


def test_an_unknown_axis_gets_the_nearest():
    with pytest.raises(ValueError, match="unknown logical axis 'expert'.*did you mean 'experts'"):
        AxisRules().spec("expert")


def test_default_rules_name_axes_of_the_mesh_only():
    rules = AxisRules()
    named = {axis for field in dataclasses.fields(rules) for axis in rules.axes(field.name)}
    assert named <= set(AXES)
    mesh = make_mesh(MeshConfig(expert=2))
    assert rules.sharding(mesh, "experts", None).shard_shape((4, 3)) == (2, 3)
