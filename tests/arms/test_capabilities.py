"""Capabilities come from a file once they were found, and anew where anything that they depend on is another."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from splitlearn.arms import capabilities, capabilities_cache
from splitlearn.arms.capabilities import Capabilities, Question
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.flags.registry import Place
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory

FOUND = Capabilities(
    Place("cpu", no_truncation="a reason", vector="avx2", has_compiler=True), ("default", "tool"), (512, 0)
)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture
def question(files: ModelFiles) -> Question:
    return Question(files, None, "cpu", "float32", True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """What is asked of a child process, whose answer is FOUND."""
    questions: list[Question] = []

    def ask(question: Question) -> Capabilities:
        questions.append(question)
        return FOUND

    monkeypatch.setattr(capabilities, "ask", ask)
    return questions


def test_the_second_answer_is_the_first_and_takes_no_process(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = capabilities_cache.find(question, tmp_path / "new" / "v1", silent)
    monkeypatch.delattr(capabilities, "ask")
    assert capabilities_cache.find(question, tmp_path / "new" / "v1", silent) == first
    assert first.place.device == "cpu" and first.chat_templates and first.kv_bytes


def test_every_field_comes_back_as_it_was(question: Question, tmp_path: Path, asked: list[Question]) -> None:
    assert [capabilities_cache.find(question, tmp_path, silent) for _ in range(3)] == [FOUND] * 3
    assert asked == [question]


def test_another_question_is_asked_and_forgets_no_other(
    question: Question, tiny_model: TinyFactory, tmp_path: Path, asked: list[Question]
) -> None:
    others = [
        replace(question, device="auto"),
        replace(question, dtype="bfloat16"),
        replace(question, chat=False),
        replace(question, chat="default"),
        replace(question, draft=question.files),
        replace(question, files=tiny_model("llama", 4)),
    ]
    for each in (question, *others, *others, question):
        capabilities_cache.find(each, tmp_path, silent)
    assert asked == [question, *others]


def another_tokenizer(folder: Path, other: Path, patch: pytest.MonkeyPatch) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def a_gpu_hidden(folder: Path, other: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CUDA_VISIBLE_DEVICES", "7")


def a_package_installed(folder: Path, other: Path, patch: pytest.MonkeyPatch) -> None:
    (other / "torch-99.0.dist-info").mkdir(parents=True)
    patch.syspath_prepend(str(other))


def no_compiler(folder: Path, other: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", str(other))


def another_processor(folder: Path, other: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("splitlearn.runtime.hardware.instruction_sets", lambda *_: "another one")


@pytest.mark.parametrize(
    "change", [another_tokenizer, a_gpu_hidden, a_package_installed, no_compiler, another_processor]
)
def test_a_change_of_the_model_or_the_machine_asks_anew(
    change: Callable[[Path, Path, pytest.MonkeyPatch], None],
    files: ModelFiles,
    tmp_path: Path,
    asked: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in files.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    question = Question(replace(files, folder=folder), None, "cpu", "float32", True)
    capabilities_cache.find(question, tmp_path, silent)
    change(folder, tmp_path / "other", monkeypatch)
    capabilities_cache.find(question, tmp_path, silent)
    assert len(asked) == 2


def wrong(text: str) -> list[bytes]:
    """What may stand in the place of `text`, a good file."""
    good = json.loads(text)
    (key,) = good["answers"]

    def with_answer(**changes: object) -> bytes:
        return json.dumps({"answers": {key: {**good["answers"][key], **changes}}}).encode()

    return [
        b"",
        text.encode()[: len(text) // 2],
        b"\xff\xfe\x00",
        b"[]",
        b"[" * 100_000,
        b'{"answers": 1}',
        json.dumps({"answers": {key: {}}}).encode(),
        with_answer(kv_bytes=["512"]),
        with_answer(kv_bytes=[True]),
        with_answer(chat_templates=[1]),
        with_answer(place=None),
        with_answer(place={**good["answers"][key]["place"], "device": 3}),
        text.encode() + b" " * capabilities_cache.MOST_BYTES,
    ]


def test_a_damaged_or_foreign_file_is_ignored_and_written_anew(
    question: Question, tmp_path: Path, asked: list[Question]
) -> None:
    path = tmp_path / capabilities_cache.NAME
    capabilities_cache.find(question, tmp_path, silent)
    text = path.read_text()
    for count, content in enumerate(wrong(text), 2):
        path.write_bytes(content)
        assert capabilities_cache.find(question, tmp_path, silent) == FOUND
        assert (len(asked), path.read_text()) == (count, text)
    assert list(tmp_path.iterdir()) == [path]


def test_where_no_file_can_be_written_the_answer_is_there_all_the_same(
    question: Question, tmp_path: Path, asked: list[Question]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / capabilities_cache.NAME).mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "folder"):
        assert capabilities_cache.find(question, folder, silent) == FOUND
    assert list((tmp_path / "folder").iterdir()) == [tmp_path / "folder" / capabilities_cache.NAME]


def test_an_error_is_never_stored(question: Question, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="nosuch"):
            capabilities_cache.find(replace(question, chat="nosuch"), tmp_path, silent)
    assert not (tmp_path / capabilities_cache.NAME).exists()


def test_the_file_does_not_grow_without_end(question: Question, tmp_path: Path, asked: list[Question]) -> None:
    for number in range(capabilities_cache.MOST + 5):
        capabilities_cache.find(replace(question, chat=f"name {number}"), tmp_path, silent)
    kept = json.loads((tmp_path / capabilities_cache.NAME).read_text())["answers"]
    assert len(kept) == capabilities_cache.MOST
    capabilities_cache.find(replace(question, chat=f"name {number}"), tmp_path, silent)
    assert len(asked) == capabilities_cache.MOST + 5
