"""Data in the parts that they come in: folders, files given one by one, the Hugging Face hub."""

import dataclasses
import importlib.util
import json

import pytest

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.program.settings import DEFAULTS
from examples.llm.tasks.loading import known_format, load_task, read_data
from examples.llm.tasks.sources import find_source
from examples.llm.training.problems import build_problem


def sst2(part, count, labelled=True):
    """GLUE's file: the test has other columns, and no labels."""
    if not labelled:
        return "index\tsentence\n" + "".join(f"{n}\t{part} {n}\n" for n in range(count))
    return "sentence\tlabel\n" + "".join(f"{part} {n}\t{n % 2}\n" for n in range(count))


def glue_folder(folder, **parts):
    folder.mkdir()
    for part, content in parts.items():
        (folder / f"{part}.tsv").write_text(content)
    return folder


def words(task):
    """Which files the examples of each part are from, and how many there are."""
    parts = (task.train, task.dev, task.test)
    return [({x.prompt.split()[0] for x in part}, len(part)) for part in parts]


def loaded(source, sizes=(30, 4, 5)):
    data = read_data(source)
    return load_task(data, sizes, known_format(data).wording.aligned)


def test_a_folder_that_is_split_already_is_used_so(tmp_path):
    contents = {part: sst2(part, 20) for part in ("train", "dev", "test")}
    folder = glue_folder(tmp_path / "SST-2", **contents)
    found = words(loaded(find_source(str(folder), tmp_path)))
    assert found == [({"train"}, 20), ({"dev"}, 4), ({"test"}, 5)]


def test_without_labels_for_the_test_the_development_part_is_reported(tmp_path):
    contents = {"train": sst2("train", 20), "dev": sst2("dev", 20), "test": sst2("test", 9, False)}
    folder = glue_folder(tmp_path / "SST-2", **contents)
    task = loaded(find_source(str(folder), tmp_path))
    assert words(task) == [({"train"}, 16), ({"train"}, 4), ({"dev"}, 5)]
    assert not {x.prompt for x in task.train} & {x.prompt for x in task.dev}


def test_files_that_are_given_one_by_one(tmp_path):
    folder = glue_folder(tmp_path / "a", **{part: sst2(part, 20) for part in ("one", "two", "six")})
    train, dev, test = (folder / f"{name}.tsv" for name in ("one", "two", "six"))
    for given, expected in (
        ({"dev": dev}, [({"one"}, 15), ({"two"}, 4), ({"one"}, 5)]),
        ({"test": test}, [({"one"}, 16), ({"one"}, 4), ({"six"}, 5)]),
        ({"dev": dev, "test": test}, [({"one"}, 20), ({"two"}, 4), ({"six"}, 5)]),
    ):
        assert words(loaded(find_source(str(train), tmp_path, **given))) == expected
    # A folder whose files are of no part is one set.
    assert words(loaded(find_source(str(folder), tmp_path)))[0][0] == {"one", "two", "six"}


def test_the_identity_is_of_the_content(tmp_path):
    folder = glue_folder(tmp_path / "a", train=sst2("train", 9), dev=sst2("dev", 9))
    before = find_source(str(folder), tmp_path).identity()
    assert find_source(str(folder), tmp_path).identity() == before
    (folder / "dev.tsv").write_text(sst2("dev", 8))
    assert find_source(str(folder), tmp_path).identity() != before
    train, other = folder / "train.tsv", folder / "dev.tsv"
    as_dev, as_test = (
        find_source(str(train), tmp_path, **{part: other}).identity() for part in ("dev", "test")
    )
    assert as_dev != as_test


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["train.tsv", "dev.tsv"], {"dev": "x"}, "--dev: .* comes in parts already"),
        (["train_s.tsv", "train_xs.tsv"], {}, "several parts train_s.tsv, train_xs.tsv: choose"),
        (["readme.md"], {}, "has no file in .csv, .json"),
        (["a/train.tsv"], {}, "has folders none of which is train"),
        (["train.tsv"], {"test": "x"}, "--test: there is no file or folder .*/x$"),
        (
            ["train.tsv", "b/dev.tsv"],
            {"test": "b"},
            "--test: .*/b comes in parts, none of them",
        ),
    ],
)
def test_folders_that_do_not_do(names, arguments, message, tmp_path):
    for name in names:
        (tmp_path / "task" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "task" / name).write_text(sst2("x", 3))
    given = {flag: tmp_path / "task" / name for flag, name in arguments.items()}
    with pytest.raises(UsageError, match=message):
        find_source(str(tmp_path / "task"), tmp_path, **given)


@pytest.mark.parametrize("part", ["dev", "test"])
def test_a_file_is_in_one_part_alone(part, tmp_path):
    train = glue_folder(tmp_path / "a", train=sst2("x", 9)) / "train.tsv"
    copy = glue_folder(tmp_path / "b", copy=sst2("x", 9)) / "copy.tsv"
    (tmp_path / "link.tsv").symlink_to(train)
    for other in (train, copy, tmp_path / "link.tsv"):
        with pytest.raises(UsageError, match=f"--{part}: {other} has the same .* --task: {train}"):
            find_source(str(train), tmp_path, **{part: other})
    (copy.parent / "copy.tsv").rename(copy.parent / f"{part}.tsv")
    (copy.parent / "train.tsv").write_text(sst2("x", 9))
    with pytest.raises(UsageError, match=f"--task: .*{part}.tsv has the same content"):
        find_source(str(copy.parent), tmp_path)


def test_what_is_judged_is_not_learnt(tmp_path):
    folder = tmp_path / "a"
    rows = {"train": range(20), "dev": range(12, 16), "test": range(15, 18)}
    contents = {
        part: "sentence\tlabel\n" + "".join(f"Row {n}\t{n % 2}\n" for n in numbers)
        for part, numbers in rows.items()
    }
    contents["dev"] = contents["dev"].replace("Row ", "row  ")
    glue_folder(folder, **contents)

    def numbers(**given):
        task = loaded(find_source(str(folder / "train.tsv"), tmp_path, **given), (30, 9, 9))
        parts = (task.train, task.dev, task.test)
        return [sorted(int(x.prompt.split()[1]) for x in part) for part in parts]

    dev, test = folder / "dev.tsv", folder / "test.tsv"
    learnt = [*range(12), 18, 19]
    assert numbers(dev=dev, test=test) == [learnt, [12, 13, 14], [15, 16, 17]]
    train, dealt, given = numbers(test=test)
    assert sorted(train + dealt) == [*range(15), 18, 19] and len(dealt) == 4
    assert given == [15, 16, 17]
    for part in ("dev", "test"):
        with pytest.raises(UsageError, match="--task: all there is to train on is judged by, too"):
            (folder / f"{part}.tsv").write_text(contents["train"] + "more\t1\n")
            numbers(**{part: folder / f"{part}.tsv"})


def test_a_folder_of_files_can_be_a_part(tmp_path):
    for part in ("auxiliary", "dev", "test", "val"):
        for subject in ("anatomy", "law"):
            path = tmp_path / "mmlu" / part / f"{subject}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{part} {subject} {n}?,w,x,y,z,C\n" for n in range(10)))
    mmlu = tmp_path / "mmlu"
    for test in (mmlu / "test", mmlu):
        source = find_source(str(mmlu / "auxiliary"), tmp_path, dev=mmlu / "val", test=test)
        parts = loaded(source, (30, 20, 20))
        for examples, part in zip((parts.train, parts.dev, parts.test), ("aux", "val", "test")):
            assert len(examples) == 20 and {x.subject for x in examples} == {"anatomy", "law"}
            assert all(f"\n\n{part}" in x.prompt for x in examples)


def test_a_part_that_is_dealt_out_is_a_quarter_at_most(tmp_path):
    # COPA's 400 and 100, by the benchmark's settings: 500 to choose by, 1000 to report.
    folder = tmp_path / "COPA"
    folder.mkdir()
    for part, count in (("train", 400), ("val", 100)):
        row = {"choice1": "It sank.", "choice2": "It swam.", "question": "effect", "label": 0}
        rows = [{"premise": f"The {part} fell {n}.", **row} for n in range(count)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = loaded(find_source(str(folder), tmp_path), (1000, 500, 1000))
    assert [len(part) for part in (task.train, task.dev, task.test)] == [300, 100, 100]


def test_what_is_only_judged_by_cannot_be_learnt_from(tmp_path):
    folder = glue_folder(tmp_path / "a", test=sst2("test", 9))
    with pytest.raises(UsageError, match="nothing to train on"):
        loaded(find_source(str(folder), tmp_path))


@pytest.fixture
def datasets(monkeypatch):
    """The library, which must not look for a network."""
    pytest.importorskip("datasets", reason="datasets, the extra `hub`, is missing")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def hub_rte(datasets, labels):
    """As `load_dataset("super_glue", "rte")` gives it: labels are numbers, -1 for none."""
    features = datasets.Features(
        premise=datasets.Value("string"), hypothesis=datasets.Value("string"),
        idx=datasets.Value("int32"),
        label=datasets.ClassLabel(names=["entailment", "not_entailment"]),
    )  # fmt: skip
    rows = [
        {"premise": f"{len(labels)} p{n}", "hypothesis": "h", "idx": n, "label": label}
        for n, label in enumerate(labels)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def test_a_data_set_of_the_hub_is_the_task_of_its_fields(datasets, tmp_path):
    parts = datasets.DatasetDict(
        train=hub_rte(datasets, [0, 1] * 10), validation=hub_rte(datasets, [1, 0, 1]),
        test=hub_rte(datasets, [-1] * 4),
    )  # fmt: skip
    parts.save_to_disk(tmp_path / "rte")
    source = find_source(f"hf:{tmp_path / 'rte'}", tmp_path)
    task = loaded(source)
    assert task.format.name == "rte"
    assert words(task) == [({"20"}, 16), ({"20"}, 4), ({"3"}, 3)]
    assert sorted(x.label for x in task.test) == [0, 1, 1]
    assert source.identity() == find_source(f"hf:{tmp_path / 'rte'}", tmp_path).identity()


def test_a_folder_of_files_through_the_library(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    folder.mkdir()
    for part, count in (("train", 8), ("test", 3)):
        rows = [{"question": f"{part} {n}?", "answer": f"#### {n}"} for n in range(count)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = loaded(find_source(f"hf:{folder}", tmp_path), (30, 2, 2))
    assert task.format.name == "gsm8k"
    assert [len(part) for part in (task.train, task.dev, task.test)] == [6, 2, 2]
    assert all("test" in x.prompt for x in task.test)


def test_data_sets_that_cannot_be_had_are_one_line(datasets, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for name in ("no/such", str(tmp_path / "empty")):
        with pytest.raises(UsageError, match=f"--judge: cannot load hf:{name}: ..") as error:
            find_source(f"hf:{name}", tmp_path, "--judge").rows()
        assert "\n" not in str(error.value)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name)
    )
    with pytest.raises(UsageError, match="needs a package: run `pip install datasets`"):
        find_source("hf:glue:sst2", tmp_path)


def test_the_parts_of_instructions_are_used_as_they_are(tiny_gguf, tmp_path):
    for part, count in (("train", 9), ("dev", 5), ("test", 3)):
        rows = [{"input": f"{part}{n}", "output": part} for n in range(count)]
        (tmp_path / f"{part}.json").write_text(json.dumps(rows))
    stored = GGUFModel(tiny_gguf)
    settings = dataclasses.replace(DEFAULTS, task=str(tmp_path), sequence_length=32)
    problem = build_problem(settings, stored.tokenizer(), stored.special_tokens())
    tokenizer = stored.tokenizer()
    for part, count in (("dev", 5), ("test", 3)):
        texts = [
            tokenizer.decode(row[row > 0].tolist())
            for batch in problem.held_out(part)
            for row in batch.tokens
            if row.any()
        ]
        assert len(texts) == count and all(text.endswith(part) for text in texts)
