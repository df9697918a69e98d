"""A run: all that a training made, in memory, or in a folder. README.md beside this file tells what each file holds.

Dimension letter: C classes.
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.adaptive import Exits
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError, read_dataclass, write_json, written_beside
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.checkpoint import OURS, WEIGHTS, load_classifier, load_strict, new_encoder, read_config
from minisweet.texts import Examples, Texts, load_tokenizer
from minisweet.exits import ExitModel, MultiExitModel
from minisweet.methods import METHODS
from minisweet.outputs import Outputs, ask_all
from minisweet.classifier.operating_point import OperatingPoint
from minisweet.record import Evaluation, Record

TOKENIZER, VALIDATION, LOGITS = "tokenizer.json", "validation.jsonl", "logits.safetensors"
EVALUATION, CURVE, OPERATING, LABELS = "evaluation.json", "curve.png", "operating.json", "labels.jsonl"
FILES = {"run.json", "config.json", WEIGHTS, TOKENIZER, VALIDATION, LOGITS, EVALUATION, CURVE, OPERATING, LABELS}


class Run:
    """What a training made: its record, and the model, tokenizer, validation texts, logits, and what is deployed.

    Of a run in a folder each part is read when it is first asked for. Raises InputError where weights or results are
    missing, broken, or of other weights than the run.
    """

    def __init__(self, record: Record, folder: Path | None = None) -> None:
        self.record, self.folder = record, folder

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run in a folder. Raises InputError for a folder that is none, and a key that is missing or wrong."""
        if not is_run(folder):
            raise InputError(f"{folder}: no run here (it has no run.json); train one with train.py or minisweet fit")
        return cls(read_dataclass(Record, folder / "run.json"), folder)

    @classmethod
    def made(cls, record: Record, model: ExitModel, tokenizer: Tokenizer, texts: Texts) -> "Run":
        """The run of a training that is over. Its id is the SHA-256 of the weights."""
        run = cls(replace(record, id=hashlib.sha256(save(model.state_dict())).hexdigest()))
        run.model, run.tokenizer, run.texts, run.examples = model.eval(), tokenizer, texts, texts.examples
        return run

    @cached_property
    def id(self) -> str | None:
        """The id of the weights, which their file says too; None for a training that diverged."""
        if self.folder and (self.folder / WEIGHTS).is_file():
            try:
                with safe_open(self.folder / WEIGHTS, "pt") as file:
                    found = (file.metadata() or {}).get("id")
            except Exception as error:  # of safetensors, according to what is wrong with the file
                raise InputError(f"{self.folder / WEIGHTS}: not readable ({error})") from None
            if found != self.record.id:
                raise InputError(f"{self.folder / WEIGHTS}: is of another run than run.json beside it ({found})")
        return self.record.id

    @cached_property
    def model(self) -> ExitModel:
        """The model in float32, in evaluation mode and on the CPU."""
        record, options = self.record, self.record.arguments
        if record.diverged is not None:
            raise InputError(f"{self.folder}: its training diverged at step {record.diverged}; it has no weights")
        _, config, layers = self.id, read_config(self.folder), [n for n in record.exit_layers if n > 0]

        def make() -> ExitModel:
            encoder = new_encoder(replace(config, num_hidden_layers=layers[-1]))
            encoder.depth = record.depth
            build, C = METHODS[options.method].build, len(record.labels)
            model = build(encoder, layers, C, exit_strategy=options.exit_strategy)
            if record.exit_layers[0] == 0:
                model.add_ngrams(NgramExit(config.vocab_size, C, [], pairs=len(record.columns) == 2))
            return model

        return load_strict(self.folder / WEIGHTS, make).eval()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which cuts texts as the training did."""
        return load_tokenizer(self.folder, self.record.vocab_size, self.record.arguments.max_length)

    @cached_property
    def examples(self) -> Examples:
        """The validation rows."""
        with (self.folder / VALIDATION).open(encoding="utf-8", newline="\n") as file:
            rows = [json.loads(line) for line in file]
        numbers = {name: number for number, name in enumerate(self.record.labels)} | {None: -1}
        first, second, difficulties, groups = (
            [row[name] for row in rows] if name in rows[0] else None
            for name in ("text" if "text" in rows[0] else "sentence1", "sentence2", "difficulty", "group")
        )
        return Examples(first, second, [numbers[row["label"]] for row in rows], difficulties, groups)

    @cached_property
    def texts(self) -> Texts:
        """The validation rows in tokens."""
        return Texts(self.tokenizer, self.examples)

    def ask(self, texts: Texts, device: str = "auto", amp: str = "auto") -> Outputs:
        """What all exits say of some texts, whose logits must be finite."""
        where = choose_device(device)
        outputs = ask_all(self.model.to(where), texts, choose_precision(amp, where), self.record.metric)
        self.model.cpu()
        if cut := int(texts.is_cut.sum()):
            LOG.info("cut to %d tokens: %s texts", self.record.arguments.max_length, f"{cut:,}")
        if not all(part.isfinite().all() for part in (outputs.logits, outputs.certainty) if part is not None):
            what = "its exits give infinite numbers or NaN"
            raise InputError(f"{self.folder or 'the run'}: {what}; try --amp off, or train at a lower --lr")
        return outputs

    @cached_property
    def outputs(self) -> Outputs:
        """What all exits said of the validation texts."""
        try:
            with safe_open(self.folder / LOGITS, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = file.metadata()
        except Exception as error:  # of the disk or of safetensors, according to what is wrong with the file
            why = f"not readable ({error}); make it anew: minisweet choose {self.folder}"
            raise InputError(f"{self.folder / LOGITS}: {why}") from None
        self.check_id(LOGITS, facts["id"])
        exits = Exits(*json.loads(facts["exits"]))
        return Outputs(
            **{"certainty": None} | tensors, metric=facts["metric"], exits=exits, precision=facts["precision"]
        )

    @cached_property
    def point(self) -> OperatingPoint:
        """What is deployed."""
        return self._result(OperatingPoint, OPERATING, "minisweet choose")

    @cached_property
    def labels(self) -> dict[int, int]:
        """Classes of validation texts that had none, by their keys: given on request, see `minisweet label`."""
        if not self.folder or not (self.folder / LABELS).exists():
            return {}
        rows = map(json.loads, (self.folder / LABELS).read_text(encoding="utf-8").splitlines())
        return {row["key"]: self.record.labels.index(row["label"]) for row in rows}

    @property
    def evaluation(self) -> Evaluation:
        """What evaluate.py found."""
        return self._result(Evaluation, EVALUATION, "python evaluate.py")

    def _result(self, kind: type, name: str, command: str):
        if not (self.folder / name).is_file():
            raise InputError(f"{self.folder}: has no {name}; first: {command} {self.folder}")
        result = read_dataclass(kind, self.folder / name)
        self.check_id(name, result.id)
        return result

    def check_id(self, name: str, found: str | None) -> None:
        """Raise InputError where a file was computed from other weights than the run's."""
        if found != self.id:
            raise InputError(f"{self.folder / name}: is of other weights than the model beside it; make it anew")

    # --- writing

    def save(self, out: Path, overwrite: bool = True) -> None:
        """Write the run to a folder, whole or not at all. From now on it is the run's."""
        with written_beside(out, overwrite) as folder:
            folder.mkdir()
            write_json(folder / "run.json", asdict(self.record))
            if self.record.diverged is None:
                (folder / WEIGHTS).write_bytes(save(self.model.state_dict(), {"id": self.record.id}))
                config = self.model.models_alone[-1].encoder.config
                told = asdict(config) | {"num_hidden_layers": self.record.depth}
                write_json(folder / "config.json", told | {"model_type": OURS, "encoder_type": config.model_type})
                (folder / TOKENIZER).write_text(self.tokenizer.to_str(), encoding="utf-8")
                with (folder / VALIDATION).open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
            for name in ("outputs", "point", "labels"):
                if vars(self).get(name):
                    getattr(self, f"write_{name}")(folder)
        self.folder = out

    def rows(self) -> list[dict]:
        """Each validation row as validation.jsonl has it; its label is null where it has none."""
        examples, names = self.examples, [*self.record.labels, None]  # the last is that of -1
        rows = []
        for n, text in enumerate(examples.texts()):
            row = (
                {"text": text} if examples.second is None else dict(zip(("sentence1", "sentence2"), text, strict=True))
            )
            if examples.difficulties:
                row["difficulty"] = examples.difficulties[n]
            if examples.groups:
                row["group"] = examples.groups[n]
            rows.append(row | {"label": names[examples.labels[n]]})
        return rows

    def write_labels(self, folder: Path) -> None:
        """Write the labels that were given on request."""
        rows = dict(zip(self.texts.keys.tolist(), self.rows(), strict=True))
        with written_beside(folder / LABELS) as new, new.open("w", encoding="utf-8") as file:
            for key, label in self.labels.items():
                row = rows[key] | {"label": self.record.labels[label], "key": key}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write_outputs(self, folder: Path) -> None:
        """Write what all exits said of the validation texts, and in the metadata of which weights."""
        its = self.outputs
        tensors = {name: value.contiguous() for name, value in its._asdict().items() if isinstance(value, Tensor)}
        facts = {"exits": json.dumps(its.exits), "metric": its.metric, "precision": its.precision, "id": str(self.id)}
        with written_beside(folder / LOGITS) as new:
            new.write_bytes(save(tensors, facts))

    def write_point(self, folder: Path) -> None:
        """Write what is deployed."""
        write_json(folder / OPERATING, asdict(self.point))


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run."""
    return (folder / "run.json").is_file()


def load_trunk(folder: Path) -> tuple[MultiExitModel, list[str], Record | None]:
    """A run's model with its last exit alone, or a classifier in the Hugging Face layout; its labels; its record."""
    if is_run(folder):
        run = Run.read(folder)
        model = run.model.models_alone[-1]
        return model.keep_exits(model.head_layers[-1:]), run.record.labels, run.record
    if not folder.is_dir():
        why = f"{folder} is no folder; should be a run, or a classifier in the Hugging Face layout"
        raise InputError(why, "trunk")
    encoder, classifier, labels = load_classifier(folder)
    if labels == [f"LABEL_{number}" for number in range(len(labels))]:
        LOG.warning("%s: its labels have no names; write them into id2label of its config.json", folder)
    trunk = MultiExitModel(encoder, (len(encoder.layers),), len(labels), "plain")  # its pooler is the checkpoint's
    trunk.heads[0].classifier.load_state_dict(classifier.state_dict())
    return trunk.eval(), labels, None


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run under `runs` that was written last. Raises InputError for none; and if a newer one is unfinished."""
    records = [*runs.glob("[!.]*/run.json"), *runs.glob(".*.checkpoint")]  # other dots: runs that are being written
    newest = max(records, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise InputError(f"{runs}/: no run here; train one with train.py, or name a run folder")
    if newest.name != "run.json":
        name = runs / newest.name[1:].removesuffix(".checkpoint")
        raise InputError(f"{name}: its training is not finished; finish it (train.py --resume), or name another run")
    return newest.parent
