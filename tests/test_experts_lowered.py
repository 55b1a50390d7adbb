"""What TPU and GPU get, without either: programs compiled for a TPU, and kernels lowered for a GPU, read as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice

from experts import triton
from experts.compute import Placed, apply_experts, choose_backend
from experts.kinds import get_kind
from pathways.config import BalanceOptions, GateOptions, ModelConfig
from pathways.devices import over_rows
from pathways.network.routed import RoutedFeedForward, RowContext
from routing.plan import Plan
from sharding.mesh import MeshConfig, make_mesh

ROWS, K, EXPERTS, WIDTH, HIDDEN = 512, 2, 32, 128, 256
ASSIGNMENTS = ROWS * K
GPU = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")


class Problem(NamedTuple):
    """The arguments of a layer, as shapes."""

    bank: dict[str, jax.ShapeDtypeStruct]
    x: jax.ShapeDtypeStruct
    weight: jax.ShapeDtypeStruct
    slot: jax.ShapeDtypeStruct


def problem(kind: str, dtype: str, sharding: Any = None) -> Problem:
    def shape(sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    bank = jax.eval_shape(lambda: get_kind(kind).init(jax.random.key(0), EXPERTS, WIDTH, HIDDEN, jnp.float32))
    chosen = shape((ROWS, K), jnp.float32), shape((ROWS, K), jnp.int32)
    return Problem(
        {name: shape(leaf.shape, leaf.dtype) for name, leaf in bank.items()}, shape((ROWS, WIDTH), dtype), *chosen
    )


def forward(kind: str, backend: str = "auto"):
    def layer(bank, x, weight, slot):
        def compute(bank, x, plan):
            return apply_experts({kind: Placed(bank, 0, EXPERTS)}, x, plan, backend=backend)

        return over_rows(compute, bank, x, Plan(slot, weight))

    return layer


def both(kind: str, backend: str = "auto"):
    layer = forward(kind, backend)

    def loss(bank, x, weight, slot):
        return (layer(bank, x, weight, slot).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


# TPU: compiled by libtpu, which needs no TPU for it.


@pytest.fixture(scope="module")
def tpu() -> Iterator[list[Any]]:
    """Devices that programs can be compiled for, but not run on."""
    if not find_spec("libtpu"):
        pytest.skip("libtpu is not installed: see the extra tpu-check")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # it asks no cloud where it is
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests may run side by side: no TPU is held
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        # Programs for devices that are not here can be written to the cache, but not read back.
        keep_from = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        yield devices
        jax.config.update("jax_persistent_cache_min_compile_time_secs", keep_from)


def arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Type and shape of every array in a compiled program's text."""
    for dtype, sizes in re.findall(r"\b(\w+)\[([\d,]+)\]", text):
        yield dtype, tuple(int(size) for size in sizes.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("kind", "dtype"), [("mlp", "bfloat16"), ("swiglu", "float32")])
def test_tpu_gets_grouped_products(tpu, kind, dtype, devices, monkeypatch):
    """Operations as of the rows' own experts, forward and backward, and no array of every row for every expert."""
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    mesh = make_mesh(MeshConfig(data=devices), tpu[:devices])
    with jax.set_mesh(mesh):
        given = problem(kind, dtype, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        backend = choose_backend(jnp.dtype(dtype))
        compiled = {1: jax.jit(forward(kind)).lower(*given).compile(), 3: jax.jit(both(kind)).lower(*given).compile()}
    largest = max(EXPERTS * WIDTH * HIDDEN, ASSIGNMENTS * HIDDEN)
    for passes, program in compiled.items():
        # A backward pass is two products for each of the forward's. Dense, it would be E = 32 times as much.
        grouped = passes * get_kind(kind).operations(WIDTH, HIDDEN) * ASSIGNMENTS / devices
        flops = program.cost_analysis()["flops"]
        # Buckets have 16 places for 8 rows on each of four devices, and a block of overflow is counted once.
        assert grouped <= flops <= (1.1 if backend == "ragged" else 2.5) * grouped
        text = program.as_text()
        assert ("ragged-dot" in text) == (backend == "ragged")
        assert max(math.prod(shape) for _, shape in arrays(text)) <= largest
        assert program.memory_analysis().temp_size_in_bytes < 4 * (
            EXPERTS * WIDTH * HIDDEN * 3 + ASSIGNMENTS * HIDDEN * 8
        )


@pytest.mark.slow
def test_the_check_of_tpu_sees_a_dense_expansion(tpu):
    given = problem("mlp", "float32", jax.sharding.SingleDeviceSharding(tpu[0]))
    program = jax.jit(forward("mlp", "dense")).lower(*given).compile()
    assert program.cost_analysis()["flops"] > 10 * get_kind("mlp").operations(WIDTH, HIDDEN) * ASSIGNMENTS
    assert max(math.prod(shape) for _, shape in arrays(program.as_text())) >= EXPERTS * ROWS * HIDDEN


@pytest.mark.slow
def test_tpu_gets_a_whole_routed_layer_grouped(tpu, monkeypatch):
    """Gate, plan, experts, balance and counters, with gradients."""
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    config = ModelConfig(width=WIDTH, hidden=HIDDEN, experts={"mlp": EXPERTS}, gate=GateOptions(top_k=K))
    layer = nnx.eval_shape(lambda: RoutedFeedForward(config, config.experts, 1, EXPERTS, nnx.Rngs(0)))
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    rows = RowContext(
        *[jax.ShapeDtypeStruct((ROWS,), jnp.int32)] * 4, *[jax.ShapeDtypeStruct((8,), jnp.int32)] * 2, None
    )
    given = parameters, rest, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16), rows

    def loss(parameters, rest, x, rows):
        slots = jnp.arange(EXPERTS)[None]
        layer = nnx.merge(graph, parameters, rest)
        y, account = layer(x, rows, slots, BalanceOptions(), key=None, statistics=True)
        return (y.astype(jnp.float32) ** 2).sum() + account.loss, account.routed

    mesh = make_mesh(MeshConfig(data=1), tpu[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), given)
        program = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True)).lower(*given).compile()
    grouped = 3 * get_kind("mlp").operations(WIDTH, HIDDEN) * ASSIGNMENTS
    assert grouped <= program.cost_analysis()["flops"] < 2 * grouped
    assert max(math.prod(shape) for _, shape in arrays(program.as_text())) <= EXPERTS * WIDTH * HIDDEN


# GPU: lowered as far as jax goes without one, and compiled by Triton where that is installed.


def lowered_for_gpu(function, given, devices: int = 1) -> str:
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices]).abstract_mesh.update(abstract_device=GPU)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("kind", "products"), [("mlp", 2), ("swiglu", 3)])
def test_gpu_gets_kernels_alone(kind, products, devices, monkeypatch):
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    for passes, function in ((1, forward(kind)), (3, both(kind))):
        text = lowered_for_gpu(function, problem(kind, "bfloat16"), devices)
        assert text.count("@__gpu$xla.gpu.triton(") == passes * products
        assert "stablehlo.dot_general" not in text
        assert "ragged_dot" not in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_makes_machine_code_of_the_kernels(dtype, monkeypatch, tmp_path):
    """For GPUs with tensor cores (Ampere and Hopper), which the code uses, within the shared memory of small ones."""
    compiler = pytest.importorskip("triton", reason="triton is not installed: see the extra gpu-check")
    from jax._src.pallas.triton import lowering
    from triton.backends.compiler import GPUTarget

    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # else it warns that its default will change
    kernels, lower = {}, lowering.lower_jaxpr_to_triton_module

    def noted(jaxpr, *args, **kwargs):
        result = lower(jaxpr, *args, **kwargs)
        text = result.module.operation.get_asm(enable_debug_info=False, assume_verified=True)
        kernels.setdefault(f"{jaxpr.debug_info.func_name}-{len(kernels)}", text)
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", noted)
    lowered_for_gpu(both("mlp"), problem("mlp", dtype))
    assert len(kernels) == 6
    for name, text in kernels.items():
        path = tmp_path / f"{name}.ttir"
        path.write_text(text)
        for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
            options = {"num_warps": 4, "num_stages": triton.stages(jnp.dtype(dtype))}
            made = compiler.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)
            assert len(made.asm["cubin"]) > 1000
            assert made.metadata.shared <= 99 * 1024
            tall = ASSIGNMENTS // EXPERTS >= 64 or "sums" in name
            assert (instruction if tall else "mma.sync") in made.asm["ptx"]


def test_no_bank_is_copied_for_a_gpu(monkeypatch):
    """Parameters in float32 go into bfloat16 products as they are."""
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    text = lowered_for_gpu(both("mlp"), problem("mlp", "bfloat16"))
    assert f"tensor<{EXPERTS}x{WIDTH}x{HIDDEN}xf32>" in text
    assert not re.search(rf"tensor<{EXPERTS}x\d+x\d+xbf16>", text)
