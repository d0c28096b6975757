"""Scenes for train_yolo.py: objects cut out of photographs that come with scikit-image, pasted on other photographs.

All is in grey, as colour would give the objects away.
"""

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from skimage import color, data, draw, filters, measure, segmentation
from torch.nn.functional import interpolate

import detops

CLASSES = ("coin", "face", "cup")
SIZE = 128  # pixels of a scene's sides
BACKGROUNDS = ("brick", "chelsea", "grass", "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina")
UNSEEN_BACKGROUNDS = ("gravel", "rocket", "text")


def photograph(name):
    image = getattr(data, name)()
    return torch.from_numpy(color.rgb2gray(image) if image.ndim == 3 else image / 255).float()


def cut_out(image, mask):
    """[2, h, w]: the object's brightness and its mask, cropped to the mask."""
    left, top, right, bottom = detops.masks_to_boxes(mask[None])[0].int()
    return torch.stack((image, mask.float()))[:, top : bottom + 1, left : right + 1]


def inside(shape, *ellipses):
    """A mask of ellipses, each (y, x, its radii along y and x)."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for ellipse in ellipses:
        mask[draw.ellipse(*ellipse, shape=shape)] = True
    return mask


def cut_out_objects():
    """The objects of each class to train with, and those to try the detector on: every fourth coin and face.

    Of the cup there is one photograph, which serves both.
    """
    tray = photograph("coins")
    # The light is uneven: no threshold parts coins from tray, but what is surely either can grow up to the edges.
    surely = np.where(tray < 0.12, 1, np.where(tray > 0.59, 2, 0))
    regions = segmentation.watershed(filters.sobel(tray.numpy()), surely)
    regions = measure.label(binary_fill_holes(regions == 2))
    numbers = [region.label for region in measure.regionprops(regions) if region.area > 500]
    coins = [cut_out(tray, torch.from_numpy(regions == number)) for number in numbers]
    faces = torch.from_numpy(data.lfw_subset()[:100]).float()  # what follows are no faces
    faces = [cut_out(face, inside(face.shape, (12, 12, 12.5, 10.5))) for face in faces]
    coffee = photograph("coffee")
    cups = [cut_out(coffee, inside(coffee.shape, (225, 278, 163, 201), (113, 290, 97, 118)))]

    training_coins, training_faces = ([each for i, each in enumerate(many) if i % 4 < 3] for many in (coins, faces))
    # Coins lie any way round, and there are few of them.
    training_coins = [coin.rot90(turns, (1, 2)) for coin in training_coins for turns in range(4)]
    return [training_coins, training_faces, cups], [coins[3::4], faces[3::4], cups]


class Scenes:
    """Random scenes without end, the same ones for the same seed."""

    def __init__(self, objects, backgrounds, seed):
        self.objects, self.backgrounds = objects, [photograph(name) for name in backgrounds]
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, count):
        """Images [count, 1, SIZE, SIZE] and their padded `GroundTruth`."""
        images, boxes, labels = zip(*(self.scene() for _ in range(count)), strict=True)
        return torch.stack(images), detops.pad_ground_truth(boxes, labels)

    def scene(self):
        """An image [1, SIZE, SIZE], its boxes [n, 4] and their labels [n], n from 0 to 5."""
        ground = self.pick(self.backgrounds)
        side = int(self.uniform(0.5, 1) * min(ground.shape))
        top, left = (int(self.uniform(0, 1) * (length - side + 1)) for length in ground.shape)
        image = self.lit(self.resized(ground[None, top : top + side, left : left + side], SIZE, SIZE))

        # Ten places in random order, of which NMS keeps those that stay clear of the ones before.
        sides = (self.uniform(20, 56, 10, 1) * self.uniform(0.8, 1, 10, 2)).round()
        corners = (self.uniform(0, 1, 10, 2) * (SIZE - sides)).round()
        boxes = torch.cat((corners, corners + sides), dim=1)
        boxes = boxes[detops.nms(boxes, self.uniform(0, 1, 10), 0.02)][: int(self.uniform(0, 6))]
        labels = torch.randint(len(CLASSES), (len(boxes),), generator=self.random)
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels, strict=True):
            pixels, mask = self.resized(self.pick(self.objects[label]), y2 - y1, x2 - x1)
            place = image[0, y1:y2, x1:x2]
            place.lerp_(self.lit(pixels), mask)
        return image, boxes, labels

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=self.random)

    def pick(self, many):
        return many[torch.randint(len(many), (), generator=self.random)]

    def resized(self, image, height, width):
        """Half of the time mirrored, too."""
        image = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        return image.flip(-1) if self.uniform(0, 1) < 0.5 else image

    def lit(self, image):
        """In another light."""
        mean = image.mean()
        return ((image - mean) * self.uniform(0.6, 1.3) + mean + self.uniform(-0.15, 0.15)).clamp(0, 1)
