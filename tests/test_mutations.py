"""Mutants and their marks agree, without running one."""

import ast

import pytest
from mutations import MUTANTS, REPOSITORY, Mutant, marked_lines, mutated, unknown_words


def test_marks_and_entries_agree_one_to_one():
    marks = marked_lines()
    assert [mark for mark, places in marks.items() if len(places) != 1] == []
    names = [mutant.mark for mutant in MUTANTS]
    assert len(names) == len(set(names))
    assert set(marks) == set(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mark)
def test_a_mutant_is_python_and_not_what_was_there(mutant):
    path, text = mutated(mutant)
    original = path.read_text(encoding="utf-8")
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(original))
    for argument in mutant.tests.split():
        if argument.startswith("tests/"):
            assert (REPOSITORY / argument.split("::")[0]).exists(), argument


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mark)
def test_a_mutant_uses_names_that_its_file_has(mutant):
    assert not unknown_words(mutant), f"{mutant.mark}: follow the renaming in tests/mutations.py"


def test_a_mutant_with_a_name_from_before_a_renaming_is_found():
    assert unknown_words(Mutant("g-off", "loss = 0 * former_name * trust", "")) == {"former_name"}


@pytest.mark.parametrize("places", [0, 2])
def test_a_mark_that_is_missing_or_there_twice_stops_the_run(places, monkeypatch):
    place = marked_lines()["g-off"][0]
    monkeypatch.setattr("mutations.marked_lines", lambda: {"g-off": [place] * places})
    with pytest.raises(SystemExit, match=f"occurs {places} times"):
        mutated(Mutant("g-off", "loss = 0", ""))
