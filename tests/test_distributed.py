"""A training step of examples/train_yolo.py on two processes with DistributedDataParallel."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

EXAMPLES = Path(__file__).parents[1] / "examples"
PROCESSES = 2


def share_of(train_yolo, rank):
    """The scenes of one process."""
    return train_yolo.Scenes(train_yolo.cut_out_objects()[0], train_yolo.BACKGROUNDS[:2], seed=rank).batch(2)


def build_model(train_yolo):
    torch.manual_seed(0)
    return train_yolo.Detector()


def train_one_process(rank, folder):
    sys.path.insert(0, str(EXAMPLES))
    import train_yolo

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(build_model(train_yolo))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the gradients are looked at, clipped as they are
    train_yolo.training_step(model, optimizer, *share_of(train_yolo, rank))
    torch.save([each.grad for each in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_mean_gradient(tmp_path, monkeypatch):
    for needed in ("skimage", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_yolo

    torch.multiprocessing.spawn(train_one_process, (str(tmp_path),), PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    assert all(map(torch.equal, first, second))

    model = build_model(train_yolo)
    for rank in range(PROCESSES):
        images, truth = share_of(train_yolo, rank)
        (train_yolo.detection_loss(model(images), truth) / PROCESSES).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
    for got, parameter in zip(first, model.parameters(), strict=True):
        assert parameter.grad.any()
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5)
