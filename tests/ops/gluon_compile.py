"""Compiles the Hopper kernel, without a GPU: prints for each kind of mask the bytes of shared memory that it takes.

python tests/ops/gluon_compile.py
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from linearize.ops.gluon_kernels import forward_kernel
from linearize.ops.hopper_local import HEAD_DIMS


def shared_bytes(region: str, head_dim: int) -> int:
    constants = {"REGION": region, "D": head_dim}
    boxes = {"query": head_dim, "output": head_dim, "key": 64, "value": 64}
    types = dict.fromkeys(("lse", "partial_output", "partial_lse"), "*fp32")
    types |= dict.fromkeys(("segments", "entries"), "*i32") | dict.fromkeys(constants, "constexpr") | {"scale": "fp32"}
    for name, channels in boxes.items():
        layout = gl.NVMMASharedLayout.get_default_for([64, channels], gl.bfloat16)
        types[name] = f"tensordesc<bf16[64, {channels}],{layout!r}>"
    source = GluonASTSource(
        fn=forward_kernel,
        signature={name: types.get(name, "i32") for name in forward_kernel.arg_names},
        constexprs={(forward_kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


if __name__ == "__main__":
    for name in ("disc", "neighborhood"):
        print(name, shared_bytes(name, max(HEAD_DIMS)), sep="\t")
