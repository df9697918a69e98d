"""The page for looking: what stands in the file, and in a real browser, marked slow, what it shows and counts."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minisweet.adaptive import Exits
from minisweet.data.rows import Examples
from minisweet.data.toy import LEVELS
from minisweet.evaluation.sweep import Validation, draw_keys
from minisweet.use.explain import TEMPLATE, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>&lt;\u2028\0 <!--"
LAYERS, DEPTH = [1, 2, 4], 4


class Case:
    """N random sentences with three exits and three labels, and their evaluation, made here by other means."""

    def __init__(self, method: str = "sweet", lte: bool = False, N: int = 200, labelled: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 3, N)
        logits = rng.normal(size=(3, N, 3)) + 3 * np.eye(3)[self.labels]
        self.logits = torch.tensor(logits, dtype=torch.float32)
        self.predictions = logits.argmax(-1)  # (K, N)
        self.certainty = None
        if lte:  # the lowest and the highest are 0 and 1, and the others are hundredths: they meet the thresholds
            self.certainty = torch.tensor(rng.integers(0, 101, (3, N)) / 100, dtype=torch.float32)
            self.certainty[:, 0], self.certainty[:, 1] = 0, 1
        self.confidence = (self.logits.softmax(-1).amax(-1) if self.certainty is None else self.certainty).numpy()
        self.lowest = 0.0 if lte else 1 / 3
        self.levels = [LEVELS[n % 4] for n in range(N)]
        self.sentences = [f"Sentence {n} & <b>co</b>" if n % 2 else (f"first {n}", f"second {n}") for n in range(N)]
        self.targets = self.labels if labelled else self.predictions[-1]
        thresholds = np.linspace(self.lowest, 1, 11).tolist()
        self.evaluation = {
            "task": "toy",
            "metric": "accuracy" if labelled else "agreement",
            "method": method,
            "exit_layers": LAYERS,
            "exit_scores": [float((row == self.targets).mean() * 100) for row in self.predictions],
            "thresholds": thresholds,
            "exit_counts": [np.bincount(self.taken(t), minlength=3).tolist() for t in thresholds],
            "exit_strategy": "lte" if lte else "confidence",
            "temperatures": [1.0] * 3,
            "certainty_ranges": [[0.0, 1.0]] * 3,
            "operating_point": SimpleNamespace(threshold=thresholds[6], score=80.0, speedup_ratio=0.5),
        }
        labels = ["no", "yes", "<i>perhaps</i>"]
        self.record = SimpleNamespace(model="weights/tiny", labels=labels, num_labels=3, depth=DEPTH)

    def taken(self, threshold: float) -> np.ndarray:
        """The exit that each sentence takes: (N,), from 0."""
        if threshold <= self.lowest:
            return np.zeros(self.confidence.shape[1], dtype=int)
        if threshold >= 1:
            return np.full(self.confidence.shape[1], 2)
        stays = self.confidence < np.float32(threshold)
        return np.where(stays[0], np.where(stays[1], 2, 1), 0)

    def write(self, path: Path) -> Path:
        rows = Examples(self.sentences, None, self.labels.tolist(), self.levels)  # the sentences are pairs in part
        exits = Exits(LAYERS, DEPTH, self.evaluation["method"])
        said = (self.logits, self.certainty, torch.tensor(self.targets), draw_keys(self.sentences))
        validation = Validation(*said, self.evaluation["metric"], exits)
        write_page(path, SimpleNamespace(**self.evaluation), self.record, rows, validation)
        return path


def data_of(path: Path) -> dict:
    """What stands in the page's data block."""
    text = path.read_text(encoding="utf-8")
    block = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert "<" not in block
    assert block.isascii()
    return json.loads(block)


def test_the_file_holds_what_was_evaluated(tmp_path):
    case = Case()
    case.sentences[3] = HOSTILE
    point = {"threshold": float(case.confidence[0, 5]), "score": 80.0, "full_depth_score": 81.0, "speedup_ratio": 0.5}
    case.evaluation["operating_point"] = SimpleNamespace(**point)
    data = data_of(case.write(tmp_path / "page.html"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    assert data["sentences"] == [list(text) if isinstance(text, tuple) else text for text in case.sentences]
    assert data["predictions"] == case.predictions.tolist()
    assert data["right"] == case.labels.tolist()
    assert (np.array(data["confidences"], dtype=np.float32) == case.confidence).all()
    assert data["operating_point"] == point
    thresholds = data["thresholds"]
    assert {*case.evaluation["thresholds"], point["threshold"], 0.34, 0.5, 0.99} <= set(thresholds)
    assert min(np.diff(thresholds)) > 1e-9  # 0.8 of the evaluation and 0.80 of the hundredths are one
    assert max(np.diff(thresholds)) < 0.0101
    for threshold, score, ratio in zip(thresholds, data["scores"], data["speedup_ratios"], strict=True):
        taken = case.taken(threshold)
        right = case.predictions[taken, np.arange(len(taken))] == case.labels
        assert score == pytest.approx(100 * right.mean())
        assert ratio == pytest.approx(np.array([0.25, 0.5, 1])[taken].mean())


def test_confidences_and_counts_are_those_of_the_rule_for_new_text(tmp_path):
    """Whatever the curve of evaluation.json was decided by: each of its halves by the other's temperatures."""
    case = Case()
    case.evaluation["temperatures"] = [0.5, 1.5, 2.0]
    data = data_of(case.write(tmp_path / "page.html"))
    scaled = case.logits / torch.tensor([0.5, 1.5, 2.0])[:, None, None]
    case.confidence = scaled.softmax(-1).amax(-1).numpy()
    np.testing.assert_allclose(np.array(data["confidences"], dtype=np.float32), case.confidence, rtol=1e-6)
    for threshold, counts in zip(data["thresholds"], data["exit_counts"], strict=True):
        assert counts == np.bincount(case.taken(threshold), minlength=3).tolist()


def test_without_labels_agreement_with_full_depth_is_shown(tmp_path):
    data = data_of(Case(labelled=False).write(tmp_path / "page.html"))
    assert data["right"] is None
    assert data["scores"][-1] == 100
    assert "agreement" in data["metric"]


def test_a_branch_model_asks_none_but_the_last_at_threshold_1(tmp_path):
    case = Case("branch", lte=True)
    case.certainty = case.certainty[:-1]  # its last exit has none, and is sure
    data = data_of(case.write(tmp_path / "page.html"))
    assert data["confidences"][2] == [1.0] * 200
    costs = np.array([1, 2 + 1 / 6, 4 + 2 / 6]) / 4
    assert data["exit_costs"] == pytest.approx(costs)
    assert data["speedup_ratios"][-2] == pytest.approx(costs[case.taken(0.99)].mean())
    assert data["speedup_ratios"][-1] == 1.0


def test_the_template_needs_no_network():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count("{{data}}") == 1
    for word in ("http:", "https:", "//cdn", "src=", "@import", "url(", "innerHTML", "document.write"):
        assert word not in text


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of 1280 x 800."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page in a browser: selenium is not installed")
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.skip("the page in a browser: no chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    """Opens a case's page; whatever a test does with it, nothing may be logged as an error."""

    def open_page(case: Case) -> "Page":
        browser.get(case.write(tmp_path / "page.html").as_uri())
        return Page(browser)

    yield open_page
    assert [entry["message"] for entry in browser.get_log("browser")] == []


class Page:
    """What a user does with the page, and sees."""

    def __init__(self, browser) -> None:
        self.browser = browser
        self.thresholds = browser.execute_script("return data.thresholds")

    def find(self, css: str) -> list:
        return self.browser.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return self.browser.execute_script(script, css)

    def slide(self, threshold: float) -> None:
        self.set("threshold", self.thresholds.index(threshold))

    def set(self, name: str, value) -> None:
        """Give an input its value, as a hand would."""
        key = "checked" if isinstance(value, bool) else "value"
        script = f"const e = get(arguments[0]); e.{key} = arguments[1]; e.dispatchEvent(new Event('input'));"
        self.browser.execute_script(script, name, value)

    def counts(self) -> list[int]:
        """Who leaves where, by the bars."""
        return [int(text.replace(",", "")) for text in self.texts("#bars .count")]

    def shown(self) -> int:
        return int(self.texts("#shown")[0].split()[0].replace(",", ""))

    def choose(self, row: int) -> None:
        self.find(f"tr[data-row='{row}']")[0].click()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lte"), [("sweet", False), ("sweet", True), ("mm", False)])
def test_each_threshold_counts_what_the_evaluation_counts(page, method, lte):
    case = Case(method, lte)
    opened = page(case)
    for threshold, expected in zip(case.evaluation["thresholds"], case.evaluation["exit_counts"], strict=True):
        opened.slide(threshold)
        assert opened.counts() == expected
    for threshold in opened.thresholds:
        opened.slide(threshold)
        assert opened.counts() == np.bincount(case.taken(threshold), minlength=3).tolist()


@pytest.mark.slow
def test_the_keyboard_moves_the_slider_and_the_dot(page):
    from selenium.webdriver.common.keys import Keys

    opened = page(Case())
    (slider,) = opened.find("#threshold")
    slider.send_keys(Keys.END)
    assert opened.counts() == [0, 0, 200]
    place = opened.find("#place")[0].get_attribute("transform")
    slider.send_keys(Keys.HOME)
    assert opened.counts() == [200, 0, 0]
    assert opened.texts("#t") == ["0.3333"]
    assert opened.texts("#share") == ["25%"]
    assert opened.find("#place")[0].get_attribute("transform") != place
    slider.send_keys(Keys.ARROW_RIGHT)
    assert opened.texts("#t") == ["0.34"]
    row = opened.find("tbody tr")[0]
    row.click()
    row = opened.find("tbody tr")[0]
    row.send_keys(Keys.ARROW_DOWN)
    assert opened.texts("tr[aria-selected=true] td")[0] == "2"
    assert opened.texts("#whatlayers")[0].startswith("2: ")


@pytest.mark.slow
def test_a_sentence_is_text_and_nothing_else(page):
    case = Case()
    case.sentences[1] = HOSTILE
    opened = page(case)
    opened.choose(1)
    assert opened.texts("tr[data-row='1'] .text") == [HOSTILE]
    assert "</script>" in opened.texts("#whatlayers")[0]
    assert opened.browser.execute_script("return window.ran") is None
    assert opened.find("img, b b, td b, td i, option i, script:nth-of-type(3)") == []
    assert opened.texts("tr[data-row='2'] .text div") == ["first 2", "second 2"]


@pytest.mark.slow
def test_filters(page):
    case = Case()
    opened = page(case)
    threshold = case.evaluation["thresholds"][7]
    opened.slide(threshold)
    taken = case.taken(threshold)
    wrong = case.predictions[taken, np.arange(200)] != case.labels
    changed = (case.predictions != case.predictions[0]).any(0)
    hard = np.arange(200) % 4 == 1
    assert opened.shown() == 200
    opened.set("wrong", True)
    assert opened.shown() == wrong.sum()
    opened.set("changed", True)
    assert opened.shown() == (wrong & changed).sum()
    opened.set("wrong", False)
    assert opened.shown() == changed.sum()
    opened.set("level", "1")
    assert opened.shown() == (changed & hard).sum()
    opened.set("changed", False)
    opened.set("label", "2")
    assert opened.shown() == (hard & (case.labels == 2)).sum()
    opened.set("exit", "1")
    assert opened.shown() == (hard & (case.labels == 2) & (taken == 1)).sum()
    for name in ("level", "label", "exit"):
        opened.set(name, "")
    opened.set("search", "SECOND 19")
    assert opened.shown() == sum("second 19" in f"second {n}" for n in range(0, 200, 2))
    opened.set("search", "<b>co</b>")
    assert opened.shown() == 100
    opened.set("search", "nowhere")
    assert opened.shown() == 0
    assert opened.find("tbody tr") == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
def test_the_layers_that_a_sentence_runs(page, method):
    case = Case(method)
    opened = page(case)
    threshold = case.evaluation["thresholds"][8]
    opened.slide(threshold)
    boxes = {"sweet": 4, "mm": 1 + 2 + 4, "branch": 4 + 2}[method]
    # A branch model's early exit runs the layers below its own and, as each exit asked before it, a private copy.
    run = {"sweet": [1, 2, 4], "mm": [1, 3, 7], "branch": [0 + 1, 1 + 2, 4 + 2]}[method]
    for k in range(3):
        row = int(np.flatnonzero(case.taken(threshold)[:50] == k)[0])
        opened.choose(row)
        assert len(opened.find("#layers rect.run")) == run[k]
        assert len(opened.find("#layers rect")) == boxes
    opened.slide(1.0)
    assert len(opened.find("#layers rect.run")) == {"sweet": 4, "mm": 7, "branch": 4}[method]


@pytest.mark.slow
def test_without_labels_nothing_is_wrong(page):
    opened = page(Case(labelled=False))
    assert not opened.find("#wrong")[0].is_displayed()
    assert opened.find("#changed")[0].is_displayed()
    assert not any("✗" in text or "✓" in text for text in opened.texts("td, #layers text"))


@pytest.mark.slow
def test_of_ten_thousand_rows_one_page_exists(page):
    case = Case(N=10000)
    opened = page(case)
    for threshold, expected in zip(case.evaluation["thresholds"], case.evaluation["exit_counts"], strict=True):
        opened.slide(threshold)
        assert opened.counts() == expected
        assert len(opened.find("tbody tr")) == 50
    opened.find("#next")[0].click()
    assert opened.texts("tbody td:first-child") == [str(n) for n in range(51, 101)]
    assert opened.texts("#page") == ["2 / 200"]
    assert opened.find("#back")[0].is_enabled()
