"""The mesh uses every device once, or says what would."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from sharding.mesh import AXES, MeshConfig, make_mesh, mesh_shape


def test_one_device_is_a_mesh_too():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(expert=4), (2, 1, 4, 1)),
        (MeshConfig(data=2, fsdp=2, expert=-1), (2, 2, 2, 1)),
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_eight_devices(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert len({device.id for device in mesh.devices.flat}) == 8


def test_given_devices_keep_their_order():
    devices = jax.devices()[::-1][:4]
    mesh = make_mesh(MeshConfig(expert=2), devices)
    assert mesh.axis_names == AXES
    assert list(mesh.devices.flat) == devices


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(expert=3), ["3 devices", "8 there are", "expert=2 or 4"]),
        (MeshConfig(data=2, expert=2), ["4 devices", "8 there are", "data=4", "expert=4", "fsdp=2"]),
        (MeshConfig(data=3, expert=5), ["15 devices", "8 there are", "data=-1"]),
        (MeshConfig(fsdp=-1), ["-1", "data and fsdp"]),
        (MeshConfig(tensor=0), ["tensor", "at least 1", "got 0"]),
    ],
)
def test_an_impossible_shape_names_both_numbers_and_what_would_fit(config, words):
    with pytest.raises(ValueError) as error:
        mesh_shape(config, 8)
    for word in words:
        assert word in str(error.value)


@given(sizes=st.tuples(*[st.integers(1, 6) for _ in range(3)]), devices=st.integers(1, 64))
def test_a_shape_uses_all_devices_or_is_refused(sizes, devices):
    config = MeshConfig(-1, *sizes)
    if devices % np.prod(sizes):
        with pytest.raises(ValueError, match=f"{devices} there are"):
            mesh_shape(config, devices)
    else:
        assert np.prod(mesh_shape(config, devices)) == devices
