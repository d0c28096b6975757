"""Object-detection kernels for PyTorch: exact, deterministic, fast on CPU and GPU.

>>> from detops import nms
>>> keep = nms(boxes, scores, iou_threshold=0.5)

Each family of ops is a module (`detops.boxes`, `detops.nms`, ...); its public names are also here. Where a family and
its main function share a name, as `nms`, the name in this package is the function.
"""

from . import _library  # first: it loads the compiled library or says why it cannot
from . import compat as compat
from . import onnx as onnx
from .anchors import (
    AnchorGenerator,
    DefaultBoxGenerator,
    KMeansAnchors,
    PointAnchors,
    grid_anchors,
    kmeans_anchors,
    point_anchors,
    yolo_anchors,
)
from .boxes import (
    GroundTruth,
    box_area,
    box_convert,
    clip_boxes_to_image,
    masks_to_boxes,
    pad_ground_truth,
    remove_small_boxes,
)
from .coders import (
    BoxCoder,
    YoloPredictions,
    decode_boxes,
    decode_dfl,
    decode_ltrb,
    decode_yolo,
    encode_boxes,
    encode_ltrb,
)
from .iou import (
    box_ioa,
    box_iou,
    complete_box_iou,
    distance_box_iou,
    efficient_box_iou,
    generalized_box_iou,
    max_iou,
)
from .linear_sum_assignment import linear_sum_assignment, match_detr
from .losses import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    distribution_focal_loss,
    efficient_box_iou_loss,
    generalized_box_iou_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    siou_loss,
    varifocal_loss,
)
from .matching import Matcher, Matches, Samples, assign_atss, match_max_iou, match_ssd, sample_matches
from .nms import Detections, batched_nms, multiclass_nms, nms, nms_rotated
from .roi import BoxFormatError, multi_scale_roi_align, roi_align, roi_align_rotated
from .roi_modules import MultiScaleRoIAlign, PSRoIAlign, PSRoIPool, RoIAlign, RoIPool
from .roi_pooling import ps_roi_align, ps_roi_pool, roi_pool
from .yolo import (
    SimOTATargets,
    TaskAlignedAssigner,
    TaskAlignedMetrics,
    TaskAlignedTargets,
    YoloGridBoxes,
    Yolov3Targets,
    Yolov5Targets,
    assign_simota,
    assign_task_aligned,
    assign_yolo_grid,
    assign_yolov3,
    assign_yolov5,
    decode_yolo_grid,
    yolo_loss,
    yolov5_target_lists,
)

__version__ = _library.version

__all__ = [
    "AnchorGenerator",
    "BoxCoder",
    "BoxFormatError",
    "DefaultBoxGenerator",
    "Detections",
    "GroundTruth",
    "KMeansAnchors",
    "Matcher",
    "Matches",
    "MultiScaleRoIAlign",
    "PSRoIAlign",
    "PSRoIPool",
    "PointAnchors",
    "RoIAlign",
    "RoIPool",
    "Samples",
    "SimOTATargets",
    "TaskAlignedAssigner",
    "TaskAlignedMetrics",
    "TaskAlignedTargets",
    "YoloGridBoxes",
    "YoloPredictions",
    "Yolov3Targets",
    "Yolov5Targets",
    "assign_atss",
    "assign_simota",
    "assign_task_aligned",
    "assign_yolo_grid",
    "assign_yolov3",
    "assign_yolov5",
    "batched_nms",
    "box_area",
    "box_convert",
    "box_ioa",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "decode_boxes",
    "decode_dfl",
    "decode_ltrb",
    "decode_yolo",
    "decode_yolo_grid",
    "distance_box_iou",
    "distance_box_iou_loss",
    "distribution_focal_loss",
    "efficient_box_iou",
    "efficient_box_iou_loss",
    "encode_boxes",
    "encode_ltrb",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "grid_anchors",
    "kmeans_anchors",
    "linear_sum_assignment",
    "masks_to_boxes",
    "match_detr",
    "match_max_iou",
    "match_ssd",
    "max_iou",
    "multi_scale_roi_align",
    "multiclass_nms",
    "nms",
    "nms_rotated",
    "pad_ground_truth",
    "point_anchors",
    "ps_roi_align",
    "ps_roi_pool",
    "quality_focal_loss",
    "remove_small_boxes",
    "roi_align",
    "roi_align_rotated",
    "roi_pool",
    "sample_matches",
    "sigmoid_focal_loss",
    "siou_loss",
    "varifocal_loss",
    "yolo_anchors",
    "yolo_loss",
    "yolov5_target_lists",
]
