"""The report of a job as one HTML page: no script, nothing fetched, everything escaped.

    report.json's content ─┐
                           ├─▶ page ─▶ verdict, failures, suggestions, phases, confidence, flicker, seams, slices, facts
    pictures ──────────────┘
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaseline.clients.jobs.memory import format_bytes

MAX_ROWS, MAX_LEGEND, STRIPS = 40, 12, 8
"""Failures listed, classes in legends, classes in the plot; report.json and the table of phases have all."""

NAMES = {"plane": "planes", "row": "rows", "col": "columns"}
"""Of the axes, for several."""

_SYMBOLS = {"nanometer": "nm", "micrometer": "µm", "millimeter": "mm", "centimeter": "cm", "meter": "m", "angstrom": "Å",
            "picometer": "pm"}

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 60rem; background: #fff; color: #222;
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: .95rem; margin: 1rem 0 .35rem; }
p { margin: .5rem 0; max-width: 46rem; }
.note, figcaption { color: #555; font-size: .85rem; }
.verdict { margin: 1.25rem 0; padding: .7rem 1rem; border-left: 5px solid #0072b2; background: #f3f7fa; }
.verdict.failed { border-color: #d55e00; background: #fdf3ec; }
.verdict p { max-width: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
th { font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; }
table.facts th { white-space: nowrap; font-weight: 400; color: #555; }
table.facts td, td.text { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .85em; height: .85em; margin-right: .45em; vertical-align: -.08em;
          border: 1px solid #0004; }
figure { margin: .75rem 0 1.25rem; break-inside: avoid; }
figure > img { width: 100%; height: auto; }
.panels { display: flex; gap: .6rem; align-items: flex-start; }
.panels.tall { flex-direction: column; }
.panel { flex: 1 1 0; min-width: 0; margin: 0; }
.panels.tall .panel { width: 100%; }
.panel img { display: block; width: 100%; height: auto; }
.panel span { font-size: .8rem; color: #555; }
.regions { display: grid; grid-template-columns: repeat(auto-fill, minmax(25rem, 1fr)); gap: 0 1.5rem; }
.bar { height: .3rem; margin-top: .3rem; background: #222; }
.ramp { display: inline-block; width: 8rem; height: .7em; margin: 0 .4em; vertical-align: -.05em; }
.legend { white-space: pre-wrap; max-width: none; }
code { font: .85rem/1.4 ui-monospace, Consolas, Menlo, monospace; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  .verdict, .swatch, .bar, .ramp { print-color-adjust: exact; -webkit-print-color-adjust: exact; } tr { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class SlicePicture:
    """A slice, or a part of one, side by side as image, labels and confidence.

    Attributes
    ----------
    caption
        What it is.
    panels
        What each panel shows, and its data URI.
    bar
        Length of a scale bar, as a share of a panel's width, and what it stands for; None: size unknown.
    tall
        Whether the panels are so wide that they stand one above the other.
    """

    caption: str
    panels: tuple[tuple[str, str], ...]
    bar: tuple[float, str] | None = None
    tall: bool = False


@dataclass(frozen=True)
class Illustrations:
    """All pictures of a page.

    Attributes
    ----------
    plots
        Data URIs by what they show: ``phases``, ``confidence``, ``flicker``, ``histogram``; none where there is nothing to draw.
    lowest, spread, regions
        Slices of the lowest confidence; some at even distances; the suggested regions, in the suggestions' order.
    ramp
        Colours (``#rrggbb``) of confidence 0 to 1, at even distances.
    """

    plots: Mapping[str, str]
    lowest: tuple[SlicePicture, ...] = ()
    spread: tuple[SlicePicture, ...] = ()
    regions: tuple[SlicePicture, ...] = ()
    ramp: tuple[str, ...] = ()


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(element: str, /, *content: str, **attributes: str) -> Html:
    """An element: text in it and in its attributes is escaped, unless it is `Html`; ``class_`` stands for ``class``."""
    inner = "".join(part if isinstance(part, Html) else html.escape(part) for part in content)
    opening = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{element}{opening}>" if element in {"img", "meta"} else f"<{element}{opening}>{inner}</{element}>")


def page(content: Mapping[str, Any], illustrations: Illustrations) -> str:
    """The page.

    Parameters
    ----------
    content
        Of report.json.
    illustrations
        Its pictures.
    """
    title = f"Segmentation of {content['input']['name']}"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    sections = (
        _failures(content["failed"]), _suggestions(content, illustrations), _phases(content, illustrations),
        _confidence(content, illustrations), _flicker(content, illustrations), _seams(content["seams"]),
        _spread(content, illustrations), _facts(content), _reading(),
    )
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width"),
               tag("meta", http_equiv="Content-Security-Policy", content=policy), tag("title", title), tag("style", Html(_CSS)))
    made = f"phaseline {content['versions'].get('phaseline', '')}, {content['finished']}"
    verdict = tag("p", " ".join(content["verdict"]))
    body = tag("body", tag("h1", title), tag("p", made, class_="note"),
               tag("div", verdict, class_="verdict" if content["complete"] else "verdict failed"), *sections)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def percent(share: float | None) -> str:
    """A share of 1 in percent, to three digits."""
    if share is None:
        return "–"
    if 0 < share < 1e-5:
        return "< 0.001 %"
    return "0 %" if share == 0 else f"{f'{100 * share:#.3g}'.rstrip('.')} %"


def unit_symbol(unit: str) -> str:
    """Symbol of a unit given in full, or what was given."""
    return _SYMBOLS.get(unit, unit)


def duration(seconds: float) -> str:
    """Seconds for people: ``2 h 05 min``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> Html:
    kinds = [{"class_": "n"} if number else {"class_": "text"} for number in numbers]
    top = tag("tr", *(tag("th", text, **kind) for text, kind in zip(head, kinds, strict=True)))
    lines = [tag("tr", *(tag("td", text, **kind) for text, kind in zip(row, kinds, strict=True))) for row in rows]
    return tag("table", tag("thead", top), tag("tbody", *lines))


def _plot(uri: str | None, caption: str, alt: str) -> Html:
    return Html("") if uri is None else tag("figure", tag("img", src=uri, alt=alt), tag("figcaption", caption))


def _swatch(colour: str) -> Html:
    return tag("span", class_="swatch", style=f"background:{colour}")


def _span(one: Mapping[str, Any]) -> str:
    first, last = one["first"], one["last"]
    return f"{one['axis']} {first}" if first == last else f"{NAMES[one['axis']]} {first}–{last}"


def _failures(failed: Sequence[Mapping[str, Any]]) -> Html:
    if not failed:
        return Html("")
    rows = [(_span(one), one["error"], str(one["attempts"])) for one in failed[:MAX_ROWS]]
    more = len(failed) - len(rows)
    return tag("section", tag("h2", "Not segmented"),
               tag("p", "These voxels hold label 0. --resume tries them again."),
               _table(("where", "error", "attempts"), rows, (False, False, True)),
               tag("p", f"And {more} more, listed in report.json.", class_="note") if more else Html(""))


def _suggestions(content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    if not content["suggestions"]:
        return Html("")
    names = {str(phase["value"]): phase["name"] for phase in content["phases"]}
    rows = []
    for i, one in enumerate(content["suggestions"], 1):
        ranges = [str(a) if b - a == 1 else f"{a}–{b - 1}" for a, b in zip(one["start"], one["stop"], strict=True)]
        mix = ", ".join(f"{names[value]} {percent(share)}" for value, share in one["fractions"].items())
        rows.append((str(i), *ranges, f"{one['mean_confidence']:.2f}", mix))
    return tag(
        "section", tag("h2", "Where more labels would help most"),
        tag("p", "The regions that the classifier is least sure of. Brush a few strokes there, fit again, and segment again. "
                 "Numbers are the input's, counted from 0, both ends included."),
        _table(("", "planes", "rows", "columns", "mean confidence", "labels there now"), rows,
               (True, True, True, True, True, False)),
        tag("div", *(_picture(picture) for picture in illustrations.regions), class_="regions"),
        _legend(illustrations.regions, content, illustrations),
    )


def _phases(content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    voxel = content["output"]["voxel"]
    unit = "" if voxel is None else f"{unit_symbol(voxel['unit'])}³"
    head = ["class", "label", "voxels", "fraction", f"lowest and highest of a {content['slices']['axis']}"]
    rows: list[list[str]] = []
    for phase in content["phases"]:
        rows.append([Html(_swatch(phase["colour"]) + html.escape(phase["name"])), str(phase["value"]), f"{phase['voxels']:,}",
                     percent(phase["fraction"]), f"{percent(phase['lowest'])} … {percent(phase['highest'])}"])
        if voxel is not None:
            rows[-1].append(Html(f"{_scientific(phase['volume'])} {html.escape(unit)}"))
    if voxel is not None:
        head.append("volume")
    unlabelled = content["unlabelled_voxels"]
    left_out = f"{unlabelled:,} voxels are unlabelled (0) and count in no fraction."
    largest = "Fraction of each class by slice" if len(rows) <= STRIPS else f"Fractions of the {STRIPS} largest classes by slice"
    return tag(
        "section", tag("h2", "Phases"), _table(head, rows, [False, *[True] * (len(head) - 1)]),
        tag("p", left_out, class_="note") if unlabelled else Html(""),
        _plot(illustrations.plots.get("phases"), f"{largest}; each strip has a range of its own.{_absent(content)}",
              "phase fractions by slice"),
    )


def _scientific(number: float) -> Html:
    """Four digits, with a power of ten where there are many zeros."""
    mantissa, _, exponent = f"{number:.3e}".partition("e")
    return Html(f"{number:.4g}") if -4 < int(exponent) < 5 else Html(f"{mantissa} × 10<sup>{int(exponent)}</sup>")


def _absent(content: Mapping[str, Any]) -> str:
    return "" if all(content["slices"]["labelled"]) else " Grey: slices without labels."


def _confidence(content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    confidence = content["confidence"]
    if confidence is None:
        return Html("")
    axis = content["slices"]["axis"]
    least = ", ".join(f"{one['position']} ({one['mean']:.3f})" for one in confidence["lowest"])
    return tag(
        "section", tag("h2", "Confidence"),
        _plot(illustrations.plots.get("confidence"), "Mean confidence by slice; ringed: the slices shown below."
              + _absent(content), "mean confidence by slice"),
        _plot(illustrations.plots.get("histogram"), "Confidence of all labelled voxels.", "confidence histogram"),
        tag("h3", "Least confident slices"), tag("p", f"{NAMES[axis].capitalize()}, with their mean confidence: {least}."),
        _pictures(illustrations.lowest, content, illustrations),
    )


def _flicker(content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    uri = illustrations.plots.get("flicker")
    if uri is None:
        return Html("")
    return tag("section", tag("h2", "Flicker from slice to slice"), _plot(
        uri, "Share of the pixels whose label differs from that in the slice before. Some of it is structure that changes; peaks "
             f"are slices to look at. Ringed: unusual.{_absent(content)}", "labels changed by slice"))


def _seams(seams: Mapping[str, Any]) -> Html:
    heading = tag("h2", "Seams between tiles")
    if seams["reason"]:
        return tag("section", heading, tag("p", f"Not measured: {seams['reason']}."))
    rows = [(name, percent(seams[kind]["share"]), str(seams[kind]["places"]), f"{seams[kind]['pixels']:,}")
            for name, kind in (("where two tiles meet", "seam"), ("inside a tile, for comparison", "control"))]
    return tag(
        "section", heading, _table(("", "labels that differ", "places", "pixels"), rows, (False, True, True, True)),
        tag("p", f"Tiles of {seams['tile_px']} px overlap by {seams['overlap_px']} px at least. A sample of places was computed "
                 "again with the place at a tile's centre. Inside a tile labels change too, as the network sees other "
                 "surroundings: what the first line has beyond the second is due to the seam.", class_="note"))


def _spread(content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    if not illustrations.spread:
        return Html("")
    return tag("section", tag("h2", "Slices at even distances"), _pictures(illustrations.spread, content, illustrations))


def _pictures(pictures: Sequence[SlicePicture], content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    return Html("".join(map(_picture, pictures)) + _legend(pictures, content, illustrations))


def _legend(pictures: Sequence[SlicePicture], content: Mapping[str, Any], illustrations: Illustrations) -> Html:
    """What the colours of labels and confidence mean."""
    if not pictures:
        return Html("")
    shown = [part for phase in content["phases"][:MAX_LEGEND] for part in (_swatch(phase["colour"]), f"{phase['name']}   ")]
    if len(content["phases"]) > MAX_LEGEND:
        shown.append("…   ")
    if len(pictures[0].panels) > 2:
        gradient = f"background:linear-gradient(to right,{','.join(illustrations.ramp)})"
        shown += ["confidence 0", tag("span", class_="ramp", style=gradient), "1   "]
    if content["suggestions"]:
        shown.append("framed: a suggested region")
    return tag("p", *shown, class_="note legend")


def _picture(picture: SlicePicture) -> Html:
    panels = []
    for i, (name, uri) in enumerate(picture.panels):
        scale = Html("")
        if picture.bar is not None and i == 0:
            share, label = picture.bar
            scale = Html(tag("div", class_="bar", style=f"width:{100 * share:.2f}%") + tag("span", f"{label}; "))
        shown = tag("img", src=uri, alt=f"{picture.caption}: {name}")
        panels.append(tag("div", shown, scale, tag("span", name), class_="panel"))
    arranged = tag("div", *panels, class_="panels tall" if picture.tall else "panels")
    return tag("figure", arranged, tag("figcaption", picture.caption))


def _facts(content: Mapping[str, Any]) -> Html:
    source, output, recipe, work = content["input"], content["output"], content["recipe"], content["performance"]
    seconds = work["seconds"]
    bundle = "none (classical features only)" if recipe["bundle_hash"] is None else recipe["bundle_hash"]
    rate = "" if work["voxels_per_s"] is None else f", {work['voxels_per_s']:,.0f} a second"
    peak = "not measured" if work["peak_memory_bytes"] is None else format_bytes(work["peak_memory_bytes"])
    budget = "" if work["memory_budget_bytes"] is None else f" of {format_bytes(work['memory_budget_bytes'])} allowed"
    rows: list[tuple[str, str]] = [
        ("input", f"{source['name']} ({source['format']})"),
        ("its shape, type", f"{_times(source['shape'])}, {source['dtype']}"),
        ("its voxel size", _voxel(source["voxel"])),
        ("its fingerprint", source["fingerprint"]),
        ("region", _region(**content["region"])),
        ("slices", "planes, rows and columns, averaged" if content["axes"] == "3" else f"{NAMES[content['axes']]}, one by one"),
        ("output", "; ".join(output["files"])),
        ("its shape, voxel size", f"{_times(output['shape'])}, {_voxel(output['voxel'])}"),
        ("recipe", f"{recipe['path']}, hash {recipe['hash']}"),
        ("bundle", bundle + ("" if recipe["bundle_trained"] else " (untrained: random weights)")),
        ("engine", f"{content['engine']}; {work['workers']}"),
        ("begun, finished", f"{content['started']}, {content['finished']}"
                            + (f"; resumed {work['resumed']} times" if work["resumed"] else "")),
        ("throughput", f"{work['voxels']:,} voxels{rate}"),
        ("time", f"{duration(seconds['wall'])}; summed over blocks: "
                 + ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "wall")),
        ("peak memory", peak + budget),
        ("versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())),
    ]
    lines = [tag("tr", tag("th", name), tag("td", text)) for name, text in rows]
    lines.append(tag("tr", tag("th", "command"), tag("td", tag("code", content["command"]))))
    return tag("section", tag("h2", "Facts"), tag("table", tag("tbody", *lines), class_="facts"))


def _reading() -> Html:
    return tag(
        "section", tag("h2", "How to read this"),
        tag("p", "Confidence is the margin between the probabilities of the two likeliest classes, as the classifier has them. "
                 "It is not the chance that a label is right: a classifier can be sure and wrong, above all on what its labels "
                 "never showed. How often labels are wrong can only be counted on voxels labelled by hand and not fitted on.",
            class_="note"))


def _region(start: Sequence[int], stop: Sequence[int], step: Sequence[int]) -> str:
    return ", ".join(f"{name} {a}–{b - 1}" + (f" in steps of {s}" if s > 1 else "")
                     for name, a, b, s in zip(NAMES.values(), start, stop, step, strict=True))


def _times(shape: Sequence[int]) -> str:
    return " × ".join(f"{length:,}" for length in shape)


def _voxel(voxel: Mapping[str, Any] | None) -> str:
    if voxel is None:
        return "unknown"
    return f"{' × '.join(f'{size:g}' for size in voxel['size'])} {unit_symbol(voxel['unit'])}"
