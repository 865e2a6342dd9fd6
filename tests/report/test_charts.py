"""Charts: what is drawn, that it is the same every time, and that it stands in any page."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lljax.report import charts, step_chart
from lljax.report.drawing import COLORS, png, svg
from lljax.report.page import write_page
from lljax.report.step_chart import Line, Mark


def chart(n=50, **options):
    steps = np.arange(1.0, n + 1)
    return step_chart.line_chart("Loss", [Line(steps, np.sin(steps) + 2, "raw")], **options)


def test_the_same_chart_has_the_same_bytes_and_an_accessible_name():
    first, second = (svg(chart(), "Loss <&>") for _ in range(2))
    assert first == second
    element = ElementTree.fromstring(first.replace("xlink:href", "href"))
    assert element.get("role") == "img" and element.get("aria-label") == "Loss <&>"


def test_the_colors_of_charts_are_variables_of_both_themes():
    from importlib.resources import files

    style = (files("lljax") / "assets" / "report.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    for name, color in COLORS.items():
        assert f"--{name}: {color};" in light and f"--{name}: #" in dark, name


def test_text_stays_text_without_markup_or_mathematics():
    figure = charts.length_chart("$x^2$ <b>", [512, 1024], {"a|b \ud800 <i>": [1.0, 2.0]})
    text = svg(figure, "t")
    assert "$x^2$ &lt;b&gt;" in text and "<i>" not in text
    assert "<title>a|b ? &lt;i&gt; at 512: 1</title>" in text and "font-family" not in text


def test_a_long_line_is_thinned_and_keeps_its_extremes():
    y = np.zeros(100_000)
    y[777], y[55_555] = 9.0, -9.0
    keep = step_chart._thinned(Line(np.arange(100_000.0), y, "raw"))
    assert len(keep) <= 3 * step_chart.POINTS + 2 and {777, 55_555} <= set(keep.tolist())


def test_a_gap_is_not_bridged_and_a_single_point_is_a_dot():
    y = np.array([1.0, 2.0, np.nan, 3.0, np.nan, 1.0, 2.0])
    figure = step_chart.line_chart("t", [Line(np.arange(7.0), y, "smooth")])
    line, dot = figure.axes[0].lines
    assert np.isnan(line.get_ydata()).sum() == 2 and dot.get_xdata().tolist() == [3.0]


def test_a_running_median_ignores_spikes_and_does_not_cross_stages():
    y = np.concatenate([np.full(500, 1.0), np.full(5000, 5.0)])
    y[100], y[300] = 1e9, np.nan
    groups = np.repeat([0, 1], [500, 5000])
    smooth = step_chart.smoothed(y, 51, groups)
    assert np.array_equal(smooth, np.repeat([1.0, 5.0], [500, 5000]))
    assert np.isnan(step_chart.smoothed(np.full(9, np.nan), 5, np.zeros(9))).all()


@pytest.mark.parametrize(
    "low,high", [(0.7, 1.2), (3.0, 40.0), (1, 290), (1, 400), (1e-6, 1e6), (17.0, 17.01)]
)
def test_a_logarithmic_axis_has_enough_ticks(low, high):
    steps = np.arange(1.0, 50)
    line = Line(steps, np.geomspace(low, high, len(steps)), "raw")
    axes = step_chart.line_chart("t", [line], log=True).axes[0]
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
    assert 3 <= len(ticks) <= 10


@pytest.mark.parametrize(
    "y,log,at", [(0.5, False, 0.5), (np.nan, False, "top"), (-1.0, True, "top")]
)
def test_a_mark_stands_at_its_value_or_at_the_upper_edge(y, log, at):
    figure = chart(marks=[Mark(7.0, y, "skipped", "step 7")], log=log, from_zero=not log)
    point = figure.axes[0].lines[-1]
    top = figure.axes[0].get_ylim()[1]
    assert point.get_ydata()[0] == (top if at == "top" else at)
    assert '<g class="skipped"><title>step 7</title>' in svg(figure, "t")


def test_equal_lines_have_rings_of_unlike_sizes():
    figure = charts.length_chart("t", [512], {str(i): [50.0] for i in range(6)})
    rings = [line.get_markersize() for line in figure.axes[0].lines if line.get_gid()]
    assert len(set(rings)) == 6


def test_a_spread_has_a_row_for_each_name_with_values():
    figure = charts.spread("Title", {"one": [1.0, 3.0], "nothing": [], "another": [9.0, 9.5, 10.0]})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "another"]
    bars = [segment for errors in axes.containers for segment in errors[2][0].get_segments()]
    for bar, mean, deviation in zip(bars, (2.0, 9.5), (2**0.5, 0.5), strict=True):
        assert bar[:, 0] == pytest.approx([mean - deviation, mean + deviation])


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, 1e6]])
def test_any_values_give_a_picture(values):
    picture = Image.open(io.BytesIO(png(charts.spread("Title", {"one": values}))))
    assert picture.format == "PNG" and picture.width == pytest.approx(2 * 500, abs=20)


def test_a_page_of_charts_alone(tmp_path):
    from lljax.report.content import Figure, Section

    sections = [Section("Memory", figures=[Figure(svg(chart(), "Memory"))]), Section("Nothing")]
    write_page(tmp_path / "page.html", "Soak", sections, finding=False)
    text = (tmp_path / "page.html").read_text()
    assert "<h2>Memory</h2>" in text and "Nothing" not in text and 'class="finding"' not in text
