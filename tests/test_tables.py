import torch

from common.data import datasets
from common.display import tables


def split_of(count: int, labels: list[int]) -> datasets.Split:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return datasets.Split(images.contiguous(), torch.arange(count), torch.tensor(labels))


def test_mistakes_come_first_and_the_most_confident_of_them_before_all():
    split = split_of(5, [0, 0, 1, 1, 1])
    probabilities = torch.tensor([[0.4, 0.6], [0.7, 0.3], [0.9, 0.1], [0.2, 0.8], [0.45, 0.55]])
    (name, columns, rows), _ = tables.of_images(split, torch.zeros(5, 2), probabilities, "ab")
    assert name == "predictions"
    assert columns == ["image", "label", "prediction", "confidence", "is_right"]
    assert [int(row[0][0, 0, 0]) for row in rows] == [2, 0, 4, 1, 3]
    assert rows[0][1:] == ["b", "a", 0.9, False]
    assert rows[2][1:] == ["b", "b", 0.55, True]


def test_only_so_many_images_are_shown():
    count = 2 * tables.PREDICTIONS
    split = split_of(count, [0] * count)
    _, _, rows = tables.predictions(split, torch.ones(count).long(), torch.rand(count), ["a", "b"])
    assert len(rows) == tables.PREDICTIONS
    confidences = [row[3] for row in rows]
    assert confidences == sorted(confidences, reverse=True)


def test_embeddings_have_a_column_for_each_number():
    split = split_of(3, [0, 1, 0])
    latents = torch.tensor([[0.123456789, 1], [2, 3], [4, 5]])
    name, columns, rows = tables.embeddings(split, latents, torch.tensor([0, 0, 0]), ["a", "b"])
    assert (name, columns) == ("embeddings", ["image", "label", "prediction", "d000", "d001"])
    assert rows[0][1:] == ["a", "a", 0.12346, 1.0]
    assert rows[1][1:] == ["b", "a", 2.0, 3.0]
    assert [int(row[0][0, 0, 0]) for row in rows] == [0, 1, 2]


def test_large_latents_are_shown_for_fewer_images():
    split = split_of(200, [0] * 200)
    numbers = tables.LARGEST_EMBEDDINGS // 100
    _, columns, rows = tables.embeddings(
        split, torch.zeros(200, numbers), torch.zeros(200).long(), ["a"]
    )
    assert len(columns) == 3 + numbers
    assert len(rows) == 100
    assert int(rows[-1][0][0, 0, 0]) == 199  # spread over all of them


def test_the_table_shows_the_baselines_beside_the_latents():
    metrics = {"test/accuracy": 0.9912, "pca/accuracy": 0.98, "image/silhouette": 0.1}
    text = tables.final(metrics)
    assert [line.split()[-3:] for line in text.splitlines()[1:]] == [
        ["99.12%", "98.00%", "–"],
        ["–", "–", "0.100"],
    ]


def test_spaces_side_by_side_mean_and_std_best_and_missing():
    columns = {
        "joint": [
            {"accuracy": 0.98, "silhouette": 0.5, "labels_100": 0.9, "labels_50": 0.8},
            {"accuracy": 0.96, "silhouette": 0.5},
        ],
        "a|e": [{"accuracy": 0.90, "mse": 0.01, "labels_50": 0.85, "uniformity": -2.0}],
        "PCA": [{"mse": 0.02, "silhouette": float("nan"), "uniformity": -3.0}],
    }
    rows = tables.side_by_side(columns)
    assert rows[0].cells == ("joint (n=2)", "a|e", "PCA")
    by_text = {row.text: row for row in rows}
    std = (0.0002) ** 0.5  # of 0.98 and 0.96, divided by n − 1
    assert by_text["accuracy, trained classifier"].cells == (
        f"97.00% ± {std:.2%}", "90.00%", "–",
    )  # fmt: skip
    assert by_text["accuracy, trained classifier"].best == {0}
    assert by_text["reconstruction MSE"].best == {1}  # lower is better
    assert by_text["silhouette"].cells == ("0.500", "–", "nan")  # equal: no std
    assert by_text["silhouette"].best == frozenset()  # alone, or no number
    assert by_text["uniformity (lower: more even)"].best == frozenset()  # neither way is better
    order = [row.text for row in rows]
    assert order.index("50 labels per class") + 1 == order.index("100 labels per class")
    assert "cost" not in by_text  # a section without any number

    text = tables.as_text(rows)
    assert "97.00% ± 1.41%*" in text and text.endswith("* best of its row")
    lines = tables.as_markdown(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert any("**97.00% ± 1.41%**" in line for line in lines)
    csv_rows = tables.as_csv(columns).splitlines()
    assert csv_rows[0] == "space,metric,mean,std,n"
    assert "a|e,accuracy,0.9,0.0,1" in csv_rows
    mean, std = tables.means_and_stds(columns["joint"])
    assert (mean["labels_50"], std["labels_50"]) == (0.8, 0.0)
