"""Box utilities from their definition."""

import numpy as np


def pad_ground_truth(boxes, labels):
    """Lists of [n_i, 4] and [n_i] as arrays (boxes [B, M, 4], labels [B, M], valid [B, M]), M = max n_i.

    Rows past n_i hold box 0, label -1 and valid False.
    """
    rows = max((len(image_labels) for image_labels in labels), default=0)
    out_boxes = np.zeros((len(boxes), rows, 4), boxes[0].dtype if boxes else np.float32)
    out_labels = np.full((len(boxes), rows), -1, np.int64)
    valid = np.zeros((len(boxes), rows), bool)
    for image, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        for row in range(len(image_labels)):
            out_boxes[image, row] = image_boxes[row]
            out_labels[image, row] = image_labels[row]
            valid[image, row] = True
    return out_boxes, out_labels, valid
