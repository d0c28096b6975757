"""YOLO target assignment: from padded ground truth to the targets of every anchor, for a batch at once.

All functions share these rules, on every device:

- Ground truth is padded: `gt_boxes [B, M, 4]` xyxy, `gt_labels [B, M]` int64, `gt_valid [B, M]` bool, as
  `pad_ground_truth` makes it. Rows that are not valid never influence a result.
- No [B, gt, anchor] tensor is made; on a GPU nothing waits for the host.
- Results are the same on every device, ties included.
"""

from .simota import SimOTATargets, assign_simota
from .task_aligned import TaskAlignedAssigner, TaskAlignedMetrics, TaskAlignedTargets, assign_task_aligned
from .yolo_grid import YoloGridBoxes, assign_yolo_grid, decode_yolo_grid, yolo_loss
from .yolov3 import Yolov3Targets, assign_yolov3
from .yolov5 import Yolov5Targets, assign_yolov5, yolov5_target_lists

__all__ = [
    "SimOTATargets",
    "TaskAlignedAssigner",
    "TaskAlignedMetrics",
    "TaskAlignedTargets",
    "YoloGridBoxes",
    "Yolov3Targets",
    "Yolov5Targets",
    "assign_simota",
    "assign_task_aligned",
    "assign_yolo_grid",
    "assign_yolov3",
    "assign_yolov5",
    "decode_yolo_grid",
    "yolo_loss",
    "yolov5_target_lists",
]
