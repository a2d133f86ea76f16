"""The quality report: data that is covered by the manifest's signature, HTML without network, text for a terminal."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compiler.many import TargetResult
from compiler.report import report_of
from compiler.targets import load_target
from model_registry.manifest import GateResult
from model_registry.quality_pages import render_html, render_text
from model_registry.quality_plot import plot
from model_registry.quality_report import ArtefactQuality, Point, QualityReport, published_points, sentence
from model_registry.sources import Source
from wire.errors import GateFailedError


def gate(name: str, value: float, *, passed: bool = True) -> GateResult:
    return GateResult(name=name, value=value, limit=0.9, sense=">=", passed=passed)


def artefact(target: str, size_bytes: int, agreement: float, **more: object) -> ArtefactQuality:
    return ArtefactQuality(
        target,
        "onnxruntime",
        "int8",
        size_bytes,
        "ab" * 32,
        (gate("top1_agreement", agreement),),
        **more,  # type: ignore[arg-type]
    )


REPORT = QualityReport(
    "vision<b>",
    "tensor",
    "cd" * 32,
    (
        artefact("cpu-x86", 4_000_000, 0.99, tools={"onnx": "1"}, reproducibility="byte-identical"),
        artefact("cuda", 7_000_000, 1.0),
        artefact("wasteful", 9_000_000, 0.98),
        ArtefactQuality("jetson-orin", "onnxruntime", "int8", 0, "", error="cosine is 0.2, limit >= 0.98"),
    ),
    (Point("keeps 3 layers", 4_500_000, 0.995), Point("keeps none", 3_900_000, 0.7, holds=False)),
)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "onload", "style")]


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    page = render_html(REPORT)
    links = _Links()
    links.feed(page)
    assert links.found == []
    assert not {"script", "link", "img", "iframe"} & set(links.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_names_are_escaped_everywhere() -> None:
    assert "vision<b>" not in render_html(REPORT)
    assert "vision&lt;b&gt;" in render_html(REPORT)


def test_every_gate_is_shown_with_figure_limit_verdict_and_sentence() -> None:
    page = render_html(REPORT)
    for one in REPORT.artefacts[0].gates:
        assert sentence(one).replace("'", "&#x27;") in page
    assert "not published" in page
    assert "FAIL" not in render_text(REPORT)
    assert "jetson-orin: not published: cosine is 0.2" in render_text(REPORT)


def test_the_plot_is_well_formed_names_itself_and_draws_every_point() -> None:
    root = ET.fromstring(plot(REPORT.points, REPORT.name, key="k"))
    kinds = [element.get("class", "") for element in root.iter()]
    assert sum(kind.startswith("mark") for kind in kinds) == len(REPORT.points) == 5
    assert root.get("aria-labelledby") == "k-t k-d"
    assert {element.get("id") for element in root.iter()} >= {"k-t", "k-d"}
    texts = [(float(e.get("x", 0)), float(e.get("y", 0))) for e in root.iter() if e.tag.endswith("text")]
    assert all(0 <= x <= 640 and 0 <= y <= 320 for x, y in texts)


@pytest.mark.parametrize("points", [(), (Point("one", 5, 1.0),), (Point("a", 5, 1.0), Point("b", 5, 1.0))])
def test_a_plot_of_few_or_equal_points_is_drawn_or_left_out(points: tuple[Point, ...]) -> None:
    assert plot(points, "m").count('class="mark') == len(points)


def test_only_what_nothing_beats_is_on_the_front() -> None:
    front = {point.label: point.is_on_front for point in published_points(REPORT.artefacts)}
    assert front == {"cpu-x86 (int8)": True, "cuda (int8)": True, "wasteful (int8)": False}


def test_the_report_is_plain_data_with_a_version() -> None:
    document = json.loads(json.dumps(REPORT.to_dict()))
    assert document["schema"] == "foreshore.quality/1"
    assert document["artefacts"][0]["gates"][0]["name"] == "top1_agreement"


def test_a_failed_gate_says_so_in_words() -> None:
    assert sentence(gate("cosine", 0.5, passed=False)) == (
        "The cosine of the outputs is 0.5; at least 0.9 was demanded: failed."
    )
    assert "is not a number" in sentence(gate("cosine", -1e308, passed=False))


def test_the_report_of_a_run_shows_the_gates_of_a_target_that_failed_too() -> None:
    failed = gate("cosine", 0.2, passed=False)
    error = GateFailedError("cosine is 0.2, limit >= 0.9", gates=[failed.model_dump()])
    source = Source("onnx", "tensor", Path(), (), "")
    report = report_of("m", source, [TargetResult(load_target("cpu-x86"), 1.0, error=error)])
    assert report.artefacts[0].gates == (failed,)
    assert report.points == ()
    assert sentence(failed) in render_text(report)
    assert "not published" in render_html(report)
