from dataclasses import replace

import pytest
import torch

from common import models
from common.evaluation import probes
from common.run.sampling import epochs_of


def blobs(count: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three corners."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centers = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    return centers[labels] + spread * torch.randn(count, 3, generator=generator), labels


@pytest.fixture
def latents() -> probes.Latents:
    return probes.Latents(*blobs(300, 0), *blobs(60, 1), *blobs(90, 2))


def test_the_linear_probe_equals_scikit_learns_at_its_strength(latents):
    from sklearn.linear_model import LogisticRegression

    probe = probes.fit_linear(latents, classes=3)
    standard = ((latents.train - probe.mean) / probe.scale).numpy()
    penalty = 1 / (probe.strength * len(standard))
    expected = LogisticRegression(C=penalty, tol=1e-8, max_iter=1000).fit(
        standard, latents.train_labels
    )
    # the intercepts are free up to a shift, which changes no probability
    assert torch.allclose(probe.weight, torch.tensor(expected.coef_).float(), atol=0.02)
    found = probe.predict(latents.test)
    assert (found.numpy() == expected.predict((latents.test - probe.mean) / probe.scale)).all()
    assert probe.accuracy == probes.accuracy(
        probe.predict(latents.validation), latents.validation_labels
    )


@pytest.mark.parametrize("balance", [False, True])
def test_many_logits_are_computed_in_blocks_with_the_same_result(latents, monkeypatch, balance):
    whole, whole_row = probes.linear_classifier(latents, 3, balance)
    monkeypatch.setattr(probes, "BLOCK", 64)
    monkeypatch.setattr(probes, "LARGEST_LOGITS", 1)
    blocks, row = probes.linear_classifier(latents, 3, balance)
    assert torch.allclose(blocks.weight, whole.weight, atol=1e-2)
    assert row == pytest.approx(whole_row, abs=1e-3)


def test_a_rotation_of_the_space_changes_nothing_for_the_linear_probe():
    """So PCA with all dimensions is as accurate as the pixels, however few the labels are."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator))
    spread = torch.logspace(0, -3, 20)  # the last directions are noise

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 4
        inputs = torch.randn(count, 20, generator=generator)
        inputs[:, :3] += 2 * torch.eye(4)[labels][:, :3]
        return inputs * spread, labels

    plain = probes.Latents(*draw(40), *draw(400), *draw(400))
    splits = {name: getattr(plain, name) @ rotation for name in ("train", "validation", "test")}
    found = [probes.fit_linear(each, 4) for each in (plain, replace(plain, **splits))]
    assert found[0].strength == found[1].strength
    assert torch.allclose(found[0].weight @ rotation, found[1].weight, atol=2e-2)
    same = found[0].predict(plain.test) == found[1].predict(splits["test"])
    assert same.float().mean() > 0.99
    assert found[0].accuracy > 0.6


def test_few_latents_are_passed_until_batch_norm_has_seen_enough(latents):
    assert epochs_of(None, 54_000 // 256, probes.FEWEST_STEPS) == (20, 1)
    assert epochs_of(None, 1294 // 256, probes.FEWEST_STEPS) == (40, 2)  # 5 steps each
    assert epochs_of(None, 1, probes.FEWEST_STEPS) == (200, 10)
    assert epochs_of(3, 1, probes.FEWEST_STEPS) == (3, 1)
    few = replace(latents, train=latents.train[:30], train_labels=latents.train_labels[:30])
    classifier, rows = train(few, epochs=205, evaluate_every=10)
    assert len(rows) == 21  # and after the last one
    assert not classifier.training


@pytest.mark.parametrize("hidden", [False, True])
def test_validation_chooses_the_strength(hidden, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(count, 5 if hidden else 30, generator=generator)
        labels = torch.randint(0, 2, (count,), generator=generator)
        if hidden:  # in the difference of two that are nearly equal: small weights do not reach it
            inputs[:, 0] = inputs[:, 1] + 0.02 * (2 * labels - 1)
        else:  # in one direction among 29 useless ones: large weights fit those too
            inputs[:, 0] += 3 * labels
        return inputs, labels

    latents = probes.Latents(*draw(200 if hidden else 40), *draw(1000))
    chosen = probes.fit_linear(latents, 2)
    alone = {}
    for strength in probes.STRENGTHS:
        monkeypatch.setattr(probes, "STRENGTHS", (strength,))
        alone[strength] = probes.fit_linear(latents, 2).accuracy
    assert chosen.strength == max(alone, key=alone.get)
    assert (chosen.strength < 1e-3) == hidden
    assert max(alone.values()) > min(alone.values()) + 0.01


def test_projections_are_what_the_head_makes_of_the_latents(latents):
    head = torch.nn.Linear(3, 2)
    projected = latents.projected(head)
    expected = torch.nn.functional.normalize(head(latents.test), dim=1)
    assert torch.equal(projected.test, expected)
    assert projected.train.shape == (300, 2)
    assert not projected.train.requires_grad
    assert torch.equal(projected.train_labels, latents.train_labels)


def test_the_linear_probe_as_one_layer_gives_its_predictions(latents):
    layer, row = probes.linear_classifier(latents, classes=3)
    probe = probes.fit_linear(latents, classes=3)
    standard = (latents.test - probe.mean) / probe.scale
    expected = standard @ probe.weight.T + probe.bias
    assert torch.allclose(layer(latents.test), expected, atol=1e-4)
    assert row["val/accuracy"] == probe.accuracy
    assert set(row) == {
        *("train/classifier_loss", "train/accuracy", "val/classifier_loss", "val/accuracy")
    }


def train(latents, seed=0, epochs=8, evaluate_every=1):
    torch.manual_seed(0)
    classifier = models.MLPClassifier(3, 32, 3, dropout=0.2)
    rows = list(
        probes.train_classifier(
            classifier,
            latents,
            epochs=epochs,
            batch_size=32,
            learning_rate=1e-2,
            weight_decay=1e-2,
            seed=seed,
            evaluate_every=evaluate_every,
        )
    )
    return classifier, rows


def test_the_classifier_learns_and_keeps_its_best_epoch(latents):
    classifier, rows = train(latents)
    assert rows[-1]["train/classifier_loss"] < rows[0]["train/classifier_loss"] / 2
    assert not classifier.training
    predictions = probes.predict(classifier, latents.validation)
    reached = probes.accuracy(predictions, latents.validation_labels)
    assert reached == max(row["val/accuracy"] for row in rows) > 0.9


def test_the_classifier_is_a_pure_function_of_its_arguments(latents):
    first, rows = train(latents)
    torch.rand(7)  # whatever happened to the global generator in between
    second, again = train(latents)
    other, _ = train(latents, seed=1)
    assert rows == again
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_more_labels_help_and_the_same_images_are_drawn_for_every_space():
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % 2
        return torch.randn(count, 20, generator=generator) + labels[:, None] * 0.6, labels

    parts = [part(count) for count in (600, 40, 600)]
    latents = probes.Latents(*(tensor for pair in parts for tensor in pair))
    found = probes.label_efficiency(latents, 2, (1, 5, 200, 301), draws=3)
    assert {count: len(values) for count, values in found.items()} == {5: 3, 200: 3}
    assert sum(found[5]) / 3 + 0.05 < sum(found[200]) / 3 < 1
    turned = replace(latents, train=-latents.train, test=-latents.test)
    for count, values in probes.label_efficiency(turned, 2, (5, 200), 3).items():
        assert values == pytest.approx(found[count], abs=0.01)
    # what the other labels say is of no account
    blind = replace(latents, validation_labels=1 - latents.validation_labels)
    assert probes.label_efficiency(blind, 2, (5, 200), 3) == found


def unbalanced(seed: int = 0) -> probes.Latents:
    """Two overlapping classes, 380 and 20 to learn from."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(400) >= 380).long()
    latents = torch.randn(400, 2, generator=generator) + 1.5 * labels[:, None]
    test_labels = torch.arange(400) % 2
    test = torch.randn(400, 2, generator=generator) + 1.5 * test_labels[:, None]
    return probes.Latents(latents, labels, latents, labels, test, test_labels)


def test_class_weights_let_all_classes_count_alike():
    weights = probes.class_weights(torch.tensor([0, 0, 0, 2]), 3)
    assert torch.allclose(weights, torch.tensor([2 / 3, 4 / 2, 2.0]))  # 1 takes no part
    assert weights[[0, 0, 0, 2]].mean() == pytest.approx(1)
    # the mean of the classes' accuracies: 2/3 of class 0, all of class 2
    labels = torch.tensor([0, 0, 0, 2])
    assert probes.accuracy(torch.tensor([0, 0, 1, 2]), labels, weights) == pytest.approx(5 / 6)


def test_with_balance_a_rare_class_is_found_as_often_as_a_frequent_one():
    latents, recall = unbalanced(), {}
    recipe = dict(epochs=10, batch_size=50, learning_rate=0.01, weight_decay=0.0, seed=0)
    for balance in (False, True):
        layer, _ = probes.linear_classifier(latents, 2, balance)
        torch.manual_seed(0)
        mlp = models.MLPClassifier(2, 16, 2, dropout=0)
        for _ in probes.train_classifier(mlp, latents, **recipe, balance=balance):
            pass
        for name, classifier in (("linear", layer), ("mlp", mlp)):
            found = probes.predict(classifier, latents.test) == latents.test_labels
            recall[name, balance] = found[latents.test_labels == 1].float().mean().item()
    for name in ("linear", "mlp"):
        assert recall[name, True] > recall[name, False] + 0.2
