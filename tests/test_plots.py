"""The curve of one run and the comparison of several: what stands in the figures."""

from types import SimpleNamespace

import pytest

from minisweet.evaluation import plots


def evaluation(method: str) -> SimpleNamespace:
    """The last ratio but one is larger than the last, as it is with branches: at t = 1 they are not asked."""
    ratios, scores = [0.25, 0.6, 1.05, 1.0], [60.0, 80.0, 89.0, 90.0]
    of_rows = {"task": "toy", "metric": "accuracy", "examples": 8, "dev_digest": "0"}
    return SimpleNamespace(method=method, scores=scores, speedup_ratios=ratios, **of_rows)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws the evaluations of runs of these methods, by name, and gives the lines of the figure."""
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))

    def draw(**methods) -> list:
        plots.draw_curves(tmp_path / "a.png", {name: evaluation(method) for name, method in methods.items()})
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return kept.pop().axes[0].lines

    return draw


def test_a_run_has_its_curve(drawn):
    (curve,) = drawn(a="sweet")
    assert curve.get_label() == "SWEET, a"
    assert curve.get_xydata().tolist() == [[0.25, 60], [0.6, 80], [1.0, 90], [1.05, 89]]  # by ratio, not by threshold


def test_names_with_dollars_are_no_formula_and_others_may_still_write_some(drawn):
    from matplotlib import rcParams

    (curve, *_) = drawn(**{"$a$": "sweet"})
    assert "$a$" in curve.get_label()
    assert not any(text.get_parse_math() for text in curve.figure.legends[0].get_texts())
    assert rcParams["text.parse_math"]


def test_each_method_has_one_colour_and_runs_of_one_method_differ(drawn):
    one, two, three = (line for line in drawn(one="sweet", two="sweet", three="mm") if line.get_label()[0] != "_")
    assert one.get_color() == two.get_color() != three.get_color()
    assert one.get_linestyle() != two.get_linestyle()
