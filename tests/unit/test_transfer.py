"""Arrays on their way to the device."""

import numpy as np
import pytest
import torch

from cxr_dist.model.graph import graphed
from cxr_dist.model.memory import keep_freed_memory
from cxr_dist.model.transfer import Transfer

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_an_array_is_used_where_it_lies() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    tensor = Transfer(torch.device("cpu"))(array)
    array[0, 0] = 9
    assert tensor.tolist() == [[9, 1, 2], [3, 4, 5]]


def test_on_a_cpu_an_array_that_may_not_be_written_is_copied() -> None:
    array = np.arange(3.0)
    array.flags.writeable = False
    tensor = Transfer(torch.device("cpu"))(array)
    tensor[0] = 5
    assert array.tolist() == [0, 1, 2]


@NEEDS_GPU
def test_on_a_gpu_batches_come_whole_and_in_order() -> None:
    transfer = Transfer(torch.device("cuda"))
    arrays = [np.full((64, 224, 224), number, dtype=np.uint8) for number in range(9)]
    sums = [transfer(array).long().sum() for array in arrays]
    assert [int(value) for value in sums] == [number * 64 * 224 * 224 for number in range(9)]


@NEEDS_GPU
def test_a_graph_gives_the_functions_own_values() -> None:
    def function(batch: torch.Tensor) -> torch.Tensor:
        return (batch * 2).relu()

    call = graphed(function)
    batches = [torch.randn(4, 4, device="cuda") for _ in range(3)]
    found = [call(batch) for batch in batches]
    assert all(torch.equal(mine, function(batch)) for mine, batch in zip(found, batches, strict=True))


def test_without_a_gpu_a_function_is_not_captured() -> None:
    calls = []
    call = graphed(lambda batch: calls.append(1) or batch)
    batch = torch.zeros(2)
    assert call(batch) is batch
    assert call(batch) is batch
    assert len(calls) == 2


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    assert isinstance(keep_freed_memory(), bool)
