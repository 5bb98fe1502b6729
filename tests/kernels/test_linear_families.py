"""The families that only research formats use: what their weights mean, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.contract import LinearKernel
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.registry import kernels_for
from kernels.linear.sparse.layout import SparseWeights
from tests.kernels.test_linear import SHAPES, check, named
from tests.kernels.weights import codes_by_hand, random_codebook, random_lookup, random_lowrank, random_sparse


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lookup(bits: int, num_tokens: int, k: int, n: int, group: int) -> None:
    check(kernels_for("lookup")[-1], random_lookup(bits, k, n, group, seed=bits), num_tokens)


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), [(1, 64, 48, 32), (17, 40, 33, 16), (3, 2048, 7, 2048)])
@pytest.mark.parametrize(("vector_size", "num_vectors"), [(4, 200), (8, 256), (8, 65536)])
def test_codebook(vector_size: int, num_vectors: int, num_tokens: int, k: int, n: int, group: int) -> None:
    check(kernels_for("codebook")[-1], random_codebook(vector_size, num_vectors, k, n, group, seed=k), num_tokens)


@pytest.mark.parametrize(("num_tokens", "k", "n", "rank"), [(1, 64, 48, 32), (17, 45, 33, 3), (3, 4096, 7, 700)])
@pytest.mark.parametrize("kernel", kernels_for("lowrank"), ids=named)
def test_lowrank(kernel: LinearKernel, num_tokens: int, k: int, n: int, rank: int) -> None:
    check(kernel, random_lowrank(k, n, rank, seed=rank), num_tokens)


@pytest.mark.parametrize(("num_tokens", "k", "n", "group"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_sparse(density: float, num_tokens: int, k: int, n: int, group: int) -> None:
    check(kernels_for("sparse")[-1], random_sparse(k, n, density, seed=group), num_tokens)


def test_lookup_is_the_formula() -> None:
    """Bug: the table of the neighbouring group, or of the row above."""
    weights = random_lookup(3, 45, 5, 16, seed=1)
    codes = codes_by_hand(weights.codes, 3, 45)
    expected = [[float(weights.tables[n, k // 16, codes[n][k]]) for k in range(45)] for n in range(5)]
    assert weights.dequantize().tolist() == expected
    assert torch.equal(weights.dequantize_rows(1, 4), weights.dequantize()[1:4])


def test_codebook_is_the_formula() -> None:
    """Bug: codes of 32,768 and more, stored as negative numbers, read from the wrong end of the table."""
    weights = random_codebook(8, 65536, 48, 40, 16, seed=2)
    assert bool((weights.codes < 0).any())
    for n, k in ((0, 0), (3, 17), (39, 47)):
        vector = weights.book[int(weights.codes[n, k // 8]) % 65536]
        assert float(weights.dequantize()[n, k]) == float(vector[k % 8].float() * weights.scales[n, k // 16])


def test_sparse_is_the_formula() -> None:
    """Bug: entries of an empty row given to the next one."""
    starts, columns = torch.tensor([0, 2, 2, 3], dtype=torch.int32), torch.tensor([1, 3, 0], dtype=torch.int32)
    weights = SparseWeights(4, starts, columns, torch.tensor([5.0, 6.0, 7.0]))
    assert weights.dequantize().tolist() == [[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 0]]
    assert weights.dequantize_rows(1, 3).tolist() == [[0, 0, 0, 0], [7, 0, 0, 0]]


def test_tensors_that_make_no_matrix_are_refused() -> None:
    """Bug: a damaged file that reads past the end of a table, or writes past the end of a row."""
    lookup, pair = random_lookup(2, 32, 4, 16, seed=3), random_lowrank(8, 6, 3, seed=3)
    with pytest.raises(ValueError, match=r"tables has shape \(4, 2, 4\), expected \(4, 4, 4\)"):
        replace(lookup, group_size=8)
    with pytest.raises(ValueError, match="a has rank 3, b has rank 2"):
        replace(pair, b=pair.b[:2])
    book = random_codebook(8, 200, 32, 4, 32, seed=3)
    with pytest.raises(ValueError, match="codes reach"):
        replace(book, book=book.book[:20])
    with pytest.raises(ValueError, match="vectors of 5 values"):
        replace(book, book=book.book[:, :5])
    with pytest.raises(ValueError, match="not whole vectors"):
        replace(book, in_features=33)
    with pytest.raises(ValueError, match=r"codes reach 65535"):
        CodebookWeights(8, 8, torch.full((1, 1), -1, dtype=torch.int16), book.book, torch.ones(1, 1))
    sparse = random_sparse(16, 4, 0.5, seed=3)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"columns": sparse.columns + 16}, r"0\.\.15"),
        ({"columns": sparse.columns.flip(0)}, "rise in each row"),
        ({"starts": sparse.starts + 1}, "begin with 0"),
        ({"values": sparse.values[:-1]}, "one for each"),
        ({"columns": sparse.columns[:-1], "values": sparse.values[:-1]}, "starts ends with"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            replace(sparse, **change)
