"""A network that was really trained, in code that is not torchvision's: the MTCNN face detector of `facenet-pytorch`,
whose wheel carries its weights, imports torchvision's batched_nms by name. It finds the same faces with detops.

It runs where facenet-pytorch (installed without its pins), requests, tqdm and scikit-image's pictures are.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import detops


@pytest.fixture(scope="module")
def photographs():
    """The astronaut as she is and mirrored, read from the file: importing skimage takes packages that this does not."""
    image = pytest.importorskip("PIL.Image")
    found = importlib.util.find_spec("skimage")
    if found is None:
        pytest.skip("scikit-image is not installed")
    astronaut = np.asarray(
        image.open(Path(found.submodule_search_locations[0]) / "data" / "astronaut.png").convert("RGB")
    )
    return np.stack((astronaut, astronaut[:, ::-1]))


@pytest.fixture
def detector(torchvision):
    for needed in ("requests", "tqdm"):
        pytest.importorskip(needed)
    return pytest.importorskip("facenet_pytorch").MTCNN(keep_all=True)


def test_finds_the_same_faces(detector, photographs, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args[0].shape)
        return batched_nms(*args)

    batched_nms = detops.batched_nms
    monkeypatch.setattr(detops, "batched_nms", counted)
    expected = detector.detect(photographs, landmarks=True)
    assert not calls
    with detops.compat.torchvision():
        found = detector.detect(photographs, landmarks=True)
    assert len(calls) > 3
    for ours, theirs, tolerance in zip(found, expected, (1e-3, 1e-5, 1e-3), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol=0, atol=tolerance)
    boxes, probabilities, landmarks = found
    for best, face in ((0, (225, 115)), (1, (511 - 225, 115))):  # between the eyes, seen in the picture
        x1, y1, x2, y2 = boxes[best][0]
        assert x1 < face[0] < x2 and y1 < face[1] < y2
        assert probabilities[best][0] > 0.99
        assert np.linalg.norm(landmarks[best][0][:2].mean(0) - face) < 15
