"""The Triton kernels compiled for GPUs that are not here, each as its op launches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pysteep.kernels.triton import (
    diagonal_flow,
    factor_product,
    factor_step,
    mirror_step,
    sign_vote,
    signed_power,
    steepest_step,
    tensor_table,
)

from . import gpu_machine_code as machine_code

TARGETS: dict[int | str, GPUTarget] = {arch: GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
STORED = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32, tl.float64: torch.float64}
Asm = dict[str, Any]  # by the names of the stages: ptx, cubin, amdgcn


def machine_code_of(asm: Asm, folder: Path) -> machine_code.Kernel:
    """The kernel of one compilation; its cubin passes through `folder`."""
    path = folder / "kernel.cubin"
    path.write_bytes(asm["cubin"])
    (kernel,) = machine_code.kernels(path).values()
    return kernel


def compiled(kernel: Any, target: GPUTarget, *, numbers_on_device: bool = False, **constants: Any) -> Asm:
    """A kernel whose first argument is a table of tensors."""
    if not numbers_on_device:
        constants |= dict.fromkeys(name for name in kernel.arg_names if name.endswith("_at"))
    types = {"table": "*i64", "count": "i32", "partial_sums": "*fp64", "seed": "u64"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_at") else "fp64")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={(0,): [["tt.divisibility", 16]]})
    options = {name: steepest_step.LAUNCH[name] for name in ("num_warps", "enable_fp_fusion")}
    return triton.compile(source, target=target, options=options).asm


def compiled_step(
    kernel: Any,
    target: GPUTarget,
    *,
    storage: Any,
    q: float,
    momentum: bool,
    mode: str = "nearest",
    aligned: bool = True,
    numbers_on_device: bool = False,
) -> Asm:
    constants = {
        "WEIGHT": storage,
        "GRADIENT": storage,
        "MOMENTUM": storage if momentum else None,
        "POWER": signed_power.power_of(q),
        "COUPLED": True,
        "MAXIMIZE": False,
        "MODE": mode,
        "ALIGNED": aligned,
        "CHUNK": steepest_step.LAUNCH["CHUNK"],
        "BLOCK": steepest_step.HELD * steepest_step.WARPS * target.warp_size,
    }
    return compiled(kernel, target, numbers_on_device=numbers_on_device, **constants)


def blocking(constants: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    return constants | {"BLOCK": constants["BLOCK"] * target.warp_size // 32}


def compiled_product(order: int, depth: int, target: GPUTarget, *, storage: Any, aligned: bool = True) -> Asm:
    held, operands = ((1, depth + 1), (2, 2 * depth + 1), (4, 3 * depth + 2))[order]
    constants = blocking(factor_product.grouping(depth, held, STORED[storage]), target)
    kernel = factor_product.product_kernel
    constants |= {"ORDER": order, "OPERANDS": operands, "STORAGE": storage, "ALIGNED": aligned}
    return compiled(kernel, target, **{name: constants[name] for name in kernel.arg_names if name in constants})


def compiled_factor_step(
    stored: int,
    depth: int,
    target: GPUTarget,
    *,
    storage: Any,
    q: float,
    momentum: bool,
    mode: str = "nearest",
    aligned: bool = True,
    numbers_on_device: bool = False,
) -> Asm:
    constants = blocking(factor_step.step_grouping(stored, momentum, STORED[storage], mode), target) | {
        "OPERANDS": 2 + stored * (1 + momentum + (mode == "compensated")),
        "WEIGHT": storage,
        "GRADIENT": storage,
        "FACTOR": storage,
        "MOMENTUM": storage if momentum else None,
        "POWER": signed_power.power_of(q),
        "COUPLED": True,
        "MAXIMIZE": False,
        "DEPTH": depth,
        "TIED": stored < depth,
        "MODE": mode,
        "ALIGNED": aligned,
    }
    kernel = factor_step.factor_kernel
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    return compiled(kernel, target, numbers_on_device=numbers_on_device, **constants)


def compiled_mirror_step(
    depth: int,
    target: GPUTarget,
    *,
    storage: Any,
    q: float,
    mode: str = "nearest",
    aligned: bool = True,
    numbers_on_device: bool = False,
) -> Asm:
    constants = {
        "WEIGHT": storage,
        "GRADIENT": storage,
        "POWER": signed_power.power_of(q),
        "MAXIMIZE": False,
        "DEPTH": depth,
        "MODE": mode,
        "ALIGNED": aligned,
        "CHUNK": tensor_table.CHUNK,
        "BLOCK": mirror_step.held(STORED[storage]) * steepest_step.WARPS * target.warp_size,
    }
    return compiled(mirror_step.mirror_kernel, target, numbers_on_device=numbers_on_device, **constants)


def compiled_flow(k: int, n: int, target: GPUTarget, *, storage: Any, q: float, adam: bool, loss: str) -> Asm:
    constants = {
        "POWER": signed_power.power_of(q),
        "REAL": storage,
        "ADAM": adam,
        "EXPONENTIAL": loss == "exponential",
        **diagonal_flow.blocks(k, n, STORED[storage]),
    }
    memory, names = f"*{storage}", diagonal_flow.flow_kernel.arg_names
    types = {"selected": "*i64", "problem_at": "*i64", "depth_at": "*i64", "seed_at": "*i64"}
    types |= dict.fromkeys(("q_at", "lr_at", "decay_at", "coupled_at"), "*fp64")
    types |= dict.fromkeys(("runs", "k", "n", "begin", "end", "batch_size"), "i32")
    signature = {name: types.get(name, memory if name.endswith("_at") else "fp64") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=diagonal_flow.flow_kernel, signature=signature, constexprs=constants)
    options = {"num_warps": diagonal_flow.WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options).asm


def compiled_vote(name: str, dtype: torch.dtype, target: GPUTarget) -> Asm:
    """`pack_kernel` or `count_kernel`."""
    kernel, pattern = getattr(sign_vote, name), sign_vote.PATTERNS[dtype]
    integer = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}[pattern.integer]
    largest = torch.iinfo(pattern.integer).max
    constants = {"INFINITY": pattern.infinity, "LARGEST": largest, "ONE": pattern.one, "MINUS_ONE": pattern.one - largest - 1}
    constants = {name: constants.get(name, sign_vote.BLOCK) for name in kernel.arg_names if name.isupper()}
    memory = {"values": integer, "results": integer, "words": "*u8"}
    signature = {name: memory.get(name, "i64") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options={"num_warps": sign_vote.WARPS, "enable_fp_fusion": False}).asm
