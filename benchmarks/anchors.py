"""Anchors on grids, which come from a cache, and k-means on the shapes of boxes."""

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch

import detops
from harness import Case, optional, same

torchvision = optional("torchvision")
sklearn = optional("sklearn.cluster") if optional("sklearn") else None

SIZES, RATIOS = ((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5
EUCLIDEAN = 1  # its number in csrc/anchors/anchors.h


# Inputs


def feature_maps(device: str) -> tuple[torch.Tensor, ...]:
    """A batch of 4 images of 800 x 1344 pixels, and the maps of a feature pyramid with one channel."""
    maps = [torch.zeros(4, 1, math.ceil(800 / s), math.ceil(1344 / s)) for s in (4, 8, 16, 32, 64)]
    return tuple(t.to(device) for t in (torch.zeros(4, 1, 800, 1344), *maps))


def box_sizes(n: int, device: str) -> tuple[torch.Tensor]:
    """Widths and heights of boxes as data sets have them: a factor of 50 between small and large."""
    generator = torch.Generator().manual_seed(0)
    size, shape = torch.randn(n, 1, generator=generator), torch.randn(n, 2, generator=generator)
    return (torch.exp(3.5 + 0.9 * size + 0.35 * shape).to(device),)


def sizes_and_start(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    (sizes,) = box_sizes(n, "cpu")
    sizes = sizes / 2.0 ** math.frexp(sizes.max().item())[1]
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:k]
    return sizes.to(device), sizes[chosen].to(device)


# Cases


def generate(generator, images, *maps):
    image_list = SimpleNamespace(tensors=images, image_sizes=[tuple(images.shape[-2:])] * len(images))
    return generator(image_list, list(maps))


def lloyd(sizes, start, iterations: int):
    return detops._library.ops.kmeans_anchors(sizes, start, EUCLIDEAN, iterations)[0]


def scikit_learn_lloyd(sizes, start, iterations: int):
    k = len(start)
    model = sklearn.KMeans(k, init=start.cpu().numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    return torch.from_numpy(model.fit(sizes.cpu().numpy()).cluster_centers_)


def scikit_learn_anchors(sizes, k: int):
    return sklearn.KMeans(k, n_init=1, random_state=0).fit(sizes.cpu().numpy())


def cases(device: str, quick: bool) -> Iterator[Case]:
    generator = detops.AnchorGenerator(SIZES, RATIOS)
    peers, theirs = {}, None
    if torchvision:
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        theirs = AnchorGenerator(SIZES, RATIOS)
        peers["torchvision"] = partial(generate, theirs)
    yield Case(
        name="AnchorGenerator 4 x 268,569",
        make_inputs=partial(feature_maps, device),
        run=partial(generate, generator),
        peers=peers,
        verify=None if peers else lambda anchors, *_: len(anchors) == 4,
        same=same,
        prediction="no launch: from the cache",
    )
    iterations = 50
    for n in (10_000, 100_000):
        yield Case(
            name=f"kmeans_anchors, Lloyd alone, {n:,} k=9, {iterations} iterations",
            make_inputs=partial(sizes_and_start, n, 9, device),
            run=partial(lloyd, iterations=iterations),
            peers={"scikit-learn": partial(scikit_learn_lloyd, iterations=iterations)} if sklearn else {},
            same=lambda ours, theirs: torch.allclose(ours.cpu(), theirs, rtol=0, atol=1e-5),
            verify=None if sklearn else lambda anchors, *_: bool((anchors > 0).all()),
            asked="10x scikit-learn" if n == 100_000 else "",
            prediction=f"{2 * iterations + 2} launches of 4 us: 0.4 ms",
        )
    if quick:
        return
    for metric in ("iou", "euclidean"):
        yield Case(
            name=f"kmeans_anchors {metric} 10,000 k=9",
            make_inputs=partial(box_sizes, 10_000, device),
            run=lambda sizes, metric=metric: detops.kmeans_anchors(sizes, 9, metric=metric),
            peers={"scikit-learn": partial(scikit_learn_anchors, k=9)} if sklearn else {},
            may_differ=["scikit-learn"],  # another start, and no IoU
            same=lambda ours, theirs: False,
            verify=lambda found, sizes: 0.5 < found.mean_iou <= 1,
            prediction="seeding and climbing are some hundred small launches with a host synchronisation each: 20 ms",
        )
