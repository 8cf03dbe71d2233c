"""Every shipped configuration compiled for its GPUs, without one: registers and spills as the assembler reports them.

A tile that spills loses more than any tuning gains, and nothing else here would notice. Not listed is float32 with unaligned rows,
which `auto` never takes: 3 of its 32 variants spill up to 24 bytes. float16 compiles to what bfloat16 does. The compiled kernels
stay in Triton's cache, so only the first run takes its minute.
"""

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process cannot compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from mrpo_kernels import finish, partials  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = {8: 80, 9: 90, 10: 100, 12: 120}  # a key of TILES to the sm_ it is compiled for
ALL_FLAGS = {"HAS_TRANSFORM": True, "EVEN_D": False}


def compiled(kernel, pointers, scalars, constants, architecture, num_warps, num_stages=3):
    """``pointers`` and ``scalars``: argument name to Triton's type. Pointers are 16-byte aligned, as torch's allocations are."""
    names = kernel.arg_names
    types = {name: (pointers | scalars).get(name, "constexpr") for name in names}
    assert set(constants) == {name for name, kind in types.items() if kind == "constexpr"}
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compiled_partials(major, tile=None, *, dtype=tl.bfloat16, num_heads=None, **flags):
    tile = tile or partials.TILES[major]
    constants = {f"BLOCK_{axis}": getattr(tile, f"block_{axis}".lower()) for axis in "TVD"} | {"GROUP_T": tile.group_t}
    constants |= {"DTYPE": dtype, "DESCRIPTORS": tile.descriptors, "UPCAST": False, "ALIGNED": True, "EVEN_D": True}
    constants |= {"HAS_TRANSFORM": False} | flags
    scalars = {"num_heads": "i32"}
    if num_heads:  # Triton compiles an argument of 1 into the kernel: sequence_logps has its own
        constants, scalars = constants | {"num_heads": num_heads}, {}
    floats = dict.fromkeys(("floats_ptr", "max_ptr", "sum_ptr", "label_logit_ptr"), "*fp32")
    pointers = {"table_ptr": "*i64"} | floats
    kernel = partials.partials_kernel
    return compiled(kernel, pointers, scalars, constants, ARCHITECTURES[major], tile.num_warps, tile.num_stages)


def compiled_finish(kernel, major, constants):
    tile = partials.TILES[major]
    scalars = {"num_refs": "i32", "num_pairs": "i32", "epsilon_max": "fp32"}
    pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")} | {"table_ptr": "*i64"}
    constants = constants | {"BLOCK_V": tile.block_v, "BLOCK_T": finish.BLOCK_T, "BLOCK_N": finish.BLOCK_N}
    scalars = {name: kind for name, kind in scalars.items() if name in kernel.arg_names}
    return compiled(kernel, pointers, scalars, constants, ARCHITECTURES[major], finish.NUM_WARPS)


def combination(from_logps, aggregate="harmonic"):
    modes = {"CLIP": "adaptive", "WEIGHTS": "confidence", "AGGREGATE": aggregate}
    return modes | {"FROM_LOGPS": from_logps, "BLOCK_K": 4}


PLAIN = {"tile": partials.PLAIN_TILE, **ALL_FLAGS}
CONFIGURATIONS = {
    "partials": lambda major: compiled_partials(major),
    "partials, K=1": lambda major: compiled_partials(major, num_heads=1),
    "partials, ragged D": lambda major: compiled_partials(major, EVEN_D=False),
    "partials, ragged D, K=1": lambda major: compiled_partials(major, num_heads=1, EVEN_D=False),
    "partials, bias": lambda major: compiled_partials(major, HAS_TRANSFORM=True),
    "partials, bias, K=1": lambda major: compiled_partials(major, num_heads=1, HAS_TRANSFORM=True),
    "partials, bias, ragged D": lambda major: compiled_partials(major, **ALL_FLAGS),
    "partials, bias, ragged D, K=1": lambda major: compiled_partials(major, num_heads=1, **ALL_FLAGS),
    "partials, unaligned": lambda major: compiled_partials(major, ALIGNED=False, **PLAIN),
    "partials, float32": lambda major: compiled_partials(major, dtype=tl.float32, **PLAIN),
    "response sums": lambda major: compiled_finish(finish.response_sums_kernel, major, {}),
    "virtual reference": lambda major: compiled_finish(finish.virtual_reference_kernel, major, combination(False)),
    "from log-probs": lambda major: compiled_finish(finish.virtual_reference_kernel, major, combination(True)),
}


def usage(kernel, tmp_path):
    """(registers, bytes of stack): the assembler spills to the stack, and nothing else here uses one."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


@pytest.mark.parametrize("major", ARCHITECTURES)
def test_no_configuration_spills(major, tmp_path, capsys):
    rows = []
    for name, compile_for in CONFIGURATIONS.items():
        kernel = compile_for(major)
        rows.append((name, *usage(kernel, tmp_path), kernel.metadata.shared))
    with capsys.disabled():
        print(f"\nsm_{ARCHITECTURES[major]:<31} registers  spilled  shared")
        for name, registers, spilled, shared in rows:
            print(f"  {name:<34} {registers:>8} {spilled:>8} {shared:>7}")
    assert not [row for row in rows if row[2]]


def test_all_tiles_are_compiled():
    assert ARCHITECTURES.keys() == partials.TILES.keys()


@pytest.mark.parametrize("major", [9, 10])
def test_tiles_loaded_by_descriptors_do_not_spill(major, tmp_path):
    """No shipped tile takes the option yet; with bias or softcap it spills, so a tile that does needs another shape there."""
    tile = dataclasses.replace(partials.TILES[major], descriptors=True)
    kernel = compiled_partials(major, tile)
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert not usage(kernel, tmp_path)[1]


def test_loads_are_asynchronous_and_wide():
    """The table's addresses lose the alignment that an argument has; without the hints nothing is pipelined."""
    for major, tile in partials.TILES.items():
        kernel = compiled_partials(major)
        copies = re.findall(r"cp\.async\.cg\.shared\.global .*?, (0x\w+)", kernel.asm["ptx"])
        assert copies and set(copies) == {"0x10"}, major
        stage = 2 * tile.block_d * (tile.block_t + tile.block_v)
        assert kernel.metadata.shared >= (tile.num_stages - 1) * stage, major


def test_offsets_are_64_bits_wide():
    """A head of 262144 x 8192 has 2^31 elements, and so have T x V tokens and words at T = 16384."""
    kernels = [compiled_partials(9), compiled_finish(finish.response_sums_kernel, 9, {})]
    kernels.append(compiled_finish(finish.virtual_reference_kernel, 9, combination(False)))
    for kernel in kernels:
        lines = [line for line in kernel.asm["ttir"].splitlines() if "tt.addptr" in line and "tensor<" in line]
        # Offsets within one pair's K x 2 numbers, and none else, are 32 bits wide.
        narrow = [
            line
            for line in lines
            if re.search(r", tensor<\w+xi32>", line) and not re.search(r"tensor<(4|2|4x2)x", line)
        ]
        assert lines and not narrow, narrow
