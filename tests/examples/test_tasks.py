"""Tasks in the formats of their authors: what is read, how it is worded and dealt out."""

import json
import zipfile

import pytest

from examples.llm.errors import UsageError
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS
from examples.llm.tasks import templates
from examples.llm.tasks.example import Example, Record
from examples.llm.tasks.loading import known_format, load_task, read_data
from examples.llm.tasks.problem import decoder_reading
from examples.llm.tasks.sources import find_source
from examples.llm.tasks.splits import split

SST2 = 'sentence\tlabel\nhide new secretions \t0\ncontains "no wit , \t0\nworth it \t1\n'
SMS = "ham\tSee you\tat 5\nspam\tWIN a prize £\n"
COPA = [
    {"premise": "My body cast a shadow over the grass.", "choice1": "The sun was rising.",
     "choice2": "The grass was cut.", "question": "cause", "idx": 0, "label": 0},
    {"premise": "The man broke his toe.", "choice1": "He got a hole in his sock.",
     "choice2": "I'm told he dropped a hammer.", "question": "effect", "idx": 1, "label": 1},
]  # fmt: skip
WINOGRANDE = [
    {"qID": "ABC-1", "sentence": "Ian ate _ 's stew.", "option1": "Bob", "option2": "Al",
     "answer": "2"},
    {"qID": "ABC-2", "sentence": "_ won.", "option1": "Bob", "option2": "Al", "answer": "1"},
]  # fmt: skip
MULTIRC = [
    {"idx": 0, "version": 1.1, "passage": {"text": "It rained. ", "questions": [
        {"question": "Did it rain?", "idx": 0, "answers": [
            {"text": "Yes", "idx": 0, "label": 1}, {"text": "It was dry", "idx": 1, "label": 0}]},
        {"question": "When?", "idx": 1, "answers": [{"text": "Then", "idx": 2, "label": 0}]},
    ]}},
]  # fmt: skip


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def data_in(path):
    return read_data(find_source(str(path), path.parent))


def format_in(path):
    return known_format(data_in(path))


def records_in(path):
    data = data_in(path)
    return [known_format(data).record(row) for row in data.any_rows]


def examples(path, *, aligned=True):
    wording = format_in(path).wording
    template = wording.aligned if aligned else wording.bare
    return [template.example(record) for record in records_in(path)]


def test_sst2_as_glue_has_it(tmp_path):
    path = written(tmp_path, "train.tsv", SST2)
    options = (" terrible", " great")
    assert format_in(path).name == "sst2"
    assert examples(path) == [
        Example("hide new secretions It was", options, 0),
        Example('contains "no wit , It was', options, 0),
        Example("worth it It was", options, 1),
    ]
    assert examples(path, aligned=False)[2] == Example("worth it", options, 1)


def test_copa_as_superglue_has_it(tmp_path):
    path = written(tmp_path, "train.jsonl", jsonl(COPA))
    assert format_in(path).name == "copa"
    assert examples(path) == [
        Example("My body cast a shadow over the grass because",
                (" the sun was rising.", " the grass was cut."), 0),
        Example("The man broke his toe so",
                (" he got a hole in his sock.", " I'm told he dropped a hammer."), 1),
    ]  # fmt: skip
    assert examples(path, aligned=False)[0] == Example(
        "My body cast a shadow over the grass.", (" The sun was rising.", " The grass was cut."), 0
    )


def test_winogrande(tmp_path):
    path = written(tmp_path, "train_xs.jsonl", jsonl(WINOGRANDE))
    assert format_in(path).name == "winogrande"
    assert examples(path) == [
        Example("Ian ate", (" Bob 's stew.", " Al 's stew."), 1),
        Example("", ("Bob won.", "Al won."), 0),
    ]
    with pytest.raises(UsageError, match="--no-template: winogrande has no template"):
        decoder_reading(format_in(path), None, NO_SPECIAL_TOKENS, 8, aligned=False)


def test_multirc_as_superglue_has_it(tmp_path):
    path = written(tmp_path, "val.jsonl", jsonl(MULTIRC))
    assert format_in(path).name == "multirc"
    first, second, third = examples(path)
    assert first == Example(
        "It rained.\nQuestion: Did it rain?\nAnswer: Yes\nIs this answer correct?",
        (" No", " Yes"), 1,
    )  # fmt: skip
    assert (second.label, third.label) == (0, 0)
    assert examples(path, aligned=False)[2].prompt == "It rained. When? Then"


def test_sms_and_its_tabs(tmp_path):
    path = written(tmp_path, "messages.tsv", SMS)
    assert format_in(path).name == "sms"
    ham, spam = examples(path)
    assert ham == Example("See you\tat 5\nThis message is", (" normal", " spam"), 0)
    assert spam.label == 1 and "£" in spam.prompt


def polarity_zip(folder, **parts):
    path = folder / "sentence_polarity.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for ending, text in parts.items():
            archive.writestr(f"sentence_polarity/rt-polarity.{ending}", text)
    return path


def test_polarity_is_latin_1(tmp_path):
    path = polarity_zip(tmp_path, neg="bad caf\xe9 \n".encode("latin-1"), pos=b"good . \nfine \n")
    found = examples(path)
    assert [(example.prompt, example.label) for example in found] == [
        ("bad café It was", 0),
        ("good . It was", 1),
        ("fine It was", 1),
    ]
    assert find_source("polarity", tmp_path) == find_source(str(path), tmp_path)


def test_files_of_the_real_world(tmp_path):
    path = written(tmp_path, "a.tsv", b"\xef\xbb\xbfsentence\tlabel\r\nfine \xc2\x85 so\t1\r\n\r\n")
    (example,) = examples(path)
    assert example == Example("fine \x85 so It was", (" terrible", " great"), 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nfine\t2\n", "line 2: label must be '0' or '1', got '2'"),
        ("a.tsv", "sentence\tlabel\n\nfine\n", "line 3: must have 2 columns, got 1"),
        ("a.tsv", "index\tsentence\n0\tfine\n", "line 2: there is no field 'label'"),
        ("a.tsv", b"sentence\tlabel\n\xff\t1\n", "line 2: not utf-8-sig: invalid start byte"),
        ("a.tsv", "ham\tx\nspam x\n", "line 2: must have 2 columns, got 1"),
        ("a.tsv", "ham\tx\neggs\tx\n", "line 2: label must be 'ham' or 'spam', got 'eggs'"),
        ("a.tsv", "one\ttwo\nthree\tfour\n", "line 2: one, two: these are not the fields"),
        ("a.tsv", "\n", "is empty"),
        ("a.jsonl", jsonl(COPA[:1]) + "{\n", "line 2: not JSON"),
        ("a.jsonl", jsonl([*COPA, {"premise": "x"}]), "line 3: there is no field 'question'"),
        ("a.jsonl", jsonl([COPA[0] | {"label": -1}]), "line 1: label must be 0 or 1, got -1"),
        ("a.jsonl", jsonl([COPA[0] | {"label": True}]), "line 1: label must be 0 or 1, got True"),
        ("a.jsonl", jsonl([COPA[0] | {"question": "why"}]), "must be 'cause' or 'effect'"),
        ("a.jsonl", jsonl([COPA[0]]) + "[]\n", "line 2: must be a JSON object, got list"),
        ("a.jsonl", jsonl([WINOGRANDE[0] | {"answer": ""}]), "answer must be '1' or '2', got ''"),
        ("a.jsonl", jsonl([WINOGRANDE[0] | {"sentence": "none"}]), "must have one gap _"),
        ("a.jsonl", jsonl([{"passage": "x"}]), "line 1: passage: these are not the fields"),
        ("a.jsonl", jsonl([{"text": "x"}]), "line 1: text: these are not the fields"),
        ("a.zip", "no zip", "is no zip file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(UsageError) as error:
        examples(path)
    assert str(error.value).startswith(f"--task: {path}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_zip_of_something_else_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"does not hold one rt-polarity\.pos"):
        examples(polarity_zip(tmp_path, neg=b"bad\n"))


def test_tasks_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"--data: polarity needs sentence_polarity\.zip, which"):
        find_source("polarity", tmp_path)
    with pytest.raises(UsageError, match="--task: nowhere is neither a file or folder nor"):
        find_source("nowhere", tmp_path)


def records(count, *keys):
    return [Record({"text": str(n)}, tuple(key(n) for key in keys), n % 2) for n in range(count)]


def keys_of(part):
    return {key for record in part for key in record.keys}


def test_parts_have_their_sizes_and_share_nothing():
    train, dev, test = split(records(100, str), (30, 20, 10))
    assert (len(train), len(dev), len(test)) == (30, 20, 10)
    assert len(keys_of(train) | keys_of(dev) | keys_of(test)) == 60


def test_records_that_hang_together_stay_together():
    # 0-1, 2-3, ... by one key and 1-2, 3-4, ... by another; every eighth link is missing.
    chains = records(400, lambda n: f"a{n // 2}", lambda n: f"b{(n + 1) // 2 if n % 8 else -n}")
    parts = split(chains, (300, 50, 50))
    assert [len(part) for part in parts] == [296, 48, 48]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not keys_of(parts[one]) & keys_of(parts[other])


def test_equal_texts_are_equal_whatever_their_case_and_space(tmp_path):
    path = written(tmp_path, "a.tsv", "ham\tSee  you \nspam\tsee YOU\nham\tother\n")
    first, second, third = records_in(path)
    assert first.keys == second.keys != third.keys


def test_winogrande_twins_stay_together(tmp_path):
    path = written(tmp_path, "a.jsonl", jsonl(WINOGRANDE))
    first, second = records_in(path)
    assert set(first.keys) & set(second.keys) == {"ABC"}


def test_parts_depend_on_the_seed_alone():
    many = records(100, str)
    sizes = (50, 20, 20)
    assert split(many, sizes, 1) == split(many, sizes, 1) != split(many, sizes, 2)
    # What is reported does not change with how much there is to learn from.
    assert split(many, sizes, 1).test == split(many, (10, 20, 20), 1).test


def test_too_few_examples_are_refused():
    with pytest.raises(UsageError, match="2 examples on 2 subjects are too few"):
        split(records(2, str), (1, 1, 1))


def test_real_files(shared_dir):
    data = shared_dir / "data"
    polarity = load_task(
        read_data(find_source("polarity", data)), (1000, 500, 1000), templates.SENTIMENT.aligned
    )
    assert [len(part) for part in (polarity.train, polarity.dev, polarity.test)] == [
        1000,
        500,
        1000,
    ]
    assert 450 < sum(example.label for example in polarity.test) < 550
    labels = [record.label for record in records_in(data / "SMSSpamCollection.tsv")]
    assert (labels.count(0), labels.count(1)) == (4827, 747)
