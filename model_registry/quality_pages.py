"""A quality report for people: one HTML file that needs no network, and plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from model_registry.quality_plot import plot
from model_registry.quality_report import ArtefactQuality, Point, QualityReport, choice_sentences, sentence

_STYLE = """
:root{color-scheme:light dark;--ink:#14242b;--soft:#536770;--ground:#fff;--line:#d5dedf;--sea:#0b6b7a;--bad:#a32a23}
@media(prefers-color-scheme:dark){:root{--ink:#e6edef;--soft:#9fb0b7;--ground:#162125;--line:#2d3c42;--sea:#58bfce;
--bad:#ff9d93}
}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);max-width:72rem;margin:0 auto;
padding:1.5rem}
h1{font-size:1.6rem}
h2{font-size:1.15rem;margin-top:2rem}
code{font-size:.88em;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.45rem .7rem;border-top:1px solid var(--line)}
thead th,caption,.soft{color:var(--soft);font-weight:500}
td:last-child{min-width:13rem}
caption{text-align:left;padding:.3rem .7rem}
.failed-word{color:var(--bad);font-weight:600}
.tradeoff{width:100%;max-width:48rem;height:auto}
.tradeoff text{font-size:12px;fill:var(--soft)}
.tradeoff .name{fill:var(--ink)}
.grid-line{stroke:var(--line)}
.front{fill:none;stroke:var(--sea);stroke-width:2}
.mark{fill:var(--ground);stroke:var(--sea);stroke-width:2}
.mark.published{fill:var(--sea)}
.mark.failed{stroke:var(--bad);fill:none}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}
dt{color:var(--soft)}
dd{margin:0}
@media print{body{max-width:none}
}
"""


def render_html(report: QualityReport) -> str:
    """The report as one self-contained HTML page: no scripts, no links to anything else."""
    body = [
        f"<h1>{escape(report.name)}: quality of its artefacts</h1>",
        f'<p class="soft">{escape(report.kind)} model, source <code>{escape(report.source_digest)}</code></p>',
        "<h2>Artefacts by target</h2>",
        _table(("Target", "Runtime", "Precision", "Size (MB)", "Gates"), [_artefact_row(a) for a in report.artefacts]),
        "<h2>Size, latency and accuracy</h2>",
        plot(report.points, report.name) or "<p>No artefact has an accuracy gate: there is nothing to plot.</p>",
        _points_table(report.points),
        "<h2>Gates</h2>",
        *(_gates(artefact) for artefact in report.artefacts),
        "<h2>Provenance</h2>",
        *(_provenance(artefact) for artefact in report.artefacts),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: quality report</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def render_text(report: QualityReport) -> str:
    """The report for a terminal: one block per target, then the trade-offs."""
    lines = [f"{report.name} ({report.kind}), source {report.source_digest[:12]}"]
    for artefact in report.artefacts:
        lines.append("")
        if artefact.error is not None:
            lines.append(f"{artefact.target}: not published: {artefact.error}")
        else:
            size = f"{artefact.size_bytes / 1e6:.1f} MB"
            lines.append(f"{artefact.target}: {artefact.precision} for {artefact.runtime}, {size}")
        lines += [f"  {'ok  ' if gate.passed else 'FAIL'} {sentence(gate)}" for gate in artefact.gates]
        if artefact.runtime_choice is not None:
            lines += [f"  run  {told}" for told in choice_sentences(artefact.runtime_choice)]
        lines += [f"  note {note}" for note in artefact.notes]
    if report.points:
        lines += ["", f"{'size MB':>9} {'accuracy':>9} {'ms':>8}  what"]
        lines += [
            f"{p.size_bytes / 1e6:9.2f} {p.accuracy:9.4f} {_number(p.latency_ms):>8}  {p.label}{_remark(p)}"
            for p in report.points
        ]
    return "\n".join(lines) + "\n"


def _artefact_row(artefact: ArtefactQuality) -> tuple[str, ...]:
    if artefact.error is not None:
        verdict = f'<span class="failed-word">not published</span>: {escape(artefact.error)}'
    else:
        passed = sum(gate.passed for gate in artefact.gates)
        verdict = f"{passed} of {len(artefact.gates)} held"
    size = f"{artefact.size_bytes / 1e6:.1f}" if artefact.size_bytes else "–"
    return (escape(artefact.target), escape(artefact.runtime), escape(artefact.precision), size, verdict)


def _points_table(points: Sequence[Point]) -> str:
    if not points:
        return ""
    rows = [
        (
            escape(p.label),
            f"{p.size_bytes / 1e6:.2f}",
            _number(p.latency_ms),
            f"{p.accuracy:.4f}",
            escape(_remark(p).strip(" ,") or "–"),
        )
        for p in points
    ]
    return _table(("What", "Size (MB)", "Latency (ms)", "Accuracy", "Remark"), rows, "The figures of the plot")


def _remark(point: Point) -> str:
    words = [
        "published" if point.is_published else "tried",
        "on the front" if point.is_on_front else "",
        "" if point.holds else "gates did not hold",
    ]
    return ", " + ", ".join(word for word in words if word)


def _gates(artefact: ArtefactQuality) -> str:
    rows = [
        (
            escape(gate.name),
            f"{gate.value:.5g}" if abs(gate.value) < 1e308 else "not a number",
            f"{'≤' if gate.sense == '<=' else '≥'} {gate.limit:.5g}",
            "held" if gate.passed else '<span class="failed-word">failed</span>',
            escape(sentence(gate)),
        )
        for gate in artefact.gates
    ]
    return _table(("Gate", "Figure", "Limit", "Verdict", "In words"), rows, artefact.target) if rows else ""


def _provenance(artefact: ArtefactQuality) -> str:
    facts = {
        "manifest": artefact.manifest,
        "recipe": artefact.recipe_digest or "",
        "reproducibility": artefact.reproducibility or "",
        "tools": ", ".join(f"{name} {version}" for name, version in sorted(artefact.tools.items())),
        "runtime": " ".join(choice_sentences(artefact.runtime_choice)) if artefact.runtime_choice else "",
        "notes": "; ".join(artefact.notes),
    }
    entries = "".join(f"<dt>{name}</dt><dd><code>{escape(text)}</code></dd>" for name, text in facts.items() if text)
    return f"<h3>{escape(artefact.target)}</h3><dl>{entries}</dl>" if entries else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
