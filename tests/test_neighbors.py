import pytest
import torch

from common.evaluation import neighbors


def test_knn_votes_as_a_hand_made_case_says():
    references = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    labels = torch.tensor([0, 1, 1, 2, 2])
    queries = torch.tensor([[0.1], [9.0]])
    assert neighbors.predict(references, labels, queries, 1).tolist() == [0, 2]
    assert neighbors.predict(references, labels, queries, 3).tolist() == [1, 2]
    # one vote each for 0 and 1: the nearer wins
    assert neighbors.predict(references, labels, queries[:1], 2).tolist() == [0]


def test_knn_equals_scikit_learns(monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(neighbors, "BLOCK", 13)
    generator = torch.Generator().manual_seed(0)
    train, queries = (4 * torch.randn(n, 3, generator=generator) for n in (200, 100))
    labels = torch.arange(200) % 3
    expected = KNeighborsClassifier(1).fit(train + 1000, labels).predict(queries + 1000)
    found = neighbors.predict(train + 1000, labels, queries + 1000, 1)
    # far from the origin float32 keeps four digits: nearly all must still agree
    assert (found.numpy() == expected).mean() >= 0.97


def test_neighbors_for_several_k_at_once_equal_those_one_by_one(monkeypatch):
    monkeypatch.setattr(neighbors, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    references, queries = (torch.randn(n, 3, generator=generator) for n in (40, 30))
    labels = torch.randint(0, 4, (40,), generator=generator)
    by_k = neighbors.predict_by_k(references, labels, queries, (1, 5, 100))
    for k, predictions in by_k.items():
        assert torch.equal(predictions, neighbors.predict(references, labels, queries, k))
    # by hand: on a line the nearest says 1, it wins against the second, and of three two say 0
    line, line_labels = torch.tensor([[0.0], [2.0], [3.0], [9.0]]), torch.tensor([1, 0, 0, 1])
    by_k = neighbors.predict_by_k(line, line_labels, torch.tensor([[0.9]]), (1, 2, 3))
    assert {k: found.item() for k, found in by_k.items()} == {1: 1, 2: 1, 3: 0}


@pytest.mark.parametrize("columns", [5, 31, 32 * 6, 32 * 6 + 1, 1000])
def test_the_smallest_of_each_row_in_their_order(columns):
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(50, columns, generator=generator)
    assert torch.equal(neighbors.smallest(values, 5), values.argsort(dim=1)[:, :5])


def test_numbers_that_all_references_share_leave_the_neighbors_alone():
    generator = torch.Generator().manual_seed(0)
    references, queries = (torch.randn(n, 3, generator=generator) for n in (40, 30))
    labels = torch.arange(40) % 4
    expected = neighbors.predict(references, labels, queries)
    shared = torch.cat([references, torch.full((40, 2), 7.0)], dim=1)
    extended = torch.cat([queries, torch.randn(30, 2, generator=generator)], dim=1)
    assert torch.equal(neighbors.predict(shared, labels, extended), expected)
    # nothing tells the references apart: the first ones are as near as any
    assert len(neighbors.predict(torch.ones(40, 2), labels, torch.randn(3, 2))) == 3


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 2], [1, 0, 0, 2, 1], [1, 0, 2, 1, 0]])
def test_of_classes_with_equal_votes_the_nearest_one_wins(labels):
    line = torch.arange(5.0)[:, None]
    assert neighbors.predict(line, torch.tensor(labels), torch.tensor([[-0.5]])).item() == 1


@pytest.mark.parametrize("far", [0.0, 30.0])
def test_euclidean_and_cosine_neighbors_from_one_product(monkeypatch, far):
    monkeypatch.setattr(neighbors, "BLOCK", 13)
    generator = torch.Generator().manual_seed(0)
    references, queries = (torch.randn(n, 8, generator=generator) + far for n in (300, 100))
    references[7], queries[:, 3] = 0, 5  # no direction; a number that all queries share
    labels = torch.randint(0, 4, (300,), generator=generator)
    euclidean, cosine = neighbors.predict_both(references, labels, queries)
    assert torch.equal(euclidean, neighbors.predict(references, labels, queries))
    unit = [torch.nn.functional.normalize(x.double()) for x in (references, queries)]
    expected = neighbors.predict(unit[0], labels, unit[1])
    assert (cosine == expected).double().mean() > (0.99 if far else 0.999)
    assert (cosine != euclidean).any()
