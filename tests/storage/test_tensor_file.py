"""Memory that tensors of files are read into."""

import pytest

from lorac.storage.tensor_file import new_memory


@pytest.mark.parametrize("nbytes", [0, 1, 100, 10_000_001])
def test_new_memory_is_aligned_and_counts_as_what_was_asked_for(nbytes: int) -> None:
    several = [new_memory(nbytes) for _ in range(4)]
    assert {memory.untyped_storage().nbytes() for memory in several} == {nbytes}
    assert all(memory.data_ptr() % 64 == 0 for memory in several)
