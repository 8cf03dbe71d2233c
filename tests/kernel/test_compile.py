"""Every variant that the launchers can reach, compiled for its GPUs without one: registers and spills as the assembler sees them.

A tile that spills loses more than any tuning gains, and nothing else here would notice. What can be launched is a finite list of 17
variants for a GPU, ``ROWS``: the launchers run as on a GPU, on tensors of every dtype, alignment, shape, number of references and
option that could make a difference to them, and must reach that list and nothing beyond it. What Triton would then compile is what
is compiled, for every architecture that takes bfloat16 products. The results stay in Triton's cache.
"""

import itertools
import os
import re
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.tools import require_module

triton = require_module("triton", "pip install triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's process cannot compile"
)

import triton.language as tl  # noqa: E402
from mrpo_kernels import finish, partials  # noqa: E402
from mrpo_kernels.backend import MAX_REFERENCES  # noqa: E402
from mrpo_kernels.virtual_reference import AGGREGATES, CLIPS, WEIGHTINGS  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# The sm_ to the shared memory, in bytes, that one of its programs may have. Its tile is that of the tens: TILES[sm // 10].
ARCHITECTURES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
#: One for each tile. All seven take minutes: MRPO_EVERY_ARCHITECTURE=1, as before a release or after a change to a kernel.
COMPILED = ARCHITECTURES if os.environ.get("MRPO_EVERY_ARCHITECTURE") else (86, 90, 100, 120)
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
KERNELS = (partials.partials_kernel, finish.response_sums_kernel, finish.virtual_reference_kernel)


class Variant(NamedTuple):
    """What Triton compiles: a kernel specialised to argument types, alignments and constants, for one architecture."""

    source: Any
    target: GPUTarget
    options: dict[str, Any]

    @property
    def name(self):
        return self.source.name

    def constant(self, name):
        """The value compiled in; None for an argument that is left to the launch."""
        return self.source.constants.get((self.source.fn.arg_names.index(name),))

    def compiled(self):
        return triton.compile(self.source, target=self.target, options=self.options)


def launched(architecture, call):
    """The variants that ``call`` makes Triton compile on a GPU of this sm_; nothing is compiled, nothing runs."""
    variants = []
    target = GPUTarget("cuda", architecture, 32)
    device = types.SimpleNamespace(  # Triton keeps what it compiled by device; this one's number is its architecture
        get_current_target=lambda: target, get_current_device=lambda: architecture, get_current_stream=lambda _: 0
    )
    not_compiled = types.SimpleNamespace(
        run=lambda *_: None, launch_metadata=lambda *_: None, function=None, packed_metadata=None
    )

    def note(source, target, options):
        variants.append(Variant(source, target, options))
        return not_compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", device)
        patch.setattr(triton.compiler, "compile", note)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10))
        patch.setattr(partials, "_num_programs", lambda _: 132)
        partials._tile.cache_clear()
        call()
        partials._tile.cache_clear()
        for kernel in KERNELS:
            kernel.device_caches.pop(architecture, None)
    return variants


def head(dtype=torch.bfloat16, *, width=128, aligned=True, bias=False, softcap=None):
    hidden_TD, weight_VD = (
        torch.zeros(rows, width if aligned else width + 1, dtype=dtype)[:, :width] for rows in (5, 7)
    )
    labels_T, cu_seqlens = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 2, 5])
    return partials.Head(hidden_TD, weight_VD, labels_T, cu_seqlens, torch.zeros(7) if bias else None, softcap)


def launch_partials(dtypes=tuple(DTYPES), counts=(1, 3, 16)):
    """Every tile's BLOCK_D divides 128, none divides 136 (whose rows can be aligned) or 129 (whose cannot)."""
    for dtype, width, aligned, bias, softcap, count in itertools.product(
        dtypes, (128, 136, 129), (True, False), (True, False), (None, 30.0), counts
    ):
        decisive = head(dtype, width=width, aligned=aligned, bias=bias, softcap=softcap)
        partials.vocabulary_partials([decisive, *[head(dtype)] * (count - 1)])


def launch_finish():
    """Response sums; the pair kernel in all modes, with numbers of references and pairs that Triton would treat as special (1, 16),
    up to the largest, from log-probs as from partials, aligned or not."""
    scored = [partials.vocabulary_partials([head(aligned=aligned)]) for aligned in (True, False)]
    for one in scored:
        finish.response_logps(one, 2)
    modes = list(itertools.product(CLIPS, (*WEIGHTINGS, [1.0] * 3), (*AGGREGATES, 0.5, 2)))
    sizes = itertools.product((1, 2, 3, 16, MAX_REFERENCES), (1, 3, 16))
    cases = [(3, 2, *mode) for mode in modes] + [(*size, *modes[0]) for size in sizes]
    for given, (num_refs, num_pairs, *mode) in itertools.product((*scored, None), cases):
        raw_KP2 = torch.zeros(num_refs, num_pairs, 2)
        unaligned_KP2 = torch.zeros(raw_KP2.numel() + 1)[1:].view_as(raw_KP2)
        for logps_KP2 in (raw_KP2, unaligned_KP2):
            finish.combine(given, logps_KP2, scored[0].floats, 0.1, *mode)


def launch_all():
    launch_partials()
    launch_finish()


TRANSFORMS = ("plain", "bias or softcap")
ROWS = [
    *(
        ", ".join(names)
        for names in itertools.product(("bfloat16", "float16"), ("even D", "ragged D", "unaligned"), TRANSFORMS)
    ),
    *(f"float32, {transform}" for transform in TRANSFORMS),
    "response sums",
    "virtual reference from partials",
    "virtual reference from log-probs",
]


def row(variant):
    """What the table calls it."""
    get = variant.constant
    if variant.name == "response_sums_kernel":
        return "response sums"
    if variant.name == "virtual_reference_kernel":
        return f"virtual reference from {'log-probs' if get('FROM_LOGPS') else 'partials'}"
    dtype = next(str(dtype)[6:] for dtype, kind in DTYPES.items() if get("DTYPE") == kind)
    rows = ("even D" if get("EVEN_D") else "ragged D") if get("ALIGNED") else "unaligned"
    return ", ".join([dtype, *([] if dtype == "float32" else [rows]), TRANSFORMS[get("HAS_TRANSFORM")]])


def usage(kernel, folder):
    """(registers, bytes of stack): the assembler spills to the stack, and nothing else here uses one."""
    cubin = folder / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


@pytest.mark.processes
def test_no_variant_spills(tmp_path, capsys):
    variants = [(sm, variant) for sm in COMPILED for variant in launched(sm, launch_all)]

    def resources(item):
        kernel = item[1].compiled()
        return *usage(kernel, tmp_path), kernel.metadata.shared

    with ThreadPoolExecutor(2) as threads:
        used = list(threads.map(resources, variants))
    table = {(row(variant), sm): found for (sm, variant), found in zip(variants, used, strict=True)}
    with capsys.disabled():
        print(f"\n{len(variants)} variants: registers (bytes spilled)")
        print(" " * 36 + "".join(f"{f'sm_{sm}':>10}" for sm in COMPILED))
        for name in ROWS:
            print(f"{name:<36}" + "".join(f"{'{} ({})'.format(*table[name, sm]):>10}" for sm in COMPILED))
    assert {where: found for where, found in table.items() if found[1]} == {}
    assert {where: found for where, found in table.items() if found[2] > ARCHITECTURES[where[1]]} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_launchers_reach_the_list_and_nothing_beyond_it(architecture):
    """Each once: two variants of one row would differ in something that the table does not show."""
    assert sorted(row(variant) for variant in launched(architecture, launch_all)) == sorted(ROWS)


def test_every_tile_is_compiled():
    assert {sm // 10 for sm in ARCHITECTURES} == {sm // 10 for sm in COMPILED} == partials.TILES.keys()


def test_loads_are_asynchronous_and_wide():
    """The table's addresses lose the alignment that an argument has; without the hints nothing is pipelined."""
    for architecture in ARCHITECTURES:
        tile = partials.TILES[architecture // 10]
        (variant,) = launched(architecture, lambda: partials.vocabulary_partials([head()] * 2))
        kernel = variant.compiled()
        copies = re.findall(r"cp\.async\.cg\.shared\.global .*?, (0x\w+)", kernel.asm["ptx"])
        assert copies and set(copies) == {"0x10"}, architecture
        stage = 2 * tile.block_d * (tile.block_t + tile.block_v)
        assert kernel.metadata.shared >= (tile.num_stages - 1) * stage, architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_products_are_not_rounded_to_tf32(architecture):
    """TF32 keeps 10 bits of each factor: a thousand times float32's error, and no other test here would see it without a GPU."""
    (variant,) = launched(architecture, lambda: partials.vocabulary_partials([head(torch.float32)] * 2))
    ptx = variant.compiled().asm["ptx"]
    assert "fma.rn" in ptx and "tf32" not in ptx


def test_offsets_are_64_bits_wide():
    """T*V > 2^31: a head of 262144 x 8192 has 2^31 elements, and so have T x V tokens and words at T = 16384."""
    for variant in launched(90, launch_all):
        if variant.name == "virtual_reference_kernel" and variant.constant("FROM_LOGPS"):
            continue
        if variant.name == "partials_kernel" and variant.constant("HAS_TRANSFORM") is False:
            continue
        lines = [line for line in variant.compiled().asm["ttir"].splitlines() if re.search("tt.addptr.*tensor<", line)]
        wide = [line for line in lines if re.search(r", tensor<\w+xi64>", line)]
        # Offsets within one pair's K x 2 numbers, and none else, are 32 bits wide.
        small = [line for line in lines if re.search(r", tensor<(2|64|64x2)xi32>", line)]
        assert wide and len(wide) + len(small) == len(lines), lines
