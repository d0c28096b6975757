"""The examples, and what train_yolo.py is made of: its training, its detections and its way of counting."""

import importlib
from pathlib import Path

import pytest
import torch

import detops

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    for needed in ("skimage", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def train_yolo(example):
    return example("train_yolo")


@pytest.fixture
def scenes(train_yolo):
    return train_yolo.Scenes(train_yolo.cut_out_objects()[0], ("brick", "moon"), seed=0)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("name, says", [("find_coins", "24 coins kept"), ("crop_coffee", "cup: mean brightness 0.441")])
def test_runs_and_draws(name, says, example, monkeypatch, tmp_path, capsys):
    run(example(name), monkeypatch, "--output", tmp_path / "picture.png")
    assert says in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_train_yolo_runs_and_draws(train_yolo, monkeypatch, tmp_path, capsys):
    arguments = ["--steps", 3, "--batch-size", 2, "--unseen", 24, "--output", tmp_path / "folder"]
    run(train_yolo, monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert "step 3: loss" in said and "objects found at IoU 0.5" in said
    assert [path.name for path in sorted((tmp_path / "folder").iterdir())] == ["unseen_0.png", "unseen_1.png"]


def test_training_lowers_the_loss_and_repeats(train_yolo, scenes):
    images, truth = scenes.batch(2)
    assert truth.valid.any()

    def train():
        torch.manual_seed(0)
        model = train_yolo.Detector()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        return model, [train_yolo.training_step(model, optimizer, images, truth) for _ in range(12)]

    model, losses = train()
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert train()[1] == losses


def test_a_batch_without_objects_teaches_only_scores(train_yolo):
    model = train_yolo.Detector()
    truth = detops.pad_ground_truth([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    loss = train_yolo.detection_loss(model(torch.rand(2, 1, 64, 96)), truth)
    loss.backward()
    assert loss.isfinite() and loss > 0
    classes = len(train_yolo.CLASSES)
    for head in model.heads:
        gradient = head[-1].weight.grad
        assert gradient[:classes].any() and not gradient[classes:].any()


def test_detections_of_an_untrained_detector(train_yolo):
    images = torch.rand(2, 1, 64, 96)
    found = train_yolo.detect(train_yolo.Detector(), images, score_threshold=0.0)
    assert isinstance(found, detops.Detections)
    assert found.boxes.shape == (2, 100, 4) and not found.boxes.requires_grad
    for image, count in enumerate(found.counts.tolist()):
        assert 0 < count <= 8 * 12 + 4 * 6  # one for each cell
        boxes, labels = found.boxes[image, :count], found.labels[image, :count]
        assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert labels.min() >= 0 and labels.max() < len(train_yolo.CLASSES)
        assert (found.scores[image, :count].diff() <= 0).all()


def test_compare_counts_each_object_once(train_yolo):
    boxes = torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60], [80, 80, 100, 100]])
    truth = detops.pad_ground_truth([boxes, torch.zeros(0, 4)], [torch.tensor([0, 1, 1]), torch.zeros(0).long()])
    rows = torch.tensor([0, 0, 1, 2])  # the first coin twice, a face, and a face that is called a coin
    found = detops.Detections(
        boxes=torch.stack((boxes[rows] + 1, torch.cat((boxes, boxes[:1])))),
        scores=torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0, 0, 0]]),
        labels=torch.tensor([[0, 0, 1, 0], [2, -1, -1, -1]]),  # and a cup where there is nothing
        indices=torch.zeros(2, 4, dtype=torch.int64),
        counts=torch.tensor([4, 1]),
    )
    there, hits, false = train_yolo.compare(found, truth)
    assert there.tolist() == [1, 2, 0]
    assert hits.tolist() == [1, 1, 0]
    assert false.tolist() == [2, 0, 1]


def test_scenes_repeat_and_hold_objects_of_their_split(train_yolo, scenes):
    training, unseen = train_yolo.cut_out_objects()
    again = train_yolo.Scenes(training, ("brick", "moon"), seed=0)
    (images, truth), (same, same_truth) = scenes.batch(8), again.batch(8)
    assert torch.equal(images, same) and torch.equal(truth.boxes, same_truth.boxes)
    assert images.shape == (8, 1, train_yolo.SIZE, train_yolo.SIZE)
    assert images.min() > -1e-6 and images.max() < 1 + 1e-6
    boxes = truth.boxes[truth.valid]
    assert boxes.min() >= 0 and boxes.max() <= train_yolo.SIZE and (boxes[:, 2:] - boxes[:, :2]).min() >= 16
    assert [len(each) for each in training] == [4 * 18, 75, 1] and [len(each) for each in unseen] == [6, 25, 1]
    for seen, others in zip(training[:2], unseen[:2], strict=True):  # coins and faces
        assert not any(torch.equal(one, other) for one in seen for other in others)
    assert not set(train_yolo.BACKGROUNDS) & set(train_yolo.UNSEEN_BACKGROUNDS)
