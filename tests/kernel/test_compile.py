"""Every variant that the launchers can reach, compiled for its GPUs without one: registers and spills as the assembler sees them.

A tile that spills loses more than any tuning gains, and nothing else here would notice. No variant is written down: the launchers
run as on a GPU, on tensors of every dtype, alignment, shape and option that could make a difference to them, and what Triton would
then compile is what is compiled. The results stay in Triton's cache; a first run takes minutes.
"""

import dataclasses
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

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process cannot compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from mrpo_kernels import finish, partials  # noqa: E402
from mrpo_kernels.virtual_reference import AGGREGATES, CLIPS  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = {8: 80, 9: 90, 10: 100, 12: 120}  # a key of TILES to the sm_ it is compiled for
# Shared memory that one program may have, in bytes: of sm_86 and sm_89, which share sm_80's tile, less than of sm_80 itself.
SHARED_MEMORY = {8: 101_376, 9: 232_448, 10: 232_448, 12: 101_376}
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
WEIGHTS = ("confidence", "uniform", "fixed")
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


def launched(major, call):
    """The variants that ``call`` makes Triton compile on a GPU of this capability; nothing is compiled, nothing runs."""
    variants = []
    architecture = ARCHITECTURES[major]
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
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
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
    """Response sums behind every tile. The pair kernel in all modes, and in one mode with every number of references, from
    log-probs as from partials, up to eight. Not every mode with every number: modes differ in what is done to a [K, 2] block after
    the scoring.
    """
    scored = [partials.vocabulary_partials([head(aligned=aligned)]) for aligned in (True, False)]
    for one in scored:
        finish.response_logps(one, 2)
    for clip, weights, aggregate in itertools.product(CLIPS, WEIGHTS, AGGREGATES):
        finish.combine(scored[0], torch.zeros(3, 2, 2), scored[0].floats, 0.1, clip, weights, aggregate)
    for given, num_refs, num_pairs in itertools.product((*scored, None), (1, 2, 3, 4, 5, 8), (1, 3, 16)):
        raw_KP2 = torch.zeros(num_refs, num_pairs, 2)
        unaligned_KP2 = torch.zeros(raw_KP2.numel() + 1)[1:].view_as(raw_KP2)
        for logps_KP2 in (raw_KP2, unaligned_KP2):
            finish.combine(given, logps_KP2, scored[0].floats, 0.1, "adaptive", "confidence", "harmonic")


def launch_all():
    launch_partials()
    launch_finish()


def row(variant):
    """What the table calls it: all modes of the finishing kernel share one row."""
    get = variant.constant
    if variant.name == "response_sums_kernel":
        return f"response sums, vocabulary tiles of {get('BLOCK_V')}"
    if variant.name == "virtual_reference_kernel":
        source = "log-probs" if get("FROM_LOGPS") else f"vocabulary tiles of {get('BLOCK_V')}"
        return f"virtual reference, K <= {get('BLOCK_K')}, from {source}"
    dtype = next(str(dtype)[6:] for dtype, kind in DTYPES.items() if get("DTYPE") == kind)
    flags = [("", "unaligned"), ("even D", "ragged D"), ("plain", "bias or softcap")]
    values = [not get("ALIGNED"), not get("EVEN_D"), get("HAS_TRANSFORM")]
    named = [names[value] for names, value in zip(flags, values, strict=True)]
    return ", ".join(filter(None, [dtype, *named, "K = 1" if get("num_heads") == 1 else "K > 1"]))


def usage(kernel, folder):
    """(registers, bytes of stack): the assembler spills to the stack, and nothing else here uses one."""
    cubin = folder / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def cell(registers_and_spilled):
    return "{} ({})".format(*registers_and_spilled) if registers_and_spilled else "-"


def test_no_variant_spills(tmp_path, capsys):
    variants = [(major, variant) for major in ARCHITECTURES for variant in launched(major, launch_all)]

    def resources(item):
        kernel = item[1].compiled()
        return *usage(kernel, tmp_path), kernel.metadata.shared

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        used = list(threads.map(resources, variants))
    table: dict[str, dict[int, tuple[int, int]]] = {}
    for (major, variant), (registers, spilled, _) in zip(variants, used, strict=True):
        cells = table.setdefault(row(variant), {})
        cells[major] = tuple(map(max, zip(cells.get(major, (0, 0)), (registers, spilled), strict=True)))
    with capsys.disabled():
        print(f"\n{len(variants)} variants: registers (bytes spilled)")
        print(" " * 56 + "".join(f"{f'sm_{sm}':>11}" for sm in ARCHITECTURES.values()))
        for name, cells in table.items():
            print(f"{name:<56}" + "".join(f"{cell(cells.get(major)):>11}" for major in ARCHITECTURES))
    assert {name: cells for name, cells in table.items() if any(spilled for _, spilled in cells.values())} == {}
    assert all(shared <= SHARED_MEMORY[major] for (major, _), (*_, shared) in zip(variants, used, strict=True))


@pytest.mark.parametrize("major", ARCHITECTURES)
def test_the_launchers_reach_the_whole_product(major):
    """3 dtypes x aligned or not x even or ragged D x bias or softcap, or neither x K = 1 or more, and nothing beyond it."""
    reached = [row(variant) for variant in launched(major, launch_partials)]
    assert len(reached) == len(set(reached)) == 3 * 2**4


def test_all_tiles_are_compiled():
    assert ARCHITECTURES.keys() == partials.TILES.keys() == SHARED_MEMORY.keys()


@pytest.mark.parametrize("major", [9, 10])
def test_tiles_loaded_by_descriptors_do_not_spill(major, tmp_path, monkeypatch):
    """No shipped tile takes the option yet; with bias or softcap it spills, so a tile that does needs another shape there."""
    tile = dataclasses.replace(partials.TILES[major], descriptors=True)
    monkeypatch.setitem(partials.TILES, major, tile)
    (variant,) = launched(major, lambda: partials.vocabulary_partials([head()] * 2))
    kernel = variant.compiled()
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert not usage(kernel, tmp_path)[1]


def test_loads_are_asynchronous_and_wide():
    """The table's addresses lose the alignment that an argument has; without the hints nothing is pipelined."""
    for major, tile in partials.TILES.items():
        (variant,) = launched(major, lambda: partials.vocabulary_partials([head()] * 2))
        kernel = variant.compiled()
        copies = re.findall(r"cp\.async\.cg\.shared\.global .*?, (0x\w+)", kernel.asm["ptx"])
        assert copies and set(copies) == {"0x10"}, major
        stage = 2 * tile.block_d * (tile.block_t + tile.block_v)
        assert kernel.metadata.shared >= (tile.num_stages - 1) * stage, major


@pytest.mark.parametrize("major", ARCHITECTURES)
def test_float32_products_are_not_rounded_to_tf32(major):
    """TF32 keeps 10 bits of each factor: a thousand times float32's error, and no other test here would see it without a GPU."""
    for aligned in (True, False):
        (variant,) = launched(major, lambda: partials.vocabulary_partials([head(torch.float32, aligned=aligned)] * 2))  # noqa: B023
        ptx = variant.compiled().asm["ptx"]
        assert "fma.rn" in ptx and "tf32" not in ptx


def test_offsets_are_64_bits_wide():
    """T*V > 2^31: a head of 262144 x 8192 has 2^31 elements, and so have T x V tokens and words at T = 16384."""
    for variant in launched(9, launch_all):
        if variant.name == "virtual_reference_kernel" and variant.constant("FROM_LOGPS"):
            continue
        if variant.name == "partials_kernel" and variant.constant("HAS_TRANSFORM") is False:
            continue
        lines = [line for line in variant.compiled().asm["ttir"].splitlines() if re.search("tt.addptr.*tensor<", line)]
        wide = [line for line in lines if re.search(r", tensor<\w+xi64>", line)]
        # Offsets within one pair's K x 2 numbers, and none else, are 32 bits wide.
        small = [line for line in lines if re.search(r", tensor<([248]|[248]x2)xi32>", line)]
        assert wide and len(wide) + len(small) == len(lines), lines
