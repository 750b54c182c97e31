"""The page for people: how far the start is, and afterwards where its seconds went."""

from __future__ import annotations

from html import escape

from loader.status.gantt import gantt_svg
from loader.status.state import Boot, fact_text
from loader.units import show_bytes, show_rate, show_seconds

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f4f5f7; margin: 0; }
main { max-width: 980px; margin: 2rem auto; padding: 0 1rem; }
section { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 1rem 1.25rem;
          margin-bottom: 1rem; overflow-x: auto; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
.starting h1 { color: #3b6fb6; } .ready h1 { color: #2d8659; } .failed h1 { color: #c0392b; }
.bar { height: 12px; background: #e3e6ea; border-radius: 6px; overflow: hidden; margin: .6rem 0; }
.bar div { height: 100%; background: #3b6fb6; transition: width .5s; }
.ready .bar div { background: #2d8659; } .failed .bar div { background: #c0392b; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
th { color: #777; font-weight: normal; } svg { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; margin: .5rem 0 0; } .quiet { color: #777; }
"""
_SCRIPT = """
const main = document.querySelector("main");
async function tick() {
  try {
    const answer = await fetch(location.pathname + "?part", {cache: "no-store"});
    if (answer.ok) { main.innerHTML = await answer.text(); }
  } catch (gone) { /* between two servers, or the pod is gone: ask again */ }
  const phase = main.firstElementChild.className;
  document.title = "podloader: " + phase;
  setTimeout(tick, phase === "starting" ? 1000 : 10000);
}
setTimeout(tick, 1000);
"""


def page(boot: Boot) -> str:
    """Return the whole HTML document. Its script asks for ``part`` every second."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>podloader: {boot.phase}</title><style>{_STYLE}</style></head>"
        f"<body><main>{part(boot)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def part(boot: Boot) -> str:
    """Return the part of the page that changes, as one element of the phase's class."""
    sections = [_headline(boot), _failure(boot), _facts(boot), _picture(boot), _table(boot)]
    return f'<div class="{boot.phase}">{"".join(sections)}</div>'


def _headline(boot: Boot) -> str:
    if boot.phase == "ready":
        title = f"Ready after {show_seconds(boot.ready_s or 0.0)}"
    elif boot.phase == "failed":
        title = "The start failed"
    elif boot.phase == "stopping":
        title = "Stopping: no more requests are taken"
    else:
        title = f"Starting: {boot.stage or 'just begun'}"
    share = 100 * boot.bytes_done / boot.bytes if boot.bytes else 0.0
    facts = []
    if boot.files:
        facts.append(f"{boot.files_done} of {boot.files} files")
        facts.append(f"{show_bytes(boot.bytes_done)} of {show_bytes(boot.bytes)}")
    if boot.bytes_per_s:
        facts.append(show_rate(boot.bytes_per_s))
    if boot.left_s is not None:
        facts.append(f"{show_seconds(boot.left_s)} of download left")
    if boot.phase == "starting" and boot.weights_done < boot.weights:
        done = f"{show_bytes(boot.weights_done)} of {show_bytes(boot.weights)}"
        facts.append(f"the engine has {done} of the weights and waits for bytes")
    if boot.phase == "starting":
        facts.append(f"{show_seconds(boot.now_s)} so far")
    facts += [f"{name.replace('_', ' ')}: {n}" for name, n in sorted(boot.counts.items()) if n]
    bar = f'<div class="bar"><div style="width: {share:.1f}%"></div></div>' if boot.files else ""
    return (
        f"<section><h1>{escape(title)}</h1>{bar}"
        f'<div class="quiet">{escape(" · ".join(facts))}</div></section>'
    )


def _failure(boot: Boot) -> str:
    if not boot.error:
        return ""
    names = ("where", "expected", "got")
    lines = [str(boot.error.get("what", ""))]
    lines += [f"{name}: {boot.error[name]}" for name in names if boot.error.get(name)]
    lines += [f"- {problem}" for problem in boot.error.get("problems", ())]
    if step := boot.error.get("next_step"):
        lines.append(f"next: {step}")
    name = escape(str(boot.error.get("error", "")))
    text = escape("\n".join(lines))
    return f"<section><h2>{name}</h2><pre>{text}</pre></section>"


def _facts(boot: Boot) -> str:
    """What the start is about, and what it waits for."""
    rows = [(name.replace("_", " "), fact_text(fact)) for name, fact in boot.facts.items() if fact]
    if boot.phase == "starting":
        rows += [("waits for", wait) for wait in boot.waiting_for]
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows
    )
    return f"<section><table>{cells}</table></section>"


def _picture(boot: Boot) -> str:
    if not (boot.spans or boot.running):
        return ""
    svg = gantt_svg(boot.spans, boot.running, boot.now_s)
    return f"<section><h2>Where the seconds go</h2>{svg}</section>"


def _table(boot: Boot) -> str:
    rows = [(s.start_s, f"{s.seconds:.2f}", s.name, s.lane, s.note) for s in boot.stages]
    rows += [
        (s.start_s, f"{boot.now_s - s.start_s:.1f} …", s.name, s.lane, "")
        for s in boot.running
        if s.kind == "stage"
    ]
    if not rows:
        return ""
    cells = "".join(
        f'<tr><td class="n">{start:.2f}</td><td class="n">{escape(took)}</td>'
        f'<td>{escape(name)}</td><td class="quiet">{escape(lane)}</td><td>{escape(note)}</td></tr>'
        for start, took, name, lane, note in sorted(rows)
    )
    return (
        '<section><table><tr><th class="n">start, s</th><th class="n">took, s</th><th>stage</th>'
        f"<th>process</th><th></th></tr>{cells}</table></section>"
    )
