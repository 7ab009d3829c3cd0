"""Files of tasks in the form in which their authors publish them."""

import collections
import json

import pytest

from examples.llm.errors import UsageError
from examples.llm.instructions.formats import Pair, reader_of
from examples.llm.tasks.example import Example
from examples.llm.tasks.loading import known_format, load_test, read_data
from examples.llm.tasks.sources import find_source

BOOLQ = {
    "question": "do iran and afghanistan speak the same language",
    "passage": "Persian is spoken in Iran. ", "idx": 0, "label": True,
}  # fmt: skip
RTE = [
    {"premise": "No weapons were found.", "hypothesis": "Weapons were found.",
     "label": "not_entailment", "idx": 0},
    {"premise": "A place of sorrow.", "hypothesis": "A place.", "label": "entailment", "idx": 1},
]  # fmt: skip
CB = [
    {"premise": "It was a complex language.", "hypothesis": "the language was written",
     "label": label, "idx": n}
    for n, label in enumerate(["entailment", "neutral", "contradiction"])
]  # fmt: skip
SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": "Normans", "paragraphs": [
            {"context": "The Normans gave their name to Normandy. ", "qas": [
                {"question": " Where is it?", "id": "1", "is_impossible": False, "answers": [
                    {"text": "Normandy", "answer_start": 31},
                    {"text": "in Normandy", "answer_start": 28},
                    {"text": "Normandy", "answer_start": 31}]},
                {"question": "Who ruled?", "id": "2", "is_impossible": True, "answers": [],
                 "plausible_answers": [{"text": "Normans", "answer_start": 4}]}]}]},
        {"title": "Oxygen", "paragraphs": [{"context": "O is 8.", "qas": [
            {"question": "Its number?", "id": "3",
             "answers": [{"text": "8", "answer_start": 5}]}]}]},
    ],
}  # fmt: skip
GSM8K = {
    "question": "She eats 3 of 16 eggs and sells the rest for $2 each. How much?",
    "answer": "She sells 16 - 3 = <<16-3=13>>13.\nShe makes 13 * 2 = $<<13*2=26>>26.\n#### 26",
}
MMLU_CSV = (
    '"Find the degree for Q(sqrt(2), sqrt(3)).",0,4,2,6,B\n"Is 2, or\n3?",yes,no,"a ""b""",none,D\n'
)
SHARE_GPT = [
    {"id": "a", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"},
        {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "See you."},
        {"from": "human", "value": "Wait"}]},
    {"id": "b", "conversations": []},
]  # fmt: skip


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def data_in(path):
    return read_data(find_source(str(path), path.parent))


def format_in(path):
    return known_format(data_in(path)).name


def examples(path, *, aligned=True):
    data = data_in(path)
    format_ = known_format(data)
    template = format_.wording.aligned if aligned else format_.wording.bare
    return [template.example(format_.record(row)) for row in data.any_rows]


@pytest.mark.parametrize(
    "row",
    [BOOLQ, {"answer" if k == "label" else k: v for k, v in BOOLQ.items()}, BOOLQ | {"label": 1}],
)
def test_boolq_of_superglue_of_its_authors_and_of_the_hub(row, tmp_path):
    path = written(tmp_path, "train.jsonl", jsonl(row))
    (example,) = examples(path)
    assert example == Example(
        "Persian is spoken in Iran. Do iran and afghanistan speak the same language?\n",
        ("No", "Yes"), 1,
    )  # fmt: skip
    (bare,) = examples(path, aligned=False)
    assert bare.prompt.endswith("Iran. do iran and afghanistan speak the same language")


def test_rte_of_superglue_and_of_glue(tmp_path):
    expected = [
        Example(
            'No weapons were found.\nDoes this mean that "Weapons were found." is true? '
            "Yes or No?\n", ("Yes", "No"), 1,
        ),
        Example('A place of sorrow.\nDoes this mean that "A place." is true? Yes or No?\n',
                ("Yes", "No"), 0),
    ]  # fmt: skip
    assert examples(written(tmp_path, "train.jsonl", jsonl(*RTE))) == expected
    rows = ["index\tsentence1\tsentence2\tlabel"]
    rows += [f"{row['idx']}\t{row['premise']}\t{row['hypothesis']}\t{row['label']}" for row in RTE]
    assert examples(written(tmp_path, "train.tsv", "\n".join(rows))) == expected


def test_cb_differs_from_rte_by_its_labels(tmp_path):
    found = examples(written(tmp_path, "train.jsonl", jsonl(*CB)))
    prompt = (
        'Suppose It was a complex language. Can we infer that "the language was written"? '
        "Yes, No, or Maybe?\n"
    )
    assert found[0] == Example(prompt, ("Yes", "No", "Maybe"), 0)
    assert [example.label for example in found] == [0, 2, 1]


PAIR = {"sentence1": "It rained.", "sentence2": "It is wet.", "label": 1, "idx": 0}
SUPER = {"premise": "It rained.", "hypothesis": "It is wet.", "label": 1}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("RTE/train.jsonl", PAIR, "rte"),
        ("RTE/train/0.jsonl", SUPER, "rte"),
        ("glue/rte_train.jsonl", PAIR, "rte"),
        ("CB/train.jsonl", SUPER, "cb"),
        ("rte/CB/train.jsonl", SUPER, "cb"),  # the nearest name tells
        ("cb_rte/train.jsonl", SUPER, None),
        ("glue/train.jsonl", PAIR, None),
        ("MRPC/train.jsonl", PAIR, None),
    ],
)
def test_labels_that_are_numbers_need_a_name(name, row, expected, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(jsonl(row | {"label": -1}, row))
    if expected:
        assert format_in(path) == expected
        return
    with pytest.raises(UsageError) as error:
        format_in(path)
    assert str(error.value).startswith(f"--task: {path}, line 2: label 1 can be RTE's, CB's, MNLI")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "fine", "label": 1},  # IMDB, AG News
        {"text": "fine", "label": "positive"},
        {"prompt": "a", "completion": "b", "label": False},  # KTO's: what not to learn
        {"question": "q?", "sentence": "s", "label": 1},  # QNLI
        {"sentence1": "a", "sentence2": "b", "label": 0.5},  # STS-B
    ],
)
def test_labels_are_not_ignored(row, tmp_path):
    path = written(tmp_path, "train.jsonl", jsonl(row))
    assert reader_of(data_in(path).any_rows) is None
    with pytest.raises(UsageError, match=f"line 1: {', '.join(row)}: these are not the fields"):
        format_in(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_squad_with_questions_that_have_no_answer(indent, tmp_path):
    path = written(tmp_path, "dev-v2.0.json", json.dumps(SQUAD, indent=indent))
    place, none, number = examples(path)
    assert place == Example(
        "Title: Normans\nContext: The Normans gave their name to Normandy.\n"
        "Question: Where is it?\nAnswer:",
        (" Normandy\n",), answers=("Normandy", "in Normandy"),
    )  # fmt: skip
    assert none.options == (" unanswerable\n",) and none.answers == ("unanswerable",)
    assert number.prompt.startswith("Title: Oxygen\nContext: O is 8.") and number.answers == ("8",)
    # Questions on one passage are of one part.
    one, two, three = (known_format(data_in(path)).record(row) for row in data_in(path).any_rows)
    assert one.keys == two.keys != three.keys


def test_gsm8k(tmp_path):
    (example,) = examples(written(tmp_path, "train.jsonl", jsonl(GSM8K)))
    assert example.prompt == f"Question: {GSM8K['question']}\nAnswer:"
    assert example.options == (f" {GSM8K['answer']}",) and example.answers == (GSM8K["answer"],)


LISTED = "Which?\nOptions:\n(A) - one\n(B) two\n(C) (D) three"
BBH = {
    "letters": ([(LISTED, "(C)"), ("Or?\nOptions:\n(A) x\n(B) y", "(A)")],
                [((" (A)", " (B)", " (C)"), 2), ((" (A)", " (B)"), 0)]),
    "words": ([("So?\nOptions:\n- valid \n- invalid", "invalid")] * 2,
              [((" valid", " invalid"), 1)] * 2),
    "no list": ([("not ( True ) is", "False"), ("True is", "True")],
                [((" False", " True"), 0), ((" False", " True"), 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BBH)
def test_options_of_big_bench_hard(name, tmp_path):
    pairs, expected = BBH[name]
    rows = [{"input": text, "target": target} for text, target in pairs]
    found = examples(written(tmp_path, "a.json", {"canary": "x", "examples": rows}))
    assert [(example.options, example.label) for example in found] == expected
    assert found[0].prompt == f"Q: {pairs[0][0]}\nA:"


def test_big_bench_hard_without_options_is_answered_freely(tmp_path):
    rows = [{"input": f"Sort {n}", "target": f"a {n}"} for n in range(9)]
    path = written(tmp_path, "a.json", {"canary": "x", "examples": rows})
    assert known_format(data_in(path)).answers
    assert examples(path)[3] == Example("Q: Sort 3\nA:", (" a 3",), answers=("a 3",))


def test_a_folder_of_big_bench_hard_has_the_options_of_each_file(tmp_path):
    for name, targets in (("sports", ("no", "yes")), ("letters", ("(A)", "(B)", "(C)"))):
        rows = [{"input": f"{name} {n}", "target": target} for n, target in enumerate(targets)]
        written(tmp_path, f"{name}.json", {"examples": rows})
    found = {example.subject: example.options for example in examples(tmp_path)}
    assert found == {"sports": (" no", " yes"), "letters": (" (A)", " (B)", " (C)")}


def test_mmlu_as_its_authors_and_the_hub_have_it(tmp_path):
    path = written(tmp_path, "abstract_algebra_test.csv", MMLU_CSV)
    first, second = examples(path)
    assert first == Example(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find the degree for Q(sqrt(2), sqrt(3)).\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:",
        (" A", " B", " C", " D"), 1, "abstract_algebra",
    )  # fmt: skip
    assert 'Is 2, or\n3?\nA. yes\nB. no\nC. a "b"\nD. none' in second.prompt and second.label == 3
    row = {"question": "Find the degree for Q(sqrt(2), sqrt(3)).", "choices": ["0", "4", "2", "6"],
           "subject": "abstract_algebra", "answer": 1}  # fmt: skip
    for answer in (1, "B"):
        assert examples(written(tmp_path, "a.json", [row | {"answer": answer}])) == [first]


def test_a_folder_of_mmlu_is_judged_by_its_test(tmp_path):
    for part, letter in (("dev", "A"), ("val", "B"), ("test", "C")):
        (tmp_path / part).mkdir()
        for subject in ("anatomy", "astronomy"):
            name = f"{subject}_{part}.csv"
            written(tmp_path / part, name, f"{part} {subject}?,w,x,y,z,{letter}\n")
    data = read_data(find_source(str(tmp_path), tmp_path, "--judge"))
    found = load_test(data, 9, known_format(data).wording.aligned).test
    assert {(example.subject, example.label) for example in found} == {
        ("anatomy", 2), ("astronomy", 2),
    }  # fmt: skip
    # One part, named by itself, is a folder of files that belong together.
    assert len(examples(tmp_path / "val")) == 2


def pairs_in(path):
    rows = data_in(path).any_rows
    return [dialogue.pairs for row in rows for dialogue in reader_of(rows)(row)]


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_conversations_of_sharegpt(tmp_path):
    (pairs,) = pairs_in(written(tmp_path, "a.JSON", SHARE_GPT))
    assert pairs == (
        Pair(f"{SYSTEM} USER: Hi ASSISTANT:", " Hello!"),
        Pair("USER: Bye ASSISTANT:", " See you."),
    )


def test_conversations_of_messages(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("user", "You?"), ("assistant", "Yes")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (pairs,) = pairs_in(written(tmp_path, "a.jsonl", jsonl(row)))
    assert pairs == (Pair("Be brief. USER: Hi USER: You? ASSISTANT:", " Yes"),)
    row["messages"][1]["role"] = "tool"
    with pytest.raises(UsageError, match=r"line 1: role must be of system, human.* got 'tool'"):
        pairs_in(written(tmp_path, "a.jsonl", jsonl(row)))


def test_instructions_in_a_table(tmp_path):
    path = written(tmp_path, "a.TSV", 'instruction\tinput\toutput\nSay "hi"\t\t"hi"\n')
    ((pair,),) = pairs_in(path)
    assert pair.source.endswith('### Instruction:\nSay "hi"\n\n### Response: ')
    assert pair.target == '"hi"'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", jsonl(BOOLQ | {"label": 2}), "line 1: label must be False or True, got 2"),
        ("a.jsonl", jsonl(RTE[0], RTE[1] | {"label": "maybe"}),
         "line 1: premise, hypothesis, label, idx: these are not the fields and labels of SST-2"),
        ("a.json", {"version": "1.1", "data": [{"title": "x"}]}, "there is no field 'paragraphs'"),
        ("a.json", {"version": "1.1", "data": [3]}, "data: must be a JSON object, got int"),
        ("a.json", '{"version": "1.1",\n"data": [', "line 1: not JSON"),
        ("a.jsonl", jsonl(GSM8K | {"answer": "26"}), "answer must end with #### and a number"),
        ("a.csv", "Q?,w,x,y,z,A\nQ?,w,x,y,A\n", "row 1: must have 6 columns, got 5"),
        ("a.csv", "Q?,w,x,y,z,A\nQ?,w,x,y,z,E\n", "row 1: answer must be 'A' or 'B' or 'C' or"),
        ("a.json", [{"question": "Q", "choices": ["w"], "answer": 0}], "choices must be four"),
        ("a.json", {"examples": [{"input": "?\nOptions:\n- Yes", "target": "No"}]},
         "example 1: target must be 'Yes', got 'No'"),
        ("a.jsonl", jsonl({"context": "c", "question": "q", "answers": {"text": "a"}}),
         "text must be a list, got 'a'"),
        ("a.jsonl", jsonl({"context": "c", "question": "q", "answers": {"text": ["a", "\ud83d"]}}),
         "text[1] must be text, got half"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(name, content, message, tmp_path):
    path = written(tmp_path, name, content)
    with pytest.raises(UsageError) as error:
        examples(path)
    assert str(error.value).startswith(f"--task: {path}, ") and "\n" not in str(error.value)
    assert message in str(error.value)


def test_real_files(shared_dir):
    data = shared_dir / "data"
    assert [len(part) for part in data_in(data / "gsm8k").rows] == [7473, 0, 1319]
    assert len(examples(data / "gsm8k")) == 7473
    labels = {
        path.stem: collections.Counter(example.options[example.label] for example in examples(path))
        for path in (data / "bbh").glob("*.json")
    }
    assert labels == {
        "boolean_expressions": {" True": 135, " False": 115},
        "causal_judgement": {" Yes": 97, " No": 90},
        "navigate": {" No": 145, " Yes": 105},
        "snarks": {" (B)": 96, " (A)": 82},
        "sports_understanding": {" no": 135, " yes": 115},
    }
    seeds = pairs_in(data / "self_instruct_seed_tasks.jsonl")
    assert len(seeds) >= 175 and all("### Instruction:\n" in pairs[0].source for pairs in seeds)
