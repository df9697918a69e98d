"""The guide of own text: its first file, its service and its cluster, as they stand there."""

import csv
import threading
from pathlib import Path

import pytest

from minisweet import toy
from minisweet.classifier.rows import read_rows
from minisweet.toy import LEVELS, make_toy
from tests.test_readme import USE, blocks_of


def test_a_first_file_for_fit(command, monkeypatch):
    """Whole and new, or one line and nothing written."""
    monkeypatch.setitem(toy.SIZES, "train", 6000)  # as it is outside tests
    assert command(toy, "new.csv")[0] == 0
    levels = {(text, str(label)): level for text, label, level in zip(*make_toy("train"), strict=True)}
    number = {"negative": "0", "positive": "1"}
    easy = [levels[row["text"], number[row["label"]]] == LEVELS[0] for _, row in read_rows(Path("new.csv"))]
    assert (len(easy), sum(easy)) == (2000, 1500)
    for name, why in (("new.csv", "already exists"), ("new.tsv", "should be a name that ends in .csv")):
        status, _, error = command(toy, name)
        assert (status, why in error, error.count("\n")) == (2, True, 1)
    assert [path.name for path in Path().iterdir()] == ["new.csv"]


def test_the_service_answers(run_of):
    _, uvicorn, httpx = map(pytest.importorskip, ("fastapi", "uvicorn", "httpx"))
    (block,) = [block for _, block in blocks_of(USE) if "FastAPI" in block]
    exec(compile(block.replace("RUN", str(run_of("bag"))), USE, "exec"), names := {})
    server = uvicorn.Server(uvicorn.Config(names["app"], port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    bad = [b'[["two", "texts"]]', rb'["\ud800"]', rb'"\ud800"', b"null", b'{"a": 1}']  # \ud800 is half an emoji
    bodies, json_type = [b'["the film was superb", ""]', *bad], {"content-type": "application/json"}
    answer, *refused = (httpx.post(url, content=body, headers=json_type) for body in bodies)
    server.should_exit = True
    thread.join()
    assert [row["label"] in ("negative", "positive") for row in answer.json()] == [True, True]
    assert [response.status_code for response in (answer, *refused)] == [200, *[422] * len(bad)]
    assert "item 0: " in refused[1].json()["detail"]


@pytest.mark.slow
def test_dask_answers_a_folder_of_files(run_of, tmp_path, monkeypatch):
    """With two workers, on this machine: the cells as they are, in their files and order, and a label beside them."""
    _, distributed = map(pytest.importorskip, ("dask.dataframe", "distributed"))
    (block,) = [block for _, block in blocks_of(USE) if "dask" in block]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    texts = [["the film was superb", "NA"], ["", 'a dreadful,\n"old" film', "007"]]
    for name, part in zip("ab", texts, strict=True):
        with (tmp_path / "texts" / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "text"), *enumerate(part)])
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        code = block.replace("Client()", "Client(cluster)").replace("RUN", str(run_of("bag")))
        exec(compile(code, USE, "exec"), names := {"cluster": cluster, "__name__": "__main__"})
        assert names["client"].status == "closed"
    for path, part in zip(sorted((tmp_path / "answered").iterdir()), texts, strict=True):
        expected = [str(label) for label in names["classifier"].predict(part)]
        found = [(row["id"], row["text"], row["label"]) for _, row in read_rows(path)]
        assert found == [(str(n), text, label) for n, (text, label) in enumerate(zip(part, expected, strict=True))]
