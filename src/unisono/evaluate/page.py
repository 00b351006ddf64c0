"""The report page of an evaluation: one HTML file without a script, in the style of `unisono report`.

Whiskers are 95% intervals; of a comparison the baseline's stand above the model's. Models and data are
not trusted: everything is escaped, and the page's content policy admits its own style and nothing else.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from unisono.evaluate.results import Difference
from unisono.evaluate.show import difference_interval, interval, number, signed
from unisono.observe.report import PAGE

MOST_EXAMPLES = 8
_WIDTH, _LEFT, _RIGHT, _ROW = 1032, 190, 70, 30
_STYLE = """
.sets { display: grid; gap: 34px; }
.dot { fill: var(--compute); } .dot.was { fill: var(--paper); stroke: var(--soft); stroke-width: 1.6; }
.whisker { stroke: var(--compute); stroke-width: 2; } .whisker.was { stroke: var(--soft); stroke-width: 1.4; }
.band { fill: var(--panel); } text.name { fill: var(--ink); font-size: 12.5px; } text.value { fill: var(--ink); font-weight: 600; }
.better { color: var(--label-data); font-weight: 600; } .worse { color: var(--label-waiting); font-weight: 600; }
.changed { color: var(--label-communication); font-weight: 600; } .same { color: var(--soft); }
.say { border-left: 3px solid var(--rule); padding: 2px 0 2px 12px; margin: 10px 0; font-size: 13.5px; overflow-wrap: anywhere; white-space: pre-wrap; }
.say b { display: block; font-weight: 500; }
"""


def render(found: Mapping[str, Any], differences: Sequence[Difference]) -> str:
    """The whole page."""
    style = (PAGE / "page.css").read_text() + _STYLE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    name = escape(found["model"]["name"])
    before = found.get("baseline")
    against = f" against {escape(before['name'])}" if before else ""
    reference = f" · reference {escape(found['reference'])}" if found.get("reference") else ""
    body = _changes(before, differences) if before else ""
    body += "".join(
        _suite(suite, part, _figures_before(before, suite)) for suite, part in found["suites"].items()
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<title>{name} · Unisono</title><link rel="icon" href="data:,"><style>{style}</style></head><body>'
        f'<header><p class="brand">Unisono <span>evaluation</span></p></header><main><h1>{name}</h1>'
        f'<p class="subtitle">digest {escape(found["model"]["digest"])} · {escape(found["dtype"])}{reference}{against}</p>'
        f"{_tiles(found)}{body}"
        "<footer>Whiskers and brackets are 95% intervals over items: Wilson for shares, bootstrap for the rest. "
        "A difference is real when its p, corrected for all differences tested (Holm), is below 0.05.</footer>"
        "</main></body></html>\n"
    )


def _tiles(found: Mapping[str, Any]) -> str:
    """The first figure of each suite."""
    tiles = []
    for name, suite in found["suites"].items():
        for fact in suite["figures"][:1]:
            tiles.append(
                f"<div><dt>{escape(name)}</dt><dd><div class='value'>{number(fact['value'], fact['kind'])}</div>"
                f"<div class='under'>{escape(fact['measure'].replace('_', ' '))}, {interval(fact)}</div></dd></div>"
            )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _changes(before: Mapping[str, Any], rows: Sequence[Difference]) -> str:
    """What differs, real ones first."""
    ordered = sorted(rows, key=lambda r: (not r.real, r.adjusted_p))
    lines = "".join(
        f"<tr><th>{escape(r.suite)}</th><td>{escape(r.measure.replace('_', ' '))}</td><td class='n'>{number(r.before, r.kind)}</td>"
        f"<td class='n'>{number(r.after, r.kind)}</td><td class='n'>{signed(r.difference, r.kind)}</td><td class='n'>{difference_interval(r)}</td>"
        f"<td class='n'>{r.adjusted_p:.2g}</td><td class='{'same' if not r.real else r.verdict}'>{r.verdict}</td></tr>"
        for r in ordered
    )
    real = sum(r.real for r in rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in before["notes"])
    return (
        f"<section><h2>What changed since {escape(before['name'])}</h2><p class='note'>{real} of {len(rows)} differences are real.</p>"
        "<div class='scroll'><table><thead><tr><th>suite</th><th>measure</th><th class='n'>before</th><th class='n'>after</th><th class='n'>difference</th>"
        f"<th class='n'>95% interval</th><th class='n'>p (Holm)</th><th>verdict</th></tr></thead><tbody>{lines}</tbody></table></div>"
        f"{f'<ul class=note>{notes}</ul>' if notes else ''}</section>"
    )


def _figures_before(before: Mapping[str, Any] | None, suite: str) -> dict[str, Mapping[str, Any]]:
    facts = before["figures"].get(suite, []) if before else []
    return {fact["measure"]: fact for fact in facts}


def _suite(name: str, part: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]]) -> str:
    shares = [f for f in part["figures"] if f["kind"] == "share"]
    others = [f for f in part["figures"] if f["kind"] != "share"]
    drawn = f"<figure>{_whiskers(shares, before)}</figure>" if shares else ""
    rows = "".join(
        f"<tr><th>{escape(f['measure'].replace('_', ' '))}<span class='meaning'>{escape(f['meaning'])}</span></th>"
        f"<td class='n'>{number(f['value'], f['kind'])}{' ' + escape(f['unit']) if f['unit'] else ''}</td>"
        f"<td class='n'>{interval(f)}</td><td class='n'>{f['items']:,}</td>"
        f"<td>{ {'higher': 'higher is better', 'lower': 'lower is better', 'half': '50% is neutral'}.get(f['better'], '') }</td></tr>"
        for f in [*others, *shares]
    )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in part["notes"])
    bad = ""
    if part["bad"]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in part["problems"])
        bad = f"<div class='missing'><h2>{part['bad']} record(s) not used</h2><ul>{lines}</ul></div>"  # fmt: skip
    return (
        f"<section><h2>{escape(name)}</h2>{notes}{drawn}<div class='scroll'><table><thead><tr><th>measure</th><th class='n'>value</th>"
        f"<th class='n'>95% interval</th><th class='n'>items</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"{bad}{_examples(part['examples'])}</section>"
    )


def _whiskers(facts: Sequence[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> str:
    """Shares on one axis from 0 to 100%, the baseline's above in grey."""
    height = len(facts) * _ROW + 26
    span = _WIDTH - _LEFT - _RIGHT
    lines = "".join(
        f"<line class='grid-line' x1='{_LEFT + span * k / 4}' x2='{_LEFT + span * k / 4}' y1='4' y2='{height - 20}'/>"
        f"<text x='{_LEFT + span * k / 4}' y='{height - 5}' text-anchor='middle'>{25 * k}%</text>"
        for k in range(5)
    )
    for row, fact in enumerate(facts):
        y = 4 + _ROW * row + _ROW / 2
        lines += f"<text class='name' x='{_LEFT - 12}' y='{y + 4}' text-anchor='end'>{escape(fact['measure'].replace('_', ' '))}</text>"
        was = before.get(fact["measure"])
        if was:
            lines += _whisker(was, y - 5, " was", span)
        lines += _whisker(fact, y + (4 if was else 0), "", span)
        lines += f"<text class='value' x='{_WIDTH - _RIGHT + 12}' y='{y + 4}'>{number(fact['value'], 'share')}</text>"
    return f"<svg viewBox='0 0 {_WIDTH} {height}' role='img' aria-label='shares with 95% intervals'>{lines}</svg>"


def _whisker(fact: Mapping[str, Any], y: float, kind: str, span: int) -> str:
    def x(share: float) -> str:
        return f"{_LEFT + span * share:.1f}"

    said = f"{'baseline: ' if kind else ''}{number(fact['value'], 'share')}, {interval(fact)}, {fact['items']} items"
    return (
        f"<g><title>{escape(said)}</title><line class='whisker{kind}' x1='{x(fact['low'])}' x2='{x(fact['high'])}' y1='{y}' y2='{y}'/>"
        f"<circle class='dot{kind}' cx='{x(fact['value'])}' cy='{y}' r='{3.5 if kind else 4.5}'/></g>"
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    said = "".join(
        f"<div class='say'><b>{escape(_text(e['prompt']))}</b>{escape(e['answer']) or '(nothing)'}</div>"
        for e in examples[:MOST_EXAMPLES]
    )
    return f"<details><summary>Answers of the model, which may offend</summary>{said}</details>"


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
