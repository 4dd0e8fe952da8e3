"""Mutants and their marks agree, without running one."""

import ast

import pytest
from mutations import MUTANTS, REPOSITORY, marked_lines, mutated


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
