"""The curve of one run and the comparison of several: what stands in the figures."""

from types import SimpleNamespace

from minisweet import plots


def evaluation(method: str) -> SimpleNamespace:
    """The last ratio but one is larger than the last, as it is with branches: at t = 1 they are not tried."""
    curve = {"speedup_ratios": [0.25, 0.6, 1.05, 1.0], "scores": [60.0, 80.0, 89.0, 90.0]}
    return SimpleNamespace(method=method, task="toy", metric="accuracy", examples=8, dev_digest="0", **curve)


def test_curves_are_drawn_by_their_ratios_each_method_in_its_colour(monkeypatch, tmp_path):
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))
    methods = {"a": "sweet", "b": "sweet", "c": "mm"}
    plots.draw_curves(tmp_path / "a.png", {name: evaluation(method) for name, method in methods.items()})
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    one, two, three = kept[0].axes[0].lines
    assert one.get_label() == "SWEET, a"
    assert one.get_xydata().tolist() == [[0.25, 60], [0.6, 80], [1.0, 90], [1.05, 89]]
    assert one.get_color() == two.get_color() != three.get_color()
    assert one.get_linestyle() != two.get_linestyle()
