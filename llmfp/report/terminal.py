"""Tables for a terminal of 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llmfp.architecture.specs import ROLES, Role
from llmfp.checkpoint import TensorSpec
from llmfp.fingerprint import Fingerprint, TowerFingerprint
from llmfp.plan import Plan
from llmfp.report import printable

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STEPS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH, _NARROW_BAR_WIDTH = 8, 4


def fingerprint_table(fingerprint: Fingerprint) -> str:
    """One row per layer, σ of each role with a bar relative to the column's largest; then where it comes from."""
    lines = [_headline(fingerprint)]
    for name, tower in fingerprint.towers.items():
        lines += ["", *_tower_rows(name, tower, titled=len(fingerprint.towers) > 1)]
    lines += ["", *_run_lines(fingerprint)]
    if fingerprint.sample is not None:
        lines += ["", *_sample_lines(fingerprint)]
    lines += [f"caveat: {caveat}" for caveat in fingerprint.caveats]
    return "\n".join(map(printable, lines))


def _sample_lines(fingerprint: Fingerprint) -> list[str]:
    """How far σ may be off, per role: half of the interval's width, in percent of σ."""
    lines = []
    for name, tower in fingerprint.towers.items():
        for role, column in tower.interval.items():
            widths = [100 * (high - low) / (high + low) for low, high in filter(None, column) if high > low]
            if widths:
                where = f"{role.upper()} of the {name} tower" if len(fingerprint.towers) > 1 else role.upper()
                lines.append(f"σ {where}: within {min(widths):.1f} to {max(widths):.1f} % with 95 % confidence each")
    return lines


def plan_line(plan: Plan) -> str:
    """The plan in one line."""
    pieces = "reads" if plan.fetched is None else "requests"
    return (
        f"plan: {plan.attention.family}, {len(plan.tasks)} tensors, {size(plan.step_bytes)} in {plan.requests} "
        f"{pieces}, {plan.threads} threads, at most {size(plan.needed_bytes)} memory"
    )


def plan_table(plan: Plan) -> str:
    """What is read, in order; what is skipped, by pattern; totals."""
    lines = [plan_line(plan)]
    tower = None
    for task in plan.tasks:
        if task.tower != tower:
            lines += ["", f"layer  {task.tower:<9} {'bytes':>15}  tensor"]
            tower = task.tower
        roles = "".join(str(p.role).upper() for p in task.projections) + (" twice" if task.second_read else "")
        lines.append(f"{task.layer:>5}  {roles:<9} {task.nbytes:>15,}  {task.tensor.name} ({_stored_as(task.tensor)})")
    lines += ["", f"skipped {'bytes':>25}  pattern"]
    lines += [
        f"{each['count']:>7,} {each['bytes']:>25,}  {each['pattern']} ({each['reason']})" for each in plan.skipped
    ]
    stored = sum(shard.nbytes for shard in plan.checkpoint.shards)
    lines += [
        "",
        f"reads {plan.total_bytes:,} of {stored:,} bytes ({100 * plan.total_bytes / max(stored, 1):.1f} %):",
        f"attention {plan.attention_bytes:,}, again for LayerNorm {plan.second_read_bytes:,}, "
        f"norm gains {plan.gain_bytes:,}, biases {plan.bias_bytes:,}, headers {plan.header_bytes:,}, "
        f"scales {plan.scale_bytes:,}, adapter {plan.adapter_bytes:,}",
    ]
    if plan.fetched is not None:
        lines.append(
            f"in {plan.requests:,} requests after those for headers, gaps between neighbours {plan.gap_bytes:,}"
        )
    if plan.sample is not None:
        share = 100 * plan.step_bytes / max(plan.attention_bytes, 1)
        lines.append(f"a sample: {plan.step_bytes:,} bytes of attention ({share:.1f} %) are read")
    lines += [f"caveat: {caveat}" for caveat in (*plan.checkpoint.caveats, *plan.attention.caveats)]
    return "\n".join(map(printable, lines))


def _stored_as(tensor: TensorSpec) -> str:
    """A tensor's dtype or encoding, and what an adapter adds to it."""
    stored = tensor.stored_as
    return stored if tensor.lora is None else f"{stored} + adapter of rank {tensor.lora.a.shape[0]}"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A character per value, from the lowest to the highest in eight steps; a point where there is none.

    More values than `width` are thinned out evenly. Plain digits 1 to 8 where the terminal has no Unicode.
    """
    if len(values) > width:
        values = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)]
    known = [v for v in values if v is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    steps = _STEPS if _unicode() else "12345678"
    return "".join(
        "." if v is None else steps[round(7 * (v - low) / (high - low)) if high > low else 3] for v in values
    )


def size(nbytes: int) -> str:
    """A number of bytes in decimal units, three digits."""
    power = min(4, max(0, (len(str(nbytes)) - 1) // 3))
    return f"{nbytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _headline(fingerprint: Fingerprint) -> str:
    main = fingerprint.main
    heads = "heads unknown" if main.heads is None else f"{main.heads} heads of {main.head_dim}"
    heads += "" if main.kv_heads is None else f", {main.kv_heads} kv"
    return (
        f"{fingerprint.source['name']}: {fingerprint.architecture}, {len(main.layers)} layers, "
        f"hidden {main.hidden_size}, {heads}"
    )


def _tower_rows(name: str, tower: TowerFingerprint, *, titled: bool) -> list[str]:
    """σ of the roles that the tower has: Q, K, V, O, or, with narrower bars, the factors of latent attention."""
    stds = tower.std | {role: both["std"] for role, both in tower.roles.items() if role in map(str, Role)}
    columns = {role: column for role, column in stds.items() if any(tower.statistics[role])}
    largest = {role: max((s for s in column if s is not None), default=0.0) for role, column in columns.items()}
    width = _BAR_WIDTH if len(columns) <= len(ROLES) else _NARROW_BAR_WIDTH
    cell = 9 + 1 + width
    lines = [f"{name} tower"] if titled else []
    lines.append("layer" + "".join(f"{'σ ' + role.upper():>9} {'':{width}}" for role in columns).rstrip())
    for row, layer in enumerate(tower.layers):
        cells = [_cell(columns[role][row], largest[role], width) for role in columns]
        lines.append(f"{layer:>5}" + "".join(f"{text:<{cell}}" for text in cells).rstrip())
    return lines


def _cell(std: float | None, largest: float, width: int) -> str:
    if std is None:
        return f"{'-':>9}"
    number = f"{std:>9.6f}" if std == 0 or 1e-3 <= std < 100 else f"{std:>9.2e}"
    return f"{number} {_bar(std / largest if largest else 0.0, width)}"


def _bar(share: float, width: int) -> str:
    """A horizontal bar; plain characters where the terminal has no Unicode."""
    if not _unicode():
        return "#" * round(share * width)
    full, part = divmod(round(share * width * 8), 8)
    return (_EIGHTHS[8] * full + _EIGHTHS[part]).rstrip()


def _unicode() -> bool:
    return (sys.stdout.encoding or "").lower().startswith("utf")


def _run_lines(fingerprint: Fingerprint) -> list[str]:
    run = fingerprint.run
    seconds = float(run["seconds"])
    rate = run["bytes_read"] / seconds / 1e9 if seconds else 0.0
    return [
        f"read {size(run['bytes_read'])} of {size(run['bytes_total'])} in {seconds:.2f} s, {rate:.2f} GB/s; "
        f"peak memory {size(run['peak_rss_bytes'])}",
        f"by {run['backend']} ({run['simd']}), {run['reader']}, {run['threads']} threads",
        f"digest {fingerprint.digest}",
    ]
