"""Several hundred damaged files; `python -m tests.fuzz` makes thousands."""

import pytest

from tests import fuzz


@pytest.mark.long
def test_damaged_files_are_converted_or_refused(keras_files):
    counts, failures = fuzz.run(keras_files, count=400, seed=0)
    assert not failures, "\n".join(failures)
    outcomes = {
        name: sum(number for (_, found), number in counts.items() if found == name) for _, name in counts
    }
    assert (
        outcomes["converted"] > 40 and outcomes["refused"] > 150
    )  # the damage was neither harmless nor total
    assert len({kind for kind, _ in counts}) > 15
