"""What spoke at exit 0, and the page: what stands in the file, and in a real browser, marked slow, what it shows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from minisweet import EarlyExitClassifier, NgramExit
from minisweet.classifier.cascade import Cascade, at_exit_0, at_full_depth
from minisweet.classifier.explain import TEMPLATE, word_scores, write_page
from minisweet.classifier.main import explain
from minisweet.classifier.promise import Goal, choose
from minisweet.classifier.run import Validation
from minisweet.classifier.split import deal_roles
from minisweet.texts import BERTS, Examples, Texts
from tests.conftest import random_bag

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>&lt;\u2028\0 <!--"
N, DEPTH = 200, 4


def test_what_spoke_is_all_where_words_are_few(run_of):
    bag = random_bag(2)
    cascade = replace(EarlyExitClassifier.load(run_of("bag")).cascade, bag=bag)
    texts = cascade.tokenize(["superb film"])
    for_answer, for_other = word_scores(cascade, texts, 0)
    logits = bag(*texts.batch(np.array([0])).inputs[:2])[0] - bag.bias
    answer, other = (logits + bag.bias).argsort(descending=True)
    assert for_answer.keys() | for_other.keys() == {"superb", "film", "superb film"}
    assert min([*for_answer.values(), *for_other.values()]) > 0
    total = sum(for_answer.values()) - sum(for_other.values())
    assert total == pytest.approx(float(logits[answer] - logits[other]), abs=1e-5)


def test_commands(own_run, run_of, tmp_path, command):
    status, out, err = command(explain, own_run, "superb film")
    assert status == 0, err
    assert "adds up tokens (words, ##pieces of words, and punctuation) and pairs of neighbours" in out
    classify = EarlyExitClassifier.load(own_run, threshold=1.0)
    (answer,), (last, _) = classify.classify(["superb film"]), classify.explain(["superb film"])[0][-1]
    assert last.probabilities == pytest.approx(answer.probabilities, abs=1e-5)  # where exit 0 has a say
    for threshold, place in ((0, "at exit 0"), (1, "after layer 4")):
        classify = EarlyExitClassifier.load(own_run, threshold=float(threshold))
        (answer,), exits = classify.classify(["superb film"]), classify.explain(["superb film"])[0]
        assert [may_leave for _, may_leave in exits] == [threshold == 0, True]
        assert exits[threshold][0].probabilities == pytest.approx(answer.probabilities, abs=1e-5)
        assert f"-> leaves {place}" in command(explain, own_run, "superb film", "--threshold", threshold)[1]
    assert command(explain, run_of("bag"), "--html", tmp_path / "page.html")[0] == 0
    data, rows = data_of(tmp_path / "page.html"), EarlyExitClassifier.load(run_of("bag")).validation.roles
    assert len(data["words"]) == len(data["sentences"]) == len(rows)
    assert data["point"]["promise"] == ""  # since all texts run to the last exit
    assert data["point"]["goal"] == {"max_lost": 3.0, "sure": 90.0}


def test_what_judges_without_a_label_state_is_agreement(tmp_path):
    """Even if other validation rows have labels."""
    case = Case()
    case.point = replace(case.point, majority=None)
    data = data_of(case.write(tmp_path / "page.html"))
    assert (data["point"]["metric"], data["metric"]) == ("agreement with full depth", "accuracy")


def data_of(page: Path) -> dict:
    """What stands in a page."""
    text = page.read_text(encoding="utf-8")
    block = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert block.isascii()
    assert "<" not in block
    return json.loads(block)


class Case:
    """N random sentences with two exits and three labels, and what was chosen."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 3, N)
        self.logits = torch.from_numpy(rng.normal(size=(2, N, 3)) + 3 * np.eye(3)[self.labels]).float()
        self.sentences = [f"Sentence {n} & <b>co</b>" for n in range(N)]
        keys = np.arange(N)
        roles = deal_roles(keys, keys, self.labels)
        self.point = replace(choose(self.logits, self.labels, keys, roles, Goal(), combines=True), threshold=0.7123)
        rule = self.point.rule
        calibrated = torch.stack([at_exit_0(self.logits[0], rule), at_full_depth(*self.logits, rule)])
        self.confidence = calibrated.softmax(-1).amax(-1)  # (2, N)
        self.predictions = calibrated.argmax(-1).numpy()  # (2, N)
        self.shown = self.labels.tolist()  # -1 for a row without a label

    def taken(self, threshold: float) -> np.ndarray:
        """The exit that each sentence takes: (N,), from 0."""
        return (threshold == 1) | (threshold > 1 / 3) & (self.confidence[0] < np.float32(threshold)).numpy() | 0

    def write(self, path: Path) -> Path:
        tokenizer = Tokenizer(WordPiece({token: n for n, token in enumerate(BERTS)}, unk_token="[UNK]"))
        tokenizer.enable_truncation(8)
        texts = Texts(tokenizer, Examples(self.sentences, None, self.shown))
        labels, arguments = ["no", "yes", "<i>so</i>"], {"model": "weights/tiny", "trunk": None}
        record = SimpleNamespace(arguments=arguments, task="own", labels=labels, depth=DEPTH)
        bag = NgramExit(len(BERTS), 3, [0, 1, 2])
        cascade = Cascade(tokenizer, labels, bag, None, self.point.rule, self.point.threshold)
        write_page(path, cascade, self.point, record, Validation(texts, np.zeros(N), self.logits))
        return path


def test_the_file_holds_what_both_exits_said(tmp_path):
    case = Case()
    case.sentences[3] = HOSTILE
    case.shown[7] = -1  # a row without a label is not on the page
    case.point = replace(case.point, threshold=float(case.confidence[0, 5]))
    data, kept = data_of(case.write(tmp_path / "page.html")), np.arange(N) != 7
    assert data["sentences"] == case.sentences[:7] + case.sentences[8:]
    assert data["predictions"] == case.predictions[:, kept].tolist()
    assert data["right"] == case.labels[kept].tolist()
    assert torch.equal(torch.tensor(data["confidences"]), case.confidence[:, kept])
    assert [data["scores"][0], data["scores"][-1]] == pytest.approx(
        100 * (case.predictions == case.labels)[:, kept].mean(1)
    )
    thresholds = data["thresholds"]
    assert {1 / 3, case.point.threshold, 0.34, 0.5, 0.99, 1} <= set(thresholds)
    assert thresholds == sorted(set(thresholds))
    right = case.predictions[case.taken(0.5), np.arange(N)] == case.labels  # the rest is the sweep's
    assert data["scores"][thresholds.index(0.5)] == pytest.approx(100 * right[kept].mean())
    assert data["speedup_ratios"][thresholds.index(0.5)] == pytest.approx(case.taken(0.5)[kept].mean())


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
    """The page of `Case`, where one text is hostile; whatever a test does with it, no error may be logged."""
    case = Case()
    case.sentences[1] = HOSTILE
    browser.get(case.write(tmp_path / "page.html").as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def find(page, css: str) -> list:
    """The elements of an open page."""
    return page.find_elements("css selector", css)


def texts_of(page, css: str) -> list[str]:
    """The texts of its elements, shown or not."""
    return [element.get_property("textContent") for element in find(page, css)]


def slide(page, threshold: float) -> None:
    """Move its slider to one of the thresholds."""
    script = "const e = get('threshold'); e.value = data.thresholds.indexOf(arguments[0]);"
    page.execute_script(script + "e.dispatchEvent(new Event('input'));", threshold)


@pytest.mark.slow
def test_a_sentence_is_text_and_nothing_else(page):
    find(page, "tr[data-row='1']")[0].click()
    assert texts_of(page, "tr[data-row='1'] .text") == [HOSTILE]
    assert page.execute_script("return window.ran") is None
    assert find(page, "img, b b, td b, td i, option i, script:nth-of-type(3)") == []


@pytest.mark.slow
def test_who_leaves_where_at_each_threshold_and_the_layers_that_a_sentence_runs(page):
    case = Case()
    assert texts_of(page, "#t") == ["0.7123"]  # the one that is deployed
    for threshold in (*page.execute_script("return data.thresholds")[::9], 0.8):
        slide(page, threshold)
        assert [*map(int, texts_of(page, "#bars .count"))] == np.bincount(case.taken(threshold), minlength=2).tolist()
    for k in range(2):
        row = int(np.flatnonzero(case.taken(0.8)[:50] == k)[0])
        find(page, f"tr[data-row='{row}']")[0].click()
        assert len(find(page, "#layers rect.run")) == (0, DEPTH)[k]
        assert len(find(page, "#layers rect")) == DEPTH
    slide(page, 1.0)
    assert len(find(page, "#layers rect.run")) == DEPTH
    assert "exit 0" in texts_of(page, "#layers text")
