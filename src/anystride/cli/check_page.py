"""The kit's reports as one HTML page that opens without a network: tables, faults, pictures of layouts.

Style and script stand inside the page, pictures are SVG, and every word that came with a report is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files

import anystride
from anystride.cli.check_pictures import KINDS, picture, strides_in_words
from anystride.cli.check_summary import (
    FAMILIES,
    FAULTS,
    MEANINGS,
    READING,
    WORST_FIRST,
    Cell,
    Group,
    error_of,
    groups_of,
    layout_cell,
    layouts_by_family,
    left_out_of,
    place_of,
    probe_cell,
    probes_of,
    split,
    versions_of,
)
from anystride.testing import LAYOUTS
from anystride.testing.probes import PROBES
from anystride.testing.report import Finding, Report, Verdict

__all__ = ["page"]

TITLE = "Which kernels can be trusted with a layout"
ABOUT = (
    "Every kernel got the same calls of paged decode attention: each probe changes one thing, each layout is "
    "one that an engine uses or may use, with NaN wherever no row of K or V lies. The law is the same "
    "formula in float64; what may differ from it is what plain PyTorch differs."
)
ABOUT_CELLS = f"{READING} The grey part of an ok: the share that was refused. A dot: no call was made there."
ABOUT_PROBES = (
    "A plain call in which one thing is not as a kernel may have assumed. What fails here is named by its "
    "row. A cell opens its calls."
)
ABOUT_LAYOUTS = (
    "Calls of real models in every layout that holds their cache. Gaps and other layers are NaN; all else "
    "that may be poisoned has a probe of its own. A name leads to its picture."
)
ABOUT_PICTURES = (
    "A small cache in each layout. Memory is one tape, cut into lines, the first element of each at its "
    "left; t is a token, h a head. Strides are in elements, from the first element of K: nb blocks, bs "
    "tokens in a block, h heads, dk, dv, d the larger of them, r the MLA row, L layers, k blocks in a page, "
    "size bytes of an element, up(x, m) x rounded up to a multiple of m, far(n) a stride with which the last "
    "of n steps starts beyond 2<sup>31</sup> elements."
)
SECTIONS = {
    "kernels": "Kernels",
    "probes": "Probes",
    "layouts": "Layouts",
    "faults": "Wrong or crashed",
    "refusals": "Refused",
    "pictures": "Pictures",
}
FEW = 6  # kernels, with which a table need not be as wide as the page
MOST_UNFOLDED = 12  # faults of one kernel; more are folded


def page(reports: Sequence[Report]) -> str:
    """The whole page.

    Args:
        reports: Of any number of kernels and devices, absent kernels too, in the order of the columns.

    Returns:
        HTML, complete in itself.
    """
    present, absent = split(reports)
    room = files("anystride.cli")
    style, script = (room.joinpath(f"check_page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    families = layouts_by_family(present)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{TITLE}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # A data URL: otherwise a browser would ask for a favicon.
        '<link rel="icon" href="data:,">',
        f"<style>\n{style}</style>\n</head>\n<body>",
        _header(present),
        "<main>",
        _kernels(present, absent),
        _meanings(),
        _filter(present),
        _probes(present),
        _layouts(present, families),
        _faults(present),
        _refusals(present),
        _pictures(present, families),
        "</main>",
        f"<footer>Made by <code>anystride check</code>, anystride {escape(anystride.__version__)}.</footer>",
        '<dialog id="calls" aria-labelledby="calls-title"><button class="close">close</button><div></div>'
        "</dialog>",
        f'<script type="application/json" id="findings">{_data(present)}</script>',
        f"<script>\n{script}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _header(reports: Sequence[Report]) -> str:
    links = "".join(f'<a href="#{target}">{words}</a>' for target, words in SECTIONS.items())
    facts = "".join(
        f"<li>{escape(name)} <b>{escape(', '.join(versions))}</b></li>"
        for name, versions in versions_of(reports).items()
    )
    return (
        f'<header>\n<h1>{TITLE}</h1>\n<p>{ABOUT}</p>\n<ul class="facts">{facts}</ul>\n'
        f'<nav aria-label="Sections">{links}</nav>\n</header>'
    )


def _kernels(present: Sequence[Report], absent: Sequence[Report]) -> str:
    """A row for each kernel: version, and how many calls came to what."""
    heads = "".join(f'<th scope="col" class="number">{verdict.value}</th>' for verdict in WORST_FIRST)
    rows = []
    for report in present:
        cell = Cell(report.findings)
        counts = [(verdict, cell.counts[verdict]) for verdict in WORST_FIRST]
        numbers = "".join(
            f'<td class="number{"" if count else " zero"}">'
            + (f'<span class="verdict {verdict.value}">{count}</span>' if count else "0")
            + "</td>"
            for verdict, count in counts
        )
        bar = "".join(f'<i class="{v.value}" style="flex-grow:{n}"></i>' for v, n in counts if n)
        rows.append(
            f'<tr><th scope="row">{escape(report.title)}</th><td class="quiet">{escape(report.version)}</td>'
            f'{numbers}<td><div class="bar" aria-hidden="true">{bar}</div></td></tr>'
        )
    for report in absent:
        rows.append(
            f'<tr><th scope="row" class="quiet">{escape(report.title)}</th>'
            f'<td colspan="{len(WORST_FIRST) + 2}" class="quiet">absent: {escape(report.absent)}</td></tr>'
        )
    return (
        '<h2 id="kernels">Kernels</h2>\n<div class="scroll"><table class="kernels"><thead><tr>'
        f'<th scope="col">kernel</th><th scope="col">version</th>{heads}<th scope="col">share of calls</th>'
        f"</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n{_left_out(present)}"
    )


def _left_out(reports: Sequence[Report]) -> str:
    rows = "".join(
        f"<li>{escape(why)}: {escape(', '.join(titles))}</li>" for why, titles in left_out_of(reports).items()
    )
    return f"<details open><summary>Not tried</summary><ul>{rows}</ul></details>" if rows else ""


def _meanings() -> str:
    rows = "".join(f"<dt>{_verdict(v)}</dt><dd>{escape(MEANINGS[v])}</dd>" for v in Verdict)
    return f'<dl class="meanings">{rows}</dl>\n<p>{escape(ABOUT_CELLS)}</p>'


def _filter(reports: Sequence[Report]) -> str:
    every = Cell(tuple(finding for report in reports for finding in report.findings))
    boxes = "".join(
        f'<label><input type="checkbox" value="{verdict.value}" checked>{_verdict(verdict)}'
        f'<span class="quiet">{every.counts[verdict]}</span></label>'
        for verdict in WORST_FIRST
    )
    return f'<form class="filter" aria-label="Filter by verdict"><span>Show cells with</span>{boxes}</form>'


def _verdict(verdict: Verdict) -> str:
    return f'<span class="verdict {verdict.value}">{verdict.value}</span>'


def _probes(reports: Sequence[Report]) -> str:
    names = probes_of(reports)
    if not names:
        return ""
    about = {probe.name: probe.about for probe in PROBES}
    rows = [
        f'<tr data-probe="{escape(name)}"><th scope="row" title="{escape(about.get(name, ""))}">'
        f"{escape(name)}</th>"
        f"{_cells(reports, name, probe_cell)}</tr>"
        for name in names
    ]
    named = "".join(f"<dt>{escape(n)}</dt><dd>{escape(about[n])}</dd>" for n in names if n in about)
    return (
        f'<h2 id="probes">Probes: one thing alone</h2>\n<p>{ABOUT_PROBES}</p>\n'
        f"{_table('probe', reports, rows)}\n<details><summary>What a kernel does that fails a probe</summary>"
        f'<dl class="abouts">{named}</dl></details>'
    )


def _layouts(reports: Sequence[Report], families: dict[str, list[str]]) -> str:
    if not families:
        return ""
    rows = []
    for family, names in families.items():
        rows.append(
            f'<tr class="family"><th scope="rowgroup" colspan="{len(reports) + 1}">'
            f"<span>{escape(FAMILIES[family])}</span></th></tr>"
        )
        for name in names:
            link = escape(name)
            if name in LAYOUTS:
                link = f'<a href="#layout-{link}" title="{escape(LAYOUTS[name].users)}">{link}</a>'
            rows.append(
                f'<tr data-layout="{escape(name)}"><th scope="row">{link}</th>'
                f"{_cells(reports, name, layout_cell)}</tr>"
            )
    return f'<h2 id="layouts">Layouts</h2>\n<p>{ABOUT_LAYOUTS}</p>\n' + _table("layout", reports, rows)


def _table(heading: str, reports: Sequence[Report], rows: Iterable[str]) -> str:
    few = " few" if len(reports) <= FEW else ""
    heads = "".join(
        f'<th scope="col">{escape(report.title)}'
        f"{f'<small>{escape(report.version)}</small>' if report.version else ''}</th>"
        for report in reports
    )
    return (
        f'<div class="scroll{few}" tabindex="0" role="region" aria-label="{heading}s and kernels">'
        f'<table class="cells"><thead><tr><th scope="col">{heading}</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _cells(reports: Sequence[Report], name: str, cell_of: Callable[[Report, str], Cell | None]) -> str:
    cells = []
    for number, report in enumerate(reports):
        cell = cell_of(report, name)
        if cell is None:
            cells.append('<td class="none"><span aria-label="no call">·</span></td>')
            continue
        label = escape(f"{report.title}, {name}: {cell.spoken}")
        share = f"<small>{cell.share}</small>" if cell.share else ""
        part = ""
        if cell.verdict is Verdict.OK and cell.share:
            part = f' style="--share:{cell.counts[Verdict.OK] / len(cell.findings):.0%}"'
        verdicts = " ".join(verdict.value for verdict in WORST_FIRST if cell.counts[verdict])
        cells.append(
            f'<td class="{cell.verdict.value}" data-verdicts="{verdicts}"{part}>'
            f'<button type="button" data-kernel="{number}" aria-label="{label}" '
            f'title="{escape(cell.spoken)}">'
            f"{cell.verdict.value}{share}</button></td>"
        )
    return "".join(cells)


def _faults(reports: Sequence[Report]) -> str:
    parts = []
    for report in reports:
        groups = groups_of(report, *FAULTS)
        if groups:
            count = sum(len(group.findings) for group in groups)
            inside = "\n".join(_group(group, _places(group.findings)) for group in groups)
            unfolded = " open" if count <= MOST_UNFOLDED else ""
            parts.append(
                f"<details{unfolded}><summary>{escape(report.title)} "
                f'<span class="quiet">{count} wrong or crashed</span></summary>\n{inside}</details>'
            )
    said = "\n".join(parts) or "<p>Nothing was wrong, and nothing crashed.</p>"
    return f'<h2 id="faults">Wrong or crashed</h2>\n{said}'


def _refusals(reports: Sequence[Report]) -> str:
    parts = []
    for report in reports:
        groups = groups_of(report, Verdict.REFUSED)
        if groups:
            count = sum(len(group.findings) for group in groups)
            inside = "\n".join(_group(group, _places(group.findings)) for group in groups)
            parts.append(
                f"<details><summary>{escape(report.title)} "
                f'<span class="quiet">{count} refused, {len(groups)} message{"s" * (len(groups) > 1)}</span>'
                f"</summary>\n{inside}</details>"
            )
    said = "\n".join(parts) or "<p>Nothing was refused.</p>"
    return f'<h2 id="refusals">Refused, in the kernels\' own words</h2>\n{said}'


def _group(group: Group, places: str) -> str:
    calls = len(group.findings)
    count = f"{calls} call{'s' * (calls > 1)}{', with other numbers' if group.alike else ''}"
    message = f'<div class="message">{escape(group.message)}</div>' if group.message else ""
    return (
        f'<div class="group">{_verdict(group.verdict)} <span class="quiet">{count}</span>'
        f"{message}{places}</div>"
    )


def _places(findings: Sequence[Finding]) -> str:
    """What was asked; each in a row of its own where there is more to say of it."""
    if not any(finding.where or error_of(finding) for finding in findings):
        places = "; ".join(dict.fromkeys(map(place_of, findings)))
        return f'<div class="quiet">{escape(places)}</div>'
    rows = "".join(
        f'<tr><td>{escape(place_of(finding))}</td><td class="where">{escape(finding.where)}</td>'
        f'<td class="number">{escape(error_of(finding))}</td></tr>'
        for finding in findings
    )
    return f'<div class="wide"><table class="findings"><tbody>{rows}</tbody></table></div>'


def _pictures(reports: Sequence[Report], families: dict[str, list[str]]) -> str:
    names = {family: [name for name in group if name in LAYOUTS] for family, group in families.items()}
    if not any(names.values()):
        return ""
    hatch = (
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs><pattern id="hatch" '
        'width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5"/><path d="M0 0V5"/></pattern></defs></svg>'
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 18 12" aria-hidden="true"><path class="{kind}" d="M0 0h18v12h-18z"/></svg>'
        f"{meaning}</li>"
        for kind, meaning in KINDS.items()
    )
    parts = [
        f'<h2 id="pictures">Where the data lie</h2>\n{hatch}<p>{ABOUT_PICTURES}</p>\n'
        f'<ul class="legend">{legend}</ul>'
    ]
    for family, group in names.items():
        if group:
            figures = "\n".join(_figure(reports, name) for name in group)
            parts.append(f'<h3>{escape(FAMILIES[family])}</h3>\n<div class="pictures">\n{figures}\n</div>')
    return "\n".join(parts)


def _figure(reports: Sequence[Report], name: str) -> str:
    layout = LAYOUTS[name]
    strides = "".join(
        f"<div><dt>{escape(of)}</dt> <dd>{escape(f'{formula} = {length}' if formula else length)}</dd></div>"
        for of, formula, length in strides_in_words(layout)
    )
    came = []
    for report in reports:
        cell = layout_cell(report, name)
        if cell is not None:
            text = f'<span class="verdict {cell.verdict.value}">{cell.text}</span>'
            came.append(f"<li>{escape(report.title)} {text}</li>")
    return (
        f'<figure id="layout-{escape(name)}"><figcaption><h4>{escape(name)}</h4>'
        f'<p>{escape(layout.description)}</p><p class="quiet">{escape(layout.users)}</p></figcaption>'
        f'{picture(layout)}<dl class="strides">{strides}</dl><ul class="came">{"".join(came)}</ul></figure>'
    )


def _data(reports: Sequence[Report]) -> str:
    """All findings for the script, as JSON that cannot end its element; equal messages stand there once."""
    texts: dict[str, int] = {"": 0}
    kernels = []
    for report in reports:
        findings = [
            [
                finding.probe,
                finding.layout,
                finding.case,
                finding.verdict.value,
                texts.setdefault(finding.message, len(texts)),
                finding.where,
                _numbers(finding),
            ]
            for finding in report.findings
        ]
        kernels.append({"title": report.title, "findings": findings})
    text = json.dumps({"texts": list(texts), "kernels": kernels}, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _numbers(finding: Finding) -> str:
    copied = f"{finding.copied_bytes / 1e6:.1f} MB copied" if finding.copied_bytes else ""
    took = f"{finding.seconds:.1f} s" if finding.seconds >= 0.05 else ""
    return "; ".join(filter(None, (error_of(finding), copied, took)))
