"""Damaged files of every kind; `python -m tests.fuzz` reads thousands."""

from collections import Counter

import pytest

from tests import fuzz


@pytest.mark.long
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_read_whole_or_refused_in_one_line(kind, request):
    files = request.getfixturevalue("keras_files") if kind == "keras" else None
    count = {"pt": 150, "json": 150}.get(kind, 60)
    counts, failures = fuzz.run(kind, count, 0, files)
    assert not failures, "\n".join(failures)
    totals = Counter()
    for (_, outcome), number in counts.items():
        totals[outcome] += number
    assert totals.total() == count
    # the damage is neither harmless nor total; none to CIFAR-10 is harmless
    assert totals["refused"] > count // 5 and (totals["read"] > 0 or kind == "cifar")
