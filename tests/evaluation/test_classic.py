"""scikit-learn's classifiers on pixels."""

import pytest
import torch

from lightning_dpgen import DigitsDataModule
from lightning_dpgen.evaluation.classic import CLASSIC, classic


@pytest.fixture(scope="module")
def records():
    data = DigitsDataModule()
    data.setup()
    return data.train_records.tensors(), data.real_test()


def test_every_classifier_learns_from_real_records(records):
    table = classic(*records, 10, show_progress=False)
    assert list(table.accuracy) == list(CLASSIC)
    least = {"AdaBoost": 30, "GaussianNB": 70, "DecisionTree": 70, "Bagging": 70}
    for name in CLASSIC:
        assert table.mean(name) > least.get(name, 85), name
        assert len(table.per_class[name]) == 10
    assert table.to_dict()["protocol"] == "classic"


def test_seeds_repeat_and_bad_input_is_refused(records):
    (images, labels), real = records
    one, other = (classic((images[:200], labels[:200]), real, 10, [1, 2], ["RandomForest"], show_progress=False) for _ in range(2))
    assert one.accuracy == other.accuracy
    assert len(one.accuracy["RandomForest"]) == 2
    with pytest.raises(ValueError, match="no classifier SVM"):
        classic(*records, 10, classifiers=["SVM"])
    with pytest.raises(ValueError, match=r"\(1, 9, 9\)"):
        classic((torch.rand(20, 1, 9, 9), labels[:20]), real, 10, classifiers=["LDA"])


def test_one_image_a_class_is_enough_for_all_but_lda(records, caplog):
    (images, labels), real = records
    first = torch.stack([torch.nonzero(labels == label)[0, 0] for label in range(10)])
    table = classic((images[first], labels[first]), real, 10, show_progress=False)
    assert list(table.accuracy) == [name for name in CLASSIC if name != "LDA"]
    assert "LDA needs more images" in caplog.text
