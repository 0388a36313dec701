"""How a thread rounds, and whether it flushes subnormal numbers to zero: a register of each thread."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

MACHINE = platform.machine().lower()


def _call(builder, name, returned, *arguments):
    kinds = [argument.type for argument in arguments]
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(returned, kinds))
    return builder.call(function, arguments)


@intrinsic
def _mode(typing_context):
    """MXCSR of x86, FPCR of ARM; elsewhere 0."""

    def generate(context, builder, signature, arguments):
        if MACHINE in ("x86_64", "amd64"):
            word = builder.alloca(ir.IntType(32))
            _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(word, ir.IntType(8).as_pointer()))
            return builder.zext(builder.load(word), ir.IntType(64))
        if MACHINE in ("aarch64", "arm64"):
            return _call(builder, "llvm.aarch64.get.fpcr", ir.IntType(64))
        return ir.IntType(64)(0)

    return types.int64(), generate


@intrinsic
def _set_mode(typing_context, mode):
    def generate(context, builder, signature, arguments):
        if MACHINE in ("x86_64", "amd64"):
            word = builder.alloca(ir.IntType(32))
            builder.store(builder.trunc(arguments[0], ir.IntType(32)), word)
            _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(word, ir.IntType(8).as_pointer()))
        elif MACHINE in ("aarch64", "arm64"):
            _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(nogil=True)
def float_mode():
    return _mode()


@njit(nogil=True)
def set_float_mode(mode):
    _set_mode(mode)
