"""An estimate for people: tables for the terminal and a picture of the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mrpo_scale.base.gpus import GIB
from mrpo_scale.base.tables import aligned_table
from mrpo_scale.planner.cluster import Cluster
from mrpo_scale.planner.estimate import Estimate
from mrpo_scale.planner.job import Job, PlannedModel, Setting
from mrpo_scale.reports.pictures import PALETTE

KINDS = {
    "parameters": "policy weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "references": "references",
    "gathered": "gathered weights",
    "activations": "activations",
    "recomputed layer": "one layer again",
    "head": "output head",
    "step": "float32 gradients",
}


def assumptions(cluster: Cluster) -> str:
    """What every figure in seconds rests on."""
    a = cluster.assumed
    lines = [
        "Seconds are a roofline, not a measurement. Assumed, since this project had no GPU to measure them:",
        f"{a.matmul:.0%} of the data sheet's FLOP/s in matrix products and {a.attention:.0%} in attention,",
        f"{a.memory:.0%} of the memory bandwidth, {a.links:.0%} of a link's rate, {a.node_hop * 1e6:g} and "
        f"{a.network_hop * 1e6:g} microseconds a hop inside a node and between nodes,",
        f"{a.host_memory / GIB:.0f} GiB of host memory for each device, gathers hidden behind arithmetic where overlap_comm is on.",
        "Bytes held and FLOPs are counted, and agree with real runs on a CPU (docs/performance.md).",
        "Cached, MRPO does the work of DPO: no reference is loaded.",
    ]
    return "\n".join(lines)


def setting_in_words(setting: Setting, accumulation: int) -> str:
    """As keys of a recipe."""
    words = [
        f"per_device_train_batch_size: {setting.micro_batch}",
        f"gradient_accumulation_steps: {accumulation}",
        f"gradient_checkpointing: {str(setting.checkpointing).lower()}",
        f"ds_config: {setting.zero.name}",
    ]
    if setting.max_tokens is not None:
        words.insert(0, f"max_tokens_per_micro_batch: {setting.max_tokens}")
    if setting.sequence_parallel > 1:
        words.append(f"sequence_parallel_size: {setting.sequence_parallel}")
    if setting.live:
        size = "ranks of a node" if setting.shard_size is None else setting.shard_size
        words += [f"ref_placement: {setting.placement}", f"ref_shard_size: {size}"]
        words += ["ref_offload: true"] * setting.offload
    else:
        words.append("references cached")
    return ", ".join(words)


def plans_list(plans: Sequence[Estimate]) -> str:
    """A line for each, the cheapest first."""
    return "\n  then: ".join(
        f"{plan.seconds:.3g} s a step, {plan.peak / GIB:.1f} GiB, MFU {plan.mfu:.0%}: "
        f"{setting_in_words(plan.setting, plan.accumulation)}"
        for plan in plans
    )


def models_table(job: Job) -> str:
    """The models of the run, the policy first."""
    header = ("model", "type", "parameters", "bytes each", "forward")
    rows = []
    references = [(m.size.name, m.size, _beside(m, job)) for m in job.references]
    for name, size, beside in [("policy", job.policy, ""), *references]:
        way = "shared prompt" if size.shared_prompt else "two sequences per pair"
        rows.append(
            (
                name,
                size.model_type,
                f"{size.parameters:,}",
                str(size.itemsize) + (f", linear layers {size.quantize}" if size.quantize else "") + beside,
                f"{way}, {size.costs.attn_implementation}",
            )
        )
    return aligned_table(header, rows)


def _beside(model: PlannedModel, job: Job) -> str:
    adapter = ", with an adapter" if model.adapter_bytes else ""
    return adapter + (
        "" if model.shares_with is None else f", weights of {job.references[model.shares_with].size.name}"
    )


def memory_table(estimates: Mapping[str, Estimate]) -> str:
    """GiB of the fullest rank by kind, a column for each estimate."""
    rows = []
    for kind in ("parameters", "gradients", "optimizer", "references"):
        rows.append((KINDS[kind], *(_gib(e.held.get(kind, 0)) for e in estimates.values())))
    for moment in ("scoring", "forward and backward", "optimizer step"):
        for kind in ("gathered", "activations", "recomputed layer", "head", "step"):
            values = [e.moments.get(moment, {}).get(kind, 0) for e in estimates.values()]
            if any(values):
                rows.append((f"{moment}: {KINDS[kind]}", *map(_gib, values)))
    rows.append(("most at once", *(_gib(e.peak) for e in estimates.values())))
    some = next(iter(estimates.values()))
    if any(e.host for e in estimates.values()):
        rows.append(("in host memory", *(_gib(sum(e.host.values())) for e in estimates.values())))
    fits = ("yes" if e.fits else "NO" for e in estimates.values())
    rows.append((f"fits, {some.cluster.usable / GIB:.1f} GiB usable", *fits))
    return aligned_table(("GiB per rank", *estimates), rows)


def time_table(estimates: Mapping[str, Estimate]) -> str:
    """Seconds by phase, bytes by link, FLOPs, and each against the first column."""
    names = list(dict.fromkeys(phase.name for e in estimates.values() for phase in e.phases))
    found = [{phase.name: phase for phase in e.phases} for e in estimates.values()]
    rows = []
    for name in names:
        rows.append(
            (
                f"{name}, s",
                *(_seconds(phases[name].seconds) + _bound(phases[name]) if name in phases else "-" for phases in found),
            )
        )
    rows.append(("step, s", *(_seconds(e.seconds) for e in estimates.values())))
    for source in ("references", "policy"):
        for link, label in (("node_bytes", "links of a node"), ("network_bytes", "network")):
            values = [getattr(e.traffic[source], link) if source in e.traffic else 0 for e in estimates.values()]
            if any(values):
                rows.append((f"GB received by a rank, {source}, {label}", *(f"{v / 1e9:.2f}" for v in values)))
    rows.append(("PFLOP of a step, policy", *(f"{e.policy_flops / 1e15:.4g}" for e in estimates.values())))
    rows.append(("PFLOP of a step, references", *(f"{e.reference_flops / 1e15:.4g}" for e in estimates.values())))
    rows.append(("balance of ranks, mean over slowest", *(f"{e.efficiency:.1%}" for e in estimates.values())))
    rows.append(("MFU of the policy's useful FLOPs", *(f"{e.mfu:.1%}" for e in estimates.values())))
    first = next(iter(estimates.values()))
    rows.append(("time against the first column", *(f"{e.seconds / first.seconds:.3f}" for e in estimates.values())))
    rows.append(("FLOPs against it (the floor)", *(f"{e.flops / first.flops:.3f}" for e in estimates.values())))
    return aligned_table(("step", *estimates), rows)


def plot_memory(estimates: Mapping[str, Estimate], path: Path) -> None:
    """Stacked bars of the fullest rank at its worst moment, against what the device has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 1.9 * len(estimates), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {kind: (*PALETTE, "#999999", "#BBBB44")[i] for i, kind in enumerate(KINDS)}
    labelled: set[str] = set()
    for i, e in enumerate(estimates.values()):
        bottom = 0.0
        for kind, size in [*e.held.items(), *e.moments[e.moment].items()]:
            if size:
                label = None if kind in labelled else KINDS[kind]
                axes.bar(i, size / GIB, 0.6, bottom=bottom, color=colours[kind], label=label)
                labelled.add(kind)
                bottom += size / GIB
        axes.text(i, bottom, _gib(bottom * GIB), ha="center", va="bottom", fontsize=9)
    some = next(iter(estimates.values()))
    usable, most = some.cluster.usable / GIB, max(e.peak for e in estimates.values()) / GIB
    if most > usable / 4:  # else the bars would be a line at the bottom
        axes.axhline(usable, color="#444444", linestyle=":", linewidth=1)
        most = max(most, usable)
    axes.set_title(
        f"{usable:.1f} of a {some.cluster.name}'s {some.cluster.gpu.memory / GIB:.0f} GiB are usable", fontsize=10
    )
    axes.set_xticks(range(len(estimates)), [f"{name}\n({e.moment})" for name, e in estimates.items()], fontsize=8)
    axes.set_ylabel("GiB on the fullest rank at its worst moment", fontsize=9)
    axes.set_ylim(0, 1.12 * most)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def as_json(e: Estimate) -> dict[str, Any]:
    """Every number of an estimate."""
    return {
        "setting": {
            "per_device_train_batch_size": e.setting.micro_batch,
            "gradient_accumulation_steps": e.accumulation,
            "max_tokens_per_micro_batch": e.setting.max_tokens,
            "gradient_checkpointing": e.setting.checkpointing,
            "ds_config": e.setting.zero.name,
            "sequence_parallel_size": e.setting.sequence_parallel,
            "ref_placement": e.setting.placement,
            "ref_shard_size": e.setting.shard_size,
            "ref_offload": e.setting.offload,
            "references": "live" if e.setting.live else "cached",
        },
        "device_bytes": {"held": dict(e.held), **{name: dict(kinds) for name, kinds in e.moments.items()}},
        "host_bytes": dict(e.host),
        "peak_bytes": e.peak,
        "usable_bytes": int(e.cluster.usable),
        "fits": e.fits,
        "seconds": {
            "step": e.seconds,
            **{phase.name: {**asdict(phase), "seconds": phase.seconds} for phase in e.phases},
        },
        "received_bytes_per_rank": {name: traffic._asdict() for name, traffic in e.traffic.items()},
        "flops": {"policy": e.policy_flops, "references": e.reference_flops, "useful": e.useful_flops},
        "mfu": e.mfu,
        "balance": e.efficiency,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB or not size else f"{size / GIB:.2g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}"


def _bound(phase: Any) -> str:
    """What the phase waits for."""
    computing = phase.products + phase.elementwise
    return " (links)" if phase.links > computing else ""
