"""The doctor's findings for people: nodes, rates, problems, verdict."""

from collections.abc import Sequence

from cxr_dist.doctor.problems import Problem
from cxr_dist.doctor.report import NodeReport, RanksReport, figure

__all__ = ["table"]


def table(
    nodes: Sequence[NodeReport], ranks: RanksReport | None, problems: Sequence[Problem], notes: Sequence[str]
) -> str:
    """Lines for a terminal."""
    lines = []
    if nodes:
        lines += [*_columns([HEADS, *map(_node, nodes)]), ""]
    if nodes and (versions := _versions(nodes)):
        lines += [versions]
    if ranks and ranks.train_images_per_s:
        lines += [_ranks(ranks)]
    lines += [f"note: {note}" for note in notes]
    if lines and lines[-1]:
        lines.append("")
    if problems:
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
        lines += [f"NOT READY: {count}", *(f"  {problem.check}: {problem.sentence()}" for problem in problems)]
    else:
        lines.append("READY")
    return "\n".join(lines)


HEADS = (
    "node",
    "role",
    "CPUs",
    "GPUs",
    "CUDA, driver",
    "object store",
    "scratch free",
    "clock",
    "store read, write",
    "decode PNG, pixels",
)


def _node(node: NodeReport) -> tuple[str, ...]:
    kind = [word for word in (node.role or ("head" if node.is_head else ""), node.instance_type, node.market) if word]
    first = (node.name, " ".join(kind) or "-", f"{node.cpus:g}", _gpus(node))
    if node.error:
        return (*first, node.error)
    cuda, driver = node.versions.get("cuda"), node.versions.get("driver")
    read, write = node.store_read_bytes_per_s, node.store_write_bytes_per_s
    decode = node.decode_images_per_s
    return (
        *first,
        f"{cuda or '-'}, {driver or '-'}",
        _gb(node.object_store_bytes),
        _gb(node.scratch_free_bytes),
        "-" if node.clock_skew_s is None else f"{1e3 * node.clock_skew_s:+.0f} ms",
        "-" if read is None or write is None else f"{read / 1e6:,.0f}, {write / 1e6:,.0f} MB/s",
        f"{figure(decode['png'])}, {figure(decode['pixels'])} images/s" if len(decode) == 2 else "-",
    )


def _gpus(node: NodeReport) -> str:
    if not node.gpus and not node.gpu_names:
        return "0"
    names = ", ".join(sorted(set(node.gpu_names)))
    seen = "" if len(node.gpu_names) == node.gpus else f" (torch: {len(node.gpu_names)})"
    return f"{node.gpus}{seen} {names}".strip()


def _versions(nodes: Sequence[NodeReport]) -> str:
    """Versions that all answering nodes have; the others are among the problems."""
    up = [node.versions for node in nodes if node.versions]
    same = [
        f"{name} {up[0][name]}" for name in (up[0] if up else ()) if up[0][name] and len({v.get(name) for v in up}) == 1
    ]
    return f"on every node that answers: {', '.join(same)}" if same else ""


def _ranks(ranks: RanksReport) -> str:
    hosts = ", ".join(f"{ranks.hosts.count(host)} on {host}" for host in dict.fromkeys(ranks.hosts))
    line = (
        f"{len(ranks.hosts)} rank{'' if len(ranks.hosts) == 1 else 's'} ({hosts}): {figure(min(ranks.train_images_per_s))} images/s "
        f"each in training steps of {ranks.share}, {figure(min(ranks.prefix_images_per_s))} in the prefix alone, "
        f"{figure(min(ranks.tail_images_per_s))} from kept features"
    )
    if ranks.allreduce_bytes_per_s:
        milliseconds = 1e3 * ranks.gradient_bytes / ranks.allreduce_bytes_per_s
        line += (
            f"; all-reduce of {ranks.gradient_bytes / 1e6:.1f} MB of gradients over {ranks.backend} in {milliseconds:.3g} ms, "
            f"{ranks.allreduce_bytes_per_s / 1e6:,.0f} MB/s"
        )
    return line


def _gb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f} GB"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under one another; the last cell of a short one may be as long as it is."""
    widths = [0] * len(HEADS)
    for row in rows:
        for place, cell in enumerate(row if len(row) == len(HEADS) else row[:-1]):
            widths[place] = max(widths[place], len(cell))
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
