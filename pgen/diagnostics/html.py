"""A report as one self-contained page: no network, no script, pictures inline."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING, Any

from .claims import CLAIMS, OF_LATENTS, Claim
from .figures import evidence_figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .report import Report

__all__ = ["page"]

_MOST_PARAMETERS = 40
_WIDE = 8.0  # inches from which a picture takes the whole width, or its letters become small

_COLUMNS = {
    "name": "latent",
    "q_mean": "mean, raw q",
    "psis_mean": "mean, PSIS",
    "psis_mcse": "± Monte Carlo error",
    "q_sd": "sd, raw q",
    "psis_sd": "sd, PSIS",
    "khat": "k-hat of the mean",
}

_STYLE = """
:root{--ink:#1d2433;--soft:#5b6475;--line:#e3e7ee;--paper:#fff;--ground:#f5f7fa;
--supported:#1b7f4d;--contradicted:#b3261e;--undecided:#9a6700;--not_measured:#687182}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:960px;margin:0 auto;padding:32px 20px 56px}
h1{font-size:1rem;font-weight:600;color:var(--soft);margin:0 0 12px}
h2{font-size:1.15rem;margin:40px 0 14px}
.verdict{background:var(--paper);border:1px solid var(--line);border-left:6px solid var(--tone);border-radius:10px;
padding:20px 22px}
.verdict strong{display:block;font-size:1.45rem;line-height:1.3;color:var(--tone)}
.verdict p{margin:8px 0 0;color:var(--soft)}
.verdict p b{color:var(--ink);font-weight:600}
.about{color:var(--soft);font-size:.85rem;margin:12px 2px 0}
.claims{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:14px}
.claim{background:var(--paper);border:1px solid var(--line);border-top:4px solid var(--tone);border-radius:10px;
padding:16px 18px}
.claim h3{margin:0;font-size:1.02rem;line-height:1.35}
.claim h3 small{color:var(--soft);font-weight:400;margin-right:.35em}
.status{display:inline-block;margin:6px 0 10px;padding:1px 11px;border-radius:99px;background:var(--tone);color:#fff;
font-size:.8rem;font-weight:600}
.estimate{font-size:1.6rem;font-weight:600;line-height:1.2;font-variant-numeric:tabular-nums}
.estimate span{font-size:.9rem;font-weight:400;color:var(--soft);white-space:nowrap}
.claim p{margin:8px 0 0;font-size:.92rem;overflow-wrap:anywhere}
.claim .statistic,.claim .blind{color:var(--soft);font-size:.85rem}
.supported{--tone:var(--supported)}.contradicted{--tone:var(--contradicted)}
.undecided{--tone:var(--undecided)}.not_measured{--tone:var(--not_measured)}
.scroll{overflow-x:auto;background:var(--paper);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:8px 14px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:.8rem}
th:first-child,td:first-child{text-align:left}
td.amber{color:var(--undecided);font-weight:600}
td.wide{text-align:left;white-space:normal}
tr:last-child td{border-bottom:0}
figure{margin:0 0 14px;background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:14px}
figure img{display:block;width:100%;max-width:720px;height:auto;margin:0 auto}
figure img.wide{max-width:none}
figcaption{font-weight:600;font-size:.95rem;margin:0 0 8px}
.note{color:var(--soft);font-size:.85rem;margin:8px 2px}
@media(max-width:520px){main{padding:18px 12px 40px}.verdict strong{font-size:1.2rem}th,td{padding:7px 10px}}
@media print{body{background:#fff}.claim,figure,.verdict{break-inside:avoid}}
"""


def page(report: Report, figures: dict[str, Figure]) -> str:
    """The whole page; every text that a user or a model may have written is escaped."""
    drawn = evidence_figures(report.evidence, report.evidence.run) if report.evidence is not None else {}
    pictures = "".join(_picture(title, figure) for title, figure in {**drawn, **figures}.items())
    built = [claim for claim in report.rows if CLAIMS[claim.number].level == "quick" or claim.status != "not_measured"]
    rest = [claim for claim in report.rows if claim not in built]
    fitted = report.evidence.fitted if report.evidence is not None else None
    limit = float(fitted.good_k) if fitted is not None else math.nan
    sections = [
        _verdict(report),
        f'<section class="claims" aria-label="claims">{"".join(map(_card, built))}</section>',
        f"<h2>Latents, by raw q and by its weights</h2>{_parameters(report.parameters, limit)}"
        if len(report.parameters)
        else "",
        f"<h2>Pictures</h2>{pictures}" if pictures else "",
        f"<h2>Not checked</h2>{_unchecked(rest)}" if rest else "",
        _glossary(latents=any(claim.number in OF_LATENTS for claim in report.rows)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>pgen report</title>'
        f"<style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    head, *rest = report.overall.split("; ")
    tones = {"problem found": "contradicted", "no problem found by": "supported"}
    tone = tones.get(head.split(":")[0], "undecided")
    lines = "".join(f"<p>{_labelled(line)}</p>" for line in rest)
    return (
        f'<h1>pgen report</h1><div class="verdict {tone}"><strong>{_capital(head)}</strong>{lines}</div>'
        f'<p class="about">{escape("; ".join(report.about))}</p><h2>Claims</h2>'
    )


def _labelled(line: str) -> str:
    label, _, text = line.partition(": ")
    return f"<b>{_capital(label)}:</b> {escape(text)}"


def _capital(text: str) -> str:
    return escape(text[:1].upper() + text[1:])


def _card(claim: Claim) -> str:
    from .report import show

    interval = "" if claim.ci_low != claim.ci_low else f" <span>95 %: {show(claim.ci_low)} to {show(claim.ci_high)}</span>"
    numbers = (
        f'<div class="estimate">{show(claim.estimate)}{interval}</div>'
        f'<p class="statistic">{escape(claim.statistic)}; wanted {escape(claim.threshold)}; n = {claim.n}</p>'
    )
    return (
        f'<article class="claim {claim.status}"><h3><small>{claim.number}</small>{_capital(claim.claim)}</h3>'
        f'<div class="status">{claim.status.replace("_", " ")}</div>{numbers if claim.statistic else ""}'
        f"<p>{_capital(claim.explanation)}</p>"
        f'<p class="blind">Cannot see: {escape(claim.cannot_see)}.</p></article>'
    )


def _parameters(table: pd.DataFrame, limit: float) -> str:
    columns = [name for name in _COLUMNS if name in table.columns]
    head = "".join(f'<th scope="col">{escape(_COLUMNS[name])}</th>' for name in columns)
    shown = table[columns].head(_MOST_PARAMETERS).to_dict("records")
    body = "".join(f"<tr>{_parameter_cells(row, limit)}</tr>" for row in shown)
    more = f'<p class="note">The first {len(shown)} of {len(table)}.</p>' if len(shown) < len(table) else ""
    note = (
        f'<p class="note">Do not rely on a PSIS mean whose k-hat (amber) is not below {limit:.2f}.</p>'
        if "khat" in columns
        else ""
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}{note}'


def _parameter_cells(row: dict[str, Any], limit: float) -> str:
    """Cells of one latent, all with the decimals that its spread asks for."""
    spread = abs(row["q_sd"])
    digits = min(max(2 - math.floor(math.log10(spread / 2)), 0), 8) if math.isfinite(spread) and spread > 0 else 3
    cells = [f"<td>{escape(str(row['name']))}</td>"]
    for name, value in list(row.items())[1:]:
        text = _fixed(value, 2 if name == "khat" else digits)
        cells.append(f'<td class="amber">{text}</td>' if name == "khat" and not value < limit else f"<td>{text}</td>")
    return "".join(cells)


def _fixed(value: float, digits: int) -> str:
    from .report import show

    large = abs(value) >= 1e7
    return show(value) if large or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _unchecked(claims: list[Claim]) -> str:
    rows = "".join(
        f'<tr><td class="wide">{claim.number} {escape(claim.claim)}</td><td class="wide">{escape(claim.explanation)}</td></tr>'
        for claim in claims
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _glossary(*, latents: bool) -> str:
    words = "q is the guide, PSIS its Pareto-smoothed importance weights. No list of checks proves a posterior right."
    return (
        '<p class="note">Supported: the whole 95 % interval lies on the good side. Contradicted: it lies on the bad side. '
        "Undecided: it holds the limit. Not measured: for the reason given. "
        f"{words if latents else 'No list of checks proves a model right.'}</p>"
    )


def _picture(title: str, figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    name, wide = escape(title), ' class="wide"' if figure.get_figwidth() > _WIDE else ""
    return f'<figure><figcaption>{name}</figcaption><img{wide} alt="{name}" src="data:image/png;base64,{data}"></figure>'
